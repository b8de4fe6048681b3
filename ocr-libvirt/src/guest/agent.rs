//! The QEMU guest agent's commands, typed, one at a time per machine.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use ocr_core::{
    Error, ErrorKind, OsFamily, Result, VmId,
    error::{reason, seconds},
    guest::posix::PosixExit,
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::AgentLink;

/// The longest that one command may take. The agent itself answers in milliseconds; an agent that does not is hung.
const COMMAND_LIMIT: Duration = Duration::from_secs(15);

/// The longest wait for the commands of other callers on the same machine.
const TURN_LIMIT: Duration = Duration::from_secs(60);

/// Machines of which something is kept although nobody uses them now: a few dozen bytes each.
const IDLE_SEATS: usize = 16 << 10;

/// So many kinds of programs are remembered of a machine.
const KINDS: usize = 8;

/// The longest that a program is left alone before it is asked for.
const LONGEST_EXPECTED: Duration = Duration::from_secs(60);

/// A link and the turns on it.
#[derive(Debug)]
pub(super) struct Agent<L> {
    link: L,
    /// The hypervisor takes one command of a machine at a time and gives up on one that waits for 30 s; more threads on
    /// one machine are slower in all. So callers queue here.
    seats: Mutex<HashMap<VmId, Arc<Seat>>>,
}

/// One machine.
#[derive(Debug, Default)]
struct Seat {
    turn: tokio::sync::Mutex<()>,
    pace: Mutex<Pace>,
    is_windows: OnceLock<bool>,
    /// The variables of a guest with Windows.
    variables: OnceLock<Arc<BTreeMap<String, String>>>,
}

/// How long programs take on a machine, the one that ran last first: kind and time.
#[derive(Debug, Default)]
struct Pace(Vec<(u64, Duration)>);

impl Pace {
    fn expected(&self, kind: u64) -> Option<Duration> {
        self.0.iter().find(|(known, _)| *known == kind).map(|(_, time)| *time)
    }

    /// The shortest of all.
    fn floor(&self) -> Duration {
        self.0.iter().map(|(_, time)| *time).min().unwrap_or_default()
    }

    /// Learns from a program that was found ended after so much time, at the question of this number (from 0). One that
    /// had ended at the first may have ended long before: the next is asked for earlier. The steps up and down make the
    /// first question come too early about three times of four, since another one costs less than to be late. One that
    /// took far longer than ever may have been an exception.
    fn learn(&mut self, kind: u64, question: u32, took: Duration) {
        let time = match (self.expected(kind), question) {
            (Some(expected), 0) => expected.mul_f64(0.89),
            (Some(expected), 1..=2) => expected.mul_f64(1.04),
            (Some(expected), _) => took.mul_f64(0.9).min(expected * 3 / 2 + Duration::from_millis(5)),
            (None, _) => took.mul_f64(0.9),
        };
        self.0.retain(|(known, _)| *known != kind);
        self.0.truncate(KINDS - 1);
        self.0.insert(0, (kind, time.min(LONGEST_EXPECTED)));
    }
}

/// What the agent says of itself.
#[derive(Debug, Deserialize)]
pub(super) struct Info {
    pub(super) version: String,
    #[serde(default)]
    pub(super) supported_commands: Vec<SupportedCommand>,
}

/// One command of the agent.
#[derive(Debug, Deserialize)]
pub(super) struct SupportedCommand {
    name: String,
    enabled: bool,
}

impl Info {
    pub(super) fn can(&self, commands: &[&str]) -> bool {
        commands
            .iter()
            .all(|name| self.supported_commands.iter().any(|command| command.enabled && command.name == *name))
    }
}

/// What the agent says of the guest's system.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct OsInfo {
    pub(super) id: String,
    pub(super) pretty_name: String,
    pub(super) name: String,
}

impl OsInfo {
    pub(super) fn is_windows(&self) -> bool {
        self.id == "mswindows"
    }
}

/// How a program of `guest-exec` fares.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct ExecStatus {
    exited: bool,
    exitcode: Option<i64>,
    signal: Option<i64>,
    #[serde(default)]
    out_data: String,
    #[serde(default)]
    err_data: String,
}

#[derive(Debug, Deserialize)]
struct Pid {
    pid: i64,
}

#[derive(Debug, Deserialize)]
struct Written {
    count: usize,
}

#[derive(Debug, Deserialize)]
struct Read {
    count: usize,
    #[serde(rename = "buf-b64", default)]
    buf_b64: String,
    eof: bool,
}

/// An open file of the agent's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Handle(i64);

impl<L: AgentLink> Agent<L> {
    pub(super) fn new(link: L) -> Self {
        Self { link, seats: Mutex::default() }
    }

    /// How long programs of this kind take on this machine, if that is known, and the shortest of others.
    pub(super) fn expected(&self, vm: VmId, kind: u64) -> (Option<Duration>, Duration) {
        let seat = self.seat(vm);
        let pace = seat.pace.lock().unwrap_or_else(PoisonError::into_inner);
        (pace.expected(kind), pace.floor())
    }

