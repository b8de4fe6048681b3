//! What Redis' errors mean for a caller. No text here can hold a password: none is made from what was sent.

use std::io;

use deadpool_redis::{
    PoolError,
    redis::{ErrorKind as Theirs, RedisError, ServerError},
};

use crate::{Error, ErrorKind, Retry};

/// A failed command.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    /// What the caller is told. Its retry hint is [`Retry::Ambiguous`] when the command may have been done.
    pub(super) error: Error,
    /// Whether the connection must not be used any more.
    pub(super) relink: bool,
    /// Whether the same may go well at once, or over another connection: what passes by itself.
    pub(super) passing: bool,
}

impl Fault {
    fn new(error: Error) -> Self {
        Self { error, relink: false, passing: false }
    }

    fn relink(mut self) -> Self {
        self.relink = true;
        self
    }

    fn passing(mut self) -> Self {
        self.passing = true;
        self
    }

    /// No answer within the deadline: it may have been done, and the connection is no good.
    pub(super) fn timed_out(text: &str) -> Self {
        Self::new(Error::timed_out(text)).relink()
    }

    /// An answer of another form than the command has.
    pub(super) fn nonsense(what: &str) -> Self {
        let text = format!("Redis gave {what}; does other software use the same keys (REDIS_PREFIX)?");
        Self::new(Error::internal(text)).relink()
    }

    /// Of opening a connection. Nothing has been done yet.
    pub(super) fn connecting(error: PoolError) -> Self {
        match error {
            PoolError::Backend(error) => Self::connecting_by(error),
            PoolError::Timeout(_) => Self::new(Error::unavailable("no connection to Redis in time")).passing(),
            other => Self::new(Error::internal("the pool of Redis connections failed").with_source(other)),
        }
        .relink()
    }

    /// Likewise, without a pool.
    pub(super) fn connecting_by(error: RedisError) -> Self {
        if let Some(fault) = tls(&error) {
            return fault;
        }
        if error.is_io_error() {
            let text = if error.is_connection_refusal() {
                "nothing listens at the address of Redis (REDIS_HOST, REDIS_PORT)"
            } else if error.is_timeout() {
                "Redis does not answer in time"
            } else if error.is_connection_dropped() {
                "Redis closed the connection at once; does it want encryption, or none (REDIS_TLS)?"
            } else {
                "Redis cannot be reached (REDIS_HOST)"
            };
            return Self::new(Error::unavailable(text).with_source(error)).relink().passing();
        }
        Self::of(error).relink()
    }

    /// Of a command on a connection that was good.
    pub(super) fn of(error: RedisError) -> Self {
        match error.kind() {
            Theirs::Server(_) | Theirs::Extension => {
                let (code, detail) =
                    (error.code().unwrap_or("ERR").to_owned(), error.detail().unwrap_or("").to_owned());
                let mut fault = by_code(&code, &detail);
                fault.error = fault.error.with_source(error);
                fault
            }
            Theirs::AuthenticationFailed => Self::new(denied().with_source(error)).relink(),
            Theirs::Io if error.is_timeout() => Self::timed_out("Redis did not answer in time"),
            Theirs::Io => {
                let lost = Error::unavailable("the connection to Redis was lost").with_retry(Retry::Ambiguous);
                Self::new(lost.with_source(error)).relink().passing()
            }
            _ => Self::new(Error::internal("Redis gave an answer that makes no sense").with_source(error)).relink(),
        }
    }

    /// Of a command that the server refused.
    pub(super) fn refused(error: ServerError) -> Self {
        Self::of(error.into())
    }
}

fn denied() -> Error {
    Error::new(ErrorKind::Denied, "Redis does not know this user and password (REDIS_USER, REDIS_PASSWORD)")
}

/// By the code with which Redis' error texts begin. All of these mean that the command was not done.
fn by_code(code: &str, detail: &str) -> Fault {
    let away = |text: &str| Fault::new(Error::unavailable(text));
    match code {
        "LOADING" => away("Redis is still loading its records").passing(),
        "BUSY" => away("Redis is busy with a script of somebody else's").passing(),
        "TRYAGAIN" => away("the Redis cluster is moving the records").passing(),
        "NOSCRIPT" => away("Redis has forgotten the scripts").relink().passing(),
        "READONLY" => away("this Redis server is a replica, and writes need the master").relink().passing(),
        "MASTERDOWN" => away("this Redis server is a replica that has lost its master").relink().passing(),
        "MOVED" | "ASK" => {
            away("the Redis cluster keeps the records at another node (REDIS_CLUSTER)").relink().passing()
        }
        "CLUSTERDOWN" => away("the Redis cluster is down").relink().passing(),
        "NOREPLICAS" => away("Redis refuses writes while too few replicas are connected (its min-replicas-to-write)"),
        "MISCONF" => away("Redis refuses writes because it cannot save them: look at its log and its disk"),
        "OOM" => {
            let text = "Redis' memory is full: raise its maxmemory, or remove what else is in it; records must never be \
                        evicted (maxmemory-policy noeviction)";
            Fault::new(Error::new(ErrorKind::Exhausted, text).with_retry(Retry::Safe))
        }
        "NOAUTH" | "WRONGPASS" => Fault::new(denied()).relink(),
        "NOPERM" => {
            let text = "Redis' user lacks a permission that docs/CONFIGURATION.md lists (REDIS_USER)";
            Fault::new(Error::new(ErrorKind::Denied, text)).relink()
        }
        "DENIED" => Fault::new(Error::new(
            ErrorKind::Denied,
            "Redis is in protected mode: it wants a password before it serves other machines (REDIS_PASSWORD)",
        ))
        .relink(),
        "WRONGTYPE" => Fault::nonsense("a key of another type"),
        _ if detail.contains("max number of clients") => away("Redis serves no more clients (its maxclients)").relink(),
        _ if detail.contains("DB index is out of range") => {
            Fault::new(Error::invalid("db", "wants a database that Redis has (REDIS_DB)")).relink()
        }
        _ if detail.contains("cluster support disabled") => {
            Fault::new(Error::invalid("cluster", "wants nodes of a cluster, and this server is none (REDIS_CLUSTER)"))
        }
        _ => Fault::new(Error::internal("Redis refused a command")).relink(),
    }
}

fn tls(error: &RedisError) -> Option<Fault> {
    // redis-rs wraps what its TLS library says into an I/O error.
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(inner) = cause {
        let found = inner.downcast_ref::<rustls::Error>().or_else(|| {
            inner.downcast_ref::<io::Error>().and_then(|io| io.get_ref()).and_then(|inner| inner.downcast_ref())
        });
        if let Some(found) = found {
            let text = match found {
                rustls::Error::InvalidCertificate(_) => {
                    "the certificate of the Redis server is not trusted, or is for another name (REDIS_CA_FILE, REDIS_HOST)"
                }
                rustls::Error::InvalidMessage(_) => {
                    "the Redis server speaks no TLS at this port (REDIS_TLS, REDIS_PORT)"
                }
                rustls::Error::AlertReceived(_) => {
                    "the Redis server refused our TLS; it may want a client certificate, which this software has not"
                }
                _ => "the encryption with the Redis server failed (REDIS_TLS)",
            };
            let error = Error::unavailable(text).with_retry(Retry::Never).with_source(found.clone());
            return Some(Fault::new(error).relink());
        }
        cause = inner.source();
    }
    None
}
