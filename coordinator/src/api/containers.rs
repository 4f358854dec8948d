//! PURE. Checks the container that a job asks for.
//!
//! Whether a node can have it, its agent says: which engine is there, and what an archive or a directory holds, is known there only.

use batchai_common::images::{self, Image};
use batchai_proto::v1::{ContainerSettings, ImageSourceRegistry};

use super::faults::Faults;
use super::volumes::one_of;

/// As docker's own login takes it.
const USERNAME_BYTES_MAX: usize = 255;

pub fn check(faults: &mut Faults, field: &str, given: &ContainerSettings) {
    if !given.shm_size.is_empty() && images::size(&given.shm_size).is_none() {
        let why = "must be a number of bytes with a unit, for example 64m or 2g";
        faults.invalid(format!("{field}.shm_size"), why);
    }
    let field = format!("{field}.image_source_registry");
    match &given.image_source_registry {
        Some(registry) => check_registry(faults, &field, registry),
        None => faults.invalid(field, "must be given"),
    }
}

fn check_registry(faults: &mut Faults, field: &str, given: &ImageSourceRegistry) {
    let image = Image::read(&given.image);
    if let Err(why) = &image {
        faults.invalid(format!("{field}.image"), *why);
    }
    let asked = !given.server_url.is_empty() || given.credentials.is_some();
    match &image {
        Ok(Image::Rootfs(_) | Image::Archive(_) | Image::Local(_)) if asked => {
            let why = "is in no registry: leave server_url and credentials out";
            faults.invalid(format!("{field}.image"), why);
        }
        Ok(Image::Registry { host, .. }) => check_server(faults, field, given, host),
        _ => {}
    }
    if let Some(credentials) = &given.credentials {
        let field = format!("{field}.credentials");
        let name = &credentials.username;
        let legal = !name.contains(':') && !name.chars().any(char::is_control);
        if name.is_empty() || name.len() > USERNAME_BYTES_MAX || !legal {
            let why = "must be given, with at most 255 bytes and no colon";
            faults.invalid(format!("{field}.username"), why);
        }
        let reference = credentials.password_secret_reference.as_ref();
        let password = ("password", credentials.password.as_str());
        one_of(faults, &field, password, reference);
    }
}

/// The credentials are for the registry that serves the image, and shown to no other.
fn check_server(faults: &mut Faults, field: &str, given: &ImageSourceRegistry, host: &str) {
    let url = &given.server_url;
    if url.is_empty() {
        return;
    }
    let field = format!("{field}.server_url");
    match images::registry(url) {
        None => faults.invalid(field, "must be the URL of a registry"),
        Some(server) if server != host => {
            let why = format!(
                "serves no image of {host}: give the image with its registry, for example {server}/{}",
                given.image
            );
            faults.invalid(field, why);
        }
        Some(_) => {}
    }
}
