//! PURE. What a shim says about its attempt: one small file, replaced whole at every change. Shims
//! and agents of neighbouring versions read each other's: what one of them does not know has its default.

use serde::{Deserialize, Serialize};

/// Where the attempt is on this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    #[default]
    Preparing,
    Ready,
    Running,
    /// Nothing of it runs any more; nothing in the status will change.
    Ended,
}

/// A process that was started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RankStatus {
    pub rank: i32,
    pub pid: i32,
    /// 128 + n for signal n.
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
}

/// What went wrong apart from a rank's exit code.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FailureRecord {
    pub code: String,
    pub message: String,
    pub details: Vec<(String, String)>,
    pub exit_code: Option<i32>,
    /// The job is not to blame.
    pub infrastructure: bool,
    /// It is no failed run, which might be tried again.
    pub ends_job: bool,
    /// What it did is not there, however well it ended.
    pub undoes_success: bool,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    pub phase: Phase,
    pub ranks: Vec<RankStatus>,
    pub failure: Option<FailureRecord>,
    /// The first rank that failed, before it was told to end.
    pub first_failed: Option<i32>,
    /// The end of what that one said on standard error.
    pub last_words: String,
    /// The process ids of what SIGKILL does not end.
    pub stuck: Vec<i32>,
    /// Log files and their final sizes; set at the end.
    pub files: Vec<(String, u64)>,
}
