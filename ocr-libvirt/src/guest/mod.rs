//! [`GuestExec`] over the QEMU guest agent, whoever carries its commands.
//!
//! The agent alone is a poor executor: it tells the end of a program once, to whoever asks first, and forgets all of
//! them when it restarts; a reply that is too big is lost, and a time-out says nothing about what happened. So every
//! operation is one run of a small shell script in the guest, `runner.sh`, which keeps what it did in a folder named
//! by the operation. Asking again is then always safe: a run that goes on is waited for, one that ended is told again.
//!
//! ```text
//!  exec ──> guest-exec runner ──> mkdir ops/OPERATION ──first──> run ──> result ──┐
//!              ^                        └───────────others──> wait for result ───┤
//!              └── agent restarted, pid lost, answer lost: ask again <────────────┴──> small output with the answer,
//!                                                                                     big output read from files
//! ```

mod agent;
mod files;
#[cfg(feature = "libvirt")]
mod link;
mod runner;

use std::{fmt, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use ocr_core::{
    Deletion, Error, ExecOutput, ExecRequest, GuestCapabilities, GuestExec, GuestInfo, OsFamily, OutputChunk, PutFile,
    Result, Retry, VmId, guest::check_guest_path,
};
use tokio::{sync::mpsc, time::Instant};

#[cfg(feature = "libvirt")]
pub(crate) use self::link::Link;
use self::{
    agent::{Agent, Exited, Handle, is_outage, is_refusal, is_untouched},
    runner::{INLINE_BYTES, Input, Output, RUN, Reply, Script},
};

/// Carries one command of the QEMU guest agent (JSON text) to a machine, and its answer (JSON text) back.
///
/// # Errors
/// The states of a guest as [`GuestExec`] lists them, with their kinds and reasons. An agent that cannot be reached is
/// `Unavailable` with reason `AGENT_NOT_READY`: [`Retry::Safe`] only when the command surely was not executed,
/// otherwise [`Retry::Ambiguous`]. A command that the agent itself refused is `Internal` or `Invalid` without a reason
/// and with the agent's own text in the message; the `{"error": ...}` of the agent may be handed back as well.
#[async_trait]
pub trait AgentLink: fmt::Debug + Send + Sync + 'static {
    /// Sends `command` and waits for the answer, at most `limit`.
    async fn command(&self, vm: VmId, command: &str, limit: Duration) -> Result<String>;
}

/// Settings of [`AgentGuest`].
#[derive(Clone, Debug)]
pub struct AgentGuestConfig {
    /// The folder in the guest that belongs to the runner. It is made when missing, for root alone.
    pub base: String,
    /// How much longer than its deadline a command is waited for: its end has to be told too, by an agent that may
    /// just restart.
    pub margin: Duration,
    /// How long a file operation may take, beside a second for each 64 KiB.
    pub file_limit: Duration,
}

impl Default for AgentGuestConfig {
    /// `/var/lib/ocr`, 20 s, 60 s.
    fn default() -> Self {
        Self { base: "/var/lib/ocr".to_owned(), margin: Duration::from_secs(20), file_limit: Duration::from_secs(60) }
    }
}

/// The largest file that `put_file` takes.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// The most of each output.
const MAX_OUTPUT_BYTES: u64 = ExecRequest::OUTPUT_LIMIT_BYTES;

/// How often a runner may end without an answer before that is an error.
const MAX_SILENT_ENDS: u32 = 3;

/// How often work on a file may be refused by the agent before that is an error: it may restart several times.
const MAX_REFUSALS: u32 = 5;

/// The longest deadline that is told apart from none.
const MAX_DEADLINE: Duration = Duration::from_secs(365 * 86_400);

/// The shortest pause between two questions whether a program ended; then it is a tenth of the time it runs.
const MIN_PAUSE: Duration = Duration::from_millis(2);

/// The longest such pause.
const MAX_PAUSE: Duration = Duration::from_millis(250);

/// The longest pause between two looks at the output of a running command.
const PROGRESS_PAUSE: Duration = Duration::from_secs(1);

/// The most that one look takes of each output, in bytes.
const PROGRESS_BYTES: usize = 256 << 10;

/// Acts inside Linux guests through their QEMU guest agent.
///
/// A command that its caller no longer waits for goes on in the guest until its end or its deadline.
///
/// What a command leaves running in the background keeps running, and its output is cut off from the result. A command
/// that opens `/dev/stdout` anew to write from its beginning (`>/dev/stdout`) loses what it wrote there before:
/// output goes to files.
#[derive(Debug)]
pub struct AgentGuest<L> {
    agent: Agent<L>,
    config: AgentGuestConfig,
}

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

