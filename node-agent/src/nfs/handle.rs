//! What clients call objects: the kernel's handle of the object with a seal, so that a client has handles only of what it was given.
//!
//! Without the seal whoever guesses a handle would reach every object of the file system that the export lies on. The key lies beside the
//! configuration and outlives the process, as handles do. A seal holds for one generation of the export.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use ring::hmac;
use ring::rand::{SecureRandom as _, SystemRandom};

use super::protocol::{HANDLE_MAX, Status};
use super::sys::{KERNEL_HANDLE_MAX, KernelHandle};

const FORMAT: u8 = 1;
const SEAL: usize = 16;
const HEAD: usize = 5;
const KEY: usize = 32;
const _: () = assert!(HEAD + KERNEL_HANDLE_MAX + SEAL == HANDLE_MAX);

/// Seals handles.
pub struct Sealer {
    key: hmac::Key,
    generation: u64,
}

impl Sealer {
    /// With the key of a directory, which is made the first time.
    pub fn open(dir: &Path, generation: u64) -> io::Result<Sealer> {
        let path = dir.join("key");
        let key = match fs::read(&path) {
            Ok(key) => key,
            Err(error) if error.kind() == io::ErrorKind::NotFound => new_key(dir, &path)?,
            Err(error) => return Err(error),
        };
        if key.len() != KEY {
            return Err(io::Error::other(format!(
                "{} is damaged: remove it, and let clients mount again",
                path.display()
            )));
        }
        let key = hmac::Key::new(hmac::HMAC_SHA256, &key);
        Ok(Sealer { key, generation })
    }

    fn seal(&self, content: &[u8]) -> [u8; SEAL] {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(&self.generation.to_be_bytes());
        context.update(content);
        let mut seal = [0; SEAL];
        seal.copy_from_slice(&context.sign().as_ref()[..SEAL]);
        seal
    }

    /// What a client is to call an object.
    pub fn close(&self, handle: &KernelHandle) -> Vec<u8> {
        let mut sealed = vec![FORMAT];
        sealed.extend(handle.kind.to_be_bytes());
        sealed.extend(&handle.bytes);
        let seal = self.seal(&sealed);
        sealed.extend(seal);
        sealed
    }

    /// Which object a client means.
    pub fn read(&self, sealed: &[u8]) -> Result<KernelHandle, Status> {
        let at = sealed.len().checked_sub(SEAL).ok_or(Status::BadHandle)?;
        let (content, seal) = sealed.split_at(at);
        let [FORMAT, kind @ .., _] = content else {
            return Err(Status::BadHandle);
        };
        let Some((kind, _)) = kind.split_first_chunk() else {
            return Err(Status::BadHandle);
        };
        // Of another generation, or none of ours: whoever has it may look for the object anew.
        let own = self.seal(content);
        let differing = own.iter().zip(seal).fold(0, |all, (a, b)| all | (a ^ b));
        if differing != 0 {
            return Err(Status::Stale);
        }
        Ok(KernelHandle {
            kind: i32::from_be_bytes(*kind),
            bytes: content[HEAD..].to_vec(),
        })
    }
}

/// Lasting before the first handle is given away.
fn new_key(dir: &Path, path: &Path) -> io::Result<Vec<u8>> {
    let mut key = vec![0; KEY];
    let drawn = SystemRandom::new().fill(&mut key);
    drawn.map_err(|_| io::Error::other("the kernel gives no random numbers"))?;
    let draft = dir.join("key.new");
    let mut options = fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&draft)?;
    file.write_all(&key)?;
    file.sync_all()?;
    fs::rename(&draft, path)?;
    File::open(dir)?.sync_all()?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_given_away_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let sealer = Sealer::open(dir.path(), 1).unwrap();
        for length in [1, 8, KERNEL_HANDLE_MAX] {
            let handle = KernelHandle {
                kind: -7,
                bytes: vec![3; length],
            };
            let sealed = sealer.close(&handle);
            assert!(sealed.len() <= HANDLE_MAX);
            assert_eq!(sealer.read(&sealed), Ok(handle.clone()));
            // The next process.
            let again = Sealer::open(dir.path(), 1).unwrap();
            assert_eq!(again.read(&sealed), Ok(handle));
            let anew = Sealer::open(dir.path(), 2).unwrap();
            assert_eq!(anew.read(&sealed), Err(Status::Stale));
            for at in 0..sealed.len() {
                let mut forged = sealed.clone();
                forged[at] ^= 1;
                assert!(sealer.read(&forged).is_err(), "byte {at}");
                assert!(sealer.read(&sealed[..at]).is_err(), "{at} bytes");
            }
        }
        fs::write(dir.path().join("key"), "short").unwrap();
        assert!(Sealer::open(dir.path(), 1).is_err());
    }
}
