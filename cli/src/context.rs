//! What a command works with: what was typed, else what the environment says (clap reads it), else what is kept in the
//! configuration file, else a default.

use std::collections::BTreeMap;
use std::path::PathBuf;

use batchai_common::names::{Kind, Name};
use batchai_common::tls::connector::TargetError;
use batchai_common::tls::{Connector, Credentials};
use clap::ValueEnum as _;

use crate::args::{ConfigCommand, Global, InExperiment, InGroup, InWorkspace, Setting, Which};
use crate::client::{Client, Target};
use crate::error::CliError;
use crate::output::Printer;

const ENDPOINT_DEFAULT: &str = "https://127.0.0.1:7070";
/// A token to show, without which others on this machine see it: it is no option.
const TOKEN: &str = "BATCHAI_TOKEN";

/// The file of credentials, where none is typed.
const CREDENTIALS: &str = "BATCHAI_CREDENTIALS";

fn credentials() -> Option<PathBuf> {
    let path = std::env::var_os(CREDENTIALS).filter(|path| !path.is_empty());
    path.map(PathBuf::from)
}

/// What is kept, by setting.
type Kept = BTreeMap<String, String>;

/// What every command works with.
pub struct Context {
    pub printer: Printer,
    endpoint: Option<String>,
    credentials: Option<PathBuf>,
    kept: Kept,
}

impl Context {
    pub fn new(global: &Global) -> Result<Context, CliError> {
        Ok(Context {
            printer: Printer::new(global.output, global.query.as_deref())?,
            endpoint: global.endpoint.clone(),
            credentials: global.credentials.clone().or_else(credentials),
            kept: read()?,
        })
    }

    /// Connects to the coordinator.
    pub async fn client(&self) -> Result<Client, CliError> {
        Client::connect(&self.target()).await
    }

    /// Where the coordinator is, and what to show there.
    pub fn target(&self) -> Target {
        let kept = || self.kept.get(key(Setting::Credentials)).map(PathBuf::from);
        Target {
            endpoint: self.endpoint(),
            credentials: self.credentials.clone().or_else(kept),
            token: std::env::var(TOKEN).ok().filter(|token| !token.is_empty()),
        }
    }

    /// Where the coordinator is.
    pub fn endpoint(&self) -> String {
        let kept = || self.kept.get(key(Setting::Endpoint)).cloned();
        let endpoint = self.endpoint.clone().or_else(kept);
        endpoint.unwrap_or_else(|| ENDPOINT_DEFAULT.to_owned())
    }

    fn value(&self, typed: Option<&String>, setting: Setting) -> Option<String> {
        typed
            .cloned()
            .or_else(|| self.kept.get(key(setting)).cloned())
    }

    fn required(
        &self,
        typed: Option<&String>,
        setting: Setting,
        option: &str,
        variable: &str,
    ) -> Result<String, CliError> {
        let key = key(setting);
        let missing = || {
            CliError::Usage(format!(
                "which {key}? Give {option}, set {variable}, or keep it: batchai config set {key} NAME"
            ))
        };
        self.value(typed, setting).ok_or_else(missing)
    }

    /// The full name of a resource group.
    pub fn group(&self, group: &InGroup) -> Result<String, CliError> {
        let (option, variable) = ("-g/--resource-group", "BATCHAI_RESOURCE_GROUP");
        let id = self.required(group.group.as_ref(), Setting::Group, option, variable)?;
        Ok(format!("resourceGroups/{id}"))
    }

    /// The full name of a resource group, or the pattern of all where none is given.
    pub fn any_group(&self, group: &InGroup) -> String {
        self.group(group)
            .unwrap_or_else(|_| "resourceGroups/-".to_owned())
    }

    /// The full name of a workspace.
    pub fn workspace(&self, workspace: &InWorkspace) -> Result<String, CliError> {
        let (option, variable) = ("-w/--workspace", "BATCHAI_WORKSPACE");
        let typed = workspace.workspace.as_ref();
        let id = self.required(typed, Setting::Workspace, option, variable)?;
        Ok(format!("{}/workspaces/{id}", self.group(&workspace.group)?))
    }

