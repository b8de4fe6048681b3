//! Settings: the variables of the servers, read once, checked all together, and never from anywhere else.
//!
//! [`VARIABLES`] is the whole list; `--help`, `docs/CONFIGURATION.md` and the sample files are checked against it.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use ocr_core::{
    Owner,
    exec::{self, SecretStorage},
    fleet::FleetConfig,
    lifecycle::DeployConfig,
    package::registry,
    queue::scheduler::SchedulerConfig,
    seal::{SealKey, Sealer},
    state::redis::RedisConfig,
};
#[cfg(feature = "ssh")]
use ocr_core::{credentials::Credentials, ssh};
use ocr_grpc::executor::MAX_REPLY_OUTPUT_BYTES;
use secrecy::SecretString;

use crate::metrics::MetricsSettings;

mod redis;

/// One variable: what it is for and what is wanted of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// Another spelling that is read too.
    pub alias: Option<&'static str>,
    /// Which servers read it.
    pub servers: &'static [Server],
    /// When it must be given.
    pub wanted: Wanted,
    /// What it is when it is not given.
    pub default: Option<&'static str>,
    /// Whether its value is never shown.
    pub secret: bool,
    /// What it means, with its unit.
    pub about: &'static str,
}

/// When a variable must be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Always.
    Always,
    /// With `BACKEND=openstack`.
    WithOpenStack,
    /// Likewise, and `ocr_openstack::Config` checks it.
    ByOpenStack,
    /// Never.
    Optional,
}

/// A server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// `ocr-machiner`.
    Machiner,
    /// `ocr-executor`.
    Executor,
}

impl Server {
    /// The server's short name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Machiner => "machiner",
            Self::Executor => "executor",
        }
    }

    /// The program's name.
    pub fn program(self) -> &'static str {
        match self {
            Self::Machiner => "ocr-machiner",
            Self::Executor => "ocr-executor",
        }
    }

    fn port_variable(self) -> &'static str {
        match self {
            Self::Machiner => "MACHINER_PORT",
            Self::Executor => "EXECUTOR_PORT",
        }
    }
}

const BOTH: &[Server] = &[Server::Machiner, Server::Executor];
const MACHINER: &[Server] = &[Server::Machiner];
const EXECUTOR: &[Server] = &[Server::Executor];

const fn variable(name: &'static str, servers: &'static [Server], wanted: Wanted, about: &'static str) -> Variable {
    Variable { name, alias: None, servers, wanted, default: None, secret: false, about }
}

const fn optional(
    name: &'static str,
    servers: &'static [Server],
    default: Option<&'static str>,
    about: &'static str,
) -> Variable {
    Variable { name, alias: None, servers, wanted: Wanted::Optional, default, secret: false, about }
}

