//! PURE. Where things lie on a host, below the agent's root.

use std::collections::BTreeMap;
use std::path::Path;

use batchai_common::names::ids;
use batchai_proto::agent::v1::Assignment;
use batchai_proto::shared::SHARED_JOB_TEMP;
use batchai_proto::v1::Job;

use super::LaunchError;
use super::expand::expand;
use super::shared::Shared;

const OUTPUTS: &str = "outputs";

/// The paths of one job on one host.
#[derive(Clone, Debug, Default)]
pub struct Paths {
    pub mount_root: String,
    pub job_temp_dir: String,
    pub job_temp: String,
    pub job_mount_root: String,
    /// What the job's nodes share. It exists from launch on.
    pub shared: Shared,
    /// This host is the one that makes it.
    pub is_master: bool,
    pub hostfile: String,
    pub stdouterr: String,
    pub inputs: Vec<(String, String)>,
    pub outputs: Vec<(String, String)>,
}

impl Paths {
    pub fn of(job: &Job, assignment: &Assignment, root: &str) -> Result<Paths, LaunchError> {
        let below = match (&ids(&job.name)[..], assignment.set_up) {
            ([_, workspace, experiment, name], false) => format!("{workspace}/{experiment}/{name}"),
            // No workspace is called like that.
            ([_, workspace, cluster], true) => format!(".setup/{workspace}/{cluster}"),
            _ => return Err(LaunchError::Incomplete { what: "job name" }),
        };
        let temp = |root: &str| format!("{root}/jobs/{below}");
        let job_temp = temp(root);
        let mut paths = Paths {
            mount_root: format!("{root}/mounts"),
            job_temp_dir: format!("{root}/jobs"),
            job_mount_root: format!("{job_temp}/mounts"),
            shared: Shared::of(job, assignment, temp, root)?,
            hostfile: format!("{job_temp}/hostfile"),
            is_master: assignment.host_index == 0,
            job_temp,
            ..Paths::default()
        };
        paths.add_directories(job)?;
        if assignment.set_up {
            // Its files tell of which node they are; the original puts them there.
            let logs = paths.stdouterr.trim_end_matches("/stdouterr").to_owned();
            paths.stdouterr = logs;
        }
        Ok(paths)
    }

    /// Logs, inputs and outputs: prefix, the job's segment, suffix.
    fn add_directories(&mut self, job: &Job) -> Result<(), LaunchError> {
        let mut env: BTreeMap<_, _> = self.variables().into();
        if let Some(shared) = self.shared.path() {
            env.insert(SHARED_JOB_TEMP.into(), shared.clone());
        }
        let segment = &job.job_output_directory_path_segment;
        let prefix = absolute(
            "job.std_out_err_path_prefix",
            &job.std_out_err_path_prefix,
            &env,
        )?;
        self.stdouterr = format!("{prefix}/{segment}/stdouterr");
        for directory in &job.input_directories {
            let what = format!("input directory {}", directory.id);
            self.inputs
                .push((directory.id.clone(), expand(&what, &directory.path, &env)?));
        }
        for directory in &job.output_directories {
            let what = format!("output directory {}", directory.id);
            let prefix = absolute(&what, &directory.path_prefix, &env)?;
            let suffix = match directory.path_suffix.as_str() {
                "" => OUTPUTS,
                suffix => suffix,
            };
            self.outputs
                .push((directory.id.clone(), format!("{prefix}/{segment}/{suffix}")));
        }
        Ok(())
    }

    /// The variables that paths may begin with.
    pub fn variables(&self) -> [(String, String); 4] {
        [
            ("AZ_BATCHAI_MOUNT_ROOT".into(), self.mount_root.clone()),
            ("AZ_BATCHAI_JOB_TEMP_DIR".into(), self.job_temp_dir.clone()),
            ("AZ_BATCHAI_JOB_TEMP".into(), self.job_temp.clone()),
            (
                "AZ_BATCHAI_JOB_MOUNT_ROOT".into(),
                self.job_mount_root.clone(),
            ),
        ]
    }

    /// The directory of programs that come first for a job, and what is in it.
    pub fn programs(&self) -> String {
        format!("{}/.bin", self.job_temp)
    }

    /// By it processes start others on the job's other nodes.
    pub fn remote_shell(&self) -> String {
        format!("{}/ssh", self.programs())
    }

    /// The parts of directories in the mount root that are the job's own: up to its segment.
    pub fn own(&self, segment: &str) -> Vec<String> {
        let logs = std::iter::once(&self.stdouterr);
        let all = logs.chain(self.outputs.iter().map(|(_, path)| path));
        let here = all.filter(|path| Path::new(path).starts_with(&self.mount_root));
        let own = here.filter_map(|path| {
            let (prefix, _) = path.split_once(&format!("/{segment}"))?;
            Some(format!("{prefix}/{segment}"))
        });
        let mut own: Vec<_> = own.collect();
        own.sort();
        own.dedup();
        own
    }

    /// What must exist before the job begins.
    pub fn directories(&self) -> Vec<String> {
        let own = [&self.mount_root, &self.job_temp, &self.job_mount_root]
            .into_iter()
            .cloned();
        let outputs = self.outputs.iter().map(|(_, path)| path.clone());
        let all = own
            .chain(self.shared.path().cloned())
            .chain([self.stdouterr.clone()])
            .chain(outputs);
        // The others must not reach into a directory that the master may just be clearing; it makes the same ones.
        let shared = self.shared.path().filter(|_| !self.is_master);
        all.filter(|path| shared.is_none_or(|shared| !Path::new(path).starts_with(shared)))
            .collect()
    }
}

fn absolute(what: &str, text: &str, env: &BTreeMap<String, String>) -> Result<String, LaunchError> {
    let path = expand(what, text, env)?;
    match path.starts_with('/') {
        true => Ok(path.trim_end_matches('/').to_owned()),
        false => Err(LaunchError::NotAbsolute {
            what: what.to_owned(),
            path,
        }),
    }
}
