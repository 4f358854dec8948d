//! What a benchmark prints.

use serde_json::json;

/// Which way is better.
#[derive(Clone, Copy)]
pub enum Better {
    Lower,
    Higher,
}

/// Prints one measure.
pub fn print(measure: &str, value: f64, unit: &str, goal: Option<f64>, better: Better) {
    let better = match better {
        Better::Lower => "lower",
        Better::Higher => "higher",
    };
    let value = (value * 1000.0).round() / 1000.0;
    println!(
        "{}",
        json!({ "measure": measure, "value": value, "unit": unit, "goal": goal, "better": better })
    );
}

/// The q-quantile of some values.
pub fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = ((values.len() - 1) as f64 * q).round() as usize;
    values[at]
}

/// Memory that only this process uses, in MiB; of what it shares with a process that it forked, its part.
pub fn private_mib(pid: i32) -> f64 {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(path).expect("the process lives");
    let kib = |name: &str| -> f64 {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .expect("the kernel tells");
        line.trim()
            .trim_end_matches(" kB")
            .trim()
            .parse()
            .expect("a number")
    };
    (kib("Private_Clean:") + kib("Pss_Dirty:")) / 1024.0
}
