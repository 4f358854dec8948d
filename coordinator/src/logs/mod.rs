//! Keeps the second copy of job logs as plain files, and lets readers follow them.
//!
//! `DIR/{attempt}/{node}/{file}`: a file's length says how much of it is known, and beside it lies what is known of its bytes (see
//! `index`), so nothing else has to be remembered across a restart. Files of attempts that the State does not know are swept away.
//! Which replica keeps which logs is not decided here.

mod file;
mod follow;
mod index;
mod keeping;
mod ranks;
mod reader;
mod store;

pub use file::LogFile;
pub use follow::Begin;
pub use keeping::{give_up, is_whole};
pub use ranks::{OutputStream, Ranks};
pub use reader::{ReadRequest, What, read};
pub use store::{FileKey, Limits, Listed, LogStore, check_file, check_space};
