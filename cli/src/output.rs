//! Prints: JSON for programs, tables for people, values for shells.

use std::io::{IsTerminal, Write as _};

use comfy_table::{Table, presets};
use jmespath::Expression;
use prost::Message;
use serde_json::Value;

use crate::args::Format;
use crate::descriptors::to_json;
use crate::error::CliError;

/// How one kind of resource is printed.
pub struct View<M> {
    /// The message's name in the API.
    pub message: &'static str,
    pub columns: &'static [&'static str],
    pub row: fn(&M) -> Vec<String>,
}

/// How this command prints.
pub struct Printer {
    format: Format,
    query: Option<Expression<'static>>,
}

impl Printer {
    /// Takes the format and what of it is wanted, a JMESPath expression.
    pub fn new(format: Format, query: Option<&str>) -> Result<Printer, CliError> {
        let query = query.map(jmespath::compile).transpose();
        let query = query.map_err(|error| CliError::Usage(format!("--query: {error}")))?;
        Ok(Printer { format, query })
    }

    /// Prints one resource.
    pub fn show<M: Message>(&self, view: &View<M>, resource: &M) -> std::io::Result<()> {
        let value = to_json(view.message, resource);
        self.print(&value, view.columns, vec![(view.row)(resource)])
    }

    /// Prints several.
    pub fn list<M: Message>(&self, view: &View<M>, resources: &[M]) -> std::io::Result<()> {
        let values = resources
            .iter()
            .map(|resource| to_json(view.message, resource));
        let rows = resources.iter().map(view.row).collect();
        self.print(&Value::Array(values.collect()), view.columns, rows)
    }

    /// Prints one of many that come one after the other: a line each.
    pub fn line<M: Message>(
        &self,
        message: &str,
        one: &M,
        row: fn(&M) -> Vec<String>,
    ) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        match self.format {
            Format::Json | Format::Jsonc => writeln!(out, "{}", to_json(message, one)),
            Format::Table | Format::Tsv => {
                let cells: Vec<_> = row(one).iter().map(|cell| shown(cell)).collect();
                writeln!(out, "{}", cells.join("\t"))
            }
        }
    }

    /// Prints those that were asked for by name: one is printed as itself.
    pub fn named<M: Message>(&self, view: &View<M>, resources: &[M]) -> std::io::Result<()> {
        match resources {
            [one] => self.show(view, one),
            several => self.list(view, several),
        }
    }

    /// Prints a value, or its rows. What a query finds has columns of its own.
    pub fn print(
        &self,
        value: &Value,
        columns: &[&str],
        rows: Vec<Vec<String>>,
    ) -> std::io::Result<()> {
        let Some(query) = &self.query else {
            let columns: Vec<_> = columns.iter().map(|column| (*column).to_owned()).collect();
            return self.print_as(value, &columns, &rows);
        };
        let found = query.search(value).map_err(std::io::Error::other)?;
        let found = serde_json::to_value(&found).map_err(std::io::Error::other)?;
        let (columns, rows) = table_of(&found);
        self.print_as(&found, &columns, &rows)
    }

    fn print_as(
        &self,
        value: &Value,
        columns: &[String],
        rows: &[Vec<String>],
    ) -> std::io::Result<()> {
        let rows: Vec<Vec<_>> = rows
            .iter()
            .map(|row| row.iter().map(|cell| shown(cell)).collect())
            .collect();
        let mut out = std::io::stdout().lock();
        match self.format {
            Format::Json => writeln!(out, "{value:#}"),
            Format::Jsonc => writeln!(out, "{}", coloured(value, 0)),
            Format::Table => writeln!(out, "{}", table(columns, &rows).trim_fmt()),
            Format::Tsv => rows
                .iter()
                .try_for_each(|row| writeln!(out, "{}", row.join("\t"))),
        }
    }
}

/// Text without what moves a terminal's cursor: names of files are whatever a job made of them.
pub fn shown(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\t' | '\n' => shown.push(' '),
            other if other.is_control() => shown.extend(other.escape_default()),
            other => shown.push(other),
        }
    }
    shown
}

