//! PURE. How the processes of a job are shared out over its nodes: who starts them and who hears of them must agree.

use std::ops::Range;

/// The ranks of one of several nodes: as even as can be, the first ones have one more.
pub fn of_node(total: usize, nodes: usize, index: usize) -> Range<usize> {
    let (each, more) = (total / nodes.max(1), total % nodes.max(1));
    let begin = each * index + more.min(index);
    begin..begin + each + usize::from(index < more)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_is_one_nodes() {
        for (total, nodes) in [(0, 1), (1, 3), (7, 3), (8, 4), (3, 0)] {
            let all: Vec<_> = (0..nodes).flat_map(|i| of_node(total, nodes, i)).collect();
            let expected = if nodes == 0 { 0 } else { total };
            assert_eq!(all, (0..expected).collect::<Vec<_>>(), "{total} {nodes}");
        }
    }
}
