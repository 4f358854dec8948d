//! PURE. Shares and containers of storage accounts, and what an administrator has put in their stead: from what a job or a cluster asks
//! for to how it is mounted. Keys are not part of that: a plan lies on a disk, and they do not.

use std::collections::BTreeMap;

use batchai_common::storage::{self, BlobOptions};
use batchai_proto::v1::storage_alias::Target;
use batchai_proto::v1::{
    AzureBlobFileSystem, AzureFileShare, FileServerMount, MountVolumes, StorageAlias,
    StorageCredentials,
};
use serde::{Deserialize, Serialize};

use super::LaunchError;
use super::volumes::How;

/// What a job or a node has as error where a share cannot be mounted, and where a container cannot.
pub const SHARE_FAILED: &str = "AZFMountError";
pub const CONTAINER_FAILED: &str = "BFSMountError";

const AZURE_BLOBS: &str = "blob.core.windows.net";
/// What was read of containers, on the node's disk, where nothing else is asked for.
const CACHE_MIB: u64 = 10 << 10;
/// How long the list of a directory is taken for true: others write there as well.
const LIST_S: u64 = 10;
const SHARE_LIST_S: u64 = 1;

/// Something that lies on another machine, and is opened with a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remote {
    pub place: Place,
    /// The account, the user or the id of the access key.
    pub account: String,
    /// Which of the keys opens it.
    pub key: String,
    /// Whom what lies there belongs to, for this host.
    pub uid: u32,
    pub gid: u32,
    pub file_mode: u32,
    pub directory_mode: u32,
    pub read_only: bool,
    /// Seconds.
    pub list_s: u64,
    pub attr_s: Option<u64>,
    pub cache_age_s: Option<u64>,
    pub cache_mib: u64,
}

/// Where it lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    Share {
        host: String,
        port: u16,
        share: String,
        /// In it; empty for all of it.
        directory: String,
    },
    /// `service` is the URL of the account's blobs.
    Container { service: String, container: String },
    Bucket {
        endpoint: String,
        bucket: String,
        /// In it; empty for all of it.
        #[serde(default)]
        directory: String,
        /// Where the service has it; empty where nobody says.
        #[serde(default)]
        region: String,
    },
}

impl Remote {
    /// What people call it.
    pub fn named(&self) -> String {
        let account = &self.account;
        match &self.place {
            Place::Share {
                host,
                port,
                share,
                directory,
            } => {
                let port = match *port {
                    storage::SMB_PORT => String::new(),
                    port => format!(":{port}"),
                };
                let directory = match directory.as_str() {
                    "" => String::new(),
                    directory => format!("/{directory}"),
                };
                format!("the share //{host}{port}/{share}{directory} of {account}")
            }
            Place::Container { service, container } => {
                format!("the container {container} at {service} of {account}")
            }
            Place::Bucket {
                endpoint,
                bucket,
                directory,
                ..
            } => {
                let directory = match directory.as_str() {
                    "" => String::new(),
                    directory => format!("/{directory}"),
                };
                format!("the bucket {bucket}{directory} at {endpoint} of {account}")
            }
        }
    }

    /// The server: host and port.
    pub fn server(&self) -> Option<(String, u16)> {
        let of_url = |url: &str| {
            let endpoint = storage::endpoint(url).ok()?;
            Some((endpoint.host, endpoint.port))
        };
        match &self.place {
            Place::Share { host, port, .. } => Some((host.clone(), *port)),
            Place::Container { service, .. } => of_url(service),
            Place::Bucket { endpoint, .. } => of_url(endpoint),
        }
    }
}

/// What is put in the stead of volumes, by their relative mount paths.
pub type Stead = BTreeMap<String, StorageAlias>;

/// What opens volumes, by their relative mount paths.
pub type Keys = BTreeMap<String, String>;

/// The directory of a file server that is mounted in the stead of a volume, as if it were named. Of what the volume asks for, `-o ro` counts.
pub fn of_server(
    path: &str,
    options: &str,
    stead: &Stead,
) -> Result<Option<FileServerMount>, LaunchError> {
    let target = stead.get(path).and_then(|alias| alias.target.as_ref());
    let Some(Target::FileServer(inside)) = target else {
        return Ok(None);
    };
    let options = container_options(path, options)?;
    Ok(Some(FileServerMount {
        file_server: inside.file_server.clone(),
        source_directory: inside.directory.clone(),
        relative_mount_path: path.to_owned(),
        mount_options: if options.read_only { "ro" } else { "" }.to_owned(),
    }))
}

