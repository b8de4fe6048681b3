//! [`GuestExec`]: act inside a running machine, without a network.

pub mod posix;

use std::{collections::BTreeMap, fmt, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

use crate::{Deletion, Error, ErrorKind, FencingToken, OperationId, OsFamily, Result, VmId, error::reason};

/// Copies files into a guest and runs commands in it.
///
/// One operation at a time per machine is the caller's duty (the [`queue`](crate::queue) keeps it); a backend only
/// has to stay correct when it is broken. Each MUST is checked by the conformance case named beside it.
///
/// # Errors of every method
/// Four states of a guest are four different errors, told apart by [`Error::reason`]:
///
/// | state | kind | reason |
/// |---|---|---|
/// | the machine has no agent channel | `Unsupported` | [`AGENT_ABSENT`](crate::error::reason::AGENT_ABSENT) |
/// | the agent does not answer now | `Unavailable` | [`AGENT_NOT_READY`](crate::error::reason::AGENT_NOT_READY) |
/// | the agent forbids the command | `Unsupported` | [`AGENT_COMMAND_DISABLED`](crate::error::reason::AGENT_COMMAND_DISABLED) |
/// | the machine is gone | `NotFound` | [`GUEST_GONE`](crate::error::reason::GUEST_GONE) |
///
/// and a machine that is switched off gives `Conflict` with
/// [`GUEST_NOT_RUNNING`](crate::error::reason::GUEST_NOT_RUNNING).
///
/// - Every method MUST tell that the machine is gone, and that a repeat is no use [case: guest_gone_everywhere].
/// - While a running machine boots, `guest_info` MUST give `AGENT_NOT_READY`, safe to repeat, and nothing else until it
///   succeeds [case: guest_booting].
/// - While a guest reboots, commands MUST give `AGENT_NOT_READY` and nothing else, and then run in the guest that has
///   booted anew [case: guest_rebooted].
/// - A machine without an agent channel MUST give `AGENT_ABSENT` as soon as it runs [case: guest_agent_absent].
/// - A path that is not absolute, has a `.` or `..` part, ends in `/` or has a NUL byte MUST fail with `Invalid`
///   [case: guest_bad_path].
///
/// # Fencing
/// `put_files`, `remove_files` and `exec` may come under a [`FencingToken`]: the right to act in this guest, which rises
/// each time it goes to somebody else. It is the guest's side that keeps the newest token it has seen, for as long as
/// the guest's disk lives, since whoever lost the right may be the last to learn of it. A request without a token is
/// neither checked nor waited for.
///
/// - A request under an older token than the newest seen MUST be refused with `Conflict`, reason
///   [`FENCED`](crate::error::reason::FENCED), and change nothing, also when it repeats an operation that ran
///   [case: guest_fence_refuses] [case: guest_fence_files]. It stays refused after the guest rebooted
///   [case: guest_fence_reboot].
/// - The newest token MUST count as seen from the moment on at which a request under it arrives, and without
///   one nothing MUST be refused [case: guest_fence_none].
/// - What began under an older token and still works MUST have ended before a request under a newer one has any effect,
///   so that no two overlap [case: guest_fence_waits]. That wait is bounded, for `exec` by the request's own deadline,
///   which begins anew when the command does; past it the request MUST fail with `TimedOut`, safe to repeat, and have
///   done nothing [case: guest_fence_wait_ends].
/// - A repeat of an operation under a newer token MUST be answered with the result of the run under the older one
///   [case: guest_fence_takes_over].
#[async_trait]
pub trait GuestExec: fmt::Debug + Send + Sync + 'static {
    /// What this backend can do. It never changes while the backend lives.
    fn capabilities(&self) -> GuestCapabilities;

    /// Asks the agent who it is. The cheapest proof that the guest can be acted in.
    ///
    /// # Behavior
    /// - A machine that does not exist MUST give `NotFound` with reason `GUEST_GONE` [case: guest_info_missing].
    /// - A machine that is switched off MUST give `Conflict` with reason `GUEST_NOT_RUNNING` [case: guest_info_stopped].
    /// - An agent that answers MUST be reported with its commands [case: guest_info_ready].
    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo>;

    /// Writes whole files: all to temporary names beside their targets, verified by digest, then each renamed.
    ///
    /// Nothing is renamed before all are there. When the guest fails between two renames, those before it stay.
    ///
    /// # Behavior
    /// - All files MUST be there in the end, wherever they go and whatever mode they have [case: guest_put_many].
    /// - An error that is about one file MUST name it, and none of the files MUST have been changed then
    ///   [case: guest_put_names_the_file]. A path that is named twice MUST fail with `Invalid` [case: guest_put_twice].
    /// - The content MUST arrive byte for byte, of any size up to [`GuestCapabilities::max_file_bytes`], also empty
    ///   and not text [case: guest_put_roundtrip].
    /// - A repeat MUST replace the file; a reader sees the old or the new whole, never a part [case: guest_put_replace].
    /// - Mode and owner MUST be as asked; without, the mode is 0644 and the owner the agent's user [case: guest_put_mode].
    /// - Missing parent folders MUST be made when `make_parents` is set [case: guest_put_parents], and MUST give
    ///   `NotFound` otherwise [case: guest_put_no_parents].
    /// - A target that is a folder MUST fail with `Invalid` or `Conflict` and change nothing [case: guest_put_onto_folder].
    /// - A call that was interrupted may leave temporary files; the next `put_files` or `remove_files` removes them.
    async fn put_files(&self, vm: VmId, request: &PutFiles) -> Result<()>;

    /// Reads a whole file of at most `limit_bytes`.
    ///
    /// # Behavior
    /// - A file that does not exist MUST give `NotFound` (without reason `GUEST_GONE`) [case: guest_get_missing].
    /// - A larger file MUST fail with `Exhausted`, naming the limit [case: guest_get_limit].
    async fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes>;

    /// Removes files, and what interrupted `put_files` left, whatever its paths; the latter also when no path is given.
    /// Folders are never removed. The answer has an outcome for each path, in their order.
    ///
    /// # Behavior
    /// - The files MUST be gone; one that is not there MUST be `Ok(AlreadyGone)` [case: guest_remove].
    /// - A folder MUST be refused with `Invalid` or `Conflict` and stay [case: guest_remove_folder]; the other paths of the
    ///   request MUST be removed all the same [case: guest_remove_many].
    /// - A bad path fails the whole call, and nothing is removed.
    async fn remove_files(&self, vm: VmId, request: &RemoveFiles) -> Result<Vec<Result<Deletion>>>;

    /// Runs a command to its end.
    ///
    /// An exit code other than 0 is a result, not an error.
    ///
    /// # Behavior
    /// - Exit code, stdout and stderr MUST come back whole and apart, byte for byte [case: guest_exec_output], up to the
    ///   request's `output_limit_bytes` each; what is over MUST be cut and flagged [case: guest_exec_output_limit].
    /// - Output of several MiB MUST come back whole [case: guest_exec_large_output].
    /// - Environment and stdin MUST reach the command as given [case: guest_exec_environment] [case: guest_exec_stdin].
    /// - A shell line MUST be run by the guest's shell, an argv without one [case: guest_exec_shell] [case: guest_exec_argv].
    /// - With `user`, the command MUST run as that user [case: guest_exec_user]; an unknown one MUST fail with `Invalid`
    ///   and run nothing [case: guest_exec_unknown_user]; without the capability `users` any MUST fail with `Unsupported`
    ///   [case: guest_exec_users_unsupported].
    /// - A repeat with the same `operation` MUST NOT run the command again and MUST return the first result
    ///   [case: guest_exec_repeat]; two at once MUST run it once [case: guest_exec_race].
    /// - A command past its deadline MUST be ended in the guest, children included, and give `TimedOut`
    ///   [case: guest_exec_deadline].
    /// - A program that is not there MUST give exit code 127 [case: guest_exec_no_program].
    /// - With `progress`, output MUST be sent there too while the command runs, where [`GuestCapabilities::streaming`]
    ///   [case: guest_exec_progress]. A receiver that is dropped or full loses progress and nothing else.
    async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput>;
}

