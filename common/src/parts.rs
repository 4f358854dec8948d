//! Names of files that are not whole yet: beside their files, and no names that anybody else gives to one.

use sha2::{Digest as _, Sha256};

use crate::names::hex;

/// So much of a file's name is part of the name of what is not whole yet: it has room for all of a longest one, and the key.
const NAME_BYTES_MAX: usize = 180;
const MARK: &str = ".part-";
const KEY_DIGITS: usize = 32;

/// `.NAME.part-KEY`: what came so far of a file, of one origin or content that the key stands for.
pub fn name(file: &str, of: &str) -> String {
    let key = hex(&Sha256::digest(of));
    format!("{}{}", start(file), &key[..KEY_DIGITS])
}

/// What the names of all parts of a file begin with; those of files with very long names share it.
fn start(file: &str) -> String {
    let mut short = file.len().min(NAME_BYTES_MAX);
    while !file.is_char_boundary(short) {
        short -= 1;
    }
    format!(".{}{MARK}", &file[..short])
}

/// Whether a name is that of a part of some file.
pub fn is_part(name: &str) -> bool {
    let parts = name.rsplit_once(MARK);
    parts.is_some_and(|(file, key)| file.len() > 1 && file.starts_with('.') && is_key(key))
}

/// Whether it is that of a part of this file.
pub fn is_part_of(file: &str, name: &str) -> bool {
    name.strip_prefix(&start(file)).is_some_and(is_key)
}

fn is_key(text: &str) -> bool {
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.len() == KEY_DIGITS && text.bytes().all(digit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_known_by_their_names_and_others_are_not() {
        let part = name("model.bin", "a/1");
        assert!(part.starts_with(".model.bin.part-") && part.len() == 48);
        assert_ne!(part, name("model.bin", "a/2"));
        assert!(is_part(&part) && is_part_of("model.bin", &part));
        assert!(!is_part_of("model", &part) && !is_part_of("model.bin.part-", &part));
        let short = &part[..part.len() - 1];
        for other in [
            ".model.bin.part",
            "model.bin",
            ".part-",
            &part[1..],
            short,
            &(short.to_owned() + "g"),
        ] {
            assert!(
                !is_part(other) && !is_part_of("model.bin", other),
                "{other}"
            );
        }
        let long = "ü".repeat(127);
        let part = name(&long, "a/1");
        assert!(
            part.len() < 255 && part.starts_with(".üü") && is_part_of(&long, &part),
            "{part}"
        );
    }
}
