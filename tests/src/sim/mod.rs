//! Several coordinators and agents in one thread, on a clock and a network that one seed draws.
//!
//! The replicas are production's cores on stores in memory, the leader's duties and the agents' `reconcile` are production's;
//! what stands between them (network, disks, clocks, machines, and an administrator) is played here. After every step everything that
//! must hold is looked at; at the end the faults heal, and every job must end. No thread, socket or file is played.

mod agents;
mod checks;
mod clients;
mod clocks;
mod disk;
mod faults;
mod leases;
mod members;
mod network;
mod outage;
mod registers;
mod relay;
mod replicas;
mod restores;
mod servers;
mod sessions;
mod storage;
mod volumes;

use std::collections::{BTreeMap, BTreeSet};

use batchai_coordinator::duties::Heard;
use batchai_coordinator::replica::core::Core;
use batchai_coordinator::scheduler::explain::pending_reason;
use batchai_coordinator::state::State;
use batchai_proto::internal::v1::replica::Role;

pub use outage::{Told, outage};

use agents::Agent;
use checks::Checks;
use clients::Client;
use clocks::Clock;
use faults::Options;
use members::Admin;
use network::Network;
use registers::Registers;
use replicas::Replica;
use restores::Ensemble;

/// Milliseconds of the clock in one step, which is a tick of every replica.
const STEP_MS: i64 = 50;
/// Where so many steps were not enough, less goes wrong from then on.
const SOFTEN_STEPS: u64 = 5_000;
/// Steps with faults at most, and without them.
const FAULTY_STEPS_MAX: u64 = 20_000;
const HEALED_STEPS_MAX: u64 = 4_000;
const ENSEMBLE: &str = "5eed0000-0000-4000-8000-000000000000";

/// What came of a seed.
#[derive(Debug)]
pub struct Outcome {
    /// Over everything that happened: the same seed gives the same.
    pub trace: u32,
    pub commands: i64,
    pub steps: u64,
    /// Operations whose histories were judged.
    pub operations: usize,
    /// What was seen that a good test must see now and then.
    pub sometimes: BTreeSet<&'static str>,
}

/// Who proposed what waits for its fate.
#[derive(Clone, Debug)]
enum Asked {
    Client(usize),
    /// One whose history is judged, and what he is about.
    User(usize, u64),
    /// A session with this replica, by its node and in which conversation.
    Session(u64, String, u64),
    /// One with another replica, the stream it came over, and its ticket there.
    Relayed(u64, u64, u64),
    /// A replica is to be this.
    Admin(Role),
    /// Of an administrator, after a restore.
    Decision(&'static str),
    Duty,
}

/// The world.
pub struct Sim {
    options: Options,
    random: fastrand::Rng,
    step: u64,
    replicas: BTreeMap<u64, Replica>,
    network: Network,
    tickets: u64,
    /// Leases on their way to agents.
    grants: Vec<leases::Grant>,
    /// What replicas and their leader tell each other of agents.
    relayed: relay::Carried,
    agents: Vec<Agent>,
    clients: Vec<Client>,
    registers: Registers,
    admin: Admin,
    ensemble: Ensemble,
    checks: Checks,
    healed: bool,
    /// The cluster was told to have all nodes.
    grown: bool,
}

/// Plays a seed.
///
/// # Errors
/// Says what did not hold, and when.
pub fn play(seed: u64) -> Result<Outcome, String> {
    let mut random = fastrand::Rng::with_seed(seed);
    let options = Options::draw(&mut random);
    let mut sim = Sim::new(options, random);
    let end = sim.run();
    end.map_err(|why| format!("step {}: {why}; {:?}", sim.step, sim.options))
}

impl Sim {
    fn new(options: Options, mut random: fastrand::Rng) -> Sim {
        let ids = 1..=options.replicas;
        let replicas = ids.map(|id| (id, Replica::new(id, &mut random, &options)));
        let mut sim = Sim {
            replicas: replicas.collect(),
            agents: (0..options.agents)
                .map(|i| Agent::new(i, Clock::draw(&mut random, options.clock > 0.0)))
                .collect(),
            grants: Vec::new(),
            relayed: relay::Carried::default(),
            clients: (0..3).map(Client::new).collect(),
            ensemble: Ensemble::new((1..=options.replicas).collect()),
            options,
            random,
            step: 0,
            network: Network::default(),
            tickets: 0,
            registers: Registers::default(),
            admin: Admin::default(),
            checks: Checks::default(),
            healed: false,
            grown: false,
        };
        for id in sim.ids() {
            sim.start(id);
        }
        sim
    }