/// Every variable that a server reads.
pub const VARIABLES: &[Variable] = &[
    variable("GLOBAL_HOST", BOTH, Wanted::Always, "address to listen on, such as 127.0.0.1 or 0.0.0.0"),
    variable(
        "GLOBAL_INSECURE",
        BOTH,
        Wanted::Always,
        "true: certificates of the servers that we call are not verified (OpenStack, libvirt and Redis over TLS, the package registry); it never changes how we listen",
    ),
    Variable {
        alias: Some("Machiner_PORT"),
        ..variable("MACHINER_PORT", MACHINER, Wanted::Always, "port to listen on; 0 takes a free one and logs it")
    },
    variable("EXECUTOR_PORT", EXECUTOR, Wanted::Always, "port to listen on; 0 takes a free one and logs it"),
    optional("BACKEND", BOTH, Some("openstack"), "where machines are: openstack or libvirt"),
    variable("AUTH_URL", BOTH, Wanted::ByOpenStack, "Keystone's address, with or without /v3"),
    variable("CREDENTIAL_ID", BOTH, Wanted::ByOpenStack, "user name or application credential id"),
    Variable { secret: true, ..variable("CREDENTIAL_SECRET", BOTH, Wanted::ByOpenStack, "its password or secret") },
    variable("DOMAIN", BOTH, Wanted::ByOpenStack, "OpenStack domain, usually Default"),
    variable("PROJECT", BOTH, Wanted::ByOpenStack, "OpenStack project"),
    variable("GATEWAY_NETWORK", BOTH, Wanted::ByOpenStack, "OpenStack network that routers lead to"),
    variable("REGION", BOTH, Wanted::ByOpenStack, "OpenStack region"),
    optional(
        "OCR_CREDENTIAL_KIND",
        BOTH,
        None,
        "password or application; by default 32 hexadecimal digits in CREDENTIAL_ID are an application credential",
    ),
    optional("OCR_CA_FILE", BOTH, None, "file with the certificates of the authorities that signed OpenStack's"),
    Variable {
        wanted: Wanted::WithOpenStack,
        ..optional(
            "HYPERVISOR",
            BOTH,
            Some("qemu:///system"),
            "libvirt's connection address, such as qemu:///system or qemu+tcp://host/system",
        )
    },
    variable("HYPERVISOR_USER", BOTH, Wanted::WithOpenStack, "user name for libvirt over the network"),
    Variable {
        secret: true,
        ..variable("HYPERVISOR_PASSWORD", BOTH, Wanted::WithOpenStack, "password for libvirt over the network")
    },
    optional("HYPERVISOR_WAIT_TIMEOUT", BOTH, Some("300"), "seconds that a machine or its agent may take to be ready"),
    optional("HYPERVISOR_WAIT_INTERVAL", BOTH, Some("5"), "seconds between two looks, at most, while waiting"),
    optional(
        "DOMAIN_TYPE",
        BOTH,
        Some("auto"),
        "libvirt's virtualisation: kvm, qemu (emulation), or auto, which starts a small domain to find out",
    ),
    optional(
        "STORAGE_POOL",
        BOTH,
        Some("default"),
        "libvirt storage pool with the templates; machines' disks are made there",
    ),
    optional("GUEST", BOTH, Some("agent"), "how guests are acted in: agent (through the hypervisor) or ssh"),
    optional(
        "SSH_USER",
        BOTH,
        None,
        "account that guests are managed by over SSH, best root; without one only accounts of requests act",
    ),
    Variable { secret: true, ..optional("SSH_PASSWORD", BOTH, None, "its password") },
    optional("SSH_PASSWORD_FILE", BOTH, None, "file with its password, instead of SSH_PASSWORD"),
    optional("SSH_PRIVATE_KEY_FILE", BOTH, None, "file with its private key, without a passphrase"),
    optional("SSH_SUDO", BOTH, Some("false"), "whether that account becomes root by sudo, without a password"),
    optional("SSH_PORT", BOTH, Some("22"), "port of the guests' SSH servers"),
    optional(
        "SSH_ADDRESSES",
        BOTH,
        None,
        "ranges such as 10.0.0.0/8,192.0.2.0/24: a guest's address in the first that it has one in; by default its first",
    ),
    optional(
        "SSH_HOST_PATTERN",
        BOTH,
        None,
        "host name of a guest instead of its address, with {id}, {name}, {exercise} or {deployment}",
    ),
    optional("SSH_JUMP", BOTH, None, "host that connections to guests go through, as user@host or user@host:port"),
    Variable { secret: true, ..optional("SSH_JUMP_PASSWORD", BOTH, None, "password there") },
    optional(
        "SSH_JUMP_PRIVATE_KEY_FILE",
        BOTH,
        None,
        "file with the private key for it; without one and without a password, SSH_PRIVATE_KEY_FILE",
    ),
    optional("SSH_MAX_CONNECTIONS", BOTH, Some("256"), "SSH connections to guests at once"),
    optional(
        "SSH_LOGIN_GRACE",
        BOTH,
        Some("120"),
        "seconds that a first login may be refused before that is final: a guest that boots may not know the account yet",
    ),
    optional(
        "OWNER",
        BOTH,
        Some("ocr"),
        "tag on everything this installation makes; two installations on one hypervisor need two",
    ),
    optional(
        "STATE_STORE",
        BOTH,
        None,
        "where records are kept: redis (a server that several executors share), embedded (one file) or memory (lost at the end); by default embedded, and for the executor redis when it is told where that is",
    ),
    optional("STATE_FILE", BOTH, Some("/var/lib/ocr/SERVER.redb"), "file of the embedded store; one server each"),
    Variable {
        secret: true,
        ..optional(
            "STATE_KEY",
            EXECUTOR,
            None,
            "key that seals what is secret in the records: 32 bytes in hexadecimal digits or base64; `ocr key` makes one",
        )
    },
    optional(
        "STATE_KEY_FILE",
        EXECUTOR,
        None,
        "file with such keys instead, one a line: the first seals, all open, so that a key can be changed",
    ),
    optional(
        "SECRETS",
        EXECUTOR,
        Some("sealed"),
        "what becomes of conditions' environments: sealed (by the key; refused without one) or memory (lost at the server's end)",
    ),
    optional("REDIS_HOST", BOTH, None, "Redis server that keeps the records"),
    optional("REDIS_PORT", BOTH, Some("6379"), "its port"),
    optional("REDIS_USER", BOTH, None, "ACL user of Redis"),
    Variable { secret: true, ..optional("REDIS_PASSWORD", BOTH, None, "password for Redis") },
    optional("REDIS_DB", BOTH, Some("0"), "number of the database in Redis"),
    optional("REDIS_TLS", BOTH, Some("false"), "whether Redis and its Sentinels are spoken to by TLS"),
    optional(
        "REDIS_CA_FILE",
        BOTH,
        None,
        "file with the certificates of the authorities that signed Redis', instead of the system's",
    ),
    optional(
        "REDIS_SENTINELS",
        BOTH,
        None,
        "instead of REDIS_HOST: Sentinels that know the master, as host:port with commas between",
    ),
    optional("REDIS_SENTINEL_MASTER", BOTH, None, "the name under which they know it"),
    optional("REDIS_SENTINEL_USER", BOTH, None, "ACL user of the Sentinels"),
    Variable { secret: true, ..optional("REDIS_SENTINEL_PASSWORD", BOTH, None, "password for the Sentinels") },
    optional(
        "REDIS_CLUSTER",
        BOTH,
        None,
        "instead of REDIS_HOST: some nodes of a Redis cluster, as host:port with commas between",
    ),
    optional(
        "REDIS_PREFIX",
        BOTH,
        Some("OWNER-SERVER"),
        "in front of all keys in Redis; executors with the same one share their records",
    ),
    optional(
        "REDIS_WAIT_REPLICAS",
        BOTH,
        Some("0"),
        "replicas that must have a write before it counts as done; 1 or more makes failovers lose nothing",
    ),
    optional("REDIS_TIMEOUT", BOTH, Some("5"), "seconds that a call to Redis may take, reconnecting included"),
    optional(
        "PACKAGE_DIR",
        EXECUTOR,
        Some("/var/lib/ocr/packages"),
        "folder with Deputy packages, unpacked or as archives; where DEPUTY_REGISTRY is set, it must not be",
    ),
    optional(
        "DEPUTY_REGISTRY",
        EXECUTOR,
        None,
        "address of a Deputy registry, such as https://registry.example/; packages come from there and not from a folder",
    ),
    optional(
        "DEPUTY_CACHE_DIR",
        EXECUTOR,
        Some("/var/cache/ocr/packages"),
        "folder for packages from the registry; one server each",
    ),
    optional(
        "DEPUTY_CACHE_BYTES",
        EXECUTOR,
        Some("10737418240"),
        "what that folder may take, in bytes, beside packages in use",
    ),
    optional(
        "DEPUTY_CA_FILE",
        EXECUTOR,
        None,
        "file with the certificates of the authorities that signed the registry's",
    ),
    Variable {
        secret: true,
        ..optional("DEPUTY_TOKEN", EXECUTOR, None, "token for a registry that wants one for reading")
    },
    optional("DEPUTY_TOKEN_FILE", EXECUTOR, None, "file with that token, instead of DEPUTY_TOKEN"),
    optional(
        "MAX_CONNECTIONS",
        EXECUTOR,
        Some("50"),
        "operations in guests at once, over all machines and over all executors with the same Redis",
    ),
    optional(
        "LEASE_TTL",
        EXECUTOR,
        Some("30"),
        "seconds after which the machines of an executor that was killed, or cut off from Redis, go to the others",
    ),
    optional("ACTION_TIMEOUT", EXECUTOR, Some("300"), "seconds that one action in a guest may run"),
    optional(
        "CONDITION_REPLY",
        EXECUTOR,
        Some("executor_response"),
        "what ConditionService.create answers: executor_response, or identifier for the older Ranger",
    ),
    optional(
        "RECONCILE_INTERVAL",
        BOTH,
        Some("60"),
        "seconds between two looks for unfinished work; the first is at start",
    ),
    optional("SHUTDOWN_GRACE", BOTH, Some("25"), "seconds that work under way may take to end after SIGTERM"),
    optional(
        "METRICS_ADDRESS",
        BOTH,
        None,
        "address and port of the metrics page for Prometheus, such as 127.0.0.1:9100; without it there is none",
    ),
    optional(
        "METRICS_TOP",
        EXECUTOR,
        Some("100"),
        "conditions, and machines, that have metrics of their own: the latest ones",
    ),
    optional("REFLECTION", BOTH, Some("true"), "whether gRPC server reflection is served"),
    optional("LOG_LEVEL", BOTH, Some("INFO"), "ERROR, WARN, INFO, DEBUG or TRACE"),
    optional("LOG_DIR", BOTH, None, "folder for log files, one a day; without it, logs go to stderr"),
    optional("LOG_FILE_NAME", BOTH, Some("ocr-SERVER.log"), "beginning of the log files' names"),
];

/// The variables that `ocr_openstack::Config` reads and checks, but for GLOBAL_INSECURE.
const OPENSTACK: [&str; 9] = [
    "AUTH_URL",
    "CREDENTIAL_ID",
    "CREDENTIAL_SECRET",
    "OCR_CREDENTIAL_KIND",
    "DOMAIN",
    "PROJECT",
    "GATEWAY_NETWORK",
    "REGION",
    "OCR_CA_FILE",
];

