//! Memory, boot id and image, as the operating system tells them. Reading and understanding are kept apart.

use std::collections::BTreeMap;
use std::fs;

use super::HardwareError;

const MEMINFO: &str = "/proc/meminfo";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const KERNEL: &str = "/proc/sys/kernel/osrelease";
const OS_RELEASE: &str = "/etc/os-release";

/// Kernels keep a little of the memory for themselves, not always the same: twin machines agree on this grid only.
const MEMORY_GRID_MIB: i64 = 2048;

fn read(path: &'static str) -> Result<String, HardwareError> {
    fs::read_to_string(path).map_err(|source| HardwareError::Read { path, source })
}

/// Memory in MiB.
pub fn memory_mib() -> Result<i64, HardwareError> {
    let why = "MemTotal is missing";
    parse_memory(&read(MEMINFO)?).ok_or(HardwareError::Parse { path: MEMINFO, why })
}

fn parse_memory(meminfo: &str) -> Option<i64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: i64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

/// The kernel's boot id: another after every boot, the same for all containers of a machine.
pub fn boot_id() -> Result<String, HardwareError> {
    Ok(read(BOOT_ID)?.trim().to_owned())
}

/// The kernel's release.
pub fn kernel_version() -> Result<String, HardwareError> {
    Ok(read(KERNEL)?.trim().to_owned())
}

/// `publisher:offer:sku:version` of the operating system: `debian:debian:12:latest`.
pub fn image() -> Result<String, HardwareError> {
    let why = "ID is missing";
    parse_image(&read(OS_RELEASE)?).ok_or(HardwareError::Parse {
        path: OS_RELEASE,
        why,
    })
}

fn parse_image(os_release: &str) -> Option<String> {
    let pairs = os_release.lines().filter_map(|line| line.split_once('='));
    let fields: BTreeMap<_, _> = pairs
        .map(|(k, v)| (k, v.trim_matches(['"', '\''])))
        .collect();
    let id = fields.get("ID")?;
    // Rolling releases have no version.
    let version = fields.get("VERSION_ID").unwrap_or(&"rolling");
    Some(format!("{id}:{id}:{version}:latest"))
}

/// A name for a VM size that nobody gave one.
pub fn size_name(cpu_cores: i32, memory_mib: i64, gpus: usize) -> String {
    let gib = memory_mib / MEMORY_GRID_MIB * MEMORY_GRID_MIB / 1024;
    match gpus {
        0 => format!("cpu{cpu_cores}-mem{gib}g"),
        _ => format!("cpu{cpu_cores}-mem{gib}g-gpu{gpus}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_says_is_understood() {
        let meminfo = "MemTotal:       24673512 kB\nMemFree:         1000 kB\n";
        assert_eq!(parse_memory(meminfo), Some(24_095));
        assert_eq!(parse_memory("MemTotal: lots"), None);
        let release = "PRETTY_NAME=\"Debian GNU/Linux 12\"\nID=debian\nVERSION_ID=\"12\"\n";
        assert_eq!(
            parse_image(release).as_deref(),
            Some("debian:debian:12:latest")
        );
        assert_eq!(
            parse_image("ID=arch\n").as_deref(),
            Some("arch:arch:rolling:latest")
        );
        assert_eq!(parse_image(""), None);
    }

    #[test]
    fn the_kernel_is_no_part_of_the_image() {
        let kernel = kernel_version().unwrap();
        assert!(!kernel.is_empty() && !image().unwrap().contains(&kernel));
    }

    #[test]
    fn twin_machines_have_one_size() {
        assert_eq!(size_name(2, 24_095, 0), "cpu2-mem22g");
        assert_eq!(size_name(2, 24_090, 0), size_name(2, 24_110, 0));
        assert_eq!(size_name(8, 65_536, 4), "cpu8-mem64g-gpu4");
    }
}
