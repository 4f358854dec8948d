//! PURE. Images of containers, as people name them: a directory or an archive on the node, or a reference that an engine knows.
//!
//! Nothing is fetched or looked at here. What is not of one of these forms is none: a reference never begins with `-` and holds
//! nothing that a shell or an engine would read as more than a name.

/// Where the image of a container comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Image {
    /// A directory that holds the root file system itself.
    Rootfs(String),
    /// A file as `docker save` and `podman save` write it.
    Archive(String),
    /// What the node's engine has under this name: it is in no registry.
    Local(String),
    /// What a registry has: its host, and the whole reference.
    Registry { host: String, reference: String },
}

const ROOTFS: &str = "rootfs:";
const ARCHIVE: &str = "docker-archive:";
/// What an image without a registry belongs to.
const HUB: &str = "docker.io";
const HUB_ALIASES: [&str; 3] = ["index.docker.io", "registry-1.docker.io", HUB];
/// The host of what is in no registry.
const LOCAL: &str = "localhost";
const PATH_BYTES_MAX: usize = 4096;
const NAME_BYTES_MAX: usize = 255;
const TAG_BYTES_MAX: usize = 128;
const SHA256: &str = "sha256:";
const SHM_BYTES_MAX: u64 = 1 << 50;

impl Image {
    /// Reads what a user names; paths may begin with a variable of the service.
    ///
    /// # Errors
    /// Says what an image is named like.
    pub fn read(text: &str) -> Result<Image, &'static str> {
        if let Some(path) = text.strip_prefix(ROOTFS) {
            return checked(path).map(Image::Rootfs);
        }
        if let Some(path) = text.strip_prefix(ARCHIVE) {
            return checked(path).map(Image::Archive);
        }
        reference(text).ok_or(
            "must be [REGISTRY/]NAME[:TAG][@sha256:DIGEST] in lower case, docker-archive:/PATH of what `docker save` wrote, or rootfs:/PATH \
             of a directory that holds a root file system",
        )
    }
}

fn checked(path: &str) -> Result<String, &'static str> {
    let climbs = path.split('/').any(|part| part == "..");
    let begins_well = path.starts_with('/') || path.starts_with("$AZ_BATCHAI_");
    let ends_well = !path.chars().any(char::is_control) && path.len() <= PATH_BYTES_MAX;
    match begins_well && ends_well && !climbs {
        true => Ok(path.to_owned()),
        false => Err(
            "must name an absolute path without `..`; it may begin with $AZ_BATCHAI_..., for example rootfs:/images/ubuntu",
        ),
    }
}

/// By the rules of docker: what has a dot, a port or is localhost in front is a host; an image of nobody is the hub's own.
fn reference(text: &str) -> Option<Image> {
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (text, None),
    };
    let (host, rest) = match rest.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == LOCAL => (host, rest),
        _ => (HUB, rest),
    };
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    let legal = is_host(host)
        && path.split('/').all(is_component)
        && tag.is_none_or(is_tag)
        && digest.is_none_or(is_digest)
        && host.len() + path.len() < NAME_BYTES_MAX;
    if !legal {
        return None;
    }
    let host = canonical(host);
    let own = match host == HUB && !path.contains('/') {
        true => "library/",
        false => "",
    };
    let tag = tag.map(|tag| format!(":{tag}")).unwrap_or_default();
    let digest = digest
        .map(|digest| format!("@{digest}"))
        .unwrap_or_default();
    let reference = format!("{host}/{own}{path}{tag}{digest}");
    Some(match host == LOCAL {
        true => Image::Local(reference),
        false => Image::Registry {
            host: host.to_owned(),
            reference,
        },
    })
}

fn canonical(host: &str) -> &str {
    match HUB_ALIASES.contains(&host) {
        true => HUB,
        false => host,
    }
}

/// The host of a registry, by its URL.
pub fn registry(url: &str) -> Option<&str> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let host = rest.split('/').next().unwrap_or_default();
    is_host(host).then(|| canonical(host))
}

fn is_host(host: &str) -> bool {
    let (name, port) = match host.split_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (host, None),
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|c| c.is_ascii_alphanumeric() || c == b'-')
    };
    let digits = |port: &str| {
        let all = port.bytes().all(|c| c.is_ascii_digit());
        all && port.parse::<u16>().is_ok_and(|port| port > 0)
    };
    name.split('.').all(label) && port.is_none_or(digits)
}

