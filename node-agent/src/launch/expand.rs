//! PURE. Expands `$AZ_BATCHAI_NAME` and `${AZ_BATCHAI_NAME}` where the service, not a shell, reads a text.

use std::collections::BTreeMap;

use super::LaunchError;

const PREFIX: &str = "AZ_BATCHAI_";

/// A part of a text.
enum Piece<'a> {
    Text(&'a str),
    /// The name of a variable of the service.
    Variable(&'a str),
}

/// Replaces the service's variables; everything else stays as it is.
///
/// # Errors
/// A variable of the service that is not set. `what` says where it stands.
pub fn expand(
    what: &str,
    text: &str,
    env: &BTreeMap<String, String>,
) -> Result<String, LaunchError> {
    let mut out = String::with_capacity(text.len());
    for piece in pieces(text) {
        match piece {
            Piece::Text(text) => out.push_str(text),
            Piece::Variable(name) => out.push_str(known(what, name, env)?),
        }
    }
    Ok(out)
}

/// The text as one word for bash, which replaces the service's variables where and when the word is read; everything else
/// stays as it is.
///
/// # Errors
/// As above.
pub fn quote(
    what: &str,
    text: &str,
    env: &BTreeMap<String, String>,
) -> Result<String, LaunchError> {
    let mut out = String::with_capacity(text.len() + 2);
    for piece in pieces(text) {
        match piece {
            Piece::Text(text) => out.push_str(&literal(text)),
            Piece::Variable(name) => {
                known(what, name, env)?;
                out.push_str(&format!("\"${{{name}}}\""));
            }
        }
    }
    match out.is_empty() {
        true => Ok("''".to_owned()),
        false => Ok(out),
    }
}

/// The text as one word for any shell, as it is.
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn known<'a>(
    what: &str,
    name: &str,
    env: &'a BTreeMap<String, String>,
) -> Result<&'a str, LaunchError> {
    let value = env.get(name).map(String::as_str);
    value.ok_or_else(|| LaunchError::UnknownVariable {
        what: what.to_owned(),
        variable: name.to_owned(),
        hint: hint(name),
    })
}

fn pieces(text: &str) -> Vec<Piece<'_>> {
    let (mut found, mut begin, mut at) = (Vec::new(), 0, 0);
    while let Some(next) = text[at..].find('$') {
        at += next;
        let Some((name, length)) = variable(&text[at..]) else {
            at += 1;
            continue;
        };
        if begin < at {
            found.push(Piece::Text(&text[begin..at]));
        }
        found.push(Piece::Variable(name));
        at += length;
        begin = at;
    }
    if begin < text.len() {
        found.push(Piece::Text(&text[begin..]));
    }
    found
}

/// The variable that a text begins with, and how much of the text it takes.
fn variable(text: &str) -> Option<(&str, usize)> {
    let (body, braces) = match text.strip_prefix("${") {
        Some(body) => (body, true),
        None => (text.strip_prefix('$')?, false),
    };
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let end = body.find(|c| !legal(c)).unwrap_or(body.len());
    let name = &body[..end];
    match braces {
        _ if !name.starts_with(PREFIX) => None,
        false => Some((name, 1 + end)),
        true => body[end..].starts_with('}').then_some((name, 3 + end)),
    }
}

fn hint(variable: &str) -> &'static str {
    match variable {
        _ if variable.starts_with("AZ_BATCHAI_INPUT_") => ": no input directory has that id",
        _ if variable.starts_with("AZ_BATCHAI_OUTPUT_") => ": no output directory has that id",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What bash makes of a word.
    fn of_bash(word: &str, env: &BTreeMap<String, String>) -> String {
        let script = format!("printf %s {word}");
        let bash = std::process::Command::new("/bin/bash")
            .args(["-c", &script])
            .env_clear()
            .envs(env)
            .output();
        String::from_utf8(bash.unwrap().stdout).unwrap()
    }

    #[test]
    fn only_the_services_variables_are_expanded() {
        let env = [
            ("AZ_BATCHAI_A", "one"),
            ("AZ_BATCHAI_A_B", "two"),
            ("HOME", "h"),
        ];
        let env: BTreeMap<_, _> = env.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        for (text, expected) in [
            ("", ""),
            ("$AZ_BATCHAI_A/x", "one/x"),
            ("${AZ_BATCHAI_A}_B", "one_B"),
            ("$AZ_BATCHAI_A_B$AZ_BATCHAI_A", "twoone"),
            ("$HOME ${HOME} $ $$ ${", "$HOME ${HOME} $ $$ ${"),
            ("${AZ_BATCHAI_A", "${AZ_BATCHAI_A"),
            ("ü$AZ_BATCHAI_Aü", "üoneü"),
        ] {
            assert_eq!(expand("x", text, &env).unwrap(), expected, "{text}");
            let word = quote("x", text, &env).unwrap();
            assert_eq!(of_bash(&word, &env), expected, "{text} as {word}");
        }
        let awkward = "it's `id` \\ \"$AZ_BATCHAI_A\" *\n";
        let word = quote("x", awkward, &env).unwrap();
        assert_eq!(of_bash(&word, &env), expand("x", awkward, &env).unwrap());
        let error = expand("job.x", "a/$AZ_BATCHAI_OUTPUT_M", &env)
            .unwrap_err()
            .to_string();
        assert!(quote("job.x", "$AZ_BATCHAI_OUTPUT_M", &env).is_err());
        assert!(
            error.starts_with("job.x names $AZ_BATCHAI_OUTPUT_M"),
            "{error}"
        );
    }
}
