//! The short form of what `--bin torture` goes on with for minutes.

use batchai_tests::torture;

#[test]
fn agents_are_cut_down_and_no_rank_notices() {
    let outcome = torture::agent_kill(12, 8);
    println!("{outcome:?}");
    assert!(outcome.bytes > 0);
}