/// Comfort over any [`GuestExec`]; no backend implements it.
#[async_trait]
pub trait GuestExecExt: GuestExec {
    /// Waits until the agent answers. Ends at once when it never can (no channel, machine gone or off).
    ///
    /// # Errors
    /// `TimedOut` with what was seen last; the final errors of [`GuestExec::guest_info`].
    async fn wait_ready(&self, vm: VmId, deadline: Duration, max_pause: Duration) -> Result<GuestInfo> {
        let end = tokio::time::Instant::now() + deadline;
        let mut pause = Duration::from_millis(50).min(max_pause);
        loop {
            let last = match self.guest_info(vm).await {
                Ok(info) => return Ok(info),
                Err(error) if error.retry() == crate::Retry::Never => return Err(error),
                Err(error) => error,
            };
            if tokio::time::Instant::now() + pause > end {
                return Err(Error::timed_out(format!(
                    "the guest agent did not answer in {}; seen last: {}",
                    crate::error::seconds(deadline),
                    last.message()
                ))
                .during("guest.wait_ready")
                .on(format!("vm {vm}")));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 3 / 2).min(max_pause);
        }
    }

    /// Writes one file, without a fence.
    ///
    /// # Errors
    /// Those of [`GuestExec::put_files`].
    async fn put_file(&self, vm: VmId, file: &PutFile) -> Result<()> {
        self.put_files(vm, &PutFiles { files: vec![file.clone()], fence: None }).await
    }

