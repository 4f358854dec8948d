//! Jobs, their changes and their logs.

use batchai_common::error::ApiError;
use batchai_common::names::{Kind as Noun, Name};
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{CreateJobs, Labels, TerminateJob, Update};
use batchai_proto::v1::job_service_server::JobService;
use batchai_proto::v1::{
    BatchCreateJobsRequest, BatchCreateJobsResponse, CreateJobRequest, DeleteJobRequest,
    GetJobRequest, Job, ListJobFilesRequest, ListJobFilesResponse,
    ListJobRemoteLoginInformationRequest, ListJobRemoteLoginInformationResponse, ListJobsRequest,
    ListJobsResponse, MountVolumes, StreamJobLogsRequest, StreamJobLogsResponse,
    TerminateJobRequest, UpdateJobRequest, WatchJobRequest, WatchJobResponse,
};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::access::demand;
use super::faults::Faults;
use super::views::Resource as _;
use super::{
    Api, Replies, draining, fields, job_spec, not_found, parse, remote_login, seal, volumes,
};
use crate::access::{RUN_JOBS, SET_UP};
use crate::call::caller;
use crate::state::file_servers;

/// What a watcher or reader has not taken yet; one that is slow waits for itself only.
const OUTBOX_MAX: usize = 2;
/// Jobs of one batch, and their size: the reply must fit a message too.
const BATCH_MAX: usize = 1000;
const BATCH_BYTES_MAX: usize = 2 << 20;

#[tonic::async_trait]
impl JobService for Api {
    async fn create_job(
        &self,
        request: Request<CreateJobRequest>,
    ) -> Result<Response<Job>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        let shown = seal::without_secrets(&request);
        let once = faults.once(&request.request_id, request.validate_only, &shown);
        let name = faults.new_name(Noun::Job, &request.parent, "job_id", &request.job_id);
        let job = job_spec::check(&mut faults, request.job.unwrap_or_default());
        let field = "job.mount_volumes";
        self.check_servers(&mut faults, field, job.mount_volumes.as_ref());
        let name = faults.finish(name)?;
        let mut job = Job {
            name: name.to_string(),
            uid: Uuid::new_v4().to_string(),
            ..job
        };
        let one = std::slice::from_mut(&mut job);
        self.use_references(one).await?;
        self.seal_jobs(one, &once).await?;
        let state = self.write_once(Kind::CreateJob(job), once).await?;
        self.show(&state, name.as_str())
    }

    async fn batch_create_jobs(
        &self,
        request: Request<BatchCreateJobsRequest>,
    ) -> Result<Response<BatchCreateJobsResponse>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        let shown = BatchCreateJobsRequest {
            requests: request.requests.iter().map(seal::without_secrets).collect(),
            ..request.clone()
        };
        let once = faults.once(&request.request_id, request.validate_only, &shown);
        let size = request.encoded_len();
        if !(1..=BATCH_MAX).contains(&request.requests.len()) || size > BATCH_BYTES_MAX {
            let why = format!("must be 1 to {BATCH_MAX}, with at most {BATCH_BYTES_MAX} bytes");
            faults.invalid("requests", why);
            return Err(faults.refuse().into());
        }
        let parent = faults.name("parent", Noun::Experiment, &request.parent);
        let requests = request.requests.into_iter().take(BATCH_MAX).enumerate();
        let mut jobs: Vec<_> = requests
            .map(|(i, one)| {
                faults.within(&format!("requests[{i}]."), |f| {
                    check_one_of_batch(f, &request.parent, one)
                })
            })
            .collect();
        for (i, job) in jobs.iter().enumerate() {
            let field = format!("requests[{i}].job.mount_volumes");
            self.check_servers(&mut faults, &field, job.mount_volumes.as_ref());
        }
        faults.finish(parent)?;
        self.use_references(&jobs).await?;
        self.seal_jobs(&mut jobs, &once).await?;
        let names: Vec<_> = jobs.iter().map(|job| job.name.clone()).collect();
        let state = self
            .write_once(Kind::CreateJobs(CreateJobs { jobs }), once)
            .await?;
        let heard = self.contacts.heard_lately();
        let created = names.iter();
        let jobs = created.filter_map(|name| Job::view(&state, &heard, name));
        let jobs = jobs.collect();
        Ok(Response::new(BatchCreateJobsResponse { jobs }))
    }

    async fn get_job(&self, request: Request<GetJobRequest>) -> Result<Response<Job>, Status> {
        self.get(&request.get_ref().name).await
    }

    async fn list_jobs(
        &self,
        request: Request<ListJobsRequest>,
    ) -> Result<Response<ListJobsResponse>, Status> {
        let request = request.into_inner();
        let page = (request.page_size, request.page_token.as_str());
        let (jobs, next_page_token) = self.list(&request.parent, page, &request.filter).await?;
        Ok(Response::new(ListJobsResponse {
            jobs,
            next_page_token,
        }))
    }

    async fn update_job(
        &self,
        request: Request<UpdateJobRequest>,
    ) -> Result<Response<Job>, Status> {
        let request = request.into_inner();
        let given = request.job.unwrap_or_default();
        let mut faults = Faults::default();
        let name = faults.name("job.name", Noun::Job, &given.name);
        let mask = request.update_mask;
        let changes = fields::masked(&mut faults, ("job", "Job"), &given, mask, &["labels"]);
        faults.labels("job.labels", &given.labels);
        let name: String = faults.finish(name)?.into();
        let labels = (!changes.is_empty()).then_some(Labels {
            labels: given.labels,
        });
        let update = Update {
            name: name.clone(),
            etag: given.etag,
            labels,
            ..Update::default()
        };
        self.show(&*self.update(update).await?, &name)
    }

    async fn terminate_job(
        &self,
        request: Request<TerminateJobRequest>,
    ) -> Result<Response<Job>, Status> {
        let name: String = parse(Noun::Job, &request.get_ref().name)?.into();
        let terminate = TerminateJob {
            name: name.clone(),
            ..Default::default()
        };
        let state = self.write(Kind::TerminateJob(terminate)).await?;
        self.show(&state, &name)
    }

    async fn delete_job(&self, request: Request<DeleteJobRequest>) -> Result<Response<()>, Status> {
        let DeleteJobRequest { name, etag } = request.into_inner();
        self.delete(Noun::Job, &name, etag, false).await?;
        Ok(Response::new(()))
    }

    type WatchJobStream = Replies<WatchJobResponse>;

    async fn watch_job(
        &self,
        request: Request<WatchJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let WatchJobRequest { name, revision } = request.into_inner();
        let reply = |revision, jobs, deleted| WatchJobResponse {
            revision,
            jobs,
            deleted,
        };
        self.watch(&name, revision, reply).await
    }

    async fn list_job_files(
        &self,
        request: Request<ListJobFilesRequest>,
    ) -> Result<Response<ListJobFilesResponse>, Status> {
        self.replica.must_lead()?;
        Ok(Response::new(self.list_files(request.into_inner()).await?))
    }

    type StreamJobLogsStream = Replies<StreamJobLogsResponse>;

    async fn stream_job_logs(
        &self,
        request: Request<StreamJobLogsRequest>,
    ) -> Result<Response<Self::StreamJobLogsStream>, Status> {
        let request = request.into_inner();
        let (outbox, replies) = mpsc::channel(OUTBOX_MAX);
        let api = self.clone();
        tokio::spawn(async move {
            let end = outbox.clone();
            tokio::select! {
                () = api.stream_file(request, outbox) => {}
                () = api.shutdown.cancelled() => {
                    // The reader may be gone or slow; it sees the stream end in any case.
                    let _ = end.try_send(Err(draining().into()));
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(replies))))
    }

    async fn list_job_remote_login_information(
        &self,
        request: Request<ListJobRemoteLoginInformationRequest>,
    ) -> Result<Response<ListJobRemoteLoginInformationResponse>, Status> {
        let request = request.into_inner();
        let name = parse(Noun::Job, &request.name)?;
        let state = self.read().await?;
        let job = state.jobs.get(name.as_str());
        let job = job.ok_or_else(|| not_found(Noun::Job, &name))?;
        let attempt = job.attempt.as_ref().and_then(|id| state.attempts.get(id));
        let nodes = attempt.iter().flat_map(|attempt| &attempt.nodes);
        let nodes = nodes.map(|n| n.node.clone()).collect();
        let page = (request.page_size, request.page_token.as_str());
        let (remote_login_information, next_page_token) =
            remote_login::page(&state, name.as_str(), nodes, page)?;
        Ok(Response::new(ListJobRemoteLoginInformationResponse {
            remote_login_information,
            next_page_token,
        }))
    }
}