/// The same of several lines.
pub fn shown_lines(text: &str) -> String {
    text.lines().map(shown).collect::<Vec<_>>().join("\n")
}

fn table(columns: &[String], rows: &[Vec<String>]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(columns);
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// What a query found, in rows: a list is a row each, an object one of its values.
fn table_of(value: &Value) -> (Vec<String>, Vec<Vec<String>>) {
    let elements = match value {
        Value::Array(elements) => elements.as_slice(),
        Value::Null => &[],
        one => std::slice::from_ref(one),
    };
    let columns = match elements.first() {
        Some(Value::Object(first)) => first.keys().cloned().collect(),
        _ => vec!["Result".to_owned()],
    };
    let row = |element: &Value| match element {
        Value::Object(object) => columns
            .iter()
            .map(|column| object.get(column).map(cell).unwrap_or_default())
            .collect(),
        Value::Array(cells) => cells.iter().map(cell).collect(),
        one => vec![cell(one)],
    };
    let rows = elements.iter().map(row).collect();
    (columns, rows)
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// JSON with keys, texts and other values in colours of their own.
fn coloured(value: &Value, depth: usize) -> String {
    let (inner, outer) = ("  ".repeat(depth + 1), "  ".repeat(depth));
    match value {
        Value::Object(object) if !object.is_empty() => {
            let line = |(key, value): (&String, &Value)| {
                let key = Value::String(key.clone());
                format!(
                    "{inner}\x1b[34m{key}\x1b[0m: {}",
                    coloured(value, depth + 1)
                )
            };
            let lines: Vec<_> = object.iter().map(line).collect();
            format!("{{\n{}\n{outer}}}", lines.join(",\n"))
        }
        Value::Array(elements) if !elements.is_empty() => {
            let line = |value: &Value| format!("{inner}{}", coloured(value, depth + 1));
            let lines: Vec<_> = elements.iter().map(line).collect();
            format!("[\n{}\n{outer}]", lines.join(",\n"))
        }
        Value::String(_) => format!("\x1b[32m{value}\x1b[0m"),
        Value::Number(_) | Value::Bool(_) => format!("\x1b[33m{value}\x1b[0m"),
        other => other.to_string(),
    }
}

/// Asks a person. Where nobody can be asked, the answer must be on the command line.
pub fn confirm(question: &str, yes: bool) -> Result<(), CliError> {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_query_finds_has_rows() {
        let (columns, rows) = table_of(&json!([{"a": 1, "b": "x"}, {"a": 2}]));
        assert_eq!(columns, ["a", "b"]);
        assert_eq!(rows, [["1", "x"], ["2", ""]]);
        assert_eq!(table_of(&json!(["x", true])).1, [["x"], ["true"]]);
        assert_eq!(table_of(&json!([[1, 2]])).1, [["1", "2"]]);
        assert_eq!(table_of(&json!("x")).1, [["x"]]);
        assert!(table_of(&json!(null)).1.is_empty());
    }

    #[test]
    fn nothing_that_is_shown_moves_the_cursor() {
        assert_eq!(shown("a\tb\nc\x1b[2J\u{9b}é"), "a b c\\u{1b}[2J\\u{9b}é");
        assert_eq!(shown_lines("a\x1b[2J\nb"), "a\\u{1b}[2J\nb");
    }

    #[test]
    fn colours_leave_the_json_as_it_is() {
        let value = json!({"a": [1, {"b": "c\"d"}], "e": {}, "f": null, "g": []});
        let text = coloured(&value, 0);
        assert!(text.contains("\x1b[34m\"a\"\x1b[0m"));
        let mut plain = text;
        for colour in ["\x1b[34m", "\x1b[33m", "\x1b[32m", "\x1b[0m"] {
            plain = plain.replace(colour, "");
        }
        assert_eq!(plain, format!("{value:#}"));
    }
}
