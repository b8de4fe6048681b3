//! Real Redis servers for tests: on free loopback ports, in a temporary folder, gone with the test, also when it fails or
//! is killed. It needs Debian's `redis-server`, and `openssl` for encryption; nothing is shared with a server of the
//! machine's own.
//!
//! Other crates' tests take it in by its path: `#[path = "../../ocr-core/tests/support/redis.rs"] mod redis;`

#![allow(dead_code, clippy::unwrap_used, reason = "no test uses all of it; what fails here fails the test")]

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

const START: Duration = Duration::from_secs(20);
/// Ports of a cluster's own talk are chosen by us too, so that nothing depends on port + 10,000 being free.
const TRIES: usize = 5;

/// Why tests with Redis cannot run here, if they cannot.
pub(crate) fn missing() -> Option<&'static str> {
    static MISSING: OnceLock<Option<&str>> = OnceLock::new();
    *MISSING.get_or_init(|| {
        let there = Command::new("redis-server").arg("--version").stdout(Stdio::null()).status().is_ok();
        (!there).then_some("there is no redis-server on PATH")
    })
}

/// Ends a test that needs Redis where there is none, and says so. With `OCR_NEED_REDIS` set it fails instead.
macro_rules! need_redis {
    () => {
        if let Some(why) = $crate::redis::missing() {
            assert!(std::env::var_os("OCR_NEED_REDIS").is_none(), "{why}");
            eprintln!("ignored: {why}");
            return;
        }
    };
}

pub(crate) use need_redis;

/// How a server is set up beyond a bare one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    /// Every write is synced to the disk.
    pub(crate) append_only: bool,
    /// Speaks TLS alone.
    pub(crate) tls: bool,
    /// The password of user `default`.
    pub(crate) password: Option<String>,
    /// More lines of configuration.
    pub(crate) lines: Vec<String>,
}

impl Options {
    pub(crate) fn durable() -> Self {
        Self { append_only: true, ..Self::default() }
    }

    pub(crate) fn line(mut self, line: impl Into<String>) -> Self {
        self.lines.push(line.into());
        self
    }
}

/// A running server; dropping it kills it.
pub(crate) struct Server {
    pub(crate) port: u16,
    child: Option<Child>,
    folder: tempfile::TempDir,
    options: Options,
    sentinel: bool,
    alive: bool,
}

impl Server {
    /// A server by itself, ready.
    pub(crate) fn start(options: Options) -> Self {
        Self::begin(options, false, |_, _| String::new())
    }

    /// One that follows another.
    pub(crate) fn replica_of(master: &Self, options: Options) -> Self {
        let line = format!("replicaof 127.0.0.1 {}", master.port);
        let replica = Self::start(options.line(line).line("repl-diskless-sync-delay 0"));
        replica.wait_until("is in step with its master", |server| {
            server.info("replication").contains("master_link_status:up")
        });
        master.wait_until("knows its replica", |server| server.info("replication").contains("state=online"));
        replica
    }

