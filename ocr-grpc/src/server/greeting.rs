//! [`Greeting`]: a connection whose peer must say in time that it speaks HTTP/2.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};

/// The length of HTTP/2's connection preface, with which a client opens. From then on keep-alive watches the peer.
const PREFACE_BYTES: usize = 24;

/// Passes everything through, but fails when the preface has not come by the deadline.
pub(super) struct Greeting<S> {
    stream: S,
    /// `None` once the preface is there.
    waiting: Option<Waiting>,
}

struct Waiting {
    missing_bytes: usize,
    deadline: Pin<Box<Sleep>>,
    greeted: Greeted,
}

/// Whether the peer has said that it speaks HTTP/2.
#[derive(Clone)]
pub(super) struct Greeted(Arc<AtomicBool>);

impl Greeted {
    pub(super) fn yet(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl<S> Greeting<S> {
    pub(super) fn new(stream: S, deadline: Duration) -> (Self, Greeted) {
        let greeted = Greeted(Arc::default());
        let deadline = Box::pin(tokio::time::sleep(deadline));
        let waiting = Waiting { missing_bytes: PREFACE_BYTES, deadline, greeted: greeted.clone() };
        (Self { stream, waiting: Some(waiting) }, greeted)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Greeting<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let Some(waiting) = &mut this.waiting else { return Pin::new(&mut this.stream).poll_read(cx, buf) };
        if waiting.deadline.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer did not speak HTTP/2 in time")));
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buf);
        waiting.missing_bytes = waiting.missing_bytes.saturating_sub(buf.filled().len() - before);
        if waiting.missing_bytes == 0 {
            waiting.greeted.0.store(true, Ordering::Relaxed);
            this.waiting = None;
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Greeting<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_is_given_up_at_the_deadline() {
        let (_peer, stream) = tokio::io::duplex(64);
        let (mut io, greeted) = Greeting::new(stream, DEADLINE);
        let start = tokio::time::Instant::now();
        let error = io.read_u8().await.unwrap_err();
        assert_eq!((error.kind(), start.elapsed().as_secs()), (io::ErrorKind::TimedOut, DEADLINE.as_secs()));
        assert!(!greeted.yet());
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_trickles_is_given_up_too() {
        let (mut peer, stream) = tokio::io::duplex(64);
        let (mut io, greeted) = Greeting::new(stream, DEADLINE);
        let trickle = async {
            loop {
                peer.write_all(b"P").await.unwrap();
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        let mut read = Vec::new();
        let error =
            tokio::select! { () = trickle => unreachable!(), read = io.read_to_end(&mut read) => read.unwrap_err() };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(!greeted.yet());
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_has_greeted_may_be_silent() {
        let (mut peer, stream) = tokio::io::duplex(64);
        let (mut io, greeted) = Greeting::new(stream, DEADLINE);
        peer.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        io.read_exact(&mut [0; 24]).await.unwrap();
        assert!(greeted.yet());
        tokio::time::timeout(DEADLINE * 10, io.read_u8()).await.expect_err("still open");
    }
}
