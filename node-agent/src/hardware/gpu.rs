//! NVIDIA's GPUs, through the driver's own library, which is looked for when it is asked: no driver, no GPUs.
//!
//! A broken driver may not answer for ever, and a broken library end whoever asks. So that is always a process of its own: the agent starts
//! one when it describes the machine (`registered`), a shim forks one before a job starts (`used`); the kernel ends it when it takes too long
//! (`answer_in_time`). Nothing is kept: a driver that is loaded later is found when the agent starts anew.

use std::io::{self, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use batchai_proto::v1::Gpu;
use nix::unistd::alarm;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device as Handle, Nvml};
use serde::{Deserialize, Serialize};

use super::Found;
use crate::launch::{Device, Maker};

const MIB: u64 = 1 << 20;
/// No device has more.
const NV_LINKS_MAX: u32 = 18;
const GPUS_MAX: u32 = 64;
/// How long the driver may take to answer: it may first have to wake the GPUs, one after the other.
pub const ANSWER_MAX: Duration = Duration::from_secs(30);
/// Whom the kernel is to end has ended by then, or is stuck in it.
const END_MAX: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// What the driver says of a GPU.
#[derive(Debug, Serialize, Deserialize)]
struct Said {
    number: u32,
    uuid: String,
    model: String,
    memory_mib: i64,
    nv_link_count: i32,
}

/// Why it is not known who uses a GPU.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    #[error("{0}")]
    Library(#[from] NvmlError),
    #[error("GPU {number} was {registered} when the agent started, and is {uuid} now: restart it")]
    Another {
        number: u32,
        registered: String,
        uuid: String,
    },
    #[error("GPU {number} ({uuid}) does not answer: {source}")]
    Gpu {
        number: u32,
        uuid: String,
        source: NvmlError,
    },
}

/// From now on this process has so long; then the kernel ends it.
pub fn answer_in_time() {
    // What was left of an earlier time is of no interest.
    let _ = alarm::set(ANSWER_MAX.as_secs() as u32);
}

/// The GPUs in the driver's order, asked for by a process of this program's; none where it does not answer.
pub fn registered(own: &[&str]) -> Vec<Found> {
    let said = ask(own).unwrap_or_else(|error| {
        tracing::warn!(%error, "the NVIDIA driver cannot be asked: none of its GPUs is registered");
        Vec::new()
    });
    let found = said.into_iter().map(|said| Found {
        device: Device {
            maker: Maker::Nvidia,
            number: said.number,
            uuid: said.uuid.clone(),
        },
        gpu: Gpu {
            uuid: said.uuid,
            model: said.model,
            memory_mib: said.memory_mib,
            vendor: Maker::Nvidia.name().to_owned(),
            nv_link_count: said.nv_link_count,
        },
    });
    found.collect()
}

fn ask(own: &[&str]) -> io::Result<Vec<Said>> {
    let mut child = Command::new("/proc/self/exe")
        .arg0("batchai-gpus")
        .args(own)
        .arg("gpus")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let until = Instant::now() + ANSWER_MAX + END_MAX;
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            // It may be stuck in the kernel; nobody waits for it.
            None if Instant::now() >= until => return Err(io::Error::other("it does not end")),
            None => std::thread::sleep(PAUSE),
        }
    };
    if !status.success() {
        return Err(io::Error::other(format!(
            "who asked it has ended: {status}"
        )));
    }
    let mut answer = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
    }
    Ok(serde_json::from_slice(&answer)?)
}

/// The process that asks. What it finds is on standard output.
pub fn main() -> ExitCode {
    batchai_common::telemetry::init();
    answer_in_time();
    let said = serde_json::to_vec(&said()).expect("our own types have only string keys");
    match io::stdout().write_all(&said) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::warn!(%error, "the GPUs cannot be told of");
            ExitCode::FAILURE
        }
    }
}

fn said() -> Vec<Said> {
    let nvml = match Nvml::init() {
        Ok(nvml) => nvml,
        Err(
            NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound | NvmlError::DriverNotLoaded,
        ) => {
            return Vec::new();
        }
        Err(error) => {
            tracing::warn!(%error, "the NVIDIA driver is there but does not answer: no GPUs are registered");
            return Vec::new();
        }
    };
    let count = nvml.device_count().unwrap_or_else(|error| {
        tracing::warn!(%error, "the GPUs cannot be counted");
        0
    });
    (0..count.min(GPUS_MAX))
        .filter_map(|number| {
            let said = describe(&nvml, number);
            said.inspect_err(|error| tracing::warn!(%error, number, "a GPU cannot be described"))
                .ok()
        })
        .collect()
}

/// How many NVLinks are up. A device without them says so as an error.
fn nv_links(device: &Handle<'_>) -> i32 {
    let up = |link: &u32| device.link_wrapper_for(*link).is_active().unwrap_or(false);
    (0..NV_LINKS_MAX).filter(up).count() as i32
}

fn describe(nvml: &Nvml, number: u32) -> Result<Said, NvmlError> {
    let device = nvml.device_by_index(number)?;
    Ok(Said {
        number,
        uuid: device.uuid()?,
        model: device.name()?,
        memory_mib: (device.memory_info()?.total / MIB) as i64,
        nv_link_count: nv_links(&device),
    })
}

/// Which processes compute on these. Those that only draw do not count.
///
/// # Errors
/// Where the driver does not say, or does not have them any more: a job would find no GPU either.
pub fn used<'a>(devices: &[&'a Device]) -> Result<Vec<(&'a Device, i32)>, DriverError> {
    let mut used = Vec::new();
    if devices.is_empty() {
        return Ok(used);
    }
    let nvml = Nvml::init()?;
    for device in devices {
        let of = |source| DriverError::Gpu {
            number: device.number,
            uuid: device.uuid.clone(),
            source,
        };
        let handle = nvml.device_by_index(device.number).map_err(of)?;
        let uuid = handle.uuid().map_err(of)?;
        if uuid != device.uuid {
            return Err(DriverError::Another {
                number: device.number,
                registered: device.uuid.clone(),
                uuid,
            });
        }
        let processes = match handle.running_compute_processes() {
            // Nothing is known of who uses it then, and nothing held against anybody.
            Err(
                NvmlError::NotSupported
                | NvmlError::NoPermission
                | NvmlError::FailedToLoadSymbol(_),
            ) => Vec::new(),
            processes => processes.map_err(of)?,
        };
        let pids = processes.into_iter();
        used.extend(pids.map(|process| (*device, process.pid as i32)));
    }
    Ok(used)
}
