//! PURE. Which permission each call of the API takes, in the original's form, and what of its request says where: one table.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use batchai_proto::reflect::pool;
use prost_reflect::{MessageDescriptor, MethodDescriptor};

/// Where a call takes its permission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the part of the ensemble that a text of the request names: the numbers of the fields that lead to it.
    Field(Vec<u32>),
    /// In all of the ensemble.
    Ensemble,
    /// In any part of it: what is asked for is no part's, or the call itself looks closer.
    Anywhere,
}

/// How a request comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// It is one message.
    Message,
    /// It is a stream, whose first message says what it is about: it has a `start`.
    Opening,
    /// It is a stream of which nothing is looked at.
    Stream,
}

/// What a call takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub permission: &'static str,
    pub place: Place,
    pub request: Form,
    /// Texts of the request that say what it is about, for the record.
    pub subject: Vec<Vec<u32>>,
    /// Texts of it that are a command to run somewhere, for the record.
    pub command: Option<Vec<u32>>,
}

/// The call; the permission; and where: a path in the request, nothing for the ensemble, a star for anywhere. By call.
#[rustfmt::skip]
pub const RULES: &[(&str, &str, &str)] = &[
    ("batchai.v1.AccessService/CreateRoleBinding", "batchai/roleBindings/write", "role_binding.scope"),
    ("batchai.v1.AccessService/CreateToken", "batchai/tokens/write", ""),
    ("batchai.v1.AccessService/DeleteRoleBinding", "batchai/roleBindings/delete", "*"),
    ("batchai.v1.AccessService/DeleteToken", "batchai/tokens/delete", ""),
    ("batchai.v1.AccessService/GetRoleBinding", "batchai/roleBindings/read", "*"),
    ("batchai.v1.AccessService/GetToken", "batchai/tokens/read", ""),
    ("batchai.v1.AccessService/IssueCertificate", "batchai/certificates/write", ""),
    ("batchai.v1.AccessService/ListRoleBindings", "batchai/roleBindings/read", "*"),
    ("batchai.v1.AccessService/ListTokens", "batchai/tokens/read", ""),
    ("batchai.v1.AccessService/RevokeCertificates", "batchai/certificates/delete", ""),
    ("batchai.v1.AccessService/TailAuditLog", "batchai/audit/read", ""),
    ("batchai.v1.AdminService/AcceptRestore", "batchai/restores/accept/action", ""),
    ("batchai.v1.AdminService/AddLearner", "batchai/replicas/write", ""),
    ("batchai.v1.AdminService/AdoptAttempt", "batchai/strayAttempts/adopt/action", ""),
    ("batchai.v1.AdminService/DiscardAttempt", "batchai/strayAttempts/delete", ""),
    ("batchai.v1.AdminService/GetClusterStatus", "batchai/replicas/read", ""),
    ("batchai.v1.AdminService/ListStrayAttempts", "batchai/strayAttempts/read", ""),
    ("batchai.v1.AdminService/PromoteReplica", "batchai/replicas/write", ""),
    ("batchai.v1.AdminService/RemoveReplica", "batchai/replicas/delete", ""),
    ("batchai.v1.AdminService/SaveSnapshot", "batchai/backups/save/action", ""),
    ("batchai.v1.AdminService/TakeSnapshot", "batchai/replicas/takeSnapshot/action", ""),
    ("batchai.v1.AdminService/TransferLeadership", "batchai/replicas/transferLeadership/action", ""),
    ("batchai.v1.BundleService/GetBundle", "batchai/bundles/read", "*"),
    ("batchai.v1.BundleService/UploadBundle", "batchai/bundles/write", "*"),
    ("batchai.v1.ClusterService/CreateCluster", "batchai/workspaces/clusters/write", "parent"),
    ("batchai.v1.ClusterService/DeleteCluster", "batchai/workspaces/clusters/delete", "name"),
    ("batchai.v1.ClusterService/GetCluster", "batchai/workspaces/clusters/read", "name"),
    ("batchai.v1.ClusterService/ListClusterRemoteLoginInformation", "batchai/workspaces/clusters/listRemoteLoginInformation/action", "name"),
    ("batchai.v1.ClusterService/ListClusters", "batchai/workspaces/clusters/read", "parent"),
    ("batchai.v1.ClusterService/ResizeCluster", "batchai/workspaces/clusters/write", "name"),
    ("batchai.v1.ClusterService/UpdateCluster", "batchai/workspaces/clusters/write", "cluster.name"),
    ("batchai.v1.ClusterService/WatchCluster", "batchai/workspaces/clusters/read", "name"),
    ("batchai.v1.ExecService/ExecJob", "batchai/workspaces/experiments/jobs/exec/action", "start.name"),
    ("batchai.v1.ExecService/ExecNode", "batchai/nodes/exec/action", ""),
    ("batchai.v1.ExperimentService/CreateExperiment", "batchai/workspaces/experiments/write", "parent"),
    ("batchai.v1.ExperimentService/DeleteExperiment", "batchai/workspaces/experiments/delete", "name"),
    ("batchai.v1.ExperimentService/GetExperiment", "batchai/workspaces/experiments/read", "name"),
    ("batchai.v1.ExperimentService/ListExperiments", "batchai/workspaces/experiments/read", "parent"),
    ("batchai.v1.ExperimentService/UpdateExperiment", "batchai/workspaces/experiments/write", "experiment.name"),
    ("batchai.v1.ExperimentService/WatchExperiment", "batchai/workspaces/experiments/read", "name"),
    ("batchai.v1.FileServerService/CreateFileServer", "batchai/workspaces/fileServers/write", "parent"),
    ("batchai.v1.FileServerService/DeleteFileServer", "batchai/workspaces/fileServers/delete", "name"),
    ("batchai.v1.FileServerService/GetFileServer", "batchai/workspaces/fileServers/read", "name"),
    ("batchai.v1.FileServerService/ListFileServerFiles", "batchai/workspaces/fileServers/read", "name"),
    ("batchai.v1.FileServerService/ListFileServers", "batchai/workspaces/fileServers/read", "parent"),
    ("batchai.v1.FileServerService/ReadFileServerFile", "batchai/workspaces/fileServers/read", "name"),
    ("batchai.v1.FileServerService/WriteFileServerFile", "batchai/workspaces/fileServers/files/write", "start.name"),
    ("batchai.v1.InformationService/ListOperations", "batchai/operations/read", "*"),
    ("batchai.v1.InformationService/ListUsages", "batchai/usages/read", "*"),
    ("batchai.v1.JobService/BatchCreateJobs", "batchai/workspaces/experiments/jobs/write", "parent"),
    ("batchai.v1.JobService/CreateJob", "batchai/workspaces/experiments/jobs/write", "parent"),
    ("batchai.v1.JobService/DeleteJob", "batchai/workspaces/experiments/jobs/delete", "name"),
    ("batchai.v1.JobService/GetJob", "batchai/workspaces/experiments/jobs/read", "name"),
    ("batchai.v1.JobService/ListJobFiles", "batchai/workspaces/experiments/jobs/read", "name"),
    ("batchai.v1.JobService/ListJobRemoteLoginInformation", "batchai/workspaces/experiments/jobs/listRemoteLoginInformation/action", "name"),
    ("batchai.v1.JobService/ListJobs", "batchai/workspaces/experiments/jobs/read", "parent"),
    ("batchai.v1.JobService/StreamJobLogs", "batchai/workspaces/experiments/jobs/read", "name"),
    ("batchai.v1.JobService/TerminateJob", "batchai/workspaces/experiments/jobs/terminate/action", "name"),
    ("batchai.v1.JobService/UpdateJob", "batchai/workspaces/experiments/jobs/write", "job.name"),
    ("batchai.v1.JobService/WatchJob", "batchai/workspaces/experiments/jobs/read", "name"),
    ("batchai.v1.NodeService/ConfirmNodeLost", "batchai/nodes/confirmLost/action", ""),
    ("batchai.v1.NodeService/ExpelNode", "batchai/nodes/expel/action", ""),
    ("batchai.v1.NodeService/GetNode", "batchai/nodes/read", ""),
    ("batchai.v1.NodeService/ListNodes", "batchai/nodes/read", ""),
    ("batchai.v1.NodeService/WatchNode", "batchai/nodes/read", ""),
    ("batchai.v1.ResourceGroupService/CreateResourceGroup", "batchai/resourceGroups/write", ""),
    ("batchai.v1.ResourceGroupService/DeleteResourceGroup", "batchai/resourceGroups/delete", "name"),
    ("batchai.v1.ResourceGroupService/GetResourceGroup", "batchai/resourceGroups/read", "name"),
    ("batchai.v1.ResourceGroupService/ListResourceGroups", "batchai/resourceGroups/read", ""),
    ("batchai.v1.ResourceGroupService/UpdateResourceGroup", "batchai/resourceGroups/write", "resource_group.name"),
    ("batchai.v1.ResourceGroupService/WatchResourceGroup", "batchai/resourceGroups/read", "name"),
    ("batchai.v1.StorageAliasService/CreateStorageAlias", "batchai/storageAliases/write", ""),
    ("batchai.v1.StorageAliasService/DeleteStorageAlias", "batchai/storageAliases/delete", ""),
    ("batchai.v1.StorageAliasService/GetStorageAlias", "batchai/storageAliases/read", "*"),
    ("batchai.v1.StorageAliasService/ListStorageAliases", "batchai/storageAliases/read", "*"),
    ("batchai.v1.StorageAliasService/WatchStorageAlias", "batchai/storageAliases/read", "*"),
    ("batchai.v1.VmSizeService/CreateVmSizeAlias", "batchai/vmSizes/write", ""),
    ("batchai.v1.VmSizeService/DeleteVmSizeAlias", "batchai/vmSizes/delete", ""),
    ("batchai.v1.VmSizeService/GetVmSizeAlias", "batchai/vmSizes/read", "*"),
    ("batchai.v1.VmSizeService/ListVmSizeAliases", "batchai/vmSizes/read", "*"),
    ("batchai.v1.VmSizeService/ListVmSizes", "batchai/vmSizes/read", "*"),
    ("batchai.v1.VmSizeService/WatchVmSizeAlias", "batchai/vmSizes/read", "*"),
    ("batchai.v1.WorkspaceService/CreateWorkspace", "batchai/workspaces/write", "parent"),
    ("batchai.v1.WorkspaceService/DeleteWorkspace", "batchai/workspaces/delete", "name"),
    ("batchai.v1.WorkspaceService/GetWorkspace", "batchai/workspaces/read", "name"),
    ("batchai.v1.WorkspaceService/ListWorkspaces", "batchai/workspaces/read", "parent"),
    ("batchai.v1.WorkspaceService/RotateWorkspaceKey", "batchai/workspaces/rotateKey/action", "name"),
    ("batchai.v1.WorkspaceService/UpdateWorkspace", "batchai/workspaces/write", "workspace.name"),
    ("batchai.v1.WorkspaceService/WatchWorkspace", "batchai/workspaces/read", "name"),
];

