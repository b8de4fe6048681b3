//! [`GuestExec`] over the connections: [`PosixGuest`] with a link that logs in.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::{Duration, Instant};

use super::{
    Addresses, HostKeys, SshConfig,
    address::not_ready,
    login::{Accounts, Acting},
    pool::Pool,
    run::Ended,
};
use crate::{
    Deletion, Error, ExecOutput, ExecRequest, GuestCapabilities, GuestExec, GuestInfo, OsFamily, PutFiles, RemoveFiles,
    Result, Retry, VmId,
    credentials::CredentialSource,
    guest::posix::{PosixConfig, PosixExit, PosixGuest, PosixLimits, PosixLink, PosixRun},
    id::shown,
};

/// The most that goes along with a script, in bytes. What is longer is streamed into a file, without another copy here.
const STDIN_BYTES: usize = 4 << 20;

/// The most that comes back with a script's end, stdout and stderr each, in bytes.
const REPLY_BYTES: usize = 4 << 20;

/// What a shell's greeting may add to an answer, in bytes.
const GREETING_BYTES: usize = 256 << 10;

/// How long a question to the guest may take.
const INFO_LIMIT: Duration = Duration::from_secs(15);

/// The longest pause between two tries of something that was lost on the way.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// With what every answer of the runner begins.
const RUNNER_MARK: &[u8] = b"ocr1 ";

/// With what every answer of the scripts here begins, after a shell's greeting.
const MARK: &[u8] = b"ocr-ssh\n";

/// Writes a file, and says whether there is a folder for it.
const WRITE: &str = r#"umask 077; echo ocr-ssh; [ -d "${1%/*}" ] || { echo nofolder; exit; }; cat >"$1" && echo ok"#;

/// Writes a part of a file to stdout: from which byte on, counted from 1, and how many. It is opened once.
const READ: &str = r#"exec 3<"$1" && echo ocr-ssh && tail -c "+$2" <&3 | head -c "$3""#;

/// Acts inside Linux guests over SSH, by the same runner in the guest as the agent does.
///
/// A command that its caller no longer waits for goes on in the guest until its end or its deadline, and so does one
/// whose connection is cut; its result is fetched over the next one.
///
/// Everything is done by the account that the machine is managed by; where that is root, it becomes the user of a
/// request. Otherwise a user logs in with credentials of its own, and what it does is kept, and fenced, in its own home.
#[derive(Clone, Debug)]
pub struct SshGuest {
    accounts: Arc<Accounts>,
    users: bool,
}

/// Who does it, and with what.
struct By {
    guest: PosixGuest<Link>,
    acting: Acting,
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

    async fn by(&self, vm: VmId, user: Option<&str>, field: &'static str) -> Result<By> {
        let acting = self.accounts.acting(vm, user, field).await?;
        let link = Link { accounts: Arc::clone(&self.accounts), user: user.map(str::to_owned), field };
        let config = PosixConfig { base: acting.login.base.clone(), ..PosixConfig::default() };
        Ok(By { guest: PosixGuest::new(link, config)?, acting })
    }
}

#[async_trait]
impl GuestExec for SshGuest {
    fn capabilities(&self) -> GuestCapabilities {
        GuestCapabilities {
            max_file_bytes: crate::guest::posix::MAX_FILE_BYTES,
            max_output_bytes: crate::guest::posix::MAX_OUTPUT_BYTES,
            users: self.users,
            streaming: true,
        }
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        let link = Link { accounts: Arc::clone(&self.accounts), user: None, field: "username" };
        link.guest_info(vm).await.map_err(context("guest.guest_info", vm))
    }

    async fn put_files(&self, vm: VmId, request: &PutFiles) -> Result<()> {
        let put = async {
            let owner = request.files.iter().find_map(|file| file.owner.as_deref());
            if let Some(owner) = owner {
                crate::guest::check_user_name(owner)?;
            }
            let By { guest, acting } = self.by(vm, owner, "owner").await?;
            if acting.login.is_root || owner.is_none() {
                return guest.put_files(vm, request).await;
            }
            // It is the owner itself that writes, and it can give nothing away.
            let mut request = request.clone();
            for file in &mut request.files {
                if file.owner.take().is_some_and(|other| Some(other.as_str()) != owner) {
                    return Err(Error::invalid(
                        "owner",
                        "files of several owners in one request want root in the guest",
                    ));
                }
            }
            guest.put_files(vm, &request).await
        };
        Box::pin(put).await.map_err(context("guest.put_files", vm))
    }

    async fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        let get = async { self.by(vm, None, "username").await?.guest.get_file(vm, path, limit_bytes).await };
        Box::pin(get).await.map_err(context("guest.get_file", vm))
    }

    async fn remove_files(&self, vm: VmId, request: &RemoveFiles) -> Result<Vec<Result<Deletion>>> {
        let remove = async { self.by(vm, None, "username").await?.guest.remove_files(vm, request).await };
        Box::pin(remove).await.map_err(context("guest.remove_files", vm))
    }

    async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        let exec = async {
            request.check()?;
            let By { guest, acting } = self.by(vm, request.user.as_deref(), "username").await?;
            let request = ExecRequest { user: acting.su.clone(), ..request.clone() };
            // Its connection is not kept busy meanwhile.
            drop(acting);
            guest.exec(vm, &request).await
        };
        Box::pin(exec).await.map_err(context("guest.exec", vm))
    }
}

