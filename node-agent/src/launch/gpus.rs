//! PURE. Which of a host's GPUs a process of a job sees.
//!
//! Every process of a job sees all GPUs that the agent registered, and no others: those are the ones the job was given with the node. Who
//! of several ranks of a node takes which is the rank's own to say, by `LOCAL_RANK` and what is like it, as scripts do that torchrun,
//! Horovod or mpirun start elsewhere: with one GPU each `torch.cuda.set_device(LOCAL_RANK)` would name a GPU that is not there. A framework
//! that takes the memory of whatever it sees gets a share instead (see `tensorflow`). A job's own variables come later and win.
//!
//! NVIDIA's GPUs are named by their numbers in the order of the bus, which is that of their driver's library too, and not by their UUIDs, which no
//! other GPU could ever have: much that reads the variable by itself takes numbers only. Where one of the numbers is missing nobody knows how
//! others count, and they are named by their UUIDs. That a number is still that of the GPU which was
//! registered is seen to before a job's processes start (see `gpus` of the shim). AMD's are named by their numbers among those that
//! their driver shows for computing. A host without GPUs of a maker does not set that maker's variable at all.

use std::collections::BTreeMap;

use batchai_common::ranks;
use serde::{Deserialize, Serialize};

/// Who makes a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Maker {
    Nvidia,
    Amd,
}

impl Maker {
    /// As nodes say it of themselves.
    pub fn name(self) -> &'static str {
        match self {
            Maker::Nvidia => "NVIDIA",
            Maker::Amd => "AMD",
        }
    }

    /// The variable that says which of its GPUs a process sees.
    pub fn variable(self) -> &'static str {
        match self {
            Maker::Nvidia => "CUDA_VISIBLE_DEVICES",
            Maker::Amd => "ROCR_VISIBLE_DEVICES",
        }
    }
}

/// A GPU that jobs on this host are given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    pub maker: Maker,
    /// Its driver's number.
    pub number: u32,
    /// The driver's UUID, or unique number; empty where it has none.
    pub uuid: String,
}

/// What says which numbers of NVIDIA's are meant: CUDA's own order is by speed.
const ORDER: (&str, &str) = ("CUDA_DEVICE_ORDER", "PCI_BUS_ID");

/// The variables of a process that sees `seen` of the GPUs of its host.
pub fn variables(all: &[Device], seen: &[Device]) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    for maker in [Maker::Nvidia, Maker::Amd] {
        let of = |device: &&Device| device.maker == maker;
        if !all.iter().any(|device| of(&device)) {
            continue;
        }
        // Where one of them could not be described, CUDA may not count it, or the driver may.
        let known = all.iter().filter(of).enumerate();
        let is_whole = known.fold(true, |whole, (at, device)| {
            whole && at == device.number as usize
        });
        let names = seen.iter().filter(of).map(|device| match is_whole {
            true => device.number.to_string(),
            false => device.uuid.clone(),
        });
        env.insert(
            maker.variable().to_owned(),
            names.collect::<Vec<_>>().join(","),
        );
        if maker == Maker::Nvidia {
            env.insert(ORDER.0.to_owned(), ORDER.1.to_owned());
        }
    }
    env
}

/// What the i-th of several processes gets that must not share GPUs: as many as the others, side by side. Where there are more processes than GPUs
/// they have to share.
pub fn share(all: &[Device], index: usize, count: usize) -> &[Device] {
    if all.len() < count {
        let at = index * all.len() / count;
        return &all[at.min(all.len())..(at + 1).min(all.len())];
    }
    &all[ranks::of_node(all.len(), count, index)]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn devices(nvidia: u32, amd: u32) -> Vec<Device> {
        let of = |maker, count| {
            (0..count).map(move |number| Device {
                maker,
                number,
                uuid: String::new(),
            })
        };
        of(Maker::Nvidia, nvidia)
            .chain(of(Maker::Amd, amd))
            .collect()
    }

    #[test]
    fn only_the_variables_of_makers_that_a_host_has_gpus_of_are_set() {
        let said = |all: &[Device], seen: &[Device]| -> Vec<String> {
            let all = variables(all, seen);
            all.iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect()
        };
        assert!(said(&[], &[]).is_empty());
        let order = "CUDA_DEVICE_ORDER=PCI_BUS_ID";
        let nvidia = devices(2, 0);
        assert_eq!(said(&nvidia, &nvidia), [order, "CUDA_VISIBLE_DEVICES=0,1"]);
        assert_eq!(said(&nvidia, &[]), [order, "CUDA_VISIBLE_DEVICES="]);
        let amd = devices(0, 2);
        assert_eq!(said(&amd, &amd[1..]), ["ROCR_VISIBLE_DEVICES=1"]);
        let both = devices(1, 1);
        let expected = [order, "CUDA_VISIBLE_DEVICES=0", "ROCR_VISIBLE_DEVICES="];
        assert_eq!(said(&both, &both[..1]), expected);
        // One in the middle could not be described.
        let mut some = [nvidia[0].clone(), devices(3, 0)[2].clone()];
        for device in &mut some {
            device.uuid = format!("GPU-{}", device.number);
        }
        let named = "CUDA_VISIBLE_DEVICES=GPU-0,GPU-2";
        assert_eq!(said(&some, &some), [order, named]);
    }

    proptest! {
        /// Nobody has another's, nobody has none where there are enough, and none is left over.
        #[test]
        fn shares_are_even(gpus in 0u32..17, count in 1usize..9) {
            let all = devices(gpus, 0);
            let shares: Vec<_> = (0..count).map(|index| share(&all, index, count)).collect();
            let sizes = shares.iter().map(|share| share.len());
            let (least, most) = (sizes.clone().min().unwrap(), sizes.max().unwrap());
            prop_assert!(most - least <= 1);
            let together: Vec<_> = shares.concat();
            if all.len() >= count {
                prop_assert_eq!(together, all);
            } else {
                // They share, and nobody goes without that need not.
                prop_assert_eq!(least, usize::from(!all.is_empty()));
                for device in &all {
                    prop_assert!(together.contains(device));
                }
            }
        }
    }
}
