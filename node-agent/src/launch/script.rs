//! PURE. The command line of a python script: interpreter, script and arguments, with the service's variables expanded.

use std::collections::BTreeMap;

use super::LaunchError;
use super::expand::expand;

/// Where none is named.
const PYTHON: &str = "python3";

/// What is started for a script and an interpreter, with these arguments in shell quoting, of a field with this name.
pub fn argv(
    (script, interpreter): (&str, &str),
    (field, arguments): (&str, &str),
    env: &BTreeMap<String, String>,
) -> Result<Vec<String>, LaunchError> {
    let interpreter = match interpreter {
        "" => PYTHON,
        path => path,
    };
    let mut argv = vec![
        expand("python_interpreter_path", interpreter, env)?,
        expand("python_script_file_path", script, env)?,
    ];
    let quoting = || LaunchError::Quoting { what: field.into() };
    for argument in shlex::split(arguments).ok_or_else(quoting)? {
        argv.push(expand(field, &argument, env)?);
    }
    Ok(argv)
}