/// One operation, over all attempts at it.
struct Job<'a> {
    vm: VmId,
    script: Script,
    until: Instant,
    /// When the first attempt was sent of those that may have reached the guest.
    asked: Option<Instant>,
    progress: Option<Progress<'a>>,
}

impl Job<'_> {
    fn new(vm: VmId, script: Script, until: Instant) -> Self {
        Self { vm, script, until, asked: None, progress: None }
    }
}

/// Why a run of the runner has no answer.
enum Lost {
    /// The program, or the agent with it, is gone or out of reach: ask again.
    Track(Error),
    /// There will be none.
    Final(Error),
}

impl<L: AgentLink> AgentGuest<L> {
    /// Guests over this link, with the usual settings.
    pub fn new(link: L) -> Self {
        Self { agent: Agent::new(link), config: AgentGuestConfig::default() }
    }

    /// Guests over this link.
    ///
    /// # Errors
    /// `Invalid` when the folder is no path of a guest.
    pub fn with_config(link: L, config: AgentGuestConfig) -> Result<Self> {
        check_guest_path(&config.base).map_err(|error| error.with_note("the runner's folder in guests"))?;
        check_argument("path", &config.base)?;
        Ok(Self { agent: Agent::new(link), config })
    }

    /// Runs the runner until it answers. Whatever is asked for may be asked for repeatedly.
    ///
    /// `arguments` gets how long ago the job was asked for first.
    async fn runner(
        &self,
        job: &mut Job<'_>,
        arguments: impl Fn(Duration) -> Vec<String>,
        input: &[u8],
    ) -> Result<Reply> {
        let (mut silent, mut pause) = (0, Duration::from_millis(50));
        loop {
            let since = job.asked.map(|asked| asked.elapsed()).unwrap_or_default();
            let lost = match self.attempt(job, arguments(since), input).await {
                Ok(exited) => match Reply::of(&exited) {
                    Some(reply) => return Ok(reply),
                    None => {
                        silent += 1;
                        let error = silent_end(&exited);
                        if silent == MAX_SILENT_ENDS {
                            return Err(error);
                        }
                        error
                    }
                },
                Err(Lost::Final(error)) => return Err(error),
                // Nothing was begun: whether to come back is the caller's to say.
                Err(Lost::Track(error)) if job.asked.is_none() => return Err(error),
                Err(Lost::Track(error)) => error,
            };
            if Instant::now() + pause >= job.until {
                return Err(lost.with_retry(Retry::Ambiguous).with_note("whether it was done is not known"));
            }
            tracing::debug!(vm = %job.vm, error = %lost, "lost track of a program in the guest, asking again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// Starts the runner once and waits for its end.
    async fn attempt(&self, job: &mut Job<'_>, arguments: Vec<String>, input: &[u8]) -> Result<Exited, Lost> {
        let vm = job.vm;
        let mut argv = vec!["-c".to_owned(), job.script.text(), job.script.name.to_owned()];
        argv.extend(arguments);
        let sent = Instant::now();
        let started = self.agent.start(vm, "/bin/sh", &argv, input).await;
        if started.as_ref().map_or_else(|error| !is_untouched(error), |_| true) {
            job.asked.get_or_insert(sent);
        }
        let pid = started.map_err(|error| if is_outage(&error) { Lost::Track(error) } else { Lost::Final(error) })?;
        let started = Instant::now();
        // A question costs an emulated guest a good part of what the runner costs: the first one is asked when an
        // operation on this machine usually ends.
        let mut pause = self.agent.usual(vm).mul_f64(0.9);
        loop {
            tokio::time::sleep(pause).await;
            match self.agent.status(vm, pid).await {
                Ok(Some(exited)) => {
                    self.agent.learn(vm, started.elapsed());
                    return Ok(exited);
                }
                Ok(None) => {}
                Err(error) if is_outage(&error) || is_refusal(&error) => return Err(Lost::Track(error)),
                Err(error) => return Err(Lost::Final(error)),
            }
            if let Some(progress) = &mut job.progress {
                progress.look(&self.agent, vm).await;
            }
            if Instant::now() >= job.until {
                return Err(Lost::Track(Error::timed_out("the guest did not tell the end of the operation in time")));
            }
            pause = (started.elapsed() / 10).clamp(MIN_PAUSE, MAX_PAUSE);
        }
    }

    /// Reads at most `count` bytes of a file from `offset` on.
    async fn read_from(&self, vm: VmId, path: &str, offset: u64, count: usize, until: Instant) -> Result<Bytes> {
        let mut again = Again::default();
        loop {
            match files::read(&self.agent, vm, path, offset, count).await {
                Err(error) if again.may(&error, until) => {
                    tracing::debug!(%vm, %error, "lost an open file in the guest, reading again");
                    tokio::time::sleep(MAX_PAUSE).await;
                }
                result => return result,
            }
        }
    }

    async fn exec_inner(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        request.check()?;
        if let Some(user) = &request.user {
            check_user(user, "username")?;
        }
        let input = Input::of(request)?;
        let deadline = request.deadline.min(MAX_DEADLINE);
        let until = Instant::now() + deadline + self.config.margin;
        let limit = request.output_limit_bytes.min(MAX_OUTPUT_BYTES);
        let files = format!("{}/ops/{}", self.config.base, request.operation);
        let deadline_cs = deadline.as_millis().div_ceil(10).max(1);

        let mut job = Job::new(vm, RUN, until);
        job.progress = request.progress.as_ref().map(|sender| Progress::new(sender, &files, limit));
        let reply = loop {
            let staged = self.stage(vm, input.staged(), until).await?;
            let arguments = |since: Duration| {
                vec![
                    self.config.base.clone(),
                    request.operation.to_string(),
                    deadline_cs.to_string(),
                    limit.to_string(),
                    INLINE_BYTES.to_string(),
                    input.head_bytes.to_string(),
                    input.total_bytes.to_string(),
                    staged.clone().unwrap_or_default(),
                    request.user.clone().unwrap_or_default(),
                    (since.as_millis() / 10).to_string(),
                ]
            };
            let sent: &[u8] = if staged.is_some() { &[] } else { &input.bytes };
            let reply = self.runner(&mut job, arguments, sent).await?;
            if reply.state() != "again" {
                break reply;
            }
            // What was sent did not get there whole, and nothing was run.
            if Instant::now() + MAX_PAUSE >= until {
                return Err(Error::timed_out("the request did not reach the guest whole in time"));
            }
            tokio::time::sleep(MAX_PAUSE).await;
        };
        let ended = runner::ended(&reply, request)?;
        let until = until.max(Instant::now() + self.transfer_limit(2 * limit));
        let (stdout, stdout_truncated) = self.whole(vm, ended.stdout, &format!("{files}.out"), limit, until).await?;
        let (stderr, stderr_truncated) = self.whole(vm, ended.stderr, &format!("{files}.err"), limit, until).await?;
        if let Some(progress) = job.progress {
            progress.finish(&self.agent, vm, [&stdout, &stderr]).await;
        }
        Ok(ExecOutput { exit_code: ended.exit_code, stdout, stderr, stdout_truncated, stderr_truncated })
    }

    /// An output up to the limit, and whether there was more.
    async fn whole(&self, vm: VmId, output: Output, path: &str, limit: u64, until: Instant) -> Result<(Bytes, bool)> {
        let limit = limit as usize;
        let mut bytes = output.begin;
        if output.more && bytes.len() <= limit {
            // A byte over the limit is not for the caller, but tells that it is there.
            let rest = self.read_from(vm, path, bytes.len() as u64, limit + 1 - bytes.len(), until).await?;
            bytes = [bytes, rest].concat().into();
        }
        let truncated = output.cut || bytes.len() > limit;
        bytes.truncate(limit);
        Ok((bytes, truncated))
    }

    /// How long moving this much may take.
    fn transfer_limit(&self, bytes: u64) -> Duration {
        self.config.file_limit + Duration::from_secs(bytes >> 16)
    }
}

#[async_trait]
impl<L: AgentLink> GuestExec for AgentGuest<L> {
    fn capabilities(&self) -> GuestCapabilities {
        GuestCapabilities {
            max_file_bytes: MAX_FILE_BYTES,
            max_output_bytes: MAX_OUTPUT_BYTES,
            users: true,
            streaming: true,
        }
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        let result = async {
            let info = self.agent.info(vm).await?;
            // Old agents lack it, and some are told not to answer it; the guest is none the worse.
            let os = match info.can(&["guest-get-osinfo"]) {
                true => self
                    .agent
                    .os_info(vm)
                    .await
                    .or_else(|error| if is_refusal(&error) { Ok(Default::default()) } else { Err(error) })?,
                false => Default::default(),
            };
            Ok(GuestInfo {
                can_exec: info.can(&["guest-exec", "guest-exec-status"]),
                can_files: info.can(&["guest-file-open", "guest-file-read", "guest-file-write", "guest-file-close"]),
                agent_version: info.version,
                os_family: if os.id == "mswindows" { OsFamily::Windows } else { OsFamily::Linux },
                os_name: if os.pretty_name.is_empty() { os.name } else { os.pretty_name },
            })
        };
        result.await.map_err(context("guest.guest_info", vm))
    }

    async fn put_file(&self, vm: VmId, file: &PutFile) -> Result<()> {
        self.put_inner(vm, file).await.map_err(context("guest.put_file", vm))
    }

    async fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        self.get_inner(vm, path, limit_bytes).await.map_err(context("guest.get_file", vm))
    }

    async fn remove_file(&self, vm: VmId, path: &str) -> Result<Deletion> {
        self.remove_inner(vm, path).await.map_err(context("guest.remove_file", vm))
    }

    async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        self.exec_inner(vm, request).await.map_err(context("guest.exec", vm))
    }
}

fn context(operation: &'static str, vm: VmId) -> impl Fn(Error) -> Error {
    move |error| error.during(operation).on(format!("vm {vm}"))
}

fn silent_end(exited: &Exited) -> Error {
    let text = String::from_utf8_lossy(&exited.stderr);
    Error::internal(format!(
        "the runner in the guest ended without an answer ({}): {}",
        exited.how,
        ocr_core::id::shown(text.trim())
    ))
}

/// Refuses names that `id` and `su` of some guests take for a number.
fn check_user(user: &str, field: &str) -> Result<()> {
    ocr_core::guest::check_user_name(user)?;
    check_argument(field, user)?;
    if user.starts_with('+') || user.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Error::invalid(field, "wants an account's name, not its number"));
    }
    Ok(())
}

