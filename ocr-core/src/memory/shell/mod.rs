//! The shell of guests in memory: a small part of POSIX, written for this purpose. It never touches the host.
//!
//! What it knows:
//! - words with `'..'`, `".."`, `\`, `$VAR`, `${VAR}`, `${VAR:-word}`, `${VAR:+word}`, `${#VAR}`, `$?`, `$0` to `$9`, `$#`,
//!   `$@`, `$(...)`, `$((...))`, comments; unquoted values are split at white space; file names with `*` and `?`;
//! - `;`, line ends, `&&`, `||`, `!`, pipes, `( )`, `{ }`, `if`, `while`, `until`, `for`, `case`, assignments;
//! - `<`, `<<`, `>`, `>>`, `2>`, `2>&1`, `>&2`;
//! - `cd`, `export`, `unset`, `set -e -u`, `read`, `shift`, `exit`, `break`, `continue`, `.`, `eval`, `command`, `exec`, and
//!   the programs in [`programs::NAMES`], which also lie in the guest's `/bin`; scripts in the guest's files.
//!
//! What it does not: background jobs, functions, backquotes, `[a-z]` in patterns, `$$`, file descriptors over 2. What it
//! does not know is a syntax error (exit code 2), never silently something else. A pipe's commands run one after another.

mod parse;
pub(super) mod programs;
mod sum;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::mpsc;

use self::parse::{Change, Command, Join, List, Part, Pipeline, Redirection, What, Word};
use super::{
    guest::Process,
    tree::{Fail, Node, Want, resolve},
};
use crate::OutputChunk;

/// After so many commands a process makes no more progress: it is an endless loop and waits for its deadline.
const MAX_COMMANDS: u64 = 200_000;
/// How deep scripts may start scripts.
const MAX_DEPTH: u32 = 30;
/// The most that one pipe or `$(...)` holds, in bytes.
const MAX_PIPE_BYTES: usize = 64 << 20;

/// What the whole process wrote, up to the limit, and where it goes meanwhile.
#[derive(Debug)]
pub(super) struct Output {
    limit_bytes: usize,
    stdout: Mutex<Kept>,
    stderr: Mutex<Kept>,
    progress: Option<mpsc::Sender<OutputChunk>>,
}

#[derive(Debug, Default)]
struct Kept {
    bytes: Vec<u8>,
    truncated: bool,
}

impl Output {
    pub(super) fn new(limit_bytes: usize, progress: Option<mpsc::Sender<OutputChunk>>) -> Self {
        Self { limit_bytes, stdout: Mutex::default(), stderr: Mutex::default(), progress }
    }

    fn write(&self, stdout: bool, bytes: &[u8]) {
        let mut kept = locked(if stdout { &self.stdout } else { &self.stderr });
        let room = self.limit_bytes - kept.bytes.len();
        let cut = &bytes[..bytes.len().min(room)];
        kept.truncated |= cut.len() < bytes.len();
        kept.bytes.extend_from_slice(cut);
        if let Some(progress) = &self.progress
            && !cut.is_empty()
        {
            let chunk = Bytes::copy_from_slice(cut);
            // Nobody who listens slowly, or no more, holds the guest up.
            let _full_or_gone =
                progress.try_send(if stdout { OutputChunk::Stdout(chunk) } else { OutputChunk::Stderr(chunk) });
        }
    }

