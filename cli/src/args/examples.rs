//! An example for the help of every verb. All of them parse: a test sees to it.

/// The words that lead to a verb, and an example of it.
const EXAMPLES: &[(&str, &str)] = &[
    ("demo", "batchai demo --epochs 4"),
    ("dev", "batchai dev --agents 2"),
    (
        "run",
        "batchai run -c pair --nodes 2 -- python3 train.py --lr 0.1",
    ),
    ("status", "batchai status"),
    (
        "group create",
        "batchai group create -n lab --tags owner=ada",
    ),
    ("group list", "batchai group list -o table"),
    ("group show", "batchai group show -n lab"),
    (
        "group update",
        "batchai group update -n lab --tags owner=grace",
    ),
    ("group delete", "batchai group delete -n lab -y"),
    (
        "workspace create",
        "batchai workspace create -g lab -n vision",
    ),
    ("workspace list", "batchai workspace list -o table"),
    (
        "workspace show",
        "batchai workspace show -g lab -n vision --query tags",
    ),
    (
        "workspace update",
        "batchai workspace update -g lab -n vision --log-retention 30d --log-quota 10240",
    ),
    (
        "workspace rotate-key",
        "batchai workspace rotate-key -g lab -n vision",
    ),
    (
        "workspace delete",
        "batchai workspace delete -g lab -n vision -y",
    ),
    (
        "cluster create",
        "batchai cluster create -g lab -w vision -n pair -s Standard_NC6 -t 2",
    ),
    (
        "cluster resize",
        "batchai cluster resize -g lab -w vision -n pair -t 4",
    ),
    (
        "cluster auto-scale",
        "batchai cluster auto-scale -n pair --min 0 --max 8",
    ),
    (
        "cluster list",
        "batchai cluster list -g lab -w vision -o table",
    ),
    (
        "cluster show",
        "batchai cluster show -n pair --query nodeStateCounts",
    ),
    ("cluster delete", "batchai cluster delete -n pair -y"),
    (
        "cluster node list",
        "batchai cluster node list -c pair -o table",
    ),
    (
        "cluster node exec",
        "batchai cluster node exec -c pair --node gpu3 -- nvidia-smi",
    ),
    ("cluster file list", "batchai cluster file list -c pair"),
    (
        "file-server create",
        "batchai file-server create -n nfs -s big --disk-count 2 --disk-size 10 -u ada -p pass",
    ),
    ("file-server list", "batchai file-server list -o table"),
    ("file-server show", "batchai file-server show -n nfs"),
    ("file-server delete", "batchai file-server delete -n nfs -y"),
    (
        "file-server file list",
        "batchai file-server file list -n nfs -p sets -o table",
    ),
    (
        "file-server file download",
        "batchai file-server file download -n nfs -p sets/one -d data",
    ),
    (
        "file-server file upload",
        "batchai file-server file upload -n nfs data/one -p sets",
    ),
    (
        "experiment create",
        "batchai experiment create -g lab -w vision -n first",
    ),
    ("experiment list", "batchai experiment list -o table"),
    ("experiment show", "batchai experiment show -n first"),
    (
        "experiment update",
        "batchai experiment update -n first --labels paper=icml",
    ),
    ("experiment delete", "batchai experiment delete -n first -y"),
    (
        "job create",
        "batchai job create -n digits -c pair -f job.json --dir src",
    ),
    (
        "job list",
        "batchai job list --filter 'state = FAILED' -o table",
    ),
    (
        "job show",
        "batchai job show -n digits --query pendingReason -o tsv",
    ),
    ("job update", "batchai job update -n digits --labels fold=3"),
    ("job terminate", "batchai job terminate -n digits -y"),
    ("job delete", "batchai job delete -n digits -y"),
    ("job wait", "batchai job wait -n digits"),
    (
        "job file list",
        "batchai job file list -j digits -d MODEL -o table",
    ),
    (
        "job file stream",
        "batchai job file stream -j digits --all-ranks --tail 10",
    ),
    (
        "job file download",
        "batchai job file download -j digits -d MODEL --to models",
    ),
    ("job node list", "batchai job node list -j digits -o table"),
    (
        "job node exec",
        "batchai job node exec -j digits --node gpu3 -- py-spy dump --pid 4242",
    ),
    (
        "node token create",
        "batchai node token create --vm-size gpu --ttl 1h --uses 10",
    ),
    ("node token list", "batchai node token list -o table"),
    ("node token revoke", "batchai node token revoke -n rack1 -y"),
    ("node expel", "batchai node expel -n gpu3 -y"),
    (
        "role create",
        "batchai role create -u ada --role contributor -g lab -w vision",
    ),
    ("audit tail", "batchai audit tail -n 100 --follow"),
    ("role list", "batchai role list -o table"),
    ("role delete", "batchai role delete -n ada-0a1b2c3d -y"),
    (
        "user token create",
        "batchai user token create -u ci --ttl 30d --role reader -g lab",
    ),
    ("user token list", "batchai user token list -o table"),
    (
        "user token revoke",
        "batchai user token revoke -n nightly -y",
    ),
    (
        "user certificate create",
        "batchai user certificate create -u ada --to ada.pem",
    ),
    (
        "user certificate revoke",
        "batchai user certificate revoke -u ada -y",
    ),
    (
        "node list",
        "batchai node list --filter 'state = IDLE' -o table",
    ),
    ("node show", "batchai node show -n node-1"),
    (
        "node confirm-lost",
        "batchai node confirm-lost -n node-1 -y",
    ),
    (
        "storage-alias create",
        "batchai storage-alias create -n datasets -a mystorage --share datasets --path /lab/datasets",
    ),
    ("storage-alias list", "batchai storage-alias list -o table"),
    (
        "storage-alias show",
        "batchai storage-alias show -n datasets",
    ),
    (
        "storage-alias delete",
        "batchai storage-alias delete -n datasets -y",
    ),
    ("vm-size list", "batchai vm-size list -o table"),
    (
        "vm-size alias create",
        "batchai vm-size alias create -n Standard_NC6 -s cpu6-mem56g-gpu1",
    ),
    ("vm-size alias list", "batchai vm-size alias list -o table"),
    (
        "vm-size alias delete",
        "batchai vm-size alias delete -n Standard_NC6 -y",
    ),
    ("list-usages", "batchai list-usages -o table"),
    ("config set", "batchai config set workspace vision"),
    ("config unset", "batchai config unset workspace"),
    ("config show", "batchai config show"),
    ("completion", "batchai completion bash"),
    ("admin status", "batchai admin status"),
    ("admin take-snapshot", "batchai admin take-snapshot"),
    (
        "admin snapshot save",
        "batchai admin snapshot save --to lab.backup",
    ),
    (
        "admin snapshot verify",
        "batchai admin snapshot verify lab.backup",
    ),
    (
        "admin snapshot restore",
        "batchai admin snapshot restore lab.backup --data /var/lib/batchai/coordinator",
    ),
    ("admin snapshot accept", "batchai admin snapshot accept"),
    ("admin stray list", "batchai admin stray list -o table"),
    (
        "admin stray adopt",
        "batchai admin stray adopt --attempt 1-57",
    ),
    (
        "admin stray discard",
        "batchai admin stray discard --attempt 1-57 -y",
    ),
    ("admin replica list", "batchai admin replica list -o table"),
    (
        "admin replica add",
        "batchai admin replica add --id 4 --at https://c4.lab.example:7070",
    ),
    (
        "admin replica promote",
        "batchai admin replica promote --id 4",
    ),
    (
        "admin replica remove",
        "batchai admin replica remove --id 2 -y",
    ),
    ("admin replica lead", "batchai admin replica lead --id 3"),
    (
        "coordinator add-replica",
        "batchai coordinator add-replica --id 4",
    ),
    (
        "coordinator rotate-key",
        "batchai coordinator rotate-key --data /var/lib/batchai/coordinator",
    ),
    (
        "coordinator certify",
        "batchai coordinator certify --user admin --to admin.pem",
    ),
    (
        "coordinator init",
        "batchai coordinator init --name lab.example",
    ),
    (
        "coordinator",
        "batchai coordinator --listen 127.0.0.1:7070 --data /var/lib/batchai/coordinator",
    ),
    (
        "node-agent",
        "batchai node-agent --coordinator https://127.0.0.1:7070 --join-token-file token",
    ),
];

/// Adds the examples to the help of a command and of all below it.
pub fn add(command: clap::Command) -> clap::Command {
    EXAMPLES.iter().fold(command, |command, (words, example)| {
        let words: Vec<_> = words.split(' ').collect();
        at(command, &words, example)
    })
}

fn at(command: clap::Command, words: &[&str], example: &'static str) -> clap::Command {
    match words {
        [] => command.after_help(format!("Example:\n  {example}")),
        [first, rest @ ..] => command.mut_subcommand(*first, |below| at(below, rest, example)),
    }
}