/// Lower case and digits, which `.`, `_`, `__` or dashes may part.
fn is_component(component: &str) -> bool {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = component.as_bytes();
    let ends =
        bytes.first().copied().is_some_and(plain) && bytes.last().copied().is_some_and(plain);
    let parted = component
        .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        .all(|part| matches!(part, "" | "." | "_" | "__") || part.bytes().all(|c| c == b'-'));
    ends && parted
}

fn is_tag(tag: &str) -> bool {
    let mut bytes = tag.bytes();
    let first = bytes.next();
    first.is_some_and(|c| c.is_ascii_alphanumeric() || c == b'_')
        && bytes.all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.' | b'-'))
        && tag.len() <= TAG_BYTES_MAX
}

fn is_digest(digest: &str) -> bool {
    digest.strip_prefix(SHA256).is_some_and(is_sha256)
}

/// Whether a text is a SHA-256 as images are named by it.
pub fn is_sha256(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|c| c.is_ascii_digit() || matches!(c, b'a'..=b'f'))
}

/// Bytes, by a number and a unit: `64m`, `1g`; bytes where there is none.
pub fn size(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    let end = lower
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(lower.len());
    let (number, unit) = lower.split_at(end);
    let shift = match unit {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    let bytes = number.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    (1..=SHM_BYTES_MAX).contains(&bytes).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read_as_docker_reads_them() {
        let digest = "a".repeat(64);
        for (given, host, whole) in [
            ("ubuntu", "docker.io", "docker.io/library/ubuntu".to_owned()),
            (
                "microsoft/cntk:2.5.1-gpu",
                "docker.io",
                "docker.io/microsoft/cntk:2.5.1-gpu".into(),
            ),
            (
                "index.docker.io/library/a",
                "docker.io",
                "docker.io/library/a".into(),
            ),
            (
                "team.azurecr.io/a/b__c-d:V_1",
                "team.azurecr.io",
                "team.azurecr.io/a/b__c-d:V_1".into(),
            ),
            ("Registry:5000/x", "Registry:5000", "Registry:5000/x".into()),
            (
                &format!("a@sha256:{digest}"),
                "docker.io",
                format!("docker.io/library/a@sha256:{digest}"),
            ),
        ] {
            let expected = Image::Registry {
                host: host.to_owned(),
                reference: whole,
            };
            assert_eq!(Image::read(given), Ok(expected), "{given}");
        }
        assert_eq!(
            Image::read("localhost/mine:1"),
            Ok(Image::Local("localhost/mine:1".into()))
        );
        assert_eq!(Image::read("rootfs:/a b"), Ok(Image::Rootfs("/a b".into())));
        let variable = "docker-archive:$AZ_BATCHAI_MOUNT_ROOT/a.tar";
        let archive = Image::Archive("$AZ_BATCHAI_MOUNT_ROOT/a.tar".into());
        assert_eq!(Image::read(variable), Ok(archive));
    }

    #[test]
    fn what_is_no_image_is_refused_and_options_are_none() {
        let long = "a".repeat(300);
        for given in [
            "",
            "-v",
            "--privileged",
            "a b",
            "a\nb",
            "A",
            "a/",
            "/a",
            "a//b",
            "a:",
            "a:-x",
            "a:b:c",
            "a@sha256:12",
            "a@md5:00",
            "a..b",
            "a___b",
            "-x.io/a",
            "x-.io/a",
            "x.io:0/a",
            "x.io:+5/a",
            "x.io:99999/a",
            "a;b",
            "a$b",
            "a_",
            "../a",
            "a/../b",
            &long,
            "docker-archive:a.tar",
            "rootfs:latest",
            "rootfs:/a/../b",
            "rootfs:$HOME/x",
            "rootfs:/a\nb",
            "oci:/a",
            "ä",
        ] {
            assert!(Image::read(given).is_err(), "{given:?}");
        }
    }

    #[test]
    fn a_registry_is_known_by_its_url() {
        for (url, host) in [
            ("https://index.docker.io/v1/", Some("docker.io")),
            ("team.azurecr.io", Some("team.azurecr.io")),
            ("http://127.0.0.1:5000", Some("127.0.0.1:5000")),
            ("", None),
            ("-x", None),
            ("a b", None),
        ] {
            assert_eq!(registry(url), host, "{url}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("64m", 64 << 20),
            ("1G", 1 << 30),
            ("4096", 4096),
            ("8kb", 8192),
            ("1b", 1),
        ] {
            assert_eq!(size(text), Some(bytes), "{text}");
        }
        for text in [
            "",
            "m",
            "0",
            "0m",
            "-1m",
            "1.5g",
            "1x",
            "99999999t",
            "m1",
            "64 m",
        ] {
            assert_eq!(size(text), None, "{text}");
        }
    }
}
