//! The host's half of the scripts: what goes in, what comes out.

use std::sync::LazyLock;

use bytes::Bytes;

use super::PosixExit;
use crate::{
    Command, Error, ErrorKind, ExecRequest, Result,
    error::{reason, seconds},
    id::shown,
};

/// A script of the guest's half.
#[derive(Clone, Copy, Debug)]
pub(super) struct Script {
    /// What it is called in the guest's list of processes.
    pub(super) name: &'static str,
    text: &'static LazyLock<String>,
}

/// Runs commands.
pub(super) const RUN: Script = Script { name: "ocr-run", text: &RUN_TEXT };

/// Moves files.
pub(super) const FILE: Script = Script { name: "ocr-file", text: &FILE_TEXT };

static RUN_TEXT: LazyLock<String> =
    LazyLock::new(|| stripped(concat!(include_str!("common.sh"), include_str!("runner.sh"))));
static FILE_TEXT: LazyLock<String> =
    LazyLock::new(|| stripped(concat!(include_str!("common.sh"), include_str!("files.sh"))));

/// A script without comments and indentation: they cost time on the way into the guest.
fn stripped(script: &str) -> String {
    let lines = script.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.flat_map(|line| [line, "\n"]).collect()
}

impl Script {
    pub(super) fn text(self) -> &'static str {
        self.text
    }
}

/// Ends a request that comes without stdin, so that the runner knows that it is whole.
const END_MARK: &str = "#ocr";

/// Variables that some shell keeps for itself: an assignment ends it, or is lost.
const SHELL_VARIABLES: [&str; 9] =
    ["_", "BASHOPTS", "BASH_VERSINFO", "EUID", "LINENO", "OPTIND", "PPID", "SHELLOPTS", "UID"];

/// What the runner gets on stdin, or in a staged file.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) bytes: Bytes,
    /// How long the shell text at its beginning is; the command's stdin follows.
    pub(super) head_bytes: usize,
    /// How long both are, without the end mark.
    pub(super) total_bytes: usize,
}

impl Input {
    /// The request as shell text, with its stdin behind.
    pub(super) fn of(request: &ExecRequest) -> Result<Self> {
        // What the runner itself used must not be seen by the command.
        let mut text = "set --;exec 4>&-;".to_owned();
        for (name, value) in &request.environment {
            if SHELL_VARIABLES.contains(&name.as_str()) {
                return Err(Error::invalid("environment", format_args!("{name} belongs to the guest's shell")));
            }
            text.push_str("export ");
            text.push_str(name);
            text.push('=');
            quote(&mut text, value);
            text.push(';');
        }
        match &request.command {
            Command::Shell(line) => text.push_str(line),
            Command::Argv(argv) => {
                text.push_str("exec");
                // Not always: old shells take it for the program.
                if argv.first().is_some_and(|program| program.starts_with('-')) {
                    text.push_str(" --");
                }
                for argument in argv {
                    text.push(' ');
                    quote(&mut text, argument);
                }
            }
        }
        let head_bytes = text.len();
        let total_bytes = head_bytes + request.stdin.len();
        if request.stdin.is_empty() {
            text.push_str(END_MARK);
        }
        let mut bytes = text.into_bytes();
        bytes.extend_from_slice(&request.stdin);
        Ok(Self { bytes: bytes.into(), head_bytes, total_bytes })
    }

    /// Without the end mark, as a staged file wants it.
    pub(super) fn staged(&self) -> Bytes {
        self.bytes.slice(..self.total_bytes)
    }
}

/// Adds a text as one word in which a shell sees nothing but letters.
pub(super) fn quote(line: &mut String, text: &str) {
    line.push('\'');
    line.push_str(&text.replace('\'', r"'\''"));
    line.push('\'');
}

/// What the runner answered: the words after `ocr1`, what follows that line, and what came by stderr.
#[derive(Debug)]
pub(super) struct Reply {
    words: Vec<String>,
    pub(super) body: Bytes,
    pub(super) beside: Bytes,
}

