//! Experiments.

use batchai_common::names::Kind as Noun;
use batchai_proto::internal::v1::Delete;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::v1::experiment_service_server::ExperimentService;
use batchai_proto::v1::{
    CreateExperimentRequest, DeleteExperimentRequest, Experiment, GetExperimentRequest,
    ListExperimentsRequest, ListExperimentsResponse,
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::page::page;
use super::{Api, Faults, not_found, parse};

#[tonic::async_trait]
impl ExperimentService for Api {
    async fn create_experiment(
        &self,
        request: Request<CreateExperimentRequest>,
    ) -> Result<Response<Experiment>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        let once = faults.once(&request.request_id, request.validate_only, &request);
        let CreateExperimentRequest {
            parent,
            experiment_id,
            ..
        } = request;
        let name = faults.new_name(Noun::Experiment, &parent, "experiment_id", &experiment_id);
        let name = faults.finish(name)?;
        let experiment = Experiment {
            name: name.to_string(),
            uid: Uuid::new_v4().to_string(),
            ..Default::default()
        };
        let state = self
            .write_once(Kind::CreateExperiment(experiment), once)
            .await?;
        let experiment = state.experiments.get(name.as_str());
        let experiment = experiment.ok_or_else(|| not_found(Noun::Experiment, &name))?;
        Ok(Response::new(Experiment::clone(experiment)))
    }

    async fn get_experiment(
        &self,
        request: Request<GetExperimentRequest>,
    ) -> Result<Response<Experiment>, Status> {
        let name = parse(Noun::Experiment, &request.get_ref().name)?;
        let state = self.read().await?;
        let experiment = state.experiments.get(name.as_str());
        let experiment = experiment.ok_or_else(|| not_found(Noun::Experiment, &name))?;
        Ok(Response::new(Experiment::clone(experiment)))
    }

    async fn list_experiments(
        &self,
        request: Request<ListExperimentsRequest>,
    ) -> Result<Response<ListExperimentsResponse>, Status> {
        let request = request.into_inner();
        let parent = self.parent(Noun::Experiment, &request.parent)?;
        let state = self.read().await?;
        if !state.workspaces.contains_key(parent.as_str()) {
            return Err(not_found(Noun::Workspace, &parent).into());
        }
        let page_of = (request.page_size, request.page_token.as_str());
        let (experiments, next_page_token) = page(
            &state.experiments,
            Some(&parent),
            Noun::Experiment,
            page_of,
            |_, experiment| Experiment::clone(experiment),
        )?;
        Ok(Response::new(ListExperimentsResponse {
            experiments,
            next_page_token,
        }))
    }

    async fn delete_experiment(
        &self,
        request: Request<DeleteExperimentRequest>,
    ) -> Result<Response<()>, Status> {
        let DeleteExperimentRequest { name, etag } = request.into_inner();
        let name = parse(Noun::Experiment, &name)?.into();
        self.write(Kind::DeleteExperiment(Delete { name, etag }))
            .await?;
        Ok(Response::new(()))
    }
}
