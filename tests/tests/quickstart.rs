//! The original's quickstart: every step of it, typed as here, from an empty ensemble to a model that was trained, and away again. Where
//! the original made an account of storage by itself, a file server is made.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use batchai_tests::ensemble::{Ensemble, mounts_below};
use batchai_tests::process::{under_test, until};
use batchai_tests::requirement;
use serde_json::Value;

/// Nobody's: numbers that no account has.
const USER: &str = "54321:54322";

/// What the original's user did, and what is typed for it here.
const STEPS: [(&str, &str); 18] = [
    (
        "create a resource group",
        "batchai group create -n myResourceGroup -l eastus2 -o table",
    ),
    (
        "create a workspace",
        "batchai workspace create -g myResourceGroup -n myworkspace -o table",
    ),
    // The machine has a size of its own; who administers it says which of the original's that is.
    (
        "nothing: sizes were the cloud's",
        "batchai vm-size alias create -n Standard_NC6 -s test-size",
    ),
    (
        "have a storage account made with the cluster",
        "batchai file-server create -g myResourceGroup -w myworkspace -n autostorage -s Standard_NC6 --disk-count 1 --disk-size 1 \
         --storage-sku Standard_LRS -u $USER --generate-ssh-keys",
    ),
    (
        "create a cluster of one node with that storage",
        "batchai cluster create -g myResourceGroup -w myworkspace -n mycluster -s Standard_NC6 -t 1 --nfs autostorage \
         --nfs-mount-path autoafs -u $USER --generate-ssh-keys -o table",
    ),
    (
        "wait for the node",
        "until batchai cluster show -g myResourceGroup -w myworkspace -n mycluster --query nodeStateCounts.idleNodeCount | grep -q 1; \
         do sleep 0.2; done",
    ),
    (
        "list the clusters",
        "batchai cluster list -g myResourceGroup -w myworkspace -o table",
    ),
    (
        "make a directory in the share and upload the script",
        "batchai file-server file upload -g myResourceGroup -w myworkspace -n autostorage train.py -p tensorflow",
    ),
    (
        "create an experiment",
        "batchai experiment create -g myResourceGroup -w myworkspace -n myexperiment -o table",
    ),
    (
        "create a job",
        "batchai job create -g myResourceGroup -w myworkspace -e myexperiment -c mycluster -n myjob -f job.json -o table",
    ),
    (
        "stream its output",
        "batchai job file stream -g myResourceGroup -w myworkspace -e myexperiment -j myjob -f stdout-wk-0.txt",
    ),
    (
        "wait for the job",
        "batchai job wait -g myResourceGroup -w myworkspace -e myexperiment -n myjob",
    ),
    (
        "list the jobs",
        "batchai job list -g myResourceGroup -w myworkspace -e myexperiment -o table",
    ),
    (
        "list its log files",
        "batchai job file list -g myResourceGroup -w myworkspace -e myexperiment -j myjob --query '[].name'",
    ),
    (
        "list its output files",
        "batchai job file list -g myResourceGroup -w myworkspace -e myexperiment -j myjob -d MODEL --query '[].name'",
    ),
    (
        "download the model",
        "batchai job file download -g myResourceGroup -w myworkspace -e myexperiment -j myjob -d MODEL --to model && cat model/model.json",
    ),
    (
        "delete the job and the cluster",
        "batchai job delete -g myResourceGroup -w myworkspace -e myexperiment -n myjob -y && \
         batchai cluster delete -g myResourceGroup -w myworkspace -n mycluster -y",
    ),
    (
        "delete the resource group with all that is left in it",
        "batchai group delete -n myResourceGroup -y",
    ),
];

/// Tells classes apart that overlap, by gradient descent.
const TRAIN: &str = r#"
import argparse, json, math, os, random

parser = argparse.ArgumentParser()
parser.add_argument("--model")
model = parser.parse_args().model
draw = random.Random(7)
points = [(draw.gauss(c, 1), draw.gauss(-c, 1), c > 0) for c in (1, -1) for _ in range(500)]
draw.shuffle(points)
weights = [0.0, 0.0, 0.0]
guess = lambda x, y: 1 / (1 + math.exp(-weights[0] * x - weights[1] * y - weights[2]))
loss = lambda: -sum(math.log(guess(x, y) if c else 1 - guess(x, y)) for x, y, c in points) / len(points)
print(f"worker {os.environ['AZ_BATCHAI_TASK_INDEX']} of {os.environ['AZ_BATCHAI_WORKER_HOSTS'].count(',') + 1}")
print(f"loss {loss():.4f}")
for epoch in range(5):
    for x, y, c in points:
        error = guess(x, y) - c
        for i, value in enumerate((x, y, 1.0)):
            weights[i] -= 0.05 * error * value
    print(f"loss {loss():.4f}")
