//! What the processes say that mount and share things, and what of it may be passed on.
//!
//! What opens a container is a part of URLs, and programs quote those in their errors: none of that gets to an error of a job, a
//! log or a reader.

use std::io::{self, Read as _, Write as _};
use std::process::{Child, ChildStderr};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Of what it says the end is kept.
const BYTES_MAX: usize = 4 << 10;
/// So much is passed on.
const PASSED_ON_MAX: usize = 1 << 20;
/// Its last words are read by then.
const WAIT_MAX: Duration = Duration::from_millis(500);
const HIDDEN: &str = "[hidden]";

/// What a child says.
#[derive(Debug, Default)]
pub struct Words {
    kept: Arc<Mutex<Kept>>,
    listener: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Kept {
    bytes: Vec<u8>,
    /// Something came before them.
    cut: bool,
}

impl Words {
    /// Keeps the end of what a child says. What serves a mount may go on saying things: somebody must listen, or it waits.
    pub fn of(child: &mut Child) -> Words {
        Words::heard(child, 0)
    }

    /// The same, and passes on to standard error what it says, within bounds.
    pub fn passed_on(child: &mut Child) -> Words {
        Words::heard(child, PASSED_ON_MAX)
    }

    fn heard(child: &mut Child, passed_on: usize) -> Words {
        let kept = Arc::default();
        let its = Arc::clone(&kept);
        let listener = child.stderr.take();
        let listen = |stderr| std::thread::spawn(move || listen(stderr, passed_on, &its));
        Words {
            kept,
            listener: listener.map(listen),
        }
    }

    /// All of it, but for its beginning where that is long. What the child has left behind may go on saying things: nobody waits for
    /// the end of that.
    pub fn last(&self) -> String {
        let end = Instant::now() + WAIT_MAX;
        let listens = || self.listener.as_ref().is_some_and(|it| !it.is_finished());
        while listens() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.so_far()
    }

    /// The same as it is now.
    pub fn so_far(&self) -> String {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&kept.bytes);
        // Half a word may be half of what is to be hidden, and not be known for that.
        let whole = match kept.cut {
            true => text.split_once(char::is_whitespace).map_or("", |it| it.1),
            false => &text,
        };
        redacted(whole).trim().to_owned()
    }
}

fn listen(mut stderr: ChildStderr, mut passed_on: usize, kept: &Mutex<Kept>) {
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = stderr.read(&mut buffer) {
        if passed_on >= count {
            passed_on -= count;
            // It goes to a file; where that is full it is not kept.
            let _ = io::stderr().write_all(&buffer[..count]);
        }
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.bytes.extend_from_slice(&buffer[..count]);
        let surplus = kept.bytes.len().saturating_sub(BYTES_MAX);
        kept.bytes.drain(..surplus);
        kept.cut |= surplus > 0;
    }
}

/// A text without what opens things: what URLs ask for, and signatures wherever they stand.
pub fn redacted(text: &str) -> String {
    let ends = |c: char| c.is_whitespace() || "\"'`<>".contains(c);
    let mut out = String::with_capacity(text.len());
    for word in text.split_inclusive(ends) {
        let end = word.trim_end_matches(ends).len();
        let (word, rest) = word.split_at(end);
        let asks = word
            .find("://")
            .and_then(|at| Some(at + word[at..].find('?')?));
        let lower = word.to_ascii_lowercase();
        let signed = lower.find("sig=").map(|at| at + "sig=".len() - 1);
        match asks.into_iter().chain(signed).min() {
            Some(at) => out.extend([&word[..=at], HIDDEN, rest]),
            None => out.extend([word, rest]),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_opens_things_is_left_out() {
        let said = "Failed: Get \"https://h:1/a/c?comp=list&sig=aB%2F%3D\": dial tcp: refused";
        assert_eq!(
            redacted(said),
            "Failed: Get \"https://h:1/a/c?[hidden]\": dial tcp: refused"
        );
        for (said, left) in [
            ("a sp=r&SIG=abc%3D b", "a sp=r&SIG=[hidden] b"),
            ("http://h/c?sig=x", "http://h/c?[hidden]"),
            ("sig=\nnext", "sig=[hidden]\nnext"),
            ("what? no://thing \"'é", "what? no://thing \"'é"),
            ("", ""),
        ] {
            assert_eq!(redacted(said), left);
        }
    }

    #[test]
    fn of_what_is_long_only_whole_words_are_left() {
        let words = Words::default();
        words.kept.lock().unwrap().bytes = b"3D%2Bx: refused\nend".to_vec();
        assert_eq!(words.so_far(), "3D%2Bx: refused\nend");
        words.kept.lock().unwrap().cut = true;
        assert_eq!(words.so_far(), "refused\nend");
        words.kept.lock().unwrap().bytes = b"3D%2Bx".to_vec();
        assert_eq!(words.so_far(), "");
    }
}
