//! PURE. How the processes of a job are shared out over its nodes: who starts them and who hears of them must agree.

use std::ops::Range;

/// The ranks of one of several nodes: as even as can be, the first ones have one more.
pub fn of_node(total: usize, nodes: usize, index: usize) -> Range<usize> {
    let (each, more) = (total / nodes.max(1), total % nodes.max(1));
    let begin = each * index + more.min(index);
    begin..begin + each + usize::from(index < more)
}

/// The processes of a job. Its workers have the first ranks; parameter servers, which serve them and end with them, have those behind.
/// On a node that has both, the server comes first; where there are more nodes than workers, servers are on those without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    pub nodes: usize,
    pub workers: usize,
    pub servers: usize,
}

impl Layout {
    /// The ranks of the workers of a node.
    pub fn workers_of(&self, node: usize) -> Range<usize> {
        of_node(self.workers, self.nodes, node)
    }

    /// The ranks of the parameter servers of a node.
    pub fn servers_of(&self, node: usize) -> Range<usize> {
        let own = match self.nodes.saturating_sub(self.workers) {
            0 => of_node(self.servers, self.nodes, node),
            _ if node < self.workers => 0..0,
            rest => of_node(self.servers, rest, node - self.workers),
        };
        self.workers + own.start..self.workers + own.end
    }

    /// All ranks of a node, in the order in which they start and get their ports.
    pub fn of(&self, node: usize) -> impl Iterator<Item = usize> + use<> {
        self.servers_of(node).chain(self.workers_of(node))
    }

    /// Whether a node starts a rank.
    pub fn is_of(&self, node: usize, rank: usize) -> bool {
        self.workers_of(node).contains(&rank) || self.servers_of(node).contains(&rank)
    }

    /// Which of the parameter servers a rank is; none where it is a worker.
    pub fn server(&self, rank: usize) -> Option<usize> {
        let server = rank.checked_sub(self.workers)?;
        (server < self.servers).then_some(server)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_server_and_worker_is_one_nodes_and_servers_come_first() {
        for (workers, servers, nodes) in [(3, 1, 3), (2, 2, 2), (8, 1, 2), (1, 0, 1), (3, 3, 3)] {
            let layout = Layout {
                nodes,
                workers,
                servers,
            };
            let mut all: Vec<_> = (0..nodes).flat_map(|node| layout.of(node)).collect();
            for node in 0..nodes {
                assert!(layout.of(node).all(|rank| layout.is_of(node, rank)));
                let others = (0..nodes).filter(|other| *other != node);
                let none = others.flat_map(|other| layout.of(other));
                assert!(none.into_iter().all(|rank| !layout.is_of(node, rank)));
            }
            assert_eq!(layout.of(0).next() == Some(workers), servers > 0);
            all.sort_unstable();
            assert_eq!(all, (0..workers + servers).collect::<Vec<_>>());
        }
        let layout = Layout {
            nodes: 2,
            workers: 2,
            servers: 1,
        };
        let servers = [0, 1, 2, 3].map(|rank| layout.server(rank));
        assert_eq!(servers, [None, None, Some(0), None]);
        // One that is no worker's.
        let layout = Layout { nodes: 3, ..layout };
        let nodes = [0, 1, 2].map(|node| layout.of(node).collect::<Vec<_>>());
        assert_eq!(nodes, [[0], [1], [2]]);
    }

    #[test]
    fn every_rank_is_one_nodes() {
        for (total, nodes) in [(0, 1), (1, 3), (7, 3), (8, 4), (3, 0)] {
            let all: Vec<_> = (0..nodes).flat_map(|i| of_node(total, nodes, i)).collect();
            let expected = if nodes == 0 { 0 } else { total };
            assert_eq!(all, (0..expected).collect::<Vec<_>>(), "{total} {nodes}");
        }
    }
}
