//! PURE. Pages: a token says after which name to go on, and of which list.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use batchai_common::error::{ApiError, Fault};
use batchai_common::names::{Kind, Name};
use imbl::OrdMap;

use crate::state::children;

const PAGE_DEFAULT: usize = 100;
const PAGE_MAX: usize = 1000;

/// A page of a table: names and elements of one parent in the order of their names, and the token of the next page.
pub fn page<T: Clone>(
    table: &OrdMap<String, T>,
    parent: Option<&Name>,
    kind: Kind,
    page_size: i32,
    page_token: &str,
) -> Result<(Vec<(String, T)>, String), ApiError> {
    let invalid = |field: &str, why: &str| ApiError::Invalid(vec![Fault::new(field, why)]);
    let size = match usize::try_from(page_size) {
        Err(_) => return Err(invalid("page_size", "must not be negative")),
        Ok(0) => PAGE_DEFAULT,
        Ok(size) => size.min(PAGE_MAX),
    };
    let parent = parent.map_or("", Name::as_str);
    let list = format!("{parent}/{}", kind.collection());
    let after = match page_token {
        "" => String::new(),
        token => decode(&list, token)
            .ok_or_else(|| invalid("page_token", "is not one that this list returned"))?,
    };
    let mut rest = children(table, parent, kind).skip_while(|(name, _)| **name <= after);
    let page: Vec<_> = rest.by_ref().take(size).collect();
    let more = rest.next().is_some();
    let token = page
        .last()
        .filter(|_| more)
        .map_or(String::new(), |(name, _)| encode(&list, name));
    Ok((
        page.into_iter()
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect(),
        token,
    ))
}

fn encode(list: &str, name: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{:08x}{name}", crc32fast::hash(list.as_bytes())))
}

fn decode(list: &str, token: &str) -> Option<String> {
    let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
    let name = text.strip_prefix(&format!("{:08x}", crc32fast::hash(list.as_bytes())))?;
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_join_to_the_whole_list_also_when_it_changes() {
        let group = Name::parse(Kind::ResourceGroup, "resourceGroups/g").unwrap();
        let name = |g: &str, i: usize| format!("resourceGroups/{g}/workspaces/w{i:02}");
        let mut table: OrdMap<String, usize> = (0..25).map(|i| (name("g", i), i)).collect();
        table.insert(name("g-other", 1), 99);
        let mut seen = Vec::new();
        let mut token = String::new();
        loop {
            let (page, next) = page(&table, Some(&group), Kind::Workspace, 10, &token).unwrap();
            seen.extend(page.into_iter().map(|(_, i)| i));
            // What a page ended with may go before the next page is asked for.
            table.remove(&name("g", *seen.last().unwrap()));
            token = next;
            if token.is_empty() {
                break;
            }
        }
        assert_eq!(seen, (0..25).collect::<Vec<_>>());
    }

    #[test]
    fn foreign_tokens_and_negative_sizes_are_refused() {
        let group = Name::parse(Kind::ResourceGroup, "resourceGroups/g").unwrap();
        let table: OrdMap<String, usize> = OrdMap::new();
        let foreign = encode(
            "resourceGroups/h/workspaces",
            "resourceGroups/h/workspaces/w",
        );
        for (size, token) in [(-1, ""), (1, "?"), (1, "AAAA"), (1, foreign.as_str())] {
            let result = page(&table, Some(&group), Kind::Workspace, size, token);
            assert!(
                matches!(result, Err(ApiError::Invalid(_))),
                "{size} {token}"
            );
        }
    }
}
