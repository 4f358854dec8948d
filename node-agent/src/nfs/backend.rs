//! What shares a directory by NFS: back ends behind one trait, and which of them a new file server gets.
//!
//! It gets the first of `ALL` that its machine has, and stays with that for as long as it is there: who mounts it speaks the version of NFS
//! that this one speaks, and knows files by its handles. Where its back end is gone from the machine it is not served, and says what is
//! missing; who has it mounted goes on when that is back. The kernel's own server (`nfsd`) is no back end: it has one table of exports and one port
//! for the whole machine.

use std::net::IpAddr;
use std::path::Path;

use super::ganesha::Ganesha;
use super::{Config, Embedded, ServerError};

/// Something that shares a directory.
pub trait Backend: Sync {
    /// What it is called, in configurations and to users.
    fn name(&self) -> &'static str;

    /// The version of NFS that it is mounted by.
    fn version(&self) -> i32;

    /// Whether this machine has all that it takes to share something at an address; else what is missing.
    fn ready(&self, address: IpAddr) -> Result<(), String>;

    /// Serves until this process is told to end. Its directory is locked, and it is root.
    fn serve(&self, dir: &Path, config: Config) -> Result<(), ServerError>;
}

/// The best one first. The last one needs nothing.
const ALL: [&dyn Backend; 2] = [&Ganesha, &Embedded];

/// What a new file server at this address is shared by.
pub fn choose(address: IpAddr) -> &'static dyn Backend {
    let ready = ALL.iter().find(|one| one.ready(address).is_ok());
    *ready.unwrap_or(&(&Embedded as &dyn Backend))
}

/// The one with a name.
pub fn named(name: &str) -> Result<&'static dyn Backend, ServerError> {
    let found = ALL.iter().find(|one| one.name() == name);
    found
        .copied()
        .ok_or_else(|| ServerError::Unknown(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_always_one_and_each_is_found_by_its_name() {
        let loopback = IpAddr::from([127, 0, 0, 1]);
        assert_eq!(choose(loopback).name(), "embedded");
        for one in ALL {
            assert_eq!(named(one.name()).unwrap().version(), one.version());
        }
        let refused = named("other").err().map(|error| error.to_string());
        assert!(refused.is_some_and(|why| why.contains("other")));
    }
}
