//! Where a daemon may listen.

use std::net::SocketAddr;

/// Why an address is refused.
#[derive(Debug, thiserror::Error)]
#[error(
    "refusing to listen on {0}: without TLS anyone who reaches that address could run commands on every node. \
     Listen on loopback, or give --insecure-lab in a network that nobody else can reach"
)]
pub struct NotLoopback(pub SocketAddr);

/// Without TLS only loopback may be listened on, unless the operator says that the network is a lab of its own.
pub fn check(address: SocketAddr, insecure_lab: bool) -> Result<(), NotLoopback> {
    if address.ip().is_loopback() {
        return Ok(());
    }
    if !insecure_lab {
        return Err(NotLoopback(address));
    }
    tracing::warn!(%address, "--insecure-lab: listening without TLS; anyone who reaches this address is an administrator");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_without_the_flag() {
        for (text, flag, ok) in [
            ("127.0.0.1:1", false, true),
            ("127.9.9.9:1", false, true),
            ("[::1]:1", false, true),
            ("0.0.0.0:1", false, false),
            ("10.0.0.1:1", false, false),
            ("[::]:1", false, false),
            ("0.0.0.0:1", true, true),
        ] {
            assert_eq!(
                check(text.parse().unwrap(), flag).is_ok(),
                ok,
                "{text} {flag}"
            );
        }
    }
}
