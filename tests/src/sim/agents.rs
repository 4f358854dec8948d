//! Machines and their agents: production's `reconcile` over a journal and processes that are played here.

use std::collections::BTreeMap;

use batchai_coordinator::state::State;
use batchai_coordinator::state::assignments::assignments;
use batchai_node_agent::lease::{Fence, Held, Lease};
use batchai_node_agent::reconcile::{Action, Local, actions, observations, strays};
use batchai_node_agent::status::{FailureRecord, Phase, RankStatus, Status};
use batchai_proto::agent::v1::{
    Assignment, AssignmentList, AttemptObservation, FileServerSource, Host, MountsReport, Report,
    Stray, StrayList,
};
use batchai_proto::internal::v1::command::Kind;
use batchai_proto::internal::v1::{RecordReport, RegisterNode};
use batchai_proto::v1;

use super::Sim;
use super::clocks::Clock;
use super::storage::{Exports, Storage};

/// What an agent is doing with a coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Talk {
    None,
    /// It said hello to a replica.
    Waiting(u64),
    /// It has a session.
    Open(u64),
}

/// A machine with an agent.
pub struct Agent {
    number: usize,
    boot: u64,
    /// How often its address changed.
    moves: u64,
    /// The agent is not there until then; the processes of its jobs are.
    down_until: u64,
    /// It reaches nobody until then.
    cut_until: u64,
    /// It reaches that replica alone until then.
    isolated: (u64, u64),
    /// What runs here runs on until it is told to end.
    pub busy: bool,
    talk: Talk,
    /// What is answered in an earlier one is heard by nobody.
    pub conversation: u64,
    pub clock: Clock,
    /// The agent's own count of its lease; it goes with the agent.
    pub lease: Lease,
    pub leased_until: i64,
    /// What is written down of it, for shims.
    pub written: Option<Held>,
    /// Of the attempts that are bound to it, as their shims count.
    pub fences: BTreeMap<String, Fence>,
    list: Option<AssignmentList>,
    pub storage: Storage,
    /// What its attempts mount, and whether all of that is there.
    mounts: BTreeMap<String, (Vec<FileServerSource>, bool)>,
    /// The journal: attempts, and whose each is.
    pub local: BTreeMap<String, (Local, Stray)>,
    /// What was reported, and whether that is on its way.
    reported: Option<Report>,
    reporting: Option<Report>,
}

impl Agent {
    pub fn new(number: usize, clock: Clock) -> Agent {
        Agent {
            number,
            boot: 1,
            moves: 0,
            down_until: 0,
            cut_until: 0,
            isolated: (0, 0),
            busy: false,
            talk: Talk::None,
            conversation: 0,
            clock,
            lease: Lease::new(0),
            leased_until: 0,
            written: None,
            fences: BTreeMap::new(),
            list: None,
            // Not all machines offer any.
            storage: Storage::new(number.is_multiple_of(2)),
            mounts: BTreeMap::new(),
            local: BTreeMap::new(),
            reported: None,
            reporting: None,
        }
    }

    pub fn name(&self) -> String {
        format!("nodes/n{}", self.number)
    }

    /// Where it is reached.
    pub fn address(&self) -> String {
        format!("10.{}.0.{}", self.number, self.moves)
    }

    /// Whether it knows what a State has for it.
    pub fn has_list_of(&self, state: &State) -> bool {
        let node = state.nodes.get(&self.name());
        let list = self.list.as_ref();
        node.zip(list)
            .is_some_and(|(node, list)| (list.epoch, list.revision) == (state.epoch, node.assigned))
    }

    /// What runs here, and what it mounts.
    pub fn mounting(&self) -> impl Iterator<Item = (&str, &[FileServerSource])> {
        self.running().filter_map(|(id, _)| {
            let (sources, _) = self.mounts.get(id)?;
            self.local[id]
                .0
                .launch_written
                .then_some((id, &sources[..]))
        })
    }

