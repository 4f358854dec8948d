//! The first message of a request that is a stream: it says what the call is about, and is looked at before the call is let pass.
//!
//! Nothing is taken away: whoever answers the call gets it again, with all that follows.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use batchai_common::error::{ApiError, Fault};
use bytes::{Bytes, BytesMut};
use http::Request;
use http_body::{Body as HttpBody, Frame};
use http_body_util::BodyExt as _;
use tonic::Status;
use tonic::body::Body;

use super::FRAME_BYTES;

/// How long it may take to come.
const PATIENCE: Duration = Duration::from_secs(10);
/// The largest there may be.
const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Waits for the first message. Returns the request as it came, and the bytes of that message: fewer where the stream ends before.
pub async fn take(request: Request<Body>) -> Result<(Request<Body>, Bytes), ApiError> {
    let (parts, mut body) = request.into_parts();
    let mut taken = BytesMut::new();
    let read = async {
        loop {
            if let Some(whole) = whole(&taken)? {
                return Ok(whole);
            }
            match body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        taken.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => return Err(invalid(&format!("cannot be read: {error}"))),
                None => return Ok(taken.len()),
            }
        }
    };
    let read = tokio::time::timeout(PATIENCE, read).await;
    let length = read.map_err(|_| invalid("did not come in time"))??;
    let taken = taken.freeze();
    let message = taken.slice(..length);
    let body = Resumed {
        taken: Some(taken),
        rest: body,
    };
    Ok((Request::from_parts(parts, Body::new(body)), message))
}

/// The length of the first message with what stands before it, once all of it is there.
fn whole(taken: &[u8]) -> Result<Option<usize>, ApiError> {
    let Some(length) = taken.get(1..FRAME_BYTES) else {
        return Ok(None);
    };
    let length = length
        .iter()
        .fold(0_usize, |length, byte| length << 8 | usize::from(*byte));
    if length > MESSAGE_BYTES_MAX {
        let why = format!("the first message has more than {MESSAGE_BYTES_MAX} bytes");
        return Err(invalid(&why));
    }
    let end = FRAME_BYTES + length;
    Ok((taken.len() >= end).then_some(end))
}

fn invalid(why: &str) -> ApiError {
    ApiError::Invalid(vec![Fault::new("start", why)])
}

/// A body of which something was taken already.
struct Resumed {
    taken: Option<Bytes>,
    rest: Body,
}

impl HttpBody for Resumed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(taken) = self.taken.take() {
            return Poll::Ready(Some(Ok(Frame::data(taken))));
        }
        Pin::new(&mut self.rest).poll_frame(context)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::StreamBody;

    use super::*;

    fn request(pieces: &[&'static [u8]]) -> Request<Body> {
        let pieces: Vec<_> = pieces
            .iter()
            .map(|piece| Bytes::from_static(piece))
            .collect();
        let frames = pieces
            .into_iter()
            .map(|piece| Ok::<_, Status>(Frame::data(piece)));
        Request::new(Body::new(StreamBody::new(tokio_stream::iter(frames))))
    }

    async fn look(pieces: &[&'static [u8]]) -> (Bytes, Bytes) {
        let (request, message) = take(request(pieces)).await.unwrap();
        let all = request.into_body().collect().await.unwrap().to_bytes();
        (message, all)
    }

    #[tokio::test]
    async fn the_first_message_is_seen_however_it_comes_and_nothing_is_lost() {
        let whole: &[u8] = b"\0\0\0\0\x02abrest";
        assert_eq!(look(&[whole]).await, (whole[..7].into(), whole.into()));
        let pieces: [&[u8]; 4] = [b"\0\0", b"\0\0\x02a", b"br", b"est"];
        assert_eq!(look(&pieces).await, (whole[..7].into(), whole.into()));
        // One that ends too early is for who answers to refuse.
        assert_eq!(
            look(&[b"\0\0"]).await,
            (b"\0\0"[..].into(), b"\0\0"[..].into())
        );
        assert_eq!(look(&[]).await, (Bytes::new(), Bytes::new()));
        let large: [&[u8]; 1] = [b"\0\x7f\0\0\0"];
        assert!(take(request(&large)).await.is_err());
    }
}
