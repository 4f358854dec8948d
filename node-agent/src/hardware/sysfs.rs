//! What the kernel shows of the machine's devices below `/sys`. What is not there is not had; nothing here fails.

use std::fs;
use std::path::{Path, PathBuf};

use batchai_proto::v1::{Disk, Gpu, NumaNode, RdmaDevice};

use super::Found;
use crate::launch::{Device, Maker};

const LIST_MAX: usize = 64;
const SECTOR_BYTES: i64 = 512;
/// Memory of AMD's GPUs that the host sees, and that it does not.
const AMD_HEAPS: [u64; 2] = [1, 2];
/// The maker whose product names are sizes by themselves.
const EC2: &str = "Amazon EC2";
/// What product names begin with that say nothing of a machine.
const NAMELESS: [&str; 14] = [
    "Standard PC",
    "KVM",
    "QEMU",
    "Virtual Machine",
    "VMware",
    "VirtualBox",
    "Google Compute Engine",
    "HVM domU",
    "Bochs",
    "OpenStack",
    "To Be Filled",
    "System Product Name",
    "Default string",
    "None",
];

/// The tree, or a twin of it.
pub struct Sysfs {
    root: PathBuf,
}

impl Sysfs {
    pub fn of_this_machine() -> Sysfs {
        Sysfs {
            root: "/sys".into(),
        }
    }

    fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        let text = fs::read_to_string(self.root.join(path)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    fn number(&self, path: impl AsRef<Path>) -> Option<i64> {
        self.text(path)?.parse().ok()
    }

    /// The names in a directory, in order, at most so many.
    fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.root.join(path)).into_iter().flatten();
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    /// Disks that are devices: no loops, memory or mere arrangements of others.
    pub fn disks(&self) -> Vec<Disk> {
        let disk = |name: String| {
            let at = PathBuf::from("block").join(&name);
            self.root.join(&at).join("device").exists().then_some(())?;
            let size = self.number(at.join("size")).filter(|size| *size > 0)?;
            Some(Disk {
                size_bytes: size.checked_mul(SECTOR_BYTES)?,
                rotational: self.number(at.join("queue/rotational")) == Some(1),
                name,
            })
        };
        let names = self.names("block").into_iter();
        names.filter_map(disk).take(LIST_MAX).collect()
    }

    pub fn numa_nodes(&self) -> Vec<NumaNode> {
        let all = Path::new("devices/system/node");
        let node = |name: String| {
            let id = name.strip_prefix("node")?.parse().ok()?;
            let memory = self.text(all.join(&name).join("meminfo"))?;
            // Node 0 MemTotal:       24683740 kB
            let total = memory
                .lines()
                .find_map(|line| line.split_once("MemTotal:"))?
                .1;
            let kib: i64 = total.trim().strip_suffix(" kB")?.trim().parse().ok()?;
            Some(NumaNode {
                id,
                cpus: self
                    .text(all.join(&name).join("cpulist"))
                    .unwrap_or_default(),
                memory_mib: kib / 1024,
            })
        };
        let names = self.names(all).into_iter();
        let mut nodes: Vec<_> = names.filter_map(node).take(LIST_MAX).collect();
        nodes.sort_by_key(|node| node.id);
        nodes
    }

    /// InfiniBand and RoCE, a port each.
    pub fn rdma_devices(&self) -> Vec<RdmaDevice> {
        let all = Path::new("class/infiniband");
        let ports = self.names(all).into_iter().flat_map(|device| {
            let ports = all.join(&device).join("ports");
            let names = self.names(&ports).into_iter();
            let described = names.map(|port| {
                let at = ports.join(&port);
                let text = |file: &str| self.text(at.join(file)).unwrap_or_default();
                let state = text("state");
                RdmaDevice {
                    name: format!("{device}/{port}"),
                    link_layer: text("link_layer"),
                    // 4: ACTIVE
                    port_state: state.split(": ").last().unwrap_or_default().to_owned(),
                    rate: text("rate"),
                }
            });
            described.collect::<Vec<_>>()
        });
        ports.take(LIST_MAX).collect()
    }

