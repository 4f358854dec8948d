//! PURE. What is mounted, where: from what a job or a cluster asks for to paths on this host and how to come to what lies there.

use batchai_common::names::{Kind, check_id, last_id};
use batchai_common::paths;
use batchai_proto::agent::v1::FileServerSource;
use batchai_proto::v1::{FileServerMount, MountVolumes};
use serde::{Deserialize, Serialize};

use super::LaunchError;
use super::storage::{self, Remote, Stead};

/// Something that is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Where: a directory of its own below the root of mounts. None lies in another.
    pub path: String,
    pub how: How,
    /// What the error is called where it cannot be mounted; empty for what others are called.
    #[serde(default)]
    pub code: String,
    /// What it is, in words, where `how` does not say it.
    #[serde(default)]
    pub what: String,
    /// How many seconds it may take to be mounted, where who serves it may come later: the node's own bound, where that is longer.
    #[serde(default)]
    pub wait_s: u64,
}

/// How it is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// By a command line of the user's, to which the path is appended.
    Command(String),
    /// A directory of a file server, by NFS.
    Nfs {
        address: String,
        port: u16,
        /// 3 or 4; 0 is 3.
        #[serde(default)]
        version: i32,
        /// As the server names it.
        directory: String,
        options: String,
        /// What others write or make is seen at once: nothing is answered from memory.
        #[serde(default)]
        fresh: bool,
    },
    /// A directory of this machine: of a file server that lies on it, or what stands in the stead of something.
    Local {
        /// What the file server shares, or an administrator gives.
        shared: String,
        /// Below that.
        directory: String,
        options: String,
    },
    /// By its key, from another machine.
    Remote(Box<Remote>),
}

/// What to mount below a root. `stead`: what is mounted in the stead of volumes; `sources`: where file servers are served; `owner`: whom the files of what knows no users belong to.
pub fn of(
    volumes: Option<&MountVolumes>,
    stead: &Stead,
    sources: &[FileServerSource],
    root: &str,
    owner: (u32, u32),
) -> Result<Vec<Mount>, LaunchError> {
    let Some(volumes) = volumes else {
        return Ok(Vec::new());
    };
    let mut all = Vec::new();
    for share in &volumes.azure_file_shares {
        let path = &share.relative_mount_path;
        all.push(match storage::of_server(path, "", stead)? {
            Some(server) => (path, file_server(&server, sources)?, ""),
            None => {
                let how = storage::of_share(share, stead, owner)?;
                (path, how, storage::SHARE_FAILED)
            }
        });
    }
    for blob in &volumes.azure_blob_file_systems {
        let path = &blob.relative_mount_path;
        all.push(
            match storage::of_server(path, &blob.mount_options, stead)? {
                Some(server) => (path, file_server(&server, sources)?, ""),
                None => {
                    let how = storage::of_container(blob, stead, owner)?;
                    (path, how, storage::CONTAINER_FAILED)
                }
            },
        );
    }
    for server in &volumes.file_servers {
        let how = file_server(server, sources)?;
        all.push((&server.relative_mount_path, how, ""));
    }
    for system in &volumes.unmanaged_file_systems {
        let how = How::Command(system.mount_command.clone());
        all.push((&system.relative_mount_path, how, ""));
    }
    let mut mounts: Vec<Mount> = Vec::new();
    for (path, how, code) in all {
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
        let code = code.to_owned();
        mounts.push(Mount {
            path,
            how,
            code,
            what: String::new(),
            wait_s: 0,
        });
    }
    Ok(mounts)
}

/// What the directory of a file server is called.
pub fn data_name(name: &str, uid: &str) -> Option<String> {
    let name = last_id(name);
    // The coordinator has checked both; here they become a path.
    check_id(Kind::Node, name).ok()?;
    check_id(Kind::Node, uid).ok()?;
    Some(format!("{name}-{uid}"))
}

fn file_server(mount: &FileServerMount, sources: &[FileServerSource]) -> Result<How, LaunchError> {
    let named = sources
        .iter()
        .find(|source| source.name == mount.file_server);
    let place = named.and_then(|source| source.place.as_ref());
    let (Some(source), Some(place)) = (named, place) else {
        let name = mount.file_server.clone();
        return Err(LaunchError::NotServed { name });
    };
    let below = paths::inside(&mount.source_directory).map_err(|_| LaunchError::BadPlace {
        path: mount.source_directory.clone(),
    })?;
    let options = mount.mount_options.clone();
    if source.local {
        // It is another node's word: what is bound is a share of this very one, and nothing else.
        let share = data_name(&source.name, &source.uid);
        if !share.is_some_and(|share| place.path.ends_with(&format!("/{share}"))) {
            let path = place.path.clone();
            return Err(LaunchError::BadPlace { path });
        }
        return Ok(How::Local {
            shared: place.path.clone(),
            directory: below,
            options,
        });
    }
    Ok(How::Nfs {
        address: place.address.clone(),
        port: u16::try_from(place.port).unwrap_or_default(),
        version: place.nfs_version,
        directory: format!("/{below}"),
        options,
        fresh: false,
    })
}

#[cfg(test)]
mod tests {
    use batchai_proto::agent::v1::FileServerPlace;
    use batchai_proto::v1::storage_alias::Target;
    use batchai_proto::v1::{
        AzureBlobFileSystem, AzureFileShare, FileServerDirectory, StorageAlias, UnmanagedFileSystem,
    };

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

