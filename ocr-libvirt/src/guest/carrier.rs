//! [`PosixLink`] over the QEMU guest agent.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use ocr_core::{
    Error, ErrorKind, GuestInfo, OsFamily, Result, Retry, VmId,
    guest::posix::{PosixExit, PosixLimits, PosixLink, PosixRun},
};
use tokio::time::Instant;

use super::{
    AgentLink,
    agent::{Agent, OsInfo, is_outage, is_refusal},
};

/// The most that goes into the guest in one message, in bytes. libvirt loses count of a message that does not fit into
/// its socket's buffer (219,264 bytes where `net.core.wmem_default` is as Linux sets it) and the channel is then broken
/// for a while. As base64 this is 131,072 bytes, which leaves room for a script.
pub(super) const PIECE_BYTES: usize = 96 << 10;

/// The most that is read in one message: below libvirt's 4 MiB, and small enough that others have their turn.
const READ_BYTES: usize = 512 << 10;

/// How often work on a file may be refused by the agent before that is an error: it may restart several times.
const MAX_REFUSALS: u32 = 5;

/// The shortest pause between two questions whether a program ended.
const MIN_PAUSE: Duration = Duration::from_millis(2);

/// The longest such pause, beyond the time that the program is expected to take.
const MAX_QUESTION_PAUSE: Duration = Duration::from_secs(2);

/// The pause before work on a file is begun anew.
const MAX_PAUSE: Duration = Duration::from_millis(250);

/// The agent as a way into a guest with a POSIX shell.
#[derive(Debug)]
pub(super) struct Carrier<L>(pub(super) Arc<Agent<L>>);

/// Whether work on an open file, whose handle dies with the agent, is begun anew.
#[derive(Default)]
struct Again {
    refusals: u32,
}

impl Again {
    /// An outage may last; a refusal that is not for a lost handle comes back at once, and counts.
    fn may(&mut self, error: &Error, until: Instant) -> bool {
        if is_refusal(error) {
            self.refusals += 1;
        }
        (is_outage(error) || is_refusal(error)) && self.refusals <= MAX_REFUSALS && Instant::now() + MAX_PAUSE < until
    }
}

/// What was begun, and lost sight of.
fn lost(error: Error) -> Error {
    if is_outage(&error) {
        return error.with_retry(Retry::Ambiguous);
    }
    Error::unavailable("the guest agent no longer knows the program").with_retry(Retry::Ambiguous).with_source(error)
}

#[async_trait]
impl<L: AgentLink> PosixLink for Carrier<L> {
    fn limits(&self) -> PosixLimits {
        // As base64 both outputs together are far below the 4 MiB that a reply may have on its way through libvirt.
        PosixLimits { stdin_bytes: PIECE_BYTES, reply_bytes: (512 << 10) + 256, compress: true }
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        info(&self.0, vm).await
    }

    async fn run(&self, vm: VmId, run: &PosixRun<'_>) -> Result<PosixExit> {
        let mut argv = vec!["-c".to_owned(), run.script.to_owned(), run.name.to_owned()];
        argv.extend_from_slice(run.arguments);
        let pid = self.0.start(vm, "/bin/sh", &argv, &[], run.stdin).await?;
        follow(&self.0, vm, pid, run.kind, run.until).await
    }

    async fn write(&self, vm: VmId, path: &str, parts: &[Bytes], until: Instant) -> Result<()> {
        write(&self.0, vm, path, "w", parts, until).await
    }

    async fn read(&self, vm: VmId, path: &str, offset: u64, count: usize, until: Instant) -> Result<Bytes> {
        let mut again = Again::default();
        loop {
            match read_once(&self.0, vm, path, offset, count).await {
                Err(error) if again.may(&error, until) => {
                    tracing::debug!(%vm, %error, "lost an open file in the guest, reading again");
                    tokio::time::sleep(MAX_PAUSE).await;
                }
                result => return result,
            }
        }
    }
}

/// What the agent says of itself and its guest.
pub(super) async fn info<L: AgentLink>(agent: &Agent<L>, vm: VmId) -> Result<GuestInfo> {
    let info = agent.info(vm).await?;
    // Old agents lack it, and some are told not to answer it; the guest is none the worse.
    let os = match info.can(&["guest-get-osinfo"]) {
        true => agent
            .os_info(vm)
            .await
            .or_else(|error| if is_refusal(&error) { Ok(OsInfo::default()) } else { Err(error) })?,
        false => OsInfo::default(),
    };
    Ok(GuestInfo {
        can_exec: info.can(&["guest-exec", "guest-exec-status"]),
        can_files: info.can(&["guest-file-open", "guest-file-read", "guest-file-write", "guest-file-close"]),
        agent_version: info.version,
        os_family: if os.is_windows() { OsFamily::Windows } else { OsFamily::Linux },
        os_name: if os.pretty_name.is_empty() { os.name } else { os.pretty_name },
    })
}

