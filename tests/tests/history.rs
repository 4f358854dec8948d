//! What clients of three coordinators see, while those are killed, stopped and deposed, is what one coordinator could have shown
//! them: the history of every object is linearizable.
//!
//! Nothing is said here of lists and watches, nor of how the changes of one object lie to those of another.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use batchai_common::tls::Route;
use batchai_tests::api::connector;
use batchai_tests::history::{Call, Op, Outcome, Revision, Verdict, check};
use batchai_tests::process::until;
use batchai_tests::register::{Fate, Kind, ask};
use batchai_tests::replicas::Replicas;
use nix::sys::signal::Signal;

const CLIENTS: u64 = 6;
const LASTS: Duration = Duration::from_secs(20);
/// Between two operations of a client: a history need not be long, it must have much at the same time.
const PAUSE_MAX_MS: u64 = 60;
/// How often a creation is asked for under one name, while nobody says what became of it.
const TRIES: usize = 4;
const STOPPED: Duration = Duration::from_secs(2);
/// What looking for an order may cost.
const BUDGET: u64 = 20_000_000;

const OBJECTS: [(Kind, &str); 4] = [
    (Kind::Group, "x"),
    (Kind::Group, "y"),
    (Kind::Workspace, "x"),
    (Kind::Job, "x"),
];

/// Where the replicas are, and all that is seen of them.
struct World {
    endpoints: Vec<String>,
    credentials: PathBuf,
    begun: Instant,
    stop: AtomicBool,
    clients: AtomicU64,
    values: AtomicU64,
    histories: [Mutex<Vec<Op>>; OBJECTS.len()],
    counts: Mutex<BTreeMap<String, usize>>,
}

impl World {
    fn now(&self) -> u64 {
        self.begun.elapsed().as_nanos() as u64
    }

    fn count(&self, what: impl Into<String>) {
        *self.counts.lock().unwrap().entry(what.into()).or_default() += 1;
    }

    fn counted(&self, what: &str) -> usize {
        self.counts.lock().unwrap().get(what).copied().unwrap_or(0)
    }

    fn note(&self, object: usize, op: Op) {
        let what = match op.ended {
            Some((_, Outcome::Shown(..))) => "shown",
            Some((_, Outcome::Done)) => "done",
            Some((_, Outcome::Absent)) => "absent",
            Some((_, Outcome::Exists)) => "exists",
            Some((_, Outcome::Stale(_))) => "stale",
            None => "open",
        };
        self.count(what);
        self.histories[object].lock().unwrap().push(op);
    }

    fn name(&self) -> u64 {
        self.clients.fetch_add(1, Ordering::Relaxed)
    }

    /// To all of them, one first; or to that one alone.
    fn way(&self, first: usize, alone: bool) -> Route {
        let (before, after) = self.endpoints.split_at(first);
        let list = match alone {
            true => after[0].clone(),
            false => [after, before].concat().join(","),
        };
        connector(&list, &self.credentials).connect_lazy()
    }

    /// Asks once, and waits so long.
    async fn ask(&self, way: Route, object: usize, call: Call, id: &str, time: Duration) -> Fate {
        let asked = ask(way, OBJECTS[object], call, id.to_owned());
        match tokio::time::timeout(time, asked).await {
            Ok(fate) => fate,
            Err(_) => Fate::Open,
        }
    }
}

/// Somebody who does one thing at a time.
struct Client {
    world: Arc<World>,
    random: fastrand::Rng,
    name: u64,
    way: (usize, Route),
    /// The revision that he has seen last of each object.
    known: [Revision; OBJECTS.len()],
}

impl Client {
    fn new(world: Arc<World>, seed: u64) -> Client {
        let mut random = fastrand::Rng::with_seed(seed);
        let first = random.usize(..world.endpoints.len());
        Client {
            name: world.name(),
            way: (first, world.way(first, false)),
            world,
            random,
            known: [0; OBJECTS.len()],
        }
    }

