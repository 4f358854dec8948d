//! PURE. Shares and containers of storage accounts, as people name them, and what they may ask for.
//!
//! All of it goes into files and command lines of other programs: what would be read there as something else is refused here.

/// Where SMB servers listen.
pub const SMB_PORT: u16 = 445;
const NAME_MAX: usize = 128;
const SHARE_MAX: usize = 80;
const URL_MAX: usize = 2048;
const OPTIONS_MAX: usize = 2048;
const OPTION_VALUE_MAX: u64 = 1 << 31;

/// An SMB share, and a directory in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    pub host: String,
    pub port: u16,
    pub share: String,
    /// Without slashes at its ends; empty for the whole share.
    pub directory: String,
}

/// Reads the URL of a share: `https://HOST/SHARE` as Azure has them, also with a port and a directory, or the same with `smb://`.
///
/// # Errors
/// Says what it must be.
pub fn share(url: &str) -> Result<Share, String> {
    let must =
        || "must be the URL of a share, as https://ACCOUNT.file.core.windows.net/SHARE".to_owned();
    let rest = url
        .strip_prefix("https://")
        .or_else(|| url.strip_prefix("smb://"))
        .ok_or_else(must)?;
    if url.len() > URL_MAX {
        return Err(format!("must have at most {URL_MAX} bytes"));
    }
    let (server, path) = rest.split_once('/').ok_or_else(must)?;
    let (host, port) = host_and_port(server, SMB_PORT).ok_or_else(must)?;
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    let share = parts.next().ok_or_else(must)?;
    check_share(share).map_err(|why| format!("names the share {share:?}: that {why}"))?;
    let directory: Vec<_> = parts.collect();
    let bad = |part: &&str| matches!(*part, "." | "..") || part.contains(BAD_IN_PATHS);
    if directory.iter().any(bad) {
        return Err("must lead to a directory of the share without `..`, `%` or the like".into());
    }
    Ok(Share {
        host,
        port,
        share: share.to_owned(),
        directory: directory.join("/"),
    })
}

/// Checks the name of a share.
///
/// # Errors
/// Says what it must be.
pub fn check_share(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.$".contains(c);
    match (1..=SHARE_MAX).contains(&name.len()) && name.chars().all(plain) && !name.starts_with('.')
    {
        true => Ok(()),
        false => Err(format!(
            "must be 1 to {SHARE_MAX} characters [-A-Za-z0-9_.$], not beginning with a dot"
        )),
    }
}

/// An escape is not read: it would be another name.
const BAD_IN_PATHS: fn(char) -> bool = |c| c.is_control() || "%?#\\:*\"<>|".contains(c);

/// Splits `HOST[:PORT]`. Addresses of IPv6 stand in brackets.
fn host_and_port(text: &str, usual: u16) -> Option<(String, u16)> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.parse().ok()?),
        _ => (text, usual),
    };
    let inner = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let is_v6 = inner.is_some_and(|inner| inner.parse::<core::net::Ipv6Addr>().is_ok());
    let is_name = !host.is_empty()
        && host.len() <= 255
        && host
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    (port > 0 && (is_v6 || is_name)).then(|| (inner.unwrap_or(host).to_owned(), port))
}

/// The URL of a service, for blobs or buckets, in parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub host: String,
    pub port: u16,
    /// How many parts the path has that follows.
    pub parts: usize,
    /// The whole of it, without a slash at its end.
    pub url: String,
}

