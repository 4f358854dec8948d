//! PURE. Expands `$AZ_BATCHAI_NAME` and `${AZ_BATCHAI_NAME}` where the service, not a shell, reads a text.

use std::collections::BTreeMap;

use super::LaunchError;

const PREFIX: &str = "AZ_BATCHAI_";

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
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let Some((variable, length)) = variable(rest) else {
            out.push('$');
            rest = &rest[1..];
            continue;
        };
        let value = env
            .get(variable)
            .ok_or_else(|| LaunchError::UnknownVariable {
                what: what.to_owned(),
                variable: variable.to_owned(),
                hint: hint(variable),
            })?;
        out.push_str(value);
        rest = &rest[length..];
    }
    out.push_str(rest);
    Ok(out)
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
        "AZ_BATCHAI_SHARED_JOB_TEMP" => ": the job's nodes do not share a machine",
        _ if variable.starts_with("AZ_BATCHAI_INPUT_") => ": no input directory has that id",
        _ if variable.starts_with("AZ_BATCHAI_OUTPUT_") => ": no output directory has that id",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        }
        let error = expand("job.x", "a/$AZ_BATCHAI_OUTPUT_M", &env)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("job.x names $AZ_BATCHAI_OUTPUT_M"),
            "{error}"
        );
    }
}