/// What is wrong with the settings, all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults(pub Vec<String>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of the settings cannot be used:", self.0.len())?;
        self.0.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
    }
}

impl std::error::Error for Faults {}

/// Where variables come from; tests give their own.
pub trait Source {
    /// The variable's value, if it is set.
    fn get(&self, name: &str) -> Option<String>;
}

impl<F: Fn(&str) -> Option<String>> Source for F {
    fn get(&self, name: &str) -> Option<String> {
        self(name)
    }
}

impl Source for BTreeMap<String, String> {
    fn get(&self, name: &str) -> Option<String> {
        BTreeMap::get(self, name).cloned()
    }
}

/// The process's environment, with an env file below it: what is set in both is taken from the environment.
///
/// # Errors
/// When the file cannot be read, or a line of it is no assignment.
pub fn environment_over(file: Option<&Path>) -> Result<impl Source + use<>, Faults> {
    let below = match file {
        None => BTreeMap::new(),
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .map_err(|error| Faults(vec![format!("--env-file {}: {error}", path.display())]))?;
            parse_env_file(&text).map_err(|faults| {
                Faults(faults.into_iter().map(|fault| format!("{}: {fault}", path.display())).collect())
            })?
        }
    };
    Ok(move |name: &str| std::env::var(name).ok().or_else(|| below.get(name).cloned()))
}

/// Reads the form of an `.env` file: `NAME=value` lines, `#` comments, `export` and quotes allowed.
///
/// # Errors
/// Every line that is none of these.
pub fn parse_env_file(text: &str) -> Result<BTreeMap<String, String>, Vec<String>> {
    let (mut values, mut faults) = (BTreeMap::new(), Vec::new());
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let assignment = line.strip_prefix("export ").unwrap_or(line);
        match assignment.split_once('=') {
            Some((name, value)) if ocr_core::guest::check_variable_name(name.trim()).is_ok() => {
                values.insert(name.trim().to_owned(), unquote(value.trim()).to_owned());
            }
            // The line itself is not repeated: it may hold a secret.
            _ => faults.push(format!("line {number}: wants NAME=value")),
        }
    }
    if faults.is_empty() { Ok(values) } else { Err(faults) }
}

fn unquote(value: &str) -> &str {
    for quote in ['"', '\''] {
        if let Some(inner) = value.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote)) {
            return inner;
        }
    }
    // A comment after an unquoted value begins with a space.
    value.split(" #").next().unwrap_or(value).trim_end()
}

/// The settings of one server.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which server.
    pub server: Server,
    /// Where to listen.
    pub listen: SocketAddr,
    /// Whether the certificates of servers that we call go unverified.
    pub insecure: bool,
    /// Where machines are.
    pub backend: Backend,
    /// How guests are acted in.
    pub guest: Guest,
    /// Where records are kept.
    pub store: Store,
    /// The deployer's.
    pub deploy: DeployConfig,
    /// The executor's.
    pub exec: exec::Config,
    /// The queue's.
    pub queue: SchedulerConfig,
    /// The other executors', where the store is one that they share.
    pub fleet: Option<FleetConfig>,
    /// Where packages are.
    pub packages: Packages,
    /// What becomes of secrets that are needed again later.
    pub secrets: SecretStorage,
    /// Whether ConditionService.create answers in the older form.
    pub identifier_reply: bool,
    /// Between two reconciles.
    pub reconcile_interval: Duration,
    /// For work under way after SIGTERM.
    pub shutdown_grace: Duration,
    /// Whether reflection is served.
    pub reflection: bool,
    /// The metrics page, where there is one.
    pub metrics: Option<MetricsSettings>,
    /// Logging.
    pub log: LogSettings,
    /// What is set and has no effect, to warn of.
    pub warnings: Vec<String>,
    effective: Vec<(&'static str, String)>,
}

/// Where machines are.
#[derive(Clone, Debug)]
pub enum Backend {
    /// On one hypervisor.
    Libvirt(LibvirtSettings),
    /// In this process; only `ocr serve` and `ocr demo` offer it.
    Memory,
}

/// How guests are acted in.
#[derive(Clone, Debug)]
pub enum Guest {
    /// Through the backend's agent.
    Agent,
    /// Over SSH.
    #[cfg(feature = "ssh")]
    Ssh(Box<SshSettings>),
}

/// How to reach guests over SSH, and as whom.
#[cfg(feature = "ssh")]
#[derive(Clone, Debug)]
pub struct SshSettings {
    /// The account that all guests are managed by.
    pub account: Option<Credentials>,
    /// The port of their servers.
    pub port: u16,
    /// Which of their addresses.
    pub ranges: Vec<ssh::Range>,
    /// Or by which name.
    pub pattern: Option<String>,
    /// Connections.
    pub config: ssh::SshConfig,
}

/// How to reach libvirt.
#[derive(Clone, Debug)]
pub struct LibvirtSettings {
    /// Connection address.
    pub uri: String,
    /// User name over the network.
    pub user: Option<String>,
    /// Password over the network.
    pub password: Option<SecretString>,
    /// `kvm`, `qemu` or `auto`.
    pub domain_type: String,
    /// Storage pool.
    pub pool: String,
    /// Whether the hypervisor's certificate goes unverified.
    pub insecure: bool,
}

impl LibvirtSettings {
    /// The connection address with what GLOBAL_INSECURE adds to it.
    pub fn address(&self) -> String {
        let encrypted = self.uri.split(':').next().is_some_and(|scheme| scheme.ends_with("+tls"));
        if !self.insecure || !encrypted {
            return self.uri.clone();
        }
        let separator = if self.uri.contains('?') { '&' } else { '?' };
        format!("{}{separator}no_verify=1", self.uri)
    }
}

/// Where packages are.
#[derive(Clone, Debug)]
pub enum Packages {
    /// In a folder of this machine.
    Folder(PathBuf),
    /// In a registry.
    Registry(Box<registry::Config>),
}

/// Where records are kept.
#[derive(Clone, Debug)]
pub enum Store {
    /// On a server that several processes share.
    Redis(Box<RedisConfig>),
    /// In one file.
    Embedded(PathBuf),
    /// Nowhere: they are lost at the end.
    Memory,
}

/// Where logs go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogSettings {
    /// The least level that is written.
    pub level: tracing::Level,
    /// The folder of log files; none is stderr.
    pub dir: Option<PathBuf>,
    /// The beginning of the files' names.
    pub file_name: String,
}

impl Settings {
    /// Reads and checks all variables of a server.
    ///
    /// # Errors
    /// All faults at once, each with the variable's name.
    pub fn read(server: Server, source: &dyn Source) -> Result<Self, Faults> {
        Reader::new(server, source).settings()
    }

    /// The settings in effect as `NAME=value`, secrets hidden.
    pub fn effective(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.effective.iter().map(|(name, value)| (*name, value.as_str()))
    }
}

