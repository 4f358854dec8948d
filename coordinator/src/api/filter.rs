//! PURE. Filters of lists: `FIELD OPERATOR VALUE`, joined by `AND`.
//!
//! A filter is checked against the descriptor of what it filters before anything is read, so that one that can never hold
//! is refused. There is no `OR`, no `NOT` and no parentheses.

use std::cmp::Ordering;

use batchai_proto::reflect::{descriptor, dynamic};
use prost::Message;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, Value};
use prost_types::Timestamp;

const FILTER_BYTES_MAX: usize = 1024;
/// Each is looked for in every element.
const TERMS_MAX: usize = 16;
const TIMESTAMP: &str = "google.protobuf.Timestamp";

/// What must hold of an element.
pub struct Filter {
    message: &'static str,
    terms: Vec<Term>,
}

struct Term {
    path: Vec<FieldDescriptor>,
    /// The key, where the path leads to a map.
    key: Option<String>,
    operator: Operator,
    literal: Literal,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Operator {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Contains,
}

/// The longer ones first: `<=` is no `<`.
const OPERATORS: [(&str, Operator); 7] = [
    ("<=", Operator::LessOrEqual),
    (">=", Operator::GreaterOrEqual),
    ("!=", Operator::NotEqual),
    ("=", Operator::Equal),
    ("<", Operator::Less),
    (">", Operator::Greater),
    (":", Operator::Contains),
];

enum Literal {
    Text(String),
    Number(f64),
    Bool(bool),
    /// The number of a value of an enum.
    Enum(i32),
    Time(i64, i32),
}

impl Filter {
    /// Takes a filter of messages of a name. `None` where it is empty: then everything passes.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(message: &'static str, text: &str) -> Result<Option<Filter>, String> {
        if text.len() > FILTER_BYTES_MAX {
            return Err(format!("has more than {FILTER_BYTES_MAX} bytes"));
        }
        let mut rest = text.trim();
        if rest.is_empty() {
            return Ok(None);
        }
        let mut terms = Vec::new();
        loop {
            let (term, after) = parse_term(message, rest)?;
            terms.push(term);
            if terms.len() > TERMS_MAX {
                return Err(format!("has more than {TERMS_MAX} comparisons"));
            }
            rest = after.trim_start();
            if rest.is_empty() {
                return Ok(Some(Filter { message, terms }));
            }
            let and = rest.strip_prefix("AND ");
            rest = and.ok_or_else(|| format!("AND is expected before {rest:?}"))?;
        }
    }

    /// Whether all of it holds.
    pub fn matches<M: Message>(&self, element: &M) -> bool {
        let element = dynamic(self.message, element);
        self.terms.iter().all(|term| term.holds(&element))
    }
}

fn parse_term<'a>(message: &str, text: &'a str) -> Result<(Term, &'a str), String> {
    let text = text.trim_start();
    let end = text.find(|c: char| c.is_whitespace() || "<>!=:\"".contains(c));
    let (field, rest) = text.split_at(end.unwrap_or(text.len()));
    let rest = rest.trim_start();
    let operator = OPERATORS.iter().find(|(sign, _)| rest.starts_with(sign));
    let (sign, operator) = operator
        .ok_or_else(|| format!("an operator (= != < <= > >= :) is expected behind {field:?}"))?;
    let rest = rest[sign.len()..].trim_start();
    let (value, rest) = match rest.strip_prefix('"') {
        Some(quoted) => quoted.split_once('"').ok_or("a quote is not closed")?,
        None => rest.split_at(rest.find(char::is_whitespace).unwrap_or(rest.len())),
    };
    let (path, key) = path_of(message, field)?;
    let literal = literal_of(path.last(), key.as_deref(), *operator, value);
    let literal = literal.map_err(|why| format!("{field}: {why}"))?;
    let operator = *operator;
    let term = Term {
        path,
        key,
        operator,
        literal,
    };
    Ok((term, rest))
}

type Path = (Vec<FieldDescriptor>, Option<String>);