    /// What the driver of AMD's GPUs shows for computing, in its order: numbers are by it.
    fn amd_nodes(&self) -> Vec<PathBuf> {
        let all = Path::new("class/kfd/kfd/topology/nodes");
        let mut names: Vec<u32> = self
            .names(all)
            .iter()
            .filter_map(|n| n.parse().ok())
            .collect();
        names.sort_unstable();
        let nodes = names.into_iter().map(|name| all.join(name.to_string()));
        // Processors are nodes as well.
        let computes = |at: &PathBuf| self.property(at.join("properties"), "simd_count") > Some(0);
        nodes.filter(computes).take(LIST_MAX).collect()
    }

    /// Of a file of lines with a name and a number.
    fn property(&self, path: impl AsRef<Path>, name: &str) -> Option<u64> {
        let text = self.text(path)?;
        let mut pairs = text.lines().filter_map(|line| line.split_once(' '));
        pairs
            .find(|(known, _)| *known == name)?
            .1
            .trim()
            .parse()
            .ok()
    }

    /// AMD's GPUs, as their driver shows them.
    pub fn amd_gpus(&self) -> Vec<Found> {
        let nodes = self.amd_nodes().into_iter().enumerate();
        let found = nodes.map(|(number, at)| {
            let id = self.property(at.join("properties"), "unique_id");
            // As AMD's own programs write it.
            let uuid = id.filter(|id| *id > 0).map(|id| format!("GPU-{id:016x}"));
            let uuid = uuid.unwrap_or_default();
            let minor = self.property(at.join("properties"), "drm_render_minor");
            let card = minor.map(|minor| format!("class/drm/renderD{minor}/device/product_name"));
            let product = card.and_then(|card| self.text(card));
            let model = product.or_else(|| self.text(at.join("name")));
            Found {
                device: Device {
                    maker: Maker::Amd,
                    number: number as u32,
                    uuid: uuid.clone(),
                },
                gpu: Gpu {
                    uuid,
                    model: model.unwrap_or_default(),
                    memory_mib: self.amd_memory_mib(&at),
                    vendor: Maker::Amd.name().to_owned(),
                    nv_link_count: 0,
                },
            }
        });
        found.collect()
    }

    /// The memory on a GPU, whether the host sees all of it or not.
    fn amd_memory_mib(&self, node: &Path) -> i64 {
        let banks = node.join("mem_banks");
        let sizes = self.names(&banks).into_iter().filter_map(|bank| {
            let at = banks.join(bank).join("properties");
            let heap = self.property(&at, "heap_type");
            heap.is_some_and(|heap| AMD_HEAPS.contains(&heap))
                .then_some(())?;
            self.property(&at, "size_in_bytes")
        });
        let bytes = sizes.fold(0, u64::saturating_add);
        (bytes >> 20) as i64
    }