impl Reply {
    /// `None` when the runner did not get to its answer.
    pub(super) fn of(exited: &PosixExit) -> Option<Self> {
        let end = exited.stdout.iter().position(|byte| *byte == b'\n')?;
        let line = String::from_utf8_lossy(&exited.stdout[..end]);
        let words = line.strip_prefix("ocr1 ")?.split(' ').map(str::to_owned).collect();
        Some(Self { words, body: exited.stdout.slice(end + 1..), beside: exited.stderr.clone() })
    }

    pub(super) fn state(&self) -> &str {
        &self.words[0]
    }

    /// The text after the state, such as a program's complaint.
    pub(super) fn text(&self) -> String {
        self.words[1..].join(" ")
    }

    /// The word at this place after the state.
    pub(super) fn word(&self, place: usize) -> Option<&str> {
        self.words.get(place + 1).map(String::as_str)
    }

    /// The number at this place after the state.
    pub(super) fn number(&self, place: usize) -> Result<u64> {
        let number = self.words.get(place + 1).and_then(|word| word.parse().ok());
        number.ok_or_else(|| self.senseless())
    }

    /// The error for an answer that this version of the runner does not give.
    pub(super) fn senseless(&self) -> Error {
        Error::internal(format!(
            "the runner in the guest gave an answer that makes no sense: {}",
            shown(&self.words.join(" "))
        ))
    }

    /// The error for `fail`: a program of the guest could not do its work.
    pub(super) fn failure(&self) -> Error {
        let text = self.text();
        let has = |parts: &[&str]| parts.iter().any(|part| text.contains(part));
        let kind = if has(&["No space left", "uota exceeded"]) {
            ErrorKind::Exhausted
        } else if has(&["ermission denied", "not permitted", "Read-only"]) {
            ErrorKind::Denied
        } else if has(&["Not a directory", "File exists", "too long"]) {
            ErrorKind::Invalid
        } else {
            ErrorKind::Internal
        };
        Error::new(kind, format!("the guest could not do it: {}", shown(text.trim())))
    }
}

/// How a run ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) exit_code: i32,
    pub(super) stdout: Output,
    pub(super) stderr: Output,
}

/// What came back of an output.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) begin: Bytes,
    /// Whether there is more in the file.
    pub(super) more: bool,
    /// Whether the runner cut it, at the request's limit.
    pub(super) cut: bool,
}

impl Output {
    fn of(begin: &Bytes, cut: bool, inline_bytes: usize) -> Self {
        Self { begin: begin.clone(), more: begin.len() > inline_bytes, cut }
    }
}

/// Reads the answer to `exec`.
///
/// # Errors
/// Whatever means that there is no result, now or ever.
pub(super) fn ended(reply: &Reply, request: &ExecRequest, inline_bytes: usize) -> Result<Ended> {
    use crate::Retry::{Ambiguous, Never};
    match reply.state() {
        "done" => Ok(Ended {
            exit_code: i32::try_from(reply.number(0)?).map_err(|_| reply.senseless())?,
            stdout: Output::of(&reply.body, reply.number(1)? == 1, inline_bytes),
            stderr: Output::of(&reply.beside, reply.number(2)? == 1, inline_bytes),
        }),
        "late" => Err(Error::timed_out(format!(
            "the command did not end in {} and was ended, with its children",
            seconds(request.deadline)
        ))
        .with_retry(Never)),
        "refused" => {
            let text = String::from_utf8_lossy(&reply.beside);
            Err(Error::new(
                ErrorKind::Denied,
                format!("the guest does not let this user run commands: {}", shown(text.trim())),
            ))
        }
        "nouser" => Err(unknown_user("username", request.user.as_deref().unwrap_or_default())),
        "rebooted" => Err(Error::unavailable(
            "the guest rebooted while the command ran; it is not known how far it came, and it is not run again",
        )
        .with_reason(reason::AGENT_NOT_READY)
        .with_retry(Ambiguous)),
        "died" => Err(Error::unavailable(
            "the guest ended the runner while the command ran; it is not known how far it came, and it is not run again",
        )
        .with_retry(Ambiguous)),
        "fail" => Err(reply.failure()),
        _ => Err(reply.senseless()),
    }
}

/// The error for a user that the guest does not have.
pub(super) fn unknown_user(field: &str, user: &str) -> Error {
    Error::invalid(field, format_args!("the guest has no account {}", shown(user)))
}
