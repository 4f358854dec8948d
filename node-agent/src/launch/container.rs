//! PURE. The container of a job: from its settings and the facts of this host to where the image comes from, what of the host is seen in it,
//! and the command lines by which an engine fetches an image.
//!
//! Processes in it are planned as all others are. Only what the image brings is not known here: its variables, its PATH among them,
//! and its shell (`inside` puts them in when a process starts).

use std::collections::BTreeMap;

use batchai_common::images::{self, Image};
use batchai_common::paths::{below, is_within};
use serde::{Deserialize, Serialize};

use super::expand::expand;
use super::{Context, HostFacts, LaunchError, own_host};

/// By what images are pulled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    Docker,
    Podman,
}

/// What this host can do for containers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ability {
    /// Its agent may make file systems of jobs' own.
    pub able: bool,
    pub engine: Option<Engine>,
    /// Where it keeps images that are unpacked.
    pub images: String,
    /// The libraries that its own program is made with, the one that loads the others among them; none where it needs none.
    pub libraries: Vec<String>,
}

impl Ability {
    /// As a node says it of itself.
    pub fn image_sources(&self) -> Vec<String> {
        if !self.able {
            return Vec::new();
        }
        let engine = self.engine.map(Engine::name);
        let all = ["rootfs", "docker-archive"].into_iter().chain(engine);
        all.map(str::to_owned).collect()
    }
}

/// Where the root file system comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A directory.
    Rootfs(String),
    /// A file of layers.
    Archive(String),
    Engine(Reference),
}

/// An image that an engine knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    pub engine: Engine,
    pub name: String,
    /// Its registry, where it has one.
    pub registry: Option<String>,
    /// Who pulls it; nobody in particular where it is none.
    pub username: Option<String>,
}

/// A container on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    pub source: Source,
    /// What of this host is seen in it, at the same paths: the service's own.
    pub own: Vec<String>,
    /// The same: the job's, as far as its user may go there.
    pub wanted: Vec<String>,
    /// What of this host is seen in it elsewhere: the path here, and there.
    #[serde(default)]
    pub lent: Vec<(String, String)>,
    /// Where that is kept which is written beside what is seen of the host.
    pub layer: String,
    pub images: String,
    /// The home of the job's user in it.
    pub home: String,
    /// At most so much is in `/dev/shm`.
    pub shm_bytes: Option<u64>,
    /// The name of the log file of what makes it.
    pub log: String,
}

/// What every container has of the host as it is: devices first, the kernel's last.
pub const HOSTS: [&str; 3] = ["/dev", "/sys", "/proc"];
/// In the container's own memory.
pub const SHARED_MEMORY: &str = "/dev/shm";
/// Where that is in a container which is the service's own.
const LENT: &str = "/.batchai";
/// What the names of programs begin with that load libraries.
const LOADER: &str = "ld-";
/// Stands in variables for what the image says of its PATH.
const PATH_OF_IMAGE: &str = "/.batchai/path-of-the-image";
/// What docker gives an image that says nothing.
const PATH_WITHOUT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What command lines are read by, best first.
pub const SHELLS: [&str; 2] = ["/bin/bash", "/bin/sh"];

