//! What `rclone` is told of something that lies on another machine, and what of its words is passed on.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use batchai_common::{storage, time};
use ring::hmac;

use super::Point;
use crate::launch::{Place, Remote};

/// From when on a file that was closed is written back. At once would be too early: rclone loses the new names of files that are given
/// them while they are being written back, as programs do that write to another name first.
const WRITE_BACK: &str = "1s";
/// What a signature allows, and by which rules it is made.
const SIGNED: &str = "racwdl";
const SIGNED_VERSION: &str = "2018-11-09";
/// Characters that SMB cannot have in names. A dot at the end is none of them: rclone would make a directory of another name of `.`.
const SMB_ENCODING: &str =
    "Slash,LtGt,DoubleQuote,Colon,Question,Asterisk,Pipe,BackSlash,Ctl,RightSpace,InvalidUtf8";
/// A page of the kernel's.
const DATA_MAX: usize = 4096;
/// The kernel's own way.
const ECHO_S_MAX: u64 = 60;
/// Of what it says.
const WORDS_MAX: usize = 400;
/// Settings that begin or end so would be read as something else.
const BAD_ENDS: fn(char) -> bool = |c| c.is_whitespace() || "\"'`".contains(c);

/// What rclone reads: one remote, `r`. `password`: the key as it has passwords; for shares only. `until`: when a signature ends, in seconds
/// since 1970.
pub fn settings(remote: &Remote, key: &str, password: &str, until: i64) -> io::Result<String> {
    storage::check_key(key).map_err(|why| io::Error::other(format!("its key {why}")))?;
    let account = remote.account.as_str();
    let lines = match &remote.place {
        Place::Share { host, port, .. } => vec![
            ("type", "smb".to_owned()),
            // The port is put behind it.
            (
                "host",
                match host.contains(':') {
                    true => format!("[{host}]"),
                    false => host.clone(),
                },
            ),
            ("port", port.to_string()),
            ("user", account.to_owned()),
            ("pass", password.to_owned()),
            ("encoding", SMB_ENCODING.to_owned()),
        ],
        Place::Container { service, container } => {
            let signature = signature(account, container, key, until)?;
            vec![
                ("type", "azureblob".to_owned()),
                ("sas_url", format!("{service}/{container}?{signature}")),
            ]
        }
        Place::Bucket {
            endpoint, region, ..
        } => vec![
            ("type", "s3".to_owned()),
            ("provider", "Other".to_owned()),
            ("endpoint", endpoint.clone()),
            // Where it is empty that is as if it was not there.
            ("region", region.clone()),
            ("force_path_style", "true".to_owned()),
            ("no_check_bucket", "true".to_owned()),
            ("access_key_id", account.to_owned()),
            ("secret_access_key", key.to_owned()),
        ],
    };
    let mut text = "[r]\n".to_owned();
    for (name, value) in lines {
        if value.contains(char::is_control)
            || value.starts_with(BAD_ENDS)
            || value.ends_with(BAD_ENDS)
        {
            return Err(io::Error::other(format!(
                "its {name} cannot be given to rclone"
            )));
        }
        text.push_str(&format!("{name} = {value}\n"));
    }
    Ok(text)
}

/// What opens one container, as a part of a URL: a shared access signature.
fn signature(account: &str, container: &str, key: &str, until: i64) -> io::Result<String> {
    let until = time::from_millis(until.saturating_mul(1000)).to_string();
    let key = BASE64_STANDARD.decode(key.trim());
    let key = key
        .map_err(|_| io::Error::other("its key is none of a storage account: it is not base64"))?;
    let resource = format!("/blob/{account}/{container}");
    // What it may, from when, until when, where; who, from where, how; the rules, what that is; which one of it; and five headers.
    let parts = [
        SIGNED,
        "",
        &until,
        &resource,
        "",
        "",
        "",
        SIGNED_VERSION,
        "c",
        "",
        "",
        "",
        "",
        "",
        "",
    ];
    let tag = hmac::sign(
        &hmac::Key::new(hmac::HMAC_SHA256, &key),
        parts.join("\n").as_bytes(),
    );
    let escaped = |text: &str| {
        text.replace('+', "%2B")
            .replace('/', "%2F")
            .replace('=', "%3D")
            .replace(':', "%3A")
    };
    Ok(format!(
        "sv={SIGNED_VERSION}&sr=c&sp={SIGNED}&se={}&sig={}",
        escaped(&until),
        escaped(&BASE64_STANDARD.encode(tag.as_ref()))
    ))
}