/// Reads variables, collecting faults instead of stopping at the first.
struct Reader<'a> {
    server: Server,
    source: &'a dyn Source,
    openstack: bool,
    faults: Vec<String>,
    warnings: Vec<String>,
    effective: Vec<(&'static str, String)>,
}

impl<'a> Reader<'a> {
    fn new(server: Server, source: &'a dyn Source) -> Self {
        Self { server, source, openstack: false, faults: Vec::new(), warnings: Vec::new(), effective: Vec::new() }
    }

    fn settings(mut self) -> Result<Settings, Faults> {
        let backend = self.choice("BACKEND", &["openstack", "libvirt"]);
        self.openstack = backend == "openstack";
        let listen = self.listen();
        let insecure = self.boolean("GLOBAL_INSECURE");
        let libvirt = self.libvirt(insecure);
        if self.openstack {
            for name in OPENSTACK {
                self.maybe(name);
            }
            if let Err(faults) = ocr_openstack::Config::from_lookup(|name| self.source.get(name)) {
                self.faults.extend(faults.0.iter().map(ToString::to_string));
            }
            self.faults.push("BACKEND: openstack is not in this version yet; set BACKEND=libvirt".to_owned());
        }
        let guest = self.guest();
        let owner = self.parsed::<Owner>("OWNER");
        let store = self.store(owner.as_ref(), insecure);
        let timeout = self.seconds("HYPERVISOR_WAIT_TIMEOUT", 1, 86_400);
        let interval = self.seconds("HYPERVISOR_WAIT_INTERVAL", 1, 3_600);
        let (action, connections, lease_ttl) = match self.server {
            Server::Executor => {
                let connections = self.number("MAX_CONNECTIONS", 1, 10_000) as usize;
                // Less leaves no time for a Redis that is busy, or starts again.
                (self.seconds("ACTION_TIMEOUT", 1, 86_400), connections, self.seconds("LEASE_TTL", 3, 3_600))
            }
            Server::Machiner => Default::default(),
        };
        let packages = match self.server {
            Server::Executor => self.packages(insecure),
            Server::Machiner => Packages::Folder(PathBuf::new()),
        };
        let secrets = self.only(Server::Executor, |r| r.secrets(&store));
        let reply = self.only(Server::Executor, |r| r.choice("CONDITION_REPLY", &["executor_response", "identifier"]));
        let reconcile_interval = self.seconds("RECONCILE_INTERVAL", 1, 86_400);
        let shutdown_grace = self.seconds("SHUTDOWN_GRACE", 0, 3_600);
        let reflection = self.boolean("REFLECTION");
        let metrics_address = self.parsed::<SocketAddr>("METRICS_ADDRESS");
        let top = self.only(Server::Executor, |r| r.number("METRICS_TOP", 0, 10_000) as usize);
        let log = self.log();
        let (Some(listen), Some(owner), true) = (listen, owner, self.faults.is_empty()) else {
            return Err(Faults(self.faults));
        };
        let mut deploy = DeployConfig::new(owner);
        deploy.ready_deadline = timeout;
        deploy.ready_interval = interval;
        let exec = exec::Config {
            action_deadline: action,
            ready_deadline: timeout,
            ready_interval: interval,
            reply_output_bytes: MAX_REPLY_OUTPUT_BYTES,
        };
        let queue = SchedulerConfig { max_connections: connections.max(1), ..SchedulerConfig::default() };
        Ok(Settings {
            server: self.server,
            listen,
            insecure,
            backend: Backend::Libvirt(libvirt),
            guest,
            fleet: matches!((self.server, &store), (Server::Executor, Store::Redis(_)))
                .then_some(FleetConfig { lease_ttl, max_connections: queue.max_connections }),
            store,
            deploy,
            exec,
            queue,
            packages,
            secrets,
            identifier_reply: reply == "identifier",
            reconcile_interval,
            shutdown_grace,
            reflection,
            metrics: metrics_address.map(|address| MetricsSettings { address, top }),
            log,
            warnings: self.warnings,
            effective: self.effective,
        })
    }

    fn only<T: Default>(&mut self, server: Server, read: impl FnOnce(&mut Self) -> T) -> T {
        if self.server == server { read(self) } else { T::default() }
    }

    fn listen(&mut self) -> Option<SocketAddr> {
        let host = self.text("GLOBAL_HOST");
        let port = self.parsed::<u16>(self.server.port_variable());
        let (false, Some(port)) = (host.is_empty(), port) else { return None };
        if let Ok(address) = host.parse::<IpAddr>() {
            return Some(SocketAddr::new(address, port));
        }
        match (host.as_str(), port).to_socket_addrs().map(|mut found| found.next()) {
            Ok(Some(address)) => Some(address),
            _ => {
                self.faults.push(format!("GLOBAL_HOST: {host:?} is neither an address nor a name of this machine"));
                None
            }
        }
    }

    fn libvirt(&mut self, insecure: bool) -> LibvirtSettings {
        LibvirtSettings {
            uri: self.text("HYPERVISOR"),
            user: self.maybe("HYPERVISOR_USER"),
            password: self.maybe("HYPERVISOR_PASSWORD").map(SecretString::from),
            domain_type: self.choice("DOMAIN_TYPE", &["auto", "kvm", "qemu"]),
            pool: self.text("STORAGE_POOL"),
            insecure,
        }
    }

    #[cfg(feature = "ssh")]
    fn guest(&mut self) -> Guest {
        if self.choice("GUEST", &["agent", "ssh"]) != "ssh" {
            return Guest::Agent;
        }
        let user = self.maybe("SSH_USER");
        let (password, file) = (self.maybe("SSH_PASSWORD"), self.file("SSH_PASSWORD_FILE"));
        if password.is_some() && file.is_some() {
            self.faults.push("SSH_PASSWORD_FILE: is set and so is SSH_PASSWORD; one of them is wanted".to_owned());
        }
        let password = password.or_else(|| file.map(|text| text.trim_end_matches(['\r', '\n']).to_owned()));
        let key = self.private_key("SSH_PRIVATE_KEY_FILE");
        let with = |user: &str, password: Option<String>, key: Option<SecretString>| {
            let credentials = Credentials::of(user).with_password(password.unwrap_or_default());
            credentials.with_private_key(key.unwrap_or_default())
        };
        if let Some(user) = &user
            && let Err(error) = ocr_core::guest::check_user_name(user)
        {
            self.faults.push(format!("SSH_USER: {}", error.message()));
        }
        match (&user, password.is_some() || key.is_some()) {
            (None, true) => {
                self.faults.push("SSH_USER: is not set, and there is a password or a key for it".to_owned())
            }
            (Some(_), false) => {
                self.faults.push("SSH_USER: wants SSH_PRIVATE_KEY_FILE, SSH_PASSWORD or SSH_PASSWORD_FILE".to_owned());
            }
            _ => {}
        }
        let account = user.map(|user| with(&user, password, key.clone()));
        let (jump_password, jump_key) =
            (self.maybe("SSH_JUMP_PASSWORD"), self.private_key("SSH_JUMP_PRIVATE_KEY_FILE"));
        let jump = self.maybe("SSH_JUMP").and_then(|text| {
            let found = parse_jump(&text);
            if found.is_none() {
                self.faults.push(format!("SSH_JUMP: wants user@host or user@host:port, got {text:?}"));
            }
            let (user, at) = found?;
            // What opens the guests often opens the way to them.
            let key = if jump_key.is_none() && jump_password.is_none() { key } else { jump_key };
            Some(ssh::Jump { at, credentials: with(&user, jump_password, key) })
        });
        let ranges = self.maybe("SSH_ADDRESSES").unwrap_or_default();
        let ranges = ranges.split(',').map(str::trim).filter(|text| !text.is_empty()).map(str::parse);
        let ranges = ranges.collect::<Result<Vec<ssh::Range>, _>>().unwrap_or_else(|error| {
            self.faults.push(format!("SSH_ADDRESSES: {}", error.message()));
            Vec::new()
        });
        let config = ssh::SshConfig {
            max_connections: self.number("SSH_MAX_CONNECTIONS", 1, 65_536) as usize,
            login_grace: self.seconds("SSH_LOGIN_GRACE", 0, 86_400),
            sudo: self.boolean("SSH_SUDO"),
            jump,
            ..ssh::SshConfig::default()
        };
        let pattern = self.maybe("SSH_HOST_PATTERN");
        if let Some(Err(error)) = pattern.as_deref().map(ssh::ComputeAddresses::check_pattern) {
            self.faults.push(format!("SSH_HOST_PATTERN: {}", error.message()));
        }
        let port = self.parsed::<std::num::NonZeroU16>("SSH_PORT").map_or(ssh::Endpoint::SSH_PORT, Into::into);
        Guest::Ssh(Box::new(SshSettings { account, port, ranges, pattern, config }))
    }

