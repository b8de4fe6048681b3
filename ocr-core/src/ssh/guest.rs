//! [`GuestExec`] over the connections.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::{sync::mpsc, time::Instant};

use super::{
    Addresses, HostKeys, SshConfig,
    login::{Accounts, Acting},
    pool::Pool,
    posix::{self, Exited, FILE, INLINE_BYTES, Input, Output, RUN, Reply, Script, unknown_user},
    run::Ended,
};
use crate::{
    Deletion, Error, ErrorKind, ExecOutput, ExecRequest, GuestCapabilities, GuestExec, GuestInfo, OperationId, OsFamily,
    OutputChunk, PutFile, Result, Retry, VmId,
    credentials::CredentialSource,
    guest::check_guest_path,
    id::shown,
};

/// The largest file that `put_file` takes.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// The most of each output.
const MAX_OUTPUT_BYTES: u64 = ExecRequest::OUTPUT_LIMIT_BYTES;

/// How much longer than its deadline a command is waited for: its end has to be told too, maybe over a new connection.
const MARGIN: Duration = Duration::from_secs(20);

/// How long a file operation may take, beside a second for each 64 KiB.
const FILE_LIMIT: Duration = Duration::from_secs(60);

/// How long a question to the guest may take.
const INFO_LIMIT: Duration = Duration::from_secs(15);

/// The longest deadline that is told apart from none.
const MAX_DEADLINE: Duration = Duration::from_secs(365 * 86_400);

/// How often the runner may end without an answer before that is an error.
const MAX_SILENT_ENDS: u32 = 3;

/// How often a content is sent that arrives damaged.
const MAX_TRIES: u32 = 3;

/// What a shell's greeting may add to an answer, in bytes.
const GREETING_BYTES: usize = 256 << 10;

/// The first and the longest pause between two looks at the output of a running command.
const PROGRESS_PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(1)];

/// The most that one look takes of each output, in bytes.
const PROGRESS_BYTES: u64 = 256 << 10;

/// Writes a part of a file: from where on, and how much.
const PART: &str = r#"echo ocr-ssh-part; [ ! -e "$1" ] || tail -c "+$2" "$1" | head -c "$3""#;

/// Comes before it.
const PART_MARK: &[u8] = b"ocr-ssh-part\n";

/// Acts inside Linux guests over SSH, by the same runner in the guest as the agent does.
///
/// A command that its caller no longer waits for goes on in the guest until its end or its deadline, and so does one
/// whose connection is cut; it is asked for again over the next one.
#[derive(Clone, Debug)]
pub struct SshGuest {
    accounts: Arc<Accounts>,
    users: bool,
}

/// One operation, over all attempts at it.
struct Job<'a> {
    vm: VmId,
    script: Script,
    user: Option<&'a str>,
    field: &'static str,
    limit_bytes: usize,
    until: Instant,
    /// When the first attempt was sent of those that may have reached the guest.
    asked: Option<Instant>,
}

impl SshGuest {
    /// Guests at these addresses.
    pub fn new(
        addresses: Arc<dyn Addresses>,
        credentials: Arc<dyn CredentialSource>,
        keys: HostKeys,
        config: &SshConfig,
    ) -> Self {
        let pool = Pool::new(Arc::clone(&addresses), keys, config);
        Self { accounts: Arc::new(Accounts::new(pool, addresses, credentials, config)), users: config.users }
    }

    /// How many connections to machines there are now.
    pub fn connections(&self) -> usize {
        self.accounts.pool.connections()
    }

