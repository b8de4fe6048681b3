//! [`Connector`]: finds the server that takes writes, keeps connections to it, and finds it again after trouble.

use std::{
    fmt,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::Duration,
};

use deadpool_redis::{
    Connection, Manager, Pool, Runtime,
    redis::{AsyncConnectionConfig, Client, Cmd, RedisResult, Value, aio::MultiplexedConnection, cmd},
};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{
    config::{Address, Login, Place, RedisConfig},
    fault::Fault,
    scripts,
};
use crate::{Error, Result, Retry};

/// Between two tries to connect: doubled from the one to the other.
const PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// The most that one try to connect to one address takes.
const MAX_CONNECT: Duration = Duration::from_secs(2);
/// A connection idle for longer is tried before a write, so that a server that went away in between costs no doubt.
const IDLE: Duration = Duration::from_secs(1);
/// How old the difference between the server's clock and ours may be before a worse measurement replaces it.
const MAX_OFFSET_AGE_US: i64 = 60_000_000;

/// Connections to one server that takes writes, used by all at once.
pub(super) struct Link {
    pub(super) address: Address,
    pub(super) reads: MultiplexedConnection,
    /// Another one when writes wait for replicas: the server answers nothing on a connection that waits.
    pub(super) writes: MultiplexedConnection,
    /// What [`Connector::since_us`] gives, plus this, is at most the server's time.
    offset_us: AtomicI64,
    measured_us: AtomicI64,
    used_us: AtomicI64,
    /// Kept checked out: a check-out for each call costs six times the call.
    _held: Vec<Connection>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("address", &self.address).finish_non_exhaustive()
    }
}

pub(super) struct Connector {
    pub(super) config: RedisConfig,
    slot: RwLock<Option<Arc<Link>>>,
    gate: tokio::sync::Mutex<Gate>,
    began: Instant,
}

/// Held by the one who connects.
struct Gate {
    next: Instant,
    pause: Duration,
    down_since: Option<Instant>,
    last: Option<Fault>,
    /// The Sentinel or node that answered last, which is asked first.
    favourite: usize,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Connector {
    pub(super) fn new(config: RedisConfig) -> Result<Self> {
        if config.tls.is_some() {
            // Somebody else may have chosen one before; theirs will do.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        config.check()?;
        let began = Instant::now();
        let gate = Gate { next: began, pause: PAUSE, down_since: None, last: None, favourite: 0 };
        Ok(Self { config, slot: RwLock::default(), gate: tokio::sync::Mutex::new(gate), began })
    }

    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.config.deadline
    }

    fn since_us(&self, at: Instant) -> i64 {
        i64::try_from(at.saturating_duration_since(self.began).as_micros()).unwrap_or(i64::MAX)
    }

    fn current(&self) -> Option<Arc<Link>> {
        self.slot.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets go of connections that are no good, unless others have taken their place already.
    pub(super) fn forget(&self, link: &Arc<Link>) {
        let mut slot = self.slot.write().unwrap_or_else(PoisonError::into_inner);
        if slot.as_ref().is_some_and(|current| Arc::ptr_eq(current, link)) {
            *slot = None;
            tracing::debug!(address = %link.address, "let go of the connections to Redis");
        }
    }

    /// The connections, opened if there are none. An outage that is shorter than a call's deadline is waited out; in a
    /// longer one calls fail at once, but for the one that tries again when it is time.
    pub(super) async fn link(&self, deadline: Instant) -> Result<Arc<Link>, Fault> {
        match self.current() {
            Some(link) => Ok(link),
            None => Box::pin(self.new_link(deadline)).await,
        }
    }

    // Apart, and boxed: the way that nearly all calls take stays small.
    async fn new_link(&self, deadline: Instant) -> Result<Arc<Link>, Fault> {
        let Ok(mut gate) = timeout_at(deadline, self.gate.lock()).await else {
            return Err(Fault { passing: true, ..away(None) });
        };
        loop {
            if let Some(link) = self.current() {
                return Ok(link);
            }
            let now = Instant::now();
            if now < gate.next {
                let long = gate.down_since.is_some_and(|since| now >= since + self.config.deadline);
                if long || gate.next >= deadline {
                    return Err(away(gate.last.as_ref()));
                }
                sleep_until(gate.next).await;
            }
            let opened = timeout_at(deadline, self.open(&mut gate.favourite)).await;
            let fault = match opened {
                Ok(Ok(link)) => {
                    if let Some(since) = gate.down_since.take() {
                        let down_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
                        tracing::info!(address = %link.address, down_ms, "connected to Redis again");
                    }
                    (gate.pause, gate.last, gate.next) = (PAUSE, None, Instant::now());
                    let link = Arc::new(link);
                    *self.slot.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&link));
                    return Ok(link);
                }
                Ok(Err(fault)) => fault,
                // What an earlier try met says more than that this one was cut short.
                Err(_) if gate.last.is_some() => return Err(away(gate.last.as_ref())),
                Err(_) => Fault::unanswered(),
            };
            if gate.down_since.is_none() {
                gate.down_since = Some(Instant::now());
                tracing::warn!(error = &fault.error as &dyn std::error::Error, "Redis is away");
            }
            gate.next = Instant::now() + gate.pause;
            gate.pause = (gate.pause * 2).min(MAX_PAUSE);
            let passing = fault.passing;
            gate.last = Some(fault);
            if !passing {
                return Err(away(gate.last.as_ref()));
            }
        }
    }