/// The same with the fields looked up, once.
static TABLE: LazyLock<BTreeMap<String, Rule>> = LazyLock::new(|| {
    let rule = |(call, permission, place): &(&str, &'static str, &str)| {
        let place = match *place {
            "" => Place::Ensemble,
            "*" => Place::Anywhere,
            path => Place::Field(numbers(call, path)?),
        };
        let method = method(call)?;
        let request = form(&method);
        let rule = Rule {
            permission,
            subject: match request {
                Form::Opening => {
                    let paths = ["start.name", "start.node", "start.path"];
                    paths
                        .iter()
                        .filter_map(|path| numbers(call, path))
                        .collect()
                }
                Form::Message | Form::Stream => subject(&method.input(), &place),
            },
            place,
            request,
            command: numbers(call, "start.command.arguments"),
        };
        Some((format!("/{call}"), rule))
    };
    RULES.iter().filter_map(rule).collect()
});

/// The rule of a call, by its path: `/package.Service/Method`.
pub fn rule(path: &str) -> Option<&'static Rule> {
    TABLE.get(path)
}

fn method(call: &str) -> Option<MethodDescriptor> {
    let (service, method) = call.split_once('/')?;
    let service = pool().get_service_by_name(service)?;
    service.methods().find(|known| known.name() == method)
}

