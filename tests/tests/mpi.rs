//! Jobs whose processes mpirun starts, for real: they train, and what they print shows that they talked.

use std::path::{Path, PathBuf};

use batchai_tests::ensemble::{Ensemble, IN};
use batchai_tests::requirement;
use serde_json::{Value, json};

/// Where Debian has Open MPI and the python that knows mpi4py.
const PATH: &str = "/usr/bin:/bin";

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../examples")
        .join(name)
}

/// Whether there is Open MPI with mpi4py here; the test was told where not.
fn open_mpi() -> Option<()> {
    let hint = "install openmpi-bin, python3-mpi4py and python3-numpy";
    requirement::program("mpirun", hint)?;
    let python = std::process::Command::new("/usr/bin/python3")
        .args(["-c", "import mpi4py.MPI, numpy"])
        .output();
    match python.is_ok_and(|output| output.status.success()) {
        true => Some(()),
        false => {
            requirement::skip(hint);
            None
        }
    }
}

/// Submits an example with the files beside it; what is given replaces what its file says.
fn submit(e: &Ensemble, name: &str, of: &str, more: Value) {
    let text = std::fs::read_to_string(example(of).join("job.json")).unwrap();
    let mut properties: Value = serde_json::from_str(&text).unwrap();
    let mut properties = properties["properties"].take();
    let variables = json!([{ "name": "PATH", "value": PATH }]);
    properties["environmentVariables"] = variables;
    let all = properties.as_object_mut().unwrap();
    all.extend(more.as_object().unwrap().clone());
    let (file, dir) = (e.job_file(name, properties), example(of));
    let (file, dir) = (file.to_string_lossy(), dir.to_string_lossy());
    let mut args = vec![
        "job", "create", "-n", name, "-c", "c", "-f", &file, "--dir", &dir,
    ];
    args.extend(IN);
    e.ok(&args);
}

/// What follows these words, in all lines that have them, sorted.
fn after<'a>(log: &'a str, words: &str) -> Vec<&'a str> {
    let mut found: Vec<_> = log
        .lines()
        .filter_map(|line| Some(line.split_once(words)?.1))
        .collect();
    found.sort_unstable();
    found
}

/// Asserts that so many ranks trained one model, each on its own data.
fn assert_trained(log: &str, size: usize) {
    for rank in 0..size {
        let line = format!("rank {rank} of {size} on ");
        assert_eq!(log.matches(&line).count(), 1, "{log}");
    }
    let mut shards = after(log, ", shard ");
    shards.dedup();
    assert_eq!(shards.len(), size, "each has its own shard: {log}");
    let mut parameters = after(log, ": parameters ");
    assert_eq!(parameters.len(), size, "{log}");
    parameters.dedup();
    assert_eq!(parameters.len(), 1, "all have the same parameters: {log}");
    let losses = log.lines().filter_map(|line| line.split_once(": loss "));
    let losses: Vec<f64> = losses.map(|(_, loss)| loss.parse().unwrap()).collect();
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(last < first / 2.0, "the loss falls: {losses:?}");
}

#[test]
fn a_custom_mpi_job_trains_with_so_many_processes_on_one_node() {
    let Some(()) = open_mpi() else { return };
    let mut e = Ensemble::with_cluster(1);
    let given = json!({ "commandLine": "python3 train.py", "processCount": 3 });
    submit(&e, "three", "mpi", json!({ "customMpiSettings": given }));
    let code = e.wait("three");
    let (log, errors) = (e.log("three", "stdout.txt"), e.log("three", "stderr.txt"));
    assert_eq!(code, 0, "{log} {errors}");
    assert_trained(&log, 3);
    let mut args = vec!["job", "file", "list", "-j", "three", "-d", "MODEL"];
    args.extend(IN);
    assert_eq!(e.json(&args)[0]["name"], "weights.txt");
    e.assert_nothing_left();
}

#[test]
fn a_rank_that_fails_is_why_an_mpi_job_does() {
    let Some(()) = open_mpi() else { return };
    let mut e = Ensemble::with_cluster(1);
    let command = "echo pid $$; [ $RANK = 1 ] || exec sleep 600; echo it broke >&2; exit 7";
    let settings = json!({ "commandLine": command, "processCount": 2 });
    e.submit(
        "breaks",
        json!({ "nodeCount": 1, "customMpiSettings": settings }),
    );
    e.wait("breaks");
    let job = e.job("breaks");
    assert_eq!(
        (&job["state"], &job["exitCode"]),
        (&json!("FAILED"), &json!(7)),
        "{job}"
    );
    let said = e.log("breaks", "stderr.txt");
    assert!(said.contains("it broke"), "{said}");
    e.assert_nothing_left();
}
