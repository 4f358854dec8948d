//! Prints resources: JSON for programs, tables for people.

use std::io::{IsTerminal, Write as _};

use comfy_table::{Table, presets};
use prost::Message;
use serde_json::Value;

use crate::args::Format;
use crate::descriptors::to_json;

/// How one kind of resource is printed.
pub struct View<M> {
    /// The message's name in the API.
    pub message: &'static str,
    pub columns: &'static [&'static str],
    pub row: fn(&M) -> Vec<String>,
}

impl<M: Message> View<M> {
    /// Prints one.
    pub fn show(&self, format: Format, resource: &M) -> std::io::Result<()> {
        match format {
            Format::Json => print_json(&to_json(self.message, resource)),
            Format::Table => self.table(std::slice::from_ref(resource)),
        }
    }

    /// Prints several.
    pub fn list(&self, format: Format, resources: &[M]) -> std::io::Result<()> {
        match format {
            Format::Json => {
                let values = resources
                    .iter()
                    .map(|resource| to_json(self.message, resource));
                print_json(&Value::Array(values.collect()))
            }
            Format::Table => self.table(resources),
        }
    }

    fn table(&self, resources: &[M]) -> std::io::Result<()> {
        let mut table = Table::new();
        table
            .load_preset(presets::NOTHING)
            .set_header(self.columns.iter().copied());
        for resource in resources {
            table.add_row((self.row)(resource));
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        writeln!(std::io::stdout(), "{}", table.trim_fmt())
    }
}

fn print_json(value: &Value) -> std::io::Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(std::io::Error::other)?;
    writeln!(std::io::stdout(), "{text}")
}

/// Asks a person. Where nobody can be asked, the answer must be on the command line.
pub fn confirm(question: &str, yes: bool) -> Result<(), crate::error::CliError> {
    use crate::error::CliError;
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(CliError::Usage(format!(
            "{question} Nobody can be asked: give --yes."
        )));
    }
    eprint!("{question} (y/n): ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(CliError::Failed("nothing was done".to_owned())),
    }
}
