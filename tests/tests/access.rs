//! Who may do what: every call, by every role, in the right and the wrong part of the ensemble.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use batchai_common::tls::Route;
use batchai_common::tls::{Authority, Identity};
use batchai_proto::agent::v1::agent_service_client::AgentServiceClient;
use batchai_proto::agent::v1::{
    AttemptObservation, FetchBundleRequest, Hello, LogChunk, LogHello, Report, SessionRequest,
    ShipLogsRequest, session_request, ship_logs_request,
};
use batchai_proto::internal::v1::{ExchangeRequest, PeerHello};
use batchai_proto::v1;
use batchai_proto::v1::role_binding::Role;
use batchai_tests::api::{Api, EXPERIMENT, GROUP, WORKSPACE, connector, refusal};
use batchai_tests::ensemble::Ensemble;
use batchai_tests::process::{Process, until};
use batchai_tests::raw;
use bytes::Bytes;
use prost::Message as _;
use prost_reflect::{DynamicMessage, MethodDescriptor, ReflectMessage as _, Value};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

const OTHER: &str = "resourceGroups/g/workspaces/other";

/// Somebody with some credentials.
fn connect(api: &Api, credentials: &std::path::Path) -> Route {
    let connector = connector(&api.e.endpoint, credentials);
    api.runtime.block_on(connector.connect()).unwrap()
}

fn user(api: &Api, name: &str) -> Route {
    let identity = Identity::user(name).unwrap();
    connect(api, &api.e.credentials_of(&identity))
}

