//! What the tests of the whole system share: real processes in directories of their own, on ports of their own, that
//! end with the test, also when it fails.

pub mod alone;
pub mod api;
pub mod arbitrary;
pub mod damage;
pub mod disks;
pub mod ensemble;
pub mod etcd;
pub mod ganesha;
pub mod given;
pub mod guest;
pub mod history;
pub mod image;
pub mod network;
pub mod nfs;
pub mod process;
pub mod raw;
pub mod register;
pub mod replicas;
pub mod requirement;
pub mod sim;
pub mod sources;
pub mod storage;
pub mod terminal;
pub mod torture;
pub mod volume;
