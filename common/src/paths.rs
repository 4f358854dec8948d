//! PURE. Paths below a root, as people write them.

const INSIDE_MAX: usize = 1024;

/// A path below a root in its plain form: no empty part, no `.`. `None` where it is the root itself, or leads out of it.
pub fn below(path: &str) -> Option<String> {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => return None,
            part => parts.push(part),
        }
    }
    let legal = !path.starts_with('/') && !path.contains('\0') && !parts.is_empty();
    legal.then(|| parts.join("/"))
}

/// A directory below another one in its plain form, or empty where it is that itself. Slashes at the ends are no part of it.
///
/// # Errors
/// Says what it must be.
pub fn inside(path: &str) -> Result<String, String> {
    let plain = match path.trim_matches('/') {
        "" => Some(String::new()),
        some => below(some),
    };
    plain.filter(|_| path.len() <= INSIDE_MAX).ok_or_else(|| {
        format!("must be a path below the server's directory, without `..`, of at most {INSIDE_MAX} bytes")
    })
}

/// Whether a plain path is another one, or lies in it.
pub fn is_within(path: &str, place: &str) -> bool {
    let rest = path.strip_prefix(place);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_plain_or_none() {
        for (given, plain) in [
            ("a", Some("a")),
            ("a//b/./c/", Some("a/b/c")),
            ("./a", Some("a")),
            ("a/...", Some("a/...")),
            ("", None),
            (".", None),
            ("/a", None),
            ("a/../b", None),
            ("..", None),
            ("a\0b", None),
        ] {
            assert_eq!(below(given).as_deref(), plain, "{given:?}");
        }
    }

    #[test]
    fn a_directory_may_be_the_whole_of_it() {
        for (given, plain) in [("", ""), ("/", ""), ("/a//b/", "a/b"), ("a/./b", "a/b")] {
            assert_eq!(inside(given).as_deref(), Ok(plain), "{given:?}");
        }
        for bad in ["..", "a/..", "/../a", "a\0", &"a".repeat(1025)] {
            assert!(inside(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_only_begins_alike_does_not_lie_within() {
        assert!(is_within("a/b", "a") && is_within("a", "a"));
        assert!(!is_within("ab", "a") && !is_within("a", "a/b"));
    }
}
