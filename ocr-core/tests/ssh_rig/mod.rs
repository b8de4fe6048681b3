//! Guests with a real OpenSSH server, made of this machine's own programs (see `boot`), as machines of a cloud.

#![allow(dead_code, reason = "each test program uses a part")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests: a fault ends them, and what is ignored is told")]

use std::{
    collections::HashMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use ocr_core::{
    ComputeBackend, ComputeCapabilities, Deletion, Nic, PowerAction, Result, Vm, VmFilter, VmId, VmSpec, VmState,
    memory::MemoryCloud,
};
use tempfile::TempDir;

/// Everything that a guest may take to start or to end, on a machine that is busy with other tests.
pub(crate) const BOOT: Duration = Duration::from_secs(60);

/// The password of root and of `user` in guests that take passwords.
pub(crate) const PASSWORD: &str = "canary-Passw0rd with ' and $";

/// Why guests cannot be started here; `None` when they can.
pub(crate) fn unable() -> Option<String> {
    let root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n");
    if !root {
        return Some("only root can start guests in namespaces".to_owned());
    }
    for program in ["/usr/sbin/sshd", "/usr/bin/ssh-keygen", "/usr/bin/unshare", "/usr/bin/tini", "/usr/bin/sudo"] {
        if !Path::new(program).is_file() {
            return Some(format!("there is no {program} (.ci/setup installs it)"));
        }
    }
    let allowed = unshare(Command::new("true")).stderr(Stdio::null()).status().is_ok_and(|status| status.success());
    (!allowed).then(|| "this system lets nobody make namespaces".to_owned())
}

/// `true` and a word about it when the tests cannot run here.
pub(crate) fn ignored() -> bool {
    let why = unable();
    if let Some(why) = &why {
        println!("ignored: {why}");
    }
    why.is_some()
}

fn unshare(inner: Command) -> Command {
    // The guest's clock begins with its boot.
    let uptime = fs::read_to_string("/proc/uptime").unwrap();
    let uptime = uptime.split('.').next().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--uts", "--ipc", "--time", "--boottime", &format!("-{uptime}"), "--"]);
    command.arg(inner.get_program()).args(inner.get_args());
    command
}

/// Key pairs that users have, made once for each test program.
pub(crate) struct Keys {
    folder: TempDir,
}

impl Keys {
    pub(crate) fn new() -> Self {
        Self { folder: TempDir::new().unwrap() }
    }

    /// Makes a key with these arguments for ssh-keygen and gives its text and its public half.
    pub(crate) fn make(&self, name: &str, arguments: &[&str]) -> (String, String) {
        let file = self.folder.path().join(name);
        if !file.exists() {
            keygen(&file, arguments);
        }
        let public = fs::read_to_string(file.with_extension("pub")).unwrap();
        (fs::read_to_string(&file).unwrap(), public)
    }

    pub(crate) fn ed25519(&self, name: &str) -> (String, String) {
        self.make(name, &["-t", "ed25519", "-N", ""])
    }
}

fn keygen(file: &Path, arguments: &[&str]) {
    let made = Command::new("ssh-keygen").args(["-q", "-C", "test"]).args(arguments).arg("-f").arg(file).output();
    let made = made.unwrap();
    assert!(made.status.success(), "ssh-keygen: {}", String::from_utf8_lossy(&made.stderr));
}

/// How a guest's SSH server behaves.
#[derive(Clone, Debug, Default)]
pub(crate) struct Setup {
    /// Public keys that open root and `user`.
    pub(crate) authorized: Vec<String>,
    /// Lines of its configuration; the first of each name counts.
    pub(crate) config: Vec<String>,
    /// Who may use sudo.
    pub(crate) sudoers: String,
}

impl Setup {
    pub(crate) fn with_key(public: &str) -> Self {
        Self { authorized: vec![public.to_owned()], ..Self::default() }
    }

    pub(crate) fn config(mut self, line: &str) -> Self {
        self.config.push(line.to_owned());
        self
    }
}

/// A guest: a disk, and a machine that runs or not.
pub(crate) struct Guest {
    disk: TempDir,
    pub(crate) at: SocketAddr,
    /// The outer process, and the end of the pipe that keeps it going.
    running: Option<Child>,
}

impl Guest {
    /// A guest that is off, with fresh host keys.
    pub(crate) fn new(setup: &Setup, port: u16) -> Self {
        let disk = tempfile::Builder::new().prefix("ocr-guest-").tempdir().unwrap();
        let root = disk.path();
        let text = |path: &str, text: &str, mode: u32| {
            let file = root.join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, text).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        };
        fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
        for (folder, mode) in
            [("tmp", 0o1777), ("var/tmp", 0o1777), ("root", 0o700), ("home/user", 0o755), ("run", 0o755)]
        {
            fs::create_dir_all(root.join(folder)).unwrap();
            fs::set_permissions(root.join(folder), fs::Permissions::from_mode(mode)).unwrap();
        }
        std::os::unix::fs::chown(root.join("home/user"), Some(1000), Some(1000)).unwrap();
        text(
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n\
             user:x:1000:1000::/home/user:/bin/bash\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
            0o644,
        );
        text("etc/group", "root:x:0:\nuser:x:1000:\nnogroup:x:65534:\n", 0o644);
        let hash = hashed(PASSWORD);
        text(
            "etc/shadow",
            &format!("root:{hash}:19000:0:99999:7:::\nsshd:!:19000::::::\nuser:{hash}:19000:0:99999:7:::\n"),
            0o600,
        );
        text("etc/nsswitch.conf", "passwd: files\ngroup: files\nshadow: files\nhosts: files\n", 0o644);
        text("etc/hosts", "127.0.0.1 localhost\n", 0o644);
        text("etc/os-release", "ID=debian\nPRETTY_NAME=\"Debian for tests\"\n", 0o644);
        let rules = "auth required pam_unix.so\naccount required pam_unix.so\nsession required pam_permit.so\n";
        text("etc/pam.d/other", rules, 0o644);
        text("etc/pam.d/su", &format!("auth sufficient pam_rootok.so\n{rules}"), 0o644);
        text("etc/pam.d/sudo", rules, 0o644);
        text("etc/sudoers", &setup.sudoers, 0o440);
        for file in ["etc/ld.so.cache", "etc/ld.so.conf"] {
            if let Ok(content) = fs::read(Path::new("/").join(file)) {
                fs::write(root.join(file), content).unwrap();
            }
        }
        if Path::new("/etc/alternatives").is_dir() {
            let copied = Command::new("cp").args(["-a", "/etc/alternatives"]).arg(root.join("etc")).status();
            assert!(copied.unwrap().success(), "no copy of /etc/alternatives");
        }
        fs::create_dir_all(root.join("etc/ssh/keys")).unwrap();
        for user in ["root", "user"] {
            text(&format!("etc/ssh/keys/{user}"), &setup.authorized.concat(), 0o644);
        }
        let mut config = setup.config.join("\n");
        config.push_str(
            "\nHostKey /etc/ssh/host_ed25519\nHostKey /etc/ssh/host_ecdsa\nAuthorizedKeysFile /etc/ssh/keys/%u\n\
             PermitRootLogin yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nUseDNS no\nPidFile none\n\
             LogLevel VERBOSE\n",
        );
        text("etc/ssh/sshd_config", &config, 0o644);
        let guest = Self { disk, at: SocketAddr::new(fresh_address(), port), running: None };
        guest.renew_host_keys();
        guest
    }

    /// New host keys, as after an installation from scratch.
    pub(crate) fn renew_host_keys(&self) {
        for kind in ["ed25519", "ecdsa"] {
            let file = self.root().join(format!("etc/ssh/host_{kind}"));
            let _ = fs::remove_file(&file);
            keygen(&file, &["-t", kind, "-N", ""]);
        }
    }

    pub(crate) fn root(&self) -> &Path {
        self.disk.path()
    }

    /// What the SSH server logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.root().join("console")).unwrap_or_default()
    }

    /// Starts it, and comes back before it has booted.
    pub(crate) fn power_on(&mut self) {
        if self.running.is_some() {
            return;
        }
        let mut boot = Command::new(boot_script());
        boot.arg(self.root()).arg("guest");
        boot.args(["-o", &format!("ListenAddress={}", self.at.ip()), "-p", &self.at.port().to_string()]);
        let console = fs::OpenOptions::new().create(true).append(true).open(self.root().join("console")).unwrap();
        let child =
            unshare(boot).stdin(Stdio::piped()).stdout(console.try_clone().unwrap()).stderr(console).spawn().unwrap();
        self.running = Some(child);
    }

    /// Pulls the plug; when it returns, nothing of the guest runs.
    pub(crate) fn power_off(&mut self) {
        let Some(mut child) = self.running.take() else { return };
        drop(child.stdin.take());
        let end = Instant::now() + BOOT;
        while Instant::now() < end {
            if child.try_wait().unwrap().is_some() {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = child.kill();
        let _ = child.wait();
    }

    /// Waits until its SSH server takes connections.
    pub(crate) fn wait(&self) {
        let end = Instant::now() + BOOT;
        while let Err(error) = TcpStream::connect(self.at) {
            assert!(Instant::now() < end, "no SSH server at {}: {error}; it says:\n{}", self.at, self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.power_off();
    }
}

fn boot_script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ssh_rig/boot")
}

/// The password as it is in /etc/shadow.
fn hashed(password: &str) -> String {
    let program = r#"my $p = <STDIN>; print crypt($p, "\$6\$saltsalt\$")"#;
    let mut perl =
        Command::new("perl").args(["-e", program]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    io::Write::write_all(&mut perl.stdin.take().unwrap(), password.as_bytes()).unwrap();
    String::from_utf8(perl.wait_with_output().unwrap().stdout).unwrap()
}

/// An address of this machine's own that nobody else uses: there are 16 million.
fn fresh_address() -> IpAddr {
    let random = uuid::Uuid::new_v4();
    let [a, b, c, ..] = random.into_bytes();
    Ipv4Addr::new(127, a.max(1), b, c.clamp(1, 254)).into()
}

/// Carries connections to a server, until it is told to cut them or to fall silent.
pub(crate) struct Wire {
    pub(crate) at: SocketAddr,
    state: tokio::sync::watch::Sender<WireState>,
    carried: Arc<()>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WireState {
    /// It carries.
    Fine,
    /// Connections are closed, and new ones too.
    Cut,
    /// Nothing is carried, and nothing is closed.
    Silent,
}

impl Wire {
    pub(crate) async fn to(server: SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let (state, seen) = tokio::sync::watch::channel(WireState::Fine);
        let carried = Arc::new(());
        let count = Arc::clone(&carried);
        let task = tokio::spawn(async move {
            let mut tasks = tokio::task::JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                let (seen, count) = (seen.clone(), Arc::clone(&count));
                tasks.spawn(async move {
                    carry(near, server, seen).await;
                    drop(count);
                });
            }
        });
        Self { at, state, carried, task }
    }

    /// Closes all connections, and then carries new ones.
    pub(crate) async fn cut_once(&self) {
        self.set(WireState::Cut);
        // Ours, and the listener's.
        while Arc::strong_count(&self.carried) > 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.set(WireState::Fine);
    }

    pub(crate) fn set(&self, state: WireState) {
        self.state.send(state).unwrap();
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn carry(
    mut near: tokio::net::TcpStream,
    server: SocketAddr,
    mut state: tokio::sync::watch::Receiver<WireState>,
) {
    if *state.borrow() == WireState::Cut {
        return;
    }
    let Ok(mut far) = tokio::net::TcpStream::connect(server).await else { return };
    loop {
        let now = *state.borrow_and_update();
        match now {
            WireState::Cut => return,
            WireState::Silent => drop(state.changed().await),
            WireState::Fine => tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut near, &mut far) => return,
                _ = state.changed() => {}
            },
        }
    }
}

/// A port that is free now, for guests at addresses of their own.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A cloud in memory whose machines are such guests.
#[derive(Clone)]
pub(crate) struct Cloud {
    memory: MemoryCloud,
    setup: Setup,
    pub(crate) port: u16,
    guests: Arc<Mutex<HashMap<VmId, Arc<Mutex<Guest>>>>>,
}

impl std::fmt::Debug for Cloud {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cloud").field("port", &self.port).finish_non_exhaustive()
    }
}

impl Cloud {
    pub(crate) fn new(setup: Setup) -> Self {
        Self { memory: MemoryCloud::new(), setup, port: free_port(), guests: Arc::default() }
    }

    /// A machine that runs and may still boot.
    pub(crate) async fn machine(&self, name: &str) -> VmId {
        let vm = self.create_vm(&MemoryCloud::tiny_spec(name)).await.unwrap().id;
        let end = Instant::now() + BOOT;
        while self.get_vm(vm).await.unwrap().state != VmState::Running {
            assert!(Instant::now() < end, "the machine does not run");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        vm
    }

    pub(crate) fn guest(&self, vm: VmId) -> Arc<Mutex<Guest>> {
        Arc::clone(&self.guests.lock().unwrap()[&vm])
    }

    /// Does something to a guest that takes its time.
    pub(crate) async fn with<R: Send + 'static>(
        &self,
        vm: VmId,
        act: impl FnOnce(&mut Guest) -> R + Send + 'static,
    ) -> R {
        let guest = self.guest(vm);
        tokio::task::spawn_blocking(move || act(&mut guest.lock().unwrap())).await.unwrap()
    }

    fn seen(&self, mut vm: Vm) -> Vm {
        vm.nics = match self.guests.lock().unwrap().get(&vm.id) {
            Some(guest) => {
                let address = guest.lock().unwrap().at.ip();
                vec![Nic { network: None, mac: None, addresses: vec![address] }]
            }
            None => Vec::new(),
        };
        vm
    }
}

#[async_trait]
impl ComputeBackend for Cloud {
    fn capabilities(&self) -> ComputeCapabilities {
        ComputeCapabilities { nics: false, ..self.memory.capabilities() }
    }

    async fn create_vm(&self, spec: &VmSpec) -> Result<Vm> {
        let vm = self.memory.create_vm(spec).await?;
        if spec.image != MemoryCloud::mute() && !self.guests.lock().unwrap().contains_key(&vm.id) {
            let (setup, port) = (self.setup.clone(), self.port);
            let guest = tokio::task::spawn_blocking(move || {
                let mut guest = Guest::new(&setup, port);
                guest.power_on();
                guest
            });
            let guest = guest.await.unwrap();
            self.guests.lock().unwrap().insert(vm.id, Arc::new(Mutex::new(guest)));
        }
        Ok(self.seen(vm))
    }

    async fn get_vm(&self, id: VmId) -> Result<Vm> {
        self.memory.get_vm(id).await.map(|vm| self.seen(vm))
    }

    async fn list_vms(&self, filter: &VmFilter) -> Result<Vec<Vm>> {
        let vms = self.memory.list_vms(filter).await?;
        Ok(vms.into_iter().map(|vm| self.seen(vm)).collect())
    }

    async fn set_power(&self, id: VmId, action: PowerAction) -> Result<()> {
        self.memory.set_power(id, action).await?;
        if self.guests.lock().unwrap().contains_key(&id) {
            self.with(id, move |guest| {
                if action != PowerAction::Start {
                    guest.power_off();
                }
                if !matches!(action, PowerAction::Stop { .. }) {
                    guest.power_on();
                }
            })
            .await;
        }
        Ok(())
    }

    async fn delete_vm(&self, id: VmId) -> Result<Deletion> {
        let deletion = self.memory.delete_vm(id).await?;
        let guest = self.guests.lock().unwrap().remove(&id);
        tokio::task::spawn_blocking(move || drop(guest)).await.unwrap();
        Ok(deletion)
    }
}
