//! PURE. Checks what a user asks of a cluster, all of it at once, and fills in the defaults. Says which of its settings have
//! no effect here.

use batchai_proto::v1::cluster::VmPriority;
use batchai_proto::v1::manual_scale_settings::NodeDeallocationOption;
use batchai_proto::v1::{
    AppInsightsReference, AutoScaleSettings, Cluster, ImageReference, ManualScaleSettings,
    NodeSetup, PerformanceCountersSettings, ScaleSettings, SetupTask, UserAccountSettings,
    VirtualMachineConfiguration, Warning,
};

use super::faults::Faults;
use super::{fields, job_spec, volumes};

const NODES_MAX: i32 = 10_000;
const TEXT_BYTES_MAX: usize = 256;
const VERSION_DEFAULT: &str = "latest";

/// Checks a cluster's settings; what comes back is what is stored, apart from name and uid.
pub fn check(faults: &mut Faults, given: Cluster) -> Cluster {
    fields::check_output_only(faults, "cluster", "Cluster", &given);
    faults.text("cluster.vm_size", &given.vm_size, true);
    let scale = given.scale_settings.unwrap_or_default();
    let scale = check_scale(faults, "cluster.scale_settings", scale);
    let image = given
        .virtual_machine_configuration
        .and_then(|c| c.image_reference);
    let image = image.map(|image| check_image(faults, image));
    if VmPriority::try_from(given.vm_priority).is_err() {
        faults.invalid("cluster.vm_priority", "is not one of its values");
    }
    let vm_priority = given.vm_priority.max(VmPriority::Dedicated as i32);
    faults.text("cluster.subnet", &given.subnet, false);
    faults.labels("cluster.labels", &given.labels);
    let account = given
        .user_account_settings
        .map(|account| check_account(faults, "cluster.user_account_settings", account));
    let node_setup = given.node_setup.map(|setup| check_setup(faults, setup));
    Cluster {
        vm_size: given.vm_size,
        scale_settings: Some(scale),
        virtual_machine_configuration: image.map(|image| VirtualMachineConfiguration {
            image_reference: Some(image),
        }),
        vm_priority,
        node_setup,
        user_account_settings: account,
        subnet: given.subnet,
        labels: given.labels,
        ..Default::default()
    }
}

/// Checks how many nodes there shall be.
pub fn check_scale(faults: &mut Faults, field: &str, given: ScaleSettings) -> ScaleSettings {
    if given.manual.is_some() && given.auto_scale.is_some() {
        faults.invalid(field, "manual and auto_scale exclude each other");
    }
    if let Some(auto) = &given.auto_scale {
        check_auto(faults, &format!("{field}.auto_scale"), auto);
    }
    let manual = given.manual.unwrap_or_default();
    let manual = check_manual(faults, &format!("{field}.manual."), manual);
    ScaleSettings {
        manual: Some(manual),
        auto_scale: None,
    }
}

fn check_auto(faults: &mut Faults, field: &str, given: &AutoScaleSettings) {
    faults.not_served(field, true);
    for (name, count) in [
        ("minimum_node_count", given.minimum_node_count),
        ("maximum_node_count", given.maximum_node_count),
        ("initial_node_count", given.initial_node_count),
    ] {
        if !(0..=NODES_MAX).contains(&count) {
            faults.invalid(
                format!("{field}.{name}"),
                format!("must be from 0 to {NODES_MAX}"),
            );
        }
    }
    if given.minimum_node_count > given.maximum_node_count {
        let why = "must not be greater than maximum_node_count";
        faults.invalid(format!("{field}.minimum_node_count"), why);
    }
}

/// Checks a fixed number of nodes; `prefix` is what comes before its fields.
pub fn check_manual(
    faults: &mut Faults,
    prefix: &str,
    given: ManualScaleSettings,
) -> ManualScaleSettings {
    if !(0..=NODES_MAX).contains(&given.target_node_count) {
        let field = format!("{prefix}target_node_count");
        faults.invalid(field, format!("must be from 0 to {NODES_MAX}"));
    }
    let option = NodeDeallocationOption::try_from(given.node_deallocation_option);
    let option = option.unwrap_or_else(|_| {
        faults.invalid(
            format!("{prefix}node_deallocation_option"),
            "is not one of its values",
        );
        NodeDeallocationOption::Unspecified
    });
    let option = match option {
        NodeDeallocationOption::Unspecified => NodeDeallocationOption::Requeue,
        option => option,
    };
    ManualScaleSettings {
        node_deallocation_option: option as i32,
        ..given
    }
}

