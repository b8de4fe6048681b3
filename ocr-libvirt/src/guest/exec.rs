//! Commands: starting the in-guest runner, waiting for it, finding it again.

use std::time::Duration;

use bytes::Bytes;
use ocr_core::{Error, ErrorKind, ExecOutput, ExecRequest, OutputChunk, Result, Retry, error::seconds};
use tokio::{sync::mpsc, time::Instant};

use super::{
    agent::{Agent, Encoded, Exec, ExecStatus, FileOpen, FileRead, FileSeek, MAX_CONTENT_BYTES, Refused, StatusReply},
    runner::{self, Answer, Run, Verdict},
    script::answer,
};
use crate::error::{Failure, Meaning};

/// The longest pause between two looks at a command.
const MAX_PAUSE: Duration = Duration::from_millis(250);
/// Pauses grow freely up to this, and then with the time that the command has run.
const SMALL_PAUSE: Duration = Duration::from_millis(8);
/// The longest pause before a lost command is looked for again.
const MAX_SEARCH_PAUSE: Duration = Duration::from_secs(1);
/// The pause between two looks at a running command's output; a shorter command is not followed.
const FOLLOW_PAUSE: Duration = Duration::from_millis(500);
/// The most of an output that is sent on at once.
const PROGRESS_BYTES: usize = 64 << 10;
/// How long the small scripts that prepare something may take.
const SCRIPT_DEADLINE: Duration = Duration::from_secs(60);

/// How a process came to its end, as far as the host can tell.
pub(crate) enum Ended {
    /// The agent reported it.
    Reported(StatusReply),
    /// The agent was lost, or lost it: nobody knows what became of it.
    Unknown(Error),
}

impl Agent<'_> {
    /// Starts a shell script in a session of its own and waits for its end, until `end`.
    async fn run(
        &self,
        script: &str,
        arguments: &[String],
        input: Vec<u8>,
        end: Instant,
        mut follower: Option<&mut Follower<'_>>,
    ) -> Result<Ended, Refused> {
        let mut arg = vec!["sh".to_owned(), "-c".to_owned(), script.to_owned(), "ocr".to_owned()];
        arg.extend_from_slice(arguments);
        let exec = Exec { path: "setsid", arg, input_data: Encoded(input), capture_output: true };
        let pid = match self.send(&exec).await {
            Ok(reply) => reply.pid,
            Err(refused) if is_lost(&refused) => return Ok(Ended::Unknown(refused.error)),
            Err(refused) => return Err(explain(refused)),
        };
        let start = Instant::now();
        let machine = self.inner.machine(self.vm);
        // Every question costs the guest as much as a small program. One is asked at once; the next when the quickest
        // of this guest's commands would be about done.
        let mut pause = machine.quickest().mul_f64(0.75).max(Duration::from_millis(1));
        let mut is_first = true;
        let mut polls = 0_u32;
        loop {
            polls += 1;
            match self.send(&ExecStatus { pid }).await {
                Ok(status) if status.exited => {
                    // Found at the first look after the pause, it may have been done long before.
                    machine.note(if polls > 2 { start.elapsed() } else { start.elapsed() * 2 / 3 });
                    tracing::trace!(vm = %self.vm, polls, took = ?start.elapsed(), "a command in the guest ended");
                    return Ok(Ended::Reported(status));
                }
                Ok(_) => {}
                // The command runs, whatever its agent does now.
                Err(refused)
                    if refused.error.retry() != Retry::Never
                        || refused.failure.as_ref().is_some_and(Failure::is_unknown_pid) =>
                {
                    return Ok(Ended::Unknown(refused.error));
                }
                Err(Refused { error, failure }) if error.kind() == ErrorKind::Conflict => {
                    return Err(Refused { error: error.with_retry(Retry::Ambiguous), failure });
                }
                Err(refused) => return Err(refused),
            }
            if Instant::now() + pause > end {
                return Ok(Ended::Unknown(Error::timed_out("the guest did not end the command in time")));
            }
            if let Some(follower) = &mut follower {
                follower.look(*self).await;
            }
            tokio::time::sleep(pause).await;
            pause = if is_first { Duration::from_millis(2) } else { pause * 2 };
            pause = pause.min(SMALL_PAUSE.max(start.elapsed() / 10)).min(MAX_PAUSE);
            is_first = false;
        }
    }

    /// Runs a small script whose repetition is harmless; returns the words and the bytes of its answer.
    pub(crate) async fn script(&self, script: &str, arguments: &[String], input: Vec<u8>) -> Result<ScriptReply> {
        match self.run(script, arguments, input, Instant::now() + SCRIPT_DEADLINE, None).await? {
            Ended::Reported(status) => ScriptReply::new(status),
            Ended::Unknown(error) => Err(error.with_retry(Retry::Ambiguous)),
        }
    }
}

