//! [`RedisStore`] and [`RedisSignals`]: records and notices on a Redis server, for several processes that share them.
//!
//! # What makes it a [`StateStore`]
//! - **One slot.** All keys carry one hash tag, the prefix. So each write is one script, done as a whole or not at all,
//!   in a cluster too; and there, as behind Sentinels, one master is all that the store talks to.
//! - **One counter of versions** for all keys, which follows the server's clock: the next version is the last plus one,
//!   or the time in µs when that is more. So versions also rise when a server comes back without its last writes, or
//!   another one takes over that never had them. The clocks of the servers must agree to within the time that a failover
//!   takes, as NTP sees to.
//! - **Lists in order** come from a set of all keys beside the records. Keys of records that have ended are dropped
//!   from it by later writes, and by the lists that meet them.
//! - **Nothing late.** A write carries the latest time at which the server may do it. When its caller has given up,
//!   because a server stood still or an answer was lost, it is done before the deadline or never.
//! - **Reconnecting.** Connections are opened by the first call that needs them and again after trouble, with pauses
//!   that grow to 2 s. A write that may have been done is never repeated; its caller is told so
//!   ([`Retry::Ambiguous`](crate::Retry::Ambiguous)). What surely was not done, and every read, is tried again until the deadline.
//!
//! # What can be lost
//! A write that was answered is as durable as the server is set up to be:
//!
//! | server | lost by a crash or power cut | lost by a failover |
//! |---|---|---|
//! | no `appendonly` | everything since the last snapshot | |
//! | `appendonly yes`, `appendfsync everysec` | up to about 1 s (power cut) | |
//! | `appendonly yes`, `appendfsync always` | nothing | |
//! | replicas, [`wait_replicas`](RedisConfig::wait_replicas) 0 | | what was not replicated yet; of a master cut off from them, all since the cut |
//! | replicas, `wait_replicas` less than all | | nothing, unless a replica is elected that missed it |
//! | replicas, `wait_replicas` all | | nothing; no write succeeds while one is away |
//!
//! So: `appendonly yes` and `appendfsync always` on every server, and `wait_replicas` 1 for a master with one replica.
//! With it a write is answered only when so many replicas have it (`WAIT` on the same connection); fewer are an error,
//! and the write may or may not stand. `WAIT` is about memory: the replicas' disks are `appendfsync`'s business. Redis elects
//! the replica that has most, as far as it knows. Readers may see a write before it is answered. While a network is
//! cut, a reader on the wrong side may see old records; writers there are refused. `maxmemory-policy` must be
//! `noeviction`.
//!
//! Leases rest on this: with `wait_replicas` two processes never hold one at a time as long as the clocks agree; without
//! it a failover may forget one, but the next holder's token is greater all the same, so that whoever checks tokens
//! refuses the former.

mod config;
mod connect;
mod fault;
mod scripts;
mod signals;
mod write;

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use deadpool_redis::redis::{Value, cmd};

pub use self::{
    config::{Address, Login, Place, RedisConfig, Tls},
    signals::RedisSignals,
};
use self::{
    connect::{Connector, text},
    scripts::VERSION_BYTES,
    write::Writer,
};
use super::{Key, MAX_PAGE, MAX_VALUE_BYTES, Precondition, StateStore, Version, Versioned};
use crate::{Deletion, Error, Result};

/// So many values are read at once at most; each may be [`MAX_VALUE_BYTES`] long.
const CHUNK: usize = 64;

/// A [`StateStore`] on Redis. Clones share their connections. See the [module](self).
#[derive(Clone)]
pub struct RedisStore {
    connector: Arc<Connector>,
    keys: Arc<Keys>,
    writer: Arc<Writer>,
}

/// The names of our keys in Redis.
struct Keys {
    /// In front of each record's key.
    records: String,
    version: String,
    keys: String,
    ends: String,
}

impl Keys {
    fn new(prefix: &str) -> Self {
        let key = |name: &str| format!("{{{prefix}}}:{name}");
        Self { records: key("r:"), version: key("version"), keys: key("keys"), ends: key("ends") }
    }

    fn record(&self, key: &str) -> String {
        format!("{}{key}", self.records)
    }
}

impl RedisStore {
    /// Checks the configuration. Nothing is connected before the first call; [`check`](Self::check) is one.
    ///
    /// # Errors
    /// `Invalid`, with what is wanted.
    pub fn new(config: RedisConfig) -> Result<Self> {
        let keys = Arc::new(Keys::new(&config.prefix));
        let connector = Arc::new(Connector::new(config).map_err(|error| error.during("state.open"))?);
        let writer = Arc::new(Writer::new(Arc::clone(&connector)));
        Ok(Self { connector, keys, writer })
    }

    /// Signals over the same server, under the same prefix.
    pub fn signals(&self) -> RedisSignals {
        RedisSignals::over(Arc::clone(&self.connector))
    }