    /// A Sentinel that watches this master under the name `ocr`; it takes it for dead after one second.
    pub(crate) fn sentinel_of(master: &Self, quorum: usize, options: Options) -> Self {
        let port = master.port;
        let auth = master.options.password.as_ref().map(|password| format!("sentinel auth-pass ocr {password}\n"));
        let sentinel = Self::begin(options, true, |_, _| {
            format!(
                "sentinel monitor ocr 127.0.0.1 {port} {quorum}\nsentinel down-after-milliseconds ocr 1000\n\
                 sentinel failover-timeout ocr 5000\nsentinel parallel-syncs ocr 1\n{}",
                auth.unwrap_or_default()
            )
        });
        sentinel.wait_until("sees the master", |server| {
            server.command(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "ocr"]).contains(&port.to_string())
        });
        sentinel
    }

    fn begin(options: Options, sentinel: bool, more: impl FnOnce(&Path, u16) -> String) -> Self {
        let folder = tempfile::Builder::new().prefix("ocr-redis-").tempdir().unwrap();
        let mut server = Self { port: free_port(), child: None, folder, options, sentinel, alive: false };
        if server.options.tls {
            make_certificates(server.folder.path());
        }
        let more = more(server.folder.path(), server.port);
        for attempt in 1.. {
            server.configure(&more);
            match server.run() {
                Ok(()) => break,
                // Somebody may have taken the port between our look and Redis' start.
                Err(why) if attempt < TRIES && why.contains("in use") => server.port = free_port(),
                Err(why) => panic!("redis-server does not start: {why}"),
            }
        }
        server
    }

    fn configure(&self, more: &str) {
        let folder = self.folder.path().display();
        let port = self.port;
        let mut text = format!("bind 127.0.0.1\ndaemonize no\ndir {folder}\nlogfile {folder}/log\nsave \"\"\n");
        if self.options.tls {
            write!(
                text,
                "port 0\ntls-port {port}\ntls-cert-file {folder}/server.crt\ntls-key-file {folder}/server.key\n\
                 tls-ca-cert-file {folder}/ca.crt\ntls-auth-clients no\n"
            )
            .unwrap();
        } else {
            writeln!(text, "port {port}").unwrap();
        }
        if self.options.append_only {
            text.push_str("appendonly yes\nappendfsync always\n");
        }
        if let Some(password) = &self.options.password {
            writeln!(text, "requirepass {password}").unwrap();
            if !self.sentinel {
                writeln!(text, "masterauth {password}").unwrap();
            }
        }
        for line in &self.options.lines {
            writeln!(text, "{line}").unwrap();
        }
        text.push_str(more);
        fs::write(self.folder.path().join("redis.conf"), text).unwrap();
    }

    fn run(&mut self) -> Result<(), String> {
        let log = self.folder.path().join("log");
        let _ = fs::remove_file(&log);
        // Killed with this process, however that ends.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "redis-server"]).arg(self.folder.path().join("redis.conf"));
        if self.sentinel {
            command.arg("--sentinel");
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(spawn(command));
        let end = Instant::now() + START;
        loop {
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                return Err(format!("{status}: {}", fs::read_to_string(&log).unwrap_or_default()));
            }
            // A password that is wanted is an answer too; while it loads it gives another.
            if let Ok(answer) = self.try_command(&["PING"])
                && !answer.contains("LOADING")
            {
                self.alive = true;
                return Ok(());
            }
            assert!(
                Instant::now() < end,
                "redis-server is not ready: {}",
                fs::read_to_string(&log).unwrap_or_default()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills it at once, as a power cut does to a process.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        self.alive = false;
    }

    /// Starts it again on the same port with what its files hold.
    pub(crate) fn restart(&mut self) {
        self.kill();
        self.run().unwrap_or_else(|why| panic!("redis-server does not start again: {why}"));
    }

    /// Stops it in its steps (SIGSTOP): connections stay, and nobody answers.
    pub(crate) fn pause(&self) {
        self.signal("STOP");
    }

    /// Lets it go on (SIGCONT).
    pub(crate) fn resume(&self) {
        self.signal("CONT");
    }

    fn signal(&self, name: &str) {
        let pid = self.child.as_ref().expect("the server runs").id().to_string();
        let status = Command::new("kill").args(["-s", name, &pid]).status().unwrap();
        assert!(status.success());
    }

    /// The certificate of the authority that signed the server's.
    pub(crate) fn authority_pem(&self) -> Vec<u8> {
        fs::read(self.folder.path().join("ca.crt")).unwrap()
    }

    /// The same, as a file.
    pub(crate) fn authority_file(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }

    /// What the server logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// A section of what it tells about itself.
    pub(crate) fn info(&self, section: &str) -> String {
        self.command(&["INFO", section])
    }

    /// Sends one command and gives the answer as text, errors beginning with `-`.
    pub(crate) fn command(&self, words: &[&str]) -> String {
        self.try_command(words).unwrap_or_else(|error| panic!("{words:?}: {error}\n{}", self.log()))
    }

    fn try_command(&self, words: &[&str]) -> std::io::Result<String> {
        if self.options.tls {
            return self.command_over_tls(words);
        }
        let stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut stream = BufReader::new(stream);
        if let Some(password) = &self.options.password {
            ask(&mut stream, &["AUTH", password])?;
        }
        ask(&mut stream, words)
    }

    fn command_over_tls(&self, words: &[&str]) -> std::io::Result<String> {
        let mut command = Command::new("redis-cli");
        command.args(["-p", &self.port.to_string(), "--tls", "--cacert"]).arg(self.authority_file());
        if let Some(password) = &self.options.password {
            command.env("REDISCLI_AUTH", password);
        }
        let output = command.args(words).stdin(Stdio::null()).output()?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(std::io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned())),
        }
    }

    /// Waits until something about it is so.
    pub(crate) fn wait_until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let end = Instant::now() + START;
        while !is_so(self) {
            assert!(Instant::now() < end, "the server at {} never {what}: {}", self.port, self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A master, a replica, and three Sentinels.
pub(crate) struct SentinelSet {
    pub(crate) servers: [Server; 2],
    pub(crate) sentinels: [Server; 3],
}

impl SentinelSet {
    pub(crate) fn start(options: &Options) -> Self {
        let master = Server::start(options.clone());
        let replica = Server::replica_of(&master, options.clone());
        let of_sentinels = Options { append_only: false, lines: Vec::new(), ..options.clone() };
        let sentinels = std::array::from_fn(|_| Server::sentinel_of(&master, 2, of_sentinels.clone()));
        for sentinel in &sentinels {
            sentinel.wait_until("knows the others and the replica", |server| {
                let known = server.command(&["SENTINEL", "MASTER", "ocr"]);
                let field = |name: &str| {
                    known.lines().skip_while(|line| *line != name).nth(1).map(str::to_owned).unwrap_or_default()
                };
                field("num-other-sentinels") == "2" && field("num-slaves") == "1"
            });
        }
        Self { servers: [master, replica], sentinels }
    }

    /// Index of the server that the Sentinels call the master.
    pub(crate) fn master(&self) -> usize {
        let told = self.sentinels[0].command(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "ocr"]);
        self.servers.iter().position(|server| told.contains(&server.port.to_string())).expect("a master")
    }

    /// Waits until the Sentinels call this one the master.
    pub(crate) fn wait_for_master(&self, index: usize) {
        let port = self.servers[index].port.to_string();
        for sentinel in &self.sentinels {
            sentinel.wait_until("sees the failover", |server| {
                server.command(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "ocr"]).contains(&port)
            });
        }
    }
}