    /// Which processes have memory on these of them.
    ///
    /// # Errors
    /// One is not what was registered.
    pub fn amd_used<'a>(&self, devices: &[&'a Device]) -> Result<Vec<(&'a Device, i32)>, String> {
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        let now = self.amd_gpus();
        let nodes = self.amd_nodes();
        let mut used = Vec::new();
        for device in devices {
            let number = device.number as usize;
            let same = now.get(number).is_some_and(|now| now.device == **device);
            let at = nodes.get(number).filter(|_| same);
            let Some(id) = at.and_then(|at| self.text(at.join("gpu_id"))) else {
                let uuid = &device.uuid;
                return Err(format!(
                    "GPU {number} was {uuid} when the agent started, and is not now: restart it"
                ));
            };
            let all = Path::new("class/kfd/kfd/proc");
            let holds = |pid: &i32| {
                let bytes = self.number(all.join(pid.to_string()).join(format!("vram_{id}")));
                bytes > Some(0)
            };
            let names = self.names(all);
            let pids = names.iter().filter_map(|name| name.parse().ok());
            used.extend(pids.filter(holds).map(|pid| (*device, pid)));
        }
        Ok(used)
    }

    /// A name for the machine's size: the maker's name of the machine in front of what it has, where it has one.
    pub fn size_name(&self, made: &str) -> String {
        let dmi = Path::new("class/dmi/id");
        let Some(product) = self.text(dmi.join("product_name")) else {
            return made.to_owned();
        };
        if self.text(dmi.join("sys_vendor")).as_deref() == Some(EC2) {
            return product;
        }
        let lower = product.to_lowercase();
        let nameless = NAMELESS
            .iter()
            .any(|name| lower.starts_with(&name.to_lowercase()));
        let legal = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        let slug: String = product.chars().map(legal).collect();
        let slug = slug.trim_matches('-');
        match nameless || slug.is_empty() {
            true => made.to_owned(),
            false => format!("{slug}-{made}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree with these files.
    fn twin(files: &[(&str, &str)]) -> (tempfile::TempDir, Sysfs) {
        let dir = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let root = dir.path().to_owned();
        (dir, Sysfs { root })
    }

    #[test]
    fn disks_are_devices_with_a_size() {
        let (_dir, sysfs) = twin(&[
            ("block/nvme0n1/device/model", "x"),
            ("block/nvme0n1/size", "7501476528\n"),
            ("block/nvme0n1/queue/rotational", "0\n"),
            ("block/sda/device/model", "x"),
            ("block/sda/size", "2048"),
            ("block/sda/queue/rotational", "1"),
            ("block/sr0/device/model", "x"),
            ("block/sr0/size", "0"),
            ("block/loop0/size", "100"),
            ("block/broken/device/model", "x"),
            ("block/broken/size", "many"),
        ]);
        let disks = sysfs.disks();
        assert_eq!(disks.len(), 2, "{disks:?}");
        assert_eq!(
            (disks[0].name.as_str(), disks[0].rotational),
            ("nvme0n1", false)
        );
        assert_eq!(disks[0].size_bytes, 3_840_755_982_336);
        assert_eq!((disks[1].size_bytes, disks[1].rotational), (1 << 20, true));
    }

    #[test]
    fn memory_of_its_own_and_remote_access_to_it_are_found() {
        let meminfo = "Node 1 MemTotal:       131072 kB\nNode 1 MemFree: 1 kB\n";
        let port = "class/infiniband/mlx5_0/ports/1";
        let (_dir, sysfs) = twin(&[
            ("devices/system/node/node10/meminfo", meminfo),
            ("devices/system/node/node1/meminfo", meminfo),
            ("devices/system/node/node1/cpulist", "8-15,24-31\n"),
            ("devices/system/node/online", "0-1"),
            (&format!("{port}/link_layer"), "InfiniBand\n"),
            (&format!("{port}/state"), "4: ACTIVE\n"),
            (&format!("{port}/rate"), "200 Gb/sec (4X HDR)\n"),
        ]);
        let nodes = sysfs.numa_nodes();
        assert_eq!(
            nodes.iter().map(|node| node.id).collect::<Vec<_>>(),
            [1, 10]
        );
        assert_eq!(
            (nodes[0].cpus.as_str(), nodes[0].memory_mib),
            ("8-15,24-31", 128)
        );
        let rdma = sysfs.rdma_devices();
        let expected = RdmaDevice {
            name: "mlx5_0/1".into(),
            link_layer: "InfiniBand".into(),
            port_state: "ACTIVE".into(),
            rate: "200 Gb/sec (4X HDR)".into(),
        };
        assert_eq!(rdma, [expected]);
    }

    /// A processor and two GPUs, of which the first is known by all that there can be and the second by little.
    fn machine_of_amd() -> (tempfile::TempDir, Sysfs) {
        let nodes = "class/kfd/kfd/topology/nodes";
        let at = |path: &str| format!("{nodes}/{path}");
        let first = "cpu_cores_count 0\nsimd_count 416\nunique_id 23067\ndrm_render_minor 128\n";
        let held = "class/kfd/kfd/proc";
        twin(&[
            (&at("0/properties"), "cpu_cores_count 64\nsimd_count 0\n"),
            (&at("0/gpu_id"), "0\n"),
            (&at("2/properties"), first),
            (&at("2/gpu_id"), "33743\n"),
            (&at("2/name"), "gfx90a\n"),
            (
                &at("2/mem_banks/0/properties"),
                "heap_type 1\nsize_in_bytes 68702699520\n",
            ),
            (
                &at("2/mem_banks/1/properties"),
                "heap_type 4\nsize_in_bytes 65536\n",
            ),
            // Its number is by the number of the node, and not by its name.
            (&at("10/properties"), "simd_count 256\nunique_id 0\n"),
            (&at("10/gpu_id"), "55\n"),
            (&at("10/name"), "vega20\n"),
            (
                &at("10/mem_banks/0/properties"),
                "heap_type 2\nsize_in_bytes 1048576\n",
            ),
            (
                "class/drm/renderD128/device/product_name",
                "AMD Instinct MI210",
            ),
            (&format!("{held}/7/vram_33743"), "0\n"),
            (&format!("{held}/7/vram_55"), "4096\n"),
            (&format!("{held}/8/pasid"), "1\n"),
        ])
    }

    #[test]
    fn gpus_of_amd_are_what_their_driver_shows_for_computing() {
        let (_dir, sysfs) = machine_of_amd();
        let found = sysfs.amd_gpus();
        let numbers: Vec<_> = found.iter().map(|found| found.device.number).collect();
        assert_eq!(numbers, [0, 1]);
        let gpus: Vec<_> = found.into_iter().map(|found| found.gpu).collect();
        let expected = Gpu {
            uuid: "GPU-0000000000005a1b".into(),
            model: "AMD Instinct MI210".into(),
            memory_mib: 65_520,
            vendor: "AMD".into(),
            nv_link_count: 0,
        };
        let plain = Gpu {
            uuid: String::new(),
            model: "vega20".into(),
            memory_mib: 1,
            ..expected.clone()
        };
        assert_eq!(gpus, [expected, plain]);
        assert!(twin(&[]).1.amd_gpus().is_empty());
    }

    #[test]
    fn who_has_memory_on_a_gpu_of_amd_uses_it() {
        let (_dir, sysfs) = machine_of_amd();
        let devices: Vec<_> = sysfs.amd_gpus().into_iter().map(|it| it.device).collect();
        let all: Vec<_> = devices.iter().collect();
        assert_eq!(sysfs.amd_used(&all).unwrap(), [(&devices[1], 7)]);
        assert!(sysfs.amd_used(&all[..1]).unwrap().is_empty());
        let mut other = devices[0].clone();
        other.uuid = "GPU-other".to_owned();
        assert!(sysfs.amd_used(&[&other]).is_err());
        other.number = 7;
        assert!(sysfs.amd_used(&[&other]).is_err());
    }

    #[test]
    fn a_machine_has_its_makers_name_where_that_says_something() {
        for (product, vendor, expected) in [
            (
                "PowerEdge R740xd",
                "Dell Inc.",
                "PowerEdge-R740xd-cpu2-mem22g",
            ),
            ("m5.xlarge", "Amazon EC2", "m5.xlarge"),
            ("Standard PC (Q35 + ICH9, 2009)", "QEMU", "cpu2-mem22g"),
            ("Virtual Machine", "Microsoft Corporation", "cpu2-mem22g"),
            ("To be filled by O.E.M.", "", "cpu2-mem22g"),
            ("???", "", "cpu2-mem22g"),
        ] {
            let (_dir, sysfs) = twin(&[
                ("class/dmi/id/product_name", product),
                ("class/dmi/id/sys_vendor", vendor),
            ]);
            assert_eq!(sysfs.size_name("cpu2-mem22g"), expected, "{product}");
        }
        assert_eq!(twin(&[]).1.size_name("cpu2-mem22g"), "cpu2-mem22g");
    }
}