fn form(method: &MethodDescriptor) -> Form {
    let opens = method.input().get_field_by_name("start").is_some();
    match (method.is_client_streaming(), opens) {
        (false, _) => Form::Message,
        (true, true) => Form::Opening,
        (true, false) => Form::Stream,
    }
}

/// Where it happens, the name or the id of what, and whose.
fn subject(input: &MessageDescriptor, place: &Place) -> Vec<Vec<u32>> {
    let mut subject = match place {
        Place::Field(path) => vec![path.clone()],
        Place::Ensemble | Place::Anywhere => Vec::new(),
    };
    for field in input.fields() {
        let telling = ["name", "member"].contains(&field.name())
            || (field.name().ends_with("_id") && field.name() != "request_id");
        if telling && !subject.contains(&vec![field.number()]) {
            subject.push(vec![field.number()]);
        }
    }
    subject
}

/// The numbers of the fields that a path in a call's request names.
fn numbers(call: &str, path: &str) -> Option<Vec<u32>> {
    let (mut message, mut numbers) = (Some(method(call)?.input()), Vec::new());
    for name in path.split('.') {
        let field = message?.get_field_by_name(name)?;
        numbers.push(field.number());
        message = field.kind().as_message().cloned();
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_has_a_rule_that_leads_to_a_text() {
        let services = pool()
            .services()
            .filter(|s| s.package_name() == "batchai.v1");
        let calls = services.flat_map(|service| {
            let name = service.full_name().to_owned();
            let methods: Vec<_> = service.methods().map(|m| m.name().to_owned()).collect();
            methods
                .into_iter()
                .map(move |method| format!("{name}/{method}"))
        });
        let mut calls: Vec<_> = calls.collect();
        calls.sort();
        let known: Vec<_> = RULES.iter().map(|(call, ..)| (*call).to_owned()).collect();
        assert_eq!(known, calls);
        for call in calls {
            assert!(rule(&format!("/{call}")).is_some(), "{call}");
        }
        assert_eq!(rule("/batchai.v1.JobService/None"), None);
        // What runs or is written somewhere is judged and recorded by its first message; nothing else has a command.
        for (path, rule) in TABLE.iter() {
            let execs = path.contains("/Exec") && path.contains("ExecService/");
            let opens = rule.request == Form::Opening;
            let writes = path.ends_with("/WriteFileServerFile");
            assert!(opens == (execs || writes), "{path}");
            assert_eq!(rule.command.is_some(), execs, "{path}");
            assert!(!opens || rule.subject.len() == 2, "{path}");
        }
    }
}