fn container_options(path: &str, options: &str) -> Result<BlobOptions, LaunchError> {
    storage::blob_options(options).map_err(|all| LaunchError::BadVolume {
        path: path.to_owned(),
        why: format!("unknown options: {}", all.join(" ")),
    })
}

/// How a share is mounted. `owner`: whom its files belong to.
pub fn of_share(
    share: &AzureFileShare,
    stead: &Stead,
    owner: (u32, u32),
) -> Result<How, LaunchError> {
    let bad = |why| LaunchError::BadVolume {
        path: share.relative_mount_path.clone(),
        why,
    };
    let mode = |text: &str| {
        storage::mode(text).ok_or_else(|| bad(format!("{text:?} is no mode of files")))
    };
    let mut found = storage::share(&share.azure_file_url).map_err(bad)?;
    let asked = Asked {
        account: &share.account_name,
        path: &share.relative_mount_path,
        directory: &found.directory.clone(),
        file_mode: mode(&share.file_mode)?,
        directory_mode: mode(&share.directory_mode)?,
        owner,
    };
    let alias = stead.get(&share.relative_mount_path);
    match alias.and_then(|alias| alias.target.as_ref()) {
        None => {}
        Some(Target::Url(url)) => {
            found = storage::share(url).map_err(bad)?;
            // What stands for a share has its directories.
            let whole = format!("{}/{}", found.directory, asked.directory);
            found.directory = whole.trim_matches('/').to_owned();
        }
        Some(other) => return elsewhere(other, &asked, &BlobOptions::default()),
    }
    storage::check_account(&share.account_name).map_err(bad)?;
    let place = Place::Share {
        host: found.host,
        port: found.port,
        share: found.share,
        directory: found.directory,
    };
    let options = BlobOptions {
        entry_timeout_s: Some(SHARE_LIST_S),
        ..BlobOptions::default()
    };
    Ok(remote(place, &asked, &options))
}

/// How a container is mounted.
pub fn of_container(
    blob: &AzureBlobFileSystem,
    stead: &Stead,
    owner: (u32, u32),
) -> Result<How, LaunchError> {
    let bad = |why| LaunchError::BadVolume {
        path: blob.relative_mount_path.clone(),
        why,
    };
    let options = container_options(&blob.relative_mount_path, &blob.mount_options)?;
    storage::check_container(&blob.container_name).map_err(bad)?;
    let account = &blob.account_name;
    let asked = Asked {
        account,
        path: &blob.relative_mount_path,
        directory: "",
        file_mode: 0o777,
        directory_mode: 0o777,
        owner,
    };
    storage::check_account(account).map_err(bad)?;
    let alias = stead.get(&blob.relative_mount_path);
    let service = match alias.and_then(|alias| alias.target.as_ref()) {
        Some(Target::Url(url)) => storage::blob_endpoint(url).map_err(bad)?.url,
        Some(other) => return elsewhere(other, &asked, &options),
        None => {
            let scheme = if options.https { "https" } else { "http" };
            // What is no name of a host cannot be an account of Azure.
            let url = format!("{scheme}://{account}.{AZURE_BLOBS}");
            storage::endpoint(&url).map_err(bad)?.url
        }
    };
    let place = Place::Container {
        service,
        container: blob.container_name.clone(),
    };
    Ok(remote(place, &asked, &options))
}

/// What a volume asks for, whatever stands in its stead.
struct Asked<'a> {
    account: &'a str,
    /// Its relative mount path.
    path: &'a str,
    /// Below what it names; empty for all of it.
    directory: &'a str,
    file_mode: u32,
    directory_mode: u32,
    /// Whom its files belong to.
    owner: (u32, u32),
}

/// What is no share and no container at all.
fn elsewhere(
    target: &Target,
    asked: &Asked<'_>,
    options: &BlobOptions,
) -> Result<How, LaunchError> {
    match target {
        Target::Path(path) => Ok(How::Local {
            shared: path.clone(),
            directory: asked.directory.to_owned(),
            options: if options.read_only { "ro" } else { "" }.to_owned(),
        }),
        Target::S3Bucket(bucket) => {
            let bad = |why| LaunchError::BadVolume {
                path: bucket.bucket.clone(),
                why,
            };
            storage::check_container(&bucket.bucket).map_err(bad)?;
            storage::check_region(&bucket.region).map_err(bad)?;
            let place = Place::Bucket {
                endpoint: storage::endpoint(&bucket.endpoint).map_err(bad)?.url,
                bucket: bucket.bucket.clone(),
                directory: asked.directory.to_owned(),
                region: bucket.region.clone(),
            };
            Ok(remote(place, asked, options))
        }
        Target::Url(_) | Target::FileServer(_) => Err(LaunchError::UnknownVolume {
            what: "such a storage alias",
        }),
    }
}

