//! One story that is told, not drawn: a job runs while its agent does not reach a coordinator, for as long as is asked for.
//!
//! Nothing else goes wrong in it; what goes wrong beside it, the seeds draw.

use std::sync::Arc;

use batchai_coordinator::state::jobs::Job;
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::v1;
use batchai_proto::v1::job::OnNodeLoss;

use super::agents::Agent;
use super::clients::{CLUSTER, EXPERIMENT, GROUP, WORKSPACE, cluster, named};
use super::faults::Options;
use super::{STEP_MS, Sim};

const REPLICAS: u64 = 3;
const AGENTS: usize = 1;
const JOB: &str = "resourceGroups/g/workspaces/w/experiments/e/jobs/long";
/// Steps within which anything is done that nothing stands in the way of.
const SOON: u64 = 2_000;

/// What was there when the agents came back, and at the end of all.
#[derive(Debug)]
pub struct Told {
    /// Its processes still ran.
    pub ran_on: bool,
    /// The attempt was the one that ran before.
    pub same: bool,
    /// How many attempts the job had in the end.
    pub attempts: i32,
}

/// Tells it of a job on the one machine.
///
/// # Errors
/// Says what did not hold, and when.
pub fn outage(minutes: u64, on_node_loss: OnNodeLoss) -> Result<Told, String> {
    let options = Options::quiet(REPLICAS, AGENTS);
    let mut sim = Sim::new(options, fastrand::Rng::with_seed(1));
    // Nobody does anything by himself.
    (sim.healed, sim.grown) = (true, true);
    for kind in [
        Kind::CreateResourceGroup(named(GROUP)),
        Kind::CreateWorkspace(named(WORKSPACE)),
        Kind::CreateExperiment(named(EXPERIMENT)),
        Kind::CreateCluster(cluster(AGENTS as i32)),
        Kind::CreateJob(v1::Job {
            uid: JOB.into(),
            name: JOB.into(),
            cluster: CLUSTER.into(),
            node_count: AGENTS as i32,
            custom_toolkit_settings: Some(v1::CustomToolkitSettings::default()),
            on_node_loss: on_node_loss.into(),
            ..Default::default()
        }),
    ] {
        sim.wish_for(kind);
        sim.until("a wish", |sim| sim.clients.iter().all(|c| !c.is_busy()))?;
    }
    for agent in &mut sim.agents {
        agent.busy = true;
    }
    sim.until("the job", Sim::is_everywhere)?;
    let before = sim.told()?.attempt.clone();
    let until = sim.step + minutes * 60_000 / STEP_MS as u64;
    for agent in &mut sim.agents {
        agent.cut_off(until);
    }
    while sim.step < until {
        sim.once()?;
    }
    let ran_on = sim.is_everywhere();
    for agent in &mut sim.agents {
        agent.busy = false;
    }
    sim.until("the end", |sim| sim.told().is_ok_and(|job| job.ended()))?;
    let job = sim.told()?;
    Ok(Told {
        ran_on,
        same: job.attempt == before,
        attempts: job.attempts,
    })
}

impl Sim {
    fn told(&self) -> Result<Arc<Job>, String> {
        let job = self.latest().and_then(|state| state.jobs.get(JOB));
        job.cloned().ok_or("the job is not there".to_owned())
    }

    fn is_everywhere(&self) -> bool {
        let mut agents = self.agents.iter();
        agents.all(Agent::is_working)
    }

    fn until(&mut self, what: &str, done: impl Fn(&Sim) -> bool) -> Result<(), String> {
        let until = self.step + SOON;
        while !done(self) {
            if self.step > until {
                return Err(format!("step {}: {what} is waited for in vain", self.step));
            }
            self.once()?;
        }
        Ok(())
    }
}
