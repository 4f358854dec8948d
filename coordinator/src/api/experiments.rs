//! Experiments.

use batchai_common::names::Kind as Noun;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Labels, Update};
use batchai_proto::v1::experiment_service_server::ExperimentService;
use batchai_proto::v1::{
    CreateExperimentRequest, DeleteExperimentRequest, Experiment, GetExperimentRequest,
    ListExperimentsRequest, ListExperimentsResponse, UpdateExperimentRequest,
    WatchExperimentRequest, WatchExperimentResponse,
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::faults::Faults;
use super::{Api, Replies, fields};

#[tonic::async_trait]
impl ExperimentService for Api {
    async fn create_experiment(
        &self,
        request: Request<CreateExperimentRequest>,
    ) -> Result<Response<Experiment>, Status> {
        let request = request.into_inner();
        let mut faults = Faults::default();
        let once = faults.once(&request.request_id, request.validate_only, &request);
        let given = request.experiment.unwrap_or_default();
        let name = faults.new_name(
            Noun::Experiment,
            &request.parent,
            "experiment_id",
            &request.experiment_id,
        );
        fields::check_output_only(&mut faults, "experiment", "Experiment", &given);
        faults.labels("experiment.labels", &given.labels);
        let name = faults.finish(name)?;
        let experiment = Experiment {
            name: name.to_string(),
            uid: Uuid::new_v4().to_string(),
            labels: given.labels,
            ..Default::default()
        };
        let create = Kind::CreateExperiment(experiment);
        let state = self.write_once(create, once).await?;
        self.show(&state, name.as_str())
    }

    async fn get_experiment(
        &self,
        request: Request<GetExperimentRequest>,
    ) -> Result<Response<Experiment>, Status> {
        self.get(&request.get_ref().name).await
    }

    async fn list_experiments(
        &self,
        request: Request<ListExperimentsRequest>,
    ) -> Result<Response<ListExperimentsResponse>, Status> {
        let request = request.into_inner();
        let page = (request.page_size, request.page_token.as_str());
        let (experiments, next_page_token) =
            self.list(&request.parent, page, &request.filter).await?;
        Ok(Response::new(ListExperimentsResponse {
            experiments,
            next_page_token,
        }))
    }

    async fn update_experiment(
        &self,
        request: Request<UpdateExperimentRequest>,
    ) -> Result<Response<Experiment>, Status> {
        let request = request.into_inner();
        let given = request.experiment.unwrap_or_default();
        let mut faults = Faults::default();
        let name = faults.name("experiment.name", Noun::Experiment, &given.name);
        let about = ("experiment", "Experiment");
        let changes = fields::masked(&mut faults, about, &given, request.update_mask, &["labels"]);
        faults.labels("experiment.labels", &given.labels);
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

    async fn delete_experiment(
        &self,
        request: Request<DeleteExperimentRequest>,
    ) -> Result<Response<()>, Status> {
        let DeleteExperimentRequest { name, etag, force } = request.into_inner();
        self.delete(Noun::Experiment, &name, etag, force).await?;
        Ok(Response::new(()))
    }

    type WatchExperimentStream = Replies<WatchExperimentResponse>;

    async fn watch_experiment(
        &self,
        request: Request<WatchExperimentRequest>,
    ) -> Result<Response<Self::WatchExperimentStream>, Status> {
        let WatchExperimentRequest { name, revision } = request.into_inner();
        let reply = |revision, experiments, deleted| WatchExperimentResponse {
            revision,
            experiments,
            deleted,
        };
        self.watch(&name, revision, reply).await
    }
}
