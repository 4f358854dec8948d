//! The comments of the `.proto` files are the manual that `grpcurl describe` shows: nothing in it is without one, and
//! the API has the shape that the linter of the field expects.

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;

use batchai_tests::requirement;
use prost::Message as _;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet};

/// The paths, in the sense of `SourceCodeInfo`, that have a comment before them.
struct Comments<'a> {
    file: &'a str,
    paths: HashSet<Vec<i32>>,
    missing: Vec<String>,
    checked: usize,
}

impl Comments<'_> {
    fn expect(&mut self, path: &[i32], what: &str) {
        self.checked += 1;
        if !self.paths.contains(path) {
            self.missing.push(format!("{}: {what}", self.file));
        }
    }

    fn message(&mut self, path: &[i32], message: &DescriptorProto) {
        let name = message.name().to_owned();
        self.expect(path, &name);
        for (i, field) in message.field.iter().enumerate() {
            self.expect(
                &[path, &[2, i as i32]].concat(),
                &format!("{name}.{}", field.name()),
            );
        }
        for (i, oneof) in message.oneof_decl.iter().enumerate() {
            // Those that `optional` makes are not written by anyone.
            if !oneof.name().starts_with('_') {
                self.expect(
                    &[path, &[8, i as i32]].concat(),
                    &format!("{name}.{}", oneof.name()),
                );
            }
        }
        for (i, nested) in message.nested_type.iter().enumerate() {
            // Entries of maps are not written by anyone either.
            if nested
                .options
                .as_ref()
                .is_some_and(|options| options.map_entry())
            {
                continue;
            }
            self.message(&[path, &[3, i as i32]].concat(), nested);
        }
        for (i, values) in message.enum_type.iter().enumerate() {
            self.values(&[path, &[4, i as i32]].concat(), values);
        }
    }

    fn values(&mut self, path: &[i32], values: &EnumDescriptorProto) {
        self.expect(path, values.name());
        for (i, value) in values.value.iter().enumerate() {
            self.expect(&[path, &[2, i as i32]].concat(), value.name());
        }
    }

    fn file(&mut self, file: &FileDescriptorProto) {
        for (i, message) in file.message_type.iter().enumerate() {
            self.message(&[4, i as i32], message);
        }
        for (i, values) in file.enum_type.iter().enumerate() {
            self.values(&[5, i as i32], values);
        }
        for (i, service) in file.service.iter().enumerate() {
            self.expect(&[6, i as i32], service.name());
            for (j, method) in service.method.iter().enumerate() {
                self.expect(&[6, i as i32, 2, j as i32], method.name());
            }
        }
    }
}

#[test]
fn everything_has_a_comment() {
    let set = FileDescriptorSet::decode(batchai_proto::DESCRIPTORS).unwrap();
    let mut checked = 0;
    for file in set
        .file
        .iter()
        .filter(|file| file.package().starts_with("batchai."))
    {
        let info = file.source_code_info.clone().unwrap_or_default();
        let written = info.location.into_iter().filter(|at| {
            at.leading_comments
                .as_ref()
                .is_some_and(|text| !text.trim().is_empty())
        });
        let mut comments = Comments {
            file: file.name(),
            paths: written.map(|at| at.path).collect(),
            missing: Vec::new(),
            checked: 0,
        };
        comments.file(file);
        assert_eq!(comments.missing, Vec::<String>::new());
        checked += comments.checked;
    }
    assert!(checked > 300, "{checked}");
}

#[test]
fn the_linter_of_the_field_finds_nothing() {
    let hint = "npm install @bufbuild/buf, and its node_modules/.bin on the PATH";
    let Some(buf) = requirement::program("buf", hint) else {
        return;
    };
    let home = tempfile::tempdir().unwrap();
    let proto = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .join("proto");
    let output = Command::new(buf)
        .arg("lint")
        .current_dir(proto)
        .env("HOME", home.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// What is sent again must be whole before it is sent: a request that is a stream never is.
#[test]
fn clients_know_which_requests_are_streams() {
    let pool = batchai_proto::reflect::pool();
    let ours = pool
        .services()
        .filter(|service| service.package_name().starts_with("batchai."));
    let methods = ours.flat_map(|service| service.methods().collect::<Vec<_>>());
    let streamed = methods.filter(|method| method.is_client_streaming());
    let mut streamed: Vec<_> = streamed
        .map(|method| {
            let service = method.parent_service().full_name().to_owned();
            format!("/{service}/{}", method.name())
        })
        .collect();
    streamed.sort();
    assert_eq!(streamed, batchai_common::tls::STREAMED);
}
