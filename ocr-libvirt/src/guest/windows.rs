//! Windows guests through the agent, without anything installed in them.
//!
//! No machine with Windows was at hand when this was written: it follows the documented behaviour of the agent and of
//! `cmd.exe`, and its tests replay exchanges written from that. Try it on yours before you rely on it.
//!
//! Each command has a folder, `C:\ProgramData\ocr\ops\OPERATION`. Making it is the lock, since of all who make a folder
//! one succeeds; then the command runs with its outputs in files there, and its exit code comes last, by renaming:
//!
//! ```text
//!  cmd.exe /d /v:on /c md FOLDER 2>nul || exit 183 &
//!      cmd.exe /d /s /c !OCR_LINE! >FOLDER\out 2>FOLDER\err & echo !ERRORLEVEL! >FOLDER\part & move FOLDER\part FOLDER\exit
//! ```
//!
//! Whatever is not fixed comes by a variable that is read late (`!NAME!`): after `cmd.exe` has looked for signs, so that
//! none in its value counts. No argument has a blank or a quote, so that it does not matter how the agent joins them.
//!
//! # What is weaker than in guests with a POSIX shell
//! - Commands run as the agent's user alone (SYSTEM); `user` and `owner` are `Unsupported`. Modes are ignored.
//! - The deadline is kept by us: when our process ends, a command goes on.
//! - A fence refuses older tokens; it does not wait for what runs under an older one.
//! - Input is at most 96 KiB. Results stay until somebody removes the folder.

mod text;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use ocr_core::{
    Command, Deletion, Error, ErrorKind, ExecOutput, ExecRequest, FencingToken, OperationId, OutputChunk, PutFile,
    PutFiles, RemoveFiles, Result, Retry, VmId,
    error::{reason, seconds},
    guest::{
        fenced,
        posix::{MAX_FILE_BYTES, MAX_OUTPUT_BYTES, PosixConfig, PosixExit},
    },
    id::shown,
};
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use self::text::{check_line, check_path, command_line, escape_for_cmd, split};
use super::{
    AgentLink,
    agent::{Agent, is_outage, is_refusal},
    carrier::{PIECE_BYTES, follow, write},
};

/// What belongs to us in a guest.
const BASE: &str = r"C:\ProgramData\ocr";

/// The exit code for a folder that is there already, as Windows numbers that error.
const EXISTS: i64 = 183;
/// Ours for a path that is a folder, a file that is missing, one that stays.
const IS_FOLDER: i64 = 21;
const IS_MISSING: i64 = 22;
const STAYS: i64 = 23;
const NO_FOLDER: i64 = 24;

/// The most that is read in one message.
const READ_BYTES: usize = 512 << 10;

/// How long a small program of the guest may take.
const STEP: Duration = Duration::from_secs(60);

/// The pause between two looks for a result that somebody else's command will have.
const LOOK: Duration = Duration::from_millis(500);

/// Guests with Windows.
#[derive(Debug)]
pub(super) struct Windows<L> {
    agent: Arc<Agent<L>>,
    config: PosixConfig,
}

/// Variables of a program, by their names in capitals: Windows does not tell those apart.
type Variables = BTreeMap<String, String>;

fn with(variables: &Variables, more: &[(&str, String)]) -> Vec<String> {
    let mut all = variables.clone();
    all.extend(more.iter().map(|(name, value)| (name.to_ascii_uppercase(), value.clone())));
    all.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
}