fn context(operation: &'static str, vm: VmId) -> impl Fn(Error) -> Error {
    move |error| error.during(operation).on(format!("vm {vm}"))
}

/// One account's way into machines.
#[derive(Debug)]
struct Link {
    accounts: Arc<Accounts>,
    user: Option<String>,
    /// What names that user in the request.
    field: &'static str,
}

impl Link {
    async fn script(
        &self,
        vm: VmId,
        words: &[&str],
        stdin: &[Bytes],
        reply_bytes: usize,
        until: Instant,
    ) -> Result<(Acting, Ended)> {
        let mut argv = vec!["/bin/sh".to_owned(), "-c".to_owned()];
        argv.extend(words.iter().copied().map(str::to_owned));
        let as_whom = (self.user.as_deref(), self.field);
        self.accounts.run(vm, as_whom, &argv, stdin, reply_bytes + GREETING_BYTES, until).await
    }

    /// Runs a script that may be run again, over the next connection when one is lost.
    async fn insist(
        &self,
        vm: VmId,
        words: &[&str],
        stdin: &[Bytes],
        reply_bytes: usize,
        until: Instant,
    ) -> Result<Ended> {
        let mut pause = Duration::from_millis(50);
        loop {
            match self.script(vm, words, stdin, reply_bytes, until).await {
                Ok((_, ended)) => return Ok(ended),
                Err(error) if error.retry() != Retry::Never && Instant::now() + pause < until => {
                    tracing::debug!(%vm, %error, "lost the connection, trying again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(MAX_PAUSE);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

#[async_trait]
impl PosixLink for Link {
    fn limits(&self) -> PosixLimits {
        PosixLimits { stdin_bytes: STDIN_BYTES, reply_bytes: REPLY_BYTES, compress: false }
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        // The connection may be an old one, so the guest itself is asked.
        let asked = self.script(vm, &["echo ready"], &[], 0, Instant::now() + INFO_LIMIT).await;
        let (acting, _) = asked.map_err(|error| match error.retry() {
            // It asks and does nothing, so it may be repeated whatever became of it.
            Retry::Ambiguous => not_ready(error.message()).with_source(error),
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

    async fn run(&self, vm: VmId, run: &PosixRun<'_>) -> Result<PosixExit> {
        let mut words = vec![run.script, run.name];
        words.extend(run.arguments.iter().map(String::as_str));
        let stdin = [Bytes::copy_from_slice(run.stdin)];
        let (_, ended) = self.script(vm, &words, &stdin, REPLY_BYTES, run.until).await?;
        let how = how(&ended);
        let begin = line_start(&ended.stdout, RUNNER_MARK).unwrap_or_default();
        Ok(PosixExit { how, stdout: ended.stdout.slice(begin..), stderr: ended.stderr })
    }

    async fn write(&self, vm: VmId, path: &str, parts: &[Bytes], until: Instant) -> Result<()> {
        let ended = self.insist(vm, &[WRITE, "ocr-write", path], parts, 0, until).await?;
        match answer(&ended).as_deref() {
            Some(b"ok\n") => Ok(()),
            Some(b"nofolder\n") => Err(Error::not_found(format!("the guest has no folder for {}", shown(path)))),
            _ => Err(silent_end(&ended)),
        }
    }

    async fn read(&self, vm: VmId, path: &str, offset: u64, count: usize, until: Instant) -> Result<Bytes> {
        let words = [READ, "ocr-read", path, &(offset + 1).to_string(), &count.to_string()];
        let ended = self.insist(vm, &words, &[], count, until).await?;
        answer(&ended).ok_or_else(|| silent_end(&ended))
    }
}

/// What a script of ours wrote, without the greeting of the account's shell.
fn answer(ended: &Ended) -> Option<Bytes> {
    line_start(&ended.stdout, MARK).map(|begin| ended.stdout.slice(begin + MARK.len()..))
}

/// Where the first line is that begins so.
fn line_start(text: &[u8], begin: &[u8]) -> Option<usize> {
    (0..text.len()).find(|at| (*at == 0 || text[at - 1] == b'\n') && text[*at..].starts_with(begin))
}

fn how(ended: &Ended) -> String {
    match &ended.exit {
        Ok(code) => format!("exit code {code}"),
        Err(signal) => format!("signal {signal}"),
    }
}

fn silent_end(ended: &Ended) -> Error {
    let text = String::from_utf8_lossy(&ended.stderr);
    Error::internal(format!("a program in the guest ended without an answer ({}): {}", how(ended), shown(text.trim())))
}