/// Refuses what the agent's JSON reader takes for an error: code points that are no characters.
fn check_argument(field: &str, text: &str) -> Result<()> {
    let bad = |c: char| matches!(c, '\u{fdd0}'..='\u{fdef}') || u32::from(c) & 0xfffe == 0xfffe;
    if text.contains(bad) {
        return Err(Error::invalid(field, "must not have code points that are no characters (such as U+FFFE)"));
    }
    Ok(())
}

/// Sends the output of a running command on, from the files it goes to.
struct Progress<'a> {
    sender: &'a mpsc::Sender<OutputChunk>,
    streams: [Stream; 2],
    next: Instant,
    pause: Duration,
}

struct Stream {
    path: String,
    wrap: fn(Bytes) -> OutputChunk,
    handle: Option<Handle>,
    sent_bytes: u64,
    limit_bytes: u64,
}

impl<'a> Progress<'a> {
    fn new(sender: &'a mpsc::Sender<OutputChunk>, files: &str, limit_bytes: u64) -> Self {
        let stream =
            |name, wrap| Stream { path: format!("{files}.{name}"), wrap, handle: None, sent_bytes: 0, limit_bytes };
        let pause = Duration::from_millis(100);
        Self {
            sender,
            streams: [stream("out", OutputChunk::Stdout), stream("err", OutputChunk::Stderr)],
            next: Instant::now() + pause,
            pause,
        }
    }