    /// Remembers how long a program took until it was found ended, and at which question.
    pub(super) fn learn(&self, vm: VmId, kind: u64, question: u32, took: Duration) {
        self.seat(vm).pace.lock().unwrap_or_else(PoisonError::into_inner).learn(kind, question, took);
    }

    /// Whether the guest runs Windows. It is asked once: a machine keeps its system.
    pub(super) async fn is_windows(&self, vm: VmId) -> Result<bool> {
        let seat = self.seat(vm);
        if let Some(known) = seat.is_windows.get() {
            return Ok(*known);
        }
        let is_windows = match self.os_info(vm).await {
            Ok(os) => os.is_windows(),
            // Agents that old, or that silent, are none of Windows.
            Err(error) if is_refusal(&error) || error.reason() == Some(reason::AGENT_COMMAND_DISABLED) => false,
            Err(error) => return Err(error),
        };
        Ok(*seat.is_windows.get_or_init(|| is_windows))
    }

    pub(super) fn keep_family(&self, vm: VmId, family: OsFamily) {
        let _first = self.seat(vm).is_windows.set(family == OsFamily::Windows);
    }

    pub(super) fn variables(&self, vm: VmId) -> Option<Arc<BTreeMap<String, String>>> {
        self.seat(vm).variables.get().cloned()
    }

    pub(super) fn keep_variables(&self, vm: VmId, variables: Arc<BTreeMap<String, String>>) {
        let _first = self.seat(vm).variables.set(variables);
    }

    pub(super) async fn info(&self, vm: VmId) -> Result<Info> {
        self.call(vm, "guest-info", Value::Null).await
    }

    pub(super) async fn os_info(&self, vm: VmId) -> Result<OsInfo> {
        self.call(vm, "guest-get-osinfo", Value::Null).await
    }

    /// Starts a program that gets `input` on stdin and whose output is kept until it is asked for.
    pub(super) async fn start(
        &self,
        vm: VmId,
        program: &str,
        arguments: &[String],
        environment: &[String],
        input: &[u8],
    ) -> Result<i64> {
        let mut message = json!({
            "path": program, "arg": arguments, "input-data": BASE64.encode(input), "capture-output": true
        });
        if !environment.is_empty() {
            message["env"] = json!(environment);
        }
        let started: Pid = self.call(vm, "guest-exec", message).await?;
        Ok(started.pid)
    }

    /// Asks for a program's end. The agent tells it once and forgets it.
    pub(super) async fn status(&self, vm: VmId, pid: i64) -> Result<Option<PosixExit>> {
        let status: ExecStatus = self.call(vm, "guest-exec-status", json!({ "pid": pid })).await?;
        if !status.exited {
            return Ok(None);
        }
        let how = match (status.exitcode, status.signal) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "no exit code".to_owned(),
        };
        Ok(Some(PosixExit { how, stdout: decode(&status.out_data)?, stderr: decode(&status.err_data)? }))
    }

    pub(super) async fn open(&self, vm: VmId, path: &str, mode: &str) -> Result<Handle> {
        self.call(vm, "guest-file-open", json!({ "path": path, "mode": mode })).await.map(Handle)
    }

    pub(super) async fn close(&self, vm: VmId, handle: Handle) -> Result<()> {
        self.call::<Value>(vm, "guest-file-close", json!({ "handle": handle.0 })).await.map(drop)
    }

    pub(super) async fn seek(&self, vm: VmId, handle: Handle, offset: u64) -> Result<()> {
        let arguments = json!({ "handle": handle.0, "offset": offset, "whence": "set" });
        self.call::<Value>(vm, "guest-file-seek", arguments).await.map(drop)
    }

    /// Writes a piece and returns how much of it was written: less is legal.
    pub(super) async fn write(&self, vm: VmId, handle: Handle, piece: &[u8]) -> Result<usize> {
        let arguments = json!({ "handle": handle.0, "buf-b64": BASE64.encode(piece) });
        let written: Written = self.call(vm, "guest-file-write", arguments).await?;
        match written.count {
            0 => Err(Error::unavailable("the guest agent wrote nothing of a piece of a file")),
            count if count > piece.len() => Err(Error::internal("the guest agent wrote more than it was given")),
            count => Ok(count),
        }
    }

    /// Reads at most `count` bytes; `true` beside them at the file's end.
    pub(super) async fn read(&self, vm: VmId, handle: Handle, count: usize) -> Result<(Bytes, bool)> {
        let arguments = json!({ "handle": handle.0, "count": count });
        let read: Read = self.call(vm, "guest-file-read", arguments).await?;
        let bytes = decode(&read.buf_b64)?;
        if bytes.len() != read.count || bytes.len() > count {
            return Err(Error::internal("the guest agent's count of the bytes read is not theirs"));
        }
        Ok((bytes, read.eof))
    }

    async fn call<T: DeserializeOwned>(&self, vm: VmId, command: &'static str, arguments: Value) -> Result<T> {
        let message = if arguments.is_null() {
            json!({ "execute": command })
        } else {
            json!({ "execute": command, "arguments": arguments })
        }
        .to_string();
        let seat = self.seat(vm);
        let answer = {
            let _turn = tokio::time::timeout(TURN_LIMIT, seat.turn.lock()).await.map_err(|_| {
                Error::unavailable(format!("other calls kept the guest agent busy for {}", seconds(TURN_LIMIT)))
                    .with_reason(reason::AGENT_NOT_READY)
            })?;
            self.link.command(vm, &message, COMMAND_LIMIT).await.map_err(refusal)?
        };
        let mut answer: Value = serde_json::from_str(&answer).map_err(|cause| {
            Error::internal(format!("{command}: the guest agent's answer is no JSON")).with_source(cause)
        })?;
        if let Some(error) = answer.get("error") {
            let text = error.get("desc").and_then(Value::as_str).unwrap_or("no description");
            return Err(refusal(Error::internal(format!("{command}: {text}"))));
        }
        serde_json::from_value(answer["return"].take()).map_err(|cause| {
            Error::internal(format!("{command}: the guest agent's answer is not as documented")).with_source(cause)
        })
    }

    fn seat(&self, vm: VmId) -> Arc<Seat> {
        let mut seats = self.seats.lock().unwrap_or_else(PoisonError::into_inner);
        if seats.len() >= IDLE_SEATS && !seats.contains_key(&vm) {
            seats.retain(|_, seat| Arc::strong_count(seat) > 1);
        }
        Arc::clone(seats.entry(vm).or_default())
    }
}

