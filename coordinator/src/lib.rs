//! The coordinator: keeps the resource model, schedules, and tells agents what to do.
//!
//! Arrows only point down:
//! `state <- scheduler <- duties <- replica <- {api, agents, logs} <- leader <- server`.
//!
//! `state`, `scheduler` and `duties` are pure. `replica` makes the State survive and agree. `api` serves users,
//! `agents` serves node agents, `logs` keeps job output. `leader` performs the duties while this replica leads.

pub mod duties;
pub mod scheduler;
pub mod state;