    /// Stdout and stderr, each with whether it was cut.
    pub(super) fn take(&self) -> [(Bytes, bool); 2] {
        [&self.stdout, &self.stderr].map(|kept| {
            let mut kept = locked(kept);
            (std::mem::take(&mut kept.bytes).into(), kept.truncated)
        })
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a script does not go on.
#[derive(Clone, Copy, Debug)]
enum Stop {
    Exit(i32),
    Break(u32),
    Continue(u32),
}

type Step<T = ()> = Result<T, Stop>;

#[derive(Clone, Debug)]
enum Sink {
    /// The process's own stdout or stderr.
    Process {
        stdout: bool,
    },
    Pipe(Arc<Mutex<Vec<u8>>>),
    File(String),
    Null,
}

#[derive(Clone, Debug)]
struct Input(Arc<Mutex<(Bytes, usize)>>);

impl Input {
    fn new(bytes: Bytes) -> Self {
        Self(Arc::new(Mutex::new((bytes, 0))))
    }

    fn all(&self) -> Bytes {
        let mut input = locked(&self.0);
        let rest = input.0.slice(input.1..);
        input.1 = input.0.len();
        rest
    }

    fn line(&self) -> Option<Bytes> {
        let mut input = locked(&self.0);
        let rest = input.0.slice(input.1..);
        if rest.is_empty() {
            return None;
        }
        let end = rest.iter().position(|b| *b == b'\n').map_or(rest.len(), |at| at + 1);
        input.1 += end;
        Some(rest.slice(..end))
    }
}

#[derive(Clone, Debug)]
struct Io {
    stdin: Input,
    stdout: Sink,
    stderr: Sink,
}

#[derive(Clone, Debug)]
struct Variable {
    value: String,
    exported: bool,
}

/// One shell, or a program that it started.
#[derive(Clone)]
pub(super) struct Shell {
    process: Process,
    output: Arc<Output>,
    user: String,
    variables: BTreeMap<String, Variable>,
    /// `$0` and the arguments.
    arguments: Vec<String>,
    folder: String,
    io: Io,
    status: i32,
    /// Whether the command that is being expanded had a `$(...)`.
    substituted: bool,
    /// `set -e`
    ends_on_failure: bool,
    /// `set -u`
    unset_is_failure: bool,
    /// How many conditions are being tested around here: `set -e` does not count in them.
    testing: u32,
    depth: u32,
    commands: Arc<AtomicU64>,
}

enum Found {
    Program(&'static str),
    Script { path: String, text: String },
    Failed { code: i32, why: &'static str },
}

impl Shell {
    pub(super) fn new(
        process: Process,
        output: Arc<Output>,
        user: &str,
        environment: &BTreeMap<String, String>,
        stdin: Bytes,
    ) -> Self {
        let home = if user == super::tree::ROOT { "/root".to_owned() } else { format!("/home/{user}") };
        let base = [
            ("HOME", home.as_str()),
            ("LOGNAME", user),
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            ("SHELL", "/bin/sh"),
            ("USER", user),
        ];
        let variables = base
            .into_iter()
            .chain(environment.iter().map(|(name, value)| (name.as_str(), value.as_str())))
            .map(|(name, value)| (name.to_owned(), Variable { value: value.to_owned(), exported: true }))
            .collect();
        let io = Io {
            stdin: Input::new(stdin),
            stdout: Sink::Process { stdout: true },
            stderr: Sink::Process { stdout: false },
        };
        Self {
            process,
            output,
            user: user.to_owned(),
            variables,
            arguments: vec!["sh".to_owned()],
            folder: "/".to_owned(),
            io,
            status: 0,
            substituted: false,
            ends_on_failure: false,
            unset_is_failure: false,
            testing: 0,
            depth: 0,
            commands: Arc::default(),
        }
    }

    /// Runs a line as `sh -c` does; gives the exit code.
    pub(super) async fn line(mut self, line: &str) -> i32 {
        self.script(line).await
    }

    /// Runs a program without a shell.
    pub(super) async fn argv(mut self, argv: &[String]) -> i32 {
        match self.start(argv).await {
            Ok(code) | Err(Stop::Exit(code)) => code,
            Err(_) => 0,
        }
    }

    /// Runs a whole script in this shell, up to its end or `exit`.
    async fn script(&mut self, text: &str) -> i32 {
        match self.source(text).await {
            Ok(()) => self.status,
            Err(Stop::Exit(code)) => code,
            Err(Stop::Break(_) | Stop::Continue(_)) => self.status,
        }
    }

    async fn source(&mut self, text: &str) -> Step {
        match parse::parse(text) {
            Ok(list) => self.list(&list).await,
            Err(why) => {
                self.complain(&format!("syntax error: {why}"));
                self.status = 2;
                Err(Stop::Exit(2))
            }
        }
    }

    fn list<'a>(&'a mut self, list: &'a List) -> BoxFuture<'a, Step> {
        Box::pin(async move {
            for chain in list {
                let mut last = self.pipeline(&chain.first, !chain.rest.is_empty()).await;
                for (index, (join, pipeline)) in chain.rest.iter().enumerate() {
                    last?;
                    last = Ok(());
                    if (*join == Join::And) == (self.status == 0) {
                        last = self.pipeline(pipeline, index + 1 < chain.rest.len()).await;
                    }
                }
                last?;
            }
            Ok(())
        })
    }

    /// `tested` says that something looks at the status, so that `set -e` does not count.
    async fn pipeline(&mut self, pipeline: &Pipeline, tested: bool) -> Step {
        let tested = tested || pipeline.negated;
        self.testing += u32::from(tested);
        let result = self.pipe(&pipeline.commands).await;
        self.testing -= u32::from(tested);
        result?;
        if pipeline.negated {
            self.status = i32::from(self.status == 0);
        } else if self.status != 0 && self.ends_on_failure && !tested && self.testing == 0 {
            return Err(Stop::Exit(self.status));
        }
        Ok(())
    }

    async fn pipe(&mut self, commands: &[Command]) -> Step {
        if let [command] = commands {
            return self.command(command).await;
        }
        let mut stdin = self.io.stdin.clone();
        for (index, command) in commands.iter().enumerate() {
            let mut child = self.child();
            child.io.stdin = stdin;
            let pipe = Arc::new(Mutex::new(Vec::new()));
            if index + 1 < commands.len() {
                child.io.stdout = Sink::Pipe(pipe.clone());
                child.testing += 1;
            }
            let done = child.command(command).await;
            self.status = child.ended(done);
            stdin = Input::new(std::mem::take(&mut *locked(&pipe)).into());
        }
        Ok(())
    }

    /// A copy of this shell whose changes are its own.
    fn child(&self) -> Self {
        let mut child = self.clone();
        child.depth += 1;
        child
    }

    fn ended(&self, step: Step) -> i32 {
        match step {
            Err(Stop::Exit(code)) => code,
            _ => self.status,
        }
    }

    async fn command(&mut self, command: &Command) -> Step {
        self.count().await;
        let outer = self.io.clone();
        for redirection in &command.redirections {
            if let Err(why) = self.redirect(redirection).await? {
                self.io = outer;
                self.complain(&why);
                self.status = 1;
                return Ok(());
            }
        }
        let result = self.what(&command.what).await;
        self.io = outer;
        result
    }

    /// Lets others run, and stops endless loops.
    async fn count(&self) {
        let count = self.commands.fetch_add(1, Ordering::Relaxed);
        if count >= MAX_COMMANDS {
            std::future::pending::<()>().await;
        }
        if count % 64 == 63 {
            tokio::task::yield_now().await;
        }
    }

    async fn what(&mut self, what: &What) -> Step {
        match what {
            What::Simple { assignments, words } => self.simple(assignments, words).await,
            What::Group(list) => self.list(list).await,
            What::Subshell(list) => {
                let mut child = self.child();
                let done = child.list(list).await;
                self.status = child.ended(done);
                Ok(())
            }
            What::If { arms, otherwise } => {
                for (condition, body) in arms {
                    if self.holds(condition).await? {
                        return self.list(body).await;
                    }
                }
                self.status = 0;
                match otherwise {
                    Some(body) => self.list(body).await,
                    None => Ok(()),
                }
            }
            What::Loop { until, condition, body } => {
                let mut status = 0;
                while self.holds(condition).await? != *until {
                    let done = self.list(body).await;
                    status = self.status;
                    if self.leaves_loop(done)? {
                        break;
                    }
                }
                self.status = status;
                Ok(())
            }
            What::For { name, words, body } => {
                let values = match words {
                    Some(words) => self.fields(words).await?,
                    None => self.arguments.get(1..).unwrap_or_default().to_vec(),
                };
                self.status = 0;
                for value in values {
                    // An empty body of commands does not exist, so every round counts and ends.
                    self.set(name, value);
                    let done = self.list(body).await;
                    if self.leaves_loop(done)? {
                        break;
                    }
                }
                Ok(())
            }
            What::Case { word, arms } => {
                let word = self.text(word).await?;
                self.status = 0;
                for (patterns, body) in arms {
                    for pattern in patterns {
                        if matches(&self.pattern(pattern).await?, &word.chars().collect::<Vec<_>>()) {
                            return self.list(body).await;
                        }
                    }
                }
                Ok(())
            }
        }
    }

    async fn holds(&mut self, condition: &List) -> Step<bool> {
        self.testing += 1;
        let done = self.list(condition).await;
        self.testing -= 1;
        done?;
        Ok(self.status == 0)
    }

    fn leaves_loop(&self, done: Step) -> Step<bool> {
        match done {
            Ok(()) | Err(Stop::Continue(1)) => Ok(false),
            Err(Stop::Break(1)) => Ok(true),
            Err(Stop::Break(n)) => Err(Stop::Break(n - 1)),
            Err(Stop::Continue(n)) => Err(Stop::Continue(n - 1)),
            Err(stop) => Err(stop),
        }
    }

    async fn redirect(&mut self, redirection: &Redirection) -> Step<Result<(), String>> {
        match redirection {
            Redirection::In(word) => {
                let name = self.text(word).await?;
                let path = resolve(&self.folder, &name);
                if path == "/dev/null" {
                    self.io.stdin = Input::new(Bytes::new());
                    return Ok(Ok(()));
                }
                match self.process.look(|tree| tree.read(&self.user, &path)).unwrap_or(Err(Fail::Missing)) {
                    Ok(content) => self.io.stdin = Input::new(Bytes::copy_from_slice(&content)),
                    Err(fail) => return Ok(Err(format!("{name}: {fail}"))),
                }
            }
            Redirection::Here(text) => {
                let text = self.text(text).await?;
                self.io.stdin = Input::new(text.into());
            }
            Redirection::Copy { from, to } => {
                let sink = if *to == 1 { self.io.stdout.clone() } else { self.io.stderr.clone() };
                self.put_sink(*from, sink);
            }
            Redirection::Out { from, append, to } => {
                let name = self.text(to).await?;
                let path = resolve(&self.folder, &name);
                let sink = match path.as_str() {
                    "/dev/null" => Sink::Null,
                    "/dev/stdout" => self.io.stdout.clone(),
                    "/dev/stderr" => self.io.stderr.clone(),
                    _ => {
                        let user = self.user.clone();
                        let opened = self.process.change(|tree| tree.write(&user, &path, b"", *append));
                        if let Some(Err(fail)) = opened {
                            return Ok(Err(format!("{name}: {fail}")));
                        }
                        Sink::File(path)
                    }
                };
                self.put_sink(*from, sink);
            }
        }
        Ok(Ok(()))
    }

    fn put_sink(&mut self, from: u8, sink: Sink) {
        if from == 1 {
            self.io.stdout = sink;
        } else {
            self.io.stderr = sink;
        }
    }

    async fn simple(&mut self, assignments: &[(String, Word)], words: &[Word]) -> Step {
        self.substituted = false;
        let fields = self.fields(words).await?;
        let mut given = Vec::new();
        for (name, word) in assignments {
            given.push((name, self.text(word).await?));
        }
        if fields.is_empty() {
            // The status is that of the last $(...), if there was one.
            if !self.substituted {
                self.status = 0;
            }
            given.into_iter().for_each(|(name, value)| self.set(name, value));
            return Ok(());
        }
        let saved: Vec<_> =
            given.iter().map(|(name, _)| ((*name).clone(), self.variables.get(*name).cloned())).collect();
        for (name, value) in given {
            self.variables.insert(name.clone(), Variable { value, exported: true });
        }
        let done = match self.builtin(&fields).await {
            Some(done) => done,
            None => self.start(&fields).await,
        };
        for (name, variable) in saved {
            match variable {
                Some(variable) => self.variables.insert(name, variable),
                None => self.variables.remove(&name),
            };
        }
        self.status = done?;
        Ok(())
    }

    /// Commands that change the shell itself; `None` when this is none of them.
    async fn builtin(&mut self, fields: &[String]) -> Option<Step<i32>> {
        let number = |index: usize, usual: i64| fields.get(index).map_or(Some(usual), |text| text.parse::<i64>().ok());
        let argument = fields.get(1).map(String::as_str);
        Some(match fields[0].as_str() {
            ":" => Ok(0),
            "exit" => match number(1, i64::from(self.status)) {
                Some(code) => Err(Stop::Exit((code & 0xff) as i32)),
                None => {
                    self.complain("exit: wants a number");
                    Err(Stop::Exit(2))
                }
            },
            word @ ("break" | "continue") => match number(1, 1) {
                Some(n @ 1..) if word == "break" => Err(Stop::Break(n.min(1000) as u32)),
                Some(n @ 1..) => Err(Stop::Continue(n.min(1000) as u32)),
                _ => Ok(self.fails(2, &format!("{word}: wants a number from 1 on"))),
            },
            "cd" => {
                let home = self.value("HOME").unwrap_or_else(|| "/".to_owned());
                let to = argument.unwrap_or(&home);
                let path = resolve(&self.folder, to);
                let user = self.user.clone();
                let look = self.process.look(|tree| tree.open(&user, &path, Want::Exec).map(Node::is_folder));
                match look.unwrap_or(Err(Fail::Missing)) {
                    Ok(true) => {
                        self.folder = path;
                        Ok(0)
                    }
                    Ok(false) => Ok(self.fails(1, &format!("cd: {to}: {}", Fail::NoFolder))),
                    Err(fail) => Ok(self.fails(1, &format!("cd: {to}: {fail}"))),
                }
            }
            "export" => {
                for field in &fields[1..] {
                    let (name, value) = match field.split_once('=') {
                        Some((name, value)) => (name, Some(value.to_owned())),
                        None => (field.as_str(), self.value(field)),
                    };
                    if crate::guest::check_variable_name(name).is_err() {
                        return Some(Ok(self.fails(2, &format!("export: {name}: bad variable name"))));
                    }
                    if let Some(value) = value {
                        self.variables.insert(name.to_owned(), Variable { value, exported: true });
                    }
                }
                Ok(0)
            }
            "unset" => {
                for name in &fields[1..] {
                    self.variables.remove(name);
                }
                Ok(0)
            }
            "set" => {
                for (index, field) in fields.iter().enumerate().skip(1) {
                    let on = field.starts_with('-');
                    if field == "--" {
                        self.arguments.truncate(1);
                        self.arguments.extend_from_slice(&fields[index + 1..]);
                        break;
                    }
                    for flag in field.chars().skip(1) {
                        match flag {
                            'e' => self.ends_on_failure = on,
                            'u' => self.unset_is_failure = on,
                            _ => return Some(Ok(self.fails(2, "set: only -e, -u and -- are supported"))),
                        }
                    }
                }
                Ok(0)
            }
            "shift" => {
                let last = self.arguments.len().saturating_sub(1);
                match number(1, 1).and_then(|n| usize::try_from(n).ok()).filter(|n| *n <= last) {
                    Some(n) => {
                        self.arguments.drain(1..=n);
                        Ok(0)
                    }
                    None => Ok(self.fails(2, "shift: can't shift that many")),
                }
            }
            "read" => {
                let names: Vec<_> = fields[1..].iter().filter(|field| *field != "-r").cloned().collect();
                let line = self.io.stdin.line();
                let text = String::from_utf8_lossy(line.as_deref().unwrap_or_default()).trim().to_owned();
                let mut rest = text.as_str();
                for (index, name) in names.iter().enumerate() {
                    let (value, after) = match rest.split_once(char::is_whitespace) {
                        Some((value, after)) if index + 1 < names.len() => (value, after.trim_start()),
                        _ => (rest, ""),
                    };
                    self.set(name, value.to_owned());
                    rest = after;
                }
                Ok(i32::from(!line.is_some_and(|line| line.ends_with(b"\n"))))
            }
            "." => {
                let Some(name) = argument else { return Some(Ok(self.fails(2, ".: wants a file"))) };
                let path = resolve(&self.folder, name);
                match self.read_text(&path) {
                    Ok(text) => Box::pin(self.source(&text)).await.map(|()| self.status),
                    Err(fail) => Ok(self.fails(1, &format!(".: {name}: {fail}"))),
                }
            }
            "eval" => Box::pin(self.source(&fields[1..].join(" "))).await.map(|()| self.status),
            "exec" if fields.len() > 1 => {
                let code = self.start(&fields[1..]).await;
                code.and_then(|code| Err(Stop::Exit(code)))
            }
            "command" if argument == Some("-v") => {
                let name = fields.get(2).cloned().unwrap_or_default();
                match self.find(&name) {
                    Found::Failed { .. } => Ok(1),
                    _ => {
                        let shown = if name.contains('/') { name } else { format!("/bin/{name}") };
                        self.write(&self.io.stdout, format!("{shown}\n").as_bytes());
                        Ok(0)
                    }
                }
            }
            "command" if fields.len() > 1 => self.start(&fields[1..]).await,
            _ => return None,
        })
    }

    /// Starts a program: one of ours, or a script in the guest's files.
    fn start<'a>(&'a mut self, argv: &'a [String]) -> BoxFuture<'a, Step<i32>> {
        Box::pin(async move {
            if self.depth >= MAX_DEPTH {
                return Ok(self.fails(2, "too many processes"));
            }
            match self.find(&argv[0]) {
                Found::Failed { code, why } => Ok(self.fails(code, &format!("{}: {why}", argv[0]))),
                Found::Script { path, text } => {
                    let name = if argv[0].contains('/') { argv[0].clone() } else { path };
                    let mut child = self.fresh(std::iter::once(name).chain(argv[1..].iter().cloned()).collect());
                    Ok(child.script(&text).await)
                }
                Found::Program(name @ ("sh" | "bash")) => Ok(self.shell(name, &argv[1..]).await),
                Found::Program("env") => self.env(&argv[1..]).await,
                Found::Program("sleep") => Ok(self.sleep(&argv[1..]).await),
                Found::Program(name) => Ok(programs::run(self, name, &argv[1..])),
            }
        })
    }

    fn find(&self, name: &str) -> Found {
        if name.contains('/') {
            return self.find_at(&resolve(&self.folder, name)).unwrap_or(Found::Failed { code: 127, why: "not found" });
        }
        let path = self.value("PATH").unwrap_or_default();
        let mut denied = None;
        for folder in path.split(':').filter(|folder| !folder.is_empty() && !name.is_empty()) {
            match self.find_at(&resolve(&self.folder, &format!("{folder}/{name}"))) {
                Some(failed @ Found::Failed { .. }) => denied = Some(failed),
                Some(found) => return found,
                None => {}
            }
        }
        denied.unwrap_or(Found::Failed { code: 127, why: "not found" })
    }

    fn find_at(&self, path: &str) -> Option<Found> {
        let opened = self.process.look(|tree| tree.open(&self.user, path, Want::Exec).cloned())?;
        let content = match opened {
            Ok(node) => node.content,
            Err(Fail::Denied) => return Some(Found::Failed { code: 126, why: "Permission denied" }),
            Err(_) => return None,
        };
        let Some(content) = content else { return Some(Found::Failed { code: 126, why: "Is a directory" }) };
        if let Some(name) = content.strip_prefix(programs::MARK) {
            return programs::NAMES.into_iter().find(|known| known.as_bytes() == name).map(Found::Program);
        }
        let Ok(text) = std::str::from_utf8(&content) else {
            return Some(Found::Failed { code: 126, why: "Exec format error" });
        };
        let interpreter = text.strip_prefix("#!").and_then(|rest| rest.lines().next());
        let shell = interpreter.is_none_or(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            let program = words.iter().rfind(|word| !word.starts_with('-')).copied().unwrap_or_default();
            matches!(super::tree::base(program), "sh" | "bash")
        });
        Some(match shell {
            true => Found::Script { path: path.to_owned(), text: text.to_owned() },
            false => Found::Failed { code: 127, why: "not found: its interpreter is missing" },
        })
    }

    /// A new process: it gets what is exported and nothing else.
    fn fresh(&self, arguments: Vec<String>) -> Self {
        let mut child = self.child();
        child.variables.retain(|_, variable| variable.exported);
        child.arguments = arguments;
        child.ends_on_failure = false;
        child.unset_is_failure = false;
        child.testing = 0;
        child.status = 0;
        child
    }

    async fn shell(&mut self, name: &str, arguments: &[String]) -> i32 {
        let mut child = self.fresh(vec![name.to_owned()]);
        let mut rest = arguments;
        let mut line = false;
        while let Some((flags, after)) = rest.split_first()
            && let Some(flags) = flags.strip_prefix('-')
        {
            for flag in flags.chars() {
                match flag {
                    'c' => line = true,
                    'e' => child.ends_on_failure = true,
                    'u' => child.unset_is_failure = true,
                    _ => return self.fails(2, &format!("{name}: only -c, -e and -u are supported, not -{flag}")),
                }
            }
            rest = after;
        }
        let text = match rest.split_first() {
            Some((text, after)) if line => {
                if !after.is_empty() {
                    child.arguments = after.to_vec();
                }
                text.clone()
            }
            None if line => return self.fails(2, &format!("{name}: -c wants a line")),
            Some((file, _)) => {
                child.arguments = rest.to_vec();
                match self.read_text(&resolve(&self.folder, file)) {
                    Ok(text) => text,
                    Err(fail) => return self.fails(127, &format!("{name}: {file}: {fail}")),
                }
            }
            None => String::from_utf8_lossy(&self.io.stdin.all()).into_owned(),
        };
        child.script(&text).await
    }

    async fn env(&mut self, arguments: &[String]) -> Step<i32> {
        let mut child = self.fresh(Vec::new());
        let mut rest = arguments;
        while let Some((first, after)) = rest.split_first() {
            match first.split_once('=') {
                _ if first == "-i" => child.variables.clear(),
                Some((name, value)) => {
                    child.variables.insert(name.to_owned(), Variable { value: value.to_owned(), exported: true });
                }
                None => return child.start(rest).await,
            }
            rest = after;
        }
        let mut text = String::new();
        for (name, variable) in &child.variables {
            text.push_str(&format!("{name}={}\n", variable.value));
        }
        self.write(&self.io.stdout, text.as_bytes());
        Ok(0)
    }

    async fn sleep(&mut self, arguments: &[String]) -> i32 {
        let seconds = arguments.first().and_then(|text| text.trim_end_matches('s').parse::<f64>().ok());
        match seconds.and_then(|seconds| std::time::Duration::try_from_secs_f64(seconds).ok()) {
            Some(pause) => {
                tokio::time::sleep(pause).await;
                0
            }
            None => self.fails(1, "sleep: wants seconds"),
        }
    }

    fn read_text(&self, path: &str) -> Result<String, Fail> {
        let content = self.process.look(|tree| tree.read(&self.user, path)).unwrap_or(Err(Fail::Missing))?;
        Ok(String::from_utf8_lossy(&content).into_owned())
    }

    fn set(&mut self, name: &str, value: String) {
        let exported = self.variables.get(name).is_some_and(|variable| variable.exported);
        self.variables.insert(name.to_owned(), Variable { value, exported });
    }

    fn value(&self, name: &str) -> Option<String> {
        match name {
            "?" => Some(self.status.to_string()),
            "#" => Some(self.arguments.len().saturating_sub(1).to_string()),
            "@" | "*" => Some(self.arguments.get(1..).unwrap_or_default().join(" ")),
            "PWD" => Some(self.folder.clone()),
            _ => match name.parse::<usize>() {
                Ok(index) => self.arguments.get(index).cloned(),
                Err(_) => self.variables.get(name).map(|variable| variable.value.clone()),
            },
        }
    }

    /// All words expanded and split.
    async fn fields(&mut self, words: &[Word]) -> Step<Vec<String>> {
        let mut fields = Vec::new();
        for word in words {
            fields.extend(self.expand(word).await?);
        }
        Ok(fields)
    }

    /// A word as one text, never split: an assignment's value, a file's name.
    async fn text(&mut self, word: &Word) -> Step<String> {
        let mut text = String::new();
        for part in &word.0 {
            text.push_str(&self.part(part).await?.0);
        }
        Ok(text)
    }

    async fn expand(&mut self, word: &Word) -> Step<Vec<String>> {
        let mut fields: Vec<String> = Vec::new();
        let mut open = false;
        let mut pattern = Vec::new();
        for (index, part) in word.0.iter().enumerate() {
            if let Part::Variable { name, change: None, quoted: true } = part
                && name == "@"
            {
                let arguments = self.arguments.get(1..).unwrap_or_default();
                // "$@" alone is as many words as there are arguments, also none.
                if arguments.is_empty() && index + 1 == word.0.len() && fields.iter().all(String::is_empty) {
                    return Ok(Vec::new());
                }
                for (index, argument) in arguments.iter().enumerate() {
                    match fields.last_mut().filter(|_| open && index == 0) {
                        Some(last) => last.push_str(argument),
                        None => fields.push(argument.clone()),
                    }
                    open = true;
                }
                continue;
            }
            let (text, split) = self.part(part).await?;
            glob(&mut pattern, &text, split || matches!(part, Part::Plain(_)));
            if !split {
                match fields.last_mut().filter(|_| open) {
                    Some(last) => last.push_str(&text),
                    None => fields.push(text),
                }
                open = true;
                continue;
            }
            for (index, piece) in text.split([' ', '\t', '\n']).enumerate() {
                if index > 0 {
                    open = false;
                }
                if piece.is_empty() {
                    continue;
                }
                match fields.last_mut().filter(|_| open) {
                    Some(last) => last.push_str(piece),
                    None => fields.push(piece.to_owned()),
                }
                open = true;
            }
        }
        if fields.len() == 1 && pattern.iter().any(|glob| !matches!(glob, Glob::Exactly(_))) {
            let found = self.files(&pattern);
            // A pattern that nothing matches stands for itself.
            return Ok(if found.is_empty() { fields } else { found });
        }
        Ok(fields)
    }

    /// The files that a pattern stands for, in order.
    fn files(&self, pattern: &[Glob]) -> Vec<String> {
        let slash = |glob: &Glob| matches!(glob, Glob::Exactly('/'));
        let mut found = vec![String::new()];
        for part in pattern.split_inclusive(slash) {
            let (name, slash) = match part.split_last() {
                Some((Glob::Exactly('/'), name)) => (name, "/"),
                _ => (part, ""),
            };
            let plain: Option<String> =
                name.iter().map(|glob| if let Glob::Exactly(c) = glob { Some(*c) } else { None }).collect();
            found = found
                .into_iter()
                .flat_map(|before| match &plain {
                    Some(plain) => vec![format!("{before}{plain}{slash}")],
                    None => {
                        self.names(&before, name).into_iter().map(|name| format!("{before}{name}{slash}")).collect()
                    }
                })
                .collect();
        }
        let there = |path: &String| {
            let path = resolve(&self.folder, path);
            self.process.look(|tree| tree.look(&path).is_some()).unwrap_or(false)
        };
        found.retain(there);
        found
    }

    /// The names in a folder that match; hidden ones only when asked for by their dot.
    fn names(&self, folder: &str, pattern: &[Glob]) -> Vec<String> {
        let path = resolve(&self.folder, if folder.is_empty() { "." } else { folder });
        let names = self.process.look(|tree| tree.names(&self.user, &path)).unwrap_or(Err(Fail::Missing));
        let dot = matches!(pattern.first(), Some(Glob::Exactly('.')));
        let fits =
            |name: &String| (dot || !name.starts_with('.')) && matches(pattern, &name.chars().collect::<Vec<_>>());
        names.unwrap_or_default().into_iter().filter(fits).collect()
    }

    /// A part's text, and whether it is split at white space.
    fn part<'a>(&'a mut self, part: &'a Part) -> BoxFuture<'a, Step<(String, bool)>> {
        Box::pin(async move {
            Ok(match part {
                Part::Plain(text) if text == "~" || text.starts_with("~/") => {
                    (format!("{}{}", self.value("HOME").unwrap_or_default(), &text[1..]), false)
                }
                Part::Plain(text) | Part::Quoted(text) => (text.clone(), false),
                Part::Variable { name, change, quoted } => (self.variable(name, change.as_ref()).await?, !quoted),
                Part::Output { script, quoted } => {
                    let mut child = self.child();
                    let pipe = Arc::new(Mutex::new(Vec::new()));
                    child.io.stdout = Sink::Pipe(pipe.clone());
                    let done = if child.depth < MAX_DEPTH { child.list(script).await } else { Err(Stop::Exit(2)) };
                    self.status = child.ended(done);
                    self.substituted = true;
                    let bytes = std::mem::take(&mut *locked(&pipe));
                    (String::from_utf8_lossy(&bytes).trim_end_matches('\n').to_owned(), !quoted)
                }
                Part::Sum { text, quoted } => {
                    let text = self.text(text).await?;
                    match sum::evaluate(&text, &|name| self.value(name)) {
                        Ok(value) => (value.to_string(), !quoted),
                        Err(why) => {
                            self.complain(&format!("$(({text})): {why}"));
                            return Err(Stop::Exit(2));
                        }
                    }
                }
            })
        })
    }

    async fn variable(&mut self, name: &str, change: Option<&(Change, Word)>) -> Step<String> {
        let value = self.value(name);
        match change {
            Some((Change::Default { or_empty }, word)) => match value {
                Some(value) if !(value.is_empty() && *or_empty) => Ok(value),
                _ => self.text(word).await,
            },
            Some((Change::Alternative { or_empty }, word)) => match value {
                Some(value) if !(value.is_empty() && *or_empty) => self.text(word).await,
                _ => Ok(String::new()),
            },
            None if value.is_none() && self.unset_is_failure && name != "@" => {
                self.complain(&format!("{name}: parameter not set"));
                Err(Stop::Exit(2))
            }
            None => Ok(value.unwrap_or_default()),
            Some((Change::Length, _)) => Ok(value.unwrap_or_default().chars().count().to_string()),
        }
    }

    /// A `case` pattern.
    async fn pattern(&mut self, word: &Word) -> Step<Vec<Glob>> {
        let mut pattern = Vec::new();
        for part in &word.0 {
            let plain = matches!(part, Part::Plain(_) | Part::Variable { quoted: false, .. });
            let (text, _) = self.part(part).await?;
            glob(&mut pattern, &text, plain);
        }
        Ok(pattern)
    }

    fn complain(&self, why: &str) {
        self.write(&self.io.stderr, format!("sh: {why}\n").as_bytes());
    }

    fn fails(&self, code: i32, why: &str) -> i32 {
        self.complain(why);
        code
    }

    /// Whether all of it was taken.
    fn write(&self, sink: &Sink, bytes: &[u8]) -> bool {
        match sink {
            Sink::Null => true,
            Sink::Process { stdout } => {
                self.output.write(*stdout, bytes);
                true
            }
            Sink::Pipe(pipe) => {
                let mut pipe = locked(pipe);
                let fits = pipe.len() + bytes.len() <= MAX_PIPE_BYTES;
                if fits {
                    pipe.extend_from_slice(bytes);
                }
                fits
            }
            // The right to write was checked when the file was opened.
            Sink::File(path) => self
                .process
                .change(|tree| match tree.look(path) {
                    Some(_) => tree.write(super::tree::ROOT, path, bytes, true).is_ok(),
                    None => true,
                })
                .unwrap_or(false),
        }
    }
}

/// A character of a pattern.
#[derive(Clone, Copy, Debug)]
enum Glob {
    Exactly(char),
    One,
    Many,
}

/// Adds a text to a pattern; in quotes it stands for itself.
fn glob(pattern: &mut Vec<Glob>, text: &str, plain: bool) {
    pattern.extend(text.chars().map(|c| match c {
        '*' if plain => Glob::Many,
        '?' if plain => Glob::One,
        c => Glob::Exactly(c),
    }));
}

/// Whether a pattern fits a whole text, in a time that grows with their lengths' product at most.
fn matches(pattern: &[Glob], text: &[char]) -> bool {
    let (mut p, mut t) = (0, 0);
    // The last `*`, and how far it reaches so far.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match (pattern.get(p), star) {
            (Some(Glob::Many), _) => {
                star = Some((p, t));
                p += 1;
            }
            (Some(Glob::One), _) => (p, t) = (p + 1, t + 1),
            (Some(Glob::Exactly(c)), _) if *c == text[t] => (p, t) = (p + 1, t + 1),
            (_, Some((at, reach))) => {
                star = Some((at, reach + 1));
                (p, t) = (at + 1, reach + 1);
            }
            (_, None) => return false,
        }
    }
    pattern[p..].iter().all(|glob| matches!(glob, Glob::Many))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, which takes too long for long patterns.
    fn fits(pattern: &[Glob], text: &[char]) -> bool {
        match (pattern.split_first(), text.split_first()) {
            (None, None) => true,
            (Some((Glob::Many, rest)), _) => {
                fits(rest, text) || text.split_first().is_some_and(|(_, text)| fits(pattern, text))
            }
            (Some((Glob::One, rest)), Some((_, text))) => fits(rest, text),
            (Some((Glob::Exactly(c), rest)), Some((first, text))) => c == first && fits(rest, text),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn patterns_fit_as_defined(pattern in "[ab*?]{0,8}", text in "[ab]{0,8}") {
            let mut globs = Vec::new();
            glob(&mut globs, &pattern, true);
            let text: Vec<char> = text.chars().collect();
            prop_assert_eq!(matches(&globs, &text), fits(&globs, &text));
        }

        #[test]
        fn no_text_breaks_the_parser(text in r#"([a-z$(){}'"\\|&;<>!*?# \n=:+-]|if|then|fi|case|esac|in|do|done|for|<<){0,60}"#) {
            let _either = parse::parse(&text);
        }

        #[test]
        fn sums_are_those_of_rust(a in -1000i64..1000, b in -1000i64..1000, c in 1i64..1000) {
            let value = |name: &str| (name == "v").then(|| b.to_string());
            let found = sum::evaluate(&format!("({a} + v) * 2 - v / {c} % 7"), &value);
            prop_assert_eq!(found, Ok((a + b) * 2 - b / c % 7));
        }
    }

    #[test]
    fn no_depth_breaks_the_parser() {
        for open in ["(", "$(", "${a:-", "\"$(", "if ", "$((", "{ ", "! ", "case a in a) ", "((((-", "<<A "] {
            let _either = parse::parse(&open.repeat(50_000));
        }
        assert!(sum::evaluate(&"(".repeat(50_000), &|_| None).is_err());
        assert!(sum::evaluate(&"-".repeat(50_000), &|_| None).is_err());
    }
}
