//! Serves node agents: one live session per node, and the logs they ship.
//!
//! A session relays: reports of its node become commands, the node's assignments go out whenever their revision has
//! risen. It decides nothing about jobs. Heartbeats touch one atomic and never enter the log.

pub mod contacts;
mod log_intake;
pub mod service;
mod session;
