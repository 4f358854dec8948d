//! Takes connections in: each is greeted on its own, so that who is slow to greet holds up nobody.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::Identity;

/// Greetings at once. Where there are more, the oldest is given up for the newest: who means it has long been greeted.
const GREETINGS_MAX: usize = 1024;
/// Of them, from one address.
const GREETINGS_PER_ADDRESS_MAX: usize = 128;
/// Connections of one network that have shown no certificate, and of one who has.
const NAMELESS_MAX: usize = 256;
const NAMED_MAX: usize = 1024;
/// How long a greeting may take.
const GREETING_MAX: Duration = Duration::from_secs(5);
/// Greeted connections that the server has not taken.
const WAITING_MAX: usize = 64;
/// After a failure to accept, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What is known of the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    pub address: Option<SocketAddr>,
    /// What its certificate says; none where it showed none.
    pub certificate: Option<Arc<Shown>>,
}

/// What a certificate says, once it is known to be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    pub identity: Identity,
    /// Seconds of Unix time.
    pub not_before: i64,
    pub not_after: i64,
}

impl Shown {
    /// Whether it is too old by now.
    pub fn expired(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        now.is_ok_and(|now| now.as_secs() as i64 > self.not_after)
    }
}

/// Reads who a trusted certificate names: one of ours by its URI, one from elsewhere by its common name, which names a
/// user only.
pub fn shown(der: &CertificateDer<'_>) -> Option<Shown> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let names = certificate.subject_alternative_name().ok().flatten();
    let uris = names.iter().flat_map(|names| &names.value.general_names);
    let mut ours = uris.filter_map(|name| match name {
        GeneralName::URI(uri) if Identity::is_ours(uri) => Some(*uri),
        _ => None,
    });
    let identity = match (ours.next(), ours.next()) {
        (Some(uri), None) => Identity::parse(uri).ok()?,
        (Some(_), Some(_)) => return None,
        (None, _) => {
            let common = certificate.subject().iter_common_name().next()?;
            Identity::user(common.as_str().ok()?).ok()?
        }
    };
    Some(Shown {
        identity,
        not_before: certificate.validity().not_before.timestamp(),
        not_after: certificate.validity().not_after.timestamp(),
    })
}

/// A connection that was greeted.
pub struct Connection {
    io: Either<TcpStream, Box<TlsStream<TcpStream>>>,
    peer: Peer,
    /// Given back with the connection.
    _seat: Option<Seat>,
}

/// Takes connections in until who reads them has gone. Without a configuration they are plain.
pub fn incoming(
    listener: TcpListener,
    tls: Option<watch::Receiver<Arc<ServerConfig>>>,
) -> ReceiverStream<io::Result<Connection>> {
    let (greeted, connections) = mpsc::channel(WAITING_MAX);
    tokio::spawn(async move {
        let (room, seats) = (Room::default(), Seats::default());
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = greeted.closed() => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let place = room.place(network(address.ip()));
            let config = tls.as_ref().map(|tls| tls.borrow().clone());
            let (greeted, seats) = (greeted.clone(), seats.clone());
            tokio::spawn(async move {
                let greeting =
                    tokio::time::timeout(GREETING_MAX, greet(stream, address, config, &seats));
                let greeting = tokio::select! {
                    greeting = greeting => greeting,
                    () = place.given_up.cancelled() => return,
                };
                drop(place);
                match greeting {
                    // The server may be ending.
                    Ok(Ok(connection)) => drop(greeted.send(Ok(connection)).await),
                    Ok(Err(error)) => tracing::debug!(%address, %error, "no greeting"),
                    Err(_) => tracing::debug!(%address, "no greeting in time"),
                }
            });
        }
    });
    ReceiverStream::new(connections)
}

/// What belongs to one customer of a provider: an address of IPv4, a /64 of IPv6.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let mut octets = address.octets();
            octets[8..].fill(0);
            IpAddr::from(octets)
        }
        address => address,
    }
}

/// How many connections somebody has, or a network those who show nothing.
#[derive(Clone, Default)]
struct Seats {
    taken: Arc<Mutex<HashMap<String, usize>>>,
}

/// The right to be connected.
struct Seat {
    seats: Seats,
    whose: String,
}

impl Seats {
    fn take(&self, whose: &str, most: usize) -> Option<Seat> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.entry(whose.to_owned()).or_insert(0);
        if *own >= most {
            return None;
        }
        *own += 1;
        Some(Seat {
            seats: self.clone(),
            whose: whose.to_owned(),
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let taken = self.seats.taken.lock();
        let mut taken = taken.unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = taken.get_mut(&self.whose) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.whose);
            }
        }
    }
}

