//! Resource names: `resourceGroups/{g}/workspaces/{w}/experiments/{e}/jobs/{j}` and their kin.
//!
//! A [`Name`] is well-formed by construction; whether the resource exists is not its business.

use std::fmt;

/// The longest id.
const ID_BYTES_MAX: usize = 64;

/// What a name names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    ResourceGroup,
    Workspace,
    Cluster,
    Experiment,
    Job,
    FileServer,
    Node,
    VmSizeAlias,
    StorageAlias,
    RoleBinding,
    Token,
    Bundle,
}

/// In names of lists and watches it stands for every id; no resource is called so.
pub const WILDCARD: &str = "-";

impl Kind {
    const ALL: [Kind; 12] = [
        Kind::ResourceGroup,
        Kind::Workspace,
        Kind::Cluster,
        Kind::Experiment,
        Kind::Job,
        Kind::FileServer,
        Kind::Node,
        Kind::VmSizeAlias,
        Kind::StorageAlias,
        Kind::RoleBinding,
        Kind::Token,
        Kind::Bundle,
    ];

    /// What a well-formed full name names.
    pub fn of(name: &str) -> Option<Kind> {
        let (above, _id) = name.rsplit_once('/')?;
        let collection = last_id(above);
        Kind::ALL
            .into_iter()
            .find(|kind| kind.collection() == collection)
    }

    /// The collection that resources of this kind live in, as it stands in names.
    pub fn collection(self) -> &'static str {
        match self {
            Kind::ResourceGroup => "resourceGroups",
            Kind::Workspace => "workspaces",
            Kind::Cluster => "clusters",
            Kind::Experiment => "experiments",
            Kind::Job => "jobs",
            Kind::FileServer => "fileServers",
            Kind::Node => "nodes",
            Kind::VmSizeAlias => "vmSizeAliases",
            Kind::StorageAlias => "storageAliases",
            Kind::RoleBinding => "roleBindings",
            Kind::Token => "tokens",
            Kind::Bundle => "bundles",
        }
    }

    /// The kind as people say it.
    pub fn noun(self) -> &'static str {
        match self {
            Kind::ResourceGroup => "resource group",
            Kind::Workspace => "workspace",
            Kind::Cluster => "cluster",
            Kind::Experiment => "experiment",
            Kind::Job => "job",
            Kind::FileServer => "file server",
            Kind::Node => "node",
            Kind::VmSizeAlias => "VM size alias",
            Kind::StorageAlias => "storage alias",
            Kind::RoleBinding => "role binding",
            Kind::Token => "token",
            Kind::Bundle => "bundle",
        }
    }

    /// The kind that holds this one.
    pub fn parent(self) -> Option<Kind> {
        match self {
            Kind::ResourceGroup
            | Kind::Node
            | Kind::VmSizeAlias
            | Kind::StorageAlias
            | Kind::RoleBinding
            | Kind::Token
            | Kind::Bundle => None,
            Kind::Workspace => Some(Kind::ResourceGroup),
            Kind::Cluster | Kind::Experiment | Kind::FileServer => Some(Kind::Workspace),
            Kind::Job => Some(Kind::Experiment),
        }
    }

    /// The form of a full name, for messages.
    pub fn pattern(self) -> String {
        let own = format!(
            "{}/{{{}}}",
            self.collection(),
            self.noun().to_lowercase().replace(' ', "_")
        );
        match self.parent() {
            Some(parent) => format!("{}/{own}", parent.pattern()),
            None => own,
        }
    }
}

/// Why a name or id is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NameError {
    #[error("{text:?} is not a name of the form {pattern}")]
    Form { text: String, pattern: String },
    #[error("{id:?} is not an id: use 1 to 64 characters of {allowed}, and not - alone")]
    Id { id: String, allowed: &'static str },
}

/// A well-formed full name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    kind: Kind,
    text: String,
}

impl Name {
    /// Takes a full name of the given kind.
    pub fn parse(kind: Kind, text: &str) -> Result<Name, NameError> {
        Name::parse_with(kind, text, check_id)
    }

