//! One command on one connection.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use russh::{ChannelMsg, ChannelReadHalf, ChannelWriteHalf, client::Msg};
use tokio::time::{Duration, Instant};

use super::{address::not_ready, session::Session};
use crate::{Error, Result, Retry, error::reason};

/// How long the rest may take of a command that has ended: something that it left behind may hold its outputs.
const AFTER_END: Duration = Duration::from_secs(5);

/// How long a server may take to begin a command. One that takes longer is out of reach; no command is lost then.
const BEGIN_LIMIT: Duration = Duration::from_secs(10);

/// What a command gets and may give.
#[derive(Debug)]
pub(super) struct Order<'a> {
    /// A line for the account's shell.
    pub(super) line: String,
    pub(super) stdin: &'a [Bytes],
    /// The most of stdout and of stderr, in bytes each.
    pub(super) limit_bytes: usize,
    pub(super) until: Instant,
}

/// A command that ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// The exit code, or the signal that ended it.
    pub(super) exit: Result<u32, String>,
    pub(super) stdout: Bytes,
    pub(super) stderr: Bytes,
}

/// A channel that is closed when nobody waits for it any more, so that nothing more is sent on it. The server counts it
/// until its command ends: a connection that is full of such is given up when it refuses the next.
struct Open<'a> {
    session: &'a Arc<Session>,
    write: ChannelWriteHalf<Msg>,
    is_closed: bool,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if !self.is_closed && !matches!(self.write.close().now_or_never(), Some(Ok(()))) {
            self.session.taint();
        }
    }
}

/// While a channel is asked for: a caller that leaves now leaves one behind that nobody can close.
struct Asking<'a>(Option<&'a Session>);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if let Some(session) = self.0 {
            session.taint();
        }
    }
}

/// Runs a command to its end.
///
/// # Errors
/// [`Retry::Safe`] when it surely was not begun, otherwise [`Retry::Ambiguous`].
pub(super) async fn run(session: &Arc<Session>, order: &Order<'_>) -> Result<Ended> {
    match tokio::time::timeout_at(order.until, Box::pin(run_inner(session, order))).await {
        Ok(result) => result,
        Err(_) => {
            // Whether the connection is alive is not known: those who come now get another one.
            session.taint();
            Err(Error::timed_out("the guest did not tell the end of the operation in time"))
        }
    }
}

async fn run_inner(session: &Arc<Session>, order: &Order<'_>) -> Result<Ended> {
    let closed = |_| Error::internal("the places of a connection are closed");
    let _place = session.channels.acquire().await.map_err(closed)?;
    let mut asking = Asking(Some(session));
    let opened = tokio::time::timeout(BEGIN_LIMIT, session.open()).await;
    asking.0 = None;
    let channel = opened.map_err(|_| russh::Error::ConnectionTimeout).flatten().map_err(|cause| {
        // The server may be full, or the connection gone; neither is of use to others now.
        session.taint();
        not_ready(format!("the SSH server takes no further command from {}", session.name)).with_source(cause)
    })?;
    let (mut read, write) = channel.split();
    let mut open = Open { session, write, is_closed: false };
    let asked = async {
        open.write.exec(true, order.line.as_bytes()).await.map_err(|cause| lost(session).with_source(cause))?;
        // Commands begin when they have been let to; what is sent before would be lost with a refusal.
        loop {
            match read.wait().await {
                Some(ChannelMsg::Success) => return Ok(()),
                Some(ChannelMsg::Failure) => {
                    return Err(Error::unsupported(format!("the SSH server runs no commands for {}", session.name)));
                }
                Some(ChannelMsg::WindowAdjusted { .. }) => {}
                _ => return Err(lost(session)),
            }
        }
    };
    asked.await?;
    let send = async {
        for part in order.stdin {
            open.write.data_bytes(part.clone()).await?;
        }
        open.write.eof().await
    };
    let mut send = std::pin::pin!(send);
    let mut receive = std::pin::pin!(receive(session, &mut read, order.limit_bytes));
    let mut sending = true;
    let ended = loop {
        tokio::select! {
            biased;
            ended = &mut receive => break ended,
            // A command that does not read its stdin to the end has still an end to tell.
            _ = &mut send, if sending => sending = false,
        }
    };
    if ended.as_ref().is_ok_and(|(_, closed)| *closed) {
        open.is_closed = true;
    }
    session.touch();
    ended.map(|(ended, _)| ended)
}

/// What comes back, and whether the server has closed the channel.
async fn receive(session: &Session, read: &mut ChannelReadHalf, limit_bytes: usize) -> Result<(Ended, bool)> {
    let (mut stdout, mut stderr) = (BytesMut::new(), BytesMut::new());
    let mut exit = None;
    let closed = loop {
        let message = match &exit {
            None => read.wait().await,
            Some(_) => match tokio::time::timeout(AFTER_END, read.wait()).await {
                Ok(message) => message,
                Err(_) => break false,
            },
        };
        match message {
            Some(ChannelMsg::Data { data }) => keep(&mut stdout, &data, limit_bytes)?,
            Some(ChannelMsg::ExtendedData { data, ext: 1 }) => keep(&mut stderr, &data, limit_bytes)?,
            Some(ChannelMsg::ExitStatus { exit_status }) => exit = Some(Ok(exit_status)),
            Some(ChannelMsg::ExitSignal { signal_name, .. }) => exit = Some(Err(format!("{signal_name:?}"))),
            Some(ChannelMsg::Close) => break true,
            Some(_) => {}
            // Without an end that was told it was the connection that ended.
            None => break false,
        }
    };
    match exit {
        Some(exit) => Ok((Ended { exit, stdout: stdout.freeze(), stderr: stderr.freeze() }, closed)),
        None => {
            session.taint();
            Err(lost(session))
        }
    }
}

fn keep(kept: &mut BytesMut, data: &[u8], limit_bytes: usize) -> Result<()> {
    if kept.len() + data.len() > limit_bytes {
        return Err(Error::internal(format!("the guest sent more than the {limit_bytes} bytes that were asked for")));
    }
    kept.extend_from_slice(data);
    Ok(())
}

fn lost(session: &Session) -> Error {
    Error::unavailable(format!("the SSH connection to {} was lost", session.name))
        .with_reason(reason::AGENT_NOT_READY)
        .with_retry(Retry::Ambiguous)
}
