use batchai_proto::agent::v1::Assignment;
use batchai_proto::v1;

use super::super::tests::{assignment, custom, facts};
use super::super::{HostFacts, plan};
use super::*;

const PASSWORD: &str = "hunter2";

fn in_container(image: &str) -> v1::Job {
    let directory = |id: &str, path: &str| v1::OutputDirectory {
        id: id.into(),
        path_prefix: path.into(),
        ..Default::default()
    };
    let input = |id: &str, path: &str| v1::InputDirectory {
        id: id.into(),
        path: path.into(),
    };
    v1::Job {
        container_settings: Some(v1::ContainerSettings {
            image_source_registry: Some(v1::ImageSourceRegistry {
                image: image.into(),
                server_url: String::new(),
                credentials: Some(v1::PrivateRegistryCredentials {
                    username: "reader".into(),
                    password: PASSWORD.into(),
                    ..Default::default()
                }),
            }),
            shm_size: "64m".into(),
        }),
        input_directories: vec![
            input("DATA", "//data/./in/"),
            input("DEVICES", "/dev"),
            input("MEMORY", "/dev/shm/given"),
            input("GPUS", "/proc/driver/nvidia"),
        ],
        output_directories: vec![
            directory("M", "/data/in/deep"),
            directory("R", "$AZ_BATCHAI_MOUNT_ROOT/x"),
        ],
        job_preparation: Some(v1::JobPreparation {
            command_line: "prepare".into(),
        }),
        ..custom()
    }
}

fn container(assignment: &Assignment, facts: &HostFacts) -> Result<Option<Container>, LaunchError> {
    plan(assignment, facts).map(|plan| plan.preparation.container)
}

fn source(image: &str) -> Source {
    let assignment = assignment(1, 0, in_container(image));
    container(&assignment, &facts()).unwrap().unwrap().source
}

#[test]
fn a_container_has_the_jobs_directories_and_what_is_written_in_it_lies_with_the_jobs_own() {
    let image = "team.example.org/train:1";
    let made = container(&assignment(1, 0, in_container(image)), &facts());
    let made = made.unwrap().unwrap();
    assert_eq!(made.own, ["/r"]);
    // Of another agent's directory it has what its user has without a container.
    assert_eq!(made.wanted, ["/data/in", "/dev/shm/given", "/root0"]);
    assert_eq!(made.layer, "/r/jobs/.container/1-7");
    assert_eq!(made.shm_bytes, Some(64 << 20));
    assert_eq!(
        (&*made.home, &*made.log),
        ("/r/jobs/w/e/j", "container.log")
    );
    assert!(made.lent.is_empty());
    // Who reaches other hosts does so by the agent's own program, with the libraries that it is made with.
    let two = container(&assignment(2, 1, in_container(image)), &facts());
    let two = two.unwrap().unwrap();
    assert_eq!(two.own, ["/r"]);
    let lent = [
        ("/it's/batchai", "/.batchai/batchai"),
        ("/lib/libc.so.6", "/.batchai/libc.so.6"),
        ("/lib/ld-linux.so.2", "/.batchai/ld-linux.so.2"),
    ];
    assert_eq!(
        two.lent,
        lent.map(|(from, to)| (from.to_owned(), to.to_owned()))
    );
    let script = |facts: &HostFacts| {
        let plan = plan(&assignment(2, 1, in_container(image)), facts).unwrap();
        let files = plan.preparation.files.into_iter();
        files
            .map(|(_, text)| text)
            .find(|text| text.contains("remote-shell"))
            .unwrap()
    };
    let by_loader = "unset LD_PRELOAD\nexec '/.batchai/ld-linux.so.2' '--library-path' '/.batchai' '/.batchai/batchai' 'remote-shell' \"$@\"\n";
    assert!(
        script(&facts()).ends_with(by_loader),
        "{}",
        script(&facts())
    );
    // One that is made without is started as it is.
    let mut alone = facts();
    alone.containers.libraries.clear();
    assert!(script(&alone).ends_with("exec '/.batchai/batchai' 'remote-shell' \"$@\"\n"));
    assert_eq!(two.log, "container-n1.log");
}

#[test]
fn what_cannot_be_seen_in_its_place_is_refused_by_name() {
    for path in [
        "/",
        "//",
        "/.",
        "/mnt/..",
        "/mnt/../data",
        "data",
        "./data",
        "",
    ] {
        let mut job = in_container("rootfs:/a");
        job.input_directories[0].path = path.into();
        let refused = LaunchError::NotSeen {
            what: "input directory DATA".into(),
            path: path.into(),
        };
        let made = container(&assignment(1, 0, job.clone()), &facts());
        assert_eq!(made, Err(refused), "{path:?}");
        // Without one it is the node's own.
        job.container_settings = None;
        assert!(container(&assignment(1, 0, job), &facts()).is_ok());
    }
}