fn decode(text: &str) -> Result<Bytes> {
    BASE64
        .decode(text)
        .map(Bytes::from)
        .map_err(|cause| Error::internal("the guest agent's data is no base64").with_source(cause))
}

/// Tells a command that the agent's configuration forbids from one that failed.
fn refusal(error: Error) -> Error {
    let text = error.message();
    let disabled = is_refusal(&error)
        && text.contains("ommand ")
        && (text.contains("has been disabled") || text.contains("has not been found"));
    if !disabled {
        return error;
    }
    let message = format!("the guest agent's configuration forbids this: {text}");
    Error::unsupported(message).with_reason(reason::AGENT_COMMAND_DISABLED)
}

/// Whether the agent was reached and did not do it, as against not being reached.
pub(super) fn is_refusal(error: &Error) -> bool {
    error.reason().is_none() && matches!(error.kind(), ErrorKind::Internal | ErrorKind::Invalid)
}

/// Whether the agent, or the way to it, may be back later.
pub(super) fn is_outage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs programs that take so long, and returns how many questions each takes and the share of time that is added.
    fn rounds(pace: &mut Pace, times: &[Duration]) -> (f64, f64) {
        let (mut questions, mut added) = (0, 0.0);
        for time in times {
            let mut polls = super::super::carrier::Questions::new(pace.expected(1), pace.floor());
            let (mut at, mut asked) = (Duration::ZERO, 0);
            loop {
                at += polls.pause(at);
                if at >= *time {
                    break;
                }
                asked += 1;
            }
            pace.learn(1, asked, at);
            questions += asked + 1;
            added += (at - *time).as_secs_f64() / time.as_secs_f64();
        }
        (f64::from(questions) / times.len() as f64, added / times.len() as f64)
    }

    #[test]
    fn what_runs_again_is_asked_for_seldom_and_hardly_late() {
        for (time_ms, spread) in [15, 60, 200, 1000, 20_000].into_iter().flat_map(|ms| [(ms, 20), (ms, 200), (ms, 400)])
        {
            let mut pace = Pace::default();
            // Now longer, now shorter.
            let (least, steps) = (1000 - spread / 2, spread + 1);
            let times: Vec<_> =
                (0..220_u64).map(|i| Duration::from_micros(time_ms * (least + i * 7919 % steps))).collect();
            rounds(&mut pace, &times[..20]);
            let (questions, added) = rounds(&mut pace, &times[20..]);
            assert!(
                questions <= 3.0 && added <= 0.1,
                "{time_ms} ms ± {spread}: {questions:.2} questions, {added:.3} added"
            );
        }
    }

    #[test]
    fn one_that_hangs_once_does_not_delay_those_after_it() {
        let mut pace = Pace::default();
        rounds(&mut pace, &[Duration::from_millis(20); 10]);
        rounds(&mut pace, &[Duration::from_secs(30)]);
        let (_, added) = rounds(&mut pace, &[Duration::from_millis(20)]);
        assert!(added < 1.0, "{added}");
    }

    #[test]
    fn few_kinds_are_remembered() {
        let mut pace = Pace::default();
        (0..1000).for_each(|kind| pace.learn(kind, 0, Duration::from_millis(kind)));
        assert_eq!(pace.0.len(), KINDS);
        assert!(pace.expected(999).is_some() && pace.expected(0).is_none());
    }
}