    fn run(&mut self) -> Result<Outcome, String> {
        let enough = self.options.commands;
        if self.options.old {
            self.restore(restores::old())?;
            self.checks.saw("an ensemble has been written to for long");
        }
        while self.checks.commands() < enough && self.step < FAULTY_STEPS_MAX {
            self.fail_ensemble()?;
            self.fail_something();
            self.once()?;
            if self.step.is_multiple_of(SOFTEN_STEPS) {
                self.options.soften();
            }
        }
        self.heal();
        let until = self.step + HEALED_STEPS_MAX;
        while !self.is_over() {
            if self.step > until {
                return Err(format!("no end: {}", self.why_not_over()));
            }
            self.once()?;
        }
        let members = self.members();
        self.checks.at_the_end(&mut self.replicas, &members)?;
        let state = self.latest().ok_or("nobody runs")?.clone();
        Ok(Outcome {
            operations: self.registers.judge(&state)?,
            trace: self.checks.trace(),
            commands: self.checks.commands(),
            steps: self.step,
            sometimes: self.checks.sometimes.clone(),
        })
    }

    /// One step of everybody.
    fn once(&mut self) -> Result<(), String> {
        self.step += 1;
        self.deliver();
        self.carry();
        for id in self.ids() {
            if self.is_up(id) {
                self.tick(id);
                self.settle(id)?;
            }
            // It may have died amid a write, or wait for one.
            if self.is_up(id) {
                self.ask_for_leases(id);
                self.lead(id);
                self.step_sessions(id);
                self.settle(id)?;
            }
            if self.is_up(id) {
                self.save(id);
            }
        }
        self.step_leases();
        self.step_agents()?;
        self.step_clients();
        self.step_users();
        self.step_admin();
        self.step_restored();
        for id in self.ids() {
            if self.is_up(id) {
                self.settle(id)?;
            }
        }
        self.judge_servers()?;
        self.checks.step(&self.agents)
    }

    fn is_over(&self) -> bool {
        self.step.is_multiple_of(4) && self.why_not_over().is_empty()
    }

    fn why_not_over(&self) -> String {
        let Some(first) = self.latest() else {
            return "nobody runs".to_owned();
        };
        if !self.is_manned(first) {
            return format!(
                "the membership is not whole: {:?}; {:?}; {}",
                first.replicas,
                self.admin,
                self.how_replicas_are()
            );
        }
        for id in self.members() {
            let core = self.replicas[&id].core.as_ref();
            let applied = core.map(|core| core.state().applied_index);
            if applied != Some(first.applied_index) {
                let known = first.applied_index;
                return format!("replica {id} is behind: {applied:?} of {known}");
            }
        }
        if first.restored {
            let strays: Vec<_> = first.strays.keys().collect();
            return format!("the restore is not accepted: {strays:?}");
        }
        if first.jobs.values().any(|job| !job.ended()) {
            return self.why_jobs_wait(first);
        }
        if let Some(why) = self.why_servers_wait(first) {
            return why;
        }
        let busy = self.clients.iter().any(Client::is_busy) || self.registers.is_busy();
        match !self.grown || busy {
            true => "a client waits".to_owned(),
            false => String::new(),
        }
    }

    /// As the leader sees it.
    fn why_jobs_wait(&self, state: &State) -> String {
        let none = Heard::default();
        let leads = |replica: &&Replica| replica.core.as_ref().is_some_and(Core::leads);
        let leader = self.replicas.values().find(leads);
        let heard = leader.map_or(&none, |leader| &leader.heard);
        let open = state.jobs.values().filter(|job| !job.ended());
        let why = open.map(|job| {
            let name = &job.spec.name;
            format!(
                "{name}, {:?}: {}",
                job.state,
                pending_reason(state, heard, job)
            )
        });
        let agents = self.agents.iter().map(Agent::how_it_is);
        let (why, agents): (Vec<_>, Vec<_>) = (why.collect(), agents.collect());
        format!("{}; {}; {heard:?}", why.join("; "), agents.join("; "))
    }
}
