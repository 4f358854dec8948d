//! The generated code of all `.proto` files and their descriptors.
//!
//! The `.proto` files beside this crate are the manual of the API; what is added to them here is how secrets are treated, and what both
//! ends must read alike.

pub mod rdma;
pub mod reflect;
pub mod secrets;
pub mod shared;

/// The public API.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod v1 {
    tonic::include_proto!("batchai.v1");
}

/// What agents and coordinators say to each other.
pub mod agent {
    /// Version 1.
    #[allow(missing_docs, clippy::all, clippy::unwrap_used)]
    pub mod v1 {
        tonic::include_proto!("batchai.agent.v1");
    }
}

/// The format of the replicated log.
pub mod internal {
    /// Version 1.
    #[allow(missing_docs, clippy::all, clippy::unwrap_used)]
    pub mod v1 {
        tonic::include_proto!("batchai.internal.v1");
    }
}

/// The encoded `FileDescriptorSet` of everything above, comments and options included: reflection serves it, the
/// command reads and writes JSON by it.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