    fn uid(&self) -> String {
        format!("uid-{}", self.number)
    }

    fn incarnation(&self) -> String {
        format!("journal/boot-{}", self.boot)
    }

    /// The attempts whose processes may run here, and of which job they are; set-ups are of none but themselves.
    pub fn running(&self) -> impl Iterator<Item = (&str, &str)> {
        let live = self.local.values().filter(|(local, _)| {
            let ended = local
                .status
                .as_ref()
                .is_some_and(|s| s.phase == Phase::Ended);
            local.started && local.shim && !ended
        });
        live.map(|(local, of)| {
            let work = if of.set_up { &local.attempt } else { &of.job };
            (local.attempt.as_str(), work.as_str())
        })
    }

    /// Processes of a job that was launched run here.
    pub fn is_working(&self) -> bool {
        let mut running = self.running();
        running.any(|(attempt, _)| self.local[attempt].0.launch_written)
    }

    /// For who looks into a failure.
    pub fn how_it_is(&self) -> String {
        let (name, talk, list) = (self.name(), self.talk, self.list.as_ref());
        let wanted = list.map(|list| (list.revision, list.assignments.len()));
        let local: Vec<_> = self.local.values().map(|(local, _)| local).collect();
        format!("{name}: {talk:?}, list {wanted:?}, {local:?}")
    }

    pub fn hang_up(&mut self) {
        self.talk = Talk::None;
        self.conversation += 1;
        self.list = None;
        (self.reported, self.reporting) = (None, None);
    }

    pub fn is_talking(&self) -> bool {
        matches!(self.talk, Talk::Open(_))
    }

    pub fn is_cut_off(&self, step: u64) -> bool {
        self.cut_until > step || self.isolated.1 > step
    }

    /// From now on it reaches nobody, for some time.
    pub fn cut_off(&mut self, until: u64) {
        self.cut_until = until;
        self.hang_up();
    }

    /// From now on it reaches one replica alone, for some time.
    pub fn isolate(&mut self, with: u64, until: u64) {
        self.isolated = (with, until);
        match self.talk {
            Talk::Waiting(id) | Talk::Open(id) if id == with => {}
            _ => self.hang_up(),
        }
    }

    /// What it has sent was recorded.
    pub fn recorded(&mut self, conversation: u64) {
        if conversation != self.conversation {
            return;
        }
        match self.talk {
            Talk::Waiting(id) => self.talk = Talk::Open(id),
            Talk::Open(_) => {
                if let Some(reporting) = self.reporting.take() {
                    self.reported = Some(reporting);
                }
            }
            Talk::None => {}
        }
    }

    /// Its session is over.
    pub fn dropped(&mut self, conversation: u64) {
        if conversation == self.conversation {
            // It comes again with all that it knows.
            self.hang_up();
        }
    }

    /// Who it is.
    pub fn registration(&self) -> RegisterNode {
        RegisterNode {
            name: self.name(),
            uid: self.uid(),
            incarnation: self.incarnation(),
            facts: Some(v1::NodeFacts {
                vm_size: "small".into(),
                boot_id: format!("{}-{}", self.number, self.boot),
                first_port: 20_000,
                last_port: 20_099,
                addresses: vec![self.address()],
                storage_root: if self.storage.offered { "/srv" } else { "" }.into(),
                storage_bytes: self.storage.bytes.0,
                storage_free_bytes: self.storage.bytes.1,
                ..Default::default()
            }),
            empty: self.local.is_empty(),
        }
    }