right = sum((guess(x, y) > 0.5) == c for x, y, c in points) / len(points)
with open(os.path.join(model, "model.json"), "w") as file:
    json.dump({"weights": weights, "accuracy": right}, file)
"#;

const JOB: &str = r#"{
  "$schema": "https://raw.githubusercontent.com/Azure/BatchAI/master/schemas/2018-05-01/job.json",
  "properties": {
    "nodeCount": 1,
    "tensorFlowSettings": {
      "pythonScriptFilePath": "$AZ_BATCHAI_MOUNT_ROOT/autoafs/tensorflow/train.py",
      "masterCommandLineArgs": "--model $AZ_BATCHAI_OUTPUT_MODEL"
    },
    "stdOutErrPathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/autoafs",
    "outputDirectories": [{ "id": "MODEL", "pathPrefix": "$AZ_BATCHAI_MOUNT_ROOT/autoafs", "pathSuffix": "model" }]
  }
}"#;

/// A machine that has joined and offers storage, and nothing else.
fn ensemble() -> Option<Ensemble> {
    if !nix::unistd::geteuid().is_root() {
        requirement::skip("only root serves files and mounts anything");
        return None;
    }
    requirement::program("ssh-keygen", "apt-get install openssh-client")?;
    let mut e = Ensemble::start(0);
    fs::set_permissions(e.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let storage = e.path().join("storage");
    fs::create_dir(&storage).unwrap();
    let storage = storage.to_string_lossy().into_owned();
    e.agent_args = vec!["--storage-root".to_owned(), storage];
    e.start_agent_as("a1", USER);
    e.until_alive(1);
    Some(e)
}

/// Types a line in a directory; returns what it printed.
fn typed(e: &Ensemble, dir: &Path, line: &str) -> String {
    let path = std::env::var("PATH").unwrap();
    let output = Command::new("bash")
        .args(["-e", "-o", "pipefail", "-c", line])
        .current_dir(dir)
        .env("PATH", format!("{}:{path}", dir.join("bin").display()))
        .env("HOME", dir)
        .env("USER", "ada")
        .env("BATCHAI_ENDPOINT", &e.endpoint)
        .env("BATCHAI_CREDENTIALS", e.credentials())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (printed, said) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{line}: {printed}{said}");
    printed
}

#[test]
fn the_quickstart_of_the_original_works_as_it_is_typed() {
    let Some(mut e) = ensemble() else { return };
    let dir = e.path().join("home");
    fs::create_dir_all(dir.join("bin")).unwrap();
    std::os::unix::fs::symlink(under_test(), dir.join("bin/batchai")).unwrap();
    fs::write(dir.join("train.py"), TRAIN).unwrap();
    fs::write(dir.join("job.json"), JOB).unwrap();
    let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    for (what, line) in STEPS {
        let printed = typed(&e, &dir, line);
        let has = |word: &str| assert!(printed.contains(word), "{what}: {word} in {printed}");
        match what {
            "create a resource group" => has("myResourceGroup"),
            "list the clusters" => has("mycluster"),
            "create a job" => has("tensorflow"),
            "stream its output" => {
                has("worker 0 of 1\n");
                let losses = printed
                    .lines()
                    .filter_map(|line| line.strip_prefix("loss "));
                let losses: Vec<f64> = losses.map(|loss| loss.parse().unwrap()).collect();
                assert_eq!(losses.len(), 6, "{printed}");
                assert!(losses[5] < losses[0] / 2.0, "the loss falls: {losses:?}");
            }
            "list the jobs" => has("succeeded"),
            "list its log files" => {
                let files = ["execution.log", "stderr-wk-0.txt", "stdout-wk-0.txt"];
                assert_eq!(json(&printed), serde_json::json!(files));
            }
            "list its output files" => {
                assert_eq!(json(&printed), serde_json::json!(["model.json"]));
            }
            "download the model" => {
                let accuracy = json(&printed)["accuracy"].as_f64().unwrap();
                assert!(accuracy > 0.85, "{printed}");
            }
            _ => {}
        }
    }
    // Nothing is left but what was trained: the files of a file server stay where they are.
    assert_eq!(e.ok(&["group", "list"]).trim(), "[]");
    until("the node to be free", || {
        let nodes = e.json(&["node", "list"]);
        (nodes[0]["state"] == "AVAILABLE").then_some(())
    });
    assert!(mounts_below(&e.path().join("nodes")).is_empty());
    e.assert_nothing_left();
}
