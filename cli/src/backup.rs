//! Backups and restores, and the work that a restored ensemble does not know.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use batchai_coordinator::backup;
use batchai_proto::v1;

use crate::args::{Snapshot, Stray};
use crate::client::{Client, request};
use crate::context::Context;
use crate::error::CliError;
use crate::output::{View, confirm};
use crate::resources::Done;

const STRAY: View<v1::StrayAttempt> = View {
    message: "StrayAttempt",
    columns: &["Attempt", "Job", "Phase", "Nodes", "Missing", "To do"],
    row: |s| {
        let phases: std::collections::BTreeSet<_> = s
            .nodes
            .iter()
            .map(|node| node.phase().as_str_name().to_lowercase())
            .collect();
        let phases: Vec<_> = phases.into_iter().collect();
        vec![
            s.attempt.clone(),
            s.job.clone(),
            phases.join(", "),
            s.nodes.len().to_string(),
            s.missing_nodes.len().to_string(),
            match (s.discarded, s.refusal.is_empty()) {
                (true, _) => "nothing: it is being ended".to_owned(),
                (false, true) => "adopt or discard".to_owned(),
                (false, false) => format!("discard: {}", s.refusal),
            },
        ]
    },
};

pub async fn snapshot(command: Snapshot, context: &Context) -> Done {
    match command {
        Snapshot::Save { to } => {
            save(&context.client().await?, &to).await?;
            let summary = backup::verify(&to)?;
            say!("batchai: {} has {summary}", to.display());
        }
        Snapshot::Verify { file } => println!("{}", backup::verify(&file)?),
        Snapshot::Restore {
            file,
            data,
            confirm: c,
        } => {
            let summary = backup::verify(&file)?;
            confirm(
                &format!(
                    "Begin anew in {} with {summary}? What came after it is lost.",
                    data.display()
                ),
                c.yes,
            )?;
            let begun = backup::begin_anew(&data, &file)?;
            for (name, what) in [
                ("pki", "certificates are its own"),
                ("secrets.key", "secrets stay closed"),
            ] {
                if !data.join(name).exists() {
                    say!(
                        "batchai: {} has no {name}: without the one that the ensemble had, {what}",
                        data.display()
                    );
                }
            }
            say!(
                "batchai: {} begins with {begun}\nbatchai: start its coordinator, see what came back (batchai admin status, \
                 batchai admin stray list), then: batchai admin snapshot accept",
                data.display()
            );
        }
        Snapshot::Accept { force } => {
            let mut client = context.client().await?.admin();
            let accept = v1::AcceptRestoreRequest { force };
            client.accept_restore(request(accept)).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes a backup: whole under its name, or not there.
async fn save(client: &Client, to: &Path) -> Result<(), CliError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| CliError::File { path, source }
    };
    if to.exists() {
        let why = format!("{}: it is there already", to.display());
        return Err(CliError::Usage(why));
    }
    let dir = to.parent().filter(|dir| !dir.as_os_str().is_empty());
    let dir = dir.unwrap_or(Path::new("."));
    // Sealed secrets and digests of tokens are in it: it is nobody else's from the beginning, and goes where anything fails.
    let part = tempfile::Builder::new().prefix(".backup-").tempfile_in(dir);
    let mut part = part.map_err(failed(dir))?;
    let mut client = client.admin();
    let saved = client.save_snapshot(v1::SaveSnapshotRequest {}).await?;
    let mut pieces = saved.into_inner();
    while let Some(piece) = pieces.message().await? {
        part.write_all(&piece.data).map_err(failed(to))?;
    }
    part.as_file().sync_all().map_err(failed(to))?;
    // What was cut off on its way is refused here, and leaves nothing under the name that was asked for.
    backup::verify(part.path())?;
    let kept = part.persist_noclobber(to).map_err(|error| error.error);
    kept.map_err(failed(to))?;
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(failed(dir))
}

pub async fn stray(command: Stray, context: &Context) -> Done {
    let mut client = context.client().await?.admin();
    match command {
        Stray::List => {
            let list = v1::ListStrayAttemptsRequest::default();
            let all =
                crate::resources::all_pages!(client.list_stray_attempts, list, stray_attempts);
            context.printer.list(&STRAY, &all)?;
        }
        Stray::Adopt { attempt } => {
            let adopt = v1::AdoptAttemptRequest { attempt };
            let adopted = client.adopt_attempt(request(adopt)).await?;
            say!("batchai: {} runs by it", adopted.into_inner().job);
        }
        Stray::Discard {
            attempt,
            confirm: c,
        } => {
            confirm(&format!("End {attempt} wherever it runs?"), c.yes)?;
            let discard = v1::DiscardAttemptRequest { attempt };
            client.discard_attempt(request(discard)).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
