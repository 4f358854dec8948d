//! PURE. Whether a job uses the directory that its nodes share: who gives it a port for that and who serves it must agree.
//!
//! Only texts of the job are looked at: what is in the files that it brings along is not known.

use crate::v1::Job;

/// The variable that has the directory.
pub const SHARED_JOB_TEMP: &str = "AZ_BATCHAI_SHARED_JOB_TEMP";

/// Whether a job names the variable in a path, a command line, an argument or a variable of its own. Secret values are not looked at: they
/// are not expanded.
pub fn is_named(job: &Job) -> bool {
    texts(job).any(|text| text.contains(SHARED_JOB_TEMP))
}

/// Whatever the service, or a shell, expands the service's variables in.
fn texts(job: &Job) -> impl Iterator<Item = &str> {
    let preparation = job.job_preparation.iter().map(|it| &it.command_line);
    let variables = job.environment_variables.iter().map(|it| &it.value);
    let inputs = job.input_directories.iter().map(|it| &it.path);
    let outputs = job.output_directories.iter().map(|it| &it.path_prefix);
    let container = job.container_settings.iter();
    let image = container.filter_map(|it| it.image_source_registry.as_ref());
    let paths = inputs.chain(outputs).chain(image.map(|it| &it.image));
    std::iter::once(&job.std_out_err_path_prefix)
        .chain(preparation)
        .chain(variables)
        .chain(paths)
        .map(String::as_str)
        .chain(toolkit(job))
}

/// Those of the job's toolkit: it has one.
fn toolkit(job: &Job) -> impl Iterator<Item = &str> {
    let mut texts: Vec<&str> = Vec::new();
    if let Some(it) = &job.custom_toolkit_settings {
        texts.push(&it.command_line);
    }
    if let Some(it) = &job.custom_mpi_settings {
        texts.push(&it.command_line);
    }
    if let Some(it) = &job.tensor_flow_settings {
        texts.extend([
            &*it.python_script_file_path,
            &it.python_interpreter_path,
            &it.master_command_line_args,
            &it.worker_command_line_args,
            &it.parameter_server_command_line_args,
        ]);
    }
    if let Some(it) = &job.cntk_settings {
        texts.push(&it.config_file_path);
    }
    if let Some(it) = &job.caffe_settings {
        texts.push(&it.config_file_path);
    }
    macro_rules! scripts {
        ($($settings:ident),*) => {
            $(if let Some(it) = &job.$settings {
                texts.extend([
                    &*it.python_script_file_path,
                    &it.python_interpreter_path,
                    &it.command_line_args,
                ]);
            })*
        };
    }
    scripts!(
        py_torch_settings,
        cntk_settings,
        caffe_settings,
        caffe2_settings,
        chainer_settings,
        horovod_settings
    );
    texts.into_iter()
}

#[cfg(test)]
mod tests {
    use prost_reflect::{DynamicMessage, Kind, Value};

    use super::*;
    use crate::reflect;
    use crate::v1::{
        ContainerSettings, EnvironmentVariableWithSecretValue, ImageSourceRegistry, InputDirectory,
        JobPreparation, NameValuePair, OutputDirectory,
    };

    /// Texts of toolkits that are words of the service's.
    const WORDS: [&str; 2] = ["communication_backend", "language_type"];

    fn named() -> String {
        format!("x ${{{SHARED_JOB_TEMP}}}/y")
    }

    #[test]
    fn every_text_of_every_toolkit_is_looked_at() {
        let job = reflect::descriptor("Job");
        let mut looked_at = 0;
        for settings in job.fields() {
            let Kind::Message(toolkit) = settings.kind() else {
                continue;
            };
            if !settings.name().ends_with("_settings") || settings.name() == "container_settings" {
                continue;
            }
            let texts = toolkit.fields().filter(|it| it.kind() == Kind::String);
            for text in texts {
                let mut inner = DynamicMessage::new(toolkit.clone());
                inner.set_field(&text, Value::String(named()));
                let mut outer = DynamicMessage::new(job.clone());
                outer.set_field(&settings, Value::Message(inner));
                let made: Job = outer.transcode_to().unwrap();
                let wanted = !WORDS.contains(&text.name());
                assert_eq!(is_named(&made), wanted, "{}", text.full_name());
                looked_at += 1;
            }
        }
        assert!(looked_at > 25, "{looked_at}");
    }

    #[test]
    fn what_is_expanded_is_looked_at_and_nothing_else() {
        let with = |change: &dyn Fn(&mut Job)| {
            let mut job = Job::default();
            change(&mut job);
            is_named(&job)
        };
        let variable = |name: &str, value: &str| NameValuePair {
            name: name.to_owned(),
            value: value.to_owned(),
        };
        assert!(with(&|job| job.std_out_err_path_prefix = named()));
        assert!(with(&|job| job.job_preparation = Some(JobPreparation {
            command_line: named(),
        })));
        assert!(with(&|job| {
            job.environment_variables = vec![variable("A", "b"), variable("C", &named())];
        }));
        assert!(with(&|job| job.input_directories = vec![InputDirectory {
            id: "i".to_owned(),
            path: named(),
        }]));
        assert!(with(&|job| job.output_directories =
            vec![OutputDirectory {
                path_prefix: named(),
                ..OutputDirectory::default()
            }]));
        assert!(with(&|job| job.container_settings =
            Some(ContainerSettings {
                image_source_registry: Some(ImageSourceRegistry {
                    image: named(),
                    ..ImageSourceRegistry::default()
                }),
                ..ContainerSettings::default()
            })));
        assert!(!with(&|_| {}));
        assert!(!with(&|job| job.name = named()));
        assert!(!with(&|job| job.secrets =
            vec![EnvironmentVariableWithSecretValue {
                value: named(),
                ..EnvironmentVariableWithSecretValue::default()
            }]));
    }
}
