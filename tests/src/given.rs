//! What the programs of this crate are told.

/// A number that was given by its name.
pub fn number(name: &str, usual: usize) -> usize {
    let mut given = std::env::args().skip(2).skip_while(|arg| arg != name);
    let given = given.nth(1).and_then(|text| text.parse().ok());
    given.unwrap_or(usual)
}
