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
    Node,
}

impl Kind {
    /// The collection that resources of this kind live in, as it stands in names.
    pub fn collection(self) -> &'static str {
        match self {
            Kind::ResourceGroup => "resourceGroups",
            Kind::Workspace => "workspaces",
            Kind::Cluster => "clusters",
            Kind::Experiment => "experiments",
            Kind::Job => "jobs",
            Kind::Node => "nodes",
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
            Kind::Node => "node",
        }
    }

    /// The kind that holds this one.
    pub fn parent(self) -> Option<Kind> {
        match self {
            Kind::ResourceGroup | Kind::Node => None,
            Kind::Workspace => Some(Kind::ResourceGroup),
            Kind::Cluster | Kind::Experiment => Some(Kind::Workspace),
            Kind::Job => Some(Kind::Experiment),
        }
    }

    /// The form of a full name, for messages.
    pub fn pattern(self) -> String {
        let own = format!(
            "{}/{{{}}}",
            self.collection(),
            self.noun().replace(' ', "_")
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
    #[error("{id:?} is not an id: use 1 to 64 characters of {allowed}")]
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
        // Bounded before anything is copied into a message: a name has at most four ids.
        let form = || NameError::Form {
            text: text.chars().take(5 * ID_BYTES_MAX).collect(),
            pattern: kind.pattern(),
        };
        let (rest, id) = text.rsplit_once('/').ok_or_else(form)?;
        let above = rest.strip_suffix(kind.collection()).ok_or_else(form)?;
        match (kind.parent(), above.strip_suffix('/')) {
            (None, None) if above.is_empty() => Name::top(kind, id),
            (Some(parent), Some(above)) => match Name::parse(parent, above) {
                Ok(parent) => parent.child(kind, id),
                Err(NameError::Form { .. }) => Err(form()),
                Err(id) => Err(id),
            },
            _ => Err(form()),
        }
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

/// The ids of a full name, outermost first.
pub fn ids(name: &str) -> Vec<&str> {
    name.split('/').skip(1).step_by(2).collect()
}

/// Checks the last part of a name of the given kind.
pub fn check_id(kind: Kind, id: &str) -> Result<(), NameError> {
    let dots = kind == Kind::ResourceGroup;
    let allowed = if dots {
        "[-A-Za-z0-9_.], not . or .."
    } else {
        "[-A-Za-z0-9_]"
    };
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_' || (dots && c == '.');
    if id.is_empty() || id.len() > ID_BYTES_MAX || !id.chars().all(legal) || id == "." || id == ".."
    {
        let id = id.chars().take(ID_BYTES_MAX + 8).collect();
        return Err(NameError::Id { id, allowed });
    }
    Ok(())
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
