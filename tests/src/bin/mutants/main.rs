//! Does the harness see? Runs the project's tests with one deliberate fault after the other, and says which of them nobody noticed:
//! `cargo run -p batchai-tests --bin mutants`, with `--list`, or `--only NAME` (also several times).
//!
//! It makes no faults (they stand in the sources, `fault!`) and mends no tests.

mod judges;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use judges::{End, Programs};
use table::{FAULTS, Fault, Judge};

/// Of a hundred faults so many must be noticed.
const PERCENT_MIN: usize = 95;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let chosen = match choose(&args) {
        Ok(chosen) => chosen,
        Err(why) => {
            eprintln!("{why}\nusage: mutants [--list] [--only NAME]...");
            return ExitCode::from(2);
        }
    };
    if args.iter().any(|arg| arg == "--list") {
        for (name, drawn, judges) in chosen {
            println!("{name:<36} {drawn:<6?} {judges:?}");
        }
        return ExitCode::SUCCESS;
    }
    match try_all(&chosen) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn choose(args: &[String]) -> Result<Vec<Fault>, String> {
    let mut only = BTreeSet::new();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "--list" => {}
            "--only" => {
                let name = rest.next().ok_or("--only wants a name")?;
                let known = FAULTS.iter().any(|fault| fault.0 == name);
                known
                    .then(|| only.insert(name.as_str()))
                    .ok_or(format!("there is no fault {name}"))?;
            }
            other => return Err(format!("{other} is not known")),
        }
    }
    let chosen = FAULTS
        .iter()
        .filter(|fault| only.is_empty() || only.contains(fault.0));
    Ok(chosen.copied().collect())
}

/// Whether enough of them were noticed.
fn try_all(chosen: &[Fault]) -> Result<bool, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .ok_or("the tests lie in the workspace")?;
    let needed: BTreeSet<_> = chosen.iter().flat_map(|fault| fault.2).copied().collect();
    let needed: Vec<_> = needed.into_iter().collect();
    let programs = judges::build(root, &needed)?;
    let mut sound = BTreeMap::new();
    for (judge, program) in &programs {
        let (end, took) = judges::run(root, *judge, program, "");
        println!(
            "without a fault: {judge:?} {end:?}, {:.1} s",
            took.as_secs_f64()
        );
        if end != End::Passed {
            return Err(format!(
                "{judge:?} does not pass without a fault: it can judge none"
            ));
        }
        sound.insert(*judge, took);
    }
    let mut survivors = Vec::new();
    for fault in chosen {
        if !dies(root, &programs, &sound, fault) {
            survivors.push(fault.0);
        }
    }
    let (all, dead) = (chosen.len(), chosen.len() - survivors.len());
    println!("mutants {all}, dead {dead} ({} %)", dead * 100 / all);
    for name in survivors {
        println!("survived: {name}");
    }
    Ok(dead * 100 >= all * PERCENT_MIN)
}

/// Whether a judge notices a fault.
fn dies(
    root: &Path,
    programs: &Programs,
    sound: &BTreeMap<Judge, Duration>,
    fault: &Fault,
) -> bool {
    let (name, drawn, judges) = fault;
    let mut seconds = 0.0;
    for judge in *judges {
        let (end, took) = judges::run(root, *judge, &programs[judge], name);
        seconds += took.as_secs_f64();
        let dead = match end {
            End::Passed => false,
            End::Failed => true,
            // A judge that is slow anyway has not noticed anything.
            End::Hung => sound[judge] * 3 <= judge.budget(),
        };
        if dead {
            println!("{name:<36} {drawn:<6?} {judge:?} dead ({end:?}) {seconds:.1} s");
            return true;
        }
    }
    println!("{name:<36} {drawn:<6?} {judges:?} SURVIVED {seconds:.1} s");
    false
}