    /// Asks the server once, and gives what about it is worth a warning.
    ///
    /// # Errors
    /// `Unavailable` when it cannot be reached now, `Denied` when it does not let us in, `Invalid` when the
    /// configuration does not fit it.
    pub async fn check(&self) -> Result<Vec<String>> {
        let mut info = cmd("INFO");
        let answer = match self.connector.read(&info).await {
            Ok(answer) => answer,
            // Some users may do all that the store needs, but not ask.
            Err(error) if error.kind() == crate::ErrorKind::Denied => {
                info = cmd("PING");
                self.connector.read(&info).await.map_err(|error| error.during("state.open"))?
            }
            Err(error) => return Err(error.during("state.open")),
        };
        Ok(text(&answer).map(|info| warnings(&info, self.connector.config.wait_replicas)).unwrap_or_default())
    }

    fn versioned(stored: Vec<u8>) -> Result<Versioned> {
        let digits = stored.get(..VERSION_BYTES).filter(|digits| digits.iter().all(u8::is_ascii_digit));
        let version = digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok()).ok_or_else(|| {
            Error::internal("the record has another form than this version writes; does other software use the same keys (REDIS_PREFIX)?")
        })?;
        Ok(Versioned { value: Bytes::from(stored).slice(VERSION_BYTES..), version: Version(version) })
    }

    async fn page(&self, prefix: &str, after: Option<&Key>, limit: usize) -> Result<Vec<(Key, Versioned)>> {
        let end = end_of(prefix);
        let mut from = match after {
            Some(after) if after.as_str() >= prefix => [b"(", after.as_str().as_bytes()].concat(),
            _ => [b"[", prefix.as_bytes()].concat(),
        };
        let mut page = Vec::new();
        while page.len() < limit {
            let wanted = (limit - page.len()).min(CHUNK);
            let mut range = cmd("ZRANGEBYLEX");
            range.arg(&self.keys.keys).arg(&from).arg(&end).arg("LIMIT").arg(0).arg(wanted);
            let Value::Array(found) = self.connector.read(&range).await? else {
                return Err(Error::internal("Redis gave no list of keys"));
            };
            let found: Vec<_> = found.iter().filter_map(text).collect();
            let Some(last) = found.last() else { break };
            from = format!("({last}").into_bytes();
            let complete = found.len() < wanted;
            let mut get = cmd("MGET");
            for key in &found {
                get.arg(self.keys.record(key));
            }
            let Value::Array(records) = self.connector.read(&get).await? else {
                return Err(Error::internal("Redis gave no list of records"));
            };
            let mut ended = Vec::new();
            for (key, record) in found.into_iter().zip(records) {
                match record {
                    Value::BulkString(stored) => page.push((stored_key(key)?, Self::versioned(stored)?)),
                    _ => ended.push(key),
                }
            }
            self.drop_ended(&ended).await;
            if complete {
                break;
            }
        }
        Ok(page)
    }

    /// Takes keys whose records have ended out of the lists. Whether it succeeds is of no consequence to the caller.
    async fn drop_ended(&self, ended: &[String]) {
        if ended.is_empty() {
            return;
        }
        let mut command = cmd("EVALSHA");
        command.arg(scripts::FORGET.get_hash()).arg(2).arg(&self.keys.keys).arg(&self.keys.ends);
        command.arg(&self.keys.records).arg(ended);
        if let Err(error) = self.connector.read(&command).await {
            tracing::debug!(%error, "keys of ended records stay for now");
        }
    }
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStore").field("config", &self.connector.config).finish_non_exhaustive()
    }
}

#[async_trait]
impl StateStore for RedisStore {
    async fn get(&self, key: &Key) -> Result<Option<Versioned>> {
        let mut get = cmd("GET");
        get.arg(self.keys.record(key.as_str()));
        let read = async {
            match self.connector.read(&get).await? {
                Value::Nil => Ok(None),
                Value::BulkString(stored) => Self::versioned(stored).map(Some),
                _ => Err(Error::internal("Redis gave no record")),
            }
        };
        read.await.map_err(|error| error.during("state.get").on(key.as_str()))
    }

    async fn put(&self, key: &Key, value: Bytes, only: Precondition, ttl: Option<Duration>) -> Result<Version> {
        let write = async {
            if value.len() > MAX_VALUE_BYTES {
                return Err(Error::invalid(
                    "value",
                    format_args!("wants at most {MAX_VALUE_BYTES} bytes, got {}", value.len()),
                ));
            }
            self.writer.put(&self.keys, key, value, only, ttl).await
        };
        write.await.map_err(|error: Error| error.during("state.put").on(key.as_str()))
    }