    async fn open(&self, favourite: &mut usize) -> Result<Link, Fault> {
        let asked = match &self.config.place {
            Place::Single(address) => return self.open_at(address.clone()).await,
            Place::Sentinel { sentinels: asked, .. } | Place::Cluster(asked) => asked,
        };
        // One after the other, until what is told proves right.
        let mut last: Option<Fault> = None;
        for step in 0..asked.len() {
            let index = (*favourite + step) % asked.len();
            let told = match &self.config.place {
                Place::Sentinel { master, login, .. } => self.ask_sentinel(&asked[index], master, login).await,
                _ => self.ask_cluster(&asked[index]).await,
            };
            let opened = match told {
                Ok(address) => self.open_at(address).await,
                Err(fault) => Err(fault),
            };
            match opened {
                Ok(link) => {
                    *favourite = index;
                    return Ok(link);
                }
                // One that cannot be reached says less than one that was.
                Err(fault) if last.is_none() || !fault.passing => last = Some(fault),
                Err(_) => {}
            }
        }
        Err(last.unwrap_or_else(|| away(None)))
    }

    fn connection_config(&self) -> AsyncConnectionConfig {
        // Calls have deadlines of their own, which cover connecting too.
        let connect = self.config.deadline.div_f32(2.0).min(MAX_CONNECT);
        AsyncConnectionConfig::new().set_connection_timeout(Some(connect)).set_response_timeout(None)
    }

    pub(super) fn client(&self, address: &Address) -> Result<Client> {
        self.config.client(address, &self.config.login, self.config.db)
    }

    async fn open_at(&self, address: Address) -> Result<Link, Fault> {
        let on = |mut fault: Fault| {
            fault.error = fault.error.on(format!("Redis at {address}"));
            fault
        };
        let client = self.client(&address).map_err(broken)?;
        let manager = Manager::new_with_config(client.get_connection_info().clone(), self.connection_config());
        let manager = manager.map_err(|error| on(Fault::connecting_by(error)))?;
        let lanes = if self.config.wait_replicas > 0 { 2 } else { 1 };
        let pool = Pool::builder(manager).max_size(lanes).runtime(Runtime::Tokio1).build();
        let pool = pool.map_err(|error| broken(Error::internal("no pool of connections").with_source(error)))?;
        let mut held = Vec::new();
        for _ in 0..lanes {
            held.push(pool.get().await.map_err(|error| on(Fault::connecting(error)))?);
        }
        let mut reads = MultiplexedConnection::clone(&held[0]);
        let writes = MultiplexedConnection::clone(&held[lanes - 1]);
        self.prepare(&mut reads).await.map_err(on)?;
        let link = Link {
            address: address.clone(),
            reads,
            writes,
            offset_us: AtomicI64::new(i64::MIN),
            measured_us: AtomicI64::new(i64::MIN),
            used_us: AtomicI64::new(0),
            _held: held,
        };
        let time = run(&mut link.reads.clone(), cmd("TIME")).await.map_err(on)?;
        let [seconds, micros] = numbers(&time).ok_or_else(|| on(Fault::nonsense("no time")))?;
        self.measure(&link, seconds * 1_000_000 + micros);
        self.touch(&link, Instant::now());
        Ok(link)
    }

    /// Makes sure that it is a master, and gives it the scripts.
    async fn prepare(&self, connection: &mut MultiplexedConnection) -> Result<(), Fault> {
        match run(connection, cmd("ROLE")).await {
            Ok(Value::Array(role)) if role.first().and_then(text).as_deref() != Some("master") => {
                let error = Error::unavailable("this Redis server is a replica, and writes need the master");
                return Err(Fault { error, relink: true, passing: true });
            }
            Ok(_) => {}
            // Without the permission to ask, the first write tells.
            Err(fault) if fault.error.kind() == crate::ErrorKind::Denied => {
                run(connection, cmd("PING")).await?;
            }
            Err(fault) => return Err(fault),
        }
        for script in scripts::all() {
            script.load_async(connection).await.map_err(Fault::of)?;
        }
        Ok(())
    }

