//! What the tests of the programs share: programs as child processes that never outlive the tests.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::{
    ffi::OsStr,
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio},
    sync::{Mutex, OnceLock, mpsc},
    time::{Duration, Instant},
};

use ocr_grpc::client;
use tonic::transport::Channel;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

/// Longer than anything takes that does not boot a guest; reaching it is a failure.
pub(crate) const SOON: Duration = Duration::from_secs(60);
/// The longest TMPDIR under which a unix socket's name still fits into its 107 bytes.
const MAX_TEMP_BYTES: usize = 50;

/// Says something that is seen without `--nocapture` too.
pub(crate) fn say(text: impl AsRef<str>) {
    let _ = writeln!(std::io::stdout(), "{}", text.as_ref());
}

/// Fails the test when a future takes for ever.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    within(SOON, what, future).await
}

/// Fails the test when a future takes longer.
pub(crate) async fn within<T>(deadline: Duration, what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(deadline, future).await.unwrap_or_else(|_| panic!("not within {deadline:?}: {what}"))
}

/// Looks again and again until there is something to see.
pub(crate) async fn until<T>(deadline: Duration, what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + deadline;
    loop {
        if let Some(seen) = look().await {
            return seen;
        }
        assert!(Instant::now() < end, "not within {deadline:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

// --- a keeper for what must not be left -----------------------------------------------------------------------

/// One folder for this test process, and a helper process that clears up after it.
///
/// The helper waits for its stdin, a pipe from here, to close: that happens however this process ends. Then it kills the
/// programs that still run, runs `DOWN down FOLDER/libvirt` where there is such a folder, and removes the folder.
pub(crate) struct Keeper {
    folder: PathBuf,
    told: Mutex<ChildStdin>,
    _helper: Child,
}

const KEEPER: &str = r#"
cd /
pids=
while read -r verb pid; do
    case $verb in
        own) pids="$pids $pid" ;;
        let)
            kept=
            for p in $pids; do [ "$p" = "$pid" ] || kept="$kept $p"; done
            pids=$kept
            ;;
    esac
done
[ -z "$pids" ] || kill -KILL $pids
[ ! -e "$2/libvirt" ] || "$1" down "$2/libvirt"
rm -rf -- "$2"
"#;

/// This process's keeper.
pub(crate) fn keeper() -> &'static Keeper {
    static KEPT: OnceLock<Keeper> = OnceLock::new();
    KEPT.get_or_init(|| {
        let temp = std::env::temp_dir();
        let temp = if temp.as_os_str().len() > MAX_TEMP_BYTES { PathBuf::from("/tmp") } else { temp };
        let folder = tempfile::Builder::new().prefix("ocr-t").tempdir_in(temp).unwrap().keep();
        let down = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ocr-libvirt/tests/live/libvirtd");
        let mut helper = Command::new("sh")
            .args(["-c", KEEPER, "keeper"])
            .args([down.as_os_str(), folder.as_os_str()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A Ctrl-C for the tests is not one for the helper.
            .process_group(0)
            .spawn()
            .unwrap();
        Keeper { folder, told: Mutex::new(helper.stdin.take().unwrap()), _helper: helper }
    })
}

impl Keeper {
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// A new folder of this name with a number.
    pub(crate) fn new_folder(&self, name: &str) -> PathBuf {
        tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in(&self.folder).unwrap().keep()
    }

    pub(crate) fn tell(&self, verb: &str, pid: u32) {
        // Without a helper the tests go on; they clear up themselves as long as they can.
        let _ = writeln!(self.told.lock().unwrap(), "{verb} {pid}");
    }
}

// --- programs ---------------------------------------------------------------------------------------------------

pub(crate) const MACHINER: &str = env!("CARGO_BIN_EXE_ocr-machiner");
pub(crate) const EXECUTOR: &str = env!("CARGO_BIN_EXE_ocr-executor");
pub(crate) const OCR: &str = env!("CARGO_BIN_EXE_ocr");

/// A command with an environment of its own.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env_clear().stdin(Stdio::null());
    for name in ["PATH", "TMPDIR", "LLVM_PROFILE_FILE"] {
        command.envs(std::env::var_os(name).map(|value| (name, value)));
    }
    command
}

/// A server as a child process. It is killed when this is dropped, and when the test process ends.
pub(crate) struct Server {
    name: String,
    child: Child,
    address: String,
    log: PathBuf,
}

impl Server {
    /// Starts a server and waits until it says where it listens. Its log is added to the file.
    pub(crate) fn start(mut command: Command, log: &Path) -> Self {
        let name = Path::new(command.get_program()).file_name().and_then(OsStr::to_str).unwrap().to_owned();
        let stderr = File::options().create(true).append(true).open(log).unwrap();
        let mut child = command.stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        keeper().tell("own", child.id());
        let stdout = child.stdout.take().unwrap();
        let mut server = Self { name, child, address: String::new(), log: log.to_owned() };
        let (send, first) = mpsc::channel();
        // It ends with the server's stdout.
        std::thread::spawn(move || {
            let mut stdout = BufReader::new(stdout);
            let mut line = String::new();
            let _ = stdout.read_line(&mut line);
            let _ = send.send(line);
            let _ = stdout.read_to_end(&mut Vec::new());
        });
        let line = first.recv_timeout(SOON).unwrap_or_default();
        // `... listening on ADDRESS`, or the same as JSON.
        let address = match serde_json::from_str::<serde_json::Value>(&line) {
            Ok(json) => json["address"].as_str().unwrap_or_default().to_owned(),
            Err(_) => line.rsplit(' ').next().unwrap_or_default().trim().to_owned(),
        };
        assert!(
            address.contains(':'),
            "{} does not say where it listens: {line:?}\n{}",
            server.name,
            server.log_tail()
        );
        server.address = address;
        server
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) async fn channel(&self) -> Channel {
        soon("connect", client::connect(&self.url())).await.unwrap()
    }

    /// Waits until the server says that it is ready, which it does when what an earlier process left is in order.
    pub(crate) async fn serving(&self, deadline: Duration) {
        let mut health = HealthClient::new(self.channel().await);
        until(deadline, &format!("{} is SERVING", self.name), async || {
            let answer = health.check(HealthCheckRequest { service: String::new() }).await.ok()?.into_inner();
            (answer.status() == ServingStatus::Serving).then_some(())
        })
        .await;
    }

    pub(crate) fn signal(&self, signal: &str) {
        send_signal(signal, self.child.id());
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    /// SIGTERM, and what the server made of it.
    pub(crate) async fn terminate(mut self) -> ExitStatus {
        self.signal("TERM");
        let status =
            until(SOON, &format!("{} ends after SIGTERM", self.name), async || self.child.try_wait().unwrap()).await;
        self.end();
        status
    }

    /// Resident memory in KiB.
    pub(crate) fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    pub(crate) fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let text = self.log_text();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        // Its number stays taken until the wait, so the keeper never kills somebody else.
        keeper().tell("let", self.child.id());
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            say(format!("--- the last lines of {}'s log:\n{}\n---", self.name, self.log_tail()));
        }
    }
}

