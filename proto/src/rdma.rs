//! PURE. What counts as InfiniBand: who tells a job's hosts of each other and who tells its processes must agree.

use crate::v1::RdmaDevice;

/// Whether a port is one of InfiniBand, and up. RoCE is none: whether it works between two hosts is their network's to say.
pub fn is_infiniband(port: &RdmaDevice) -> bool {
    port.link_layer == "InfiniBand" && port.port_state == "ACTIVE"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_of_roce_or_one_that_is_down_is_none() {
        let port = |link_layer: &str, port_state: &str| RdmaDevice {
            link_layer: link_layer.into(),
            port_state: port_state.into(),
            ..RdmaDevice::default()
        };
        assert!(is_infiniband(&port("InfiniBand", "ACTIVE")));
        assert!(!is_infiniband(&port("InfiniBand", "INIT")));
        assert!(!is_infiniband(&port("Ethernet", "ACTIVE")));
        assert!(!is_infiniband(&RdmaDevice::default()));
    }
}