impl Api {
    /// Beside what is wrong with a request in itself: which of the file servers that it mounts cannot be, to who may know of them. Where
    /// that is all, the request goes on, and is refused for the first of them when it is applied.
    pub(super) fn check_servers(
        &self,
        faults: &mut Faults,
        field: &str,
        volumes: Option<&MountVolumes>,
    ) {
        if !faults.any() {
            return;
        }
        let caller = caller();
        let state = self.replica.published().borrow().state.clone();
        let servers = volumes.into_iter().flat_map(|v| &v.file_servers);
        for (i, mount) in servers.enumerate().take(volumes::LIST_MAX) {
            let name = &mount.file_server;
            let known = Name::parse(Noun::FileServer, name).is_ok()
                && demand(&caller, RUN_JOBS, name).is_ok();
            if let Err(why) = file_servers::check_one(&state, name)
                && known
            {
                let field = format!("{field}.file_servers[{i}].file_server");
                faults.invalid(field, why.to_string());
            }
        }
    }

    /// What new jobs name elsewhere must be the caller's to use, and be there.
    async fn use_references(&self, jobs: &[Job]) -> Result<(), ApiError> {
        let caller = caller();
        let state = self.replica.published().borrow().state.clone();
        for job in jobs {
            demand(&caller, RUN_JOBS, &job.cluster)?;
            // It is run as root, on every node of the job.
            if volumes::have_commands(job.mount_volumes.as_ref()) {
                demand(&caller, SET_UP, &job.cluster)?;
            }
            for server in file_servers::named(&state, job.mount_volumes.as_ref()) {
                demand(&caller, RUN_JOBS, server)?;
            }
        }
        self.use_bundles(jobs).await
    }
}

fn check_one_of_batch(faults: &mut Faults, parent: &str, given: CreateJobRequest) -> Job {
    if !given.parent.is_empty() && given.parent != parent {
        faults.invalid("parent", "must be left out, or be the parent of the batch");
    }
    if !given.request_id.is_empty() || given.validate_only {
        faults.invalid("request_id", "must be left out; the batch has its own");
    }
    let name = faults.child_name(Noun::Job, parent, "job_id", &given.job_id);
    let job = job_spec::check(faults, given.job.unwrap_or_default());
    Job {
        name,
        uid: Uuid::new_v4().to_string(),
        ..job
    }
}
