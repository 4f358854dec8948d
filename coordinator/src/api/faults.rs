//! PURE. Checks what a request says, all of it, and remembers everything that is wrong with it.

use std::collections::BTreeMap;

use batchai_common::error::{ApiError, Fault};
use batchai_common::names::{Kind as Noun, Name};
use batchai_proto::internal::v1::RequestKey;
use sha2::{Digest as _, Sha256};

const LABELS_MAX: usize = 64;
const LABEL_NAME_BYTES_MAX: usize = 63;
const LABEL_VALUE_BYTES_MAX: usize = 256;
/// Names, ids and the like.
const TEXT_BYTES_MAX: usize = 1024;

/// How often a request is carried out: each time it comes, once under its name, or never.
pub struct Once {
    pub key: Option<RequestKey>,
    pub validate_only: bool,
}

/// Collects everything that is wrong with a request.
#[derive(Default)]
pub struct Faults {
    invalid: Vec<Fault>,
    not_served: Vec<Fault>,
}

impl Faults {
    pub fn invalid(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.invalid.push(Fault::new(field, reason));
    }

    /// Whether anything is wrong already.
    pub fn any(&self) -> bool {
        !self.invalid.is_empty()
    }

    /// A field that the model has and this version does not serve.
    pub fn not_served(&mut self, field: &str, set: bool) {
        if set {
            self.not_served
                .push(Fault::new(field, "is not served yet; leave it out"));
        }
    }

    pub fn name(&mut self, field: &str, kind: Noun, text: &str) -> Option<Name> {
        let parsed = Name::parse(kind, text);
        parsed
            .map_err(|error| self.invalid(field, error.to_string()))
            .ok()
    }

    /// The name of a new resource: its parent's and an id.
    pub fn new_name(&mut self, kind: Noun, parent: &str, id_field: &str, id: &str) -> Option<Name> {
        let parent = match kind.parent() {
            Some(noun) => self.name("parent", noun, parent),
            None => None,
        };
        if let Err(error) = batchai_common::names::check_id(kind, id) {
            self.invalid(id_field, error.to_string());
            return None;
        }
        match kind.parent() {
            None => Name::top(kind, id).ok(),
            Some(_) => parent.and_then(|parent| parent.child(kind, id).ok()),
        }
    }

    /// How often a request is to be carried out.
    pub fn once<M: prost::Message>(&mut self, id: &str, validate_only: bool, request: &M) -> Once {
        let named = !id.is_empty();
        if named && uuid::Uuid::try_parse(id).is_err() {
            self.invalid("request_id", "must be a UUID");
        }
        let key = named.then(|| RequestKey {
            // Whose it is, is noted where it is carried out.
            caller: String::new(),
            id: id.to_owned(),
            digest: Sha256::digest(request.encode_to_vec()).to_vec(),
        });
        Once { key, validate_only }
    }

    /// The name of one of several new resources of a parent that is checked elsewhere; empty where the id is bad.
    pub fn child_name(&mut self, kind: Noun, parent: &str, id_field: &str, id: &str) -> String {
        match batchai_common::names::check_id(kind, id) {
            Ok(()) => format!("{parent}/{}/{id}", kind.collection()),
            Err(error) => {
                self.invalid(id_field, error.to_string());
                String::new()
            }
        }
    }

    /// Checks a part of a request, whose fields are named from the whole.
    pub fn within<T>(&mut self, prefix: &str, check: impl FnOnce(&mut Faults) -> T) -> T {
        let mut part = Faults::default();
        let checked = check(&mut part);
        let place = |fault: Fault| Fault::new(format!("{prefix}{}", fault.field), fault.reason);
        self.invalid.extend(part.invalid.into_iter().map(place));
        self.not_served
            .extend(part.not_served.into_iter().map(place));
        checked
    }

    /// The name of something, or of everything that its dashes stand for.
    pub fn pattern(&mut self, field: &str, kind: Noun, text: &str) -> Option<Name> {
        let parsed = Name::parse_pattern(kind, text);
        parsed
            .map_err(|error| self.invalid(field, error.to_string()))
            .ok()
    }

    /// Labels or tags.
    pub fn labels(&mut self, field: &str, labels: &BTreeMap<String, String>) {
        if labels.len() > LABELS_MAX {
            self.invalid(field, format!("has more than {LABELS_MAX} names"));
        }
        let legal = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        for (name, value) in labels.iter().take(LABELS_MAX) {
            let short: String = name.chars().take(LABEL_NAME_BYTES_MAX).collect();
            let field = format!("{field}[{short:?}]");
            let named = (1..=LABEL_NAME_BYTES_MAX).contains(&name.len());
            if !named || !name.chars().all(legal) {
                let why = format!(
                    "names must have 1 to {LABEL_NAME_BYTES_MAX} characters of [-A-Za-z0-9_./]"
                );
                self.invalid(&field, why);
            }
            if value.len() > LABEL_VALUE_BYTES_MAX {
                let why = format!("values must have at most {LABEL_VALUE_BYTES_MAX} bytes");
                self.invalid(&field, why);
            }
        }
    }

    /// A text that must be there, or may be left out.
    pub fn text(&mut self, field: &str, text: &str, required: bool) {
        let missing = required && text.trim().is_empty();
        if missing || text.len() > TEXT_BYTES_MAX || text.contains('\0') {
            let given = if required {
                "must be given"
            } else {
                "may be left out"
            };
            let why = format!("{given}, with at most {TEXT_BYTES_MAX} bytes and no NUL");
            self.invalid(field, why);
        }
    }

    pub fn location(&mut self, field: &str, text: &str) {
        if !text.is_empty()
            && let Err(error) = batchai_common::names::check_id(Noun::ResourceGroup, text)
        {
            self.invalid(field, error.to_string());
        }
    }

    /// All faults at once, or what was parsed.
    pub fn finish<T>(self, parsed: Option<T>) -> Result<T, ApiError> {
        match parsed {
            Some(parsed) if self.invalid.is_empty() && self.not_served.is_empty() => Ok(parsed),
            _ => Err(self.refuse()),
        }
    }

    /// All faults at once, of which there are some.
    pub fn refuse(mut self) -> ApiError {
        if self.invalid.is_empty() {
            return ApiError::NotServed(self.not_served);
        }
        self.invalid.append(&mut self.not_served);
        ApiError::Invalid(self.invalid)
    }
}
