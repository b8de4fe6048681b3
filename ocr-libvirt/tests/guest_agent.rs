//! [`AgentGuest`] against the real QEMU guest agent, which runs here as a process and serves a socket. It acts on this
//! machine, so tests keep to a folder of their own.

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
    Command, Deletion, Error, ErrorKind, ExecRequest, GuestExec, OperationId, OutputChunk, PutFile, Result, Retry,
    VmId,
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
    /// One line per command, for tests that look.
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
        let wanted = format!("\"execute\":\"{command}\"");
        self.seen.lock().unwrap().iter().filter(|line| line.contains(&wanted)).count()
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
        self.0.seen.lock().unwrap().push(command.chars().take(100).collect());
        tokio::time::timeout(limit, self.0.exchange(command)).await.unwrap_or_else(|_| {
            Err(Error::unavailable("Guest agent not available for now")
                .with_reason(reason::AGENT_NOT_READY)
                .with_retry(Retry::Ambiguous))
        })
    }
}

async fn ready(rig: &Arc<Rig>) -> AgentGuest<Socket> {
    use ocr_core::GuestExecExt;
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