fn quoted(path: &str) -> String {
    format!("\"{path}\"")
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

impl<L: AgentLink> Windows<L> {
    pub(super) fn new(agent: Arc<Agent<L>>, config: PosixConfig) -> Self {
        Self { agent, config }
    }

    fn until(&self, bytes: u64) -> Instant {
        Instant::now() + self.config.file_limit + Duration::from_secs(bytes >> 16)
    }

    /// Runs a small program, `cmd.exe` if none is named, and returns its exit code with its end.
    async fn step(&self, vm: VmId, program: &str, words: &[String], variables: &[String]) -> Result<(i64, PosixExit)> {
        let pid = self.agent.start(vm, program, words, variables, &[]).await?;
        let kind = words.len() as u64;
        let exit = follow(&self.agent, vm, pid, kind, Instant::now() + STEP).await?;
        let code = exit.how.strip_prefix("exit code ").and_then(|code| code.parse().ok());
        code.map(|code| (code, exit)).ok_or_else(|| Error::internal("a program of the guest ended without exit code"))
    }

    /// The guest's own variables. The agent takes all or nothing, and few programs live without `SystemRoot`.
    async fn variables(&self, vm: VmId) -> Result<Variables> {
        if let Some(known) = self.agent.variables(vm) {
            return Ok((*known).clone());
        }
        // As UTF-16, which no code page garbles.
        let (code, exit) = self.step(vm, "cmd.exe", &words("/d /u /c set"), &[]).await?;
        let units: Vec<u16> = exit.stdout.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
        let text = String::from_utf16_lossy(&units);
        let variables: Variables = text
            .lines()
            .filter_map(|line| line.split_once('=').filter(|(name, _)| !name.is_empty()))
            .map(|(name, value)| (name.to_ascii_uppercase(), value.to_owned()))
            .collect();
        if code != 0 || !variables.contains_key("SYSTEMROOT") {
            return Err(Error::internal("the guest does not tell its environment"));
        }
        self.agent.keep_variables(vm, Arc::new(variables.clone()));
        Ok(variables)
    }

    /// Refuses an older token than the newest that was seen, and makes a newer one seen: folders named by them.
    async fn check_fence(&self, vm: VmId, fence: Option<FencingToken>) -> Result<()> {
        let Some(token) = fence else { return Ok(()) };
        let name = format!("{:020}", token.0);
        let (_, exit) = self.step(vm, "cmd.exe", &words(&format!(r"/d /c dir /b {BASE}\fence")), &[]).await?;
        let text = String::from_utf8_lossy(&exit.stdout);
        let seen = text.lines().map(str::trim).filter(|seen| seen.len() == 20).max().unwrap_or_default();
        if seen > name.as_str() {
            return Err(fenced(token));
        }
        if seen != name {
            let (code, _) = self.step(vm, "cmd.exe", &words(&format!(r"/d /c md {BASE}\fence\{name}")), &[]).await?;
            if code != 0 {
                return Err(Error::internal("the guest could not note a fencing token"));
            }
        }
        Ok(())
    }

    /// Reads at most `limit + 1` bytes.
    async fn read(&self, vm: VmId, path: &str, limit: u64) -> Result<Bytes> {
        let handle = self.agent.open(vm, path, "rb").await?;
        let result = async {
            let (mut content, most) = (BytesMut::new(), limit as usize + 1);
            while content.len() < most {
                let (bytes, eof) = self.agent.read(vm, handle, READ_BYTES.min(most - content.len())).await?;
                content.extend_from_slice(&bytes);
                if eof {
                    break;
                }
            }
            Ok(content.freeze())
        };
        let result = result.await;
        let _closed = self.agent.close(vm, handle).await;
        result
    }

    pub(super) async fn put_files(&self, vm: VmId, request: &PutFiles) -> Result<()> {
        request.check(MAX_FILE_BYTES)?;
        let mut paths: Vec<String> = Vec::new();
        for file in &request.files {
            if file.owner.is_some() {
                return Err(Error::unsupported("owner: files in Windows guests belong to the agent's own user"));
            }
            let path = check_path(&file.path)?;
            if paths.iter().any(|other| other.eq_ignore_ascii_case(&path)) {
                return Err(Error::invalid("path", format_args!("{} is there twice", shown(&path))));
            }
            paths.push(path);
        }
        self.check_fence(vm, request.fence).await?;
        if paths.is_empty() {
            return Ok(());
        }
        let until = self.until(request.bytes());
        let variables = self.variables(vm).await?;
        let id = OperationId::random();
        let temporaries: Vec<_> = (0..paths.len()).map(|i| format!(r"{}\.ocr-{id}-{i}", split(&paths[i]).0)).collect();
        let mut result = Ok(());
        for ((file, path), temporary) in request.files.iter().zip(&paths).zip(&temporaries) {
            result = self.stage(vm, &variables, file, path, temporary, until).await;
            if result.is_err() {
                break;
            }
        }
        if result.is_ok() {
            for (path, temporary) in paths.iter().zip(&temporaries) {
                let line = words("/d /v:on /c move /y !OCR_FROM! !OCR_TO! >nul");
                let variables = with(&variables, &[("OCR_FROM", quoted(temporary)), ("OCR_TO", quoted(path))]);
                result = match self.step(vm, "cmd.exe", &line, &variables).await {
                    Ok((0, _)) => Ok(()),
                    Ok(_) => Err(Error::internal(format!("the guest could not give {} its name", shown(path)))),
                    Err(error) => Err(error),
                };
                if result.is_err() {
                    break;
                }
            }
        }
        if result.is_err() {
            for temporary in &temporaries {
                let variables = with(&variables, &[("OCR_PATH", quoted(temporary))]);
                let _gone = self.step(vm, "cmd.exe", &words("/d /v:on /c del /f /q !OCR_PATH!"), &variables).await;
            }
        }
        result
    }

    /// Brings one file beside its place, whole.
    async fn stage(
        &self,
        vm: VmId,
        variables: &Variables,
        file: &PutFile,
        path: &str,
        temporary: &str,
        until: Instant,
    ) -> Result<()> {
        let folder = split(path).0;
        let mut line = words(&format!("/d /v:on /c ( if exist !OCR_INSIDE! exit {IS_FOLDER} )"));
        if file.make_parents {
            line.extend(words(r"& ( if not exist !OCR_FOLDER!\* md !OCR_FOLDER! )"));
        }
        line.extend(words(&format!(r"& ( if not exist !OCR_FOLDER!\* exit {NO_FOLDER} ) & exit 0")));
        let of_path = [("OCR_INSIDE", quoted(&format!(r"{path}\*"))), ("OCR_FOLDER", quoted(folder))];
        let (code, _) = self.step(vm, "cmd.exe", &line, &with(variables, &of_path)).await?;
        match code {
            IS_FOLDER => return Err(Error::invalid("path", format_args!("{} is a folder in the guest", shown(path)))),
            NO_FOLDER => return Err(Error::not_found(format!("the guest has no folder for {}", shown(path)))),
            _ => {}
        }
        let written = write(&self.agent, vm, temporary, "wb", std::slice::from_ref(&file.content), until).await;
        written.map_err(|error| error.with_note(format_args!("for {}", shown(path))))?;
        if file.content.is_empty() {
            // certutil does not sum up nothing.
            return Ok(());
        }
        let arguments = ["-hashfile", temporary, "SHA256"].map(str::to_owned);
        let (_, exit) = self.step(vm, "certutil.exe", &arguments, &[]).await?;
        let digest: String = Sha256::digest(&file.content).iter().map(|byte| format!("{byte:02x}")).collect();
        // Old ones write the bytes apart; the lines around are in the guest's language.
        let text = String::from_utf8_lossy(&exit.stdout);
        match text.lines().any(|line| line.replace([' ', '\r'], "").eq_ignore_ascii_case(&digest)) {
            true => Ok(()),
            false => Err(Error::unavailable(format!("what reached the guest has another digest, for {}", shown(path)))),
        }
    }

    pub(super) async fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        let path = check_path(path)?;
        let limit = limit_bytes.min(MAX_FILE_BYTES);
        let content = match self.read(vm, &path, limit).await {
            // Why, it says in the guest's language.
            Err(error) if is_refusal(&error) => return Err(self.unreadable(vm, &path, error).await?),
            content => content?,
        };
        if content.len() as u64 > limit {
            let why = format!("{} is larger than the limit of {limit} bytes", shown(&path));
            return Err(Error::new(ErrorKind::Exhausted, why));
        }
        Ok(content)
    }

    /// The error for a file that could not be opened.
    async fn unreadable(&self, vm: VmId, path: &str, error: Error) -> Result<Error> {
        let variables = self.variables(vm).await?;
        let line = words(&format!(
            "/d /v:on /c ( if exist !OCR_INSIDE! exit {IS_FOLDER} ) & ( if not exist !OCR_PATH! exit {IS_MISSING} ) & exit 0"
        ));
        let of_path = [("OCR_INSIDE", quoted(&format!(r"{path}\*"))), ("OCR_PATH", quoted(path))];
        let (code, _) = self.step(vm, "cmd.exe", &line, &with(&variables, &of_path)).await?;
        Ok(match code {
            IS_FOLDER => Error::invalid("path", format_args!("{} is a folder in the guest", shown(path))),
            IS_MISSING => Error::not_found(format!("the guest has no file {}", shown(path))),
            _ => error,
        })
    }

    pub(super) async fn remove_files(&self, vm: VmId, request: &RemoveFiles) -> Result<Vec<Result<Deletion>>> {
        let paths = request.paths.iter().map(|path| check_path(path)).collect::<Result<Vec<_>>>()?;
        self.check_fence(vm, request.fence).await?;
        let mut outcomes = Vec::new();
        for path in &paths {
            let variables = self.variables(vm).await?;
            // `del` of a folder would remove the files in it.
            let line = words(&format!(
                "/d /v:on /c ( if exist !OCR_INSIDE! exit {IS_FOLDER} ) & ( if not exist !OCR_PATH! exit {IS_MISSING} ) \
                 & del /f /q !OCR_PATH! & ( if exist !OCR_PATH! exit {STAYS} ) & exit 0"
            ));
            let of_path = [("OCR_INSIDE", quoted(&format!(r"{path}\*"))), ("OCR_PATH", quoted(path))];
            let (code, exit) = self.step(vm, "cmd.exe", &line, &with(&variables, &of_path)).await?;
            outcomes.push(match code {
                0 => Ok(Deletion::Deleted),
                IS_MISSING => Ok(Deletion::AlreadyGone),
                IS_FOLDER => Err(Error::invalid("path", format_args!("{} is a folder in the guest", shown(path)))),
                _ => {
                    let why = String::from_utf8_lossy(&exit.stderr).into_owned();
                    let text = format!("the guest could not remove {}: {}", shown(path), shown(why.trim()));
                    Err(Error::new(ErrorKind::Denied, text))
                }
            });
        }
        Ok(outcomes)
    }

    pub(super) async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        request.check()?;
        if request.user.is_some() {
            return Err(Error::unsupported(
                "username: commands in Windows guests run as the agent's own user (SYSTEM) only",
            ));
        }
        if request.stdin.len() > PIECE_BYTES {
            return Err(Error::unsupported(format!("stdin: a Windows guest takes at most {PIECE_BYTES} bytes")));
        }
        let line = match &request.command {
            Command::Shell(line) => line.clone(),
            Command::Argv(argv) => escape_for_cmd(&command_line(argv)?),
        };
        check_line(&line)?;
        self.check_fence(vm, request.fence).await?;
        let own = self.variables(vm).await?;
        let mut more: Vec<_> = request.environment.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
        // `/s` takes exactly these two quotes away and leaves the line as it is.
        more.push(("OCR_LINE", quoted(&line)));
        let folder = format!(r"{BASE}\ops\{}", request.operation);
        let runner = words(&format!(
            "/d /v:on /c md {folder} 2>nul || exit {EXISTS} & cmd.exe /d /s /c !OCR_LINE! >{folder}\\out 2>{folder}\\err \
             & echo !ERRORLEVEL! >{folder}\\part & move {folder}\\part {folder}\\exit >nul"
        ));
        let end = Instant::now() + request.deadline;
        let until = end + self.config.margin;
        let started = self.agent.start(vm, "cmd.exe", &runner, &with(&own, &more), &request.stdin).await;
        let pid = match started {
            Ok(pid) => Some(pid),
            // It may have begun: its folder tells.
            Err(error) if is_outage(&error) && error.retry() == Retry::Ambiguous => None,
            Err(error) => return Err(error),
        };
        if let Some(pid) = pid {
            match follow(&self.agent, vm, pid, 0, end).await {
                Err(error) if error.kind() == ErrorKind::TimedOut => {
                    return Err(self.end(vm, pid, &folder, request.deadline).await);
                }
                Err(error) if is_outage(&error) => {
                    tracing::debug!(%vm, %error, "lost track of a program in the guest, looking for its result");
                }
                Err(error) => return Err(error),
                Ok(_) => {}
            }
        }
        let code = self.result(vm, &folder, request.deadline, until).await?;
        let limit = request.output_limit_bytes.min(MAX_OUTPUT_BYTES);
        let (stdout, stdout_truncated) = self.output(vm, &format!(r"{folder}\out"), limit).await?;
        let (stderr, stderr_truncated) = self.output(vm, &format!(r"{folder}\err"), limit).await?;
        if let Some(progress) = &request.progress {
            let _full = progress.try_send(OutputChunk::Stdout(stdout.clone()));
            let _full = progress.try_send(OutputChunk::Stderr(stderr.clone()));
        }
        // What cmd.exe says where others say 127.
        let exit_code = if code == 9009 { 127 } else { code };
        Ok(ExecOutput { exit_code, stdout, stderr, stdout_truncated, stderr_truncated })
    }

    /// Ends a command past its deadline, with its children, and notes that down for repeats.
    async fn end(&self, vm: VmId, pid: i64, folder: &str, deadline: Duration) -> Error {
        let killed = self.step(vm, "taskkill.exe", &words(&format!("/f /t /pid {pid}")), &[]).await;
        let noted = self.step(vm, "cmd.exe", &words(&format!(r"/d /c echo late >{folder}\exit")), &[]).await;
        match (killed, noted) {
            (Ok((0, _)), Ok((0, _))) => late(deadline),
            (Err(error), _) | (_, Err(error)) => Error::timed_out(format!(
                "the command did not end in {}, and whether it was ended is not known",
                seconds(deadline)
            ))
            .with_source(error),
            _ => Error::timed_out(format!("the command did not end in {}, nor could it be ended", seconds(deadline))),
        }
    }

    /// The exit code of the command that has this folder, once it has ended.
    async fn result(&self, vm: VmId, folder: &str, deadline: Duration, until: Instant) -> Result<i32> {
        loop {
            match self.read(vm, &format!(r"{folder}\exit"), 100).await {
                Ok(text) => {
                    let text = String::from_utf8_lossy(&text);
                    return match text.trim() {
                        "late" => Err(late(deadline)),
                        code => code.parse().map_err(|_| {
                            Error::internal(format!("the guest's exit code makes no sense: {}", shown(code)))
                        }),
                    };
                }
                // It is not there yet.
                Err(error) if is_outage(&error) || is_refusal(&error) => {}
                Err(error) => return Err(error),
            }
            if Instant::now() + LOOK >= until {
                return Err(Error::unavailable(
                    "the command has no result; how far it came is not known, and it is not run again",
                )
                .with_reason(reason::AGENT_NOT_READY)
                .with_retry(Retry::Ambiguous));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn output(&self, vm: VmId, path: &str, limit: u64) -> Result<(Bytes, bool)> {
        let mut bytes = self.read(vm, path, limit).await?;
        let cut = bytes.len() as u64 > limit;
        bytes.truncate(limit as usize);
        Ok((bytes, cut))
    }
}

fn late(deadline: Duration) -> Error {
    Error::timed_out(format!("the command did not end in {} and was ended, with its children", seconds(deadline)))
        .with_retry(Retry::Never)
}
