//! [`GuestExec`] for guests with a POSIX shell, whoever carries the bytes.
//!
//! Whatever carries a command into a guest loses track of it now and then: an agent restarts, a connection breaks, an
//! answer is too big. So every operation is one run of a small shell script in the guest, which keeps what it did in a
//! folder of its own, named by the operation. Asking again is then always safe: a run that goes on is waited for, one
//! that ended is told again. The scripts also keep the fence: see [`GuestExec`].
//!
//! ```text
//!  exec ──> link.run(runner.sh) ──> mkdir ops/OPERATION ──first──> run ──> result ──┐
//!              ^                        └─────────────others──> wait for result ────┤
//!              └── link broken, process lost, answer lost: ask again <──────────────┴──> small output with the answer,
//!                                                                                        big output read from files
//! ```
//!
//! A carrier implements [`PosixLink`]; [`PosixGuest`] is everything else. Files of a request travel in one stream,
//! compressed where the guest can unpack it and it pays, however many they are.

mod bundle;
mod runner;

use std::{
    collections::HashSet,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Mutex,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::{sync::mpsc, time::Instant};

use self::{
    bundle::{Bundle, Stream},
    runner::{FILE, Input, Output, RUN, Reply, Script},
};
use super::{check_guest_path, check_user_name, fence_wait_ended, fenced};
use crate::{
    Deletion, Error, ErrorKind, ExecOutput, ExecRequest, FencingToken, GuestCapabilities, GuestExec, GuestInfo,
    OperationId, OutputChunk, PutFiles, RemoveFiles, Result, Retry, VmId, id::shown,
};

/// Carries script runs and bytes into guests, and what came of them back.
///
/// # Errors
/// The states of a guest as [`GuestExec`] lists them, with their kinds and reasons. Whatever may pass (no connection, no
/// answer, a process lost sight of) is `Unavailable` or `TimedOut`: [`Retry::Safe`] only when surely nothing was begun in
/// the guest, otherwise [`Retry::Ambiguous`]; the call is then made again. All other errors are final.
#[async_trait]
pub trait PosixLink: fmt::Debug + Send + Sync + 'static {
    /// How much one message takes.
    fn limits(&self) -> PosixLimits;

    /// Who answers in the guest. See [`GuestExec::guest_info`].
    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo>;

    /// Runs `/bin/sh -c SCRIPT NAME ARGUMENT...` with this stdin as the most powerful user there is, and waits for its
    /// end, at the latest until [`PosixRun::until`].
    ///
    /// That it ended is no error, whatever its exit code. When the wait ends first, the script goes on.
    async fn run(&self, vm: VmId, run: &PosixRun<'_>) -> Result<PosixExit>;

    /// Writes a file anew. It need not be whole when this fails: nobody uses it then.
    ///
    /// Only called for what is longer than [`PosixLimits::stdin_bytes`]. The folder belongs to the runner and is for
    /// root alone; when it is not there the error is `NotFound` without a reason.
    async fn write(&self, vm: VmId, path: &str, parts: &[Bytes], until: Instant) -> Result<()>;

    /// Reads at most `count` bytes of a file from `offset` on; less only when the file ends before. All of it comes from
    /// the file that had this name at one moment.
    async fn read(&self, vm: VmId, path: &str, offset: u64, count: usize, until: Instant) -> Result<Bytes>;
}

/// How much one message of a [`PosixLink`] takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PosixLimits {
    /// The most stdin of a run, in bytes. What is longer goes through [`PosixLink::write`].
    pub stdin_bytes: usize,
    /// The most stdout, and the most stderr, that come back with a run's end, in bytes; at least 4096.
    pub reply_bytes: usize,
    /// Whether sending costs more than packing: then much that goes into the guest is compressed.
    pub compress: bool,
}

