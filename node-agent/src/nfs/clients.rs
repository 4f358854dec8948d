//! Who may have a connection, and how many: what each client has of its own, and what they share.
//!
//! The last half of all connections is for those that have none: so a few clients with many do not keep others out. A client that
//! vanished keeps its connections until the kernel finds out, within `DEAD`.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{CLIENTS_MAX, Config, said};

/// Half of them are one for each client.
const CONNECTIONS_MAX: usize = 2 * CLIENTS_MAX;
/// Of one client: more than Linux's `nconnect` allows.
const CONNECTIONS_OF_ONE: usize = 32;
/// How many calls of one client are being done or have answers that it has not taken. Others have many more together: see `CALLS_AT_ONCE`.
pub const CALLS_OF_ONE: usize = 16;
/// Below it only root binds.
const PORTS_OF_ROOT: u16 = 1024;

/// When a connection on which nothing comes is asked whether the other side is there, how often, and when there is no answer for so
/// long, or what was sent is not taken for so long, it is closed.
const ASK_AFTER: Duration = Duration::from_secs(60);
const ASK_EVERY: Duration = Duration::from_secs(10);
const ASK_TIMES: u32 = 3;
const DEAD: Duration = Duration::from_secs(90);

/// What a client has left.
#[derive(Clone)]
pub struct Client {
    connections: Arc<Semaphore>,
    pub calls: Arc<Semaphore>,
}

impl Client {
    fn new() -> Client {
        Client {
            connections: Arc::new(Semaphore::new(CONNECTIONS_OF_ONE)),
            calls: Arc::new(Semaphore::new(CALLS_OF_ONE)),
        }
    }

    fn has_none(&self) -> bool {
        self.connections.available_permits() == CONNECTIONS_OF_ONE
    }
}

/// A place for a connection. Dropping it frees it.
pub struct Seat {
    pub address: IpAddr,
    pub client: Client,
    _held: [OwnedSemaphorePermit; 2],
}

/// The clients that have come.
pub struct Clients {
    of: Mutex<HashMap<IpAddr, Client>>,
    connections: Arc<Semaphore>,
    connections_max: usize,
}

impl Clients {
    /// With as many connections as half of the files that this process may have open: the other half is for what calls open.
    pub fn new() -> io::Result<Clients> {
        let (files, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let half = usize::try_from(files / 2).unwrap_or(usize::MAX);
        if half < CONNECTIONS_MAX {
            tracing::warn!(
                connections = half,
                "this process may have no more than {files} files open (LimitNOFILE=): for {CLIENTS_MAX} clients it takes {}",
                2 * CONNECTIONS_MAX
            );
        }
        Ok(Clients::with(half.min(CONNECTIONS_MAX)))
    }

    fn with(connections_max: usize) -> Clients {
        Clients {
            of: Mutex::default(),
            connections: Arc::new(Semaphore::new(connections_max)),
            connections_max,
        }
    }

    /// A place, where somebody may come, and has not come too often.
    pub fn seat(&self, config: &Config, peer: SocketAddr) -> Option<Seat> {
        let address = peer.ip().to_canonical();
        let refused = |why: &'static str| {
            if said::may_say(why, Some(address)) {
                tracing::warn!(client = %address, "refused: {why}");
            }
            None
        };
        if !listed(config, address) {
            return refused("it is not among the clients");
        }
        if !config.any_port && peer.port() >= PORTS_OF_ROOT {
            return refused("it comes from a port that not only root may use");
        }
        let mut clients = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        let client = clients.entry(address).or_insert_with(Client::new);
        let used = self.connections_max - self.connections.available_permits();
        if !client.has_none() && used >= self.connections_max / 2 {
            return refused("a second connection while few are left");
        }
        let own = Arc::clone(&client.connections).try_acquire_owned();
        let all = Arc::clone(&self.connections).try_acquire_owned();
        let (Ok(own), Ok(all)) = (own, all) else {
            return refused("a connection too many");
        };
        Some(Seat {
            address,
            client: client.clone(),
            _held: [own, all],
        })
    }

    /// Whether somebody is connected.
    pub fn any_connected(&self) -> bool {
        self.connections.available_permits() < self.connections_max
    }

    /// Forgets those that are no clients any more.
    pub fn keep(&self, is_client: impl Fn(IpAddr) -> bool) {
        let mut clients = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        clients.retain(|address, _| is_client(*address));
    }
}

pub fn listed(config: &Config, address: IpAddr) -> bool {
    config
        .clients
        .iter()
        .any(|client| client.to_canonical() == address)
}

/// Has the kernel find out when whoever is connected is there no more.
pub fn notice_death(stream: &impl AsFd) -> nix::Result<()> {
    let seconds = |time: Duration| time.as_secs() as u32;
    setsockopt(stream, sockopt::TcpKeepIdle, &seconds(ASK_AFTER))?;
    setsockopt(stream, sockopt::TcpKeepInterval, &seconds(ASK_EVERY))?;
    setsockopt(stream, sockopt::TcpKeepCount, &ASK_TIMES)?;
    setsockopt(stream, sockopt::TcpUserTimeout, &(DEAD.as_millis() as u32))?;
    setsockopt(stream, sockopt::KeepAlive, &true)
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::getsockopt;

    use super::super::EMBEDDED;
    use super::*;

    fn config(clients: u8) -> Config {
        Config {
            root: "/srv".into(),
            listen: "10.0.0.1:2049".parse().unwrap(),
            generation: 1,
            clients: (1..=clients).map(|n| [10, 0, 1, n].into()).collect(),
            squash_uid: 65534,
            squash_gid: 65534,
            squash_all: false,
            linger_s: 0,
            any_port: false,
            backend: EMBEDDED.to_owned(),
        }
    }

    fn peer(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 1, n], 700))
    }

    #[test]
    fn a_few_with_many_connections_do_not_keep_others_out() {
        let clients = Clients::with(64);
        let config = config(40);
        let seat = |n| clients.seat(&config, peer(n));
        assert!(seat(41).is_none(), "it is not listed");
        let mut seats: Vec<_> = (0..CONNECTIONS_OF_ONE).map_while(|_| seat(1)).collect();
        assert_eq!(seats.len(), CONNECTIONS_OF_ONE);
        assert!(seat(1).is_none(), "more than one may have");
        // Half of all are taken: everybody gets one, and only one.
        for n in 2..=33 {
            seats.push(seat(n).expect("it has none"));
            assert!(seat(n).is_none());
        }
        assert!(seat(34).is_none(), "none is left");
        seats.truncate(31);
        seats.push(seat(34).unwrap());
        assert!(seat(34).is_none());
        seats.pop();
        assert!(seat(1).is_some());
        clients.keep(|address| address == peer(1).ip());
        assert_eq!(clients.of.lock().unwrap().len(), 1);
    }

    #[test]
    fn who_vanished_is_noticed() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        notice_death(&stream).unwrap();
        assert!(getsockopt(&stream, sockopt::KeepAlive).unwrap());
        let idle = getsockopt(&stream, sockopt::TcpKeepIdle).unwrap();
        let every = getsockopt(&stream, sockopt::TcpKeepInterval).unwrap();
        let times = getsockopt(&stream, sockopt::TcpKeepCount).unwrap();
        assert_eq!((idle, every, times), (60, 10, 3));
        let dead = getsockopt(&stream, sockopt::TcpUserTimeout).unwrap();
        assert_eq!(u64::from(dead), DEAD.as_millis() as u64);
        assert_eq!(DEAD, ASK_AFTER + ASK_EVERY * ASK_TIMES);
    }
}
