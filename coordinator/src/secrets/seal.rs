//! Sealing: AES-256-GCM with a nonce drawn for each, bound to what the sealed thing is about, so that none is taken for
//! another.
//!
//! A key seals at most some millions of things, far below the 2^32 that drawn nonces allow.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom as _, SystemRandom};
use zeroize::Zeroizing;

/// How long a key is.
pub const KEY_BYTES: usize = 32;

/// It was not sealed by this key for this use, or was changed since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it was sealed by another key or for another use, or it is damaged")]
pub struct Unsealable;

/// A key, wiped when it goes.
#[derive(Clone)]
pub struct Key {
    bytes: Zeroizing<[u8; KEY_BYTES]>,
}

impl Key {
    /// A new one.
    pub fn draw() -> Key {
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        random(&mut bytes[..]);
        Key { bytes }
    }

    /// The one that these bytes are.
    pub fn of(bytes: &[u8]) -> Option<Key> {
        let bytes = Zeroizing::new(bytes.try_into().ok()?);
        Some(Key { bytes })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..]
    }

    /// Seals something; `about` must be the same when it is opened.
    pub fn seal(&self, about: &str, plain: &[u8]) -> Vec<u8> {
        let mut nonce = [0; NONCE_LEN];
        random(&mut nonce);
        let mut sealed = plain.to_vec();
        let aad = Aad::from(about.as_bytes());
        let done = self.cipher().seal_in_place_append_tag(
            Nonce::assume_unique_for_key(nonce),
            aad,
            &mut sealed,
        );
        done.expect("what is sealed is far below the cipher's bound");
        [&nonce[..], &sealed].concat()
    }

    /// Opens what was sealed.
    pub fn open(&self, about: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, Unsealable> {
        let (nonce, sealed) = sealed.split_first_chunk().ok_or(Unsealable)?;
        let mut opened = Zeroizing::new(sealed.to_vec());
        let aad = Aad::from(about.as_bytes());
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let plain = self.cipher().open_in_place(nonce, aad, &mut opened);
        let length = plain.map_err(|_| Unsealable)?.len();
        opened.truncate(length);
        Ok(opened)
    }

    fn cipher(&self) -> LessSafeKey {
        let key = UnboundKey::new(&AES_256_GCM, self.bytes());
        LessSafeKey::new(key.expect("the key has the cipher's length"))
    }
}

fn random(bytes: &mut [u8]) {
    let drawn = SystemRandom::new().fill(bytes);
    drawn.expect("the kernel gives random bytes once it has started");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_by_its_key_for_its_use_and_unchanged_only() {
        let key = Key::draw();
        let sealed = key.seal("job/a", b"hunter2");
        assert!(!sealed.windows(7).any(|w| w == b"hunter2"));
        assert_eq!(&key.open("job/a", &sealed).unwrap()[..], b"hunter2");
        assert_ne!(sealed, key.seal("job/a", b"hunter2"), "a nonce each");
        assert_eq!(key.open("job/b", &sealed), Err(Unsealable));
        assert_eq!(Key::draw().open("job/a", &sealed), Err(Unsealable));
        for length in 0..sealed.len() {
            assert_eq!(key.open("job/a", &sealed[..length]), Err(Unsealable));
            let mut flipped = sealed.clone();
            flipped[length] ^= 1;
            assert_eq!(key.open("job/a", &flipped), Err(Unsealable));
        }
        assert!(Key::of(&[0; 31]).is_none());
    }
}