    /// Takes a full name of the given kind in which ids may be [`WILDCARD`].
    pub fn parse_pattern(kind: Kind, text: &str) -> Result<Name, NameError> {
        Name::parse_with(kind, text, |kind, id| match id {
            WILDCARD => Ok(()),
            id => check_id(kind, id),
        })
    }

    fn parse_with(
        kind: Kind,
        text: &str,
        check: fn(Kind, &str) -> Result<(), NameError>,
    ) -> Result<Name, NameError> {
        // Bounded before anything is copied into a message: a name has at most four ids.
        let form = || NameError::Form {
            text: text.chars().take(5 * ID_BYTES_MAX).collect(),
            pattern: kind.pattern(),
        };
        let (rest, id) = text.rsplit_once('/').ok_or_else(form)?;
        let above = rest.strip_suffix(kind.collection()).ok_or_else(form)?;
        match (kind.parent(), above.strip_suffix('/')) {
            (None, None) if above.is_empty() => check(kind, id)?,
            (Some(parent), Some(above)) => match Name::parse_with(parent, above, check) {
                Ok(_) => check(kind, id)?,
                Err(NameError::Form { .. }) => return Err(form()),
                Err(id) => return Err(id),
            },
            _ => return Err(form()),
        }
        let text = text.to_owned();
        Ok(Name { kind, text })
    }

    /// Whether a well-formed full name is this one, or one that this pattern stands for.
    pub fn covers(&self, name: &str) -> bool {
        let mut own = self.text.split('/');
        let mut other = name.split('/');
        loop {
            match (own.next(), other.next()) {
                (None, None) => return true,
                (Some(WILDCARD), Some(_)) => {}
                (Some(a), Some(b)) if a == b => {}
                _ => return false,
            }
        }
    }

    /// What all names that it stands for begin with.
    pub fn prefix(&self) -> &str {
        let wildcard = |part: &str| part == WILDCARD;
        let parts = self.text.split('/').take_while(|part| !wildcard(part));
        let length = parts.map(|part| part.len() + 1).sum::<usize>();
        &self.text[..length.min(self.text.len())]
    }

    /// Whether it stands for more than one name.
    pub fn is_pattern(&self) -> bool {
        self.text.split('/').any(|part| part == WILDCARD)
    }

    /// A name without a parent.
    pub fn top(kind: Kind, id: &str) -> Result<Name, NameError> {
        debug_assert!(kind.parent().is_none());
        check_id(kind, id)?;
        Ok(Name {
            kind,
            text: format!("{}/{id}", kind.collection()),
        })
    }

    /// The name of a resource that this one holds.
    pub fn child(&self, kind: Kind, id: &str) -> Result<Name, NameError> {
        debug_assert_eq!(kind.parent(), Some(self.kind));
        check_id(kind, id)?;
        Ok(Name {
            kind,
            text: format!("{}/{}/{id}", self.text, kind.collection()),
        })
    }

    /// What it names.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The whole name.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Its last part.
    pub fn id(&self) -> &str {
        last_id(&self.text)
    }

    /// The name of what holds it.
    pub fn parent(&self) -> Option<Name> {
        let kind = self.kind.parent()?;
        Some(Name {
            kind,
            text: parent(&self.text)?.to_owned(),
        })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.text
    }
}