    fn all(volumes: &MountVolumes, root: &str) -> Result<Vec<Mount>, LaunchError> {
        of(Some(volumes), &Stead::new(), &[], root, (0, 0))
    }

    #[test]
    fn everything_has_a_place_of_its_own_below_the_root() {
        let mounts = all(&volumes(&["a//b/.", "c"]), "/r/mounts").unwrap();
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
            let refused = all(&volumes(bad), "/r");
            assert!(
                matches!(refused, Err(LaunchError::BadPlace { .. })),
                "{bad:?}"
            );
        }
        assert_eq!(of(None, &Stead::new(), &[], "/r", (0, 0)), Ok(Vec::new()));
    }

    #[test]
    fn a_file_server_is_mounted_from_where_it_is_served() {
        let volumes = |directory: &str| MountVolumes {
            file_servers: vec![FileServerMount {
                file_server: "f".into(),
                source_directory: directory.into(),
                relative_mount_path: "data".into(),
                mount_options: "ro".into(),
            }],
            ..Default::default()
        };
        let source = FileServerSource {
            name: "f".into(),
            uid: "1".into(),
            place: Some(FileServerPlace {
                address: "10.0.0.2".into(),
                port: 2049,
                path: "/srv/f-1".into(),
                nfs_version: 4,
                ..Default::default()
            }),
            ..Default::default()
        };
        let how = |directory: &str, source: &FileServerSource| {
            let sources = std::slice::from_ref(source);
            let mounts = of(
                Some(&volumes(directory)),
                &Stead::new(),
                sources,
                "/r",
                (0, 0),
            );
            mounts.map(|mounts| mounts[0].how.clone())
        };
        let nfs = |directory: &str| How::Nfs {
            address: "10.0.0.2".into(),
            port: 2049,
            version: 4,
            directory: directory.into(),
            options: "ro".into(),
            fresh: false,
        };
        assert_eq!(how("", &source), Ok(nfs("/")));
        assert_eq!(how("/", &source), Ok(nfs("/")));
        assert_eq!(how("/a//b/", &source), Ok(nfs("/a/b")));
        assert!(how("a/../..", &source).is_err());
        let local = FileServerSource {
            local: true,
            ..source.clone()
        };
        let shared = How::Local {
            shared: "/srv/f-1".into(),
            directory: "a".into(),
            options: "ro".into(),
        };
        assert_eq!(how("a", &local), Ok(shared));
        // Whoever serves it cannot have anything else of this machine bound.
        let other = FileServerSource {
            uid: "2".into(),
            ..local
        };
        assert!(matches!(
            how("a", &other),
            Err(LaunchError::BadPlace { .. })
        ));
        let absent = FileServerSource {
            place: None,
            ..source
        };
        let refused = how("", &absent).unwrap_err().to_string();
        assert!(refused.contains("f cannot be mounted"), "{refused}");
    }

    #[test]
    fn a_share_or_a_container_that_leads_to_a_file_server_is_mounted_as_if_that_were_named() {
        let named = |path: &str, options: &str| FileServerMount {
            file_server: "f".into(),
            source_directory: "/sets//one/".into(),
            relative_mount_path: path.into(),
            mount_options: options.into(),
        };
        let blob = |path: &str, options: &str| AzureBlobFileSystem {
            relative_mount_path: path.into(),
            mount_options: options.into(),
            ..Default::default()
        };
        let aliased = MountVolumes {
            azure_file_shares: vec![AzureFileShare {
                relative_mount_path: "afs".into(),
                ..Default::default()
            }],
            azure_blob_file_systems: vec![
                blob("bfs", "-o ro --cache-size-mb=1"),
                blob("writes", "-o ro,rw"),
            ],
            ..Default::default()
        };
        let as_named = MountVolumes {
            file_servers: vec![named("afs", ""), named("bfs", "ro"), named("writes", "")],
            ..Default::default()
        };
        let alias = StorageAlias {
            target: Some(Target::FileServer(FileServerDirectory {
                file_server: "f".into(),
                directory: "/sets//one/".into(),
            })),
            ..Default::default()
        };
        let paths = ["afs", "bfs", "writes"];
        let stead: Stead = paths.map(|path| (path.to_owned(), alias.clone())).into();
        let mut source = FileServerSource {
            name: "f".into(),
            uid: "1".into(),
            place: Some(FileServerPlace {
                address: "10.0.0.2".into(),
                port: 2049,
                path: "/srv/f-1".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        for local in [false, true] {
            source.local = local;
            let plan = |volumes: &MountVolumes, stead: &Stead| {
                let sources = std::slice::from_ref(&source);
                of(Some(volumes), stead, sources, "/r", (7, 8)).unwrap()
            };
            let mounts = plan(&aliased, &stead);
            assert_eq!(mounts, plan(&as_named, &Stead::new()));
            assert_eq!(mounts.len(), 3);
        }
        // One that is not served, and an option that is none.
        let refused = of(Some(&aliased), &stead, &[], "/r", (7, 8));
        assert_eq!(
            refused,
            of(Some(&as_named), &Stead::new(), &[], "/r", (7, 8))
        );
        let bad = MountVolumes {
            azure_blob_file_systems: vec![blob("bfs", "-o suid")],
            ..Default::default()
        };
        let refused = of(Some(&bad), &stead, &[source], "/r", (7, 8));
        assert!(
            matches!(refused, Err(LaunchError::BadVolume { .. })),
            "{refused:?}"
        );
    }
}
