//! PURE. The command line of a python script: interpreter, script and arguments, with the service's variables expanded.
//!
//! Where no interpreter is named it is the `python3` on the process's PATH, and `python` where there is none: only the node knows, and there a shell
//! finds it. In a container `python` is before `python3`: images of Python 2 have their framework in the one, and
//! the other with something else that needs it.

use std::collections::BTreeMap;

use super::expand::expand;
use super::{Context, LaunchError, bash};

/// Where none is named: as a word of a shell, on a host or in a container. It is python3 that is not found where there is neither.
pub fn python(contained: bool) -> &'static str {
    match contained {
        false => r#""$(command -v python3 || command -v python || echo python3)""#,
        true => r#""$(command -v python || command -v python3 || echo python3)""#,
    }
}

/// What is started for a script and an interpreter, with these arguments in shell quoting, of a field with this name.
pub fn argv(
    context: &Context<'_>,
    (script, interpreter): (&str, &str),
    (field, arguments): (&str, &str),
    env: &BTreeMap<String, String>,
) -> Result<Vec<String>, LaunchError> {
    let mut argv = match interpreter {
        "" => [
            bash(&format!(
                "exec {} \"$@\"",
                python(context.job.container_settings.is_some())
            )),
            vec!["python".into()],
        ]
        .concat(),
        path => vec![expand("python_interpreter_path", path, env)?],
    };
    argv.push(expand("python_script_file_path", script, env)?);
    let quoting = || LaunchError::Quoting { what: field.into() };
    for argument in shlex::split(arguments).ok_or_else(quoting)? {
        argv.push(expand(field, &argument, env)?);
    }
    Ok(argv)
}