fn remote(place: Place, asked: &Asked<'_>, options: &BlobOptions) -> How {
    How::Remote(Box::new(Remote {
        place,
        account: asked.account.to_owned(),
        key: asked.path.to_owned(),
        uid: asked.owner.0,
        gid: asked.owner.1,
        file_mode: asked.file_mode,
        directory_mode: asked.directory_mode,
        read_only: options.read_only,
        list_s: options.entry_timeout_s.unwrap_or(LIST_S),
        attr_s: options.attr_timeout_s,
        cache_age_s: options.cache_age_s,
        cache_mib: options.cache_mib.unwrap_or(CACHE_MIB),
    }))
}

/// The keys of volumes, by their relative mount paths. They are kept in memory only.
pub fn keys(volumes: Option<&MountVolumes>) -> Keys {
    let Some(volumes) = volumes else {
        return Keys::new();
    };
    let shares = volumes.azure_file_shares.iter();
    let shares = shares.map(|share| (&share.relative_mount_path, &share.credentials));
    let blobs = volumes.azure_blob_file_systems.iter();
    let blobs = blobs.map(|blob| (&blob.relative_mount_path, &blob.credentials));
    let key = |(path, credentials): (&String, &Option<StorageCredentials>)| {
        Some((path.clone(), credentials.as_ref()?.account_key.clone()))
    };
    shares.chain(blobs).filter_map(key).collect()
}

#[cfg(test)]
mod tests {
    use batchai_proto::v1::S3Bucket;

    use super::*;

    fn share() -> AzureFileShare {
        AzureFileShare {
            account_name: "acc".into(),
            azure_file_url: "https://acc.file.core.windows.net/data".into(),
            relative_mount_path: "afs".into(),
            file_mode: "0640".into(),
            ..Default::default()
        }
    }

    fn blob() -> AzureBlobFileSystem {
        AzureBlobFileSystem {
            account_name: "acc".into(),
            container_name: "data".into(),
            relative_mount_path: "bfs".into(),
            ..Default::default()
        }
    }

    fn stead(path: &str, target: Target) -> Stead {
        let alias = StorageAlias {
            target: Some(target),
            ..Default::default()
        };
        [(path.to_owned(), alias)].into()
    }