/// Reads the URL of a service.
///
/// # Errors
/// Says what it must be.
pub fn endpoint(url: &str) -> Result<Endpoint, String> {
    let must = || "must be a URL as https://HOST or http://HOST:PORT".to_owned();
    let (rest, usual) = match (url.strip_prefix("https://"), url.strip_prefix("http://")) {
        (Some(rest), _) => (rest, 443),
        (None, Some(rest)) => (rest, 80),
        (None, None) => return Err(must()),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:/[]".contains(c);
    if url.len() > URL_MAX || !rest.chars().all(plain) {
        return Err(must());
    }
    let rest = rest.trim_end_matches('/');
    let (server, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (host, port) = host_and_port(server, usual).ok_or_else(must)?;
    Ok(Endpoint {
        host,
        port,
        parts: path.split('/').filter(|part| !part.is_empty()).count(),
        url: url.trim_end_matches('/').to_owned(),
    })
}

/// The URL of a blob service elsewhere. Who reads it takes the first part of the path for the account's only behind an address.
///
/// # Errors
/// Says what it must be.
pub fn blob_endpoint(url: &str) -> Result<Endpoint, String> {
    let endpoint = endpoint(url)?;
    let is_address = endpoint.host.parse::<core::net::IpAddr>().is_ok();
    match (is_address, endpoint.parts) {
        (true, 1) | (false, 0) => Ok(endpoint),
        (true, _) => Err(
            "must have the account as its path, and nothing more: its host is an IP address"
                .to_owned(),
        ),
        (false, _) => Err("must have no path, unless its host is an IP address".to_owned()),
    }
}

/// Checks the name of an account, or what stands for one elsewhere: a user, or the id of an access key.
///
/// # Errors
/// Says what it must be.
pub fn check_account(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._+=@".contains(c);
    match !name.is_empty() && name.len() <= NAME_MAX && name.chars().all(plain) {
        true => Ok(()),
        false => Err(format!(
            "must be 1 to {NAME_MAX} characters [-A-Za-z0-9._+=@]"
        )),
    }
}

/// Checks the name of a container, or of a bucket.
///
/// # Errors
/// Says what it must be.
pub fn check_container(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let legal = (3..=63).contains(&name.len())
        && name.chars().all(plain)
        && ends(name.chars().next())
        && ends(name.chars().last());
    match legal {
        true => Ok(()),
        false => Err("must be 3 to 63 characters [-a-z0-9.], with no mark at an end".to_owned()),
    }
}

/// Checks the region of a bucket; where none is given it is the service's own.
///
/// # Errors
/// Says what it must be.
pub fn check_region(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    match name.len() <= NAME_MAX && name.chars().all(plain) {
        true => Ok(()),
        false => Err(format!(
            "must be at most {NAME_MAX} characters [-a-z0-9], as eu-central-1"
        )),
    }
}

/// Checks a key: what lies in one line of a file.
///
/// # Errors
/// Says what it must be.
pub fn check_key(key: &str) -> Result<(), String> {
    match key.chars().any(char::is_control) {
        true => Err("must be one line".to_owned()),
        false => Ok(()),
    }
}

/// Reads a mode, `0777` where none is given.
pub fn mode(text: &str) -> Option<u32> {
    match text {
        "" => Some(0o777),
        text if text.len() > 4 || !text.bytes().all(|b| b.is_ascii_digit()) => None,
        text => u32::from_str_radix(text, 8)
            .ok()
            .filter(|mode| *mode <= 0o777),
    }
}

/// How a container is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobOptions {
    /// How long the kernel takes what it knows of a file for true, in seconds.
    pub attr_timeout_s: Option<u64>,
    /// How long the list of a directory is taken for true, in seconds.
    pub entry_timeout_s: Option<u64>,
    pub read_only: bool,
    pub https: bool,
    /// How long what was read stays on the node's disk, in seconds.
    pub cache_age_s: Option<u64>,
    /// How much of it, in MiB.
    pub cache_mib: Option<u64>,
}

impl Default for BlobOptions {
    fn default() -> BlobOptions {
        BlobOptions {
            attr_timeout_s: None,
            entry_timeout_s: None,
            read_only: false,
            https: true,
            cache_age_s: None,
            cache_mib: None,
        }
    }
}

/// The options that are known, for who gave another one.
pub const BLOB_OPTIONS: &str = "-o attr_timeout=S, -o entry_timeout=S, -o ro, -o rw, -o allow_other, -o big_writes, \
     -o kernel_cache, -o max_read=N, -o max_write=N, -o negative_timeout=S, --use-https=true|false, \
     --file-cache-timeout-in-seconds=S, --cache-size-mb=N";

/// Reads the options of a container, written as for blobfuse.
///
/// # Errors
/// All that are not known, or have a value that makes no sense.
pub fn blob_options(text: &str) -> Result<BlobOptions, Vec<String>> {
    let mut options = BlobOptions::default();
    let mut bad = Vec::new();
    let mut words = text.split_ascii_whitespace();
    if text.len() > OPTIONS_MAX {
        return Err(vec![format!("more than {OPTIONS_MAX} bytes")]);
    }
    while let Some(word) = words.next() {
        let fuse = match word.strip_prefix("-o") {
            Some("") => words.next(),
            Some(list) if !word.starts_with("--") => Some(list),
            _ => None,
        };
        match fuse {
            Some(list) => bad.extend(
                list.split(',')
                    .filter(|option| options.take_fuse(option).is_none())
                    .map(|option| format!("-o {option}")),
            ),
            None if options.take(word).is_none() => bad.push(word.to_owned()),
            None => {}
        }
    }
    match bad.is_empty() {
        true => Ok(options),
        false => Err(bad),
    }
}

impl BlobOptions {
    /// One for FUSE. `None`: it is not known.
    fn take_fuse(&mut self, option: &str) -> Option<()> {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        match (name, value.is_empty()) {
            ("ro", true) => self.read_only = true,
            ("rw", true) => self.read_only = false,
            ("attr_timeout", false) => self.attr_timeout_s = Some(number(value)?),
            ("entry_timeout", false) => self.entry_timeout_s = Some(number(value)?),
            // So it is always.
            ("allow_other" | "big_writes", true) => {}
            // They tune a cache and sizes that this way of mounting has none of; no file reads otherwise.
            ("kernel_cache", true) => {}
            ("max_read" | "max_write" | "negative_timeout", false) => drop(number(value)?),
            _ => return None,
        }
        Some(())
    }

    fn take(&mut self, option: &str) -> Option<()> {
        let (name, value) = option.split_once('=')?;
        match (name, value) {
            ("--use-https", "true") => self.https = true,
            ("--use-https", "false") => self.https = false,
            ("--file-cache-timeout-in-seconds", value) => self.cache_age_s = Some(number(value)?),
            ("--cache-size-mb", value) => self.cache_mib = Some(number(value)?).filter(|n| *n > 0),
            _ => return None,
        }
        Some(())
    }
}

/// Whole seconds or bytes; blobfuse takes `240.0` as well.
fn number(text: &str) -> Option<u64> {
    let text = text.strip_suffix(".0").unwrap_or(text);
    text.parse().ok().filter(|n| *n < OPTION_VALUE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read_and_what_is_none_is_not() {
        let read = |url: &str| share(url).map(|s| (s.host, s.port, s.share, s.directory));
        let text = |s: &str| s.to_owned();
        assert_eq!(
            read("https://acc.file.core.windows.net/data"),
            Ok((
                text("acc.file.core.windows.net"),
                445,
                text("data"),
                text("")
            ))
        );
        assert_eq!(
            read("smb://[::1]:1445/data/a//b/"),
            Ok((text("::1"), 1445, text("data"), text("a/b")))
        );
        for bad in [
            "",
            "data",
            "https://host",
            "https://host/",
            "https:///data",
            "ftp://host/data",
            "https://ho st/data",
            "https://host:0/data",
            "https://host:99999/data",
            "https://user@host/data",
            "https://host/da:ta",
            "https://host/data/../x",
            "https://host/data/%2e%2e",
            "https://host/data\nuser = x",
            "https://host/data/a\nb",
            "https://[::1/data",
        ] {
            assert!(share(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn endpoints_are_read_and_what_is_none_is_not() {
        let read = endpoint("http://127.0.0.1:10000/devstoreaccount1/").unwrap();
        assert_eq!((read.host.as_str(), read.port), ("127.0.0.1", 10000));
        assert_eq!(read.url, "http://127.0.0.1:10000/devstoreaccount1");
        assert_eq!(endpoint("https://minio.lab").unwrap().port, 443);
        assert!(blob_endpoint("http://127.0.0.1:10000/acc").is_ok());
        assert!(blob_endpoint("https://blobs.lab").is_ok());
        assert!(blob_endpoint("https://blobs.lab/acc").is_err());
        assert!(blob_endpoint("http://127.0.0.1:10000").is_err());
        assert!(blob_endpoint("http://127.0.0.1:10000/acc/more").is_err());
        for bad in ["", "minio", "https://", "https://a?b", "https://a\nb = c"] {
            assert!(endpoint(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_and_keys_and_modes_stay_what_they_are() {
        for good in ["a", "devstoreaccount1", "AKIA0EXAMPLE", "lab@host"] {
            assert_eq!(check_account(good), Ok(()));
        }
        for bad in ["", "a b", "a\nb", "a,b", &"x".repeat(129)] {
            assert!(check_account(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "ab", "Data", "-ab", "a/b", "a b", &"x".repeat(64)] {
            assert!(check_container(bad).is_err(), "{bad:?}");
        }
        assert_eq!(check_container("data-1"), Ok(()));
        assert!(check_region("").is_ok() && check_region("eu-central-1").is_ok());
        assert!(check_region("a\nb").is_err() && check_region("EU").is_err());
        assert!(check_key("a\nb").is_err() && check_key("a+/=").is_ok());
        assert_eq!(
            [mode(""), mode("0640"), mode("750")],
            [Some(0o777), Some(0o640), Some(0o750)]
        );
        assert_eq!(
            [mode("8"), mode("+777"), mode("7777"), mode("00777")],
            [None; 4]
        );
    }

    #[test]
    fn options_are_as_for_blobfuse_and_unknown_ones_are_all_named() {
        // What the original took where none were given.
        let usual = "--use-https=true -o big_writes -o max_read=131072 -o max_write=131072 -o attr_timeout=240 \
                     -o entry_timeout=240 -o negative_timeout=120 -o kernel_cache -o allow_other";
        let expected = BlobOptions {
            attr_timeout_s: Some(240),
            entry_timeout_s: Some(240),
            ..BlobOptions::default()
        };
        assert_eq!(blob_options(usual), Ok(expected));
        assert_eq!(blob_options(""), Ok(BlobOptions::default()));
        let own = "-o ro,entry_timeout=5.0 --file-cache-timeout-in-seconds=120 --cache-size-mb=100 --use-https=false";
        let expected = BlobOptions {
            entry_timeout_s: Some(5),
            read_only: true,
            https: false,
            cache_age_s: Some(120),
            cache_mib: Some(100),
            ..BlobOptions::default()
        };
        assert_eq!(blob_options(own), Ok(expected));
        let bad = "-o suid,ro --tmp-path=/etc --use-https=maybe -o attr_timeout=x --config-file=/x -ojunk";
        assert_eq!(
            blob_options(bad).unwrap_err(),
            [
                "-o suid",
                "--tmp-path=/etc",
                "--use-https=maybe",
                "-o attr_timeout=x",
                "--config-file=/x",
                "-o junk"
            ]
        );
        assert!(blob_options("-o").is_err());
    }
}
