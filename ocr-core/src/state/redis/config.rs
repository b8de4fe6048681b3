//! [`RedisConfig`]: where the server is and how it is spoken to.

use std::{fmt, time::Duration};

use deadpool_redis::redis::{
    Client, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisConnectionInfo, RedisError, TlsCertificates,
};
use secrecy::{ExposeSecret, SecretString};

use crate::{Error, Result};

/// How long a call may take when nothing else is said.
const DEADLINE: Duration = Duration::from_secs(5);
const MAX_PREFIX_BYTES: usize = 64;

/// Where Redis is and how it is spoken to. `Debug` shows no secret.
#[derive(Clone, Debug)]
pub struct RedisConfig {
    /// Which servers to ask.
    pub place: Place,
    /// User and password of the servers that hold the records.
    pub login: Login,
    /// Number of the database; a cluster has only 0.
    pub db: u32,
    /// Encryption; without it everything is in clear, the password too.
    pub tls: Option<Tls>,
    /// In front of all keys and topics, so that several installations can share a server: 1 to 64 ASCII letters,
    /// digits and `- _ .`.
    pub prefix: String,
    /// So many replicas must confirm a write before it is answered. 0 waits for none.
    pub wait_replicas: u32,
    /// How long a call may take, reconnecting included.
    pub deadline: Duration,
}

/// Which servers to ask.
#[derive(Clone, Debug)]
pub enum Place {
    /// One server.
    Single(Address),
    /// A master that Sentinels watch.
    Sentinel {
        /// The Sentinels; any one that answers will do.
        sentinels: Vec<Address>,
        /// The name under which they know the master.
        master: String,
        /// User and password of the Sentinels themselves.
        login: Login,
    },
    /// A cluster, through any of these nodes.
    Cluster(Vec<Address>),
}

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Name or IP address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl Address {
    /// A host and a port.
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self { host: host.into(), port }
    }

    /// Reads `host`, `host:port`, `[v6]` and `[v6]:port`.
    ///
    /// # Errors
    /// What is wanted.
    pub fn parse(text: &str, default_port: u16) -> Result<Self, String> {
        let wanted = || format!("wants host:port, got {}", crate::id::shown(text));
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, rest) = rest.split_once(']').ok_or_else(wanted)?;
                (host, rest.strip_prefix(':').or(rest.is_empty().then_some("")).ok_or_else(wanted)?)
            }
            // An IPv6 address without brackets has no port.
            None if text.matches(':').count() > 1 => (text, ""),
            None => text.split_once(':').unwrap_or((text, "")),
        };
        let port = if port.is_empty() { default_port } else { port.parse().map_err(|_| wanted())? };
        if host.is_empty() || port == 0 || host.contains(|c: char| c.is_whitespace() || matches!(c, '/' | '@')) {
            return Err(wanted());
        }
        Ok(Self::new(host, port))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// User and password; both may be missing.
#[derive(Clone, Debug, Default)]
pub struct Login {
    /// The ACL user; none is `default`.
    pub user: Option<String>,
    /// The password.
    pub password: Option<SecretString>,
}

/// Encryption by TLS.
#[derive(Clone, Default)]
pub struct Tls {
    /// Certificates of the authorities to trust, as PEM; none trusts the system's.
    pub authorities_pem: Option<Vec<u8>>,
    /// Whether certificates go unverified.
    pub insecure: bool,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let own = self.authorities_pem.is_some();
        f.debug_struct("Tls").field("own_authorities", &own).field("insecure", &self.insecure).finish()
    }
}

impl RedisConfig {
    /// One server without a password, the prefix `ocr`, 5 s for a call.
    pub fn new(place: Place) -> Self {
        Self {
            place,
            login: Login::default(),
            db: 0,
            tls: None,
            prefix: "ocr".to_owned(),
            wait_replicas: 0,
            deadline: DEADLINE,
        }
    }

    /// Checks what can be checked without asking a server.
    pub(super) fn check(&self) -> Result<()> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if self.prefix.is_empty() || self.prefix.len() > MAX_PREFIX_BYTES || !self.prefix.chars().all(allowed) {
            return Err(Error::invalid(
                "prefix",
                format_args!(
                    "wants 1 to {MAX_PREFIX_BYTES} ASCII letters, digits and - _ . (REDIS_PREFIX), got {}",
                    crate::id::shown(&self.prefix)
                ),
            ));
        }
        if self.deadline.is_zero() {
            return Err(Error::invalid("deadline", "wants more than 0 s (REDIS_TIMEOUT)"));
        }
        match &self.place {
            Place::Sentinel { sentinels, .. } if sentinels.is_empty() => {
                return Err(Error::invalid("sentinels", "wants at least one address (REDIS_SENTINELS)"));
            }
            Place::Sentinel { master, .. } if master.is_empty() => {
                return Err(Error::invalid("master", "wants the master's name (REDIS_SENTINEL_MASTER)"));
            }
            Place::Cluster(nodes) if nodes.is_empty() => {
                return Err(Error::invalid("cluster", "wants at least one address (REDIS_CLUSTER)"));
            }
            Place::Cluster(_) if self.db != 0 => {
                return Err(Error::invalid("db", "wants 0 in a cluster, which has no other (REDIS_DB)"));
            }
            _ => {}
        }
        // Certificates are read here, so that a broken file is told at once and not at the first call.
        self.client(&Address::new("localhost", 6379), &self.login, 0).map(drop)
    }

    /// How to reach an address with this login.
    pub(super) fn client(&self, address: &Address, login: &Login, db: u32) -> Result<Client> {
        let bad = |error: RedisError| {
            Error::invalid("authorities_pem", "wants certificates as PEM (REDIS_CA_FILE)").with_source(error)
        };
        let mut settings =
            RedisConnectionInfo::default().set_db(i64::from(db)).set_lib_name("ocr", env!("CARGO_PKG_VERSION"));
        if let Some(user) = &login.user {
            settings = settings.set_username(user);
        }
        if let Some(password) = &login.password {
            settings = settings.set_password(password.expose_secret());
        }
        let (host, port) = (address.host.clone(), address.port);
        let addr = match &self.tls {
            None => ConnectionAddr::Tcp(host, port),
            Some(tls) => ConnectionAddr::TcpTls { host, port, insecure: tls.insecure, tls_params: None },
        };
        let info: ConnectionInfo = addr.into_connection_info().map_err(bad)?.set_redis_settings(settings);
        match &self.tls {
            None => Client::open(info).map_err(bad),
            Some(tls) => {
                let certificates = TlsCertificates { client_tls: None, root_cert: tls.authorities_pem.clone() };
                Client::build_with_tls(info, certificates).map_err(bad)
            }
        }
    }
}
