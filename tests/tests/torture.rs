//! The short forms of what `--bin torture` goes on with for minutes.

use batchai_tests::torture;

#[test]
fn agents_are_cut_down_and_no_rank_notices() {
    let outcome = torture::agent_kill(12, 8);
    println!("{outcome:?}");
    assert!(outcome.bytes > 0);
}

#[test]
fn nodes_are_lost_and_nothing_runs_twice_at_once() {
    if let Some(outcome) = torture::node_loss(3) {
        println!("{outcome:?}");
    }
}