/// What is mounted, as rclone names it.
pub fn root(remote: &Remote) -> String {
    match &remote.place {
        Place::Share {
            share, directory, ..
        } => format!("r:{share}/{directory}")
            .trim_end_matches('/')
            .to_owned(),
        Place::Container { container, .. } => format!("r:{container}"),
        Place::Bucket {
            bucket, directory, ..
        } => format!("r:{bucket}/{directory}")
            .trim_end_matches('/')
            .to_owned(),
    }
}

/// How it is mounted.
pub fn arguments(remote: &Remote, point: &Point<'_>) -> Vec<String> {
    let shares = matches!(remote.place, Place::Share { .. });
    // What is read stays where it takes long to come by; what a share has is changed by others at any place of a file.
    let keeps = if shares { "writes" } else { "full" };
    let text = |text: &str| text.to_owned();
    let path = |path: &Path| path.to_string_lossy().into_owned();
    let mut arguments = vec![
        text("mount"),
        root(remote),
        path(point.path),
        text("--allow-other"),
        text("--default-permissions"),
        format!("--uid={}", remote.uid),
        format!("--gid={}", remote.gid),
        text("--umask=0"),
        format!("--file-perms=0{:o}", remote.file_mode),
        format!("--dir-perms=0{:o}", remote.directory_mode),
        format!("--cache-dir={}", path(point.cache)),
        format!("--vfs-cache-mode={keeps}"),
        format!("--vfs-write-back={WRITE_BACK}"),
        format!("--vfs-cache-max-size={}M", remote.cache_mib),
        format!("--dir-cache-time={}s", remote.list_s),
        text("--poll-interval=0"),
    ];
    arguments.extend(remote.attr_s.map(|s| format!("--attr-timeout={s}s")));
    arguments.extend(
        remote
            .cache_age_s
            .map(|s| format!("--vfs-cache-max-age={s}s")),
    );
    arguments.extend(remote.read_only.then(|| text("--read-only")));
    arguments
}

/// What the kernel needs to know of a share; none of what is no share. It reads `DATA_MAX` bytes of it, and says nothing of more.
pub fn cifs_options(
    remote: &Remote,
    key: &str,
    address: SocketAddr,
    patience: Duration,
) -> io::Result<Option<String>> {
    let Place::Share { .. } = &remote.place else {
        return Ok(None);
    };
    let Remote {
        account, uid, gid, ..
    } = remote;
    // Who waits for what was written cannot be killed until the kernel gives up a server that is silent: after three times as long.
    let echo_s = (patience.as_secs() / 3).clamp(1, ECHO_S_MAX);
    let data = format!(
        "ip={},port={},echo_interval={echo_s},username={account},uid={uid},gid={gid},forceuid,forcegid,file_mode=0{:o},dir_mode=0{:o},password={}",
        address.ip(),
        address.port(),
        remote.file_mode,
        remote.directory_mode,
        // So is a comma written there.
        key.replace(',', ",,"),
    );
    match data.len() < DATA_MAX {
        true => Ok(Some(data)),
        false => Err(io::Error::other("its key is too long")),
    }
}