/// One run of a script.
#[derive(Clone, Copy)]
pub struct PosixRun<'a> {
    /// What it is called in the guest's list of processes.
    pub name: &'static str,
    /// The script.
    pub script: &'a str,
    /// Its arguments: any text without NUL. They hold no secrets.
    pub arguments: &'a [String],
    /// What it reads; may hold secrets.
    pub stdin: &'a [u8],
    /// How long its end is waited for.
    pub until: Instant,
    /// Runs of one kind in one guest are likely to take about as long: for links that have to ask for the end.
    pub kind: u64,
}

impl fmt::Debug for PosixRun<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PosixRun")
            .field("name", &self.name)
            .field("arguments", &self.arguments)
            .field("stdin_bytes", &self.stdin.len())
            .finish_non_exhaustive()
    }
}

/// How a script ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PosixExit {
    /// For people: `exit code 1`, `signal 9`.
    pub how: String,
    /// All that it wrote to stdout.
    pub stdout: Bytes,
    /// All that it wrote to stderr.
    pub stderr: Bytes,
}

/// Settings of [`PosixGuest`].
#[derive(Clone, Debug)]
pub struct PosixConfig {
    /// The folder in the guest that belongs to the runner. It is made when missing, for root alone.
    pub base: String,
    /// How much longer than its deadline a command is waited for: its end has to be told too, over a link that may
    /// just be broken.
    pub margin: Duration,
    /// How long a file operation may take, beside a second for each 64 KiB.
    pub file_limit: Duration,
}

impl Default for PosixConfig {
    /// `/var/lib/ocr`, 20 s, 60 s.
    fn default() -> Self {
        Self { base: "/var/lib/ocr".to_owned(), margin: Duration::from_secs(20), file_limit: Duration::from_secs(60) }
    }
}

/// The largest file that `put_files` takes.
pub const MAX_FILE_BYTES: u64 = 256 << 20;

/// The most of each output.
pub const MAX_OUTPUT_BYTES: u64 = ExecRequest::OUTPUT_LIMIT_BYTES;

/// So much of each output comes back in the same message as the exit code, and one byte more when there is more.
const INLINE_BYTES: usize = 512 << 10;

/// How often a runner may end without an answer before that is an error.
const MAX_SILENT_ENDS: u32 = 3;

/// How often a content is sent that arrives damaged.
const MAX_TRIES: u32 = 3;

/// The longest deadline that is told apart from none.
const MAX_DEADLINE: Duration = Duration::from_secs(365 * 86_400);

/// The longest pause between two tries of something that was lost on the way.
const MAX_PAUSE: Duration = Duration::from_millis(250);

/// The longest pause between two looks at the output of a running command.
const PROGRESS_PAUSE: Duration = Duration::from_secs(1);

/// The most that one look takes of each output, in bytes.
const PROGRESS_BYTES: usize = 256 << 10;

/// Guests remembered for not having gzip.
const MAX_PLAIN: usize = 16 << 10;

/// Acts inside guests with a POSIX shell.
///
/// A command that its caller no longer waits for goes on in the guest until its end or its deadline.
///
/// What a command leaves running in the background keeps running, and its output is cut off from the result. A command
/// that opens `/dev/stdout` anew to write from its beginning (`>/dev/stdout`) loses what it wrote there before:
/// output goes to files.
#[derive(Debug)]
pub struct PosixGuest<L> {
    link: L,
    config: PosixConfig,
    /// Guests that cannot unpack.
    plain: Mutex<HashSet<VmId>>,
}

/// One operation, over all attempts at it.
struct Job {
    vm: VmId,
    script: Script,
    until: Instant,
    kind: u64,
    /// When the first attempt was sent of those that may have reached the guest.
    asked: Option<Instant>,
}

impl Job {
    fn new(vm: VmId, script: Script, until: Instant, kind: impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        (script.name, kind).hash(&mut hasher);
        Self { vm, script, until, kind: hasher.finish(), asked: None }
    }
}

impl<L: PosixLink> PosixGuest<L> {
    /// Guests over this link.
    ///
    /// # Errors
    /// `Invalid` when the folder is no path of a guest.
    pub fn new(link: L, config: PosixConfig) -> Result<Self> {
        check_guest_path(&config.base).map_err(|error| error.with_note("the runner's folder in guests"))?;
        Ok(Self { link, config, plain: Mutex::default() })
    }

