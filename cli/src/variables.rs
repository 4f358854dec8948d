//! Variables of a job's environment, as they were typed.

use batchai_proto::v1::{EnvironmentVariableWithSecretValue, Job, NameValuePair};

use crate::args::Variables;
use crate::error::CliError;

/// Puts variables into a job, in place of those that its file sets to something else.
pub fn add(job: &mut Job, given: Variables) -> Result<(), CliError> {
    for text in given.variables {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => (text.clone(), own(&text)?),
        };
        remove(job, &name);
        job.environment_variables
            .push(NameValuePair { name, value });
    }
    for name in given.secrets {
        let value = own(&name)?;
        remove(job, &name);
        job.secrets.push(EnvironmentVariableWithSecretValue {
            name,
            value,
            value_secret_reference: None,
        });
    }
    Ok(())
}

fn remove(job: &mut Job, name: &str) {
    job.environment_variables.retain(|known| known.name != name);
    job.secrets.retain(|known| known.name != name);
}

fn own(name: &str) -> Result<String, CliError> {
    std::env::var(name).map_err(|_| CliError::Usage(format!("the variable {name} is not set here")))
}
