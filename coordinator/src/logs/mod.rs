//! Keeps the second copy of job logs as plain files, and lets readers follow them.
//!
//! `DIR/{attempt}/{node}/{file}`: a file's length says how much of it is kept, so nothing else has to be remembered
//! across a restart. Files of attempts that the State does not know are swept away.

mod reader;
mod store;

pub use reader::{ReadRequest, read};
pub use store::{FileKey, Listed, LogStore, check_file, check_space};
