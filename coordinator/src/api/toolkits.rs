//! PURE. Checks the settings of a job's toolkit and fills in their defaults.

use batchai_proto::v1::job::ToolType;
use batchai_proto::v1::{
    CaffeSettings, CntkSettings, CustomToolkitSettings, Job, PyTorchSettings, TensorFlowSettings,
};

use super::faults::Faults;
use super::job_spec::{PROCESSES_MAX, path, text};

const PROCESSES_PER_NODE_MAX: i32 = 1024;

/// A block of settings: its field, whether it is set, and the tool that it is of.
type Block = (&'static str, bool, ToolType);

fn blocks(given: &Job) -> [Block; 9] {
    macro_rules! block {
        ($field:ident, $tool:ident) => {
            (stringify!($field), given.$field.is_some(), ToolType::$tool)
        };
    }
    [
        block!(custom_toolkit_settings, Custom),
        block!(py_torch_settings, Pytorch),
        block!(tensor_flow_settings, Tensorflow),
        block!(cntk_settings, Cntk),
        block!(caffe_settings, Caffe),
        block!(caffe2_settings, Caffe2),
        block!(chainer_settings, Chainer),
        block!(horovod_settings, Horovod),
        block!(custom_mpi_settings, Mpi),
    ]
}

/// Checks that a job has one toolkit, and its settings; says which it is.
pub fn check(faults: &mut Faults, given: &Job) -> ToolType {
    let set: Vec<_> = blocks(given)
        .into_iter()
        .filter(|(_, set, _)| *set)
        .collect();
    match set[..] {
        [_] => {}
        [] => faults.invalid(
            "job",
            "one toolkit must be given: set custom_toolkit_settings, py_torch_settings or another one's settings",
        ),
        _ => {
            let names: Vec<_> = set.iter().map(|(name, ..)| *name).collect();
            let names = names.join(" and ");
            faults.invalid(
                "job",
                format!("exactly one toolkit may be given, not {names}"),
            );
        }
    }
    let nodes = given.node_count;
    if let Some(settings) = &given.custom_toolkit_settings {
        check_custom(faults, settings, nodes);
    }
    if let Some(settings) = &given.py_torch_settings {
        check_pytorch(faults, settings, nodes);
    }
    if let Some(settings) = &given.tensor_flow_settings {
        check_tensorflow(faults, settings, nodes);
    }
    if let Some(settings) = &given.cntk_settings {
        check_cntk(faults, settings, nodes);
    }
    if let Some(settings) = &given.caffe_settings {
        check_caffe(faults, settings, nodes);
    }
    check_scripts(faults, given);
    set.first()
        .map_or(ToolType::Unspecified, |(.., tool)| *tool)
}

/// Those that are a script, or a command, and how many processes.
fn check_scripts(faults: &mut Faults, given: &Job) {
    let nodes = given.node_count;
    macro_rules! script {
        ($field:ident) => {
            if let Some(s) = &given.$field {
                let script = (&*s.python_script_file_path, &*s.python_interpreter_path);
                let at = concat!("job.", stringify!($field));
                check_script(faults, at, script, &s.command_line_args);
            }
        };
    }
    script!(caffe2_settings);
    script!(chainer_settings);
    script!(horovod_settings);
    if let Some(settings) = &given.chainer_settings {
        processes(
            faults,
            "job.chainer_settings",
            settings.process_count,
            nodes,
        );
    }
    if let Some(settings) = &given.horovod_settings {
        processes(
            faults,
            "job.horovod_settings",
            settings.process_count,
            nodes,
        );
    }
    if let Some(settings) = &given.custom_mpi_settings {
        let at = "job.custom_mpi_settings";
        text(
            faults,
            &format!("{at}.command_line"),
            &settings.command_line,
        );
        processes(faults, at, settings.process_count, nodes);
    }
}

/// Fills in the defaults.
pub fn materialise(job: &mut Job) {
    let nodes = job.node_count;
    macro_rules! one_per_node {
        ($($settings:ident),*) => {
            $(if let Some(settings) = &mut job.$settings && settings.process_count == 0 {
                settings.process_count = nodes;
            })*
        };
    }
    one_per_node!(
        py_torch_settings,
        custom_mpi_settings,
        horovod_settings,
        chainer_settings,
        cntk_settings,
        caffe_settings
    );
    if let Some(settings) = &mut job.cntk_settings {
        settings.language_type = match settings.config_file_path.is_empty() {
            true => "Python".to_owned(),
            false => "BrainScript".to_owned(),
        };
    }
    if let Some(settings) = &mut job.py_torch_settings {
        settings.communication_backend = match settings.communication_backend.as_str() {
            "" => "gloo".to_owned(),
            backend => backend.to_ascii_lowercase(),
        };
    }
    if let Some(settings) = &mut job.tensor_flow_settings {
        materialise_tensorflow(settings, nodes);
    }
}

/// There are as many workers as nodes where nothing else is said, and one parameter server where servers have arguments, as the original's
/// job files give them: strategies without servers need none.
fn materialise_tensorflow(settings: &mut TensorFlowSettings, nodes: i32) {
    if settings.worker_count == 0 {
        settings.worker_count = nodes;
    }
    let for_servers = !settings.parameter_server_command_line_args.is_empty();
    if settings.parameter_server_count == 0 && for_servers {
        settings.parameter_server_count = 1;
    }
}

fn check_custom(faults: &mut Faults, given: &CustomToolkitSettings, nodes: i32) {
    const AT: &str = "job.custom_toolkit_settings";
    text(faults, &format!("{AT}.command_line"), &given.command_line);
    let each = given.processes_per_node;
    let all = each.checked_mul(nodes.max(1));
    if !(0..=PROCESSES_PER_NODE_MAX).contains(&each) || all.is_none_or(|n| n > PROCESSES_MAX) {
        let why = format!(
            "must be from 0 to {PROCESSES_PER_NODE_MAX}, and at most {PROCESSES_MAX} over all nodes"
        );
        faults.invalid(format!("{AT}.processes_per_node"), why);
    }
}

fn check_pytorch(faults: &mut Faults, given: &PyTorchSettings, nodes: i32) {
    const AT: &str = "job.py_torch_settings";
    let script = (
        given.python_script_file_path.as_str(),
        given.python_interpreter_path.as_str(),
    );
    check_script(faults, AT, script, &given.command_line_args);
    processes(faults, AT, given.process_count, nodes);
    let field = format!("{AT}.communication_backend");
    match given.communication_backend.to_ascii_lowercase().as_str() {
        "" | "gloo" | "nccl" | "tcp" | "mpi" => {}
        _ => faults.invalid(field, "must be gloo, nccl, tcp or mpi"),
    }
}

fn check_tensorflow(faults: &mut Faults, given: &TensorFlowSettings, nodes: i32) {
    const AT: &str = "job.tensor_flow_settings";
    let script = (
        given.python_script_file_path.as_str(),
        given.python_interpreter_path.as_str(),
    );
    check_script(faults, AT, script, &given.master_command_line_args);
    for (name, arguments) in [
        ("worker_command_line_args", &given.worker_command_line_args),
        (
            "parameter_server_command_line_args",
            &given.parameter_server_command_line_args,
        ),
    ] {
        check_arguments(faults, &format!("{AT}.{name}"), arguments);
    }
    for (name, count, most) in [
        ("worker_count", given.worker_count, PROCESSES_MAX),
        (
            "parameter_server_count",
            given.parameter_server_count,
            nodes,
        ),
    ] {
        if !(0..=most.max(0)).contains(&count) {
            let why = format!("must be from 0 to {most}");
            faults.invalid(format!("{AT}.{name}"), why);
        }
    }
    let mut all = given.clone();
    materialise_tensorflow(&mut all, nodes);
    let processes = all.worker_count.checked_add(all.parameter_server_count);
    if processes.is_some_and(|processes| (0..nodes).contains(&processes)) {
        let why =
            "workers and parameter servers must be at least as many as nodes: no node may be idle";
        faults.invalid(format!("{AT}.worker_count"), why);
    }
}

fn check_cntk(faults: &mut Faults, given: &CntkSettings, nodes: i32) {
    const AT: &str = "job.cntk_settings";
    let language = given.language_type.to_ascii_lowercase();
    if !["", "brainscript", "python"].contains(&language.as_str()) {
        faults.invalid(
            format!("{AT}.language_type"),
            "must be BrainScript or Python",
        );
    }
    let (config, script) = (&given.config_file_path, &given.python_script_file_path);
    either(faults, AT, config, script, &given.python_interpreter_path);
    let contradiction = (language == "brainscript" && !script.is_empty())
        || (language == "python" && !config.is_empty());
    if contradiction {
        let why = "does not go with the path that is given";
        faults.invalid(format!("{AT}.language_type"), why);
    }
    check_arguments(
        faults,
        &format!("{AT}.command_line_args"),
        &given.command_line_args,
    );
    processes(faults, AT, given.process_count, nodes);
}

fn check_caffe(faults: &mut Faults, given: &CaffeSettings, nodes: i32) {
    const AT: &str = "job.caffe_settings";
    let (config, script) = (&given.config_file_path, &given.python_script_file_path);
    either(faults, AT, config, script, &given.python_interpreter_path);
    check_arguments(
        faults,
        &format!("{AT}.command_line_args"),
        &given.command_line_args,
    );
    processes(faults, AT, given.process_count, nodes);
}

/// A configuration or a script, and an interpreter only for the script.
fn either(faults: &mut Faults, at: &str, config: &str, script: &str, interpreter: &str) {
    match (config.is_empty(), script.is_empty()) {
        (true, true) | (false, false) => faults.invalid(
            format!("{at}.config_file_path"),
            "either this or python_script_file_path must be given",
        ),
        (false, true) => path(faults, &format!("{at}.config_file_path"), config),
        (true, false) => path(faults, &format!("{at}.python_script_file_path"), script),
    }
    let field = format!("{at}.python_interpreter_path");
    match (interpreter.is_empty(), script.is_empty()) {
        (true, _) => {}
        (false, true) => faults.invalid(field, "goes with python_script_file_path only"),
        (false, false) => path(faults, &field, interpreter),
    }
}

fn check_script(
    faults: &mut Faults,
    at: &str,
    (script, interpreter): (&str, &str),
    arguments: &str,
) {
    path(faults, &format!("{at}.python_script_file_path"), script);
    if !interpreter.is_empty() {
        path(
            faults,
            &format!("{at}.python_interpreter_path"),
            interpreter,
        );
    }
    let name = match at.ends_with("tensor_flow_settings") {
        true => "master_command_line_args",
        false => "command_line_args",
    };
    check_arguments(faults, &format!("{at}.{name}"), arguments);
}

fn check_arguments(faults: &mut Faults, field: &str, arguments: &str) {
    if shlex::split(arguments).is_none() || arguments.contains('\0') {
        faults.invalid(field, "is not a list of words in shell quoting");
    }
}

fn processes(faults: &mut Faults, at: &str, count: i32, nodes: i32) {
    if count != 0 && (count < nodes || count > PROCESSES_MAX) {
        let why = format!("must be 0 or from node_count to {PROCESSES_MAX}");
        faults.invalid(format!("{at}.process_count"), why);
    }
}
