//! Serves node agents: one live session per node, the logs they ship, the bundles they fetch, the files they show and the
//! commands they run.
//!
//! A session relays: reports of its node become commands, the node's assignments go out whenever their revision has
//! risen. It decides nothing about jobs. Heartbeats touch one atomic and never enter the log.
//!
//! Any replica has sessions. One that does not lead tells the leader of them (`link`, by `upward`), which says whether they are live,
//! grants their leases and has their reports recorded (`relay`).

pub mod branch;
mod bundle;
pub mod contacts;
pub mod execs;
pub mod fate;
pub mod files;
pub mod granting;
mod hello;
pub mod join;
pub mod lease;
pub mod link;
mod log_intake;
pub mod relay;
pub mod service;
mod session;
pub mod upward;