    /// What the processes of its attempts do by themselves.
    fn work(&mut self, step: u64, random: &mut fastrand::Rng, exports: &Exports) {
        self.storage.work(step, random);
        let address = self.address();
        for (local, _) in self.local.values_mut().filter(|(local, _)| local.shim) {
            let mounts = self.mounts.get(&local.attempt);
            let mounted = mounts.is_none_or(|(sources, all)| {
                *all && self.storage.reaches(sources, &address, exports, step)
            });
            let mut status = local.status.take().unwrap_or_default();
            let soon = random.f64() < 0.1;
            match status.phase {
                Phase::Preparing | Phase::Ready | Phase::Running if local.stop_written && soon => {
                    status.phase = Phase::Ended;
                }
                // Whoever is to stop does nothing else any more.
                _ if local.stop_written => {}
                Phase::Preparing if soon && mounted => status.phase = Phase::Ready,
                // What is not there is waited for, and not for ever.
                Phase::Preparing if soon && random.f64() < 0.2 => {
                    status.failure = Some(FailureRecord {
                        code: "MountFailed".into(),
                        infrastructure: true,
                        ..FailureRecord::default()
                    });
                    status.phase = Phase::Ended;
                }
                Phase::Running if soon && !self.busy => {
                    if let Some(rank) = status.ranks.first_mut() {
                        rank.exit_code = Some(i32::from(random.f64() < 0.2));
                    }
                    status.phase = Phase::Ended;
                }
                _ => {}
            }
            if status.phase == Phase::Ended {
                local.shim = false;
                local.shipped = true;
            }
            local.status = Some(status);
        }
    }

    /// What an attempt mounts, and whether the coordinator says of all of it where it is.
    fn sources(&self, wanted: &Assignment) -> (Vec<FileServerSource>, bool) {
        let of_cluster = self.list.iter().filter_map(|list| list.mounts.as_ref());
        let of_cluster = of_cluster.flat_map(|mounts| &mounts.file_servers);
        if wanted.set_up {
            return (of_cluster.cloned().collect(), true);
        }
        let job = wanted.job.as_ref();
        let volumes = job.and_then(|job| job.mount_volumes.as_ref());
        let mut named = volumes
            .into_iter()
            .flat_map(|volumes| &volumes.file_servers);
        let known = |name: &str| wanted.file_servers.iter().any(|source| source.name == name);
        let all = named.all(|mount| known(&mount.file_server));
        (wanted.file_servers.clone(), all)
    }

    /// What is the matter with what its cluster mounts.
    fn mounts_report(&self, exports: &Exports, step: u64) -> Option<MountsReport> {
        let mounts = self.list.as_ref()?.mounts.as_ref()?;
        let (address, sources) = (self.address(), &mounts.file_servers);
        let reaches = self.storage.reaches(sources, &address, exports, step);
        Some(MountsReport {
            cluster_uid: mounts.uid.clone(),
            failure: (!reaches).then(|| v1::ResourceError {
                code: "MountUnavailable".into(),
                ..Default::default()
            }),
        })
    }

    fn act(&mut self, action: &Action) {
        match action {
            Action::Start(id) => {
                let local = Local {
                    attempt: id.clone(),
                    shim: true,
                    started: true,
                    status: Some(Status::default()),
                    ..Local::default()
                };
                let mut wanted = self.list.iter().flat_map(|list| &list.assignments);
                let wanted = wanted.find(|a| &a.attempt == id);
                let wanted = wanted.expect("it is started because it is asked for");
                if wanted.fenced {
                    self.fences.insert(id.clone(), Fence::default());
                }
                self.mounts.insert(id.clone(), self.sources(wanted));
                self.local.insert(id.clone(), (local, origin(wanted)));
            }
            Action::Launch(id) => {
                let master = self.list.iter().flat_map(|list| &list.assignments);
                let master = master
                    .filter(|a| &a.attempt == id)
                    .any(|a| a.host_index == 0);
                if let Some((local, _)) = self.local.get_mut(id) {
                    local.launch_written = true;
                    let status = local.status.get_or_insert_default();
                    status.phase = Phase::Running;
                    let rank = RankStatus {
                        rank: 0,
                        pid: 1,
                        ..RankStatus::default()
                    };
                    status.ranks = if master { vec![rank] } else { Vec::new() };
                }
            }
            Action::Stop(id) => {
                if let Some((local, _)) = self.local.get_mut(id) {
                    local.stop_written = true;
                }
            }
            Action::Sweep(id) => {
                if let Some((local, _)) = self.local.get_mut(id) {
                    (local.swept, local.shipped) = (true, true);
                }
            }
            Action::Forget(id) => {
                self.local.remove(id);
                self.fences.remove(id);
                self.mounts.remove(id);
            }
        }
    }
}

