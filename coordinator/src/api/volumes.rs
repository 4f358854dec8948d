//! PURE. Checks volumes and secrets, wherever they stand. References to a key vault are not served yet; what is wrong with them is said all
//! the same.

use batchai_common::names::Kind as Noun;
use batchai_common::{mount_options, paths, storage};
use batchai_proto::v1::{
    AzureBlobFileSystem, AzureFileShare, EnvironmentVariableWithSecretValue,
    KeyVaultSecretReference, MountVolumes, NameValuePair, StorageCredentials,
};

use super::faults::Faults;
use super::job_spec;

/// As many as there may be in all: the agent looks after each of them.
pub const LIST_MAX: usize = 100;
/// Keys, certificates and files of credentials fit; data does not.
const SECRET_BYTES_MAX: usize = 32 << 10;

/// Checks what to mount.
pub fn check_mounts(faults: &mut Faults, field: &str, given: &MountVolumes) {
    let mut places = Vec::new();
    check_shares(faults, field, &given.azure_file_shares, &mut places);
    check_containers(faults, field, &given.azure_blob_file_systems, &mut places);
    for (i, server) in given.file_servers.iter().enumerate().take(LIST_MAX + 1) {
        let at = format!("{field}.file_servers[{i}]");
        faults.name(
            &format!("{at}.file_server"),
            Noun::FileServer,
            &server.file_server,
        );
        let inside = paths::inside(&server.source_directory).map(drop);
        must(faults, format!("{at}.source_directory"), inside);
        if let Err(why) = mount_options::parse(&server.mount_options) {
            faults.invalid(format!("{at}.mount_options"), why);
        }
        places.push((at, server.relative_mount_path.as_str()));
    }
    for (i, system) in given
        .unmanaged_file_systems
        .iter()
        .enumerate()
        .take(LIST_MAX + 1)
    {
        let at = format!("{field}.unmanaged_file_systems[{i}]");
        faults.text(&format!("{at}.mount_command"), &system.mount_command, true);
        places.push((at, system.relative_mount_path.as_str()));
    }
    if places.len() > LIST_MAX {
        faults.invalid(field, format!("has more than {LIST_MAX} volumes"));
    }
    check_places(faults, &places);
}

/// Where volumes are to be mounted, with the paths of what says so.
type Places<'a> = Vec<(String, &'a str)>;

fn check_shares<'a>(
    faults: &mut Faults,
    field: &str,
    given: &'a [AzureFileShare],
    places: &mut Places<'a>,
) {
    for (i, share) in given.iter().enumerate().take(LIST_MAX + 1) {
        let at = format!("{field}.azure_file_shares[{i}]");
        let account = storage::check_account(&share.account_name);
        must(faults, format!("{at}.account_name"), account);
        let url = storage::share(&share.azure_file_url).map(drop);
        must(faults, format!("{at}.azure_file_url"), url);
        credentials(faults, &at, share.credentials.as_ref());
        for (name, text) in [
            ("file_mode", &share.file_mode),
            ("directory_mode", &share.directory_mode),
        ] {
            if storage::mode(text).is_none() {
                let why = "must be an octal mode of at most 0777";
                faults.invalid(format!("{at}.{name}"), why);
            }
        }
        places.push((at, share.relative_mount_path.as_str()));
    }
}

fn check_containers<'a>(
    faults: &mut Faults,
    field: &str,
    given: &'a [AzureBlobFileSystem],
    places: &mut Places<'a>,
) {
    for (i, blob) in given.iter().enumerate().take(LIST_MAX + 1) {
        let at = format!("{field}.azure_blob_file_systems[{i}]");
        let account = storage::check_account(&blob.account_name);
        must(faults, format!("{at}.account_name"), account);
        let container = storage::check_container(&blob.container_name);
        must(faults, format!("{at}.container_name"), container);
        if let Err(unknown) = storage::blob_options(&blob.mount_options) {
            let (unknown, known) = (unknown.join(" "), storage::BLOB_OPTIONS);
            let why = format!("has what is not known: {unknown}; known are: {known}");
            faults.invalid(format!("{at}.mount_options"), why);
        }
        credentials(faults, &at, blob.credentials.as_ref());
        places.push((at, blob.relative_mount_path.as_str()));
    }
}

fn must(faults: &mut Faults, at: String, checked: Result<(), String>) {
    if let Err(why) = checked {
        faults.invalid(at, why);
    }
}

/// Whether nodes are told what to run, as root.
pub fn have_commands(given: Option<&MountVolumes>) -> bool {
    given.is_some_and(|given| !given.unmanaged_file_systems.is_empty())
}

/// Every volume has a place of its own below the mount root, and none lies in another.
fn check_places(faults: &mut Faults, places: &[(String, &str)]) {
    let mut taken: Vec<String> = Vec::new();
    for (at, path) in places {
        let at = format!("{at}.relative_mount_path");
        faults.text(&at, path, true);
        let Some(plain) = paths::below(path) else {
            faults.invalid(
                &at,
                "must be a relative path below the mount root, without `..`",
            );
            continue;
        };
        let clash = taken
            .iter()
            .find(|other| paths::is_within(&plain, other) || paths::is_within(other, &plain));
        if let Some(other) = clash {
            faults.invalid(
                at,
                format!("is, or lies in or around, the place of another volume: {other}"),
            );
        }
        taken.push(plain);
    }
}

fn credentials(faults: &mut Faults, at: &str, given: Option<&StorageCredentials>) {
    let at = format!("{at}.credentials");
    let Some(given) = given else {
        return faults.invalid(at, "must be given");
    };
    let reference = given.account_key_secret_reference.as_ref();
    let key = storage::check_key(&given.account_key);
    must(faults, format!("{at}.account_key"), key);
    one_of(faults, &at, ("account_key", &given.account_key), reference);
}

/// A secret is given by its value or by where it is, not both.
pub fn one_of(
    faults: &mut Faults,
    at: &str,
    (name, value): (&str, &str),
    reference: Option<&KeyVaultSecretReference>,
) {
    if value.len() > SECRET_BYTES_MAX || value.contains('\0') {
        let why = format!("must have at most {SECRET_BYTES_MAX} bytes and no NUL");
        faults.invalid(format!("{at}.{name}"), why);
    }
    if value.is_empty() == reference.is_none() {
        let why = format!("must be given, or a reference to it in {name}_secret_reference");
        faults.invalid(format!("{at}.{name}"), why);
    }
    if let Some(reference) = reference {
        let at = format!("{at}.{name}_secret_reference");
        faults.text(&format!("{at}.source_vault"), &reference.source_vault, true);
        faults.text(&format!("{at}.secret_url"), &reference.secret_url, true);
        faults.not_served(&at, true);
    }
}

/// Checks secret environment variables; their names must not be those of the plain ones.
pub fn check_secrets(
    faults: &mut Faults,
    field: &str,
    given: &[EnvironmentVariableWithSecretValue],
    plain: &[NameValuePair],
) {
    let mut seen = plain
        .iter()
        .map(|variable| variable.name.as_str())
        .collect();
    let names = given.iter().map(|secret| secret.name.as_str());
    job_spec::check_variable_names(faults, field, names.take(LIST_MAX), &mut seen);
    for (i, secret) in given.iter().enumerate().take(LIST_MAX) {
        let reference = secret.value_secret_reference.as_ref();
        one_of(
            faults,
            &format!("{field}[{i}]"),
            ("value", &secret.value),
            reference,
        );
    }
    if given.len() > LIST_MAX {
        faults.invalid(field, format!("has more than {LIST_MAX} elements"));
    }
}
