//! The project's own sources, for tests that look at them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The crates of which programs are made.
pub const CRATES: [&str; 5] = ["proto", "common", "coordinator", "node-agent", "cli"];

/// Where the project is.
pub fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = tests.parent().expect("the tests lie in the workspace");
    root.to_owned()
}

/// Path from the root and content of every source file below a directory.
///
/// # Panics
/// There is none.
pub fn of(dir: &str) -> BTreeMap<String, String> {
    let mut found = Vec::new();
    collect(&root().join(dir), &mut found);
    assert!(!found.is_empty(), "{dir} has no sources");
    let text = |path: &PathBuf| {
        let name = path.strip_prefix(root()).expect("it lies below");
        let text = fs::read_to_string(path).expect("sources are text");
        (name.to_string_lossy().into_owned(), text)
    };
    found.iter().map(text).collect()
}

/// What is given, as a text, to every use of a macro in the sources of all programs.
pub fn given_to(name: &str) -> Vec<String> {
    let texts = CRATES.iter().flat_map(|krate| of(&format!("{krate}/src")));
    let opened = format!("{name}!(");
    let mut given = Vec::new();
    for (_, text) in texts {
        // A longer one is written over several lines.
        let uses = text.split(&opened).skip(1);
        let texts = uses.filter_map(|rest| rest.trim_start().strip_prefix('"'));
        given.extend(texts.filter_map(|rest| Some(rest.split('"').next()?.to_owned())));
    }
    given.sort();
    given
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("it is a directory") {
        let path = entry.expect("it can be listed").path();
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}