/// The last part of a full name that is known to be well-formed.
pub fn last_id(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// The name of what holds a resource whose full name is known to be well-formed.
pub fn parent(name: &str) -> Option<&str> {
    let (rest, _id) = name.rsplit_once('/')?;
    let (parent, _collection) = rest.rsplit_once('/')?;
    Some(parent)
}

/// Whether a full name is of something that another one holds, at whatever depth.
pub fn is_below(above: &str, name: &str) -> bool {
    name.strip_prefix(above)
        .is_some_and(|rest| rest.starts_with('/'))
}

/// A digest as it stands in the name of a bundle.
pub fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The ids of a full name, outermost first.
pub fn ids(name: &str) -> Vec<&str> {
    name.split('/').skip(1).step_by(2).collect()
}

/// Checks the last part of a name of the given kind.
pub fn check_id(kind: Kind, id: &str) -> Result<(), NameError> {
    if kind == Kind::Bundle {
        return check_digest(id);
    }
    let dots = kind == Kind::ResourceGroup;
    let allowed = if dots {
        "[-A-Za-z0-9_.], not . or .."
    } else {
        "[-A-Za-z0-9_]"
    };
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_' || (dots && c == '.');
    let reserved = [".", "..", WILDCARD].contains(&id);
    if id.is_empty() || id.len() > ID_BYTES_MAX || !id.chars().all(legal) || reserved {
        let id = id.chars().take(ID_BYTES_MAX + 8).collect();
        return Err(NameError::Id { id, allowed });
    }
    Ok(())
}

/// SHA-256 in hexadecimal digits.
fn check_digest(id: &str) -> Result<(), NameError> {
    let digit = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
    if id.len() == ID_BYTES_MAX && id.bytes().all(digit) {
        return Ok(());
    }
    let id = id.chars().take(ID_BYTES_MAX + 8).collect();
    let allowed = "[0-9a-f], all 64 of a SHA-256";
    Err(NameError::Id { id, allowed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn well_formed_names_come_back_in_parts() {
        let name = Name::parse(
            Kind::Job,
            "resourceGroups/a.b/workspaces/w/experiments/e/jobs/j-1",
        );
        let name = name.unwrap();
        assert_eq!(name.id(), "j-1");
        assert_eq!(ids(name.as_str()), ["a.b", "w", "e", "j-1"]);
        let parent = name.parent().unwrap();
        assert_eq!(
            parent.as_str(),
            "resourceGroups/a.b/workspaces/w/experiments/e"
        );
        assert_eq!(parent.kind(), Kind::Experiment);
        assert_eq!(Name::parse(Kind::Node, "nodes/n").unwrap().parent(), None);
    }

    #[test]
    fn a_pattern_covers_what_its_dashes_stand_for() {
        let text = "resourceGroups/-/workspaces/w/experiments/-";
        let pattern = Name::parse_pattern(Kind::Experiment, text).unwrap();
        assert!(pattern.is_pattern());
        assert_eq!(pattern.prefix(), "resourceGroups/");
        assert!(pattern.covers("resourceGroups/g/workspaces/w/experiments/e"));
        assert!(!pattern.covers("resourceGroups/g/workspaces/v/experiments/e"));
        assert!(!pattern.covers("resourceGroups/g/workspaces/w/experiments/e/jobs/j"));
        assert!(!pattern.covers("resourceGroups/g/workspaces/w"));
        assert!(Name::parse(Kind::Experiment, text).is_err());
        let name = "resourceGroups/g/workspaces/w/clusters/c-d";
        assert_eq!(Kind::of(name), Some(Kind::Cluster));
        let name = Name::parse_pattern(Kind::Cluster, name).unwrap();
        assert!(!name.is_pattern() && name.covers(name.as_str()));
        assert_eq!(name.prefix(), name.as_str());
    }

    #[test]
    fn every_other_text_is_refused() {
        let long = format!("nodes/{}", "x".repeat(65));
        for (kind, text) in [
            (Kind::Node, ""),
            (Kind::Node, "nodes"),
            (Kind::Node, "nodes/"),
            (Kind::Node, "/nodes/n"),
            (Kind::Node, "nodes/a.b"),
            (Kind::Node, "nodes/a/b"),
            (Kind::Node, "xnodes/a"),
            (Kind::Node, "resourceGroups/n"),
            (Kind::Node, long.as_str()),
            (Kind::ResourceGroup, "resourceGroups/.."),
            (Kind::ResourceGroup, "resourceGroups/ü"),
            (Kind::Workspace, "workspaces/w"),
            (Kind::Workspace, "resourceGroups/g/workspaces/w/"),
            (Kind::Workspace, "resourceGroups/g//workspaces/w"),
            (
                Kind::Job,
                "resourceGroups/g/workspaces/w/experiments/e/clusters/j",
            ),
        ] {
            assert!(Name::parse(kind, text).is_err(), "{kind:?} {text:?}");
        }
    }
}
