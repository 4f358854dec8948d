//! What one caller may use up, and certificates that are about to expire.

use std::fs;
use std::io::Read as _;
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use batchai_common::tls::Route;
use batchai_common::tls::credentials::write_private;
use batchai_common::tls::{Authority, Credentials, Identity, shown};
use batchai_proto::v1;
use batchai_proto::v1::resource_group_service_client::ResourceGroupServiceClient;
use batchai_proto::v1::role_binding::Role;
use batchai_tests::api::{Api, connector};
use batchai_tests::ensemble::Ensemble;
use batchai_tests::process::until;
use tonic::Code;
use tonic_types::StatusExt as _;

type Groups = ResourceGroupServiceClient<Route>;

fn limited(args: &[&str]) -> Api {
    let mut e = Ensemble::without_daemons();
    e.coordinator_args = args.iter().map(|arg| (*arg).to_owned()).collect();
    e.start_coordinator();
    Api::start(e)
}

fn user(api: &Api, name: &str) -> Groups {
    let bind = v1::CreateRoleBindingRequest {
        role_binding_id: name.into(),
        role_binding: Some(v1::RoleBinding {
            member: format!("users/{name}"),
            role: Role::Reader as i32,
            ..Default::default()
        }),
        ..Default::default()
    };
    api.call(api.access().create_role_binding(bind)).unwrap();
    let credentials = api.e.credentials_of(&Identity::user(name).unwrap());
    let channel = connector(&api.e.endpoint, &credentials);
    let channel = api.runtime.block_on(channel.connect()).unwrap();
    ResourceGroupServiceClient::new(channel)
}

fn list(api: &Api, groups: &Groups) -> Result<(), tonic::Status> {
    let mut groups = groups.clone();
    let list = groups.list_resource_groups(v1::ListResourceGroupsRequest::default());
    api.call(list).map(|_| ())
}

fn assert_busy(status: &tonic::Status, what: &str) {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.message().contains(what), "{status:?}");
    let details = status.get_error_details();
    assert!(details.retry_info().is_some() && details.quota_failure().is_some());
}

#[test]
fn who_asks_too_often_is_told_to_come_again_and_holds_up_nobody() {
    let api = limited(&["--calls-per-second", "20"]);
    let (ada, grace) = (user(&api, "ada"), user(&api, "grace"));
    let mut refused = None;
    for _ in 0..500 {
        if let Err(status) = list(&api, &ada) {
            refused = Some(status);
            break;
        }
    }
    assert_busy(&refused.expect("it is too often"), "calls a second");
    list(&api, &grace).unwrap();
    until("her share to be there again", || list(&api, &ada).ok());
    // Strangers have a share of their address: it is not hers, nor the administrator's.
    let nobody = Credentials::read(&api.e.credentials()).unwrap().anonymous();
    let latest = tokio::sync::watch::Sender::new(nobody.client().unwrap());
    let channel = batchai_common::tls::Connector::new(&api.e.endpoint, Some(latest.subscribe()));
    let channel = api.runtime.block_on(channel.unwrap().connect()).unwrap();
    let stranger = ResourceGroupServiceClient::new(channel);
    let codes: Vec<_> = (0..200)
        .map(|_| list(&api, &stranger).unwrap_err().code())
        .collect();
    assert!(codes.starts_with(&[Code::Unauthenticated]));
    assert!(codes.contains(&Code::ResourceExhausted));
    list(&api, &grace).unwrap();
}

#[test]
fn who_has_many_calls_open_gets_no_more() {
    let api = limited(&["--calls-open", "5"]);
    let mut ada = user(&api, "ada");
    let watch = v1::WatchResourceGroupRequest {
        name: "resourceGroups/-".into(),
        ..Default::default()
    };
    let mut open = Vec::new();
    for _ in 0..5 {
        open.push(api.call(ada.watch_resource_group(watch.clone())).unwrap());
    }
    let status = api
        .call(ada.watch_resource_group(watch.clone()))
        .err()
        .unwrap();
    assert_busy(&status, "open calls");
    assert_busy(&list(&api, &ada).unwrap_err(), "open calls");
    list(&api, &user(&api, "grace")).unwrap();
    drop(open.pop());
    until("a call to be closed", || list(&api, &ada).ok());
}

/// A connection that shows no certificate; none where it is not kept.
fn nameless(
    e: &Ensemble,
    credentials: &Path,
) -> Option<rustls::StreamOwned<rustls::ClientConnection, TcpStream>> {
    let nobody = Credentials::read(credentials).unwrap().anonymous();
    let config = nobody.client().unwrap();
    let name = "coordinator.batchai".try_into().unwrap();
    let connection = rustls::ClientConnection::new(config, name).unwrap();
    let stream = TcpStream::connect(e.endpoint.trim_start_matches("https://")).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut stream = rustls::StreamOwned::new(connection, stream);
    // Who is kept gets the settings of HTTP/2; who is not, an end.
    let mut first = [0; 9];
    match stream.read_exact(&mut first) {
        Ok(()) => Some(stream),
        Err(error) => {
            assert_ne!(
                error.kind(),
                std::io::ErrorKind::WouldBlock,
                "neither kept nor refused"
            );
            None
        }
    }
}