fn bind(api: &Api, user: &str, role: Role, scope: &str) {
    let create = v1::CreateRoleBindingRequest {
        role_binding_id: user.into(),
        role_binding: Some(v1::RoleBinding {
            member: format!("users/{user}"),
            role: role as i32,
            scope: scope.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    api.call(api.access().create_role_binding(create)).unwrap();
}

/// A request of a method that is about a part of the ensemble.
fn about(method: &MethodDescriptor, place: &str, name: &str) -> Vec<u8> {
    let mut request = DynamicMessage::new(method.input());
    if !["", "*"].contains(&place) {
        set(&mut request, &place.split('.').collect::<Vec<_>>(), name);
    }
    request.encode_to_vec()
}

fn set(message: &mut DynamicMessage, path: &[&str], text: &str) {
    match path {
        [last] => message.set_field_by_name(last, Value::String(text.to_owned())),
        [first, deeper @ ..] => {
            let field = message.descriptor().get_field_by_name(first).unwrap();
            let inner = field.kind().as_message().unwrap().clone();
            let mut inner = DynamicMessage::new(inner);
            set(&mut inner, deeper, text);
            message.set_field_by_name(first, Value::Message(inner));
        }
        [] => {}
    }
}

/// Whether the gate let a call pass: whatever became of it then.
fn passes(api: &Api, channel: &Route, method: &MethodDescriptor, body: Vec<u8>) -> bool {
    let call = raw::first(channel.clone(), method, Request::new(Bytes::from(body)));
    let call = async { tokio::time::timeout(Duration::from_secs(3), call).await };
    match api.runtime.block_on(call) {
        // A watch that waits has passed.
        Err(_) | Ok(Ok(_)) => true,
        Ok(Err(status)) => {
            let reason = status.get_details_error_info().map(|info| info.reason);
            let refused = ["FORBIDDEN", "UNAUTHENTICATED"];
            let refused = reason.is_some_and(|reason| refused.contains(&reason.as_str()));
            let code = matches!(
                status.code(),
                Code::PermissionDenied | Code::Unauthenticated
            );
            assert_eq!(refused, code, "{}: {status:?}", method.full_name());
            !refused
        }
    }
}

#[test]
fn every_call_is_for_those_only_that_its_rule_names() {
    let api = Api::start(Ensemble::start(0));
    let node = "6c98e5a2-45c8-4cc2-975b-c7ef73faf83b";
    let node = api.e.credentials_of(&Identity::node("n", node).unwrap());
    let replica = api.e.credentials_of(&Identity::Replica { id: 1 });
    let roles = [
        ("reader", Role::Reader),
        ("contributor", Role::Contributor),
        ("owner", Role::Owner),
    ];
    let mut callers = Vec::new();
    for (name, role) in roles {
        for (place, scope) in [("here", WORKSPACE), ("there", OTHER), ("everywhere", "")] {
            let name = format!("{name}-{place}");
            bind(&api, &name, role, scope);
            callers.push((Some((role, scope)), user(&api, &name)));
        }
    }
    callers.push((Some((Role::Admin, "")), api.channel.clone()));
    let node_at = callers.len();
    for credentials in [&node, &replica] {
        callers.push((None, connect(&api, credentials)));
    }
    callers.push((None, user(&api, "unbound")));
    callers.push((None, nobody(&api)));
    let rules = batchai_coordinator::access::rules::RULES;
    for method in raw::methods("batchai.v1") {
        let call = format!("{}/{}", method.parent_service().full_name(), method.name());
        let (_, permission, place) = *rules.iter().find(|(known, ..)| *known == call).unwrap();
        for (bound, channel) in &callers {
            let body = about(&method, place, WORKSPACE);
            let allowed = bound.is_some_and(|(role, scope)| {
                let reaches = match place {
                    "" => scope.is_empty(),
                    "*" => true,
                    _ => scope.is_empty() || scope == WORKSPACE,
                };
                may(role, permission) && reaches
            });
            // What passes looks closer itself, at what is not there.
            let passed = passes(&api, channel, &method, body);
            assert_eq!(passed, allowed, "{call} {permission} by {bound:?}");
        }
    }
    // What agents call is for them only; anybody may try to join.
    let of_agents = raw::methods("batchai.agent.v1").into_iter();
    // Agents serve each other: who may call them is tried with them.
    for method in of_agents.filter(|method| method.parent_service().name() != "PeerService") {
        for (at, (bound, channel)) in callers.iter().enumerate() {
            let is_node = at == node_at;
            let passed = passes(&api, channel, &method, Vec::new());
            let allowed = is_node || method.name() == "Join";
            // Past the gate, a node that speaks for none is refused as well; a token that is none, too.
            let refused_behind = ["FetchBundle", "Session", "Join"].contains(&method.name());
            match refused_behind {
                true => assert!(!passed || allowed, "{} by {bound:?}", method.name()),
                false => assert_eq!(passed, allowed, "{} by {bound:?}", method.name()),
            }
        }
    }
}

/// What replicas say to each other is for them only.
#[test]
fn nobody_but_a_replica_speaks_to_a_replica() {
    let api = Api::start(Ensemble::start(0));
    let node = "6c98e5a2-45c8-4cc2-975b-c7ef73faf83b";
    let node = api.e.credentials_of(&Identity::node("n", node).unwrap());
    let replica = api.e.credentials_of(&Identity::Replica { id: 2 });
    let methods = raw::methods("batchai.internal.v1");
    assert_eq!(methods.len(), 5);
    for method in methods {
        let none = Vec::new();
        assert!(!passes(&api, &api.channel, &method, none.clone()));
        assert!(!passes(&api, &connect(&api, &node), &method, none.clone()));
        assert!(!passes(&api, &nobody(&api), &method, none.clone()));
        let own = connect(&api, &replica);
        assert!(passes(&api, &own, &method, none));
        // Nor does one of them speak for another.
        let hello = PeerHello {
            from: 3,
            to: 1,
            ..PeerHello::default()
        };
        // In all of them, it is the first field.
        let request = ExchangeRequest {
            hello: Some(hello),
            ..ExchangeRequest::default()
        };
        assert!(!passes(&api, &own, &method, request.encode_to_vec()));
    }
}

/// What roles are documented to do, told in another way than the coordinator does.
fn may(role: Role, permission: &str) -> bool {
    let parts: Vec<_> = permission.split('/').collect();
    let reads = parts.last() == Some(&"read");
    match parts[1] {
        "tokens" | "certificates" | "audit" | "replicas" | "backups" | "restores" => {
            role == Role::Admin
        }
        "strayAttempts" => role == Role::Admin,
        "roleBindings" => role >= Role::Owner,
        "resourceGroups" => reads || role >= Role::Owner,
        "workspaces" | "bundles" => reads || role >= Role::Contributor,
        "nodes" | "vmSizes" | "storageAliases" => reads || role == Role::Admin,
        "operations" | "usages" => reads,
        other => panic!("{other}: who may do that?"),
    }
}

/// With trust in the authority, and nothing to show.
fn nobody(api: &Api) -> Route {
    let path = api.e.path().join("nobody.pem");
    std::fs::copy(api.e.path().join("coordinator/pki/ca.pem"), &path).unwrap();
    connect(api, &path)
}

fn get_group(api: &Api, channel: Route, bearer: Option<&str>) -> Result<(), Status> {
    let mut client = v1::resource_group_service_client::ResourceGroupServiceClient::new(channel);
    let name = GROUP.to_owned();
    let mut request = Request::new(v1::GetResourceGroupRequest { name });
    if let Some(token) = bearer {
        let header = format!("Bearer {token}").parse().unwrap();
        request.metadata_mut().insert("authorization", header);
    }
    api.call(client.get_resource_group(request)).map(drop)
}

fn unauthenticated(result: Result<(), Status>) {
    let status = result.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
    refusal(&status);
}

#[test]
fn who_shows_nothing_good_is_nobody() {
    let api = Api::start(Ensemble::with_cluster(0));
    bind(&api, "ada", Role::Reader, "");
    let ada = user(&api, "ada");
    get_group(&api, ada.clone(), None).unwrap();
    unauthenticated(get_group(&api, nobody(&api), None));
    for token in ["", "x", "x.y", "t.", "test.0000"] {
        unauthenticated(get_group(&api, nobody(&api), Some(token)));
    }
    // Revoked: an open connection is no help.
    std::thread::sleep(Duration::from_millis(1100));
    let revoke = v1::RevokeCertificatesRequest {
        member: "users/ada".into(),
    };
    api.call(api.access().revoke_certificates(revoke)).unwrap();
    unauthenticated(get_group(&api, ada, None));
    std::thread::sleep(Duration::from_millis(1100));
    get_group(&api, user(&api, "ada"), None).unwrap();
    // A role that is taken away.
    let delete = v1::DeleteRoleBindingRequest {
        name: "roleBindings/ada".into(),
        ..Default::default()
    };
    api.call(api.access().delete_role_binding(delete)).unwrap();
    let refused = get_group(&api, user(&api, "ada"), None).unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    // An authority of somebody else's.
    let other = Authority::new().unwrap();
    let own = std::fs::read_to_string(api.e.path().join("coordinator/pki/ca.pem")).unwrap();
    let lifetime = Duration::from_secs(60);
    let admin = Identity::user("admin").unwrap();
    let made = other.credentials(&admin, &[], lifetime).unwrap();
    let (made, _) = made.rsplit_once("-----BEGIN CERTIFICATE").unwrap();
    let path = api.e.path().join("other.pem");
    batchai_common::tls::credentials::write_private(&path, &format!("{made}{own}")).unwrap();
    assert!(fails(&api, &path));
    // And a coordinator of somebody else's is not believed.
    let trusting = api.e.path().join("trusting.pem");
    let admins = std::fs::read_to_string(api.e.credentials()).unwrap();
    let (admins, _) = admins.rsplit_once("-----BEGIN CERTIFICATE").unwrap();
    let admins = format!("{admins}{}", other.certificate());
    batchai_common::tls::credentials::write_private(&trusting, &admins).unwrap();
    assert!(fails(&api, &trusting));
    // Expired.
    let authority = Authority::read(&api.e.path().join("coordinator/pki")).unwrap();
    let short = authority
        .credentials(&admin, &[], Duration::from_secs(1))
        .unwrap();
    let path = api.e.path().join("short.pem");
    batchai_common::tls::credentials::write_private(&path, &short).unwrap();
    let open = connect(&api, &path);
    std::thread::sleep(Duration::from_millis(2500));
    unauthenticated(get_group(&api, open, None));
    assert!(fails(&api, &path));
}

/// Whether nothing can be asked for with these credentials.
fn fails(api: &Api, credentials: &std::path::Path) -> bool {
    let connector = connector(&api.e.endpoint, credentials);
    match api.runtime.block_on(connector.connect()) {
        Err(_) => true,
        // With TLS 1.3 a client learns only later that it was refused.
        Ok(channel) => get_group(api, channel, None).is_err(),
    }
}

#[test]
fn roles_and_tokens_are_what_was_asked_for() {
    let api = Api::start(Ensemble::with_cluster(0));
    bind(&api, "ada", Role::Contributor, WORKSPACE);
    let name = "roleBindings/ada".to_owned();
    let get = v1::GetRoleBindingRequest { name: name.clone() };
    let binding = api.call(api.access().get_role_binding(get)).unwrap();
    assert_eq!(
        (&binding.name, binding.member.as_str()),
        (&name, "users/ada")
    );
    assert_eq!(
        (binding.role(), binding.scope.as_str()),
        (Role::Contributor, WORKSPACE)
    );
    assert!(binding.etag.starts_with('"') && binding.create_time.is_some());
    // A token of hers may less than she does.
    let secret = "0123456789abcdef0123456789abcdef";
    let secret_sha256: String = Sha256::digest(secret)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let create = |kind: v1::token::Kind, change: fn(&mut v1::Token)| {
        let mut token = v1::Token {
            kind: kind as i32,
            secret_sha256: secret_sha256.clone(),
            ttl: Some(prost_types::Duration {
                seconds: 600,
                nanos: 0,
            }),
            ..Default::default()
        };
        change(&mut token);
        let create = v1::CreateTokenRequest {
            token_id: format!("{kind:?}").to_lowercase(),
            token: Some(token),
            ..Default::default()
        };
        api.call(api.access().create_token(create))
    };
    let token = create(v1::token::Kind::User, |token| {
        token.member = "users/ada".into();
        token.role = Role::Reader as i32;
        token.scope = EXPERIMENT_SCOPE.into();
    })
    .unwrap();
    assert_eq!(token.name, "tokens/user");
    assert_eq!(
        (token.kind(), token.member.as_str()),
        (v1::token::Kind::User, "users/ada")
    );
    assert_eq!(
        (token.role(), token.scope.as_str()),
        (Role::Reader, EXPERIMENT_SCOPE)
    );
    assert_eq!(
        (token.secret_sha256.as_str(), token.ttl),
        ("", None),
        "what goes in stays in"
    );
    let (created, expires) = (token.create_time.unwrap(), token.expire_time.unwrap());
    assert_eq!(
        (expires.seconds - created.seconds, token.etag.is_empty()),
        (600, false)
    );
    let bearer = format!("user.{secret}");
    let call = |method: &str, request: serde_json::Value| {
        let channel = nobody(&api);
        let header = format!("Bearer {bearer}").parse().unwrap();
        let method = format!("batchai.v1.{method}");
        let call = raw::json_with(channel, &method, request, |request| {
            request.metadata_mut().insert("authorization", header);
        });
        api.runtime.block_on(call).map_err(|status| status.code())
    };
    call(
        "ExperimentService/GetExperiment",
        json!({ "name": EXPERIMENT }),
    )
    .unwrap();
    let refused = call(
        "ExperimentService/DeleteExperiment",
        json!({ "name": EXPERIMENT }),
    );
    assert_eq!(refused, Err(Code::PermissionDenied), "a reader's token");
    assert_eq!(
        call("WorkspaceService/GetWorkspace", json!({ "name": OTHER })),
        Err(Code::PermissionDenied)
    );
    let delete = v1::DeleteTokenRequest {
        name: "tokens/user".into(),
        ..Default::default()
    };
    api.call(api.access().delete_token(delete)).unwrap();
    assert_eq!(
        call(
            "ExperimentService/GetExperiment",
            json!({ "name": EXPERIMENT })
        ),
        Err(Code::Unauthenticated)
    );
    let token = create(v1::token::Kind::Node, |token| {
        token.vm_size = "big".into();
        token.use_count_max = 3;
    })
    .unwrap();
    assert_eq!(
        (token.vm_size.as_str(), token.use_count_max, token.use_count),
        ("big", 3, 0)
    );
    let replica = create(v1::token::Kind::Replica, |_| ()).unwrap_err();
    assert_eq!(
        refusal(&replica),
        (Code::Unimplemented, vec!["token.kind".to_owned()])
    );
    let wrong = create(v1::token::Kind::User, |token| {
        (token.member, token.role, token.scope) = ("nodes/n".into(), 9, "nodes/n".into());
        (token.use_count_max, token.vm_size) = (1, "x".into());
        (token.secret_sha256, token.use_count) = ("x".into(), 1);
        token.ttl = Some(prost_types::Duration {
            seconds: -1,
            nanos: 0,
        });
    });
    let (code, fields) = refusal(&wrong.unwrap_err());
    assert_eq!(code, Code::InvalidArgument);
    for field in [
        "member",
        "role",
        "scope",
        "use_count_max",
        "vm_size",
        "secret_sha256",
        "ttl",
    ] {
        assert!(
            fields.contains(&format!("token.{field}")),
            "{field} in {fields:?}"
        );
    }
}

const EXPERIMENT_SCOPE: &str = WORKSPACE;

#[test]
fn nobody_raises_himself() {
    let api = Api::start(Ensemble::with_cluster(0));
    bind(&api, "owner", Role::Owner, WORKSPACE);
    let owner = user(&api, "owner");
    let mut access = v1::access_service_client::AccessServiceClient::new(owner.clone());
    let mut create = |id: &str, role: Role, scope: &str| {
        let create = v1::CreateRoleBindingRequest {
            role_binding_id: id.into(),
            role_binding: Some(v1::RoleBinding {
                member: "users/friend".into(),
                role: role as i32,
                scope: scope.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let created = api.call(access.create_role_binding(create));
        created.map(drop).map_err(|status| status.code())
    };
    assert_eq!(create("a", Role::Owner, WORKSPACE), Ok(()));
    let denied = Err(Code::PermissionDenied);
    assert_eq!(create("b", Role::Reader, ""), denied);
    assert_eq!(create("b", Role::Reader, GROUP), denied);
    assert_eq!(create("b", Role::Reader, OTHER), denied);
    assert_eq!(create("b", Role::Admin, ""), denied);
    // He sees and deletes what is in his part only.
    let list = api.call(access.list_role_bindings(v1::ListRoleBindingsRequest::default()));
    let seen: Vec<_> = list
        .unwrap()
        .role_bindings
        .into_iter()
        .map(|b| b.name)
        .collect();
    assert_eq!(seen, ["roleBindings/a", "roleBindings/owner"]);
    bind(&api, "elsewhere", Role::Reader, OTHER);
    let delete = v1::DeleteRoleBindingRequest {
        name: "roleBindings/elsewhere".into(),
        ..Default::default()
    };
    let refused = api.call(access.delete_role_binding(delete)).unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    // A job of his runs on no cluster of somebody else's.
    let mut jobs = v1::job_service_client::JobServiceClient::new(owner);
    let create = v1::CreateJobRequest {
        parent: EXPERIMENT.into(),
        job_id: "j".into(),
        job: Some(v1::Job {
            cluster: format!("{OTHER}/clusters/c"),
            ..batchai_tests::api::job()
        }),
        ..Default::default()
    };
    let refused = api.call(jobs.create_job(create)).unwrap_err();
    assert_eq!(
        refused.code(),
        Code::PermissionDenied,
        "{}",
        refused.message()
    );
}

#[test]
fn users_come_by_certificate_and_token_as_the_command_makes_them() {
    let e = Ensemble::with_cluster(0);
    let file = e.path().join("ada.pem");
    let path = file.to_string_lossy().into_owned();
    e.ok(&["user", "certificate", "create", "-u", "ada", "--to", &path]);
    let as_ada = |args: &[&str]| {
        let output = e.command(args).env("BATCHAI_CREDENTIALS", &file).output();
        let output = output.unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (code, said) = as_ada(&["group", "list"]);
    assert!(
        code == 1 && said.contains("users/ada may not do this"),
        "{said}"
    );
    e.ok(&[
        "role",
        "create",
        "-u",
        "ada",
        "--role",
        "contributor",
        "-g",
        "g",
        "-n",
        "a",
    ]);
    assert_eq!(as_ada(&["workspace", "create", "-g", "g", "-n", "w2"]).0, 0);
    assert!(
        as_ada(&["node", "token", "create"])
            .1
            .contains("batchai/tokens/write")
    );
    let token = e.ok(&[
        "user", "token", "create", "-u", "ada", "--role", "reader", "--ttl", "5m",
    ]);
    let authority = e.path().join("coordinator/pki/ca.pem");
    let as_token = |args: &[&str]| {
        let mut command = e.command(args);
        command
            .env("BATCHAI_CREDENTIALS", &authority)
            .env("BATCHAI_TOKEN", token.trim());
        command.output().unwrap().status.code().unwrap()
    };
    assert_eq!(as_token(&["workspace", "list", "-g", "g"]), 0);
    assert_eq!(
        as_token(&["workspace", "delete", "-g", "g", "-n", "w2", "-y"]),
        1
    );
    e.ok(&["role", "delete", "-n", "a", "-y"]);
    assert_eq!(as_token(&["workspace", "list", "-g", "g"]), 1);
    let table = e.ok(&["user", "token", "list", "-o", "table"]);
    assert!(table.contains("users/ada"), "{table}");
    // Others must not read a key.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(&file, open).unwrap();
    let (code, said) = as_ada(&["group", "list"]);
    assert!(code == 2 && said.contains("chmod 600"), "{said}");
}

/// An agent of a node, on a machine of its own: what it keeps lies in directories of the machine's name.
fn agent_on(e: &Ensemble, machine: &str, name: &str, token: &str) -> Process {
    let dir = |what: &str| {
        let path = e.path().join(what).join(machine);
        path.to_string_lossy().into_owned()
    };
    let (data, root) = (dir("agents"), dir("nodes"));
    let args = [
        "node-agent",
        "--coordinator",
        &e.endpoint,
        "--name",
        name,
        "--data",
        &data,
        "--root",
        &root,
    ];
    let log = e.path().join(format!("{machine}.log"));
    Process::start_with(args, &[("BATCHAI_JOIN_TOKEN", token)], &log)
}

fn agent(e: &Ensemble, name: &str, token: &str) -> Process {
    agent_on(e, name, name, token)
}

/// An agent ends by itself, and says why.
fn assert_refused(mut agent: Process, why: &str) {
    assert_eq!(agent.wait().code(), Some(1));
    assert!(agent.log_text().contains(why), "{}", agent.log_text());
}

#[test]
fn machines_join_by_a_token_as_often_as_it_says_and_leave_when_expelled() {
    let mut e = Ensemble::start(0);
    let create = [
        "node",
        "token",
        "create",
        "-n",
        "rack",
        "--vm-size",
        "gpu-size",
        "--ttl",
        "5m",
        "--uses",
        "2",
    ];
    let token = e.ok(&create).trim().to_owned();
    for name in ["n1", "n2"] {
        let process = agent(&e, name, &token);
        e.agents.insert(name.into(), process);
    }
    e.until_alive(2);
    assert_eq!(
        e.json(&["node", "show", "-n", "n1"])["facts"]["vmSize"],
        "gpu-size"
    );
    assert_refused(agent(&e, "n3", &token), "used as often as it may be");
    e.ok(&["node", "token", "revoke", "-n", "rack", "-y"]);
    assert_refused(agent(&e, "n4", &token), "the token is not good");
    // A token of another ensemble's authority.
    let (text, _) = token.rsplit_once('.').unwrap();
    let wrong = format!("{text}.{}", "0".repeat(64));
    let mut fifth = agent(&e, "n5", &wrong);
    until("the wrong authority to be noticed", || {
        fifth.log_text().contains("UnknownIssuer").then_some(())
    });
    fifth.kill();
    // Nobody takes a node's place by its name and UUID, which are no secrets.
    let uid = e.json(&["node", "show", "-n", "n2"])["uid"]
        .as_str()
        .unwrap()
        .to_owned();
    let more = e
        .ok(&["node", "token", "create", "--uses", "5"])
        .trim()
        .to_owned();
    let data = e.path().join("agents/thief");
    std::fs::create_dir_all(&data).unwrap();
    let thief = json!({ "uid": uid, "journal_id": uid, "ensemble": null });
    std::fs::write(data.join("node.json"), thief.to_string()).unwrap();
    assert_refused(
        agent_on(&e, "thief", "n2", &more),
        "another machine is that node",
    );
    // Expelled while it works: the work is lost, and ended there.
    for args in [
        &["group", "create", "-n", "g"][..],
        &["workspace", "create", "-g", "g", "-n", "w"],
        &["experiment", "create", "-g", "g", "-w", "w", "-n", "e"],
        &[
            "cluster", "create", "-g", "g", "-w", "w", "-n", "c", "-s", "gpu-size", "-t", "2",
        ],
    ] {
        e.ok(args);
    }
    let command = "sleep 600";
    e.submit(
        "j",
        json!({ "nodeCount": 2, "customToolkitSettings": { "commandLine": command } }),
    );
    e.until_job("j", "RUNNING");
    let expelled = e.json(&["node", "expel", "-n", "n1", "-y"]);
    assert_eq!(expelled["state"], "EXPELLED");
    assert_refused(e.agents.remove("n1").unwrap(), "was expelled");
    let own = e.path().join("nodes/n1").to_string_lossy().into_owned();
    until("its work to be ended", || {
        let left = batchai_tests::process::processes_of(e.path());
        let left: BTreeSet<_> = left
            .into_iter()
            .filter(|(_, line)| line.contains(&own))
            .collect();
        left.is_empty().then_some(())
    });
    let job = e.json(&["job", "show", "-n", "j", "-g", "g", "-w", "w", "-e", "e"]);
    assert_ne!(job["state"], "RUNNING", "{job}");
    // It does not come back by itself.
    assert_refused(agent(&e, "n1", ""), "was expelled");
    // Another machine takes its name; the old one stays out, also while the new one is away.
    let mut heir = agent_on(&e, "heir", "n1", &more);
    until("the heir to be in contact", || {
        let state = e.json(&["node", "show", "-n", "n1"])["state"].clone();
        (state == "AVAILABLE").then_some(())
    });
    heir.kill();
    assert_refused(agent(&e, "n1", ""), "was expelled");
}

#[test]
fn calls_that_change_something_and_refusals_are_on_record() {
    let api = Api::start(Ensemble::with_cluster(0));
    bind(&api, "ada", Role::Reader, "");
    get_group(&api, user(&api, "ada"), None).unwrap();
    unauthenticated(get_group(&api, nobody(&api), Some("x.y")));
    let tail = v1::TailAuditLogRequest {
        record_count: 2,
        follow: true,
    };
    let mut tail = api.call(api.access().tail_audit_log(tail)).unwrap();
    let mut next = || {
        let next = async { tokio::time::timeout(Duration::from_secs(10), tail.message()).await };
        let next = api.runtime.block_on(next);
        next.expect("in time").unwrap().expect("a record")
    };
    let bound = next();
    assert_eq!(bound.method, "batchai.v1.AccessService/CreateRoleBinding");
    assert_eq!(
        (bound.caller.as_str(), bound.result.as_str()),
        ("users/admin", "OK")
    );
    assert!(bound.revision > 0 && bound.time.is_some() && bound.address.starts_with("127.0.0.1:"));
    let refused = next();
    assert_eq!((refused.caller.as_str(), refused.revision), ("nobody", 0));
    assert_eq!(refused.result, "UNAUTHENTICATED");
    // What comes while one follows, and what came of it.
    let name = format!("{WORKSPACE}/experiments/none");
    let delete = v1::DeleteExperimentRequest {
        name: name.clone(),
        ..Default::default()
    };
    let absent = api
        .call(api.experiments().delete_experiment(delete))
        .unwrap_err();
    assert_eq!(absent.code(), Code::NotFound);
    let deleted = next();
    assert_eq!((deleted.name, deleted.result.as_str()), (name, "NOT_FOUND"));
    let printed = api.e.ok(&["audit", "tail", "-n", "1", "-o", "tsv"]);
    assert!(
        printed.contains("NOT_FOUND\tusers/admin\t127.0.0.1:"),
        "{printed}"
    );
}

/// What an agent could try that belongs to somebody else.
#[test]
fn a_hostile_agent_disturbs_nobody() {
    let api = Api::start(Ensemble::with_cluster(2));
    let command = "echo hello; sleep 600";
    api.e.submit(
        "j",
        json!({ "nodeCount": 1, "customToolkitSettings": { "commandLine": command } }),
    );
    let job = api.e.until_job("j", "RUNNING");
    let attempt = job["attempt"]["id"].as_str().unwrap().to_owned();
    let victim = job["attempt"]["nodes"][0]["node"]
        .as_str()
        .unwrap()
        .to_owned();
    let victim = victim.strip_prefix("nodes/").unwrap().to_owned();
    let shown = api.e.json(&["node", "show", "-n", &victim]);
    let uid = shown["uid"].as_str().unwrap().to_owned();
    let own = "00000000-0000-4000-8000-000000000001";
    let identity = Identity::node("evil", own).unwrap();
    let credentials: PathBuf = api.e.credentials_of(&identity);
    let agent =
        || AgentServiceClient::new(connect(&api, &credentials)).max_encoding_message_size(64 << 20);
    let hello = |node: &str, uid: &str, report: Report| SessionRequest {
        message: Some(session_request::Message::Hello(Hello {
            node_id: node.into(),
            uid: uid.into(),
            journal_id: own.into(),
            facts: Some(v1::NodeFacts {
                vm_size: "x".into(),
                boot_id: "b".into(),
                addresses: vec!["10.0.0.1".into()],
                first_port: 1,
                last_port: 2,
                ..Default::default()
            }),
            report: Some(report),
            ..Default::default()
        })),
    };
    let over = Report {
        attempts: vec![AttemptObservation {
            attempt: attempt.clone(),
            phase: v1::job_attempt_node::Phase::Ended as i32,
            ..Default::default()
        }],
        ..Default::default()
    };
    let session = |requests: Vec<SessionRequest>| {
        let opened = api.call(agent().session(tokio_stream::iter(requests)));
        match opened {
            Ok(mut stream) => api.runtime.block_on(async {
                while stream.message().await?.is_some() {}
                Ok(())
            }),
            Err(status) => Err(status),
        }
    };
    // For another node, with its uid and without.
    for (node, uid) in [
        (victim.as_str(), uid.as_str()),
        (victim.as_str(), own),
        ("../x", own),
    ] {
        let refused = session(vec![hello(node, uid, over.clone())]).unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{node}");
    }
    // For itself, of an attempt that it has no part in.
    let _ = session(vec![hello("evil", own, over.clone())]);
    // More than a report may hold, and floods of it.
    let many = Report {
        attempts: vec![over.attempts[0].clone(); 2000],
        ..Default::default()
    };
    let refused = session(vec![hello("evil", own, many)]).unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    // Logs into others' files, and out of the directory; pieces that are too large.
    let ship = |node: &str, uid: &str, file: &str, size: usize| {
        let hello = LogHello {
            node_id: node.into(),
            uid: uid.into(),
        };
        let chunk = LogChunk {
            attempt: attempt.clone(),
            file: file.into(),
            offset: 0,
            data: Bytes::from(vec![b'x'; size]),
            gap: false,
        };
        let requests = [
            ship_logs_request::Message::Hello(hello),
            ship_logs_request::Message::Chunk(chunk),
        ];
        let requests = requests.map(|message| ShipLogsRequest {
            message: Some(message),
        });
        let mut answers = api.call(agent().ship_logs(tokio_stream::iter(requests)))?;
        api.runtime.block_on(answers.message())
    };
    assert_eq!(
        ship(&victim, &uid, "stdout.txt", 10).unwrap_err().code(),
        Code::PermissionDenied
    );
    let answer = ship("evil", own, "../../../stdout.txt", 10)
        .unwrap()
        .unwrap();
    assert!(answer.unwanted && answer.stored_bytes == 0);
    assert_eq!(
        ship("evil", own, "f", 300_000).unwrap_err().code(),
        Code::InvalidArgument
    );
    assert!(
        ship("evil", own, "f", 5 << 20).is_err(),
        "larger than any message"
    );
    let fetch = FetchBundleRequest {
        node_id: victim.clone(),
        uid: uid.clone(),
        bundle: format!("bundles/{}", "0".repeat(64)),
    };
    let refused = api.call(agent().fetch_bundle(fetch)).map(drop).unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    // The API is not an agent's.
    let refused = get_group(&api, connect(&api, &credentials), None).unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    // It is on record.
    let tail = api.e.ok(&["audit", "tail", "-n", "1000", "-o", "tsv"]);
    for method in ["Session", "ShipLogs", "FetchBundle"] {
        let refusal = format!("batchai.agent.v1.AgentService/{method}");
        let recorded = |line: &str| {
            let what = ["PERMISSION_DENIED", "nodes/evil", &refusal];
            what.iter().all(|part| line.contains(part))
        };
        assert!(tail.lines().any(recorded), "{method} in:\n{tail}");
    }
    // Nothing of it has reached anybody.
    assert_eq!(api.e.job("j")["state"], "RUNNING");
    let list = [
        "job",
        "file",
        "stream",
        "-j",
        "j",
        "-f",
        "stdout.txt",
        "--no-follow",
    ];
    let list: Vec<_> = list
        .into_iter()
        .chain(batchai_tests::ensemble::IN)
        .collect();
    until("the log", || (api.e.ok(&list) == "hello\n").then_some(()));
}

#[test]
fn an_open_stream_ends_when_its_reader_may_not_have_it_any_more() {
    let api = Api::start(Ensemble::with_cluster(0));
    bind(&api, "ada", Role::Reader, WORKSPACE);
    let mut jobs = v1::job_service_client::JobServiceClient::new(user(&api, "ada"));
    let watch = v1::WatchJobRequest {
        name: format!("{EXPERIMENT}/jobs/-"),
        revision: 0,
    };
    let mut changes = api.call(jobs.watch_job(watch)).unwrap();
    api.runtime.block_on(changes.message()).unwrap();
    api.e.ok(&["role", "delete", "-n", "ada", "-y"]);
    let end = async {
        let last = async {
            while changes.message().await?.is_some() {}
            Ok(())
        };
        tokio::time::timeout(Duration::from_secs(20), last).await
    };
    let end: Result<(), Status> = api.runtime.block_on(end).expect("it ends soon");
    assert_eq!(end.unwrap_err().code(), Code::PermissionDenied);
    let tail = api.e.ok(&["audit", "tail", "-n", "100", "-o", "tsv"]);
    assert!(tail.contains("PERMISSION_DENIED\tusers/ada"), "{tail}");
}

#[test]
fn a_call_that_is_given_up_is_on_record_all_the_same() {
    let api = Api::start(Ensemble::with_cluster(0));
    // Given up at some moment or other, until one of them was made all the same.
    let made = (0..500).find(|number| {
        let id = format!("hasty-{number}");
        let mut request = Request::new(v1::CreateRoleBindingRequest {
            role_binding_id: id.clone(),
            role_binding: Some(v1::RoleBinding {
                member: "users/x".into(),
                role: Role::Reader as i32,
                ..Default::default()
            }),
            ..Default::default()
        });
        request.set_timeout(Duration::from_micros(200 + 50 * (number % 100)));
        let given_up = api.call(api.access().create_role_binding(request)).is_err();
        let name = format!("roleBindings/{id}");
        let made = || {
            api.call(
                api.access()
                    .get_role_binding(v1::GetRoleBindingRequest { name }),
            )
        };
        given_up && made().is_ok()
    });
    let made = made.expect("one was given up and made");
    until("the record of it", || {
        let tail = api.e.ok(&["audit", "tail", "-n", "10000", "-o", "tsv"]);
        let recorded =
            |line: &str| line.contains("users/admin") && line.contains(&format!("hasty-{made}\t"));
        tail.lines().any(recorded).then_some(())
    });
}

#[test]
fn an_administrator_who_lost_his_credentials_makes_others_beside_the_coordinator() {
    let e = Ensemble::start(0);
    let to = e.path().join("new.pem").to_string_lossy().into_owned();
    let data = e.path().join("coordinator").to_string_lossy().into_owned();
    std::fs::remove_file(e.credentials()).unwrap();
    assert_eq!(e.fails(&["group", "list"]).0, 2);
    e.ok(&[
        "coordinator",
        "certify",
        "--data",
        &data,
        "--user",
        "admin",
        "--to",
        &to,
    ]);
    e.ok(&["group", "list", "--credentials", &to]);
}