/// When to ask whether a program ended. A question costs an emulated guest a good part of what a short program costs; so
/// the first is asked when programs of its kind usually have ended, and the others at intervals that grow with the time
/// it takes.
pub(super) struct Questions {
    expected: Option<Duration>,
    floor: Duration,
    asked: usize,
}

impl Questions {
    pub(super) fn new(expected: Option<Duration>, floor: Duration) -> Self {
        Self { expected, floor, asked: 0 }
    }

    /// The pause before the next one, when the program has run for so long.
    pub(super) fn pause(&mut self, elapsed: Duration) -> Duration {
        const STEPS: [f64; 3] = [0.06, 0.1, 0.2];
        let asked = self.asked;
        self.asked += 1;
        match (asked, self.expected) {
            (0, Some(expected)) => expected,
            (0, None) => self.floor,
            (1..=3, Some(expected)) => expected.mul_f64(STEPS[asked - 1]).clamp(MIN_PAUSE, MAX_QUESTION_PAUSE),
            _ => (elapsed / 10).clamp(MIN_PAUSE, MAX_QUESTION_PAUSE),
        }
    }
}

/// Waits for the end of a program of this kind.
pub(super) async fn follow<L: AgentLink>(
    agent: &Agent<L>,
    vm: VmId,
    pid: i64,
    kind: u64,
    until: Instant,
) -> Result<PosixExit> {
    let started = Instant::now();
    let (expected, floor) = agent.expected(vm, kind);
    let mut questions = Questions::new(expected, floor);
    for question in 0.. {
        tokio::time::sleep_until((Instant::now() + questions.pause(started.elapsed())).min(until)).await;
        match agent.status(vm, pid).await {
            Ok(Some(exit)) => {
                agent.learn(vm, kind, question, started.elapsed());
                return Ok(exit);
            }
            Ok(None) => {}
            Err(error) if is_outage(&error) || is_refusal(&error) => return Err(lost(error)),
            Err(error) => return Err(error),
        }
        if Instant::now() >= until {
            break;
        }
    }
    Err(Error::timed_out("the guest did not tell the end of the operation in time"))
}

/// Writes a file anew.
pub(super) async fn write<L: AgentLink>(
    agent: &Agent<L>,
    vm: VmId,
    path: &str,
    mode: &str,
    parts: &[Bytes],
    until: Instant,
) -> Result<()> {
    let mut again = Again::default();
    loop {
        match write_once(agent, vm, path, mode, parts).await {
            Err(error)
                if is_refusal(&error)
                    && ["No such file", "cannot find the path"].iter().any(|part| error.message().contains(part)) =>
            {
                return Err(Error::new(ErrorKind::NotFound, "the guest has no folder for it").with_source(error));
            }
            Err(error) if again.may(&error, until) => {
                tracing::debug!(%vm, %error, "lost an open file in the guest, writing again");
                tokio::time::sleep(MAX_PAUSE).await;
            }
            result => return result,
        }
    }
}

async fn write_once<L: AgentLink>(agent: &Agent<L>, vm: VmId, path: &str, mode: &str, parts: &[Bytes]) -> Result<()> {
    let handle = agent.open(vm, path, mode).await?;
    let result = async {
        let mut piece = BytesMut::with_capacity(PIECE_BYTES);
        for part in parts {
            let mut rest = part.clone();
            while !rest.is_empty() {
                piece.extend_from_slice(&rest.split_to(rest.len().min(PIECE_BYTES - piece.len())));
                if piece.len() == PIECE_BYTES {
                    let count = agent.write(vm, handle, &piece).await?;
                    let _written = piece.split_to(count);
                }
            }
        }
        while !piece.is_empty() {
            let count = agent.write(vm, handle, &piece).await?;
            let _written = piece.split_to(count);
        }
        Ok(())
    };
    let result = result.await;
    // The agent buffers: an error may show only here.
    let closed = agent.close(vm, handle).await;
    result.and(closed)
}

async fn read_once<L: AgentLink>(agent: &Agent<L>, vm: VmId, path: &str, offset: u64, count: usize) -> Result<Bytes> {
    let handle = agent.open(vm, path, "r").await?;
    let result = async {
        if offset > 0 {
            agent.seek(vm, handle, offset).await?;
        }
        let mut content = BytesMut::new();
        while content.len() < count {
            let (bytes, eof) = agent.read(vm, handle, READ_BYTES.min(count - content.len())).await?;
            content.extend_from_slice(&bytes);
            if eof {
                break;
            }
        }
        Ok(content.freeze())
    };
    let result = result.await;
    let _closed = agent.close(vm, handle).await;
    result
}