    /// Runs the runner until it answers. Whatever is asked for may be asked for repeatedly.
    ///
    /// `arguments` gets how long ago the job was asked for first.
    async fn runner(
        &self,
        job: &mut Job<'_>,
        arguments: impl Fn(&Acting, Duration) -> Vec<String>,
        input: &Bytes,
    ) -> Result<(Acting, Reply)> {
        let (mut silent, mut pause) = (0, Duration::from_millis(50));
        loop {
            let since = job.asked.map(|asked| asked.elapsed()).unwrap_or_default();
            let argv = |acting: &Acting| {
                let mut argv = vec!["/bin/sh".to_owned(), "-c".to_owned(), job.script.text(), job.script.name.to_owned()];
                argv.extend(arguments(acting, since));
                argv
            };
            let sent = Instant::now();
            let ran = self.accounts.run(job.vm, (job.user, job.field), argv, input, job.limit_bytes, job.until).await;
            let lost = match ran {
                Ok((acting, ended)) => {
                    job.asked.get_or_insert(sent);
                    let exited = exited(ended);
                    match Reply::of(&exited) {
                        Some(reply) => return Ok((acting, reply)),
                        None => {
                            silent += 1;
                            let error = silent_end(&exited);
                            if silent == MAX_SILENT_ENDS {
                                return Err(error);
                            }
                            error
                        }
                    }
                }
                Err(error) => {
                    if error.retry() == Retry::Ambiguous {
                        job.asked.get_or_insert(sent);
                    }
                    // Nothing was begun: whether to come back is the caller's to say.
                    let outage = matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::TimedOut);
                    if job.asked.is_none() || !outage {
                        return Err(error);
                    }
                    error
                }
            };
            if Instant::now() + pause >= job.until {
                return Err(lost.with_retry(Retry::Ambiguous).with_note("whether it was done is not known"));
            }
            tracing::debug!(vm = %job.vm, error = %lost, "lost track of a program in the guest, asking again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    async fn info_inner(&self, vm: VmId) -> Result<GuestInfo> {
        // The connection may be an old one: the guest itself is asked.
        let argv = |_: &Acting| vec!["/bin/sh".to_owned(), "-c".to_owned(), "echo ready".to_owned()];
        let until = Instant::now() + INFO_LIMIT;
        let ran = self.accounts.run(vm, (None, "username"), argv, &Bytes::new(), GREETING_BYTES, until).await;
        // It asks and does nothing, so it may be repeated whatever became of it.
        let (acting, _) = ran.map_err(|error| match error.retry() {
            Retry::Ambiguous => super::address::not_ready(error.message()).with_source(error),
            _ => error,
        })?;
        Ok(GuestInfo {
            agent_version: acting.session.version.clone(),
            can_exec: true,
            can_files: true,
            os_family: OsFamily::Linux,
            os_name: acting.login.os_name.clone(),
        })
    }

    async fn exec_inner(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        request.check()?;
        if let Some(user) = &request.user {
            check_user(user, "username")?;
        }
        let input = Input::of(request)?;
        let (head_bytes, total_bytes) = (input.head_bytes, input.total_bytes);
        let bytes = Bytes::from(input.bytes);
        let deadline = request.deadline.min(MAX_DEADLINE);
        let until = Instant::now() + deadline + MARGIN;
        let limit = request.output_limit_bytes.min(MAX_OUTPUT_BYTES);
        let deadline_cs = deadline.as_millis().div_ceil(10).max(1);
        let mut job = Job {
            vm,
            script: RUN,
            user: request.user.as_deref(),
            field: "username",
            limit_bytes: INLINE_BYTES + GREETING_BYTES,
            until,
            asked: None,
        };
        let arguments = |acting: &Acting, since: Duration| {
            vec![
                acting.login.base.clone(),
                request.operation.to_string(),
                deadline_cs.to_string(),
                limit.to_string(),
                INLINE_BYTES.to_string(),
                head_bytes.to_string(),
                total_bytes.to_string(),
                String::new(),
                acting.su.clone().unwrap_or_default(),
                (since.as_millis() / 10).to_string(),
            ]
        };
        let mut progress = request.progress.as_ref().map(|sender| Progress { sender, sent_bytes: [0; 2], limit });
        let reply = loop {
            let run = self.runner(&mut job, arguments, &bytes);
            let (_, reply) = match &mut progress {
                None => Box::pin(run).await?,
                Some(progress) => {
                    let look = progress.keep_looking(self, vm, request);
                    tokio::select! {
                        biased;
                        ran = Box::pin(run) => ran?,
                        never = Box::pin(look) => match never {},
                    }
                }
            };
            if reply.state() != "again" {
                break reply;
            }
            // What was sent did not get there whole, and nothing was run.
            if Instant::now() + PROGRESS_PAUSES[1] >= until {
                return Err(Error::timed_out("the request did not reach the guest whole in time"));
            }
            tokio::time::sleep(PROGRESS_PAUSES[0]).await;
        };
        let ended = posix::ended(&reply, request)?;
        let until = until.max(Instant::now() + transfer_limit(2 * limit));
        let whole = async |output, name| self.whole(vm, request, output, name, limit, until).await;
        let (stdout, stdout_truncated) = whole(ended.stdout, "out").await?;
        let (stderr, stderr_truncated) = whole(ended.stderr, "err").await?;
        if let Some(progress) = progress {
            progress.finish([&stdout, &stderr]);
        }
        Ok(ExecOutput { exit_code: ended.exit_code, stdout, stderr, stdout_truncated, stderr_truncated })
    }

    /// An output up to the limit, and whether there was more.
    async fn whole(
        &self,
        vm: VmId,
        request: &ExecRequest,
        output: Output,
        name: &str,
        limit: u64,
        until: Instant,
    ) -> Result<(Bytes, bool)> {
        let limit = limit as usize;
        let mut bytes = output.begin;
        if output.more && bytes.len() <= limit {
            // A byte over the limit is not for the caller, but tells that it is there.
            let count = (limit + 1 - bytes.len()) as u64;
            let rest = self.part(vm, request, name, bytes.len() as u64, count, until).await?;
            bytes = [bytes, rest].concat().into();
        }
        let truncated = output.cut || bytes.len() > limit;
        bytes.truncate(limit);
        Ok((bytes, truncated))
    }

    /// Reads at most `count` bytes of a run's output from `offset` on.
    async fn part(
        &self,
        vm: VmId,
        request: &ExecRequest,
        name: &str,
        offset: u64,
        count: u64,
        until: Instant,
    ) -> Result<Bytes> {
        let mut pause = Duration::from_millis(50);
        loop {
            match self.look(vm, request, name, offset, count, until).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) if error.retry() != Retry::Never && Instant::now() + pause < until => {
                    tracing::debug!(%vm, %error, "lost the connection, reading again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn put_inner(&self, vm: VmId, file: &PutFile) -> Result<()> {
        check_guest_path(&file.path)?;
        if let Some(owner) = &file.owner {
            check_user(owner, "owner")?;
        }
        let mode = file.mode.unwrap_or(0o644);
        if mode > 0o7777 {
            return Err(Error::invalid("mode", format_args!("wants permission bits up to 7777, got {mode:o}")));
        }
        if file.content.len() as u64 > MAX_FILE_BYTES {
            return Err(Error::invalid("content", format_args!("must not be over {MAX_FILE_BYTES} bytes")));
        }
        let digest = Sha256::digest(&file.content);
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let id = OperationId::random().to_string();
        let mut job = Job::file(vm, file.owner.as_deref(), 0, transfer_limit(file.content.len() as u64));
        let arguments = |acting: &Acting, _| {
            vec![
                "put".to_owned(),
                acting.login.base.clone(),
                file.path.clone(),
                String::new(),
                digest.clone(),
                format!("{mode:o}"),
                acting.su.clone().unwrap_or_default(),
                u8::from(file.make_parents).to_string(),
                id.clone(),
            ]
        };
        let mut tries = 0;
        let reply = loop {
            let (_, reply) = self.runner(&mut job, arguments, &file.content).await?;
            tries += 1;
            if reply.state() != "again" || tries == MAX_TRIES || Instant::now() >= job.until {
                break reply;
            }
        };
        match reply.state() {
            "ok" => Ok(()),
            "folder" => Err(Error::invalid("path", format_args!("{} is a folder in the guest", shown(&file.path)))),
            "noparent" => Err(Error::not_found(format!("the guest has no folder for {}", shown(&file.path)))),
            "noowner" => Err(unknown_user("owner", file.owner.as_deref().unwrap_or_default())),
            "again" => Err(Error::unavailable("the content that reached the guest has another digest")),
            "fail" => Err(reply.failure()),
            _ => Err(reply.senseless()),
        }
    }

    async fn get_inner(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        check_guest_path(path)?;
        let limit_bytes = limit_bytes.min(MAX_FILE_BYTES);
        let mut job = Job::file(vm, None, limit_bytes as usize, transfer_limit(limit_bytes));
        let arguments = |acting: &Acting, _| {
            vec![
                "get".to_owned(),
                acting.login.base.clone(),
                path.to_owned(),
                limit_bytes.to_string(),
                limit_bytes.to_string(),
            ]
        };
        let (_, reply) = self.runner(&mut job, arguments, &Bytes::new()).await?;
        match reply.state() {
            "file" if reply.body.len() as u64 == reply.number(0)? => Ok(reply.body),
            "file" => Err(Error::unavailable("the file became shorter while it was read")),
            "over" => Err(Error::new(
                ErrorKind::Exhausted,
                format!("{} is larger than the limit of {limit_bytes} bytes", shown(path)),
            )),
            "missing" => Err(Error::not_found(format!("the guest has no file {}", shown(path)))),
            "folder" => Err(Error::invalid("path", format_args!("{} is a folder in the guest", shown(path)))),
            "special" => Err(Error::invalid("path", format_args!("{} is no regular file in the guest", shown(path)))),
            "fail" => Err(reply.failure()),
            _ => Err(reply.senseless()),
        }
    }

    async fn remove_inner(&self, vm: VmId, path: &str) -> Result<Deletion> {
        check_guest_path(path)?;
        let mut job = Job::file(vm, None, 0, transfer_limit(0));
        let arguments =
            |acting: &Acting, _| vec!["remove".to_owned(), acting.login.base.clone(), path.to_owned()];
        let (_, reply) = self.runner(&mut job, arguments, &Bytes::new()).await?;
        match reply.state() {
            "ok" => Ok(Deletion::Deleted),
            "missing" => Ok(Deletion::AlreadyGone),
            "folder" => Err(Error::invalid("path", format_args!("{} is a folder in the guest", shown(path)))),
            "fail" => Err(reply.failure()),
            _ => Err(reply.senseless()),
        }
    }
}

impl<'a> Job<'a> {
    fn file(vm: VmId, user: Option<&'a str>, body_bytes: usize, limit: Duration) -> Self {
        let until = Instant::now() + limit;
        let limit_bytes = body_bytes + GREETING_BYTES;
        Self { vm, script: FILE, user, field: "owner", limit_bytes, until, asked: None }
    }
}

#[async_trait]
impl GuestExec for SshGuest {
    fn capabilities(&self) -> GuestCapabilities {
        GuestCapabilities {
            max_file_bytes: MAX_FILE_BYTES,
            max_output_bytes: MAX_OUTPUT_BYTES,
            users: self.users,
            streaming: true,
        }
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        self.info_inner(vm).await.map_err(context("guest.guest_info", vm))
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

/// How long moving this much may take.
fn transfer_limit(bytes: u64) -> Duration {
    FILE_LIMIT + Duration::from_secs(bytes >> 16)
}

/// Where a run keeps its outputs, but for their ending.
fn files(acting: &Acting, request: &ExecRequest) -> String {
    format!("{}/ops/{}", acting.login.base, request.operation)
}

/// What the runner wrote, without the greeting of the account's shell.
fn exited(ended: Ended) -> Exited {
    let how = match &ended.exit {
        Ok(code) => format!("exit code {code}"),
        Err(signal) => format!("signal {signal}"),
    };
    let stdout = match line_start(&ended.stdout, b"ocr1 ") {
        Some(begin) => ended.stdout.slice(begin..),
        None => ended.stdout,
    };
    Exited { how, stdout, stderr: ended.stderr }
}

/// What follows the line that is the mark.
fn after_mark(stdout: &Bytes) -> Option<Bytes> {
    line_start(stdout, PART_MARK).map(|begin| stdout.slice(begin + PART_MARK.len()..))
}

/// Where the first line is that begins so.
fn line_start(text: &[u8], begin: &[u8]) -> Option<usize> {
    (0..text.len()).find(|at| (*at == 0 || text[at - 1] == b'\n') && text[*at..].starts_with(begin))
}

fn silent_end(exited: &Exited) -> Error {
    let text = String::from_utf8_lossy(&exited.stderr);
    Error::internal(format!("the runner in the guest ended without an answer ({}): {}", exited.how, shown(text.trim())))
}

/// Refuses names that `id` and `su` of some guests take for a number.
fn check_user(user: &str, field: &str) -> Result<()> {
    crate::guest::check_user_name(user)?;
    if user.starts_with('+') || user.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Error::invalid(field, "wants an account's name, not its number"));
    }
    Ok(())
}

/// Sends the output of a running command on, from the files it goes to.
struct Progress<'a> {
    sender: &'a mpsc::Sender<OutputChunk>,
    sent_bytes: [u64; 2],
    limit: u64,
}

const STREAMS: [(&str, fn(Bytes) -> OutputChunk); 2] = [("out", OutputChunk::Stdout), ("err", OutputChunk::Stderr)];

impl Progress<'_> {
    /// Sends what is new every now and then. A fault loses progress and nothing else.
    async fn keep_looking(&mut self, guest: &SshGuest, vm: VmId, request: &ExecRequest) -> std::convert::Infallible {
        let mut pause = PROGRESS_PAUSES[0];
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PROGRESS_PAUSES[1]);
            if self.sender.is_closed() {
                std::future::pending::<()>().await;
            }
            for (stream, (name, wrap)) in STREAMS.iter().enumerate() {
                let count = PROGRESS_BYTES.min(self.limit - self.sent_bytes[stream]);
                if count == 0 {
                    continue;
                }
                match guest.look(vm, request, name, self.sent_bytes[stream], count, Instant::now() + INFO_LIMIT).await {
                    Ok(bytes) if bytes.is_empty() => {}
                    Ok(bytes) => {
                        self.sent_bytes[stream] += bytes.len() as u64;
                        let _ = self.sender.try_send(wrap(bytes));
                    }
                    Err(error) => tracing::debug!(%vm, %error, "no look at a running command's output"),
                }
            }
        }
    }

    /// Sends the rest.
    fn finish(self, outputs: [&Bytes; 2]) {
        for ((sent, output), (_, wrap)) in self.sent_bytes.into_iter().zip(outputs).zip(STREAMS) {
            let mut rest = output.slice((sent as usize).min(output.len())..);
            while !rest.is_empty() {
                let chunk = rest.split_to(rest.len().min(PROGRESS_BYTES as usize));
                let _ = self.sender.try_send(wrap(chunk));
            }
        }
    }
}

impl SshGuest {
    /// A look at the output of a command that may not have begun.
    async fn look(&self, vm: VmId, request: &ExecRequest, name: &str, offset: u64, count: u64, until: Instant) -> Result<Bytes> {
        let argv = |acting: &Acting| {
            let path = format!("{}.{name}", files(acting, request));
            let words = ["/bin/sh", "-c", PART, "ocr-part", &path, &(offset + 1).to_string(), &count.to_string()];
            words.map(str::to_owned).to_vec()
        };
        let as_whom = (request.user.as_deref(), "username");
        let limit = count as usize + GREETING_BYTES;
        let (_, ended) = self.accounts.run(vm, as_whom, argv, &Bytes::new(), limit, until).await?;
        Ok(after_mark(&ended.stdout).unwrap_or_default())
    }
}