/// A small script's answer.
pub(crate) struct ScriptReply {
    pub(crate) word: String,
    pub(crate) bytes: Vec<u8>,
    /// The last line of what its programs complained about.
    pub(crate) complaint: String,
}

impl ScriptReply {
    fn new(status: StatusReply) -> Result<Self> {
        let complaint = String::from_utf8_lossy(&status.err_data.0).trim().lines().last().unwrap_or("").to_owned();
        let Some((words, bytes)) = answer(&status.out_data.0) else {
            return Err(Error::internal(format!(
                "the guest's shell ended with {:?} and without an answer: {complaint}",
                status.exitcode
            )));
        };
        Ok(Self { word: words.first().copied().unwrap_or("").to_owned(), bytes: bytes.to_vec(), complaint })
    }
}

/// Whether the command may have reached the guest all the same.
fn is_lost(refused: &Refused) -> bool {
    refused.error.retry() == Retry::Ambiguous
}

/// What a failure to start anything at all means.
fn explain(refused: Refused) -> Refused {
    let is_missing = refused.failure.as_ref().is_some_and(|failure| {
        failure.meaning() == Meaning::AgentRefused && failure.message.contains("Failed to execute child process")
    });
    if is_missing {
        let error =
            Error::unsupported("the guest has no setsid and sh: only guests with a POSIX shell can be acted in");
        return Refused { error: error.with_source(refused.error), failure: refused.failure };
    }
    refused
}

/// [`ocr_core::GuestExec::exec`].
pub(crate) async fn exec(agent: Agent<'_>, request: &ExecRequest, max_output_bytes: u64) -> Result<ExecOutput> {
    request.check()?;
    let config = &agent.inner.config;
    let limit_bytes = request.output_limit_bytes.min(max_output_bytes);
    let end = Instant::now() + request.deadline + config.exec_margin;
    let prune = agent.inner.machine(agent.vm).wants_pruning();
    let mut run = Run::new(request, &config.guest_folder, limit_bytes, false, prune);
    let is_staged = run.input.len() > MAX_CONTENT_BYTES;
    if is_staged {
        run = Run::new(request, &config.guest_folder, limit_bytes, true, prune);
    }
    let mut follower = request.progress.as_ref().map(|progress| Follower::new(progress, &run.files, limit_bytes));
    let mut is_begun = false;
    let mut pause = Duration::from_millis(50);
    let last = loop {
        let tried = attempt(agent, request, &run, is_staged, limit_bytes, end, follower.as_mut()).await;
        let error = match tried {
            Ok(Attempt::Answered(output)) => {
                if let Some(follower) = follower {
                    follower.finish(agent, &output).await;
                }
                return Ok(output);
            }
            Ok(Attempt::Refused(error)) => return Err(error),
            Ok(Attempt::Lost(error)) => error,
            // From its first attempt on the command may be running: whatever the agent does now, it is looked for.
            Err(error) if is_begun && error.retry() != Retry::Never => error,
            Err(error) => return Err(error),
        };
        is_begun = true;
        if Instant::now() + pause > end {
            break error;
        }
        tracing::debug!(vm = %agent.vm, operation = %request.operation, %error, "the command is looked for again");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_SEARCH_PAUSE);
    };
    Err(Error::timed_out(format!(
        "the guest gave no result within the command's deadline of {} and {} more; seen last: {}",
        seconds(request.deadline),
        seconds(config.exec_margin),
        last.message()
    )))
}

