//! Names of signals, for people.

use nix::sys::signal::Signal;

/// What a shell adds to the signal that ended a command.
const OF_A_SHELL: i32 = 128;

/// `SIGSEGV` of 11; none of what is no signal, or has no name.
pub fn name(signal: i32) -> Option<&'static str> {
    Signal::try_from(signal).ok().map(Signal::as_str)
}

/// The signal that an exit code stands for, by the custom of shells.
pub fn of_exit_code(code: i32) -> Option<&'static str> {
    name(code.checked_sub(OF_A_SHELL)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names() {
        for (code, expected) in [
            (139, Some("SIGSEGV")),
            (137, Some("SIGKILL")),
            (128, None),
            (11, None),
            (255, None),
            (i32::MIN, None),
            (i32::MAX, None),
        ] {
            assert_eq!(of_exit_code(code), expected, "{code}");
        }
    }
}
