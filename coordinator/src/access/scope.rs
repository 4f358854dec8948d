//! PURE. What a request is about: texts of it, found without decoding the rest.
//!
//! It finds what a decoder would find: of a field that comes twice the last one counts, and parts of a message that comes in
//! pieces are one message. What a decoder would refuse, this need not notice.

use bytes::Buf;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// Reads the text at a path of field numbers: empty where it is absent, none where the bytes are no message.
pub fn text(message: &[u8], path: &[u32]) -> Option<String> {
    let mut found = String::new();
    read(message, path, &mut |text| found = text)?;
    Some(found)
}

/// Reads all texts at a path of field numbers.
pub fn texts(message: &[u8], path: &[u32]) -> Option<Vec<String>> {
    let mut found = Vec::new();
    read(message, path, &mut |text| found.push(text))?;
    Some(found)
}

fn read(mut rest: &[u8], path: &[u32], found: &mut impl FnMut(String)) -> Option<()> {
    let (first, deeper) = path.split_first()?;
    while rest.has_remaining() {
        let (number, wire) = decode_key(&mut rest).ok()?;
        if number != *first || wire != WireType::LengthDelimited {
            skip_field(wire, number, &mut rest, DecodeContext::default()).ok()?;
            continue;
        }
        let length = decode_varint(&mut rest).ok()?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let (value, behind) = rest.split_at_checked(length)?;
        rest = behind;
        match deeper {
            [] => found(String::from_utf8(value.to_vec()).ok()?),
            deeper => read(value, deeper, found)?,
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use batchai_proto::v1;
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    #[test]
    fn it_finds_what_a_decoder_finds() {
        let part = |name: &str, labels: bool| {
            let tags = labels.then(|| ("a".to_owned(), "b".to_owned()));
            v1::UpdateWorkspaceRequest {
                workspace: Some(v1::Workspace {
                    name: name.into(),
                    tags: tags.into_iter().collect(),
                    ..Default::default()
                }),
                update_mask: None,
            }
            .encode_to_vec()
        };
        let path = [1, 1];
        for bytes in [
            part("resourceGroups/g", true),
            [part("a", false), part("b", true)].concat(),
            [part("a", true), part("", true)].concat(),
            Vec::new(),
        ] {
            let decoded = v1::UpdateWorkspaceRequest::decode(&bytes[..]).unwrap();
            let name = decoded.workspace.unwrap_or_default().name;
            assert_eq!(text(&bytes, &path), Some(name));
        }
        let all = [part("a", false), part("b", true)].concat();
        assert_eq!(texts(&all, &path), Some(vec!["a".into(), "b".into()]));
        let mut cut = part("resourceGroups/g", true);
        cut.truncate(9);
        assert_eq!(text(&cut, &path), None);
    }

    proptest! {
        // Bytes that look like parts of messages: tags of the fields in question come often.
        #[test]
        fn no_bytes_lead_it_elsewhere(bytes in prop::collection::vec(
            prop_oneof![Just(10_u8), Just(18), Just(2), Just(3), Just(97), 0..40_u8, any::<u8>()], 0..40)
        ) {
            if let Ok(decoded) = v1::UpdateWorkspaceRequest::decode(&bytes[..]) {
                let name = decoded.workspace.unwrap_or_default().name;
                prop_assert_eq!(text(&bytes, &[1, 1]), Some(name));
            }
            if let Ok(decoded) = v1::GetJobRequest::decode(&bytes[..]) {
                prop_assert_eq!(text(&bytes, &[1]), Some(decoded.name));
            }
        }
    }
}