    /// The link.
    pub fn link(&self) -> &L {
        &self.link
    }

    /// Runs a script until it answers. Whatever is asked for may be asked for repeatedly.
    ///
    /// `arguments` gets how long ago the job was asked for first.
    async fn runner(&self, job: &mut Job, arguments: impl Fn(Duration) -> Vec<String>, input: &[u8]) -> Result<Reply> {
        let (mut silent, mut pause) = (0, Duration::from_millis(50));
        loop {
            let since = job.asked.map(|asked| asked.elapsed()).unwrap_or_default();
            let arguments = arguments(since);
            let run = PosixRun {
                name: job.script.name,
                script: job.script.text(),
                arguments: &arguments,
                stdin: input,
                until: job.until,
                kind: job.kind,
            };
            let sent = Instant::now();
            let ended = self.link.run(job.vm, &run).await;
            if ended.as_ref().map_or_else(|error| error.retry() != Retry::Safe, |_| true) {
                job.asked.get_or_insert(sent);
            }
            let lost = match ended {
                Ok(exit) => match Reply::of(&exit) {
                    Some(reply) => return Ok(reply),
                    None => {
                        silent += 1;
                        let error = silent_end(&exit);
                        if silent == MAX_SILENT_ENDS {
                            return Err(error);
                        }
                        error
                    }
                },
                Err(error) if !is_outage(&error) => return Err(error),
                // Nothing was begun: whether to come back is the caller's to say.
                Err(error) if job.asked.is_none() => return Err(error),
                Err(error) => error,
            };
            if Instant::now() + pause >= job.until {
                return Err(lost.with_retry(Retry::Ambiguous).with_note("whether it was done is not known"));
            }
            tracing::debug!(vm = %job.vm, error = %lost, "lost track of a program in the guest, asking again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// Brings what is too long for one message into the guest, into a file for root alone; the script that uses it
    /// removes it. Nothing and `None` when it is short.
    async fn bring(&self, vm: VmId, parts: &[Bytes], until: Instant) -> Result<Option<String>> {
        if parts.iter().map(Bytes::len).sum::<usize>() <= self.link.limits().stdin_bytes {
            return Ok(None);
        }
        let path = format!("{}/in/{}", self.config.base, OperationId::random());
        let written = match self.link.write(vm, &path, parts, until).await {
            Err(error) if error.kind() == ErrorKind::NotFound && error.reason().is_none() => {
                let arguments = |_| vec!["stage".to_owned(), self.config.base.clone()];
                let reply = self.runner(&mut Job::new(vm, FILE, until, "stage"), arguments, &[]).await?;
                match reply.state() {
                    "differ" => {}
                    "fail" => return Err(reply.failure()),
                    _ => return Err(reply.senseless()),
                }
                self.link.write(vm, &path, parts, until).await
            }
            result => result,
        };
        if written.is_err() {
            // What stays all the same is swept by its age.
            let _gone = self.remove_inner(vm, &RemoveFiles::new([path.as_str()])).await;
        }
        written.map(|()| Some(path))
    }

    fn until(&self, bytes: u64) -> Instant {
        Instant::now() + self.transfer_limit(bytes)
    }

    /// How long moving this much may take.
    fn transfer_limit(&self, bytes: u64) -> Duration {
        self.config.file_limit + Duration::from_secs(bytes >> 16)
    }

    fn packs(&self, vm: VmId) -> bool {
        self.link.limits().compress && !self.plain().contains(&vm)
    }

    fn plain(&self) -> std::sync::MutexGuard<'_, HashSet<VmId>> {
        self.plain.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn forget_packing(&self, vm: VmId) {
        let mut plain = self.plain();
        if plain.len() >= MAX_PLAIN {
            plain.clear();
        }
        plain.insert(vm);
    }

    /// The arguments with which work on files begins.
    fn work(&self, mode: &str, id: &str, fence: &str) -> Vec<String> {
        let patience = self.config.file_limit.as_millis() / 10;
        [mode, &self.config.base, id, fence, &patience.to_string()].map(str::to_owned).into()
    }

    /// The answers that any work on files may give.
    fn refused(&self, reply: &Reply, fence: Option<FencingToken>) -> Error {
        match (reply.state(), fence) {
            ("fenced", Some(token)) => fenced(token),
            ("busy", Some(_)) => fence_wait_ended(self.config.file_limit),
            ("busy", None) => Error::timed_out(format!(
                "other work on files in the guest did not end in {}; nothing was done",
                crate::error::seconds(self.config.file_limit)
            ))
            .with_retry(Retry::Safe),
            ("fail", _) => reply.failure(),
            ("again", _) => Error::unavailable("what reached the guest has another digest"),
            _ => reply.senseless(),
        }
    }

    async fn put_inner(&self, vm: VmId, request: &PutFiles) -> Result<()> {
        for file in &request.files {
            check_guest_path(&file.path)?;
            if let Some(owner) = &file.owner {
                check_user(owner, "owner")?;
            }
        }
        request.check(MAX_FILE_BYTES)?;
        let fence = fence_text(request.fence)?;
        // Twice: others may have to be waited for.
        let until = self.until(request.bytes()) + self.config.file_limit;
        let bundle = Bundle::of(&request.files);
        let id = OperationId::random().to_string();
        let limit = self.link.limits().stdin_bytes;
        let mut stream = bundle.stream(self.packs(vm)).await?;
        let mut tries = 0;
        if stream.bytes() > limit
            && let Some(list) = bundle.list()
            && list.bytes.len() <= limit
        {
            let arguments = |_| {
                let mut arguments = self.work("check", &id, &fence);
                arguments.extend([list.head_bytes.to_string(), list.bytes.len().to_string()]);
                arguments
            };
            let reply = self.runner(&mut Job::new(vm, FILE, until, "check"), arguments, &list.bytes).await?;
            match reply.state() {
                "same" => return Ok(()),
                "differ" if stream.packed && reply.text() != "gzip" => {
                    self.forget_packing(vm);
                    stream = bundle.stream(false).await?;
                }
                "differ" | "again" => {}
                _ => return Err(self.refused(&reply, request.fence)),
            }
        }
        loop {
            let reply = self.put_stream(vm, &stream, &id, &fence, until).await?;
            tries += 1;
            match reply.state() {
                "ok" => return Ok(()),
                "nogzip" if stream.packed => {
                    self.forget_packing(vm);
                    stream = bundle.stream(false).await?;
                }
                "again" if reply.failure().kind() == ErrorKind::Exhausted => return Err(reply.failure()),
                "again" if tries < MAX_TRIES && Instant::now() < until => {}
                state @ ("folder" | "noparent" | "noowner" | "failed") => {
                    let file = reply.number(0).ok().and_then(|number| bundle.file(number));
                    let Some(file) = file else { return Err(reply.senseless()) };
                    let path = shown(&file.path);
                    return Err(match state {
                        "folder" => Error::invalid("path", format_args!("{path} is a folder in the guest")),
                        "noparent" => Error::not_found(format!("the guest has no folder for {path}")),
                        "noowner" => runner::unknown_user("owner", file.owner.as_deref().unwrap_or_default())
                            .with_note(format_args!("for {path}")),
                        _ => reply.failure().with_note(format_args!("for {path}")),
                    });
                }
                _ => return Err(self.refused(&reply, request.fence)),
            }
        }
    }

    async fn put_stream(&self, vm: VmId, stream: &Stream, id: &str, fence: &str, until: Instant) -> Result<Reply> {
        let staged = self.bring(vm, &stream.parts, until).await?;
        let arguments = |_| {
            let mut arguments = self.work("put", id, fence);
            arguments.extend([
                staged.clone().unwrap_or_default(),
                stream.sha256.clone(),
                stream.head_bytes.to_string(),
                u8::from(stream.packed).to_string(),
            ]);
            arguments
        };
        let input = if staged.is_some() { Vec::new() } else { stream.parts.concat() };
        // What it takes goes by the bytes, roughly.
        let kind = ("put", stream.bytes().next_power_of_two());
        self.runner(&mut Job::new(vm, FILE, until, kind), arguments, &input).await
    }

    async fn get_inner(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        check_guest_path(path)?;
        let limit_bytes = limit_bytes.min(MAX_FILE_BYTES);
        let until = self.until(limit_bytes);
        let arguments = |_| {
            let numbers = [limit_bytes.to_string(), self.inline_bytes().to_string()];
            [vec!["get".to_owned(), self.config.base.clone(), path.to_owned()], numbers.into()].concat()
        };
        let reply = self.runner(&mut Job::new(vm, FILE, until, "get"), arguments, &[]).await?;
        match reply.state() {
            "file" if reply.body.len() as u64 == reply.number(0)? => Ok(reply.body),
            "file" => Err(Error::unavailable("the file became shorter while it was read")),
            "large" => {
                let content = self.link.read(vm, path, 0, limit_bytes as usize + 1, until).await?;
                if content.len() as u64 > limit_bytes { Err(over(path, limit_bytes)) } else { Ok(content) }
            }
            "over" => Err(over(path, limit_bytes)),
            "missing" => Err(Error::not_found(format!("the guest has no file {}", shown(path)))),
            "folder" => Err(Error::invalid("path", format_args!("{} is a folder in the guest", shown(path)))),
            "special" => Err(Error::invalid("path", format_args!("{} is no regular file in the guest", shown(path)))),
            "fail" => Err(reply.failure()),
            _ => Err(reply.senseless()),
        }
    }

    async fn remove_inner(&self, vm: VmId, request: &RemoveFiles) -> Result<Vec<Result<Deletion>>> {
        request.paths.iter().try_for_each(|path| check_guest_path(path))?;
        let fence = fence_text(request.fence)?;
        let until = self.until(0) + self.config.file_limit;
        let mut outcomes = Vec::with_capacity(request.paths.len());
        for (text, paths) in bundle::paths(&request.paths, self.link.limits().stdin_bytes) {
            let id = OperationId::random().to_string();
            let mut tries = 0;
            let reply = loop {
                let arguments = |_| self.work("remove", &id, &fence);
                let reply = self.runner(&mut Job::new(vm, FILE, until, "remove"), arguments, text.as_bytes()).await?;
                tries += 1;
                if reply.state() != "again" || tries == MAX_TRIES || Instant::now() >= until {
                    break reply;
                }
            };
            if reply.state() != "removed" {
                return Err(self.refused(&reply, request.fence));
            }
            let letters = reply.word(0).unwrap_or_default();
            if letters.len() != paths.len() {
                return Err(reply.senseless());
            }
            for (letter, path) in letters.bytes().zip(paths) {
                outcomes.push(match letter {
                    b'k' => Ok(Deletion::Deleted),
                    b'm' => Ok(Deletion::AlreadyGone),
                    b'f' => Err(Error::invalid("path", format_args!("{} is a folder in the guest", shown(path)))),
                    _ => Err(reply.failure().with_note(format_args!("for {}", shown(path)))),
                });
            }
        }
        Ok(outcomes)
    }

    fn inline_bytes(&self) -> usize {
        // One byte more tells that there is more, and a line stands before it.
        INLINE_BYTES.min(self.link.limits().reply_bytes.saturating_sub(256))
    }

    async fn exec_inner(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        request.check()?;
        if let Some(user) = &request.user {
            check_user(user, "username")?;
        }
        let input = Input::of(request)?;
        let fence = fence_text(request.fence)?;
        let deadline = request.deadline.min(MAX_DEADLINE);
        // Under a fence it may first wait as long as it may run then.
        let waits = if request.fence.is_some() { 2 } else { 1 };
        let until = Instant::now() + deadline * waits + self.config.margin;
        let limit = request.output_limit_bytes.min(MAX_OUTPUT_BYTES);
        let files = format!("{}/ops/{}", self.config.base, request.operation);
        let deadline_cs = deadline.as_millis().div_ceil(10).max(1);
        let inline = self.inline_bytes();

        let mut progress = request.progress.as_ref().map(|sender| Progress::new(sender, &files, limit));
        let run = async {
            let mut job = Job::new(vm, RUN, until, (&request.command, &request.user));
            loop {
                let staged = self.bring(vm, &[input.staged()], until).await?;
                let arguments = |since: Duration| {
                    vec![
                        self.config.base.clone(),
                        request.operation.to_string(),
                        deadline_cs.to_string(),
                        limit.to_string(),
                        inline.to_string(),
                        input.head_bytes.to_string(),
                        input.total_bytes.to_string(),
                        staged.clone().unwrap_or_default(),
                        request.user.clone().unwrap_or_default(),
                        (since.as_millis() / 10).to_string(),
                        fence.clone(),
                    ]
                };
                let sent: &[u8] = if staged.is_some() { &[] } else { &input.bytes };
                let reply = self.runner(&mut job, arguments, sent).await?;
                if reply.state() != "again" {
                    return Ok(reply);
                }
                // What was sent did not get there whole, and nothing was run.
                if Instant::now() + MAX_PAUSE >= until {
                    return Err(Error::timed_out("the request did not reach the guest whole in time"));
                }
                tokio::time::sleep(MAX_PAUSE).await;
            }
        };
        let reply = match &mut progress {
            None => run.await?,
            Some(progress) => tokio::select! {
                biased;
                reply = run => reply?,
                never = progress.follow(&self.link, vm, until) => match never {},
            },
        };
        match (reply.state(), request.fence) {
            ("fenced", Some(token)) => return Err(fenced(token)),
            ("busy", Some(_)) => return Err(fence_wait_ended(deadline)),
            _ => {}
        }
        let ended = runner::ended(&reply, request, inline)?;
        let until = until.max(Instant::now() + self.transfer_limit(2 * limit));
        let (stdout, stdout_truncated) = self.whole(vm, ended.stdout, &format!("{files}.out"), limit, until).await?;
        let (stderr, stderr_truncated) = self.whole(vm, ended.stderr, &format!("{files}.err"), limit, until).await?;
        if let Some(progress) = progress {
            progress.finish([&stdout, &stderr]);
        }
        Ok(ExecOutput { exit_code: ended.exit_code, stdout, stderr, stdout_truncated, stderr_truncated })
    }

    /// An output up to the limit, and whether there was more.
    async fn whole(&self, vm: VmId, output: Output, path: &str, limit: u64, until: Instant) -> Result<(Bytes, bool)> {
        let limit = limit as usize;
        let mut bytes = output.begin;
        if output.more && bytes.len() <= limit {
            // A byte over the limit is not for the caller, but tells that it is there.
            let rest = self.link.read(vm, path, bytes.len() as u64, limit + 1 - bytes.len(), until).await?;
            bytes = [bytes, rest].concat().into();
        }
        let truncated = output.cut || bytes.len() > limit;
        bytes.truncate(limit);
        Ok((bytes, truncated))
    }
}

#[async_trait]
impl<L: PosixLink> GuestExec for PosixGuest<L> {
    fn capabilities(&self) -> GuestCapabilities {
        GuestCapabilities {
            max_file_bytes: MAX_FILE_BYTES,
            max_output_bytes: MAX_OUTPUT_BYTES,
            users: true,
            streaming: true,
        }
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        self.link.guest_info(vm).await.map_err(context("guest.guest_info", vm))
    }

    async fn put_files(&self, vm: VmId, request: &PutFiles) -> Result<()> {
        self.put_inner(vm, request).await.map_err(context("guest.put_files", vm))
    }

    async fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        self.get_inner(vm, path, limit_bytes).await.map_err(context("guest.get_file", vm))
    }

    async fn remove_files(&self, vm: VmId, request: &RemoveFiles) -> Result<Vec<Result<Deletion>>> {
        self.remove_inner(vm, request).await.map_err(context("guest.remove_files", vm))
    }

    async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        self.exec_inner(vm, request).await.map_err(context("guest.exec", vm))
    }
}

fn context(operation: &'static str, vm: VmId) -> impl Fn(Error) -> Error {
    move |error| error.during(operation).on(format!("vm {vm}"))
}

/// Whether the way into the guest may be open again later.
fn is_outage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::TimedOut)
}