enum Attempt {
    Answered(ExecOutput),
    /// The runner says that there is no result.
    Refused(Error),
    /// The runner could not be asked, and may be later.
    Lost(Error),
}

fn verdict_error(verdict: &Verdict, request: &ExecRequest) -> Error {
    match verdict {
        Verdict::Exit(code) => Error::internal(format!("the command ended with {code}")),
        Verdict::Late => Error::timed_out(format!(
            "the command ran longer than its deadline of {} and was ended",
            seconds(request.deadline)
        ))
        .with_retry(Retry::Never),
        Verdict::NoUser => Error::invalid(
            "username",
            format_args!("the guest has no account {}", ocr_core::id::shown(request.user.as_deref().unwrap_or(""))),
        ),
        Verdict::Garbled => Error::unavailable("the command did not reach the guest whole; nothing ran"),
        Verdict::Full => Error::new(ErrorKind::Exhausted, "the guest's disk is full or cannot be written; nothing ran"),
        Verdict::Rebooted => Error::unavailable("the guest rebooted while the command ran; it is not run again")
            .with_retry(Retry::Ambiguous),
        Verdict::Lost => {
            Error::unavailable("the command was ended from outside, without a result; it is not run again")
                .with_retry(Retry::Ambiguous)
        }
        Verdict::Forgotten => Error::new(ErrorKind::Conflict, "the command ran, and its output is no longer kept"),
    }
}

/// Runs the command, or finds the run that is under way, or its result: the runner knows.
async fn attempt(
    agent: Agent<'_>,
    request: &ExecRequest,
    run: &Run,
    is_staged: bool,
    limit_bytes: u64,
    end: Instant,
    follower: Option<&mut Follower<'_>>,
) -> Result<Attempt> {
    let input = if is_staged {
        stage(agent, run).await?;
        Vec::new()
    } else {
        run.input.clone()
    };
    let status = match agent.run(runner::script(), &run.arguments, input, end, follower).await? {
        Ended::Reported(status) => status,
        Ended::Unknown(error) => return Ok(Attempt::Lost(error)),
    };
    let StatusReply { out_data, err_data, exitcode, .. } = status;
    let Some(answer) = Answer::parse(&out_data.0) else {
        let complaint = String::from_utf8_lossy(&err_data.0).trim().lines().last().unwrap_or("").to_owned();
        // The runner was killed; whether the command ran, the next one will find.
        let why = format!("the in-guest runner ended with {exitcode:?} and without an answer: {complaint}");
        return Ok(Attempt::Lost(Error::internal(why)));
    };
    let exit_code = match answer.verdict {
        Verdict::Exit(code) => code,
        verdict => return Ok(Attempt::Refused(verdict_error(&verdict, request))),
    };
    let [out_cut, err_cut] = answer.cut;
    let stdout = whole(agent, run, "out", out_cut, answer.stdout.to_vec(), limit_bytes).await;
    let stderr = whole(agent, run, "err", err_cut, err_data.0, limit_bytes).await;
    let ((stdout, stdout_truncated), (stderr, stderr_truncated)) = match (stdout, stderr) {
        (Ok(stdout), Ok(stderr)) => (stdout, stderr),
        // The result is in the guest: the next attempt reads it.
        (Err(error), _) | (_, Err(error)) if error.retry() != Retry::Never => return Ok(Attempt::Lost(error)),
        (Err(error), _) | (_, Err(error)) => return Err(error),
    };
    Ok(Attempt::Answered(ExecOutput { exit_code, stdout, stderr, stdout_truncated, stderr_truncated }))
}

/// The whole of an output, of which the answer brought the beginning.
async fn whole(
    agent: Agent<'_>,
    run: &Run,
    suffix: &str,
    is_cut: bool,
    mut begin: Vec<u8>,
    limit_bytes: u64,
) -> Result<(Bytes, bool)> {
    if begin.len() as u64 > run.inline_bytes && run.inline_bytes < limit_bytes {
        agent.inner.machine(agent.vm).want_pruning();
        let path = format!("{}.{suffix}{}", run.files, if is_cut { "k" } else { "" });
        let have = begin.len() as u64;
        begin.extend(agent.read_file(&path, have, limit_bytes.saturating_sub(have)).await?);
    }
    let limit = usize::try_from(limit_bytes).unwrap_or(usize::MAX);
    let is_longer = begin.len() > limit;
    begin.truncate(limit);
    Ok((begin.into(), is_cut || is_longer))
}