    /// The full name of a file server: one of the same workspace, unless it is a full name already.
    pub fn file_server(&self, typed: &str, workspace: &InWorkspace) -> Result<String, CliError> {
        match typed.contains('/') {
            true => full_name(Kind::FileServer, typed),
            false => Ok(format!(
                "{}/fileServers/{typed}",
                self.workspace(workspace)?
            )),
        }
    }

    /// The full name of an experiment.
    pub fn experiment(&self, experiment: &InExperiment) -> Result<String, CliError> {
        let (option, variable) = ("-e/--experiment", "BATCHAI_EXPERIMENT");
        let typed = experiment.experiment.as_ref();
        let id = self.required(typed, Setting::Experiment, option, variable)?;
        Ok(format!(
            "{}/experiments/{id}",
            self.workspace(&experiment.workspace)?
        ))
    }

    /// The full name of a cluster: one of the same workspace, unless it is a full name already. None where none is given.
    pub fn cluster(
        &self,
        typed: Option<&String>,
        workspace: &InWorkspace,
    ) -> Result<Option<String>, CliError> {
        // A file may name one as well: what the environment says must not look as if it was typed.
        let environment = std::env::var("BATCHAI_CLUSTER")
            .ok()
            .filter(|c| !c.is_empty());
        match self.value(typed.or(environment.as_ref()), Setting::Cluster) {
            None => Ok(None),
            Some(name) if name.contains('/') => Ok(Some(full_name(Kind::Cluster, &name)?)),
            Some(id) => Ok(Some(format!(
                "{}/clusters/{id}",
                self.workspace(workspace)?
            ))),
        }
    }

    /// The same where one must be given.
    pub fn the_cluster(
        &self,
        typed: Option<&String>,
        workspace: &InWorkspace,
    ) -> Result<String, CliError> {
        let missing = "which cluster? Give -c/--cluster, set BATCHAI_CLUSTER, or keep it: \
                       batchai config set cluster NAME";
        let cluster = self.cluster(typed, workspace)?;
        cluster.ok_or_else(|| CliError::Usage(missing.to_owned()))
    }

    /// The full names of what is meant. `parent` is asked for only where it is needed.
    pub fn which(
        &self,
        which: &Which,
        kind: Kind,
        parent: impl FnOnce() -> Result<String, CliError>,
    ) -> Result<Vec<String>, CliError> {
        match &which.name {
            None => which.ids.iter().map(|id| full_name(kind, id)).collect(),
            Some(name) if kind.parent().is_none() => {
                Ok(vec![format!("{}/{name}", kind.collection())])
            }
            Some(name) => Ok(vec![format!("{}/{}/{name}", parent()?, kind.collection())]),
        }
    }
}

/// A full name: ours, or one of the original's ids with their subscription and provider.
pub fn full_name(kind: Kind, text: &str) -> Result<String, CliError> {
    Name::parse(kind, text)
        .map(String::from)
        .or_else(|error| name_of(text, kind).ok_or(CliError::Usage(error.to_string())))
}

/// `/subscriptions/{s}/resourceGroups/{g}/providers/Microsoft.BatchAI/workspaces/{w}/clusters/{c}` and the like in our
/// form.
pub fn name_of(id: &str, kind: Kind) -> Option<String> {
    let parts: Vec<_> = id.split('/').filter(|part| !part.is_empty()).collect();
    let mut kinds = vec![kind];
    while let Some(parent) = kinds.last().and_then(|kind| kind.parent()) {
        kinds.push(parent);
    }
    let mut name: Option<Name> = None;
    for kind in kinds.into_iter().rev() {
        let same = |part: &&str| part.eq_ignore_ascii_case(kind.collection());
        let at = parts.iter().position(same)?;
        let id = parts.get(at + 1)?;
        name = Some(match name {
            None => Name::top(kind, id).ok()?,
            Some(name) => name.child(kind, id).ok()?,
        });
    }
    name.map(String::from)
}