/// Sends a signal to one process.
pub(crate) fn send_signal(signal: &str, pid: u32) {
    let status = Command::new("kill").args([format!("-{signal}"), pid.to_string()]).status().unwrap();
    assert!(status.success(), "kill -{signal} {pid}");
}

// --- the command line -------------------------------------------------------------------------------------------

/// What a finished `ocr` said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Said {
    /// Its stdout, after success.
    #[track_caller]
    pub(crate) fn fine(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout
    }

    /// Its stdout as JSON, one value a line, after success.
    #[track_caller]
    pub(crate) fn json_lines(self) -> Vec<serde_json::Value> {
        self.fine().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Its stdout as one JSON value, after success.
    #[track_caller]
    pub(crate) fn json(self) -> serde_json::Value {
        let mut lines = self.json_lines();
        assert_eq!(lines.len(), 1, "{lines:?}");
        lines.remove(0)
    }

    /// Its stderr, after failure.
    #[track_caller]
    pub(crate) fn failed(self) -> String {
        assert_eq!(self.code, Some(1), "{self:?}");
        self.stderr
    }
}

/// Runs a command to its end, within the deadline.
pub(crate) async fn run(deadline: Duration, mut command: Command) -> Said {
    let what = format!("{command:?}");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = child.id();
    keeper().tell("own", pid);
    let (send, done) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let output = child.wait_with_output();
        let _ = send.send(output);
    });
    let done = tokio::time::timeout(deadline, done).await;
    if done.is_err() {
        send_signal("KILL", pid);
    }
    keeper().tell("let", pid);
    done.unwrap_or_else(|_| panic!("not within {deadline:?}: {what}")).unwrap().unwrap().into()
}

// --- packages ---------------------------------------------------------------------------------------------------

/// A file of a package: its name there, its content, where it goes in the guest, its mode.
pub(crate) type Asset<'a> = (&'a str, &'a [u8], &'a str, &'a str);

/// Writes a package into a folder of packages. `content` is the manifest from `[content]` on.
pub(crate) fn write_package(folder: &Path, name: &str, assets: &[Asset<'_>], content: &str) {
    let package = folder.join(name);
    std::fs::create_dir_all(&package).unwrap();
    for (file, bytes, ..) in assets {
        std::fs::write(package.join(file), bytes).unwrap();
    }
    std::fs::write(package.join("package.toml"), manifest(name, assets, content)).unwrap();
}

/// A `package.toml`.
pub(crate) fn manifest(name: &str, assets: &[Asset<'_>], content: &str) -> String {
    let assets: Vec<_> = assets.iter().map(|(file, _, to, mode)| format!("[{file:?}, {to:?}, {mode:?}]")).collect();
    format!(
        "[package]\nname = {name:?}\nversion = \"1.0.0\"\nlicense = \"MIT\"\nassets = [{}]\n\n[content]\n{content}",
        assets.join(", ")
    )
}