    async fn delete(&self, key: &Key, only: Precondition) -> Result<Deletion> {
        let write = async {
            if only == Precondition::Absent {
                return Err(Error::invalid("precondition", "wants Any or Version for a delete, got Absent"));
            }
            self.writer.delete(&self.keys, key, only).await
        };
        write.await.map_err(|error: Error| error.during("state.delete").on(key.as_str()))
    }

    async fn list(&self, prefix: &str, after: Option<&Key>, limit: usize) -> Result<Vec<(Key, Versioned)>> {
        let read = async {
            if !(1..=MAX_PAGE).contains(&limit) {
                return Err(Error::invalid("limit", format_args!("wants 1 to {MAX_PAGE}, got {limit}")));
            }
            self.page(prefix, after, limit).await
        };
        read.await.map_err(|error| error.during("state.list"))
    }
}

fn stored_key(text: String) -> Result<Key> {
    Key::new(text).map_err(|error| Error::internal("the store holds a key that is none").with_source(error))
}

/// The end of the range of keys that begin with a prefix, in Redis' notation.
fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // No text has a last byte of 255, so one more is always possible.
    match end.last_mut() {
        Some(last) => {
            *last += 1;
            [b"(", end.as_slice()].concat()
        }
        None => b"+".to_vec(),
    }
}

/// What in the server's own account of itself would lose records.
fn warnings(info: &str, wait_replicas: u32) -> Vec<String> {
    let field = |name: &str| {
        info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim).unwrap_or_default()
    };
    let number = |name: &str| field(name).parse::<u64>().unwrap_or(0);
    let mut found = Vec::new();
    if field("aof_enabled") == "0" {
        found.push("Redis keeps no append-only file: a crash loses what was written since its last snapshot (appendonly yes, appendfsync always)".to_owned());
    }
    if number("maxmemory") > 0 && !matches!(field("maxmemory_policy"), "noeviction" | "") {
        found.push(format!(
            "Redis drops records when its memory is full: maxmemory-policy is {}, set it to noeviction",
            field("maxmemory_policy")
        ));
    }
    if wait_replicas == 0 && number("connected_slaves") > 0 {
        found.push("Redis has replicas, but writes do not wait for them: a failover may lose the last writes (REDIS_WAIT_REPLICAS)".to_owned());
    }
    if u64::from(wait_replicas) > number("connected_slaves") && field("role") == "master" {
        found.push(format!(
            "Redis has {} replicas now, so no write succeeds while REDIS_WAIT_REPLICAS is {wait_replicas}",
            number("connected_slaves")
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Whether a key is in Redis' range from `[prefix` to this end.
    fn within(prefix: &str, key: &str) -> bool {
        let end = end_of(prefix);
        let below = match end.split_first() {
            Some((b'(', end)) => key.as_bytes() < end,
            _ => end == b"+",
        };
        key >= prefix && below
    }

    proptest! {
        #[test]
        fn a_range_holds_exactly_the_keys_with_its_prefix(prefix in ".{0,4}", key in ".{0,6}", longer in any::<bool>()) {
            let key = if longer { format!("{prefix}{key}") } else { key };
            prop_assert_eq!(within(&prefix, &key), key.starts_with(&prefix));
        }

        #[test]
        fn a_stored_record_is_read_as_it_was_written(version in 0_u64..10_000_000_000_000_000, value in any::<Vec<u8>>()) {
            let stored = [format!("{version:016}").as_bytes(), &value].concat();
            let record = RedisStore::versioned(stored).unwrap();
            prop_assert_eq!((record.version.0, record.value.as_ref()), (version, value.as_slice()));
        }

        #[test]
        fn what_others_wrote_is_refused(stored in any::<Vec<u8>>()) {
            let digits = stored.len() >= VERSION_BYTES && stored[..VERSION_BYTES].iter().all(u8::is_ascii_digit);
            prop_assume!(!digits);
            prop_assert!(RedisStore::versioned(stored).is_err());
        }
    }

    #[test]
    fn what_would_lose_records_is_warned_of() {
        let good =
            "role:master\r\nconnected_slaves:1\r\naof_enabled:1\r\nmaxmemory:0\r\nmaxmemory_policy:allkeys-lru\r\n";
        assert_eq!(warnings(good, 1), [""; 0]);
        for (change, to, wait_replicas, wanted) in [
            ("aof_enabled:1", "aof_enabled:0", 1, "appendonly yes"),
            ("maxmemory:0", "maxmemory:1000", 1, "maxmemory-policy is allkeys-lru"),
            ("", "", 0, "REDIS_WAIT_REPLICAS"),
            ("", "", 2, "REDIS_WAIT_REPLICAS is 2"),
        ] {
            let found = warnings(&good.replacen(change, to, 1), wait_replicas);
            assert!(found.len() == 1 && found[0].contains(wanted), "{wanted} in {found:?}");
        }
        assert_eq!(warnings("", 0).len(), 0, "a server that does not say");
    }
}
