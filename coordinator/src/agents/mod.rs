//! Serves node agents: one live session per node, the logs they ship, the bundles they fetch and the files they show.
//!
//! A session relays: reports of its node become commands, the node's assignments go out whenever their revision has
//! risen. It decides nothing about jobs. Heartbeats touch one atomic and never enter the log.

mod bundle;
pub mod contacts;
pub mod files;
pub mod granting;
pub mod join;
pub mod lease;
mod log_intake;
pub mod service;
mod session;