/// The last of what rclone says, without times and what it says of itself.
pub fn plain(words: &str) -> String {
    let field = |name: &str| {
        let line = words.lines().find_map(|line| line.split_once(name))?.1;
        let end = line.find(", Details").unwrap_or(line.len());
        Some(line[..end].trim().to_owned())
    };
    let code = words.split_once("(ServiceCode=").and_then(|(_, rest)| {
        let (code, _) = rest.split_once(')')?;
        Some(code.to_owned())
    });
    // So newer ones have it.
    if let Some(code) = code.or_else(|| field("ERROR CODE: ")) {
        let why = field("Description=").or_else(|| field("RESPONSE "));
        return format!("{code}: {}", why.unwrap_or_default());
    }
    let mut last = match words.rsplit_once("last error was: ") {
        Some((_, rest)) => rest.lines().next(),
        None => words.lines().rfind(|line| !line.trim().is_empty()),
    }
    .unwrap_or_default();
    for before in ["error in ListJSON: ", "Failed to lsf: "] {
        last = last.split_once(before).map_or(last, |(_, rest)| rest);
    }
    match last.trim() {
        // The only one of its words that says less than it knows.
        "directory not found" => "there is nothing of that name".to_owned(),
        last => last.chars().take(WORDS_MAX).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key that an emulator of Azure's storage has, as everybody knows.
    const KEY: &str =
        "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

    /// The end of the year 2199.
    const UNTIL: i64 = 7_258_118_399;

    fn remote(place: Place) -> Remote {
        Remote {
            place,
            account: "devstoreaccount1".into(),
            key: "m".into(),
            uid: 7,
            gid: 8,
            file_mode: 0o640,
            directory_mode: 0o750,
            read_only: false,
            list_s: 5,
            attr_s: None,
            cache_age_s: None,
            cache_mib: 100,
        }
    }

    fn share() -> Remote {
        remote(Place::Share {
            host: "nas".into(),
            port: 445,
            share: "data".into(),
            directory: "a/b".into(),
        })
    }

    #[test]
    fn a_container_is_opened_by_a_signature_and_a_bucket_by_its_key() {
        let container = remote(Place::Container {
            service: "http://127.0.0.1:10000/devstoreaccount1".into(),
            container: "data".into(),
        });
        let text = settings(&container, KEY, "", UNTIL).unwrap();
        assert!(!text.contains("Eby8"), "{text}");
        assert_eq!(
            text,
            "[r]\ntype = azureblob\nsas_url = http://127.0.0.1:10000/devstoreaccount1/data?sv=2018-11-09&sr=c&sp=racwdl\
             &se=2199-12-31T23%3A59%3A59Z&sig=FQiroscjb2zDU30WYNoZVdXNJsOqNkNUg6nKEGxlas4%3D\n"
        );
        let bucket = remote(Place::Bucket {
            endpoint: "https://minio".into(),
            bucket: "train".into(),
            directory: String::new(),
            region: "eu-central-1".into(),
        });
        let text = settings(&bucket, "s3cret/x+", "", UNTIL).unwrap();
        assert!(text.contains("\nregion = eu-central-1\n"), "{text}");
        assert!(
            text.ends_with("access_key_id = devstoreaccount1\nsecret_access_key = s3cret/x+\n")
        );
        assert_eq!(root(&bucket), "r:train");
        for bad in ["a\nb = c", "\"a", " a"] {
            assert!(settings(&bucket, bad, "", UNTIL).is_err(), "{bad:?}");
        }
        let refused = settings(&container, "not base64!", "", UNTIL).unwrap_err();
        assert!(refused.to_string().contains("base64"), "{refused}");
    }

    #[test]
    fn an_address_is_told_from_its_port() {
        let mut six = share();
        if let Place::Share { host, .. } = &mut six.place {
            *host = "fe80::1".into();
        }
        let text = settings(&six, "k", "p", UNTIL).unwrap();
        assert!(text.contains("\nhost = [fe80::1]\nport = 445\n"), "{text}");
        let text = settings(&share(), "k", "p", UNTIL).unwrap();
        assert!(text.contains("\nhost = nas\n"), "{text}");
    }

    #[test]
    fn a_share_is_told_to_the_kernel_with_whose_it_is() {
        let address = "10.0.0.9:1445".parse().unwrap();
        let options = |key: &str| cifs_options(&share(), key, address, Duration::from_secs(15));
        assert_eq!(
            options("k,1").unwrap().unwrap(),
            "ip=10.0.0.9,port=1445,echo_interval=5,username=devstoreaccount1,uid=7,gid=8,forceuid,forcegid,file_mode=0640,dir_mode=0750,password=k,,1"
        );
        let long = options(&"k".repeat(DATA_MAX)).unwrap_err().to_string();
        assert!(long.contains("too long"), "{long}");
        assert_eq!(root(&share()), "r:data/a/b");
    }

    #[test]
    fn of_what_rclone_says_the_reason_is_left() {
        let azure = "2026/11/27 09:13:10 Failed to create file system for \"r:c\": -> github.com/x, y.go:42\n\
                     ===== RESPONSE ERROR (ServiceCode=AuthorizationFailure) =====\n\
                     Description=403 Server failed to authenticate the request., Details: (none)\n   HEAD http://x\n";
        assert_eq!(
            plain(azure),
            "AuthorizationFailure: 403 Server failed to authenticate the request."
        );
        let missing = "2026/11/27 09:13:27 ERROR : : error listing: directory not found\n\
                       2026/11/27 09:13:27 Failed to lsf with 2 errors: last error was: error in ListJSON: directory not found\n";
        assert_eq!(plain(missing), "there is nothing of that name");
        let s3 = "2026/11/27 09:33:11 Failed to lsf with 2 errors: last error was: error in ListJSON: InvalidAccessKeyId: no\n\t\
                  status code: 403, request id: , host id: \n";
        assert_eq!(plain(s3), "InvalidAccessKeyId: no");
        let newer = "2026/11/27 09:13:10 CRITICAL: Failed to lsf: error in ListJSON: HEAD http://127.0.0.1:1/a/c/x\n\
                     --------------------------------------------------------------------------------\n\
                     RESPONSE 403: 403 Server failed to authenticate the request.\nERROR CODE: AuthorizationFailure\n\
                     --------------------------------------------------------------------------------\nResponse body\n";
        assert_eq!(
            plain(newer),
            "AuthorizationFailure: 403: 403 Server failed to authenticate the request."
        );
        assert_eq!(plain(""), "");
    }
}
