//! Where secrets stand in what is kept, and messages that do not show theirs when they are printed.
//!
//! What is done with them (sealed, opened, left out) is others' business.

use std::fmt::{Debug, Formatter, Result};

use crate::agent::v1::{JoinRequest, RemoteHello};
use crate::v1::{
    AppInsightsReference, Cluster, EnvironmentVariableWithSecretValue, Job, MountVolumes,
    PrivateRegistryCredentials, StorageCredentials, UserAccountSettings,
};

/// A secret's value, with the path that leads to it.
pub type Place<'a> = (String, &'a mut String);

/// The secrets of a job.
pub fn of_job(job: &mut Job) -> Vec<Place<'_>> {
    let mut places = of_variables("secrets", &mut job.secrets);
    places.extend(of_mounts("mount_volumes", job.mount_volumes.as_mut()));
    let registry = job.container_settings.as_mut();
    let registry = registry.and_then(|container| container.image_source_registry.as_mut());
    if let Some(credentials) = registry.and_then(|registry| registry.credentials.as_mut()) {
        let path = "container_settings.image_source_registry.credentials.password";
        places.push((path.to_owned(), &mut credentials.password));
    }
    places
}

/// The secrets of a cluster.
pub fn of_cluster(cluster: &mut Cluster) -> Vec<Place<'_>> {
    let mut places = Vec::new();
    if let Some(account) = &mut cluster.user_account_settings {
        let path = "user_account_settings.admin_user_password";
        places.push((path.to_owned(), &mut account.admin_user_password));
    }
    let Some(setup) = &mut cluster.node_setup else {
        return places;
    };
    if let Some(task) = &mut setup.setup_task {
        places.extend(of_variables(
            "node_setup.setup_task.secrets",
            &mut task.secrets,
        ));
    }
    let mounts = setup.mount_volumes.as_mut();
    places.extend(of_mounts("node_setup.mount_volumes", mounts));
    let counters = setup.performance_counters_settings.as_mut();
    if let Some(insights) = counters.and_then(|counters| counters.app_insights_reference.as_mut()) {
        let at = "node_setup.performance_counters_settings.app_insights_reference";
        let path = format!("{at}.instrumentation_key");
        places.push((path, &mut insights.instrumentation_key));
    }
    places
}

fn of_variables<'a>(
    at: &'a str,
    variables: &'a mut [EnvironmentVariableWithSecretValue],
) -> Vec<Place<'a>> {
    let place = |(i, variable): (usize, &'a mut EnvironmentVariableWithSecretValue)| {
        (format!("{at}[{i}].value"), &mut variable.value)
    };
    variables.iter_mut().enumerate().map(place).collect()
}

/// The secrets of what is mounted. `at`: the path that leads to it.
pub fn of_mounts<'a>(at: &str, mounts: Option<&'a mut MountVolumes>) -> Vec<Place<'a>> {
    let Some(mounts) = mounts else {
        return Vec::new();
    };
    let shares = mounts
        .azure_file_shares
        .iter_mut()
        .enumerate()
        .map(|(i, share)| (format!("azure_file_shares[{i}]"), &mut share.credentials));
    let blobs = mounts
        .azure_blob_file_systems
        .iter_mut()
        .enumerate()
        .map(|(i, blob)| {
            (
                format!("azure_blob_file_systems[{i}]"),
                &mut blob.credentials,
            )
        });
    let all = shares.chain(blobs);
    all.filter_map(|(volume, credentials)| {
        let key = &mut credentials.as_mut()?.account_key;
        Some((format!("{at}.{volume}.credentials.account_key"), key))
    })
    .collect()
}

/// Leaves the values out; names and whatever else there is stay.
pub fn blank(places: Vec<Place<'_>>) {
    for (_, value) in places {
        value.clear();
    }
}

/// What is printed in a secret's place.
fn covered(secret: &str) -> &'static str {
    match secret {
        "" => "",
        _ => "(secret)",
    }
}

