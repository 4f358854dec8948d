//! PURE. What is mounted, where: from what a job or a cluster asks for to paths on this host and how to come to what lies there.

use batchai_common::paths;
use batchai_proto::v1::MountVolumes;
use serde::{Deserialize, Serialize};

use super::LaunchError;

/// Something that is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Where: a directory of its own below the root of mounts. None lies in another.
    pub path: String,
    pub how: How,
}

/// How it is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// By a command line of the user's, to which the path is appended.
    Command(String),
}

/// What to mount below a root.
pub fn of(volumes: Option<&MountVolumes>, root: &str) -> Result<Vec<Mount>, LaunchError> {
    let Some(volumes) = volumes else {
        return Ok(Vec::new());
    };
    let unknown = [
        ("azureFileShares", volumes.azure_file_shares.is_empty()),
        (
            "azureBlobFileSystems",
            volumes.azure_blob_file_systems.is_empty(),
        ),
        ("fileServers", volumes.file_servers.is_empty()),
    ];
    if let Some((what, _)) = unknown.into_iter().find(|(_, none)| !none) {
        return Err(LaunchError::UnknownVolume { what });
    }
    let mut mounts: Vec<Mount> = Vec::new();
    for system in &volumes.unmanaged_file_systems {
        let path = &system.relative_mount_path;
        // The coordinator has checked it; what is mounted as root is checked where it is done.
        let plain =
            paths::below(path).ok_or_else(|| LaunchError::BadPlace { path: path.clone() })?;
        let path = format!("{root}/{plain}");
        let clash = |other: &Mount| {
            paths::is_within(&path, &other.path) || paths::is_within(&other.path, &path)
        };
        if mounts.iter().any(clash) {
            return Err(LaunchError::BadPlace { path });
        }
        mounts.push(Mount {
            path,
            how: How::Command(system.mount_command.clone()),
        });
    }
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use batchai_proto::v1::{FileServerMount, UnmanagedFileSystem};

    use super::*;

    fn volumes(places: &[&str]) -> MountVolumes {
        let system = |path: &&str| UnmanagedFileSystem {
            mount_command: "mount -t x y".into(),
            relative_mount_path: (*path).to_owned(),
        };
        MountVolumes {
            unmanaged_file_systems: places.iter().map(system).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn everything_has_a_place_of_its_own_below_the_root() {
        let mounts = of(Some(&volumes(&["a//b/.", "c"])), "/r/mounts").unwrap();
        let places: Vec<_> = mounts.iter().map(|mount| mount.path.as_str()).collect();
        assert_eq!(places, ["/r/mounts/a/b", "/r/mounts/c"]);
        assert_eq!(mounts[0].how, How::Command("mount -t x y".into()));
        for bad in [
            &["../x"][..],
            &["/x"],
            &["."],
            &["a", "./a"],
            &["a", "a/b"],
            &["a/b", "a"],
        ] {
            let refused = of(Some(&volumes(bad)), "/r");
            assert!(
                matches!(refused, Err(LaunchError::BadPlace { .. })),
                "{bad:?}"
            );
        }
        assert_eq!(of(None, "/r"), Ok(Vec::new()));
    }

    #[test]
    fn what_this_agent_does_not_know_is_refused() {
        let volumes = MountVolumes {
            file_servers: vec![FileServerMount::default()],
            ..Default::default()
        };
        let refused = of(Some(&volumes), "/r").unwrap_err().to_string();
        assert!(refused.contains("fileServers"), "{refused}");
    }
}