#[test]
fn an_address_has_so_many_connections_without_a_certificate() {
    let e = Ensemble::start(0);
    let credentials = e.credentials();
    let mut open = Vec::new();
    let refused = loop {
        match nameless(&e, &credentials) {
            Some(stream) => open.push(stream),
            None => break open.len(),
        }
        assert!(open.len() < 300);
    };
    assert_eq!(refused, 256);
    // Who has a certificate comes in all the same; and so does a stranger once another has gone.
    e.ok(&["group", "list"]);
    drop(open.pop());
    until("a place to be free", || nameless(&e, &credentials));
}

fn expires(path: &Path) -> i64 {
    let credentials = Credentials::read(path).unwrap();
    shown(credentials.certificate().unwrap()).unwrap().not_after
}

fn days_left(until: i64) -> i64 {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    (until - now.as_secs() as i64) / (24 * 3600)
}

/// When the certificate that a new connection is shown expires.
fn expiry_of_connection(e: &Ensemble) -> i64 {
    let config: Arc<rustls::ClientConfig> = Credentials::read(&e.credentials())
        .unwrap()
        .client()
        .unwrap();
    let name = "coordinator.batchai".try_into().unwrap();
    let connection = rustls::ClientConnection::new(config, name).unwrap();
    let stream = TcpStream::connect(e.endpoint.trim_start_matches("https://")).unwrap();
    let mut stream = rustls::StreamOwned::new(connection, stream);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock).unwrap();
    }
    let certificate = &stream.conn.peer_certificates().unwrap()[0];
    shown(certificate).unwrap().not_after
}

#[test]
fn certificates_are_made_anew_before_they_expire_and_used_without_a_restart() {
    let mut e = Ensemble::start(1);
    let authority = Authority::read(&e.path().join("coordinator/pki")).unwrap();
    // The coordinator's: one that somebody put there is read, and as it is about to expire, made anew.
    let path = e.path().join("coordinator/pki/coordinator.pem");
    let day = Duration::from_secs(24 * 3600);
    let soon = authority
        .credentials(&Identity::Replica { id: 1 }, &[], 20 * day)
        .unwrap();
    write_private(&path, &soon).unwrap();
    let put = expires(&path);
    until("the file to be made anew", || {
        (expires(&path) != put).then_some(())
    });
    assert!(days_left(expires(&path)) > 80);
    until("connections to have it", || {
        (expiry_of_connection(&e) == expires(&path)).then_some(())
    });

    // A node's: it asks for another with the one that it has.
    let path = e.path().join("agents/a1/credentials.pem");
    let old = Credentials::read(&path).unwrap();
    let identity = shown(old.certificate().unwrap()).unwrap().identity;
    e.agents.get_mut("a1").unwrap().kill();
    let soon = authority
        .credentials(&identity, &[], Duration::from_secs(20))
        .unwrap();
    write_private(&path, &soon).unwrap();
    let (put, begin) = (expires(&path), Instant::now());
    e.start_agent("a1");
    until("the node to have another", || {
        (expires(&path) != put).then_some(())
    });
    assert!(
        days_left(expires(&path)) > 25,
        "after {:?}",
        begin.elapsed()
    );
    let text = fs::read_to_string(&path).unwrap();
    assert!(
        !soon.contains(text.lines().nth(2).unwrap()),
        "with a key of its own"
    );
    e.until_alive(1);
}

#[test]
fn what_is_good_no_more_is_on_record_as_whose_it_was() {
    let api = Api::start(Ensemble::start(0));
    let ada = user(&api, "ada");
    list(&api, &ada).unwrap();
    let revoke = v1::RevokeCertificatesRequest {
        member: "users/ada".into(),
    };
    api.call(api.access().revoke_certificates(revoke)).unwrap();
    assert_eq!(list(&api, &ada).unwrap_err().code(), Code::Unauthenticated);
    let tail = api.e.ok(&["audit", "tail", "-n", "100", "-o", "tsv"]);
    assert!(
        tail.contains("UNAUTHENTICATED\tnobody, once users/ada"),
        "{tail}"
    );
    let strangers = api.e.path().join("coordinator/audit/strangers.jsonl");
    assert!(
        fs::read_to_string(strangers)
            .unwrap()
            .contains("once users/ada")
    );
}
