//! What meets bytes from outside, each as a function that no bytes may bring down: for fuzzers and tests, in no program.

use std::fs::{File, create_dir_all, read_dir};
use std::io::Write as _;
use std::path::Path;

use batchai_proto::agent::v1::{Assignment, AssignmentList};

use crate::launch::{HostFacts, Preparation, ProcessPlan, output_directory, plan};
use crate::reconcile::{Local, actions, observations};
use crate::status::Status;

/// Files between agent and shim: what one of them cannot read is an error and no more.
pub fn shim_files(bytes: &[u8]) {
    let status = serde_json::from_slice::<Status>(bytes);
    // Whether they can be read is all that is asked.
    let _ = serde_json::from_slice::<Preparation>(bytes);
    let _ = serde_json::from_slice::<Vec<ProcessPlan>>(bytes);
    let local = Local {
        attempt: "a".into(),
        started: true,
        status: status.ok(),
        ..Local::default()
    };
    let local = [local];
    let list = AssignmentList::default();
    actions(&list, &local, true);
    observations(&list, &local);
}

/// Assignments: planned, or refused.
pub fn assignments(assignment: &Assignment) {
    let facts = HostFacts {
        root: "/root".into(),
        ..HostFacts::default()
    };
    if let Ok(plan) = plan(assignment, &facts) {
        let starts = |path: &String| path.starts_with('/');
        assert!(plan.preparation.directories.iter().all(starts));
    }
    let _ = output_directory(assignment, &facts, "MODEL");
}

/// Bundles: unpacked into a directory below an empty one, and never out of it.
pub fn bundles(bytes: &[u8], dir: &Path) {
    let (into, outside) = (dir.join("a/into"), dir.join("bundle"));
    create_dir_all(&into).expect("it can be made");
    let mut bundle = File::create(&outside).expect("it can be made");
    // As users send them: packed. A fuzzer need not find out how that is done.
    let mut packed = flate2::write::GzEncoder::new(&mut bundle, flate2::Compression::fast());
    packed.write_all(bytes).expect("the disk has room");
    packed.finish().expect("the disk has room");
    let bundle = File::open(&outside).expect("it is there");
    // What is no bundle is refused; what was written before that lies where it may.
    let _ = crate::shim::unpack_bundle(bundle, &into);
    let names = |path: &Path| read_dir(path).expect("it is there").count();
    assert_eq!((names(dir), names(&dir.join("a"))), (2, 1));
}

/// Calls of NFS: answered, and nothing is changed outside the export.
pub fn nfs_calls(bytes: &[u8], dir: &Path) {
    let (export, keys) = (dir.join("a/export"), dir.join("keys"));
    for made in [&export, &keys] {
        create_dir_all(made).expect("it can be made");
    }
    // Also for nobody, who they come from.
    let all = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(&export, all).expect("it is ours");
    crate::nfs::any_call(bytes, &export, &keys);
    let names = |path: &Path| read_dir(path).expect("it is there").count();
    assert_eq!((names(dir), names(&dir.join("a"))), (2, 1));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    /// A header of an archive with a name, a kind and a size, and what follows it.
    fn archive() -> impl Strategy<Value = Vec<u8>> {
        let name = "(\\./|\\.\\./|/|[a-c]/|shared/){0,4}[a-c]{1,2}";
        let entry = (name, prop::sample::select(b"0125xgLK".to_vec()), 0..64_u64);
        prop::collection::vec(entry, 1..5).prop_map(|entries| {
            let mut bytes = Vec::new();
            for (name, kind, size) in entries {
                let mut header = tar::Header::new_gnu();
                header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
                header.as_old_mut().linkname[..2].copy_from_slice(b"..");
                header.set_entry_type(tar::EntryType::new(kind));
                header.set_mode(0o755);
                header.set_size(size);
                header.set_cksum();
                bytes.extend_from_slice(header.as_bytes());
                bytes.extend(std::iter::repeat_n(
                    b'x',
                    size.next_multiple_of(512) as usize,
                ));
            }
            bytes
        })
    }

    /// A procedure, and numbers and names after its handle.
    fn nfs_call() -> impl Strategy<Value = Vec<u8>> {
        let number = prop_oneof![0..4_u32, any::<u32>()];
        let number = number.prop_map(|n| n.to_be_bytes().to_vec());
        let name = prop::sample::select(vec!["a", "b", "..", ".", "a/b", "../keys/key", ""]);
        let name = name.prop_map(|name| {
            let mut bytes = (name.len() as u32).to_be_bytes().to_vec();
            bytes.extend(name.bytes());
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        });
        let argument = prop_oneof![2 => number, 1 => name];
        let arguments = prop::collection::vec(argument, 0..10);
        (any::<u8>(), arguments).prop_map(|(procedure, arguments)| {
            let mut bytes = vec![procedure];
            bytes.extend(arguments.concat());
            bytes
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

        #[test]
        fn no_bytes_bring_it_down(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            shim_files(&bytes);
            if let Ok(assignment) = Assignment::decode(&bytes[..]) {
                assignments(&assignment);
            }
        }

        #[test]
        fn no_call_reaches_out_of_an_export(calls in prop::collection::vec(nfs_call(), 1..6)) {
            if !nix::unistd::geteuid().is_root() {
                eprintln!("SKIPPED: only root serves files for others");
                return Ok(());
            }
            let dir = tempfile::tempdir().unwrap();
            for call in calls {
                nfs_calls(&call, dir.path());
            }
        }

        #[test]
        fn no_archive_gets_out(archive in archive(), cut in 0..3000_usize) {
            let dir = tempfile::tempdir().unwrap();
            bundles(&archive[..archive.len().saturating_sub(cut / 2 * (cut % 2))], dir.path());
        }
    }
}
