//! An answer that goes on: it ends when who gets it may not have it any more, and a refusal in it is on record.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use batchai_proto::v1::AuditRecord;
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tonic::Status;
use tonic::body::Body;

use super::quota::Permit;
use super::{Gate, Ticket, end, is_refusal};

/// Whoever gets an answer is judged again this often.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

pub struct Watched {
    inner: Body,
    gate: Gate,
    ticket: Ticket,
    record: AuditRecord,
    /// Made when the answer turns out to be one that goes on.
    look: Option<Interval>,
    over: bool,
    /// Given back when all is said.
    _permit: Option<Permit>,
}

impl Watched {
    pub fn new(
        inner: Body,
        gate: Gate,
        ticket: Ticket,
        record: AuditRecord,
        permit: Option<Permit>,
    ) -> Watched {
        Watched {
            inner,
            gate,
            ticket,
            record,
            look: None,
            over: false,
            _permit: permit,
        }
    }

    /// The end of the answer, where who gets it may not have it any more.
    fn refusal(&mut self, context: &mut Context<'_>) -> Option<Status> {
        if self.ticket.is_open() {
            return None;
        }
        let look = self.look.get_or_insert_with(|| {
            let mut look = interval(LOOK_INTERVAL);
            look.set_missed_tick_behavior(MissedTickBehavior::Delay);
            look.reset();
            look
        });
        let mut refused = None;
        while look.poll_tick(context).is_ready() {
            refused = self.gate.judge(&self.ticket).err();
        }
        refused.map(Status::from)
    }

    /// Puts a refusal on record.
    fn note(&self, status: &Status) {
        if !is_refusal(status.code()) || self.ticket.is_open() {
            return;
        }
        let (audit, record) = (self.gate.audit.clone(), self.record.clone());
        let record = end(record, status.code(), 0);
        tokio::spawn(async move { audit.record(record).await });
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.over {
            return Poll::Ready(None);
        }
        // First: an answer that always has more to say ends as well.
        if let Some(status) = self.refusal(context) {
            self.note(&status);
            self.over = true;
            let mut trailers = HeaderMap::new();
            let ended = status.add_header(&mut trailers);
            return Poll::Ready(Some(ended.map(|()| Frame::trailers(trailers))));
        }
        let frame = std::task::ready!(Pin::new(&mut self.inner).poll_frame(context));
        let trailers = frame.as_ref().and_then(|frame| frame.as_ref().ok());
        let trailers = trailers.and_then(|frame| frame.trailers_ref());
        if let Some(status) = trailers.and_then(Status::from_header_map) {
            self.note(&status);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
