//! Users: they submit, terminate, change and delete jobs, and send a request again when they do not know what became of it.

use batchai_coordinator::replica::core::Proposed;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{Delete, Labels, RequestKey, TerminateJob, Update};
use batchai_proto::v1;

use super::replicas::Reading;
use super::{Asked, Sim};

pub const GROUP: &str = "resourceGroups/g";
pub const WORKSPACE: &str = "resourceGroups/g/workspaces/w";
pub const EXPERIMENT: &str = "resourceGroups/g/workspaces/w/experiments/e";
pub const CLUSTER: &str = "resourceGroups/g/workspaces/w/clusters/c";
/// Jobs that are kept, ended ones included.
const JOBS_KEPT: usize = 16;
/// Jobs that wait at once: users wait, too.
const OPEN_JOBS_MAX: usize = 12;

/// One user, who does one thing at a time.
pub struct Client {
    number: usize,
    made: usize,
    /// What he wants done, by which request, and whether it was sent and not answered.
    wants: Option<(Kind, RequestKey)>,
    sent: bool,
    /// Jobs that were acknowledged.
    pub acknowledged: Vec<String>,
}

impl Client {
    pub fn new(number: usize) -> Client {
        Client {
            number,
            made: 0,
            wants: None,
            sent: false,
            acknowledged: Vec::new(),
        }
    }

    pub fn is_busy(&self) -> bool {
        self.wants.is_some()
    }

    fn key(&mut self) -> RequestKey {
        self.made += 1;
        RequestKey {
            caller: format!("users/u{}", self.number),
            id: self.made.to_string(),
            digest: vec![self.number as u8],
        }
    }
}

impl Sim {
    pub(super) fn step_clients(&mut self) {
        for i in 0..self.clients.len() {
            if self.clients[i].wants.is_none() && !self.healed && self.random.f64() < 0.2 {
                self.clients[i].wants = self.wish(i);
            }
            let idle = !self.clients.iter().any(Client::is_busy);
            if self.healed && idle {
                self.clients[i].wants = self.last(i);
            }
            if self.clients[i].sent || self.clients[i].wants.is_none() {
                continue;
            }
            let Some(leader) = self.find_leader() else {
                continue;
            };
            let Some((kind, key)) = self.clients[i].wants.clone() else {
                continue;
            };
            self.clients[i].sent = self.propose(leader, kind, Some(key), Asked::Client(i));
        }
        self.read_somewhere();
    }

    /// At the end the cluster has all nodes again, so that every job fits; what others still want of it comes before.
    fn last(&mut self, i: usize) -> Option<(Kind, RequestKey)> {
        let state = self.latest()?.clone();
        let kind = self.last_wish(&state);
        let kind = kind.or_else(|| {
            let grow = !std::mem::replace(&mut self.grown, true);
            grow.then(|| resize(self.options.agents))
        })?;
        Some((kind, self.clients[i].key()))
    }

    /// Asks any replica for a State that has everything that was acknowledged until now.
    fn read_somewhere(&mut self) {
        let Some(id) = self.random.choice(self.ids()) else {
            return;
        };
        if !self.is_up(id) || self.random.f64() > 0.1 {
            return;
        }
        self.tickets += 1;
        let (ticket, least, step) = (self.tickets, self.checks.acknowledged, self.step);
        if self.core(id).read(ticket) {
            let reading = Reading {
                least,
                since: step,
                user: None,
                lease: false,
            };
            self.replica(id).reading.insert(ticket, reading);
        }
    }

    /// The first user wants this.
    pub(super) fn wish_for(&mut self, kind: Kind) {
        let client = &mut self.clients[0];
        client.wants = Some((kind, client.key()));
    }