/// Three masters that share the slots.
pub(crate) struct Cluster {
    pub(crate) nodes: [Server; 3],
}

impl Cluster {
    pub(crate) fn start() -> Self {
        let nodes: [Server; 3] = std::array::from_fn(|_| {
            let options = Options::default().line("cluster-enabled yes").line(format!("cluster-port {}", free_port()));
            Server::start(options.line("cluster-node-timeout 1000"))
        });
        let ranges = [("0", "5460"), ("5461", "10922"), ("10923", "16383")];
        for (node, (first, last)) in nodes.iter().zip(ranges) {
            assert_eq!(node.command(&["CLUSTER", "ADDSLOTSRANGE", first, last]).trim(), "+OK");
        }
        for node in &nodes[1..] {
            let talk = node.options.lines[1].rsplit(' ').next().unwrap().to_owned();
            let port = node.port.to_string();
            assert_eq!(nodes[0].command(&["CLUSTER", "MEET", "127.0.0.1", &port, &talk]).trim(), "+OK");
        }
        for node in &nodes {
            node.wait_until("is part of the cluster", |node| {
                node.command(&["CLUSTER", "INFO"]).contains("cluster_state:ok")
                    && node.command(&["CLUSTER", "NODES"]).matches("connected").count() >= 3
            });
        }
        Self { nodes }
    }
}

/// A port that nobody listens at now.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Starts a process from a thread that lives as long as this program: `--pdeathsig` is about the thread that started it.
fn spawn(command: Command) -> Child {
    type Order = (Command, mpsc::Sender<Child>);
    static STARTER: OnceLock<mpsc::Sender<Order>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, answer) in inbox {
                let _ = answer.send(command.spawn().expect("setpriv and redis-server start"));
            }
        });
        orders
    });
    let (answer, child) = mpsc::channel();
    starter.send((command, answer)).unwrap();
    child.recv().unwrap()
}

fn ask(stream: &mut BufReader<TcpStream>, words: &[&str]) -> std::io::Result<String> {
    let mut request = format!("*{}\r\n", words.len());
    for word in words {
        write!(request, "${}\r\n{word}\r\n", word.len()).unwrap();
    }
    stream.get_mut().write_all(request.as_bytes())?;
    let mut answer = String::new();
    read_answer(stream, &mut answer)?;
    Ok(answer)
}

/// Appends an answer, each part of it on a line of its own.
fn read_answer(stream: &mut BufReader<TcpStream>, answer: &mut String) -> std::io::Result<()> {
    let mut line = String::new();
    if stream.read_line(&mut line)? == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let line = line.trim_end();
    let count = || line[1..].parse::<i64>().map_err(std::io::Error::other);
    match line.as_bytes().first() {
        Some(b'$') => {
            if let Ok(length) = usize::try_from(count()?) {
                let mut bytes = vec![0; length + 2];
                stream.read_exact(&mut bytes)?;
                answer.push_str(&String::from_utf8_lossy(&bytes[..length]));
            }
            answer.push('\n');
        }
        Some(b'*') => {
            for _ in 0..count()?.max(0) {
                read_answer(stream, answer)?;
            }
        }
        _ => {
            answer.push_str(line);
            answer.push('\n');
        }
    }
    Ok(())
}

/// An authority of the test's own, and the server's certificate by it, for 127.0.0.1 and localhost.
fn make_certificates(folder: &Path) {
    let openssl = |words: &str| {
        let output = Command::new("openssl").args(words.split(' ')).current_dir(folder).output().expect("openssl runs");
        assert!(output.status.success(), "openssl {words}: {}", String::from_utf8_lossy(&output.stderr));
    };
    const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
    let mut names = File::create(folder.join("names")).unwrap();
    names.write_all(b"subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n").unwrap();
    openssl(&format!("req -x509 {KEY} -keyout ca.key -out ca.crt -subj /CN=ocr-test-authority"));
    openssl(&format!("req {KEY} -keyout server.key -out server.csr -subj /CN=localhost"));
    openssl("x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt");
}