    /// Removes one file, without a fence.
    ///
    /// # Errors
    /// Those of [`GuestExec::remove_files`].
    async fn remove_file(&self, vm: VmId, path: &str) -> Result<Deletion> {
        let request = RemoveFiles { paths: vec![path.to_owned()], fence: None };
        let outcomes = self.remove_files(vm, &request).await?;
        outcomes.into_iter().next().unwrap_or_else(|| Err(Error::internal("no outcome for the file to remove")))
    }

    /// Runs one shell line as the agent's own user, with a fresh operation id and usual limits.
    ///
    /// # Errors
    /// Those of [`GuestExec::exec`].
    async fn shell(&self, vm: VmId, line: &str) -> Result<ExecOutput> {
        self.exec(vm, &ExecRequest::shell(line)).await
    }
}

impl<T: GuestExec + ?Sized> GuestExecExt for T {}

/// What a [`GuestExec`] can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestCapabilities {
    /// The largest file that `put_files` takes, in bytes.
    pub max_file_bytes: u64,
    /// The most output, each of stdout and stderr, that `exec` can return, in bytes.
    pub max_output_bytes: u64,
    /// Whether commands can be run as another user.
    pub users: bool,
    /// Whether output is sent to [`ExecRequest::progress`] while the command runs.
    pub streaming: bool,
}

/// What a guest agent says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestInfo {
    /// The agent's version, as it gives it.
    pub agent_version: String,
    /// Whether commands can be run.
    pub can_exec: bool,
    /// Whether files can be written and read.
    pub can_files: bool,
    /// The guest's family.
    pub os_family: OsFamily,
    /// The guest's name for its system, such as `Debian GNU/Linux 12 (bookworm)`; may be empty.
    pub os_name: String,
}

/// A file to write into a guest.
#[derive(Clone, PartialEq, Eq)]
pub struct PutFile {
    /// Absolute path in the guest.
    pub path: String,
    /// The whole content.
    pub content: Bytes,
    /// Permission bits such as `0o755`; ignored on Windows.
    pub mode: Option<u32>,
    /// The user that shall own it.
    pub owner: Option<String>,
    /// Whether missing parent folders are made (mode 0755).
    pub make_parents: bool,
}

impl fmt::Debug for PutFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PutFile")
            .field("path", &self.path)
            .field("bytes", &self.content.len())
            .field("mode", &self.mode.map(|mode| format!("{mode:o}")))
            .field("owner", &self.owner)
            .field("make_parents", &self.make_parents)
            .finish()
    }
}

impl PutFile {
    /// A file with the usual mode and owner, without making folders.
    pub fn new(path: impl Into<String>, content: impl Into<Bytes>) -> Self {
        Self { path: path.into(), content: content.into(), mode: None, owner: None, make_parents: false }
    }
}

/// Files to write into a guest, together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PutFiles {
    /// The files; no path twice. None at all is fine and does nothing but to check the fence.
    pub files: Vec<PutFile>,
    /// Under which right; see [`GuestExec`].
    pub fence: Option<FencingToken>,
}

impl PutFiles {
    /// Files without a fence.
    pub fn new(files: Vec<PutFile>) -> Self {
        Self { files, fence: None }
    }