    async fn ask_sentinel(&self, sentinel: &Address, master: &str, login: &Login) -> Result<Address, Fault> {
        let on = |mut fault: Fault, settings: &str| {
            fault.error = fault.error.with_note(settings).on(format!("Sentinel at {sentinel}"));
            fault
        };
        const SETTINGS: &str = "REDIS_SENTINELS, REDIS_SENTINEL_USER, REDIS_SENTINEL_PASSWORD";
        let client = self.config.client(sentinel, login, 0).map_err(broken)?;
        let opened = client.get_multiplexed_async_connection_with_config(&self.connection_config()).await;
        let mut connection = opened.map_err(|error| on(Fault::connecting_by(error), SETTINGS))?;
        let mut question = cmd("SENTINEL");
        question.arg("GET-MASTER-ADDR-BY-NAME").arg(master);
        match run_within(&mut connection, question, MAX_CONNECT).await.map_err(|fault| on(fault, SETTINGS))? {
            Value::Array(answer) => {
                let found = answer.first().and_then(text).zip(answer.get(1).and_then(text));
                let found = found.and_then(|(host, port)| Some(Address { host, port: port.parse().ok()? }));
                found.ok_or_else(|| on(Fault::nonsense("no address"), SETTINGS))
            }
            Value::Nil => {
                let error = Error::unavailable(format!(
                    "it knows no master {} (REDIS_SENTINEL_MASTER)",
                    crate::id::shown(master)
                ));
                Err(on(Fault { error: error.with_retry(Retry::Never), relink: true, passing: false }, SETTINGS))
            }
            _ => Err(on(Fault::nonsense("no address"), SETTINGS)),
        }
    }

    /// All our keys are in one slot; where is its master?
    async fn ask_cluster(&self, node: &Address) -> Result<Address, Fault> {
        let on = |mut fault: Fault| {
            fault.error = fault.error.on(format!("Redis node at {node}"));
            fault
        };
        let client = self.client(node).map_err(broken)?;
        let opened = client.get_multiplexed_async_connection_with_config(&self.connection_config()).await;
        let mut connection = opened.map_err(|error| on(Fault::connecting_by(error)))?;
        let mut question = cmd("CLUSTER");
        question.arg("KEYSLOT").arg(format!("{{{}}}", self.config.prefix));
        let Value::Int(slot) = run_within(&mut connection, question, MAX_CONNECT).await.map_err(on)? else {
            return Err(on(Fault::nonsense("no slot")));
        };
        let mut question = cmd("CLUSTER");
        question.arg("SLOTS");
        let Value::Array(ranges) = run_within(&mut connection, question, MAX_CONNECT).await.map_err(on)? else {
            return Err(on(Fault::nonsense("no slots")));
        };
        for range in &ranges {
            let Value::Array(range) = range else { continue };
            let [Value::Int(first), Value::Int(last), Value::Array(master), ..] = range.as_slice() else { continue };
            if (*first..=*last).contains(&slot) {
                // An empty host stands for the one that was asked.
                let host = master.first().and_then(text).filter(|host| !host.is_empty() && host != "?");
                let port = master
                    .get(1)
                    .and_then(|port| if let Value::Int(port) = port { u16::try_from(*port).ok() } else { None });
                let port = port.ok_or_else(|| on(Fault::nonsense("no port")))?;
                return Ok(Address { host: host.unwrap_or_else(|| node.host.clone()), port });
            }
        }
        let error = Error::unavailable("no node of the Redis cluster has the slot of our records");
        Err(on(Fault { error, relink: true, passing: true }))
    }

    /// Takes note of the server's time, as an answer that has just come said it.
    pub(super) fn measure(&self, link: &Link, server_us: i64) {
        let now = self.since_us(Instant::now());
        let offset = server_us.saturating_sub(now);
        // The longer an answer took the more it understates, so the greatest is the best until it is old.
        if offset > link.offset_us.load(Relaxed)
            || now.saturating_sub(link.measured_us.load(Relaxed)) > MAX_OFFSET_AGE_US
        {
            link.offset_us.store(offset, Relaxed);
            link.measured_us.store(now, Relaxed);
        }
    }

    /// The server's time at a moment of ours, or a little before.
    pub(super) fn server_us(&self, link: &Link, at: Instant) -> i64 {
        self.since_us(at).saturating_add(link.offset_us.load(Relaxed))
    }

