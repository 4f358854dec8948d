//! PURE. Which permission each call of the API will take, in the original's form: one table. Nothing is enforced by it yet.

/// The call, and the permission it takes; by call.
pub const PERMISSIONS: &[(&str, &str)] = &[
    ("batchai.v1.BundleService/GetBundle", "batchai/bundles/read"),
    (
        "batchai.v1.BundleService/UploadBundle",
        "batchai/bundles/write",
    ),
    (
        "batchai.v1.ClusterService/CreateCluster",
        "batchai/workspaces/clusters/write",
    ),
    (
        "batchai.v1.ClusterService/DeleteCluster",
        "batchai/workspaces/clusters/delete",
    ),
    (
        "batchai.v1.ClusterService/GetCluster",
        "batchai/workspaces/clusters/read",
    ),
    (
        "batchai.v1.ClusterService/ListClusterRemoteLoginInformation",
        "batchai/workspaces/clusters/listRemoteLoginInformation/action",
    ),
    (
        "batchai.v1.ClusterService/ListClusters",
        "batchai/workspaces/clusters/read",
    ),
    (
        "batchai.v1.ClusterService/ResizeCluster",
        "batchai/workspaces/clusters/write",
    ),
    (
        "batchai.v1.ClusterService/UpdateCluster",
        "batchai/workspaces/clusters/write",
    ),
    (
        "batchai.v1.ClusterService/WatchCluster",
        "batchai/workspaces/clusters/read",
    ),
    (
        "batchai.v1.ExperimentService/CreateExperiment",
        "batchai/workspaces/experiments/write",
    ),
    (
        "batchai.v1.ExperimentService/DeleteExperiment",
        "batchai/workspaces/experiments/delete",
    ),
    (
        "batchai.v1.ExperimentService/GetExperiment",
        "batchai/workspaces/experiments/read",
    ),
    (
        "batchai.v1.ExperimentService/ListExperiments",
        "batchai/workspaces/experiments/read",
    ),
    (
        "batchai.v1.ExperimentService/UpdateExperiment",
        "batchai/workspaces/experiments/write",
    ),
    (
        "batchai.v1.ExperimentService/WatchExperiment",
        "batchai/workspaces/experiments/read",
    ),
    (
        "batchai.v1.FileServerService/CreateFileServer",
        "batchai/workspaces/fileServers/write",
    ),
    (
        "batchai.v1.FileServerService/DeleteFileServer",
        "batchai/workspaces/fileServers/delete",
    ),
    (
        "batchai.v1.FileServerService/GetFileServer",
        "batchai/workspaces/fileServers/read",
    ),
    (
        "batchai.v1.FileServerService/ListFileServers",
        "batchai/workspaces/fileServers/read",
    ),
    (
        "batchai.v1.InformationService/ListOperations",
        "batchai/operations/read",
    ),
    (
        "batchai.v1.InformationService/ListUsages",
        "batchai/usages/read",
    ),
    (
        "batchai.v1.JobService/BatchCreateJobs",
        "batchai/workspaces/experiments/jobs/write",
    ),
    (
        "batchai.v1.JobService/CreateJob",
        "batchai/workspaces/experiments/jobs/write",
    ),
    (
        "batchai.v1.JobService/DeleteJob",
        "batchai/workspaces/experiments/jobs/delete",
    ),
    (
        "batchai.v1.JobService/GetJob",
        "batchai/workspaces/experiments/jobs/read",
    ),
    (
        "batchai.v1.JobService/ListJobFiles",
        "batchai/workspaces/experiments/jobs/read",
    ),
    (
        "batchai.v1.JobService/ListJobRemoteLoginInformation",
        "batchai/workspaces/experiments/jobs/listRemoteLoginInformation/action",
    ),
    (
        "batchai.v1.JobService/ListJobs",
        "batchai/workspaces/experiments/jobs/read",
    ),
    (
        "batchai.v1.JobService/StreamJobLogs",
        "batchai/workspaces/experiments/jobs/read",
    ),
    (
        "batchai.v1.JobService/TerminateJob",
        "batchai/workspaces/experiments/jobs/terminate/action",
    ),
    (
        "batchai.v1.JobService/UpdateJob",
        "batchai/workspaces/experiments/jobs/write",
    ),
    (
        "batchai.v1.JobService/WatchJob",
        "batchai/workspaces/experiments/jobs/read",
    ),
    ("batchai.v1.NodeService/GetNode", "batchai/nodes/read"),
    ("batchai.v1.NodeService/ListNodes", "batchai/nodes/read"),
    ("batchai.v1.NodeService/WatchNode", "batchai/nodes/read"),
    (
        "batchai.v1.ResourceGroupService/CreateResourceGroup",
        "batchai/resourceGroups/write",
    ),
    (
        "batchai.v1.ResourceGroupService/DeleteResourceGroup",
        "batchai/resourceGroups/delete",
    ),
    (
        "batchai.v1.ResourceGroupService/GetResourceGroup",
        "batchai/resourceGroups/read",
    ),
    (
        "batchai.v1.ResourceGroupService/ListResourceGroups",
        "batchai/resourceGroups/read",
    ),
    (
        "batchai.v1.ResourceGroupService/UpdateResourceGroup",
        "batchai/resourceGroups/write",
    ),
    (
        "batchai.v1.ResourceGroupService/WatchResourceGroup",
        "batchai/resourceGroups/read",
    ),
    (
        "batchai.v1.VmSizeService/CreateVmSizeAlias",
        "batchai/vmSizes/write",
    ),
    (
        "batchai.v1.VmSizeService/DeleteVmSizeAlias",
        "batchai/vmSizes/delete",
    ),
    (
        "batchai.v1.VmSizeService/GetVmSizeAlias",
        "batchai/vmSizes/read",
    ),
    (
        "batchai.v1.VmSizeService/ListVmSizeAliases",
        "batchai/vmSizes/read",
    ),
    (
        "batchai.v1.VmSizeService/ListVmSizes",
        "batchai/vmSizes/read",
    ),
    (
        "batchai.v1.VmSizeService/WatchVmSizeAlias",
        "batchai/vmSizes/read",
    ),
    (
        "batchai.v1.WorkspaceService/CreateWorkspace",
        "batchai/workspaces/write",
    ),
    (
        "batchai.v1.WorkspaceService/DeleteWorkspace",
        "batchai/workspaces/delete",
    ),
    (
        "batchai.v1.WorkspaceService/GetWorkspace",
        "batchai/workspaces/read",
    ),
    (
        "batchai.v1.WorkspaceService/ListWorkspaces",
        "batchai/workspaces/read",
    ),
    (
        "batchai.v1.WorkspaceService/UpdateWorkspace",
        "batchai/workspaces/write",
    ),
    (
        "batchai.v1.WorkspaceService/WatchWorkspace",
        "batchai/workspaces/read",
    ),
];

#[cfg(test)]
mod tests {
    use batchai_proto::reflect::pool;

    use super::*;

    #[test]
    fn every_call_has_a_permission() {
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
        let known: Vec<_> = PERMISSIONS
            .iter()
            .map(|(call, _)| (*call).to_owned())
            .collect();
        assert_eq!(known, calls);
    }
}