/// The container of a job, where it has one.
pub(super) fn of(context: &Context<'_>, suffix: &str) -> Result<Option<Container>, LaunchError> {
    let settings = context.job.container_settings.as_ref();
    let Some(settings) = settings.filter(|_| !context.assignment.set_up) else {
        return Ok(None);
    };
    let Ability {
        able,
        engine,
        images,
        ..
    } = &context.facts.containers;
    let node = || own_host(context.assignment).map(|host| host.node.clone());
    if !able {
        return Err(LaunchError::NoContainers { node: node()? });
    }
    let registry = settings.image_source_registry.as_ref();
    let registry = registry.ok_or(LaunchError::Incomplete { what: "image" })?;
    let path = |path: &str| expand("the image", path, &context.env);
    let by_engine = |name: String, registry: Option<String>, username: Option<String>| {
        let engine = engine.map(Ok).unwrap_or_else(|| {
            Err(LaunchError::NoEngine {
                node: node()?,
                image: name.clone(),
            })
        })?;
        Ok::<_, LaunchError>(Source::Engine(Reference {
            engine,
            name,
            registry,
            username,
        }))
    };
    let username = registry.credentials.as_ref();
    let username = username.map(|credentials| credentials.username.clone());
    let image = Image::read(&registry.image);
    let source = match image.map_err(|_| LaunchError::Incomplete { what: "image" })? {
        Image::Rootfs(at) => Source::Rootfs(path(&at)?),
        Image::Archive(at) => Source::Archive(path(&at)?),
        Image::Local(name) => by_engine(name, None, None)?,
        Image::Registry { host, reference } => by_engine(reference, Some(host), username)?,
    };
    let (own, wanted) = seen(context)?;
    Ok(Some(Container {
        source,
        own,
        wanted,
        lent: lent(context),
        layer: format!(
            "{}/.container/{}",
            context.paths.job_temp_dir, context.assignment.attempt
        ),
        images: images.clone(),
        home: context.paths.job_temp.clone(),
        shm_bytes: images::size(&settings.shm_size),
        log: format!("container{suffix}.log"),
    }))
}

/// The agent's own program with its libraries, by which processes reach other hosts: an image may have other libraries, or none.
fn lent(context: &Context<'_>) -> Vec<(String, String)> {
    if super::preparation::remote_shell(context).is_none() {
        return Vec::new();
    }
    let facts = context.facts;
    let program = facts.remote_shell.first().into_iter();
    let files = program.chain(&facts.containers.libraries);
    files.map(|path| (path.clone(), lent_as(path))).collect()
}