    /// The bytes of all contents.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.content.len() as u64).sum()
    }

    /// Checks what no guest can take. Backends call this first; paths are theirs to check.
    ///
    /// # Errors
    /// `Invalid` naming the file.
    pub fn check(&self, max_file_bytes: u64) -> Result<()> {
        let mut paths = std::collections::HashSet::new();
        for file in &self.files {
            let path = crate::id::shown(&file.path);
            if !paths.insert(file.path.as_str()) {
                return Err(Error::invalid("path", format_args!("{path} is there twice")));
            }
            if let Some(mode) = file.mode.filter(|mode| *mode > 0o7777) {
                return Err(Error::invalid(
                    "mode",
                    format_args!("wants permission bits up to 7777, got {mode:o} for {path}"),
                ));
            }
            let bytes = file.content.len() as u64;
            if bytes > max_file_bytes {
                return Err(Error::invalid(
                    "content",
                    format_args!("at most {max_file_bytes} bytes, got {bytes} for {path}"),
                ));
            }
        }
        Ok(())
    }
}

/// Files to remove from a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoveFiles {
    /// Absolute paths in the guest.
    pub paths: Vec<String>,
    /// Under which right; see [`GuestExec`].
    pub fence: Option<FencingToken>,
}

impl RemoveFiles {
    /// Files without a fence.
    pub fn new<I: IntoIterator<Item = S>, S: Into<String>>(paths: I) -> Self {
        Self { paths: paths.into_iter().map(Into::into).collect(), fence: None }
    }
}

/// The error of a request under an older token than the guest has seen.
pub fn fenced(token: FencingToken) -> Error {
    Error::new(
        ErrorKind::Conflict,
        format!("somebody with a newer right than {} acts in this guest now; nothing was done", token.0),
    )
    .with_reason(reason::FENCED)
}

/// The error of a request under a newer token than what still works in the guest, which did not end in time.
pub fn fence_wait_ended(waited: Duration) -> Error {
    Error::timed_out(format!(
        "what began in the guest under an older right did not end in {}; nothing was done",
        crate::error::seconds(waited)
    ))
    .with_retry(crate::Retry::Safe)
}

/// A command to run in a guest. Its `Debug` shows neither environment values nor stdin.
#[derive(Clone)]
pub struct ExecRequest {
    /// Names this run: a repeat is answered, not run again.
    pub operation: OperationId,
    /// What to run.
    pub command: Command,
    /// As whom; `None` is the agent's own user (root on Linux).
    pub user: Option<String>,
    /// Laid over the guest's own environment.
    pub environment: BTreeMap<String, String>,
    /// What the command reads from stdin.
    pub stdin: Bytes,
    /// How long the command may run.
    pub deadline: Duration,
    /// How much is kept of stdout and of stderr, in bytes each.
    pub output_limit_bytes: u64,
    /// Where output goes while the command runs; the bound is the channel's.
    pub progress: Option<mpsc::Sender<OutputChunk>>,
    /// Under which right; see [`GuestExec`].
    pub fence: Option<FencingToken>,
}

impl ExecRequest {
    /// The usual deadline: five minutes.
    pub const DEADLINE: Duration = Duration::from_secs(300);
    /// The usual limit of each output: 16 MiB.
    pub const OUTPUT_LIMIT_BYTES: u64 = 16 << 20;

    /// A request with a fresh operation id, no user, no environment, no stdin, and the usual limits.
    pub fn new(command: Command) -> Self {
        Self {
            operation: OperationId::random(),
            command,
            user: None,
            environment: BTreeMap::new(),
            stdin: Bytes::new(),
            deadline: Self::DEADLINE,
            output_limit_bytes: Self::OUTPUT_LIMIT_BYTES,
            progress: None,
            fence: None,
        }
    }

    /// [`ExecRequest::new`] of a shell line.
    pub fn shell(line: impl Into<String>) -> Self {
        Self::new(Command::Shell(line.into()))
    }

    /// [`ExecRequest::new`] of a program and its arguments.
    pub fn argv<I: IntoIterator<Item = S>, S: Into<String>>(argv: I) -> Self {
        Self::new(Command::Argv(argv.into_iter().map(Into::into).collect()))
    }