    async fn run(mut self) {
        while !self.world.stop.load(Ordering::Relaxed) {
            let object = self.random.usize(..OBJECTS.len());
            let value = self.world.values.fetch_add(1, Ordering::Relaxed);
            let at = self.known[object];
            let call = match self.random.u32(..100) {
                0..45 => Call::Read,
                45..63 => Call::Create(value),
                63..73 => Call::Write(value),
                73..90 => Call::WriteIf(at, value),
                90..95 => Call::Delete,
                _ => Call::DeleteIf(at),
            };
            match call {
                Call::Read => self.read(object).await,
                Call::Create(_) => self.create(object, call).await,
                _ => self.change(object, call).await,
            }
            let pause = self.random.u64(..PAUSE_MAX_MS);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    fn patience(&mut self) -> Duration {
        // Some give up while a leader is stopped, some wait until it goes on.
        Duration::from_millis(self.random.u64(800..3000))
    }

    /// Every other read is of one replica alone.
    async fn read(&mut self, object: usize) {
        let way = match self.random.bool() {
            true => self.way.1.clone(),
            false => {
                let at = self.random.usize(..self.world.endpoints.len());
                self.world.way(at, true)
            }
        };
        self.read_by(way, object).await;
    }

    /// Whether there was an answer.
    async fn read_by(&mut self, way: Route, object: usize) -> bool {
        let (time, begun) = (self.patience(), self.world.now());
        let fate = self.world.ask(way, object, Call::Read, "", time).await;
        let Fate::Known(outcome) = fate else {
            // Who has read nothing has seen nothing.
            self.world.count("reads without an answer");
            return false;
        };
        self.known(object, Call::Read, begun, outcome);
        true
    }

    async fn change(&mut self, object: usize, call: Call) {
        let (time, begun) = (self.patience(), self.world.now());
        let way = self.way.1.clone();
        match self.world.ask(way, object, call, "", time).await {
            Fate::Known(outcome) => self.known(object, call, begun, outcome),
            Fate::NotDone => self.world.count("changes refused"),
            Fate::Open => self.open(object, call, begun),
        }
    }

    /// A creation has a name, under which it is carried out once, however often it is asked for.
    async fn create(&mut self, object: usize, call: Call) {
        let (id, begun) = (uuid::Uuid::new_v4().to_string(), self.world.now());
        let mut unsure = false;
        for _ in 0..TRIES {
            let (time, again) = (self.patience(), self.world.now());
            let way = self.way.1.clone();
            match self.world.ask(way, object, call, &id, time).await {
                Fate::Known(outcome) if !unsure => {
                    return self.known(object, call, begun, outcome);
                }
                Fate::Known(outcome) => {
                    self.world.count("creations asked for again");
                    return self.created(object, call, (begun, again), outcome);
                }
                Fate::NotDone if !unsure => return self.world.count("changes refused"),
                Fate::NotDone => {}
                Fate::Open => {
                    unsure = true;
                    self.turn();
                }
            }
        }
        self.open(object, call, begun);
    }

    /// The answer to one that was asked for again shows what is there by now: it is carried out, and read.
    fn created(&mut self, object: usize, call: Call, times: (u64, u64), outcome: Outcome) {
        let (begun, again) = times;
        if outcome == Outcome::Exists {
            // It was not carried out under this name so far; the first may yet be on its way.
            self.known(object, call, again, outcome);
            return self.open(object, call, begun);
        }
        // Read first: it was answered at the same time, and no earlier.
        self.known(object, Call::Read, again, outcome);
        self.known(object, call, begun, Outcome::Done);
    }

    fn known(&mut self, object: usize, call: Call, begun: u64, outcome: Outcome) {
        if let Outcome::Shown(_, revision) | Outcome::Stale(revision) = outcome {
            self.known[object] = revision;
        }
        let op = Op {
            client: self.name,
            call,
            begun,
            ended: Some((self.world.now(), outcome)),
        };
        self.world.note(object, op);
    }

    /// Nobody knows: from here on it is another client.
    fn open(&mut self, object: usize, call: Call, begun: u64) {
        let (client, ended) = (self.name, None);
        let op = Op {
            client,
            call,
            begun,
            ended,
        };
        self.world.note(object, op);
        self.name = self.world.name();
        self.turn();
    }

    /// Goes to the next replica: this one may be stopped.
    fn turn(&mut self) {
        let next = (self.way.0 + 1) % self.world.endpoints.len();
        self.way = (next, self.world.way(next, false));
    }
}

/// Does all that can happen to replicas, again and again; returns how often another one led.
fn disturb(e: &mut Replicas, world: &World) -> usize {
    let (mut changes, mut leader) = (0, e.leader());
    let mut see = |e: &Replicas| {
        let now = e.leader();
        changes += usize::from(now != leader);
        leader = now;
        now
    };
    let pause = |ms| std::thread::sleep(Duration::from_millis(ms));
    for fault in [
        "leader killed",
        "handed over",
        "leader stopped",
        "follower killed",
    ]
    .iter()
    .cycle()
    {
        if world.begun.elapsed() > LASTS {
            break;
        }
        let leads = see(e);
        let follows = leads % 3 + 1;
        match *fault {
            "leader killed" | "follower killed" => {
                let killed = if *fault == "leader killed" {
                    leads
                } else {
                    follows
                };
                e.kill(killed);
                pause(700);
                see(e);
                e.restart(killed);
            }
            "leader stopped" => {
                e.processes[&leads].signal(Signal::SIGSTOP);
                std::thread::sleep(STOPPED);
                e.processes[&leads].signal(Signal::SIGCONT);
            }
            _ => {
                let to = follows.to_string();
                let lead = ["admin", "replica", "lead", "--id", &to];
                // The one that was asked may not be far enough yet: then nothing happens.
                let _ = e.command_at(&e.list(), &lead).output().unwrap();
            }
        }
        world.count(*fault);
        pause(500);
        see(e);
    }
    changes
}

fn report(world: &World) {
    for (what, count) in world.counts.lock().unwrap().iter() {
        eprintln!("{what}: {count}");
    }
}

fn judge(world: &World) {
    for (object, (kind, name)) in OBJECTS.iter().enumerate() {
        let history = world.histories[object].lock().unwrap();
        let begun = Instant::now();
        let verdict = check(&history, BUDGET);
        let (ops, took) = (history.len(), begun.elapsed());
        eprintln!("{kind:?} {name}: {ops} operations, judged in {took:?}");
        match verdict {
            Verdict::Linearizable => assert!(ops > 50, "{kind:?} {name}: that is too few to say"),
            Verdict::Undecided => panic!("{kind:?} {name}: undecided"),
            Verdict::Not(why) => panic!("{kind:?} {name} is not linearizable: {why}"),
        }
    }
}

#[test]
fn what_clients_see_is_what_one_coordinator_could_have_shown() {
    let mut e = Replicas::start(3, &["--snapshot-entries", "200"]);
    e.create_cluster(0);
    let world = Arc::new(World {
        endpoints: (1..=3).map(|id| e.endpoint(id).to_owned()).collect(),
        credentials: e.data(1).join("admin.pem"),
        begun: Instant::now(),
        stop: AtomicBool::new(false),
        clients: AtomicU64::new(1),
        values: AtomicU64::new(1),
        histories: Default::default(),
        counts: Mutex::default(),
    });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let _inside = runtime.enter();
    let seed = fastrand::u64(..1 << 32);
    eprintln!("seed {seed}");
    let client = |number| Client::new(world.clone(), seed + number).run();
    let clients: Vec<_> = (0..CLIENTS).map(|n| runtime.spawn(client(n))).collect();
    let changes = disturb(&mut e, &world);
    world.stop.store(true, Ordering::Relaxed);
    for client in clients {
        runtime.block_on(client).unwrap();
    }
    // In the end every replica says what there is.
    let mut last = Client::new(world.clone(), seed);
    for (object, at) in (0..OBJECTS.len()).flat_map(|object| (0..3).map(move |at| (object, at))) {
        until("every replica to answer", || {
            let way = world.way(at, true);
            runtime.block_on(last.read_by(way, object)).then_some(())
        });
    }
    eprintln!("changes of leader: {changes}");
    report(&world);
    judge(&world);
    let answers = ["shown", "done", "absent", "exists", "stale"].map(|what| world.counted(what));
    assert!(answers.iter().sum::<usize>() >= 500, "{answers:?}");
    assert!(answers.iter().all(|count| *count >= 5), "{answers:?}");
    assert!(changes >= 2, "{changes}");
    let troubled = [
        "open",
        "changes refused",
        "reads without an answer",
        "creations asked for again",
    ];
    assert!(troubled.iter().any(|what| world.counted(what) > 0));
}