/// Who is being greeted, the oldest first.
#[derive(Clone, Default)]
struct Room {
    greeted: Arc<Mutex<VecDeque<(IpAddr, CancellationToken)>>>,
}

/// The right to be greeted, until it is given up for somebody else.
struct Place {
    room: Room,
    given_up: CancellationToken,
}

impl Room {
    fn place(&self, address: IpAddr) -> Place {
        let mut greeted = self.greeted.lock().unwrap_or_else(PoisonError::into_inner);
        let own = greeted
            .iter()
            .filter(|(other, _)| *other == address)
            .count();
        let oldest = match own >= GREETINGS_PER_ADDRESS_MAX {
            true => greeted.iter().position(|(other, _)| *other == address),
            false => (greeted.len() >= GREETINGS_MAX).then_some(0),
        };
        if let Some((_, given_up)) = oldest.and_then(|at| greeted.remove(at)) {
            given_up.cancel();
        }
        let given_up = CancellationToken::new();
        greeted.push_back((address, given_up.clone()));
        let room = self.clone();
        Place { room, given_up }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // It marks the one that goes, also where it is not waited for any more.
        self.given_up.cancel();
        let greeted = self.room.greeted.lock();
        let mut greeted = greeted.unwrap_or_else(PoisonError::into_inner);
        greeted.retain(|(_, given_up)| !given_up.is_cancelled());
    }
}

async fn greet(
    stream: TcpStream,
    address: SocketAddr,
    config: Option<Arc<ServerConfig>>,
    seats: &Seats,
) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    let Some(config) = config else {
        let peer = Peer {
            address: Some(address),
            certificate: None,
        };
        return Ok(Connection {
            io: Either::Left(stream),
            peer,
            _seat: None,
        });
    };
    let stream = TlsAcceptor::from(config).accept(stream).await?;
    let certificates = stream.get_ref().1.peer_certificates();
    let certificate = match certificates.and_then(|shown| shown.first()) {
        None => None,
        Some(der) => {
            let nobody = || io::Error::other("its certificate names nobody");
            Some(Arc::new(shown(der).ok_or_else(nobody)?))
        }
    };
    let (whose, most) = match &certificate {
        Some(shown) => (shown.identity.to_string(), NAMED_MAX),
        None => (network(address.ip()).to_string(), NAMELESS_MAX),
    };
    let full = || io::Error::other(format!("{whose} has {most} connections already"));
    let seat = Some(seats.take(&whose, most).ok_or_else(full)?);
    let peer = Peer {
        address: Some(address),
        certificate,
    };
    Ok(Connection {
        io: Either::Right(Box::new(stream)),
        peer,
        _seat: seat,
    })
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_what_one_customer_has() {
        let of = |text: &str| network(text.parse().unwrap());
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_eq!(of("2001:db8:1:2::3"), of("2001:db8:1:2:ffff::4"));
        assert_ne!(of("2001:db8:1:2::3"), of("2001:db8:1:3::3"));
    }

    #[test]
    fn a_seat_is_given_back_with_its_connection() {
        let seats = Seats::default();
        let mut taken: Vec<_> = (0..3)
            .map(|_| seats.take("users/ada", 3).unwrap())
            .collect();
        assert!(seats.take("users/ada", 3).is_none());
        assert!(seats.take("users/grace", 3).is_some());
        taken.pop();
        assert!(seats.take("users/ada", 3).is_some());
        taken.clear();
        assert!(seats.taken.lock().unwrap().is_empty());
    }

    #[test]
    fn the_oldest_makes_room_for_the_newest() {
        let room = Room::default();
        let from = |i: u8| IpAddr::from([10, 0, 0, i]);
        let mut places = vec![room.place(from(2))];
        places.extend((0..GREETINGS_PER_ADDRESS_MAX).map(|_| room.place(from(1))));
        let given_up = |places: &[Place]| {
            let at = places.iter().map(|place| place.given_up.is_cancelled());
            at.collect::<Vec<_>>().iter().position(|given_up| *given_up)
        };
        assert_eq!(given_up(&places), None);
        places.push(room.place(from(1)));
        assert_eq!(given_up(&places), Some(1), "the oldest of the same address");
        places.remove(1);
        for i in 3..10 {
            places.extend((0..GREETINGS_PER_ADDRESS_MAX).map(|_| room.place(from(i))));
        }
        assert_eq!(given_up(&places), Some(0), "the oldest of all");
        assert_eq!(room.greeted.lock().unwrap().len(), GREETINGS_MAX);
        places.clear();
        assert!(room.greeted.lock().unwrap().is_empty());
    }
}
