//! PURE. Pages: a token says after which name to go on, and of which list.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use batchai_common::error::{ApiError, Fault};
use batchai_common::names::{Kind, Name};
use imbl::OrdMap;

use crate::state::children;

const PAGE_DEFAULT: usize = 100;
const PAGE_MAX: usize = 1000;
/// With one more element, of at most a megabyte, a page still fits a message.
const PAGE_BYTES_MAX: usize = 2 << 20;

/// A page of a table, as replies show it: the elements of one parent in the order of their names, and the token of the
/// next page. A page ends early where it would grow too large for a message.
pub fn page<T, M: prost::Message>(
    table: &OrdMap<String, T>,
    parent: Option<&Name>,
    kind: Kind,
    request: (i32, &str),
    view: impl Fn(&str, &T) -> M,
) -> Result<(Vec<M>, String), ApiError> {
    let (page_size, page_token) = request;
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
    let mut page = Vec::new();
    let mut bytes = 0;
    let mut last = String::new();
    for (name, value) in children(table, parent, kind, &after) {
        if page.len() == size || (bytes > PAGE_BYTES_MAX && !page.is_empty()) {
            return Ok((page, encode(&list, &last)));
        }
        let element = view(name, value);
        bytes += element.encoded_len();
        page.push(element);
        last.clone_from(name);
    }
    Ok((page, String::new()))
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
        let view = |_: &str, i: &usize| *i as u64;
        loop {
            let request = (10, token.as_str());
            let (page, next) = page(&table, Some(&group), Kind::Workspace, request, view).unwrap();
            seen.extend(page.into_iter().map(|i| i as usize));
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
    fn a_page_of_large_elements_ends_early() {
        let group = Name::parse(Kind::ResourceGroup, "resourceGroups/g").unwrap();
        let name = |i: usize| format!("resourceGroups/g/workspaces/w{i:02}");
        let table: OrdMap<String, usize> = (0..25).map(|i| (name(i), i)).collect();
        let view = |_: &str, i: &usize| format!("{i}{}", "x".repeat(1 << 20));
        let (first, token) = page(&table, Some(&group), Kind::Workspace, (0, ""), view).unwrap();
        assert_eq!(first.len(), 2);
        let (next, _) = page(&table, Some(&group), Kind::Workspace, (0, &token), view).unwrap();
        assert!(next[0].starts_with("2x"));
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
            let view = |_: &str, i: &usize| *i as u64;
            let result = page(&table, Some(&group), Kind::Workspace, (size, token), view);
            assert!(
                matches!(result, Err(ApiError::Invalid(_))),
                "{size} {token}"
            );
        }
    }
}