    /// Sends what is new, when it is time to look. A fault loses progress and nothing else.
    async fn look<L: AgentLink>(&mut self, agent: &Agent<L>, vm: VmId) {
        if Instant::now() < self.next || self.sender.is_closed() {
            return;
        }
        for stream in &mut self.streams {
            match stream.read(agent, vm).await {
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) => {
                    stream.sent_bytes += bytes.len() as u64;
                    let _ = self.sender.try_send((stream.wrap)(bytes));
                }
                Err(error) => {
                    tracing::debug!(%vm, %error, "no look at a running command's output");
                    stream.handle = None;
                }
            }
        }
        self.pause = (self.pause * 2).min(PROGRESS_PAUSE);
        self.next = Instant::now() + self.pause;
    }

    /// Sends the rest.
    async fn finish<L: AgentLink>(self, agent: &Agent<L>, vm: VmId, outputs: [&Bytes; 2]) {
        for (stream, output) in self.streams.into_iter().zip(outputs) {
            if let Some(handle) = stream.handle {
                let _ = agent.close(vm, handle).await;
            }
            let mut rest = output.slice((stream.sent_bytes as usize).min(output.len())..);
            while !rest.is_empty() {
                let chunk = rest.split_to(rest.len().min(PROGRESS_BYTES));
                let _ = self.sender.try_send((stream.wrap)(chunk));
            }
        }
    }
}

impl Stream {
    async fn read<L: AgentLink>(&mut self, agent: &Agent<L>, vm: VmId) -> Result<Bytes> {
        let count = (self.limit_bytes - self.sent_bytes).min(PROGRESS_BYTES as u64) as usize;
        if count == 0 {
            return Ok(Bytes::new());
        }
        let handle = match self.handle {
            Some(handle) => handle,
            None => {
                let handle = agent.open(vm, &self.path, "r").await?;
                self.handle = Some(handle);
                if self.sent_bytes > 0 {
                    agent.seek(vm, handle, self.sent_bytes).await?;
                }
                handle
            }
        };
        agent.read(vm, handle, count).await.map(|(bytes, _)| bytes)
    }
}