fn lent_as(path: &str) -> String {
    format!("{LENT}/{}", file_name(path))
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// How that program is started in a container: by its own loader, which finds its libraries beside it.
pub(super) fn remote_shell(facts: &HostFacts) -> Vec<String> {
    let Some((program, arguments)) = facts.remote_shell.split_first() else {
        return Vec::new();
    };
    let mut libraries = facts.containers.libraries.iter();
    let loader = libraries.find(|path| file_name(path).starts_with(LOADER));
    let by = loader.map(|loader| {
        let words = [&*lent_as(loader), "--library-path", LENT];
        words.map(str::to_owned)
    });
    let words = by.into_iter().flatten().chain([lent_as(program)]);
    words.chain(arguments.iter().cloned()).collect()
}

/// What of the host is seen: what lies in nothing else of it.
fn seen(context: &Context<'_>) -> Result<(Vec<String>, Vec<String>), LaunchError> {
    let Context { facts, paths, .. } = context;
    let mut own = vec![facts.root.clone()];
    let inputs = paths.inputs.iter().map(|directory| ("input", directory));
    let outputs = paths.outputs.iter();
    let directories = inputs.chain(outputs.map(|directory| ("output", directory)));
    let mut named: Vec<_> = directories
        .map(|(what, (id, path))| (format!("{what} directory {id}"), path))
        .collect();
    named.push(("the directory of logs".to_owned(), &paths.stdouterr));
    // Of another agent on this machine, whoever that is.
    let shared = paths.shared.is_some();
    let master = context.assignment.hosts.first().filter(|_| shared);
    named.extend(master.map(|master| ("the directory of rank 0's node".to_owned(), &master.root)));
    let plain = |(what, path): (String, &String)| {
        in_its_place(path).ok_or_else(|| LaunchError::NotSeen {
            what,
            path: path.clone(),
        })
    };
    let mut wanted = named
        .into_iter()
        .map(plain)
        .collect::<Result<Vec<_>, _>>()?;
    // That is there without: devices, processes and what the kernel shows are the host's.
    wanted.retain(|path| !comes_by_itself(path));
    for paths in [&mut own, &mut wanted] {
        paths.sort();
        paths.dedup();
    }
    let outermost = |path: &String, others: &[String]| {
        let around = |other: &&String| *other != path && is_within(path, other);
        !others.iter().any(|other| around(&other))
    };
    let (all_own, all_wanted) = (own.clone(), wanted.clone());
    own.retain(|path| outermost(path, &all_own));
    wanted.retain(|path| {
        outermost(path, &all_wanted) && !all_own.iter().any(|other| is_within(path, other))
    });
    Ok((own, wanted))
}

/// Whether a path lies in what every container has of the host. Memory that processes share is its own.
fn comes_by_itself(path: &str) -> bool {
    let within = |place: &str| is_within(path, place);
    HOSTS.into_iter().any(within) && !within(SHARED_MEMORY)
}

/// A path in its plain form, where what is there can be seen in the place that it has in a container: not the root, which would hide the image,
/// and nothing that leads up, which is another place wherever a link is on the way.
fn in_its_place(path: &str) -> Option<String> {
    let rest = path.strip_prefix('/')?;
    let below = below(rest.trim_start_matches('/'))?;
    Some(format!("/{below}"))
}

/// What processes in a container have of the host's variables: the image's stand in their place.
pub(super) fn base(host: &BTreeMap<String, String>, home: &str) -> BTreeMap<String, String> {
    let own = [("PATH", PATH_OF_IMAGE), ("HOME", home)];
    let own = own.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let zone = host.get("TZ").map(|zone| ("TZ".to_owned(), zone.clone()));
    own.into_iter().chain(zone).collect()
}

/// All variables of a process in a container whose image has these.
pub fn inside(
    planned: &BTreeMap<String, String>,
    of_image: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let path = of_image.get("PATH").map_or(PATH_WITHOUT, String::as_str);
    let planned = planned.iter();
    let planned = planned.map(|(name, value)| (name.clone(), value.replace(PATH_OF_IMAGE, path)));
    let mut all = of_image.clone();
    all.extend(planned);
    all
}

/// What is started in a container with this shell.
pub fn with_shell(argv: &[String], shell: &str) -> Vec<String> {
    let word = |(at, word): (usize, &String)| match at == 0 && word == SHELLS[0] {
        true => shell.to_owned(),
        false => word.clone(),
    };
    argv.iter().enumerate().map(word).collect()
}

/// Command lines of an engine: what stands in it names an image or a file, and no secret.
impl Engine {
    /// The program, and what a node calls it.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Docker => "docker",
            Engine::Podman => "podman",
        }
    }

    /// Fetches an image; `login` is a directory with a `config.json` in it that says who does.
    pub fn pull(self, image: &str, login: Option<&str>) -> Vec<String> {
        let words: Vec<String> = match (self, login) {
            (Engine::Docker, Some(login)) => vec!["--config".into(), login.into(), "pull".into()],
            (Engine::Podman, Some(login)) => {
                vec![
                    "pull".into(),
                    "--authfile".into(),
                    format!("{login}/config.json"),
                ]
            }
            (_, None) => vec!["pull".into()],
        };
        self.line(words, image)
    }

    /// Prints by which digest it knows an image, and how many bytes its files take.
    pub fn inspect(self, image: &str) -> Vec<String> {
        let words = ["image", "inspect", "--format", "{{.Id}} {{.Size}}"];
        self.line(words.map(str::to_owned).to_vec(), image)
    }

    /// Writes an image into a file.
    pub fn save(self, image: &str, to: &str) -> Vec<String> {
        self.line(vec!["save".into(), "--output".into(), to.into()], image)
    }

    fn line(self, words: Vec<String>, image: &str) -> Vec<String> {
        let program = std::iter::once(self.name().to_owned());
        program.chain(words).chain([image.to_owned()]).collect()
    }
}

/// By whose names docker and podman know the credentials of a registry.
pub fn login_names(registry: &str) -> Vec<&str> {
    match registry {
        "docker.io" => vec!["docker.io", "https://index.docker.io/v1/"],
        other => vec![other],
    }
}

/// What puts the libraries of the host's GPU driver into a root file system, and lists them there by the host's `ldconfig`.
pub fn gpu_line(root: &str, ldconfig: &str) -> Vec<String> {
    let ldconfig = format!("--ldconfig=@{ldconfig}");
    let words = [
        "nvidia-container-cli",
        "--load-kmods",
        "configure",
        "--no-cgroups",
        &ldconfig,
        "--device=all",
        "--compute",
        "--utility",
        root,
    ];
    words.map(str::to_owned).to_vec()
}

#[cfg(test)]
#[path = "container_tests.rs"]
mod tests;