    #[cfg(not(feature = "ssh"))]
    fn guest(&mut self) -> Guest {
        if self.choice("GUEST", &["agent", "ssh"]) == "ssh" {
            self.faults.push("GUEST: this program was built without ssh; build it with `--features ssh`".to_owned());
        }
        Guest::Agent
    }

    /// The content of the file that a variable names.
    #[cfg(feature = "ssh")]
    fn file(&mut self, name: &'static str) -> Option<String> {
        let path = self.maybe(name)?;
        match std::fs::read_to_string(&path) {
            Ok(text) => Some(text),
            Err(error) => {
                self.faults.push(format!("{name}: {path:?} cannot be read: {error}"));
                None
            }
        }
    }

    #[cfg(feature = "ssh")]
    fn private_key(&mut self, name: &'static str) -> Option<SecretString> {
        let key = SecretString::from(self.file(name)?);
        if let Err(error) = ssh::check_private_key(&key) {
            self.faults.push(format!("{name}: {}", error.message()));
        }
        Some(key)
    }

    /// From one place, never from two: nobody could tell which package was installed.
    fn packages(&mut self, insecure: bool) -> Packages {
        let Some(url) = self.maybe("DEPUTY_REGISTRY") else {
            for name in
                ["DEPUTY_CACHE_DIR", "DEPUTY_CACHE_BYTES", "DEPUTY_CA_FILE", "DEPUTY_TOKEN", "DEPUTY_TOKEN_FILE"]
            {
                if self.is_given(name) {
                    self.warnings
                        .push(format!("{name} is set, but DEPUTY_REGISTRY is not: packages come from a folder"));
                }
            }
            return Packages::Folder(PathBuf::from(self.text("PACKAGE_DIR")));
        };
        if self.is_given("PACKAGE_DIR") {
            self.faults.push("PACKAGE_DIR: is set beside DEPUTY_REGISTRY; packages come from one of them".to_owned());
        }
        let mut config = registry::Config::new(url, self.text("DEPUTY_CACHE_DIR"));
        config.cache_bytes = self.number("DEPUTY_CACHE_BYTES", 1 << 20, 1 << 60);
        config.certificates = match (insecure, self.maybe("DEPUTY_CA_FILE")) {
            (true, _) => registry::Certificates::Unchecked,
            (false, Some(file)) => registry::Certificates::SystemAnd(file.into()),
            (false, None) => registry::Certificates::System,
        };
        config.token = self.secret("DEPUTY_TOKEN", "DEPUTY_TOKEN_FILE");
        if config.token.is_some() && config.url.trim_start().to_ascii_lowercase().starts_with("http:") {
            self.warnings.push("DEPUTY_TOKEN is sent unencrypted: DEPUTY_REGISTRY is an http address".to_owned());
        }
        if let Err(error) = config.check() {
            self.faults.push(error.message().to_owned());
        }
        Packages::Registry(Box::new(config))
    }

    /// A secret, or the first line of the file that has it.
    fn secret(&mut self, name: &'static str, file: &'static str) -> Option<SecretString> {
        let given = self.maybe(name);
        let Some(path) = self.maybe(file) else { return given.map(SecretString::from) };
        if given.is_some() {
            self.faults.push(format!("{file}: is set beside {name}; set one of them"));
            return None;
        }
        match std::fs::read_to_string(&path) {
            Ok(text) if !text.trim().is_empty() && text.trim().lines().count() == 1 => {
                Some(SecretString::from(text.trim()))
            }
            Ok(_) => {
                self.faults.push(format!("{file}: wants one line in {path}"));
                None
            }
            Err(error) => {
                self.faults.push(format!("{file}: {path}: {error}"));
                None
            }
        }
    }

    fn store(&mut self, owner: Option<&Owner>, insecure: bool) -> Store {
        let chosen = match self.is_given("STATE_STORE") {
            true => self.choice("STATE_STORE", &["redis", "embedded", "memory"]),
            false => {
                let chosen = if self.redis_by_default() { "redis" } else { "embedded" };
                self.effective.push(("STATE_STORE", chosen.to_owned()));
                chosen.to_owned()
            }
        };
        if chosen == "redis" {
            return self.redis(owner, insecure);
        }
        self.warn_of_unused_redis();
        match chosen.as_str() {
            "memory" => Store::Memory,
            _ => Store::Embedded(PathBuf::from(self.text("STATE_FILE"))),
        }
    }

    fn secrets(&mut self, store: &Store) -> SecretStorage {
        let in_memory = self.choice("SECRETS", &["sealed", "memory"]) == "memory";
        let key = self.maybe("STATE_KEY").map(|text| {
            let key = SealKey::parse(&text.into()).and_then(|key| Sealer::new(vec![key]));
            key.map_err(|error| format!("STATE_KEY: {}", error.message()))
        });
        let file = self
            .maybe("STATE_KEY_FILE")
            .map(|path| read_key_file(Path::new(&path)).map_err(|why| format!("STATE_KEY_FILE: {why}")));
        if in_memory && (key.is_some() || file.is_some()) {
            self.warnings.push("SECRETS=memory: nothing is sealed, and the key is not used".to_owned());
        }
        let sealer = match (key, file) {
            (None, None) => None,
            (Some(_), Some(_)) => {
                self.faults.push("STATE_KEY: give this or STATE_KEY_FILE, not both".to_owned());
                None
            }
            (Some(sealer), None) | (None, Some(sealer)) => sealer.map_err(|fault| self.faults.push(fault)).ok(),
        };
        match sealer {
            // Records in memory are no safer when they are sealed with a key beside them.
            _ if in_memory || (sealer.is_none() && matches!(store, Store::Memory)) => SecretStorage::Memory,
            Some(sealer) => SecretStorage::Sealed(Arc::new(sealer)),
            None => {
                self.warnings.push(
                    "there is no STATE_KEY or STATE_KEY_FILE: conditions with an environment are refused; `ocr key` makes a key"
                        .to_owned(),
                );
                SecretStorage::Refuse
            }
        }
    }

