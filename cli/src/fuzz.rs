//! What meets bytes from outside, each as a function that no bytes may bring down: for fuzzers and tests, in no program.

use batchai_proto::v1::{Cluster, Job};

use crate::file::parse;

/// Files of jobs and clusters.
pub fn files(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    // Whether they can be read is all that is asked.
    let _ = parse::<Job>(text, "Job");
    let _ = parse::<Cluster>(text, "Cluster");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Texts that look like files of jobs.
    fn json() -> impl Strategy<Value = String> {
        let words = r#"(\{|\}|\[|\]|,|:|"properties"|"nodeCount"|"secrets"|"value"|"id"|"[a-zA-Z$]{0,5}"|-?[0-9]{1,20}|null|true| ){0,40}"#;
        prop_oneof![
            words.prop_map(|text: String| text),
            words.prop_map(|text: String| format!("{{\"properties\": {text}}}")),
        ]
    }

    proptest! {
        #[test]
        fn no_file_brings_it_down(text in json()) {
            files(text.as_bytes());
        }
    }
}