impl Debug for EnvironmentVariableWithSecretValue {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("EnvironmentVariableWithSecretValue")
            .field("name", &self.name)
            .field("value", &covered(&self.value))
            .field("value_secret_reference", &self.value_secret_reference)
            .finish()
    }
}

impl Debug for StorageCredentials {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let reference = &self.account_key_secret_reference;
        f.debug_struct("StorageCredentials")
            .field("account_key", &covered(&self.account_key))
            .field("account_key_secret_reference", reference)
            .finish()
    }
}

impl Debug for PrivateRegistryCredentials {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("PrivateRegistryCredentials")
            .field("username", &self.username)
            .field("password", &covered(&self.password))
            .field("password_secret_reference", &self.password_secret_reference)
            .finish()
    }
}

impl Debug for UserAccountSettings {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("UserAccountSettings")
            .field("admin_user_name", &self.admin_user_name)
            .field("admin_user_ssh_public_key", &self.admin_user_ssh_public_key)
            .field("admin_user_password", &covered(&self.admin_user_password))
            .finish()
    }
}

impl Debug for AppInsightsReference {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let reference = &self.instrumentation_key_secret_reference;
        f.debug_struct("AppInsightsReference")
            .field("component", &self.component)
            .field("instrumentation_key", &covered(&self.instrumentation_key))
            .field("instrumentation_key_secret_reference", reference)
            .finish()
    }
}

impl Debug for RemoteHello {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let names: Vec<_> = self.secrets.keys().collect();
        f.debug_struct("RemoteHello")
            .field("attempt", &self.attempt)
            .field("token", &covered(&self.token))
            .field("host", &self.host)
            .field("command_line", &self.command_line)
            .field("input", &self.input)
            .field("secrets", &names)
            .finish()
    }
}

impl Debug for JoinRequest {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.debug_struct("JoinRequest")
            .field("token", &covered(&self.token))
            .field("node_id", &self.node_id)
            .field("uid", &self.uid)
            .field("certificate_request", &self.certificate_request)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use prost_reflect::{DynamicMessage, Kind, MessageDescriptor, Value};

    use super::*;
    use crate::reflect::{descriptor, is_input_only};

    const MARK: &str = "hunter2";

    /// A message with a mark in every text that only goes in, wherever it stands.
    fn marked(of: MessageDescriptor) -> DynamicMessage {
        let mut message = DynamicMessage::new(of.clone());
        for field in of.fields() {
            let value = match field.kind() {
                Kind::String if is_input_only(&field) => Value::String(MARK.to_owned()),
                Kind::Message(inner) if !inner.full_name().starts_with("google.") => {
                    Value::Message(marked(inner))
                }
                _ => continue,
            };
            match (field.is_map(), field.is_list()) {
                (true, _) => {}
                (false, true) => message.set_field(&field, Value::List(vec![value])),
                (false, false) => message.set_field(&field, value),
            }
        }
        message
    }

    fn check<M: Message + Default + Clone + Debug>(name: &str, of: fn(&mut M) -> Vec<Place<'_>>) {
        let bytes = marked(descriptor(name)).encode_to_vec();
        let holds = |bytes: &[u8]| {
            bytes
                .windows(MARK.len())
                .filter(|w| *w == MARK.as_bytes())
                .count()
        };
        let mut message = M::decode(&bytes[..]).unwrap();
        assert!(holds(&bytes) > 1);
        assert_eq!(of(&mut message).len(), holds(&bytes), "{name}");
        let text = format!("{message:?}");
        assert!(
            !text.contains(MARK) && text.contains("(secret)"),
            "{name}: {text}"
        );
        blank(of(&mut message));
        assert_eq!(holds(&message.encode_to_vec()), 0, "{name}");
    }

    #[test]
    fn every_secret_is_found_and_none_is_printed() {
        check::<Job>("Job", of_job);
        check::<Cluster>("Cluster", of_cluster);
        let join = JoinRequest {
            token: MARK.to_owned(),
            ..Default::default()
        };
        assert!(!format!("{join:?}").contains(MARK));
    }
}
