//! The node agent as it runs on a machine that has nothing but a kernel and busybox (see `guest`), and what its jobs do there.
//!
//! Built without shared libraries it needs no file beside it.

use std::fs::File;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use batchai_node_agent::Cli;
use clap::Parser;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::wait::wait;
use nix::unistd::{ForkResult, fork, setsid};

/// Longer than any test.
const FOR_EVER: Duration = Duration::from_secs(600);

#[derive(Parser)]
#[command(name = "batchai-node-agent")]
struct Agent {
    #[command(flatten)]
    agent: Cli,
}

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args().collect();
    let number = |at: usize| args.get(at).and_then(|text| text.parse().ok()).unwrap_or(0);
    match args.get(1).map(String::as_str) {
        Some("do-tree") => tree(),
        Some("do-eat") => eat(number(2)),
        Some("do-fork") => forks(number(2)),
        Some("do-spin") => spin(number(2)),
        Some("do-hold") => hold(args.get(2).map_or("", String::as_str)),
        Some("do-mount") => try_mount(&args[2..]),
        _ => batchai_node_agent::main(Agent::parse().agent, &[]),
    }
}

/// One that becomes two: whether it is the new one.
#[allow(unsafe_code)]
fn is_child() -> Result<bool, Errno> {
    // SAFETY: what a job does here has one thread.
    let forked = unsafe { fork() };
    Ok(matches!(forked?, ForkResult::Child))
}

/// Ignores SIGTERM, leaves daemons behind in sessions of their own, and a chain whose links each live some milliseconds.
#[allow(unsafe_code)]
fn tree() -> ExitCode {
    // SAFETY: no handler is called.
    unsafe { signal(Signal::SIGTERM, SigHandler::SigIgn) }.expect("it can be ignored");
    for _ in 0..3 {
        if is_child().expect("a fork") {
            setsid().expect("it leads no group yet");
            if is_child().expect("a fork") {
                std::thread::sleep(FOR_EVER);
            }
            return ExitCode::SUCCESS;
        }
        wait().expect("it has a child");
    }
    if is_child().expect("a fork") {
        loop {
            if !is_child().expect("a fork") {
                return ExitCode::SUCCESS;
            }
            setsid().expect("it leads no group yet");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    println!("up");
    std::thread::sleep(FOR_EVER);
    ExitCode::SUCCESS
}

/// Takes so many MiB of memory, and uses them.
fn eat(mib: usize) -> ExitCode {
    let all: Vec<_> = (0..mib).map(|_| vec![1_u8; 1 << 20]).collect();
    println!("{}", std::hint::black_box(&all).len());
    ExitCode::SUCCESS
}

/// Starts so many processes, or as many as it may; says how many.
fn forks(most: usize) -> ExitCode {
    let mut count = 0;
    while count < most {
        match is_child() {
            Ok(true) => std::thread::sleep(FOR_EVER),
            Ok(false) => count += 1,
            Err(Errno::EAGAIN) => break,
            Err(error) => panic!("{error}"),
        }
    }
    println!("{count}");
    ExitCode::SUCCESS
}

/// Does nothing as fast as it can for so many seconds.
fn spin(seconds: usize) -> ExitCode {
    let end = Instant::now() + Duration::from_secs(seconds as u64);
    while Instant::now() < end {
        std::hint::spin_loop();
    }
    ExitCode::SUCCESS
}

/// Locks a file and writes to it until its standard input ends: who has lost the lock may not.
fn hold(path: &str) -> ExitCode {
    let file = File::create(path).expect("the directory is writable");
    let mut file = Flock::lock(file, FlockArg::LockExclusive).expect("nobody else has it");
    let input = std::thread::spawn(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
    while !input.is_finished() {
        file.write_all(b"held\n").expect("it is locked still");
        file.sync_all().expect("it is locked still");
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("held");
    ExitCode::SUCCESS
}

/// Mounts a directory of an NFS server with these options for a moment, and says how that went.
fn try_mount(args: &[String]) -> ExitCode {
    let [source, options] = args else {
        panic!("do-mount SOURCE OPTIONS: {args:?}");
    };
    let place = "/mounted";
    std::fs::create_dir_all(place).expect("it is root's");
    let kind = Some("nfs");
    let options = Some(options.as_str());
    let mounted = mount(
        Some(source.as_str()),
        place,
        kind,
        MsFlags::empty(),
        options,
    );
    println!("{mounted:?}");
    if mounted.is_ok() {
        umount(place).expect("nobody uses it");
    }
    ExitCode::SUCCESS
}