fn path_of(message: &str, text: &str) -> Result<Path, String> {
    let mut at = descriptor(message);
    let mut path: Vec<FieldDescriptor> = Vec::new();
    let mut parts = text.split('.');
    while let Some(part) = parts.next() {
        let field = at
            .get_field_by_name(part)
            .or_else(|| at.get_field_by_json_name(part));
        let field = field.ok_or_else(|| format!("{text:?} is not a field of {message}"))?;
        let inner = field.kind();
        path.push(field.clone());
        if field.is_map() {
            let key = parts.collect::<Vec<_>>().join(".");
            return Ok((path, Some(key).filter(|key| !key.is_empty())));
        }
        match inner.as_message() {
            Some(inner) if !field.is_list() && inner.full_name() != TIMESTAMP => at = inner.clone(),
            _ if parts.next().is_some() => return Err(format!("{text:?} goes too deep")),
            _ => return Ok((path, None)),
        }
    }
    Err(format!("{text:?} has fields of its own; name one"))
}

fn literal_of(
    field: Option<&FieldDescriptor>,
    key: Option<&str>,
    operator: Operator,
    text: &str,
) -> Result<Literal, String> {
    let field = field.ok_or("is not a field")?;
    let contains = operator == Operator::Contains;
    let ordered = !matches!(operator, Operator::Equal | Operator::NotEqual);
    if field.is_map() && key.is_none() && !contains {
        return Err("say which: labels.NAME, or labels:NAME for any value".to_owned());
    }
    if field.is_list() && (!contains || field.kind() != Kind::String) {
        return Err("lists of texts only, and only by `:`".to_owned());
    }
    if field.is_map() {
        return Ok(Literal::Text(text.to_owned()));
    }
    match field.kind() {
        Kind::String => Ok(Literal::Text(text.to_owned())),
        _ if contains => Err("only texts contain something".to_owned()),
        Kind::Bool if !ordered => match text {
            "true" => Ok(Literal::Bool(true)),
            "false" => Ok(Literal::Bool(false)),
            _ => Err("must be true or false".to_owned()),
        },
        Kind::Enum(values) if !ordered => {
            let wanted = text.replace('_', "");
            let same = |name: &str| name.replace('_', "").eq_ignore_ascii_case(&wanted);
            let found = values.values().find(|value| same(value.name()));
            let names: Vec<_> = values
                .values()
                .skip(1)
                .map(|v| v.name().to_owned())
                .collect();
            let why = || format!("{text:?} is none of {}", names.join(", "));
            found
                .map(|value| Literal::Enum(value.number()))
                .ok_or_else(why)
        }
        Kind::Int32 | Kind::Int64 | Kind::Double => {
            let number = text
                .parse()
                .map_err(|_| format!("{text:?} is not a number"))?;
            Ok(Literal::Number(number))
        }
        Kind::Message(message) if message.full_name() == TIMESTAMP => {
            let time: Timestamp = text
                .parse()
                .map_err(|_| format!("{text:?} is not a time such as 2026-01-31T12:00:00Z"))?;
            Ok(Literal::Time(time.seconds, time.nanos))
        }
        _ => Err("cannot be compared like that".to_owned()),
    }
}

impl Term {
    fn holds(&self, element: &DynamicMessage) -> bool {
        self.holds_below(element, &self.path)
    }

    fn holds_below(&self, at: &DynamicMessage, path: &[FieldDescriptor]) -> bool {
        let absent = self.operator == Operator::NotEqual;
        let Some((field, below)) = path.split_first() else {
            return false;
        };
        if field.supports_presence() && !at.has_field(field) {
            return absent;
        }
        let value = at.get_field(field);
        match (value.as_ref(), &self.key, &self.literal) {
            (Value::Message(inner), _, _) if !below.is_empty() => self.holds_below(inner, below),
            (Value::Map(map), None, Literal::Text(name)) => {
                map.contains_key(&MapKey::String(name.clone()))
            }
            (Value::Map(map), Some(key), _) => match map.get(&MapKey::String(key.clone())) {
                Some(value) => self.compare(value),
                None => absent,
            },
            (Value::List(values), _, _) => values.iter().any(|value| {
                matches!((value, &self.literal), (Value::String(a), Literal::Text(b)) if a == b)
            }),
            (value, _, _) => self.compare(value),
        }
    }