fn over(path: &str, limit_bytes: u64) -> Error {
    Error::new(ErrorKind::Exhausted, format!("{} is larger than the limit of {limit_bytes} bytes", shown(path)))
}

fn silent_end(exit: &PosixExit) -> Error {
    let text = String::from_utf8_lossy(&exit.stderr);
    Error::internal(format!("the runner in the guest ended without an answer ({}): {}", exit.how, shown(text.trim())))
}

/// A token as the scripts want it: of one length, so that names come in order, and no larger than their shells count.
fn fence_text(fence: Option<FencingToken>) -> Result<String> {
    match fence {
        None => Ok("-".to_owned()),
        Some(token) if token.0 > i64::MAX as u64 => {
            Err(Error::invalid("fence", format_args!("a guest's shell counts no further than {}", i64::MAX)))
        }
        Some(token) => Ok(format!("{:020}", token.0)),
    }
}

/// Refuses names that `id` and `su` of some guests take for a number.
fn check_user(user: &str, field: &str) -> Result<()> {
    check_user_name(user)?;
    if user.starts_with('+') || user.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Error::invalid(field, "wants an account's name, not its number"));
    }
    Ok(())
}

/// Sends the output of a running command on, from the files it goes to.
struct Progress<'a> {
    sender: &'a mpsc::Sender<OutputChunk>,
    streams: [Followed; 2],
}

