//! Fetches from one other replica. Whom to ask, and when, is not decided here.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use batchai_common::error::causes;
use batchai_common::tls::{Connector, Route};
use batchai_proto::internal::v1::copy_service_client::CopyServiceClient;
use batchai_proto::internal::v1::fetch_copy_request::What;
use batchai_proto::internal::v1::{
    FetchCopyRequest, FetchCopyResponse, KeepBundleRequest, KnownLog, LogsCopy,
};
use tokio::sync::mpsc;
use tonic::{Code, Status, Streaming};

use super::Copies;
use crate::bundles::BundleError;
use crate::logs::FileKey;

/// How long a replica may take to answer at all.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// How long the next piece may take.
const STALL_MAX: Duration = Duration::from_secs(30);
/// Pieces that the disk has not taken yet.
const PIECES_MAX: usize = 8;

/// Why something was not copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error("cannot connect: {0}")]
    Connect(String),
    #[error("it does not answer")]
    Silent,
    #[error("{}", .0.message())]
    Refused(#[from] Status),
    #[error("it sends what was not asked for")]
    Nonsense,
    #[error("what it sends is not what it should be: {0}")]
    Damaged(BundleError),
    #[error("this replica's disk: {0}")]
    Disk(#[from] io::Error),
}

/// Connections to other replicas that are used more than once.
#[derive(Default)]
pub struct Ways(BTreeMap<u64, CopyServiceClient<Route>>);

impl Copies {
    async fn connect(&self, endpoint: &str) -> Result<CopyServiceClient<Route>, CopyError> {
        let connector = Connector::new(endpoint, self.credentials.clone());
        let connector = connector.map_err(|error| CopyError::Connect(error.to_string()))?;
        let route = tokio::time::timeout(CONNECT_MAX, connector.connect()).await;
        let route = route.map_err(|_| CopyError::Silent)?;
        let route = route.map_err(|error| CopyError::Connect(causes(&error)))?;
        Ok(CopyServiceClient::new(route))
    }

    /// Fetches a bundle; `false` where that replica has none.
    pub(super) async fn fetch_bundle(
        &self,
        (id, endpoint): (u64, &str),
        digest: &str,
    ) -> Result<bool, CopyError> {
        let mut client = self.connect(endpoint).await?;
        let request = FetchCopyRequest {
            hello: Some(self.hello(id)),
            what: Some(What::Bundle(format!("bundles/{digest}"))),
        };
        let mut incoming = match client.fetch_copy(request).await {
            Err(status) if status.code() == Code::NotFound => return Ok(false),
            incoming => incoming?.into_inner(),
        };
        let first = next(&mut incoming).await?.ok_or(CopyError::Nonsense)?;
        let size = u64::try_from(first.size).map_err(|_| CopyError::Nonsense)?;
        let (pieces, receiver) = mpsc::channel(PIECES_MAX);
        let (store, wanted) = (self.bundles.clone(), digest.to_owned());
        let kept = tokio::task::spawn_blocking(move || store.receive(&wanted, size, receiver));
        let mut piece = Some(first);
        while let Some(sent) = piece {
            if pieces.send(sent.data).await.is_err() {
                // Whoever writes has given up; it says why.
                break;
            }
            piece = next(&mut incoming).await?;
        }
        drop(pieces);
        match kept.await.map_err(io::Error::other)? {
            Ok(()) => Ok(true),
            Err(BundleError::Io(error)) => Err(error.into()),
            Err(error) => Err(CopyError::Damaged(error)),
        }
    }

    /// Has another replica keep a bundle.
    pub(super) async fn have_kept(
        &self,
        (id, endpoint): (u64, &str),
        digest: &str,
    ) -> Result<(), CopyError> {
        let mut client = self.connect(endpoint).await?;
        let request = KeepBundleRequest {
            hello: Some(self.hello(id)),
            bundle: format!("bundles/{digest}"),
        };
        let mut answer = client.keep_bundle(request).await?.into_inner();
        let kept = answer.message().await?;
        kept.map(drop).ok_or(CopyError::Silent)
    }

    /// Fetches what a replica has of the logs of an attempt beyond what is known.
    pub(super) async fn fetch_logs(
        &self,
        ways: &mut Ways,
        (id, endpoint): (u64, &str),
        wanted: LogsCopy,
    ) -> Result<(), CopyError> {
        let mut client = match ways.0.remove(&id) {
            Some(known) => known,
            None => self.connect(endpoint).await?,
        };
        let attempt = wanted.attempt.clone();
        let request = FetchCopyRequest {
            hello: Some(self.hello(id)),
            what: Some(What::Logs(wanted)),
        };
        let mut incoming = client.fetch_copy(request).await?.into_inner();
        while let Some(piece) = next(&mut incoming).await? {
            let of: KnownLog = piece.of.ok_or(CopyError::Nonsense)?;
            let key = FileKey::new(&attempt, &of.node, &of.file).ok_or(CopyError::Nonsense)?;
            let offset = u64::try_from(of.length).map_err(|_| CopyError::Nonsense)?;
            self.logs.append(key, offset, piece.data, true).await?;
        }
        ways.0.insert(id, client);
        Ok(())
    }
}

async fn next(
    incoming: &mut Streaming<FetchCopyResponse>,
) -> Result<Option<FetchCopyResponse>, CopyError> {
    let piece = tokio::time::timeout(STALL_MAX, incoming.message()).await;
    Ok(piece.map_err(|_| CopyError::Silent)??)
}