/// What is kept of an attempt for those who do not know it.
fn origin(assignment: &Assignment) -> Stray {
    let job = assignment.job.clone().unwrap_or_default();
    let host = |host: &Host| Host {
        node: host.node.clone(),
        port: host.port,
        ..Host::default()
    };
    Stray {
        seen: None,
        job: job.name,
        job_uid: job.uid,
        hosts: assignment.hosts.iter().map(host).collect(),
        set_up: assignment.set_up,
    }
}

impl Sim {
    pub(super) fn fail_agents(&mut self) {
        self.fail_storage();
        let i = self.random.usize(..self.agents.len());
        let step = self.step;
        if self.random.f64() < self.options.agent_crash {
            let until = step + self.random.u64(1..100);
            let agent = &mut self.agents[i];
            agent.hang_up();
            agent.down_until = until;
            agent.lease = Lease::new(agent.clock.boot(step));
            agent.leased_until = 0;
            agent.storage.begin(step);
            if agent.running().next().is_some() {
                self.checks.saw("an agent is killed amid a job");
            }
        }
        if self.random.f64() < self.options.reboot {
            let agent = &mut self.agents[i];
            if agent.running().next().is_some() {
                self.checks.saw("a machine reboots amid a job");
            }
            agent.hang_up();
            agent.lease = Lease::new(agent.clock.boot(step));
            (agent.leased_until, agent.written) = (0, None);
            // What ran is gone, and what lay on the disk of the journal is not: what had ended is known still.
            agent.boot += 1;
            agent.storage.stop_all();
            agent.storage.begin(step);
            if self.random.u32(..4) == 0 {
                agent.moves += 1;
                if !agent.storage.kept.is_empty() {
                    self.checks
                        .saw("a machine with file servers has another address");
                }
            }
            for (local, _) in agent.local.values_mut() {
                local.shim = false;
            }
        }
        if self.random.f64() < self.options.cut {
            // Now and then for longer than a lease lasts.
            let most = if self.random.f64() < 0.2 { 1000 } else { 300 };
            let until = step + self.random.u64(1..most);
            self.agents[i].cut_off(until);
        }
        if self.random.f64() < self.options.crash {
            if self.agents[i].storage.stop_one(&mut self.random) {
                self.checks.saw("what serves a file server dies");
            }
            // A shim dies, and its processes with it.
            let running: Vec<_> = self.agents[i]
                .running()
                .map(|(id, _)| id.to_owned())
                .collect();
            if let Some(id) = self.random.choice(&running)
                && let Some((local, _)) = self.agents[i].local.get_mut(id)
            {
                local.shim = false;
                self.checks.saw("a shim dies amid a job");
            }
        }
    }

    fn fail_storage(&mut self) {
        if self.random.f64() < self.options.storage {
            let until = self.step + self.random.u64(1..400);
            let i = self.random.usize(..self.agents.len());
            let storage = &mut self.agents[i].storage;
            if storage.serves() {
                self.checks.saw("a disk of file servers is away");
            }
            storage.take_away(until);
        }
    }

    pub(super) fn heal_agents(&mut self) {
        let back = self.step + 1;
        for agent in &mut self.agents {
            agent.storage.take_away(back);
            (agent.down_until, agent.cut_until) = (0, 0);
            agent.isolated = (0, 0);
        }
    }

