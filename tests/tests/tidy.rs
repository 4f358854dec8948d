//! The rules of the house, as a test.

use std::collections::BTreeMap;

use batchai_tests::sources::{self, CRATES};

const FILE_LINES_MAX: usize = 500;
const FUNCTION_LINES_MAX: usize = 70;

/// What PURE files may not name: they see no clock, randomness, I/O or order but that of ordered maps.
const IMPURE: [&str; 14] = [
    "tokio",
    "tonic",
    "sled",
    "std::fs",
    "std::net",
    "std::process",
    "std::io",
    "std::env",
    "now(",
    "now_millis",
    "boot_time",
    "rand",
    "HashMap",
    "HashSet",
];

/// These must be PURE.
const PURE: [&str; 16] = [
    "node-agent/src/cgroups.rs",
    "coordinator/src/agents/lease.rs",
    "coordinator/src/agents/upward.rs",
    "node-agent/src/lease.rs",
    "common/src/attempt.rs",
    "common/src/ranks.rs",
    "common/src/tls/identity.rs",
    "coordinator/src/access/",
    "coordinator/src/state/",
    "coordinator/src/scheduler/",
    "coordinator/src/duties.rs",
    "coordinator/src/api/job_spec.rs",
    "node-agent/src/launch/",
    "node-agent/src/reconcile.rs",
    "node-agent/src/serving.rs",
    "node-agent/src/status.rs",
];

/// What the kernel is asked that no crate asks for us.
const UNSAFE: [&str; 2] = [
    "node-agent/src/nfs/sys.rs",
    "node-agent/src/shim/process.rs",
];

/// Arrows point down: a module may name those of lower levels only. Modules of one level do not name each other.
const COORDINATOR: [&[&str]; 14] = [
    &["state"],
    &["access", "scheduler", "secrets"],
    &["ensemble"],
    &["call", "config", "duties"],
    &["replica"],
    &["logs"],
    &["audit", "bundles"],
    &["copies"],
    &["agents"],
    &["api"],
    &["custody", "gate", "leader", "pki"],
    &["boot", "fuzz"],
    &["backup", "server"],
    &["lib", "main"],
];
const NODE_AGENT: [&[&str]; 12] = [
    &["cgroups", "memory", "status", "words"],
    &["launch", "lease", "reconcile", "serving"],
    &["config"],
    &["hardware", "journal", "share", "user"],
    &["mounts", "nfs", "storage"],
    &["shim", "watch"],
    &["session"],
    &["bundles", "execs", "file_servers", "join", "logs"],
    &["files", "peers"],
    &["supervisor"],
    &["agent", "fuzz"],
    &["lib", "main"],
];

fn all_sources() -> BTreeMap<String, String> {
    CRATES
        .iter()
        .flat_map(|name| sources::of(&format!("{name}/src")))
        .collect()
}

fn is_test(path: &str) -> bool {
    path.ends_with("tests.rs")
}

/// A file without its tests and comments.
fn code(text: &str) -> String {
    let text = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap();
    text.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n")
}

fn names(code: &str, word: &str) -> bool {
    let bounded = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric() && c != '_');
    code.match_indices(word).any(|(at, _)| {
        bounded(code[..at].chars().next_back())
            && (word.ends_with('(') || bounded(code[at + word.len()..].chars().next()))
    })
}

#[test]
fn pure_files_are_pure() {
    let mut checked = 0;
    for (path, text) in all_sources() {
        let listed = PURE.iter().any(|pure| path.starts_with(pure)) && !is_test(&path);
        let marked = text.starts_with("//! PURE.");
        assert!(
            !listed || marked,
            "{path} must say that it is PURE, in its first words"
        );
        if marked {
            checked += 1;
            let code = code(&text);
            let found = IMPURE.iter().find(|word| names(&code, word));
            assert_eq!(found, None, "{path} is PURE");
        }
    }
    assert!(checked > 20);
}

fn check_arrows(krate: &str, levels: &[&[&str]]) {
    let level = |module: &str| levels.iter().position(|level| level.contains(&module));
    for (path, text) in sources::of(&format!("{krate}/src")) {
        if is_test(&path) {
            continue;
        }
        let inside = path.strip_prefix(&format!("{krate}/src/")).unwrap();
        let module = inside.split(['/', '.']).next().unwrap();
        let own = level(module).unwrap_or_else(|| panic!("{path}: {module} has no level"));
        let code = code(&text);
        for (at, _) in code.match_indices("crate::") {
            let rest = &code[at + "crate::".len()..];
            let used = rest
                .split(|c: char| !c.is_alphanumeric() && c != '_')
                .next()
                .unwrap();
            let Some(other) = level(used) else { continue };
            let allowed = used == module || other < own;
            assert!(allowed, "{path}: {module} may not name {used}");
        }
    }
}

#[test]
fn arrows_point_down() {
    check_arrows("coordinator", &COORDINATOR);
    check_arrows("node-agent", &NODE_AGENT);
    for (path, text) in sources::of("coordinator/src") {
        assert!(
            !text.contains("batchai_node_agent"),
            "{path} names the other daemon"
        );
    }
    for (path, text) in sources::of("node-agent/src") {
        assert!(
            !text.contains("batchai_coordinator"),
            "{path} names the other daemon"
        );
    }
    for (path, text) in sources::of("common/src") {
        let daemons = text.contains("batchai_node_agent") || text.contains("batchai_coordinator");
        assert!(!daemons, "{path} names a daemon");
    }
}

#[test]
fn files_and_functions_fit_a_mind() {
    for (path, text) in all_sources() {
        if is_test(&path) {
            continue;
        }
        assert!(
            text.starts_with("//!"),
            "{path} does not say what it is for"
        );
        let lines = text
            .split("\n#[cfg(test)]\nmod tests {")
            .next()
            .unwrap()
            .lines()
            .count();
        assert!(lines <= FILE_LINES_MAX, "{path} has {lines} lines");
        let code = code(&text);
        // A signature may take several lines: a function is from its `fn` to the brace that closes it.
        let mut begin: Option<(usize, usize, &str)> = None;
        for (i, line) in code.lines().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let words: Vec<_> = line.trim_start().split(' ').take(4).collect();
            if begin.is_none() && words.contains(&"fn") && !line.trim_end().ends_with(';') {
                begin = Some((i, indent, line.trim()));
            }
            if let Some((from, depth, name)) = begin
                && indent == depth
                && (line.trim() == "}" || line.trim_end().ends_with(';') || line.ends_with("}"))
            {
                assert!(
                    i - from <= FUNCTION_LINES_MAX,
                    "{path}: {name} has {} lines",
                    i - from
                );
                begin = None;
            }
        }
    }
}

#[test]
fn nothing_is_left_undone_and_unwrap_stays_in_tests() {
    for (path, text) in all_sources() {
        if is_test(&path) {
            continue;
        }
        let code = code(&text);
        for word in [
            ".unwrap()",
            "todo!(",
            "unimplemented!(",
            "dbg!(",
            "#[ignore",
            "FIXME",
            "XXX",
        ] {
            assert!(!code.contains(word), "{path} has {word}");
        }
        let unsafe_here = names(&code, "unsafe");
        assert!(
            !unsafe_here || UNSAFE.contains(&path.as_str()),
            "{path} is unsafe"
        );
    }
}