    /// Checks what no guest can take. Backends call this first.
    ///
    /// # Errors
    /// `Invalid` naming the field.
    pub fn check(&self) -> Result<()> {
        let texts: &[&str] = match &self.command {
            Command::Argv(argv) if argv.first().is_none_or(String::is_empty) => {
                return Err(Error::invalid("command", "wants a program to run"));
            }
            Command::Argv(argv) => &argv.iter().map(String::as_str).collect::<Vec<_>>(),
            Command::Shell(line) if line.trim().is_empty() => {
                return Err(Error::invalid("command", "must not be empty"));
            }
            Command::Shell(line) => &[line],
        };
        if texts.iter().any(|text| text.contains('\0')) {
            return Err(Error::invalid("command", "must not contain a NUL byte"));
        }
        for (name, value) in &self.environment {
            check_variable_name(name)?;
            if value.contains('\0') {
                return Err(Error::invalid(
                    "environment",
                    format_args!("the value of {name} must not contain a NUL byte"),
                ));
            }
        }
        if let Some(user) = &self.user {
            check_user_name(user)?;
        }
        if self.deadline.is_zero() {
            return Err(Error::invalid("deadline", "must be longer than nothing"));
        }
        Ok(())
    }
}

impl fmt::Debug for ExecRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecRequest")
            .field("operation", &self.operation)
            .field("command", &self.command)
            .field("user", &self.user)
            .field("environment", &self.environment.keys().collect::<Vec<_>>())
            .field("stdin_bytes", &self.stdin.len())
            .field("deadline", &self.deadline)
            .field("output_limit_bytes", &self.output_limit_bytes)
            .field("fence", &self.fence)
            .finish()
    }
}

/// Checks the name of an environment variable: a letter or `_`, then letters, digits and `_`.
///
/// # Errors
/// `Invalid` naming the variable.
pub fn check_variable_name(name: &str) -> Result<()> {
    let mut chars = name.chars();
    let begins = chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
    if begins && name.len() <= 256 && chars.all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Ok(());
    }
    Err(Error::invalid(
        "environment",
        format_args!("a variable's name wants letters, digits and _, at most 256, got {}", crate::id::shown(name)),
    ))
}

/// Checks the name of a guest's user: 1 to 104 bytes, no control characters, `:` or `/`, no leading `-`.
///
/// # Errors
/// `Invalid`.
pub fn check_user_name(user: &str) -> Result<()> {
    let fine = (1..=104).contains(&user.len())
        && !user.starts_with('-')
        && !user.chars().any(|c| c.is_control() || matches!(c, ':' | '/' | '"' | '\''));
    if fine {
        return Ok(());
    }
    Err(Error::invalid("username", format_args!("wants the name of a guest's account, got {}", crate::id::shown(user))))
}

/// Checks a path in a Linux guest: absolute, at most 4096 bytes, no NUL, no `.` or `..` part.
///
/// # Errors
/// `Invalid` naming the path.
pub fn check_guest_path(path: &str) -> Result<()> {
    let fine = path.starts_with('/')
        && path.len() <= 4096
        && !path.contains('\0')
        && path.split('/').all(|part| part != ".." && part != "." && part.len() <= 255)
        && !path.ends_with('/');
    if fine {
        return Ok(());
    }
    Err(Error::invalid(
        "path",
        format_args!(
            "wants an absolute path without '.' or '..' parts, at most 4096 bytes, got {}",
            crate::id::shown(path)
        ),
    ))
}

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// A program and its arguments; no shell reads them.
    Argv(Vec<String>),
    /// A line for the guest's shell (`/bin/sh -c` on Linux).
    Shell(String),
}

/// A piece of a running command's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutputChunk {
    /// From stdout.
    Stdout(Bytes),
    /// From stderr.
    Stderr(Bytes),
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOutput {
    /// The exit code; 128 + n for a command ended by signal n, as shells count.
    pub exit_code: i32,
    /// What it wrote to stdout, up to the limit.
    pub stdout: Bytes,
    /// What it wrote to stderr, up to the limit.
    pub stderr: Bytes,
    /// Whether stdout was longer than the limit.
    pub stdout_truncated: bool,
    /// Whether stderr was longer than the limit.
    pub stderr_truncated: bool,
}

impl ExecOutput {
    /// Whether the exit code is 0.
    pub fn success(&self) -> bool {
        self.exit_code == 0
    }
}
