//! A connection: calls are read from it, done, and their answers written, in bounds.
//!
//! A client has a number of calls that are being done or whose answers it has not taken; then no more are done for it. The data of all
//! calls together, and of all answers, have their room in memory before they are there: whoever finds none left waits. That is a bound for
//! the process, and not for the patience of others: several clients that begin large calls, or ask for much and take nothing, can have
//! all of it until `PATIENCE` is over.
//!
//! The two have rooms of their own, and a call waits for that of its data before it has anything else: so nobody waits in a circle.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::clients::{CALLS_OF_ONE, Seat, notice_death};
use super::protocol::IO_MAX;
use super::server::Server;
use super::{calls, rpc, said};

/// What a call has beside the data that it writes is less.
const RECORD_MAX: usize = IO_MAX as usize + (8 << 10);
/// Of a record: no client sends more than a few.
const PIECES_MAX: usize = 1024;
/// For calls that are read and done.
const CALLS_BYTES: usize = 128 << 20;
/// For answers that are made and written. What READ and listings are not counted for is small.
const ANSWERS_BYTES: usize = 128 << 20;
/// A call that writes nothing comes with one look at the connection.
const BUFFER: usize = 1 << 10;
/// After this a client connects anew when it has something to say.
const IDLE: Duration = Duration::from_secs(15 * 60);
/// For what is under way in either direction.
const PATIENCE: Duration = Duration::from_secs(60);

/// Room for what all connections carry.
pub struct Memory {
    calls: Arc<Semaphore>,
    answers: Arc<Semaphore>,
}

impl Memory {
    pub fn new() -> Memory {
        Memory {
            calls: Arc::new(Semaphore::new(CALLS_BYTES)),
            answers: Arc::new(Semaphore::new(ANSWERS_BYTES)),
        }
    }
}

/// Waits for room. None: the server ends.
async fn room(of: &Arc<Semaphore>, bytes: usize) -> Option<OwnedSemaphorePermit> {
    let bytes = u32::try_from(bytes).ok()?;
    Arc::clone(of).acquire_many_owned(bytes).await.ok()
}

/// Reads calls until the client goes, or does what it may not.
pub async fn serve(server: &Arc<Server>, stream: TcpStream, seat: &Seat, stop: &CancellationToken) {
    let prepared = stream.set_nodelay(true);
    let prepared = prepared.and_then(|()| Ok(notice_death(&stream)?));
    if let Err(error) = prepared
        && said::may_say("options", None)
    {
        tracing::warn!(%error, "answers are slow, or it is not noticed when a client vanishes");
    }
    let (read, write) = stream.into_split();
    let mut read = BufReader::with_capacity(BUFFER, read);
    let (send, answers) = mpsc::channel(CALLS_OF_ONE);
    let writing = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = write_answers(write, answers) => writing.cancel(),
            () = writing.cancelled() => {}
        }
    });
    while let Some(record) = next_record(&mut read, &server.memory.calls, seat.address).await {
        let Ok(permit) = Arc::clone(&seat.client.calls).acquire_owned().await else {
            return;
        };
        let most = calls::most(&record.bytes);
        let Some(answer_room) = room(&server.memory.answers, most).await else {
            return;
        };
        let held = [permit, answer_room];
        let (own, send, address) = (Arc::clone(server), send.clone(), seat.address);
        // It is done to its end, also where the connection ends before.
        server.tracker.spawn_blocking(move || {
            // All of it: with its room, which the bytes alone would leave behind.
            let record = record;
            if let Some(answer) = own.answer(address, &record.bytes) {
                // There is room for as many as there are permits; a client that is gone wants none.
                let _ = send.try_send((rpc::whole(answer), held));
            }
        });
    }
}

/// An answer, and what is free when it is written.
type Answer = (Vec<u8>, [OwnedSemaphorePermit; 2]);

/// Ends when the client does not take its answers.
async fn write_answers(mut write: OwnedWriteHalf, mut answers: mpsc::Receiver<Answer>) {
    while let Some((answer, held)) = answers.recv().await {
        let written = tokio::time::timeout(PATIENCE, write.write_all(&answer)).await;
        if !matches!(written, Ok(Ok(()))) {
            return;
        }
        drop((answer, held));
    }
}

/// A call with the room that it takes.
struct Record {
    bytes: Vec<u8>,
    _room: OwnedSemaphorePermit,
}

/// The next call. None where there is none, or it is too long or too slow.
async fn next_record(
    read: &mut (impl AsyncRead + Unpin),
    memory: &Arc<Semaphore>,
    client: IpAddr,
) -> Option<Record> {
    let mut mark = [0; 4];
    tokio::time::timeout(IDLE, read.read_exact(&mut mark))
        .await
        .ok()?
        .ok()?;
    let (length, last) = rpc::piece(mark);
    // How long a call of several pieces is, none of them says.
    let most = if last { length } else { RECORD_MAX };
    if length > RECORD_MAX {
        return refuse(client);
    }
    let room = room(memory, most).await?;
    let rest = async {
        let mut bytes = Vec::with_capacity(most);
        for _ in 0..PIECES_MAX {
            let (length, last) = rpc::piece(mark);
            if bytes.len() + length > RECORD_MAX || (length == 0 && !last) {
                return refuse(client);
            }
            let end = bytes.len() + length;
            let mut piece = (&mut *read).take(length as u64);
            while bytes.len() < end {
                if piece.read_buf(&mut bytes).await.ok()? == 0 {
                    return None;
                }
            }
            if last {
                return Some(bytes);
            }
            read.read_exact(&mut mark).await.ok()?;
        }
        refuse(client)
    };
    let bytes = tokio::time::timeout(PATIENCE, rest).await.ok()??;
    Some(Record { bytes, _room: room })
}

fn refuse<T>(client: IpAddr) -> Option<T> {
    if said::may_say("too long", Some(client)) {
        tracing::warn!(%client, "a call that is too long, or in too many pieces");
    }
    None
}