#[test]
fn images_come_from_where_their_names_say() {
    let reference = |name: &str, registry: Option<&str>, username: Option<&str>| {
        Source::Engine(Reference {
            engine: Engine::Podman,
            name: name.to_owned(),
            registry: registry.map(str::to_owned),
            username: username.map(str::to_owned),
        })
    };
    let hub = reference(
        "docker.io/library/ubuntu",
        Some("docker.io"),
        Some("reader"),
    );
    assert_eq!(source("ubuntu"), hub);
    assert_eq!(
        source("localhost/a:1"),
        reference("localhost/a:1", None, None)
    );
    let path = "$AZ_BATCHAI_MOUNT_ROOT/a";
    assert_eq!(
        source(&format!("rootfs:{path}")),
        Source::Rootfs("/r/mounts/a".into())
    );
    assert_eq!(
        source(&format!("docker-archive:{path}")),
        Source::Archive("/r/mounts/a".into())
    );
}

#[test]
fn who_has_no_containers_or_no_engine_says_so() {
    let without = |able: bool| HostFacts {
        containers: Ability {
            able,
            ..Ability::default()
        },
        ..facts()
    };
    let of =
        |image: &str, able: bool| container(&assignment(1, 0, in_container(image)), &without(able));
    let node = || "nodes/n0".to_owned();
    assert_eq!(
        of("rootfs:/a", false),
        Err(LaunchError::NoContainers { node: node() })
    );
    let image = "docker.io/library/ubuntu".to_owned();
    assert_eq!(
        of("ubuntu", true),
        Err(LaunchError::NoEngine {
            node: node(),
            image
        })
    );
    assert!(of("rootfs:/a", true).unwrap().is_some());
    assert_eq!(
        container(&assignment(1, 0, custom()), &without(false)),
        Ok(None)
    );
    assert_eq!(
        facts().containers.image_sources(),
        ["rootfs", "docker-archive", "podman"]
    );
    assert!(without(false).containers.image_sources().is_empty());
}

#[test]
fn variables_are_the_images_where_the_job_has_none_and_never_the_hosts() {
    let plan = plan(&assignment(2, 0, in_container("ubuntu")), &facts()).unwrap();
    let of = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        let pairs = pairs.iter();
        pairs
            .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
            .collect()
    };
    let image = of(&[
        ("PATH", "/opt/bin:/bin"),
        ("LD_LIBRARY_PATH", "/opt/lib"),
        ("HOME", "/root"),
        ("CUDA_VISIBLE_DEVICES", "7"),
    ]);
    for process in plan.processes.iter().chain(&plan.preparation.command) {
        let env = inside(&process.env, &image);
        assert_eq!(env["PATH"], "/r/jobs/w/e/j/.bin:/opt/bin:/bin");
        assert_eq!(env["LD_LIBRARY_PATH"], "/opt/lib");
        assert_eq!(env["HOME"], "/r/jobs/w/e/j");
        // Whatever the image says of them.
        assert_eq!(env["CUDA_VISIBLE_DEVICES"], "0,1,2,3");
        let without = inside(&process.env, &BTreeMap::new());
        assert_eq!(
            without["PATH"],
            format!("/r/jobs/w/e/j/.bin:{PATH_WITHOUT}")
        );
    }
    let bash = ["/bin/bash", "-c", "/bin/bash"].map(str::to_owned);
    assert_eq!(with_shell(&bash, "/bin/sh"), ["/bin/sh", "-c", "/bin/bash"]);
    assert_eq!(with_shell(&bash[1..], "/bin/sh"), bash[1..]);
}

/// Of docker, and of what gives a container the libraries of a GPU, only the command lines are tried: neither runs where tests do.
#[test]
fn engines_are_told_names_and_paths_only() {
    let image = "team.example.org/train:1";
    let line = |words: Vec<String>| words.join(" ");
    let (docker, podman) = (Engine::Docker, Engine::Podman);
    let login = Some("/l");
    for (told, expected) in [
        (
            docker.pull(image, login),
            "docker --config /l pull team.example.org/train:1",
        ),
        (
            docker.pull(image, None),
            "docker pull team.example.org/train:1",
        ),
        (
            docker.inspect(image),
            "docker image inspect --format {{.Id}} {{.Size}} team.example.org/train:1",
        ),
        (docker.save("a1b2", "/to"), "docker save --output /to a1b2"),
        (
            podman.pull(image, login),
            "podman pull --authfile /l/config.json team.example.org/train:1",
        ),
        (
            podman.pull(image, None),
            "podman pull team.example.org/train:1",
        ),
        (
            podman.inspect(image),
            "podman image inspect --format {{.Id}} {{.Size}} team.example.org/train:1",
        ),
        (podman.save("a1b2", "/to"), "podman save --output /to a1b2"),
        (
            gpu_line("/root", "/sbin/ldconfig.real"),
            "nvidia-container-cli --load-kmods configure --no-cgroups --ldconfig=@/sbin/ldconfig.real --device=all --compute --utility /root",
        ),
    ] {
        assert_eq!(line(told), expected);
    }
    assert_eq!(
        login_names("docker.io"),
        ["docker.io", "https://index.docker.io/v1/"]
    );
    assert_eq!(login_names("a.b:5000"), ["a.b:5000"]);
}

#[test]
fn no_password_is_in_a_plan() {
    let plan = plan(&assignment(2, 0, in_container("ubuntu")), &facts()).unwrap();
    let text = serde_json::to_string(&(&plan.preparation, &plan.processes)).unwrap();
    assert!(
        text.contains("reader") && !text.contains(PASSWORD),
        "{text}"
    );
}