    fn place(how: How) -> Place {
        match how {
            How::Remote(remote) => remote.place,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_share_and_a_container_are_where_azure_has_them() {
        let How::Remote(remote) = of_share(&share(), &Stead::new(), (7, 8)).unwrap() else {
            panic!();
        };
        assert_eq!(
            remote.named(),
            "the share //acc.file.core.windows.net/data of acc"
        );
        assert_eq!((remote.uid, remote.gid), (7, 8));
        assert_eq!((remote.file_mode, remote.directory_mode), (0o640, 0o777));
        let How::Remote(remote) = of_container(&blob(), &Stead::new(), (0, 0)).unwrap() else {
            panic!();
        };
        assert_eq!(
            remote.named(),
            "the container data at https://acc.blob.core.windows.net of acc"
        );
        let server = ("acc.blob.core.windows.net".to_owned(), 443);
        assert_eq!(remote.server(), Some(server));
        let plain = AzureBlobFileSystem {
            mount_options: "--use-https=false -o ro".into(),
            ..blob()
        };
        let How::Remote(remote) = of_container(&plain, &Stead::new(), (0, 0)).unwrap() else {
            panic!();
        };
        assert!(remote.read_only);
        assert_eq!(remote.server().unwrap().1, 80);
    }

    #[test]
    fn what_stands_in_their_stead_is_mounted() {
        let bind = How::Local {
            shared: "/lab/data".into(),
            directory: String::new(),
            options: String::new(),
        };
        let path = Target::Path("/lab/data".into());
        assert_eq!(
            of_share(&share(), &stead("afs", path.clone()), (0, 0)),
            Ok(bind.clone())
        );
        assert_eq!(
            of_container(&blob(), &stead("bfs", path.clone()), (0, 0)),
            Ok(bind)
        );
        // Only of the volume that it stands for.
        let other = of_container(&blob(), &stead("afs", path), (0, 0)).unwrap();
        assert!(matches!(place(other), Place::Container { .. }));
        let url = Target::Url("smb://nas.lab:1445/x/y".into());
        let nas = of_share(&share(), &stead("afs", url), (0, 0)).unwrap();
        let expected = Place::Share {
            host: "nas.lab".into(),
            port: 1445,
            share: "x".into(),
            directory: "y".into(),
        };
        assert_eq!(place(nas), expected);
        let bucket = Target::S3Bucket(S3Bucket {
            endpoint: "https://minio.lab:9000/".into(),
            bucket: "train".into(),
            region: "eu-central-1".into(),
        });
        let expected = Place::Bucket {
            endpoint: "https://minio.lab:9000".into(),
            bucket: "train".into(),
            directory: String::new(),
            region: "eu-central-1".into(),
        };
        for how in [
            of_share(&share(), &stead("afs", bucket.clone()), (0, 0)),
            of_container(&blob(), &stead("bfs", bucket.clone()), (0, 0)),
        ] {
            assert_eq!(place(how.unwrap()), expected);
        }
    }

    #[test]
    fn what_stands_for_a_share_has_its_directories_and_modes() {
        let deep = AzureFileShare {
            azure_file_url: "https://acc.file.core.windows.net/data/a/b/".into(),
            ..share()
        };
        let at = |target: Target| of_share(&deep, &stead("afs", target), (7, 8)).unwrap();
        let local = How::Local {
            shared: "/lab/data".into(),
            directory: "a/b".into(),
            options: String::new(),
        };
        assert_eq!(at(Target::Path("/lab/data".into())), local);
        for (url, expected) in [("smb://nas.lab/x", "a/b"), ("smb://nas.lab/x/y/", "y/a/b")] {
            let Place::Share { directory, .. } = place(at(Target::Url(url.into()))) else {
                panic!();
            };
            assert_eq!(directory, expected);
        }
        let bucket = at(Target::S3Bucket(S3Bucket {
            endpoint: "https://minio.lab:9000".into(),
            bucket: "train".into(),
            region: String::new(),
        }));
        let How::Remote(bucket) = bucket else {
            panic!("{bucket:?}")
        };
        let named = "the bucket train/a/b at https://minio.lab:9000 of acc";
        assert_eq!(bucket.named(), named);
        assert_eq!((bucket.file_mode, bucket.directory_mode), (0o640, 0o777));
        // What is asked for is checked, whatever stands in its stead.
        let bad = AzureFileShare {
            file_mode: "rwx".into(),
            ..share()
        };
        let path = stead("afs", Target::Path("/lab".into()));
        let refused = of_share(&bad, &path, (0, 0));
        assert!(matches!(refused, Err(LaunchError::BadVolume { .. })));
        // A container read only, too.
        let frozen = AzureBlobFileSystem {
            mount_options: "-o ro".into(),
            ..blob()
        };
        let path = stead("bfs", Target::Path("/lab".into()));
        let how = of_container(&frozen, &path, (0, 0)).unwrap();
        assert!(matches!(how, How::Local { options, .. } if options == "ro"));
    }

    #[test]
    fn what_would_be_read_as_something_else_is_refused_here_too() {
        for bad in [
            AzureFileShare {
                account_name: "a\nhost = evil".into(),
                ..share()
            },
            AzureFileShare {
                azure_file_url: "https://h/s/../../x".into(),
                ..share()
            },
            AzureFileShare {
                file_mode: "rwx".into(),
                ..share()
            },
        ] {
            let refused = of_share(&bad, &Stead::new(), (0, 0));
            assert!(
                matches!(refused, Err(LaunchError::BadVolume { .. })),
                "{bad:?}"
            );
        }
        for bad in [
            AzureBlobFileSystem {
                account_name: "a/b".into(),
                ..blob()
            },
            // No account of Azure; elsewhere it may be one.
            AzureBlobFileSystem {
                account_name: "a@b".into(),
                ..blob()
            },
            AzureBlobFileSystem {
                container_name: "a/../b".into(),
                ..blob()
            },
            AzureBlobFileSystem {
                mount_options: "--tmp-path=/etc".into(),
                ..blob()
            },
        ] {
            let refused = of_container(&bad, &Stead::new(), (0, 0));
            assert!(
                matches!(refused, Err(LaunchError::BadVolume { .. })),
                "{bad:?}"
            );
        }
    }
}