/// Follows a running command's output by reading its files.
struct Follower<'a> {
    progress: &'a mpsc::Sender<OutputChunk>,
    tails: [Tail; 2],
    looked: Instant,
}

/// One output.
struct Tail {
    path: String,
    make: fn(Bytes) -> OutputChunk,
    /// The agent's handle; it dies with the agent.
    handle: Option<i64>,
    /// How much was sent on.
    offset: u64,
    limit_bytes: u64,
}

impl<'a> Follower<'a> {
    fn new(progress: &'a mpsc::Sender<OutputChunk>, files: &str, limit_bytes: u64) -> Self {
        let tail =
            |suffix: &str, make| Tail { path: format!("{files}.{suffix}"), make, handle: None, offset: 0, limit_bytes };
        Self {
            progress,
            tails: [tail("out", OutputChunk::Stdout), tail("err", OutputChunk::Stderr)],
            looked: Instant::now(),
        }
    }

    /// Sends on what is new, when it is time to look. What fails is tried again the next time.
    async fn look(&mut self, agent: Agent<'_>) {
        if self.looked.elapsed() < FOLLOW_PAUSE || self.progress.is_closed() {
            return;
        }
        for tail in &mut self.tails {
            if let Err(refused) = tail.look(agent, self.progress).await {
                tracing::debug!(vm = %agent.vm, error = %refused.error, "a command's output cannot be followed now");
                tail.handle = None;
            }
        }
        self.looked = Instant::now();
    }

    /// Sends on the rest.
    async fn finish(self, agent: Agent<'_>, output: &ExecOutput) {
        for (tail, whole) in self.tails.into_iter().zip([&output.stdout, &output.stderr]) {
            if let Some(handle) = tail.handle {
                agent.close(handle).await;
            }
            let sent = usize::try_from(tail.offset).unwrap_or(usize::MAX).min(whole.len());
            for at in (sent..whole.len()).step_by(PROGRESS_BYTES) {
                let rest = whole.slice(at..whole.len().min(at + PROGRESS_BYTES));
                let _ = self.progress.try_send((tail.make)(rest));
            }
        }
    }
}

impl Tail {
    async fn look(&mut self, agent: Agent<'_>, progress: &mpsc::Sender<OutputChunk>) -> Result<(), Refused> {
        let handle = match self.handle {
            Some(handle) => handle,
            None => *self.handle.insert(agent.send(&FileOpen { path: self.path.clone(), mode: "r" }).await?),
        };
        let count = self.limit_bytes.saturating_sub(self.offset).min(PROGRESS_BYTES as u64);
        if count == 0 {
            return Ok(());
        }
        // Also to get beyond the end that an earlier look came to.
        agent.send(&FileSeek { handle, offset: self.offset, whence: "set" }).await?;
        let new = agent.send(&FileRead { handle, count }).await?.buf_b64.0;
        if !new.is_empty() {
            self.offset += new.len() as u64;
            // A receiver that is full loses this piece.
            let _ = progress.try_send((self.make)(new.into()));
        }
        Ok(())
    }
}

/// Writes a large input into the guest, where nobody but the agent's user can read it.
async fn stage(agent: Agent<'_>, run: &Run) -> Result<()> {
    const MAKE: &str = "[ -d \"$1\" ] || { mkdir -p \"${1%/*}\" && mkdir -m 700 \"$1\"; }\n\
                        (umask 077 && echo >\"$2\") && echo 'ocr1 done'";
    let path = format!("{}.in", run.files);
    let folder = run.arguments.first().cloned().unwrap_or_default();
    let reply = agent.script(MAKE, &[folder, path.clone()], Vec::new()).await;
    reply.map_err(|error| match error.kind() {
        ErrorKind::Internal => {
            Error::new(ErrorKind::Exhausted, "the guest's disk is full or cannot be written").with_source(error)
        }
        _ => error,
    })?;
    Ok(agent.write_file(&path, &run.input).await?)
}
