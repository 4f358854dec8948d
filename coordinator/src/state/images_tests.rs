//! Jobs in containers wait for nodes that can have their images, and keep nobody else waiting.

use batchai_proto::internal::v1::RegisterNode;
use batchai_proto::internal::v1::command::Kind as C;

use crate::scheduler::explain::pending_reason;
use crate::scheduler::schedule;
use crate::state::tests::Ensemble;
use crate::state::*;

/// A node joins, or its agent begins anew and says what it has.
fn join(e: &mut Ensemble, node: &str, sources: &[&str]) {
    let sources = sources.iter().map(|source| (*source).to_owned());
    let facts = v1::NodeFacts {
        vm_size: "small".into(),
        boot_id: "one-machine".into(),
        first_port: 20_000,
        last_port: 20_099,
        image_sources: sources.collect(),
        ..Default::default()
    };
    e.ok(C::RegisterNode(RegisterNode {
        name: node.into(),
        uid: format!("uid-{node}"),
        incarnation: "1".into(),
        facts: Some(facts),
        empty: true,
    }));
    e.heard.last.insert(node.into(), e.heard.now);
}

/// A cluster of nodes that have these.
fn ensemble(sources: &[&[&str]]) -> Ensemble {
    let mut e = Ensemble::new(i32::try_from(sources.len()).unwrap());
    for (i, sources) in sources.iter().enumerate() {
        join(&mut e, &format!("nodes/n{i}"), sources);
    }
    e.settle();
    e
}

fn in_image(image: &str) -> impl FnOnce(&mut v1::Job) {
    let registry = v1::ImageSourceRegistry {
        image: image.into(),
        ..Default::default()
    };
    let settings = v1::ContainerSettings {
        image_source_registry: Some(registry),
        ..Default::default()
    };
    |job| job.container_settings = Some(settings)
}

/// Which nodes get which job.
fn placed(e: &Ensemble) -> Vec<(String, Vec<String>)> {
    let plans = schedule(&e.state, &e.heard, 1).into_iter();
    let short = |name: &str| name.rsplit('/').next().unwrap().to_owned();
    plans
        .map(|plan| {
            let nodes = plan.nodes.iter().map(|node| short(&node.node));
            (short(&plan.job), nodes.collect())
        })
        .collect()
}

#[test]
fn a_job_gets_nodes_that_can_have_its_image_and_no_others() {
    let mut e = ensemble(&[
        &[],
        &["rootfs", "docker-archive"],
        &["rootfs", "docker-archive", "podman"],
        &["rootfs", "docker-archive", "docker"],
    ]);
    e.queue("pulled", 2, in_image("ubuntu"));
    e.queue("archive", 1, in_image("docker-archive:/a.tar"));
    e.queue("plain", 1, |_| {});
    let expected = [
        ("pulled", vec!["n2", "n3"]),
        ("archive", vec!["n1"]),
        ("plain", vec!["n0"]),
    ];
    let expected = expected.map(|(job, nodes)| {
        let nodes = nodes.into_iter().map(str::to_owned);
        (job.to_owned(), nodes.collect::<Vec<_>>())
    });
    assert_eq!(placed(&e), expected);
}

#[test]
fn an_image_that_too_few_nodes_can_have_waits_says_why_and_is_passed_over() {
    let mut e = ensemble(&[&[], &["rootfs"]]);
    let wide = e.queue("wide", 2, in_image("rootfs:/a"));
    e.queue("plain", 1, |_| {});
    let names = |e: &Ensemble| {
        placed(e)
            .into_iter()
            .map(|(job, _)| job)
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&e), ["plain"]);
    assert_eq!(
        pending_reason(&e.state, &e.heard, e.job(&wide)),
        "the job wants 2 nodes that have rootfs for its image (facts.imageSources), cluster c has 1: it starts when more of them have it"
    );
    // Where enough have it, it waits for its turn like any other.
    join(&mut e, "nodes/n0", &["rootfs"]);
    assert_eq!(names(&e), ["wide"]);
}

#[test]
fn a_node_that_cannot_have_the_image_is_idle_and_of_no_use() {
    let mut e = ensemble(&[&[], &["podman"]]);
    e.queue("first", 1, in_image("localhost/a"));
    let second = e.queue("second", 1, in_image("localhost/a"));
    for plan in schedule(&e.state, &e.heard, 1) {
        e.ok(C::Place(plan));
    }
    assert_eq!(
        pending_reason(&e.state, &e.heard, e.job(&second)),
        "it waits for 1 idle nodes of cluster c; idle: 0, idle but without what its image takes (facts.imageSources): 1"
    );
}
