//! `bench writes`: jobs that are submitted, durably and one in each call, by 1, 64 and 256 clients to three replicas with TLS;
//! beside puts of the same size to three members of etcd without.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use batchai_tests::etcd::{Etcd, put};
use batchai_tests::replicas::Replicas;
use prost::Message as _;

use super::failover::{job, submit, way};
use crate::measure::{Better, print, quantile};

const CLIENTS: [usize; 3] = [1, 64, 256];
/// Clients share connections, as programs do.
const CONNECTIONS: usize = 8;
const WARM_UP: Duration = Duration::from_secs(1);
const MEASURED: Duration = Duration::from_secs(5);

pub fn run() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let runtime = runtime.expect("a runtime");
    runtime.block_on(ours());
    match std::process::Command::new("etcd").arg("--version").output() {
        Ok(_) => runtime.block_on(etcd()),
        Err(_) => eprintln!("etcd is not there: nothing to compare with"),
    }
}

async fn ours() {
    let e = Replicas::start(3, &["--calls-per-second", "1000000"]);
    e.create_cluster(0);
    let number = Arc::new(AtomicU64::new(0));
    for clients in CLIENTS {
        let mut routes = Vec::new();
        for _ in 0..CONNECTIONS.min(clients) {
            routes.push(way(&e).connect().await.expect("three replicas serve"));
        }
        let work = |i: usize| {
            let (route, number) = (routes[i % routes.len()].clone(), number.clone());
            async move {
                let id = format!("j{}", number.fetch_add(1, Ordering::Relaxed));
                submit(&route, &id).await.expect("a job is taken");
            }
        };
        measure("submits", clients, work).await;
    }
}

async fn etcd() {
    let dir = tempfile::tempdir().expect("a directory");
    let etcd = Etcd::start(dir.path(), &[]);
    let leader = loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        if let Some(leader) = etcd.leader().await {
            break leader;
        }
    };
    let size = job("j1000".into(), String::new()).encoded_len();
    eprintln!("puts of {size} bytes");
    let number = Arc::new(AtomicU64::new(0));
    for clients in CLIENTS {
        let channels: Vec<_> = (0..CONNECTIONS.min(clients))
            .map(|_| etcd.channel(leader))
            .collect();
        let work = |i: usize| {
            let (mut channel, number) = (channels[i % channels.len()].clone(), number.clone());
            async move {
                let key = format!("j{}", number.fetch_add(1, Ordering::Relaxed));
                put(&mut channel, key, vec![b'x'; size])
                    .await
                    .expect("it is taken");
            }
        };
        measure("etcd_puts", clients, work).await;
    }
}

/// Some clients, each of which does one thing after the other.
async fn measure<F: Future<Output = ()> + Send + 'static>(
    name: &str,
    clients: usize,
    work: impl Fn(usize) -> F,
) {
    // Futures are made one at a time here, so that `work` need not be shared.
    let (begin, mut times) = (Instant::now(), Vec::new());
    let mut running = tokio::task::JoinSet::new();
    let timed = |i: usize| {
        let future = work(i);
        async move {
            let then = Instant::now();
            future.await;
            (i, then)
        }
    };
    for i in 0..clients {
        running.spawn(timed(i));
    }
    while let Some(done) = running.join_next().await {
        let (i, then) = done.expect("no client panics");
        let elapsed = begin.elapsed();
        if elapsed > WARM_UP + MEASURED {
            continue;
        }
        if elapsed > WARM_UP {
            times.push(then.elapsed().as_secs_f64() * 1000.0);
        }
        running.spawn(timed(i));
    }
    let rate = times.len() as f64 / MEASURED.as_secs_f64();
    print(
        &format!("{name}_{clients}"),
        rate,
        "1/s",
        None,
        Better::Higher,
    );
    let p50 = quantile(&mut times, 0.5);
    print(
        &format!("{name}_{clients}_p50"),
        p50,
        "ms",
        None,
        Better::Lower,
    );
}
