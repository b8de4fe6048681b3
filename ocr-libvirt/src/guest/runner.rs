//! What the in-guest runner is told and what it answers. The runner itself is `run.sh`.
//!
//! The runner is the agent's child, in a session of its own, so that it outlives the agent. It makes a lock file named
//! after the operation; whoever makes it runs the command, whoever finds it waits for that one's result. Results are
//! files, so they outlive the agent too, and an operation of an earlier boot is known by the boot's id in its lock.
//!
//! Environment, command and stdin come through the runner's stdin, never as arguments: arguments are seen by every
//! user of the guest. For the same reason the command's own shell reads them from a pipe.

use std::sync::OnceLock;

use ocr_core::{Command, ExecRequest};

use super::script::{answer, compact, quote};

/// Of each output so much comes with the runner's answer.
pub(crate) const INLINE_BYTES: u64 = 256 << 10;
/// A longer header is not read byte by byte.
const LONG_HEADER_BYTES: usize = 2048;

/// The runner's script.
pub(crate) fn script() -> &'static str {
    static SCRIPT: OnceLock<String> = OnceLock::new();
    SCRIPT.get_or_init(|| compact(include_str!("run.sh")))
}

/// A run, ready to be sent.
pub(crate) struct Run {
    /// The runner's arguments.
    pub(crate) arguments: Vec<String>,
    /// What it reads from stdin, or from the staged file.
    pub(crate) input: Vec<u8>,
    /// The path of the operation's files, without their suffix.
    pub(crate) files: String,
    /// The most of each output that comes with the answer; one more means that there is more.
    pub(crate) inline_bytes: u64,
}

impl Run {
    /// `limit_bytes` is kept of each output; with `staged` the input is in a file already.
    pub(crate) fn new(request: &ExecRequest, folder: &str, limit_bytes: u64, staged: bool, prune: bool) -> Self {
        let header = header(request);
        let long = if header.len() > LONG_HEADER_BYTES { header.len() } else { 0 };
        let inline_bytes = limit_bytes.min(INLINE_BYTES);
        let flag = |is_set: bool| if is_set { "1" } else { "0" }.to_owned();
        let mut input = header.into_bytes();
        input.push(b'\n');
        input.extend_from_slice(&request.stdin);
        Self {
            arguments: vec![
                folder.to_owned(),
                request.operation.to_string(),
                request.deadline.as_millis().div_ceil(10).to_string(),
                limit_bytes.to_string(),
                (inline_bytes + 1).to_string(),
                long.to_string(),
                request.stdin.len().to_string(),
                request.user.clone().unwrap_or_default(),
                flag(staged),
                flag(prune),
            ],
            input,
            files: format!("{folder}/{}", request.operation),
            inline_bytes,
        }
    }
}

/// The line of shell that the command's own shell evaluates.
fn header(request: &ExecRequest) -> String {
    let mut line = String::new();
    for (name, value) in &request.environment {
        line.push_str(&format!("export {name}={};", quote(value)));
    }
    match &request.command {
        Command::Argv(argv) => {
            line.push_str("exec");
            for word in argv {
                line.push(' ');
                line.push_str(&quote(word));
            }
        }
        // In a shell that is as fresh as the one of `sh -c` is.
        Command::Shell(text) => line.push_str(&format!("eval {}", quote(&format!("unset ocr_h ocr_nl\n{text}")))),
    }
    line
}

/// What became of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It ended by itself.
    Exit(i32),
    /// It was ended at its deadline.
    Late,
    /// There is no such user; nothing ran.
    NoUser,
    /// The input did not arrive whole; nothing ran.
    Garbled,
    /// The guest's disk is full; nothing ran.
    Full,
    /// The guest rebooted while it ran.
    Rebooted,
    /// It was ended from outside, without a result.
    Lost,
    /// It ran, and its output is no longer kept.
    Forgotten,
}

/// A runner's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer<'a> {
    pub(crate) verdict: Verdict,
    /// Whether the rest of stdout, and of stderr, was let go.
    pub(crate) cut: [bool; 2],
    /// The beginning of stdout.
    pub(crate) stdout: &'a [u8],
}

impl<'a> Answer<'a> {
    pub(crate) fn parse(stdout: &'a [u8]) -> Option<Self> {
        let (words, stdout) = answer(stdout)?;
        let (verdict, rest) = match words.as_slice() {
            ["exit", code, rest @ ..] => (Verdict::Exit(code.parse().ok()?), rest),
            ["late", rest @ ..] => (Verdict::Late, rest),
            ["nouser"] => (Verdict::NoUser, &[][..]),
            ["garbled"] => (Verdict::Garbled, &[][..]),
            ["full"] => (Verdict::Full, &[][..]),
            ["rebooted"] => (Verdict::Rebooted, &[][..]),
            ["lost"] => (Verdict::Lost, &[][..]),
            ["forgotten"] => (Verdict::Forgotten, &[][..]),
            _ => return None,
        };
        let cut = |index: usize| rest.get(index) == Some(&"cut");
        Some(Self { verdict, cut: [cut(0), cut(1)], stdout })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        let read = |text: &'static str| Answer::parse(text.as_bytes());
        let exit = read("ocr1 exit 7 all cut\nout").unwrap();
        assert_eq!((exit.verdict, exit.cut, exit.stdout), (Verdict::Exit(7), [false, true], &b"out"[..]));
        assert_eq!(read("ocr1 late all all\n").unwrap().verdict, Verdict::Late);
        assert_eq!(read("ocr1 nouser\n").unwrap().verdict, Verdict::NoUser);
        for none in ["", "ocr1 exit x all all\n", "ocr1 what\n", "exit 0\n"] {
            assert_eq!(read(none), None, "{none}");
        }
    }

    #[test]
    fn secrets_are_not_arguments() {
        let mut request = ExecRequest::shell("echo hunter2");
        request.environment.insert("PASSWORD".into(), "hunter2".into());
        request.stdin = bytes::Bytes::from_static(b"hunter2");
        let run = Run::new(&request, "/var/lib/ocr/ops", 100, false, false);
        assert!(!run.arguments.concat().contains("hunter2"));
        assert_eq!(run.arguments.len(), 10);
    }
}
