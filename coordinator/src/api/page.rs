//! PURE. Pages: a token says after which name to go on, and of which list.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use batchai_common::error::ApiError;
use batchai_common::names::{Kind, Name, WILDCARD};

use super::faults::Faults;
use super::filter::Filter;
use crate::state::State;

const PAGE_DEFAULT: usize = 100;
const PAGE_MAX: usize = 1000;
/// With one more element, of at most a megabyte, a page still fits a message.
const PAGE_BYTES_MAX: usize = 2 << 20;
/// Elements that one page looks at: where few pass the filter, the rest is for the next page.
const LOOKS_MAX: usize = 2_000;

/// What a list asks for.
pub struct Query {
    /// The full names of all that belongs to the list.
    pattern: Name,
    size: usize,
    after: String,
    filter: Option<Filter>,
    /// What tells this list from others, for its tokens.
    list: String,
}

impl Query {
    /// Takes the arguments of a list of messages of a name. For kinds without a parent it only tells lists apart.
    pub fn new(
        (kind, message): (Kind, &'static str),
        parent: &str,
        (page_size, page_token): (i32, &str),
        filter: &str,
    ) -> Result<Query, ApiError> {
        let mut faults = Faults::default();
        let list = parent;
        let parent = match kind.parent() {
            Some(above) => faults
                .pattern("parent", above, parent)
                .map(|parent| format!("{parent}/{}/{WILDCARD}", kind.collection())),
            None => Some(format!("{}/{WILDCARD}", kind.collection())),
        };
        let pattern = parent.and_then(|text| faults.pattern("parent", kind, &text));
        let size = self::page_size(&mut faults, page_size);
        let parsed = Filter::parse(message, filter).unwrap_or_else(|why| {
            faults.invalid("filter", why);
            None
        });
        let list = format!("{list} {} {filter}", kind.collection());
        let after = match page_token {
            "" => String::new(),
            token => decode(&list, token).unwrap_or_else(|| {
                faults.invalid("page_token", "is not one that this list returned");
                String::new()
            }),
        };
        let pattern = faults.finish(pattern)?;
        Ok(Query {
            pattern,
            size,
            after,
            filter: parsed,
            list,
        })
    }

    /// Refuses a list of what a parent holds that does not exist.
    pub fn check_parent(&self, state: &State) -> Result<(), ApiError> {
        match self.pattern.parent() {
            Some(parent)
                if !parent.is_pattern() && !state.contains(parent.kind(), parent.as_str()) =>
            {
                Err(ApiError::NotFound {
                    kind: parent.kind(),
                    name: parent.into(),
                })
            }
            _ => Ok(()),
        }
    }

    /// A page, as replies show it: elements in the order of their names, and the token of the next page. A page ends early
    /// where it would grow too large for a message.
    pub fn page<M: prost::Message>(
        &self,
        state: &State,
        view: impl Fn(&str) -> Option<M>,
    ) -> (Vec<M>, String) {
        let mut page = Vec::new();
        let (mut bytes, mut looks) = (0, 0);
        let mut last = self.after.as_str();
        for name in state.names(self.pattern.kind(), self.pattern.prefix(), &self.after) {
            let full = page.len() == self.size || (bytes > PAGE_BYTES_MAX && !page.is_empty());
            if full || looks == LOOKS_MAX {
                return (page, encode(&self.list, last));
            }
            looks += 1;
            last = name;
            if !self.pattern.covers(name) {
                continue;
            }
            let passes = |element: &M| self.filter.as_ref().is_none_or(|f| f.matches(element));
            if let Some(element) = view(name).filter(passes) {
                bytes += element.encoded_len();
                page.push(element);
            }
        }
        (page, String::new())
    }
}

/// How many elements a page has.
pub fn page_size(faults: &mut Faults, asked: i32) -> usize {
    match usize::try_from(asked) {
        Err(_) => {
            faults.invalid("page_size", "must not be negative");
            PAGE_DEFAULT
        }
        Ok(0) => PAGE_DEFAULT,
        Ok(size) => size.min(PAGE_MAX),
    }
}

/// The token of the page behind a name.
pub fn encode(list: &str, name: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{:08x}{name}", crc32fast::hash(list.as_bytes())))
}

/// The name that a token of this list stands for.
pub fn decode(list: &str, token: &str) -> Option<String> {
    let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
    let name = text.strip_prefix(&format!("{:08x}", crc32fast::hash(list.as_bytes())))?;
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use std::sync::Arc;

    use batchai_proto::v1::Workspace;
    use imbl::OrdMap;
    use proptest::prelude::*;

    use super::*;

    fn name(group: &str, i: usize) -> String {
        format!("resourceGroups/{group}/workspaces/w{i:02}")
    }

    type Table = OrdMap<String, Arc<Workspace>>;

    fn workspace(name: &str, location: &str) -> Arc<Workspace> {
        Arc::new(Workspace {
            name: name.to_owned(),
            location: location.to_owned(),
            ..Default::default()
        })
    }

    fn page(query: &Query, table: &Table) -> (Vec<Workspace>, String) {
        let state = State {
            workspaces: table.clone(),
            ..State::default()
        };
        query.page(&state, |name| Some(Workspace::clone(table.get(name)?)))
    }

    fn query(parent: &str, size: i32, token: &str, filter: &str) -> Result<Query, ApiError> {
        Query::new(
            (Kind::Workspace, "Workspace"),
            parent,
            (size, token),
            filter,
        )
    }

    fn all(table: &Table, parent: &str, size: i32, filter: &str) -> Vec<String> {
        let (mut seen, mut token) = (Vec::new(), String::new());
        loop {
            let query = query(parent, size, &token, filter).unwrap();
            let (page, next) = page(&query, table);
            seen.extend(page.into_iter().map(|workspace| workspace.name));
            token = next;
            if token.is_empty() {
                return seen;
            }
        }
    }

    proptest! {
        /// Whatever is created and deleted between pages: what was there all the time is listed once, in order.
        #[test]
        fn pages_survive_insertion_and_deletion(
            before in prop::collection::btree_set(0_usize..60, 0..40),
            changes in prop::collection::vec((0_usize..60, any::<bool>()), 0..60),
            size in 1_i32..7,
        ) {
            let of = |i: usize| (name("g", i), workspace(&name("g", i), ""));
            let mut table: Table = before.iter().map(|i| of(*i)).collect();
            let mut stayed: BTreeSet<usize> = before.clone();
            let mut changes = changes.into_iter();
            let (mut seen, mut token) = (Vec::new(), String::new());
            loop {
                let query = query("resourceGroups/g", size, &token, "").unwrap();
                let (page, next) = page(&query, &table);
                seen.extend(page.into_iter().map(|w| w.name));
                for (i, create) in changes.by_ref().take(5) {
                    let (name, workspace) = of(i);
                    if create {
                        table.insert(name, workspace);
                    } else {
                        table.remove(&name);
                        stayed.remove(&i);
                    }
                }
                token = next;
                if token.is_empty() {
                    break;
                }
            }
            let mut sorted = seen.clone();
            sorted.sort();
            sorted.dedup();
            prop_assert_eq!(&sorted, &seen);
            for i in stayed {
                prop_assert!(seen.contains(&name("g", i)), "{} is missing", i);
            }
        }
    }

    #[test]
    fn lists_reach_over_parents_and_pass_what_the_filter_lets_pass() {
        let places = BTreeMap::from([("g", "north"), ("g-other", "south"), ("h", "north")]);
        let table: Table = places
            .iter()
            .flat_map(|(group, place)| {
                (0..5).map(|i| (name(group, i), workspace(&name(group, i), place)))
            })
            .collect();
        assert_eq!(all(&table, "resourceGroups/g", 2, "").len(), 5);
        assert_eq!(all(&table, "resourceGroups/-", 2, "").len(), 15);
        let north = all(&table, "resourceGroups/-", 2, "location = north");
        assert_eq!(north.len(), 10);
        assert!(north.iter().all(|name| !name.contains("g-other")));
    }

    #[test]
    fn a_page_of_large_elements_ends_early_and_so_does_one_that_finds_little() {
        let table: Table = (0..25)
            .map(|i| (name("g", i), workspace(&name("g", i), &"x".repeat(1 << 20))))
            .collect();
        let first = query("resourceGroups/g", 0, "", "").unwrap();
        let (found, token) = page(&first, &table);
        assert_eq!(found.len(), 2);
        let next = query("resourceGroups/g", 0, &token, "").unwrap();
        assert_eq!(page(&next, &table).0[0].name, name("g", 2));
        let many: Table = (0..=LOOKS_MAX)
            .map(|i| (name("g", 100_000 + i), workspace("", "")))
            .collect();
        let rare = query("resourceGroups/g", 0, "", "location = north").unwrap();
        let (found, token) = page(&rare, &many);
        assert!(found.is_empty() && !token.is_empty());
    }

    #[test]
    fn foreign_tokens_negative_sizes_and_bad_filters_are_refused_all_at_once() {
        let list = "resourceGroups/h workspaces ";
        let foreign = encode(list, "resourceGroups/h/workspaces/w");
        for (size, token, filter) in [
            (-1, "", ""),
            (1, "?", ""),
            (1, "AAAA", ""),
            (1, foreign.as_str(), ""),
            (1, "", "nonsense"),
        ] {
            let refused = query("resourceGroups/g", size, token, filter);
            assert!(
                matches!(refused, Err(ApiError::Invalid(_))),
                "{size} {token} {filter}"
            );
        }
        let Err(ApiError::Invalid(faults)) = query("nonsense", -1, "", "nonsense") else {
            panic!("it was taken");
        };
        assert_eq!(faults.len(), 3);
        assert!(query("resourceGroups/h", 1, &foreign, "").is_ok());
    }
}