    /// Takes note that it is in use now, and gives for how long it was not, in µs.
    fn touch(&self, link: &Link, now: Instant) -> i64 {
        let now_us = self.since_us(now);
        now_us.saturating_sub(link.used_us.swap(now_us, Relaxed))
    }

    /// The connections for a write: when they have been idle, only after they were tried.
    pub(super) async fn link_for_write(&self, deadline: Instant) -> Result<Arc<Link>, Fault> {
        loop {
            let link = self.link(deadline).await?;
            if self.touch(&link, Instant::now()) < i64::try_from(IDLE.as_micros()).unwrap_or(i64::MAX) {
                return Ok(link);
            }
            let mut writes = link.writes.clone();
            match timeout_at(deadline, run(&mut writes, cmd("PING"))).await {
                Ok(Ok(_)) => return Ok(link),
                Ok(Err(_)) => self.forget(&link),
                Err(_) => {
                    self.forget(&link);
                    return Err(away(None));
                }
            }
        }
    }

    /// Sends a command that may be sent twice, again over new connections while there is time.
    pub(super) async fn read(&self, command: &Cmd) -> Result<Value> {
        let begun = Instant::now();
        let deadline = begun + self.config.deadline;
        let (mut pause, mut again) = (PAUSE, false);
        loop {
            let link = self.link(deadline).await.map_err(|fault| fault.error)?;
            self.touch(&link, begun);
            let fault = match timeout_at(deadline, sent(link.reads.clone().send_packed_command(command))).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(fault)) => fault,
                Err(_) => Fault::timed_out("Redis did not answer in time"),
            };
            if fault.relink {
                self.forget(&link);
            }
            if !fault.passing || Instant::now() + pause >= deadline {
                // Reading changes nothing.
                let error = fault.error;
                return Err(if error.retry() == Retry::Ambiguous { error.with_retry(Retry::Safe) } else { error });
            }
            // New connections are tried at once, but not again and again.
            if !fault.relink || again {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(MAX_PAUSE);
            }
            again = true;
        }
    }
}

impl Connector {
    /// The server in use.
    pub(super) fn address(&self) -> Option<Address> {
        self.current().map(|link| link.address.clone())
    }

    /// Sends a command that must not be done twice: it is sent again only when it surely was not done.
    pub(super) async fn once(&self, command: &Cmd) -> Result<Value, Fault> {
        let deadline = self.deadline();
        loop {
            let link = self.link_for_write(deadline).await?;
            let fault = match timeout_at(deadline, sent(link.reads.clone().send_packed_command(command))).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(fault)) => fault,
                Err(_) => Fault::timed_out("Redis did not answer in time"),
            };
            if fault.relink {
                self.forget(&link);
            }
            if !fault.passing || fault.error.retry() != Retry::Safe || Instant::now() + PAUSE >= deadline {
                return Err(fault);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// What a caller is told while there is no connection: the call surely had no effect.
fn away(last: Option<&Fault>) -> Fault {
    match last {
        None => Fault { error: Error::unavailable("no connection to Redis in time"), relink: false, passing: false },
        Some(fault) => {
            let mut fault = Fault { passing: false, ..fault.clone() };
            if fault.error.retry() == Retry::Ambiguous {
                fault.error = fault.error.with_retry(Retry::Safe);
            }
            fault
        }
    }
}

fn broken(error: Error) -> Fault {
    Fault { error, relink: true, passing: false }
}

/// The answer of a command; a refusal is a fault.
pub(super) async fn sent(answer: impl Future<Output = RedisResult<Value>>) -> Result<Value, Fault> {
    match answer.await {
        Ok(Value::ServerError(error)) => Err(Fault::refused(error)),
        Ok(value) => Ok(value),
        Err(error) => Err(Fault::of(error)),
    }
}

async fn run(connection: &mut MultiplexedConnection, command: Cmd) -> Result<Value, Fault> {
    sent(connection.send_packed_command(&command)).await
}

async fn run_within(connection: &mut MultiplexedConnection, command: Cmd, within: Duration) -> Result<Value, Fault> {
    match tokio::time::timeout(within, run(connection, command)).await {
        Ok(result) => result,
        Err(_) => Err(Fault::unanswered()),
    }
}

pub(super) fn text(value: &Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => String::from_utf8(bytes.clone()).ok(),
        Value::SimpleString(text) => Some(text.clone()),
        _ => None,
    }
}

/// An answer of so many numbers.
pub(super) fn numbers<const N: usize>(value: &Value) -> Option<[i64; N]> {
    let Value::Array(values) = value else { return None };
    let number = |value: &Value| match value {
        Value::Int(number) => Some(*number),
        other => text(other)?.parse().ok(),
    };
    values.iter().map(number).collect::<Option<Vec<_>>>()?.try_into().ok()
}