    pub(super) fn step_agents(&mut self) -> Result<(), String> {
        let step = self.step;
        let mut exports = Exports::new();
        for agent in &self.agents {
            agent.storage.exports(&agent.address(), &mut exports);
        }
        for i in 0..self.agents.len() {
            self.agents[i].work(step, &mut self.random, &exports);
            let agent = &self.agents[i];
            if agent.down_until > self.step {
                continue;
            }
            if agent.cut_until <= self.step {
                self.talk(i, &exports);
            }
            // Also where nobody is reached: what is wanted is known.
            let agent = &mut self.agents[i];
            let Some(list) = agent.list.clone() else {
                continue;
            };
            let local: Vec<_> = agent
                .local
                .values()
                .map(|(local, _)| local.clone())
                .collect();
            let leased = agent.leased_until > agent.clock.boot(step);
            for action in actions(&list, &local, leased) {
                agent.act(&action);
            }
            let deeds = agent.storage.look(&list, step, &mut self.random);
            self.judge_deeds(deeds)?;
        }
        Ok(())
    }

    fn talk(&mut self, i: usize, exports: &Exports) {
        let (name, step) = (self.agents[i].name(), self.step);
        match self.agents[i].talk {
            Talk::None => {
                let (with, until) = self.agents[i].isolated;
                let up = self.ids().into_iter().filter(|id| self.is_up(*id));
                let reached: Vec<_> = up.filter(|id| *id == with || until <= step).collect();
                let Some(id) = self.random.choice(reached) else {
                    return;
                };
                let conversation = self.agents[i].conversation;
                if self.greet(id, i, conversation, &name) {
                    self.agents[i].talk = Talk::Waiting(id);
                }
            }
            // One that stands still may go on.
            Talk::Waiting(id) | Talk::Open(id) if !self.is_up(id) => {
                if self.replicas[&id].core.is_none() || self.random.f64() < 0.02 {
                    self.agents[i].hang_up();
                }
            }
            Talk::Waiting(id) | Talk::Open(id)
                if !self.serves(id, &name, self.agents[i].conversation) =>
            {
                self.agents[i].hang_up();
            }
            Talk::Waiting(_) => {}
            Talk::Open(id) => {
                let agent = &mut self.agents[i];
                let number = agent.lease.beat(agent.clock.boot(step));
                self.beat(id, &name, number);
                let state = self.core(id).state().clone();
                let assigned = state.nodes.get(&name).map_or(0, |node| node.assigned);
                let agent = &mut self.agents[i];
                let known = agent.list.as_ref().map(|list| list.revision);
                if known.is_none_or(|known| assigned > known) {
                    agent.list = Some(assignments(&state, &name));
                }
                self.report(i, id, exports);
            }
        }
    }

    fn report(&mut self, i: usize, id: u64, exports: &Exports) {
        let step = self.step;
        let agent = &mut self.agents[i];
        if agent.reporting.is_some() {
            return;
        }
        let list = agent.list.clone().unwrap_or_default();
        let local: Vec<_> = agent
            .local
            .values()
            .map(|(local, _)| local.clone())
            .collect();
        let stray = |seen: AttemptObservation| {
            let (_, origin) = &agent.local[&seen.attempt];
            Stray {
                seen: Some(seen),
                ..origin.clone()
            }
        };
        let found = strays(&list, &local).into_iter().map(stray);
        let strays = StrayList {
            epoch: list.epoch,
            strays: found.collect(),
        };
        let seen = Report {
            attempts: observations(&list, &local),
            strays: agent.list.is_some().then_some(strays),
            file_servers: agent.storage.report(&agent.address()),
            mounts: agent.mounts_report(exports, step),
        };
        if agent.reported.as_ref() == Some(&seen) {
            return;
        }
        agent.reporting = Some(seen.clone());
        let name = agent.name();
        let report = RecordReport {
            node: agent.name(),
            uid: agent.uid(),
            incarnation: agent.incarnation(),
            report: Some(seen),
        };
        self.say_for(id, &name, Kind::RecordReport(report));
    }
}
