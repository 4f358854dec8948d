//! Whether a file may be executed: the one thing of its mode that a copy of it has as well.

use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;

const OF_OWNER: u32 = 0o100;
const OF_ANYONE: u32 = 0o111;
const READ: u32 = 0o444;

/// Whether its owner may.
pub fn is(metadata: &Metadata) -> bool {
    metadata.permissions().mode() & OF_OWNER != 0
}

/// Has all execute it who may read it, or nobody; synced where that is another mode than it had, also of the file's content.
///
/// # Errors
/// It is somebody else's, or its file system does not take it.
pub fn set(file: &File, executable: bool) -> io::Result<()> {
    let mode = file.metadata()?.permissions().mode();
    let wanted = match executable {
        true => mode | (mode & READ) >> 2,
        false => mode & !OF_ANYONE,
    };
    if wanted == mode {
        return Ok(());
    }
    file.set_permissions(Permissions::from_mode(wanted))?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_read_may_execute() {
        let file = tempfile::tempfile().unwrap();
        let mode = || file.metadata().unwrap().permissions().mode() & 0o777;
        for (before, executable, after) in [
            (0o640, true, 0o750),
            (0o644, true, 0o755),
            (0o700, true, 0o700),
            (0o744, true, 0o755),
            (0o655, false, 0o644),
            (0o755, false, 0o644),
            (0o600, false, 0o600),
        ] {
            file.set_permissions(Permissions::from_mode(before))
                .unwrap();
            set(&file, executable).unwrap();
            assert_eq!(mode(), after, "{before:o} {executable}");
            assert_eq!(is(&file.metadata().unwrap()), executable);
        }
    }
}