    /// What a user wants next.
    fn wish(&mut self, i: usize) -> Option<(Kind, RequestKey)> {
        let leader = self.find_leader()?;
        let state = self.core(leader).state().clone();
        let missing = [
            (GROUP, Kind::CreateResourceGroup(named(GROUP))),
            (WORKSPACE, Kind::CreateWorkspace(named(WORKSPACE))),
            (EXPERIMENT, Kind::CreateExperiment(named(EXPERIMENT))),
            (
                CLUSTER,
                Kind::CreateCluster(cluster(self.options.agents as i32)),
            ),
        ];
        let exists = |name: &str| {
            state.contains(batchai_common::names::Kind::of(name).expect("a name"), name)
        };
        let missing = missing.into_iter().find(|(name, _)| !exists(name));
        let key = self.clients[i].key();
        if let Some((_, create)) = missing {
            return Some((create, key));
        }
        let open = state.jobs.values().filter(|job| !job.ended()).count();
        // Nobody keeps everything: a large State only makes every look at it slow.
        let over = state.jobs.values().find(|job| job.ended());
        if let Some(over) = over.filter(|_| state.jobs.len() > JOBS_KEPT) {
            let name = over.spec.name.clone();
            let delete = Delete {
                name,
                ..Default::default()
            };
            return Some((Kind::Delete(delete), key));
        }
        let jobs: Vec<_> = state.jobs.keys().map(|name| name.to_string()).collect();
        let any = |random: &mut fastrand::Rng| random.choice(&jobs).cloned();
        let kind = match self.random.u32(..20) {
            0..=9 if open < OPEN_JOBS_MAX => {
                let name = format!("{EXPERIMENT}/jobs/u{i}-{}", self.clients[i].made);
                Kind::CreateJob(v1::Job {
                    uid: name.clone(),
                    name,
                    cluster: self.any_cluster(&state).into(),
                    mount_volumes: self.volumes(&state),
                    node_count: self.random.i32(1..=self.options.agents as i32),
                    custom_toolkit_settings: Some(v1::CustomToolkitSettings::default()),
                    // Most are to run again.
                    on_node_loss: [0, 0, 0, 0, 1, 1, 2, 3][self.random.usize(..8)],
                    constraints: Some(v1::JobConstraints {
                        max_wall_clock_time: None,
                        max_retries: [0, 0, 1, 3][self.random.usize(..4)],
                    }),
                    ..Default::default()
                })
            }
            10..=11 => Kind::TerminateJob(TerminateJob {
                name: any(&mut self.random)?,
                ..Default::default()
            }),
            12..=13 if jobs.len() > 10 => Kind::Delete(Delete {
                name: any(&mut self.random)?,
                ..Default::default()
            }),
            14 => resize(self.random.usize(1..=self.options.agents)),
            15..=16 => {
                let id = format!("u{i}-{}", self.clients[i].made);
                self.wish_for_storage(&id, &state)?
            }
            _ => Kind::Update(Update {
                name: any(&mut self.random)?,
                labels: Some(Labels {
                    labels: [("a".to_owned(), self.step.to_string())].into(),
                }),
                ..Default::default()
            }),
        };
        Some((kind, key))
    }

    pub(super) fn answer_client(&mut self, i: usize, proposed: &Proposed) {
        let client = &mut self.clients[i];
        client.sent = false;
        match proposed {
            // Sent again under the same name, it is carried out once.
            Proposed::Unknown | Proposed::NotLeader => {}
            Proposed::Applied(result) => {
                let done = client.wants.take();
                if let Ok(revision) = result {
                    self.checks.acknowledged = self.checks.acknowledged.max(*revision);
                    match done {
                        Some((Kind::CreateJob(job), _)) => {
                            client.acknowledged.push(job.name.clone());
                            self.checks.jobs.insert(job.name);
                        }
                        Some((Kind::Delete(delete), _)) => {
                            self.checks.deleted.insert(delete.name);
                        }
                        _ => {}
                    }
                }
            }
        }
    }
}

/// A resource of which only the name matters.
pub fn named<M: Named>(name: &str) -> M {
    M::named(name.to_owned())
}

pub trait Named {
    fn named(name: String) -> Self;
}

macro_rules! named {
    ($($message:ident),*) => {$(
        impl Named for v1::$message {
            fn named(name: String) -> Self {
                v1::$message { name, ..Default::default() }
            }
        }
    )*};
}
named!(ResourceGroup, Workspace, Experiment);

fn resize(target: usize) -> Kind {
    Kind::Update(Update {
        name: CLUSTER.into(),
        scale_settings: cluster(target as i32).scale_settings,
        ..Default::default()
    })
}

pub fn cluster(target: i32) -> v1::Cluster {
    v1::Cluster {
        name: CLUSTER.into(),
        vm_size: "small".into(),
        scale_settings: Some(v1::ScaleSettings {
            manual: Some(v1::ManualScaleSettings {
                target_node_count: target,
                ..Default::default()
            }),
            auto_scale: None,
        }),
        ..Default::default()
    }
}