struct Followed {
    path: String,
    wrap: fn(Bytes) -> OutputChunk,
    sent_bytes: u64,
    limit_bytes: u64,
}

impl<'a> Progress<'a> {
    fn new(sender: &'a mpsc::Sender<OutputChunk>, files: &str, limit_bytes: u64) -> Self {
        let stream = |name, wrap| Followed { path: format!("{files}.{name}"), wrap, sent_bytes: 0, limit_bytes };
        Self { sender, streams: [stream("out", OutputChunk::Stdout), stream("err", OutputChunk::Stderr)] }
    }

    /// Sends what is new, at growing intervals. A fault loses progress and nothing else.
    async fn follow<L: PosixLink>(&mut self, link: &L, vm: VmId, until: Instant) -> std::convert::Infallible {
        let mut pause = Duration::from_millis(100);
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PROGRESS_PAUSE);
            if self.sender.is_closed() {
                return std::future::pending().await;
            }
            for stream in &mut self.streams {
                let count = (stream.limit_bytes - stream.sent_bytes).min(PROGRESS_BYTES as u64) as usize;
                if count == 0 {
                    continue;
                }
                match link.read(vm, &stream.path, stream.sent_bytes, count, until).await {
                    Ok(bytes) if bytes.is_empty() => {}
                    Ok(bytes) => {
                        stream.sent_bytes += bytes.len() as u64;
                        let _full = self.sender.try_send((stream.wrap)(bytes));
                    }
                    Err(error) => tracing::debug!(%vm, %error, "no look at a running command's output"),
                }
            }
        }
    }

    /// Sends the rest.
    fn finish(self, outputs: [&Bytes; 2]) {
        for (stream, output) in self.streams.into_iter().zip(outputs) {
            let mut rest = output.slice((stream.sent_bytes as usize).min(output.len())..);
            while !rest.is_empty() {
                let chunk = rest.split_to(rest.len().min(PROGRESS_BYTES));
                let _full = self.sender.try_send((stream.wrap)(chunk));
            }
        }
    }
}
