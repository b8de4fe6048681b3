//! [`AgentGuest`] against the real QEMU guest agent, which runs here as a process and serves a socket. It acts on this
//! machine, so tests keep to a folder of their own.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a test says what it left out, and may panic")]

mod guest_support;

use std::{
    path::{Path, PathBuf},
    process::{Child, Command as Process, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use ocr_core::{
    Deletion, Error, ErrorKind, ExecRequest, GuestExec, GuestExecExt, OutputChunk, PutFile, Result, Retry, VmId,
    conformance::{Subject, assert_all},
    error::reason,
};
use ocr_libvirt::guest::{AgentGuest, AgentGuestConfig, AgentLink};
use proptest::prelude::*;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    sync::mpsc,
};

/// The agent and the folder it works in.
struct Rig {
    folder: TempDir,
    program: PathBuf,
    arguments: Vec<String>,
    process: Mutex<Option<Child>>,
    vm: VmId,
    commands: AtomicUsize,
    longest: AtomicUsize,
    connection: tokio::sync::Mutex<Option<BufReader<UnixStream>>>,
    /// The names of all commands, for tests that look.
    seen: Mutex<Vec<String>>,
}

impl Rig {
    fn start(arguments: &[&str]) -> Option<Arc<Self>> {
        let program = match guest_support::find("qemu-ga", "qemu-guest-agent") {
            Ok(program) => program,
            Err(why) => {
                println!("ignored: {why}");
                return None;
            }
        };
        let rig = Self {
            folder: TempDir::new().expect("a temporary folder"),
            program,
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            process: Mutex::default(),
            vm: VmId::random(),
            commands: AtomicUsize::default(),
            longest: AtomicUsize::default(),
            connection: tokio::sync::Mutex::default(),
            seen: Mutex::default(),
        };
        rig.revive();
        Some(Arc::new(rig))
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().expect("a plain path").to_owned()
    }

    fn kill(&self) {
        if let Some(mut child) = self.process.lock().unwrap().take() {
            child.kill().expect("the agent can be killed");
            child.wait().expect("the agent can be waited for");
        }
    }

    fn revive(&self) {
        let _ = std::fs::remove_file(self.path("socket"));
        let child = Process::new(&self.program)
            .args(["-m", "unix-listen", "-p", &self.path("socket"), "-t"])
            .arg(self.folder.path())
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the agent starts");
        *self.process.lock().unwrap() = Some(child);
    }

    fn guest(self: &Arc<Self>) -> AgentGuest<Socket> {
        let config = AgentGuestConfig { base: self.path("base"), ..AgentGuestConfig::default() };
        AgentGuest::with_config(Socket(self.clone()), config).expect("the settings are good")
    }

    fn count(&self, command: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|seen| *seen == command).count()
    }

    async fn exchange(&self, command: &str) -> Result<String> {
        let mut place = self.connection.lock().await;
        let mut stream = match place.take() {
            Some(stream) => stream,
            None => match UnixStream::connect(self.path("socket")).await {
                Ok(stream) => BufReader::new(stream),
                Err(cause) => {
                    return Err(Error::unavailable("QEMU guest agent is not connected")
                        .with_reason(reason::AGENT_NOT_READY)
                        .with_source(cause));
                }
            },
        };
        let mut answer = String::new();
        let sent = stream.write_all(format!("{command}\n").as_bytes()).await;
        let came = match sent {
            Ok(()) => stream.read_line(&mut answer).await,
            Err(cause) => Err(cause),
        };
        match came {
            Ok(count) if count > 0 => {
                *place = Some(stream);
                Ok(answer)
            }
            _ => Err(Error::unavailable("Guest agent disappeared while executing command")
                .with_reason(reason::AGENT_NOT_READY)
                .with_retry(Retry::Ambiguous)),
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The way to the agent.
struct Socket(Arc<Rig>);

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Socket")
    }
}

#[async_trait]
impl AgentLink for Socket {
    async fn command(&self, vm: VmId, command: &str, limit: Duration) -> Result<String> {
        if vm != self.0.vm {
            return Err(Error::not_found("no such machine").with_reason(reason::GUEST_GONE));
        }
        self.0.commands.fetch_add(1, Ordering::Relaxed);
        self.0.longest.fetch_max(command.len(), Ordering::Relaxed);
        let message: serde_json::Value = serde_json::from_str(command).expect("a command is JSON");
        self.0.seen.lock().unwrap().push(message["execute"].as_str().expect("a command has a name").to_owned());
        tokio::time::timeout(limit, self.0.exchange(command)).await.unwrap_or_else(|_| {
            Err(Error::unavailable("Guest agent not available for now")
                .with_reason(reason::AGENT_NOT_READY)
                .with_retry(Retry::Ambiguous))
        })
    }
}

async fn ready(rig: &Arc<Rig>) -> AgentGuest<Socket> {
    let guest = rig.guest();
    guest.wait_ready(rig.vm, Duration::from_secs(20), Duration::from_millis(50)).await.expect("the agent answers");
    guest
}

async fn wait_for(path: &str) {
    let end = Instant::now() + Duration::from_secs(20);
    while !Path::new(path).exists() {
        assert!(Instant::now() < end, "{path} did not come");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn it_conforms() {
    let Some(rig) = Rig::start(&[]) else { return };
    let guest: Arc<dyn GuestExec> = Arc::new(ready(&rig).await);
    let user = guest_support::is_root().then(|| "nobody".to_owned());
    let subject = Subject { guest: Some(guest), guest_vm: Some(rig.vm), guest_user: user, ..Subject::new() };
    assert_all(&subject).await;
    assert!(rig.longest.load(Ordering::Relaxed) < 200_000, "a message that libvirt may not carry");
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    (0..bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as u8
        })
        .collect()
}

#[tokio::test]
async fn it_says_who_it_is() {
    let Some(rig) = Rig::start(&[]) else { return };
    let info = ready(&rig).await.guest_info(rig.vm).await.unwrap();
    assert!(info.can_exec && info.can_files, "{info:?}");
    assert!(info.agent_version.contains('.') && !info.os_name.is_empty(), "{info:?}");
}

#[tokio::test]
async fn an_agent_that_is_not_there_is_not_ready_and_nothing_is_run() {
    let Some(rig) = Rig::start(&[]) else { return };
    let guest = ready(&rig).await;
    rig.kill();
    rig.connection.lock().await.take();
    let began = Instant::now();
    let path = rig.path("f");
    for error in [
        guest.guest_info(rig.vm).await.map(drop).unwrap_err(),
        guest.exec(rig.vm, &ExecRequest::shell(format!("touch {path}"))).await.map(drop).unwrap_err(),
        guest.put_file(rig.vm, &PutFile::new(path.clone(), "x")).await.unwrap_err(),
        guest.put_file(rig.vm, &PutFile::new(path.clone(), vec![0; 100_000])).await.unwrap_err(),
    ] {
        assert_eq!((error.kind(), error.reason()), (ErrorKind::Unavailable, Some(reason::AGENT_NOT_READY)), "{error}");
        assert_eq!(error.retry(), Retry::Safe, "{error}");
    }
    assert!(began.elapsed() < Duration::from_secs(2), "who asks first is told at once");
}

#[tokio::test]
async fn a_forbidden_command_is_its_own_error() {
    let Some(rig) = Rig::start(&["-b", "guest-exec,guest-get-osinfo"]) else { return };
    let guest = ready(&rig).await;
    let info = guest.guest_info(rig.vm).await.unwrap();
    assert!(!info.can_exec && info.can_files && info.os_name.is_empty(), "{info:?}");
    let error = guest.exec(rig.vm, &ExecRequest::shell("true")).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.reason(), error.retry()),
        (ErrorKind::Unsupported, Some(reason::AGENT_COMMAND_DISABLED), Retry::Never),
        "{error}"
    );
}

