//! Whether the ports that an attempt was given on this host are free there: the coordinator knows of its own attempts only.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};

use crate::status::FailureRecord;

/// The first of some ports that somebody else has. It is listened to for a moment, at all addresses, so that whoever holds it at one
/// of them is noticed.
pub fn in_use(ports: &[u16]) -> Option<u16> {
    let taken = |bound: io::Result<TcpListener>| {
        // A host without one of the two has no clash there.
        bound.is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
    };
    let mut ports = ports.iter().copied();
    // One after the other: the second also takes the first's addresses.
    ports.find(|port| {
        taken(TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)))
            || taken(TcpListener::bind((Ipv6Addr::UNSPECIFIED, *port)))
    })
}

/// One that the job was given and somebody else has: another is given when it runs again.
pub fn clash(port: u16) -> FailureRecord {
    FailureRecord {
        code: "PortInUse".into(),
        message: format!(
            "port {port}, which the job was given on this node, is in use there by something that is no job: ss -tlnp says what; \
             keep it out of the agent's --ports"
        ),
        details: vec![("port".into(), port.to_string())],
        infrastructure: true,
        ..FailureRecord::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_somebody_listens_to_at_any_address_is_found() {
        assert_eq!(in_use(&[]), None);
        let held = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = held.local_addr().unwrap().port();
        assert_eq!(in_use(&[port]), Some(port));
        drop(held);
        assert_eq!(in_use(&[port]), None);
        if let Ok(held) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) {
            let port = held.local_addr().unwrap().port();
            assert_eq!(in_use(&[port]), Some(port));
        }
    }
}
