//! NVIDIA GPUs, through the driver's own library, which is looked for when the agent runs: no driver, no GPUs.

use batchai_proto::v1::Gpu;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

const MIB: u64 = 1 << 20;
/// No device has more.
const NV_LINKS_MAX: u32 = 18;

/// The GPUs in the driver's order.
pub fn gpus() -> Vec<Gpu> {
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
    (0..count)
        .filter_map(|index| {
            let gpu = describe(&nvml, index);
            gpu.inspect_err(|error| tracing::warn!(%error, index, "a GPU cannot be described"))
                .ok()
        })
        .collect()
}

/// How many NVLinks are up. A device without them says so as an error.
fn nv_links(device: &Device<'_>) -> i32 {
    let up = |link: &u32| device.link_wrapper_for(*link).is_active().unwrap_or(false);
    (0..NV_LINKS_MAX).filter(up).count() as i32
}

fn describe(nvml: &Nvml, index: u32) -> Result<Gpu, NvmlError> {
    let device = nvml.device_by_index(index)?;
    Ok(Gpu {
        uuid: device.uuid()?,
        model: device.name()?,
        memory_mib: (device.memory_info()?.total / MIB) as i64,
        vendor: "NVIDIA".to_owned(),
        nv_link_count: nv_links(&device),
    })
}
