//! PURE. Numbers and byte strings as they travel in calls of NFS.
//!
//! A reader takes nothing that it was not given: what a call claims of its own sizes is compared with the bytes that are there before anything
//! is made of it. That is why this is not left to a general decoder.

/// A call that is not as the protocol says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the call is not as the protocol says")]
pub struct Garbage;

/// What is left of a call.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Garbage> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Garbage)?;
        self.0 = rest;
        Ok(taken)
    }

    /// So many bytes, as they are.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Garbage> {
        self.take(N)?.try_into().map_err(|_| Garbage)
    }

    pub fn u32(&mut self) -> Result<u32, Garbage> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, Garbage> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    pub fn bool(&mut self) -> Result<bool, Garbage> {
        match self.u32()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Garbage),
        }
    }

    /// Bytes with their count before them, filled up to fours.
    pub fn bytes(&mut self, most: usize) -> Result<&'a [u8], Garbage> {
        let count = self.u32()? as usize;
        if count > most {
            return Err(Garbage);
        }
        let taken = self.take(count)?;
        self.take(padding(count))?;
        Ok(taken)
    }

    /// A value that may be left out.
    pub fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Garbage>,
    ) -> Result<Option<T>, Garbage> {
        Ok(match self.bool()? {
            true => Some(read(self)?),
            false => None,
        })
    }

    /// That nothing is left.
    pub fn end(self) -> Result<(), Garbage> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Garbage)
        }
    }
}

/// How many bytes fill up to fours.
pub fn padding(count: usize) -> usize {
    count.wrapping_neg() % 4
}

/// An answer in the making.
#[derive(Debug, Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub fn bool(&mut self, value: bool) -> &mut Self {
        self.u32(value.into())
    }

    /// Bytes with their count before them, filled up to fours. They are short: what is long is read into its place.
    pub fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.u32(value.len() as u32);
        self.0.extend(value);
        self.0.resize(self.0.len() + padding(value.len()), 0);
        self
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_written_is_read(n in any::<u32>(), m in any::<u64>(), b in any::<bool>(), bytes in prop::collection::vec(any::<u8>(), 0..50)) {
            let mut writer = Writer::default();
            writer.u32(n).bytes(&bytes).u64(m).bool(b);
            prop_assert_eq!(writer.0.len() % 4, 0);
            let mut reader = Reader(&writer.0);
            prop_assert_eq!(reader.u32(), Ok(n));
            prop_assert_eq!(reader.bytes(50), Ok(&bytes[..]));
            prop_assert_eq!(reader.u64(), Ok(m));
            prop_assert_eq!(reader.bool(), Ok(b));
            prop_assert_eq!(reader.end(), Ok(()));
        }
    }

    #[test]
    fn claims_are_compared_with_what_is_there() {
        assert_eq!(Reader(&[255; 12]).bytes(usize::MAX), Err(Garbage));
        assert_eq!(
            Reader(&[0, 0, 0, 5, 1, 2, 3, 4, 5]).bytes(8),
            Err(Garbage),
            "the filling is missing"
        );
        assert_eq!(Reader(&[0, 0, 0, 4, 1, 2, 3, 4]).bytes(3), Err(Garbage));
        assert_eq!(Reader(&[0, 0, 0, 2]).bool(), Err(Garbage));
        assert_eq!(Reader(&[0]).end(), Err(Garbage));
    }
}