    fn log(&mut self) -> LogSettings {
        let level = self.text("LOG_LEVEL");
        let level = tracing::Level::from_str(&level).unwrap_or_else(|_| {
            self.faults.push(format!("LOG_LEVEL: wants ERROR, WARN, INFO, DEBUG or TRACE, got {level:?}"));
            tracing::Level::INFO
        });
        LogSettings { level, dir: self.maybe("LOG_DIR").map(PathBuf::from), file_name: self.text("LOG_FILE_NAME") }
    }

    /// Whether the variable has a value that is not its default.
    fn is_given(&self, name: &str) -> bool {
        self.source.get(name).is_some_and(|value| !value.trim().is_empty())
    }

    /// The variable's value or default; an empty value counts as not given.
    fn maybe(&mut self, name: &'static str) -> Option<String> {
        let variable = table_entry(name);
        let given = [Some(variable.name), variable.alias]
            .into_iter()
            .flatten()
            .find_map(|name| self.source.get(name))
            .map(|value| value.trim().to_owned())
            .filter(|value| !value.is_empty());
        let wanted = match variable.wanted {
            Wanted::Always => true,
            Wanted::WithOpenStack => self.openstack,
            Wanted::ByOpenStack | Wanted::Optional => false,
        };
        if given.is_none() && wanted {
            self.faults.push(format!("{name}: is not set; it is {}", variable.about));
            return None;
        }
        let value = given.or_else(|| variable.default.map(|text| text.replace("SERVER", self.server.name())));
        if let Some(value) = &value {
            self.effective.push((name, if variable.secret { "(hidden)".to_owned() } else { value.clone() }));
        }
        value
    }

    fn text(&mut self, name: &'static str) -> String {
        self.maybe(name).unwrap_or_default()
    }

    fn parsed<T: FromStr>(&mut self, name: &'static str) -> Option<T>
    where
        T::Err: fmt::Display,
    {
        let text = self.maybe(name)?;
        match text.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                self.faults.push(format!("{name}: {error}, got {text:?}; it is {}", table_entry(name).about));
                None
            }
        }
    }

    fn number(&mut self, name: &'static str, least: u64, most: u64) -> u64 {
        match self.parsed::<u64>(name) {
            Some(number) if !(least..=most).contains(&number) => {
                self.faults.push(format!("{name}: wants {least} to {most}, got {number}"));
                least
            }
            number => number.unwrap_or(least),
        }
    }

    fn seconds(&mut self, name: &'static str, least: u64, most: u64) -> Duration {
        Duration::from_secs(self.number(name, least, most))
    }

    fn boolean(&mut self, name: &'static str) -> bool {
        let Some(text) = self.maybe(name) else { return false };
        match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => true,
            "false" | "0" | "no" | "off" => false,
            _ => {
                self.faults.push(format!("{name}: wants true or false, got {text:?}"));
                false
            }
        }
    }

    fn choice(&mut self, name: &'static str, choices: &[&str]) -> String {
        let text = self.text(name).to_ascii_lowercase();
        if !choices.contains(&text.as_str()) {
            self.faults.push(format!("{name}: wants {}, got {text:?}", choices.join(" or ")));
        }
        text
    }
}

/// Reads a file of keys.
///
/// # Errors
/// What is wrong with it; keys are not repeated.
pub fn read_key_file(path: &Path) -> Result<Sealer, String> {
    let bytes = std::fs::metadata(path).and_then(|about| {
        if about.len() > MAX_KEY_FILE_BYTES {
            Err(std::io::ErrorKind::FileTooLarge.into())
        } else {
            std::fs::read(path)
        }
    });
    let text = bytes
        .map_err(|error| format!("{}: {error}", path.display()))
        .and_then(|bytes| String::from_utf8(bytes).map_err(|_| format!("{}: is no text", path.display())))?;
    Sealer::parse(&text.into()).map_err(|error| {
        let place = error.resource().map(|line| format!("{line}: ")).unwrap_or_default();
        format!("{}: {place}{}", path.display(), error.message())
    })
}

/// Far more than [`ocr_core::seal::MAX_KEYS`] keys with comments take.
const MAX_KEY_FILE_BYTES: u64 = 64 << 10;

/// `user@host`, `user@host:port`, and with an address of IPv6 `user@[address]:port`.
#[cfg(feature = "ssh")]
fn parse_jump(text: &str) -> Option<(String, ssh::Endpoint)> {
    let (user, at) = text.rsplit_once('@')?;
    let (host, port) = match at.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) })
        }
        None => at.split_once(':').map_or((at, None), |(host, port)| (host, Some(port))),
    };
    let port = port.map_or(Some(ssh::Endpoint::SSH_PORT), |port| port.parse().ok().filter(|port| *port > 0))?;
    let fine = !host.is_empty() && ocr_core::guest::check_user_name(user).is_ok();
    fine.then(|| (user.to_owned(), ssh::Endpoint::new(host, port)))
}