fn check_image(faults: &mut Faults, given: ImageReference) -> ImageReference {
    let field = "cluster.virtual_machine_configuration.image_reference";
    for (part, text, required) in [
        ("publisher", &given.publisher, true),
        ("offer", &given.offer, true),
        ("sku", &given.sku, true),
        ("version", &given.version, false),
    ] {
        if (required && text.is_empty()) || text.len() > TEXT_BYTES_MAX || text.contains(':') {
            let why = format!("must be given, without `:` and with at most {TEXT_BYTES_MAX} bytes");
            faults.invalid(format!("{field}.{part}"), why);
        }
    }
    let id = &given.virtual_machine_image_id;
    faults.text(&format!("{field}.virtual_machine_image_id"), id, false);
    let version = match given.version.is_empty() {
        true => VERSION_DEFAULT.to_owned(),
        false => given.version,
    };
    ImageReference { version, ..given }
}

/// Checks an administrator's account. What comes back has no password: nothing here has a use for it.
pub fn check_account(
    faults: &mut Faults,
    field: &str,
    given: UserAccountSettings,
) -> UserAccountSettings {
    let (key, password) = (&given.admin_user_ssh_public_key, &given.admin_user_password);
    faults.text(
        &format!("{field}.admin_user_name"),
        &given.admin_user_name,
        true,
    );
    job_spec::no_longer_than_a_text(faults, &format!("{field}.admin_user_ssh_public_key"), key);
    faults.text(&format!("{field}.admin_user_password"), password, false);
    if key.is_empty() && password.is_empty() {
        let why = "must be given, or admin_user_password";
        faults.invalid(format!("{field}.admin_user_ssh_public_key"), why);
    }
    UserAccountSettings {
        admin_user_password: String::new(),
        ..given
    }
}

fn check_setup(faults: &mut Faults, given: NodeSetup) -> NodeSetup {
    const AT: &str = "cluster.node_setup";
    if let Some(task) = &given.setup_task {
        check_task(faults, &format!("{AT}.setup_task"), task);
    }
    if let Some(mounts) = &given.mount_volumes {
        volumes::check_mounts(faults, &format!("{AT}.mount_volumes"), mounts);
    }
    let counters = given.performance_counters_settings.map(|given| {
        let at = format!("{AT}.performance_counters_settings.app_insights_reference");
        let reference = given.app_insights_reference.unwrap_or_default();
        faults.text(&format!("{at}.component"), &reference.component, true);
        // Its keys are not kept: nothing here has a use for them.
        PerformanceCountersSettings {
            app_insights_reference: Some(AppInsightsReference {
                component: reference.component,
                ..Default::default()
            }),
        }
    });
    NodeSetup {
        setup_task: given.setup_task,
        mount_volumes: given.mount_volumes,
        performance_counters_settings: counters,
    }
}

fn check_task(faults: &mut Faults, field: &str, given: &SetupTask) {
    job_spec::text(
        faults,
        &format!("{field}.command_line"),
        &given.command_line,
    );
    job_spec::absolute(
        faults,
        &format!("{field}.std_out_err_path_prefix"),
        &given.std_out_err_path_prefix,
    );
    let at = format!("{field}.environment_variables");
    job_spec::check_variables(faults, &at, &given.environment_variables);
    let variables = &given.environment_variables;
    volumes::check_secrets(
        faults,
        &format!("{field}.secrets"),
        &given.secrets,
        variables,
    );
}

/// The settings that are kept and have no effect here.
pub fn warnings(cluster: &Cluster) -> Vec<Warning> {
    let image = cluster.virtual_machine_configuration.as_ref();
    let image = image.and_then(|c| c.image_reference.as_ref());
    let counters = cluster.node_setup.as_ref();
    let counters = counters.and_then(|setup| setup.performance_counters_settings.as_ref());
    let kept = [
        (
            "vm_priority",
            cluster.vm_priority() == VmPriority::LowPriority,
            "your own machines are not taken away at any time",
        ),
        (
            "user_account_settings",
            cluster.user_account_settings.is_some(),
            "accounts on your machines are yours to make; a password is not even kept",
        ),
        (
            "subnet",
            !cluster.subnet.is_empty(),
            "your machines are in your network already",
        ),
        (
            "virtual_machine_configuration.image_reference.virtual_machine_image_id",
            image.is_some_and(|image| !image.virtual_machine_image_id.is_empty()),
            "nodes are matched by publisher, offer, sku and version",
        ),
        (
            "node_setup.performance_counters_settings",
            counters.is_some(),
            "there is no Application Insights here; its keys are not kept",
        ),
    ];
    fields::warnings(&kept)
}