#[tokio::test]
async fn a_command_survives_the_agent_and_its_result_comes_after_its_restart() {
    let Some(rig) = Rig::start(&[]) else { return };
    let guest = ready(&rig).await;
    let (begun, go, count) = (rig.path("begun"), rig.path("go"), rig.path("count"));
    let line = format!(
        "echo x >>{count}; cat; echo \"$SECRET\"; touch {begun}; while [ ! -e {go} ]; do sleep 0.05; done; echo end >&2; exit 9"
    );
    let request = ExecRequest {
        stdin: Bytes::from_static(b"stdin\0\n"),
        environment: [("SECRET".to_owned(), "it's\n".to_owned())].into(),
        ..ExecRequest::shell(line)
    };
    let vm = rig.vm;
    let run = async { guest.exec(vm, &request).await };
    let restart = async {
        for round in 0..3 {
            wait_for(&begun).await;
            rig.kill();
            // While it is away: nobody answers.
            tokio::time::sleep(Duration::from_millis(100 * round)).await;
            rig.revive();
            let end = Instant::now() + Duration::from_secs(20);
            let asked = rig.count("guest-exec-status");
            while rig.count("guest-exec-status") < asked + 4 {
                assert!(Instant::now() < end, "nobody asks again");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        std::fs::write(&go, "").unwrap();
    };
    let (output, ()) = tokio::join!(run, restart);
    let output = output.unwrap();
    assert_eq!(output.exit_code, 9);
    assert_eq!(output.stdout, &b"stdin\0\nit's\n\n"[..]);
    assert_eq!(output.stderr, "end\n");
    assert_eq!(std::fs::read_to_string(&count).unwrap(), "x\n");
    // Nor does a repeat run it.
    assert_eq!(guest.exec(vm, &request).await.unwrap(), output);
    assert_eq!(std::fs::read_to_string(&count).unwrap(), "x\n");
}

#[tokio::test]
async fn files_and_big_outputs_get_through_an_agent_that_restarts() {
    let Some(rig) = Rig::start(&[]) else { return };
    let guest = Arc::new(ready(&rig).await);
    let content = Bytes::from(noise(3 << 20));
    let path = rig.path("big");
    let work = {
        let (guest, vm, path, content) = (guest.clone(), rig.vm, path.clone(), content.clone());
        async move {
            guest.put_file(vm, &PutFile::new(path.clone(), content)).await.unwrap();
            let output = guest.exec(vm, &ExecRequest::shell(format!("cat {path}"))).await.unwrap();
            (output.stdout, guest.get_file(vm, &path, 4 << 20).await.unwrap())
        }
    };
    let work = tokio::spawn(work);
    // Three restarts, each in the middle of something else.
    for command in ["guest-file-write", "guest-file-read", "guest-exec-status"] {
        let before = rig.count(command);
        let end = Instant::now() + Duration::from_secs(60);
        while rig.count(command) < before + 3 && !work.is_finished() {
            assert!(Instant::now() < end, "no {command}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        rig.kill();
        rig.revive();
    }
    let (output, got) = work.await.unwrap();
    assert!(output == content && got == content);
    let left: Vec<_> = std::fs::read_dir(rig.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_str().unwrap().starts_with(".ocr")), "{left:?}");
}

#[tokio::test]
async fn an_agent_that_never_comes_back_ends_the_wait_at_deadline_and_margin() {
    let Some(rig) = Rig::start(&[]) else { return };
    ready(&rig).await;
    let config = AgentGuestConfig { base: rig.path("base"), margin: Duration::from_secs(1), ..Default::default() };
    let guest = AgentGuest::with_config(Socket(rig.clone()), config).unwrap();
    let begun = rig.path("begun");
    let line = format!("touch {begun}; sleep 20");
    let request = ExecRequest { deadline: Duration::from_secs(2), ..ExecRequest::shell(line) };
    let began = Instant::now();
    let (result, ()) = tokio::join!(guest.exec(rig.vm, &request), async {
        wait_for(&begun).await;
        rig.kill();
    });
    let error = result.unwrap_err();
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Unavailable, Retry::Ambiguous), "{error}");
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_request_of_any_size_gets_through_in_messages_that_libvirt_can_carry() {
    let Some(rig) = Rig::start(&[]) else { return };
    let guest = ready(&rig).await;
    for bytes in [0, 1, 48 << 10, (48 << 10) + 1, 700_000] {
        let stdin = Bytes::from(noise(bytes));
        let request = ExecRequest { stdin: stdin.clone(), ..ExecRequest::argv(["cat"]) };
        assert!(guest.exec(rig.vm, &request).await.unwrap().stdout == stdin, "{bytes} bytes");
        let text: String = stdin.iter().map(|byte| char::from(byte % 26 + b'a')).collect();
        let output = guest.exec(rig.vm, &ExecRequest::shell(format!("printf %s '{text}'"))).await.unwrap();
        assert!(output.success() && output.stdout == text, "{bytes} letters");
        let path = rig.path("file");
        guest.put_file(rig.vm, &PutFile::new(path.clone(), stdin.clone())).await.unwrap();
        assert!(guest.get_file(rig.vm, &path, 1 << 20).await.unwrap() == stdin, "a file of {bytes} bytes");
    }
    assert!(rig.longest.load(Ordering::Relaxed) < 200_000, "{} bytes", rig.longest.load(Ordering::Relaxed));
    let staged: Vec<_> = std::fs::read_dir(rig.path("base/in")).unwrap().collect();
    assert!(staged.is_empty(), "{staged:?}");
}

#[tokio::test]
async fn outputs_around_every_limit_are_whole_or_cut_and_flagged() {
    let Some(rig) = Rig::start(&[]) else { return };
    let guest = ready(&rig).await;
    let path = rig.path("content");
    let content = noise(1 << 20);
    std::fs::write(&path, &content).unwrap();
    let inline = 512 << 10;
    for bytes in [0, 1, inline - 1, inline, inline + 1, 1 << 20] {
        for limit in [0, bytes.max(1) - 1, bytes, bytes + 1] {
            let line = format!("head -c {bytes} {path}; head -c {bytes} {path} >&2");
            let request = ExecRequest { output_limit_bytes: limit as u64, ..ExecRequest::shell(line) };
            let output = guest.exec(rig.vm, &request).await.unwrap();
            let want = &content[..bytes.min(limit)];
            assert!(output.stdout == want && output.stderr == want, "{bytes} bytes, limit {limit}");
            let cut = bytes > limit;
            assert_eq!((output.stdout_truncated, output.stderr_truncated), (cut, cut), "{bytes} bytes, limit {limit}");
        }
    }
}

#[tokio::test]
async fn nothing_secret_is_an_argument() {
    let Some(rig) = Rig::start(&[]) else { return };
    let guest = ready(&rig).await;
    // The line looks for itself among all processes; the pattern does not match its own text.
    let line =
        "for p in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$p 2>/dev/null; done | grep -c 'hidden[-]word'; : hidden-word";
    let request = ExecRequest {
        environment: [("A".to_owned(), "hidden-word".to_owned())].into(),
        stdin: Bytes::from_static(b"hidden-word"),
        ..ExecRequest::shell(line)
    };
    assert_eq!(guest.exec(rig.vm, &request).await.unwrap().stdout, "0\n");
}

#[tokio::test]
async fn output_is_sent_on_in_order_while_the_command_runs() {
    let Some(rig) = Rig::start(&[]) else { return };
    let guest = ready(&rig).await;
    let (sender, mut chunks) = mpsc::channel(1000);
    let go = rig.path("go");
    let line = format!("echo one; echo e1 >&2; while [ ! -e {go} ]; do sleep 0.05; done; seq 1 200000; echo e2 >&2");
    let request = ExecRequest { progress: Some(sender), ..ExecRequest::shell(line) };
    let run = guest.exec(rig.vm, &request);
    let listen = async {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        while let Some(chunk) = chunks.recv().await {
            match chunk {
                OutputChunk::Stdout(bytes) => out.extend_from_slice(&bytes),
                OutputChunk::Stderr(bytes) => err.extend_from_slice(&bytes),
            }
            if out == b"one\n" && err == b"e1\n" {
                // The command waits for this: that both came shows that they came early.
                std::fs::write(&go, "").unwrap();
            }
            if err == b"e1\ne2\n" {
                break;
            }
        }
        (out, err)
    };
    let (output, (out, err)) = tokio::join!(run, listen);
    let output = output.unwrap();
    assert!(output.stdout == out && output.stderr == err);
}

#[tokio::test]
async fn few_questions_are_asked() {
    let Some(rig) = Rig::start(&[]) else { return };
    let guest = ready(&rig).await;
    for _ in 0..5 {
        guest.exec(rig.vm, &ExecRequest::shell("true")).await.unwrap();
    }
    let before = (rig.count("guest-exec-status"), rig.commands.load(Ordering::Relaxed));
    for _ in 0..20 {
        guest.exec(rig.vm, &ExecRequest::shell("echo 42")).await.unwrap();
    }
    let asked = rig.count("guest-exec-status") - before.0;
    println!(
        "{:.1} questions and {:.1} commands for each exec",
        asked as f64 / 20.0,
        (rig.commands.load(Ordering::Relaxed) - before.1) as f64 / 20.0
    );
    assert!(asked <= 20 * 6, "{asked} questions for 20 commands");
    let before = rig.count("guest-exec-status");
    guest.exec(rig.vm, &ExecRequest::shell("sleep 2")).await.unwrap();
    let asked = rig.count("guest-exec-status") - before;
    assert!(asked <= 60, "{asked} questions in two seconds");
}

#[tokio::test]
async fn bad_requests_reach_no_guest() {
    let Some(rig) = Rig::start(&[]) else { return };
    let guest = ready(&rig).await;
    let before = rig.commands.load(Ordering::Relaxed);
    let user = |user: &str| ExecRequest { user: Some(user.to_owned()), ..ExecRequest::shell("true") };
    let variable = |name: &str| ExecRequest {
        environment: [(name.to_owned(), "1".to_owned())].into(),
        ..ExecRequest::shell("true")
    };
    for request in
        [user("0"), user("1000"), user("+0"), user("a\u{fffe}"), variable("UID"), variable("_"), variable("PPID")]
    {
        let error = guest.exec(rig.vm, &request).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{request:?}: {error}");
    }
    let odd = rig.path("a\u{fdd0}");
    let put = PutFile { mode: Some(0o10000), ..PutFile::new(rig.path("f"), "") };
    for error in [
        guest.put_file(rig.vm, &PutFile::new(odd.clone(), "")).await.unwrap_err(),
        guest.put_file(rig.vm, &put).await.unwrap_err(),
        guest.get_file(rig.vm, &odd, 1).await.unwrap_err(),
        guest.remove_file(rig.vm, &odd).await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    assert_eq!(rig.commands.load(Ordering::Relaxed), before);
}

#[tokio::test]
async fn errors_of_the_guest_have_their_kind() {
    let Some(rig) = Rig::start(&[]) else { return };
    let guest = ready(&rig).await;
    let get = |path: &str| {
        let path = path.to_owned();
        async { guest.get_file(rig.vm, &{ path }, 10).await.unwrap_err().kind() }
    };
    assert_eq!(get("/dev/zero").await, ErrorKind::Invalid);
    assert_eq!(get("/").await, ErrorKind::Invalid);
    assert_eq!(get(&rig.path("none")).await, ErrorKind::NotFound);
    let put = |path: String| async {
        guest.put_file(rig.vm, &PutFile { make_parents: true, ..PutFile::new(path, "x") }).await
    };
    assert_eq!(put("/proc/none/f".to_owned()).await.unwrap_err().kind(), ErrorKind::Internal);
    std::fs::write(rig.path("f"), "").unwrap();
    assert_eq!(put(rig.path("f/g")).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(guest.remove_file(rig.vm, &rig.path("f")).await.unwrap(), Deletion::Deleted);
}

/// Any text that a request may carry.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[^\\x00]{0,40}",
        2 => "[ \\t\\r\\n'\"\\\\$`*?~#;&|<>(){}!%=-]{0,30}",
        1 => proptest::collection::vec(any::<char>().prop_filter("no NUL", |c| *c != '\0'), 0..20).prop_map(String::from_iter),
        1 => Just("#ocr".to_owned()),
        1 => "[a-zé]{1500,3000}",
    ]
}

#[test]
fn any_arguments_environment_stdin_and_file_come_through() {
    let Some(rig) = Rig::start(&[]) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let guest = runtime.block_on(ready(&rig));
    let request = (
        proptest::collection::vec(text(), 0..5),
        proptest::collection::btree_map("[A-Z][A-Z0-9_]{0,8}", text(), 0..4),
        proptest::collection::vec(any::<u8>(), 0..3000),
        any::<bool>(),
        "[^\\x00/]{1,30}",
    );
    let config = ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let result = runner.run(&request, |(arguments, mut environment, stdin, with_stdin, name)| {
        for name in ["UID", "EUID", "PPID", "OPTIND", "LINENO", "SHELLOPTS", "BASHOPTS", "PATH"] {
            environment.remove(name);
        }
        let stdin = if with_stdin { Bytes::from(stdin) } else { Bytes::new() };
        // Ends each with a NUL, which none of them may have.
        let mut argv = vec![
            "/bin/sh".to_owned(),
            "-c".to_owned(),
            "printf '%s\\0' \"$@\"; env -0 >&2".to_owned(),
            "sh".to_owned(),
        ];
        argv.extend(arguments.iter().cloned());
        let request = ExecRequest { environment: environment.clone(), stdin: stdin.clone(), ..ExecRequest::argv(argv) };
        let output = runtime.block_on(guest.exec(rig.vm, &request)).unwrap();
        let mut want: Vec<u8> = arguments.iter().flat_map(|argument| [argument.as_bytes(), b"\0"].concat()).collect();
        if arguments.is_empty() {
            want = b"\0".to_vec();
        }
        prop_assert_eq!(&output.stdout[..], &want[..]);
        let seen: Vec<&[u8]> = output.stderr.split(|byte| *byte == 0).collect();
        for (name, value) in &environment {
            let want = format!("{name}={value}");
            prop_assert!(seen.contains(&want.as_bytes()), "{want:?} is not in the environment");
        }
        let request = ExecRequest { stdin: stdin.clone(), ..ExecRequest::argv(["cat"]) };
        prop_assert_eq!(&runtime.block_on(guest.exec(rig.vm, &request)).unwrap().stdout, &stdin);

        let path = rig.path(&name);
        if ocr_core::guest::check_guest_path(&path).is_ok()
            && !path.contains(|c: char| u32::from(c) & 0xfffe == 0xfffe || ('\u{fdd0}'..='\u{fdef}').contains(&c))
        {
            runtime.block_on(guest.put_file(rig.vm, &PutFile::new(path.clone(), stdin.clone()))).unwrap();
            prop_assert_eq!(&std::fs::read(&path).unwrap()[..], &stdin[..]);
            prop_assert_eq!(&runtime.block_on(guest.get_file(rig.vm, &path, 4096)).unwrap(), &stdin);
            prop_assert_eq!(runtime.block_on(guest.remove_file(rig.vm, &path)).unwrap(), Deletion::Deleted);
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}