fn table_entry(name: &'static str) -> &'static Variable {
    match VARIABLES.iter().find(|variable| variable.name == name) {
        Some(variable) => variable,
        None => unreachable!("{name} is read but not in the table"),
    }
}

/// The table of all variables as Markdown; `docs/CONFIGURATION.md` holds exactly this.
pub fn as_markdown() -> String {
    let mut text = String::from("| variable | servers | mandatory | default | meaning |\n|---|---|---|---|---|\n");
    for variable in VARIABLES {
        let alias = variable.alias.map(|alias| format!(" (or `{alias}`)")).unwrap_or_default();
        let servers: Vec<_> = variable.servers.iter().map(|server| server.name()).collect();
        let wanted = match variable.wanted {
            Wanted::Always => "yes",
            Wanted::WithOpenStack | Wanted::ByOpenStack => "with `BACKEND=openstack`",
            Wanted::Optional => "no",
        };
        let default = variable.default.map(|default| format!("`{default}`")).unwrap_or_default();
        text += &format!(
            "| `{}`{alias} | {} | {wanted} | {default} | {} |\n",
            variable.name,
            servers.join(", "),
            variable.about
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn good() -> BTreeMap<String, String> {
        [("GLOBAL_HOST", "127.0.0.1"), ("GLOBAL_INSECURE", "False"), ("MACHINER_PORT", "9000"), ("BACKEND", "libvirt")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into()
    }

    fn with(name: &str, value: &str) -> Result<Settings, Faults> {
        let mut values = good();
        values.insert(name.to_owned(), value.to_owned());
        Settings::read(Server::Machiner, &values)
    }

    #[test]
    fn the_defaults_are_those_of_the_page() {
        let settings = Settings::read(Server::Machiner, &good()).unwrap();
        assert_eq!(settings.deploy.ready_deadline, Duration::from_secs(300));
        assert_eq!(settings.deploy.ready_interval, Duration::from_secs(5));
        assert!(matches!(settings.store, Store::Embedded(path) if path == Path::new("/var/lib/ocr/machiner.redb")));
        assert_eq!(settings.listen.to_string(), "127.0.0.1:9000");
    }

    #[test]
    fn all_faults_come_at_once() {
        let bad: BTreeMap<_, _> = [
            ("GLOBAL_INSECURE", "perhaps"),
            ("EXECUTOR_PORT", "70000"),
            ("BACKEND", "vmware"),
            ("HYPERVISOR_WAIT_TIMEOUT", "0"),
            ("MAX_CONNECTIONS", "many"),
            ("LOG_LEVEL", "LOUD"),
            ("OWNER", "no spaces please"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        let faults = Settings::read(Server::Executor, &bad).unwrap_err();
        for name in bad.keys().map(String::as_str).chain(["GLOBAL_HOST"]) {
            assert!(faults.0.iter().any(|fault| fault.starts_with(&format!("{name}: "))), "{name} in {faults}");
        }
    }

    #[test]
    fn openstacks_faults_come_with_the_others_and_say_what_this_version_lacks() {
        let faults = with("BACKEND", "openstack").unwrap_err();
        for name in ["AUTH_URL", "CREDENTIAL_ID", "CREDENTIAL_SECRET", "REGION", "GATEWAY_NETWORK", "HYPERVISOR_USER"] {
            assert!(faults.0.iter().any(|fault| fault.starts_with(name)), "{name} in {faults}");
        }
        assert!(faults.to_string().contains("BACKEND: openstack is not in this version yet"), "{faults}");
    }

    #[test]
    fn the_seeds_own_spelling_of_the_port_is_read() {
        let mut values = good();
        values.remove("MACHINER_PORT");
        values.insert("Machiner_PORT".to_owned(), "9001".to_owned());
        assert_eq!(Settings::read(Server::Machiner, &values).unwrap().listen.port(), 9001);
    }

    #[test]
    fn booleans_are_read_in_any_spelling() {
        for (text, want) in [("True", true), ("1", true), ("YES", true), ("false", false), ("0", false), ("No", false)]
        {
            assert_eq!(with("GLOBAL_INSECURE", text).unwrap().insecure, want, "{text}");
        }
        assert!(with("GLOBAL_INSECURE", "ja").is_err());
    }

    #[test]
    fn insecure_reaches_the_hypervisors_certificate_and_nothing_else() {
        for (uri, insecure, want) in [
            ("qemu+tls://h/system", "true", "qemu+tls://h/system?no_verify=1"),
            ("qemu+tls://h/system?pkipath=/x", "true", "qemu+tls://h/system?pkipath=/x&no_verify=1"),
            ("qemu+tls://h/system", "false", "qemu+tls://h/system"),
            ("qemu+tcp://h/system", "true", "qemu+tcp://h/system"),
            ("qemu:///system", "true", "qemu:///system"),
        ] {
            let mut values = good();
            values.insert("HYPERVISOR".to_owned(), uri.to_owned());
            values.insert("GLOBAL_INSECURE".to_owned(), insecure.to_owned());
            let settings = Settings::read(Server::Machiner, &values).unwrap();
            let Backend::Libvirt(libvirt) = settings.backend else { panic!("another backend") };
            assert_eq!(libvirt.address(), want);
        }
    }

    fn executor(more: &[(&str, &str)]) -> Result<Settings, Faults> {
        let mut values = good();
        values.insert("EXECUTOR_PORT".to_owned(), "7000".to_owned());
        values.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        Settings::read(Server::Executor, &values)
    }

    #[test]
    fn packages_come_from_a_folder_or_a_registry_and_never_from_both() {
        let settings = executor(&[]).unwrap();
        assert!(matches!(settings.packages, Packages::Folder(folder) if folder == Path::new("/var/lib/ocr/packages")));
        let settings = executor(&[("DEPUTY_TOKEN", "canary-7f3a")]).unwrap();
        assert!(settings.warnings.iter().any(|warning| warning.starts_with("DEPUTY_TOKEN is set, but")));

        let url = ("DEPUTY_REGISTRY", "https://registry.example/");
        let settings = executor(&[url, ("DEPUTY_CACHE_BYTES", "5000000"), ("DEPUTY_TOKEN", "canary-7f3a")]).unwrap();
        assert!(!format!("{settings:?}").contains("canary-7f3a"));
        let Packages::Registry(config) = settings.packages else { panic!("another source") };
        assert_eq!((config.url.as_str(), config.cache_bytes), (url.1, 5_000_000));
        assert_eq!(config.cache_folder, Path::new("/var/cache/ocr/packages"));
        assert_eq!(config.certificates, registry::Certificates::System);
        assert!(config.token.is_some());

        for (more, certificates) in [
            (("DEPUTY_CA_FILE", "/x.pem"), registry::Certificates::SystemAnd("/x.pem".into())),
            (("GLOBAL_INSECURE", "true"), registry::Certificates::Unchecked),
        ] {
            let Packages::Registry(config) = executor(&[url, more]).unwrap().packages else { panic!("another source") };
            assert_eq!(config.certificates, certificates);
        }
        for (more, fault) in [
            ([url, ("PACKAGE_DIR", "/srv")], "PACKAGE_DIR: is set beside DEPUTY_REGISTRY"),
            ([url, ("DEPUTY_REGISTRY", "registry")], "DEPUTY_REGISTRY: wants an address"),
            ([url, ("DEPUTY_CACHE_BYTES", "1")], "DEPUTY_CACHE_BYTES: wants 1048576 to"),
            ([url, ("DEPUTY_TOKEN_FILE", "/no/such/file")], "DEPUTY_TOKEN_FILE: /no/such/file: "),
        ] {
            let faults = executor(&more).unwrap_err();
            assert!(faults.0.iter().any(|one| one.starts_with(fault)), "{faults}");
        }
    }

    #[test]
    fn a_token_may_be_in_a_file() {
        use secrecy::ExposeSecret;

        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "canary-7f3a\n").unwrap();
        let path = ("DEPUTY_TOKEN_FILE", file.path().to_str().unwrap());
        let url = ("DEPUTY_REGISTRY", "https://registry.example/");
        let Packages::Registry(config) = executor(&[url, path]).unwrap().packages else { panic!("another source") };
        assert_eq!(config.token.as_ref().unwrap().expose_secret(), "canary-7f3a");
        assert!(executor(&[url, path, ("DEPUTY_TOKEN", "other")]).is_err());
        std::fs::write(file.path(), "one canary-7f3a\ntwo").unwrap();
        let faults = executor(&[url, path]).unwrap_err();
        assert!(!faults.to_string().contains("canary-7f3a"), "{faults}");
    }

    #[test]
    fn secrets_are_in_no_output() {
        let settings = with("HYPERVISOR_PASSWORD", "canary-7f3a").unwrap();
        let shown: Vec<_> = settings.effective().collect();
        assert!(shown.contains(&("HYPERVISOR_PASSWORD", "(hidden)")));
        assert!(!format!("{settings:?}{shown:?}").contains("canary-7f3a"));
    }

    #[cfg(feature = "ssh")]
    fn over_ssh(more: &[(&str, &str)]) -> Result<SshSettings, Faults> {
        let mut values = good();
        for (name, value) in [("GUEST", "ssh")].iter().chain(more) {
            values.insert((*name).to_owned(), (*value).to_owned());
        }
        match Settings::read(Server::Machiner, &values)?.guest {
            Guest::Ssh(ssh) => Ok(*ssh),
            Guest::Agent => panic!("the agent"),
        }
    }

    #[test]
    #[cfg(feature = "ssh")]
    fn ssh_is_read_with_secrets_from_files_and_shows_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("password");
        std::fs::write(&file, "canary-7f3a\n").unwrap();
        let file = file.to_str().unwrap();
        let settings = [
            ("SSH_USER", "debian"),
            ("SSH_PASSWORD_FILE", file),
            ("SSH_SUDO", "yes"),
            ("SSH_ADDRESSES", "10.0.0.0/8, fd00::/8"),
            ("SSH_JUMP", "me@[fd00::1]:2222"),
            ("SSH_JUMP_PASSWORD", "canary-7f3b"),
            ("SSH_HOST_PATTERN", "{name}.example"),
        ];
        let ssh = over_ssh(&settings).unwrap();
        assert_eq!((ssh.ranges.len(), ssh.config.sudo, ssh.port), (2, true, 22));
        assert_eq!(ssh.config.jump.as_ref().unwrap().at, ssh::Endpoint::new("fd00::1", 2222));
        let account = ssh.account.as_ref().unwrap();
        assert_eq!(secrecy::ExposeSecret::expose_secret(account.password.as_ref().unwrap()), "canary-7f3a");
        assert!(!format!("{ssh:?}").contains("canary"), "{ssh:?}");
        assert!(over_ssh(&[]).unwrap().account.is_none());
    }

    #[test]
    #[cfg(feature = "ssh")]
    fn every_fault_of_ssh_names_its_variable() {
        for (name, value) in [
            ("SSH_USER", "root"),
            ("SSH_PASSWORD", "x"),
            ("SSH_PASSWORD_FILE", "/no/such/file"),
            ("SSH_PRIVATE_KEY_FILE", "/etc/hostname"),
            ("SSH_ADDRESSES", "10.0.0.0/99"),
            ("SSH_JUMP", "host"),
            ("SSH_JUMP", "me@host:0"),
            ("SSH_PORT", "0"),
            ("SSH_HOST_PATTERN", "{ip}"),
            ("SSH_MAX_CONNECTIONS", "0"),
        ] {
            let faults = over_ssh(&[(name, value)]).unwrap_err();
            let named = if name == "SSH_PASSWORD" { "SSH_USER" } else { name };
            assert!(faults.0.iter().any(|fault| fault.starts_with(&format!("{named}: "))), "{name}={value}: {faults}");
        }
    }

    #[test]
    fn secrets_are_sealed_with_a_key_and_refused_without_one_unless_memory_is_told() {
        let key = SealKey::generate().reveal();
        let key = secrecy::ExposeSecret::expose_secret(&key);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("# ours\n{key}\n")).unwrap();
        let file = file.path().to_str().unwrap();
        let storage = |more: &[(&str, &str)]| executor(more).unwrap().secrets;
        assert!(matches!(storage(&[]), SecretStorage::Refuse));
        assert!(matches!(storage(&[("STATE_STORE", "memory")]), SecretStorage::Memory));
        assert!(matches!(storage(&[("SECRETS", "memory")]), SecretStorage::Memory));
        assert!(matches!(storage(&[("STATE_KEY", key)]), SecretStorage::Sealed(_)));
        assert!(matches!(storage(&[("STATE_KEY_FILE", file)]), SecretStorage::Sealed(_)));
        assert!(matches!(storage(&[("STATE_KEY_FILE", file), ("STATE_STORE", "memory")]), SecretStorage::Sealed(_)));
        assert_eq!(executor(&[]).unwrap().warnings.len(), 1);
        assert_eq!(executor(&[("STATE_KEY", key)]).unwrap().warnings, [""; 0]);
        assert!(!format!("{:?}", executor(&[("STATE_KEY", key)]).unwrap()).contains(key));
    }

    #[test]
    fn a_key_that_cannot_be_used_is_a_fault_that_does_not_repeat_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "\ncanary-7f3a\n").unwrap();
        let path = file.path().to_str().unwrap();
        for (more, want) in [
            (&[("STATE_KEY", "canary-7f3a")][..], "STATE_KEY: key: wants 32 bytes"),
            (&[("STATE_KEY_FILE", path)], "line 2: key: wants 32 bytes"),
            (&[("STATE_KEY_FILE", "/no/such/file")], "STATE_KEY_FILE: /no/such/file: No such file"),
            (&[("STATE_KEY", "x"), ("STATE_KEY_FILE", path)], "STATE_KEY: give this or STATE_KEY_FILE, not both"),
        ] {
            let faults = executor(more).unwrap_err().to_string();
            assert!(faults.contains(want) && !faults.contains("canary"), "{faults}");
        }
    }

    #[test]
    fn a_fault_in_an_env_file_does_not_repeat_the_line() {
        let faults = parse_env_file("A=1\nnot-an-assignment canary-7f3a\n").unwrap_err();
        assert_eq!(faults, ["line 2: wants NAME=value"]);
    }

    #[test]
    fn an_env_file_has_comments_quotes_and_exports() {
        let values = parse_env_file("# c\n\nexport A=1\nB=\"x # y\" \nC='z'\nD=a#b # c\nE=\n").unwrap();
        let want = [("A", "1"), ("B", "x # y"), ("C", "z"), ("D", "a#b"), ("E", "")];
        assert_eq!(values, want.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    }

    proptest! {
        #[test]
        fn reading_any_env_file_never_panics(text in any::<String>()) {
            let _ = parse_env_file(&text);
        }
    }

    fn docs(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name)
    }

    #[test]
    fn the_page_of_settings_is_the_table() {
        let page = std::fs::read_to_string(docs("CONFIGURATION.md")).unwrap();
        assert!(page.contains(&as_markdown()), "docs/CONFIGURATION.md wants this table:\n{}", as_markdown());
    }

    #[test]
    fn the_sample_files_are_good_settings() {
        for (server, file) in [(Server::Machiner, "samples/machiner.env"), (Server::Executor, "samples/executor.env")] {
            let values = parse_env_file(&std::fs::read_to_string(docs(file)).unwrap()).unwrap();
            Settings::read(server, &values).unwrap();
            for name in values.keys() {
                assert!(VARIABLES.iter().any(|variable| variable.name == name), "{file}: {name}");
            }
        }
    }
}