    fn compare(&self, value: &Value) -> bool {
        if let (Operator::Contains, Value::String(text), Literal::Text(part)) =
            (self.operator, value, &self.literal)
        {
            return text.contains(part.as_str());
        }
        let Some(order) = order(value, &self.literal) else {
            return false;
        };
        match self.operator {
            Operator::Equal => order == Ordering::Equal,
            Operator::NotEqual => order != Ordering::Equal,
            Operator::Less => order == Ordering::Less,
            Operator::LessOrEqual => order != Ordering::Greater,
            Operator::Greater => order == Ordering::Greater,
            Operator::GreaterOrEqual => order != Ordering::Less,
            Operator::Contains => false,
        }
    }
}

fn order(value: &Value, literal: &Literal) -> Option<Ordering> {
    match (value, literal) {
        (Value::String(a), Literal::Text(b)) => Some(a.as_str().cmp(b)),
        (Value::Bool(a), Literal::Bool(b)) => Some(a.cmp(b)),
        (Value::EnumNumber(a), Literal::Enum(b)) => Some(a.cmp(b)),
        (Value::I32(a), Literal::Number(b)) => f64::from(*a).partial_cmp(b),
        (Value::I64(a), Literal::Number(b)) => (*a as f64).partial_cmp(b),
        (Value::F64(a), Literal::Number(b)) => a.partial_cmp(b),
        (Value::Message(time), Literal::Time(seconds, nanos)) => {
            let seconds_of = time.get_field_by_name("seconds")?.as_i64()?;
            let nanos_of = time.get_field_by_name("nanos")?.as_i32()?;
            Some((seconds_of, nanos_of).cmp(&(*seconds, *nanos)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use batchai_proto::v1::job::State;
    use batchai_proto::v1::{Job, Node, NodeFacts};

    use super::*;

    #[test]
    fn elements_pass_for_which_all_of_it_holds() {
        let job = Job {
            name: "resourceGroups/g/workspaces/w/experiments/e/jobs/j".into(),
            node_count: 2,
            state: State::Running as i32,
            create_time: Some("2026-01-31T12:00:00Z".parse().unwrap()),
            labels: [("team.x".to_owned(), "vision lab".to_owned())].into(),
            ..Default::default()
        };
        let passes = |text: &str| match Filter::parse("Job", text) {
            Ok(Some(filter)) => filter.matches(&job),
            Ok(None) => true,
            Err(why) => panic!("{text}: {why}"),
        };
        for text in [
            "",
            "state = RUNNING",
            "state=running AND node_count>=2",
            "nodeCount < 3",
            "labels.team.x = \"vision lab\"",
            "labels.team.x:lab AND labels:team.x",
            "labels.other != x",
            "exit_code != 1",
            "create_time > 2026-01-01T00:00:00Z",
            "name:jobs/j",
        ] {
            assert!(passes(text), "{text}");
        }
        for text in [
            "state != RUNNING",
            "state = RUNNING AND node_count = 3",
            "labels.other = x",
            "labels:team",
            "exit_code = 0",
            "end_time < 2030-01-01T00:00:00Z",
        ] {
            assert!(!passes(text), "{text}");
        }
        let facts = NodeFacts {
            vm_size: "big".into(),
            addresses: vec!["10.0.0.4".into()],
            ..Default::default()
        };
        let node = Node {
            facts: Some(facts),
            ..Default::default()
        };
        for (text, expected) in [
            ("facts.vm_size = big", true),
            ("facts.addresses:10.0.0.4", true),
            ("facts.addresses:10.0.0.5", false),
        ] {
            let filter = Filter::parse("Node", text).unwrap().unwrap();
            assert_eq!(filter.matches(&node), expected, "{text}");
        }
    }

    #[test]
    fn what_can_never_hold_is_refused() {
        for (text, why) in [
            ("stat = RUNNING", "not a field"),
            ("state = GOING", "none of QUEUED"),
            ("state", "operator"),
            ("state > RUNNING", "cannot be compared"),
            ("node_count = many", "not a number"),
            ("labels.team = \"open", "not closed"),
            ("labels = x", "say which"),
            ("attempt = x", "fields of its own"),
            ("create_time = yesterday", "not a time"),
            ("node_count = 1 OR node_count = 2", "AND is expected"),
            ("name.part = x", "too deep"),
            ("errors:x", "lists of texts only"),
            (&["node_count = 1"; 17].join(" AND "), "more than 16"),
        ] {
            let Err(said) = Filter::parse("Job", text) else {
                panic!("{text} was taken");
            };
            assert!(said.contains(why), "{text}: {said}");
        }
    }
}