fn key(setting: Setting) -> &'static str {
    match setting {
        Setting::Endpoint => "endpoint",
        Setting::Credentials => "credentials",
        Setting::Group => "group",
        Setting::Workspace => "workspace",
        Setting::Experiment => "experiment",
        Setting::Cluster => "cluster",
    }
}

/// `$BATCHAI_CONFIG`, else `batchai/config.json` where the system keeps configuration.
fn path() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(path) = variable("BATCHAI_CONFIG") {
        return Some(path.into());
    }
    let home = || Some(PathBuf::from(variable("HOME")?).join(".config"));
    let base = variable("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(home)?;
    Some(base.join("batchai/config.json"))
}

fn read() -> Result<Kept, CliError> {
    let Some(path) = path() else {
        return Ok(Kept::new());
    };
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Kept::new()),
        Err(source) => return Err(CliError::File { path, source }),
    };
    serde_json::from_str(&text).map_err(|error| CliError::Content {
        path,
        faults: error.to_string(),
    })
}

fn write(kept: &Kept) -> Result<(), CliError> {
    let missing = || CliError::Usage("there is no HOME to keep it in; set BATCHAI_CONFIG".into());
    let path = path().ok_or_else(missing)?;
    let write = || {
        let dir = path.parent().unwrap_or(&path);
        std::fs::create_dir_all(dir)?;
        // Whole or as it was: another command may read it just now.
        let file = tempfile::NamedTempFile::new_in(dir)?;
        serde_json::to_writer_pretty(&file, kept)?;
        file.persist(&path).map(|_| ()).map_err(|error| error.error)
    };
    write().map_err(|source| CliError::File {
        path: path.clone(),
        source,
    })
}

/// `batchai config`.
pub fn config(command: ConfigCommand, context: &Context) -> Result<(), CliError> {
    let mut kept = read()?;
    match command {
        ConfigCommand::Set { setting, value } => {
            check(setting, &value)?;
            let value = match setting {
                // It is used wherever this command is.
                Setting::Credentials => absolute(&value)?,
                _ => value,
            };
            kept.insert(key(setting).to_owned(), value);
            write(&kept)
        }
        ConfigCommand::Unset { setting } => {
            kept.remove(key(setting));
            write(&kept)
        }
        ConfigCommand::Show => {
            let all = Setting::value_variants()
                .iter()
                .map(|setting| key(*setting));
            let rows =
                all.map(|key| vec![key.to_owned(), kept.get(key).cloned().unwrap_or_default()]);
            let value = serde_json::to_value(&kept).map_err(std::io::Error::other)?;
            Ok(context
                .printer
                .print(&value, &["Setting", "Value"], rows.collect())?)
        }
    }
}

fn check(setting: Setting, value: &str) -> Result<(), CliError> {
    let kind = match setting {
        Setting::Endpoint => return check_endpoint(value),
        Setting::Credentials => return Ok(()),
        Setting::Cluster if value.contains('/') => {
            return full_name(Kind::Cluster, value).map(|_| ());
        }
        Setting::Group => Kind::ResourceGroup,
        Setting::Workspace => Kind::Workspace,
        Setting::Experiment => Kind::Experiment,
        Setting::Cluster => Kind::Cluster,
    };
    let checked = batchai_common::names::check_id(kind, value);
    checked.map_err(|error| CliError::Usage(error.to_string()))
}

/// Whether a text could be where a coordinator listens. What to show there is another matter.
fn check_endpoint(text: &str) -> Result<(), CliError> {
    match Connector::new(text, None) {
        Ok(_) | Err(TargetError::NoCredentials { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The whole path of a file of credentials that can be used.
fn absolute(path: &str) -> Result<String, CliError> {
    let path = std::path::absolute(path)?;
    Credentials::read(&path).map_err(|source| CliError::Credentials {
        path: path.clone(),
        source,
    })?;
    Ok(path.to_string_lossy().into_owned())
}
