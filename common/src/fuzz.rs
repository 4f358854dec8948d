//! What meets bytes from outside, each as a function that no bytes may bring down: for fuzzers and tests, in no program.

use crate::names::{Kind, Name, check_id};
use crate::tls::{Credentials, Identity};

/// Names of resources, identities in certificates, files of credentials.
pub fn names(bytes: &[u8]) {
    // Whether it is one is all that is asked.
    let _ = Credentials::parse(bytes);
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    for kind in [
        Kind::ResourceGroup,
        Kind::Workspace,
        Kind::Job,
        Kind::Node,
        Kind::Bundle,
    ] {
        if let Ok(name) = Name::parse(kind, text) {
            assert_eq!((name.as_str(), Kind::of(text)), (text, Some(kind)));
            assert!(check_id(kind, name.id()).is_ok());
            assert!(!text.split('/').any(|part| part == ".." || part == "."));
        }
        let _ = Name::parse_pattern(kind, text);
    }
    if let Ok(identity) = Identity::parse(text) {
        assert_eq!(Identity::parse(&identity.uri()).ok(), Some(identity));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_text_brings_it_down(
            text in "(resourceGroups|workspaces|nodes|bundles|users|-|/|\\.|[a-z0-9]|batchai:|\\PC){0,12}"
        ) {
            names(text.as_bytes());
        }

        #[test]
        fn no_bytes_bring_it_down(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            names(&bytes);
        }
    }
}
