//! [`MemoryState`]: the [`StateStore`] in memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::Instant;

use super::Faults;
use crate::{
    Deletion, Error, ErrorKind, Key, Precondition, Result, StateStore, Version, Versioned,
    error::reason,
    state::{MAX_PAGE, MAX_VALUE_BYTES},
};

/// Records in memory. Cloning is cheap; all clones are one store. Nothing outlives the last clone.
///
/// Times to live are counted by tokio's clock, so a paused clock works.
#[derive(Clone)]
pub struct MemoryState {
    inner: Arc<Inner>,
}

struct Inner {
    limit_bytes: usize,
    faults: Faults,
    records: Mutex<Records>,
}

#[derive(Default)]
struct Records {
    by_key: BTreeMap<Key, Record>,
    /// The keys that will expire, soonest first.
    ends: BTreeSet<(Instant, Key)>,
    bytes: usize,
    /// One count for all keys: it also grows over deleted and expired records, and keeps none of them.
    last_version: u64,
}

struct Record {
    value: Bytes,
    version: Version,
    ends: Option<Instant>,
}

impl MemoryState {
    /// How much all keys and values may take up unless said otherwise, in bytes: 1 GiB.
    pub const LIMIT_BYTES: usize = 1 << 30;

    /// An empty store.
    pub fn new() -> Self {
        Self::with_faults(Faults::default())
    }

    /// An empty store whose calls follow this plan of faults.
    pub fn with_faults(faults: Faults) -> Self {
        Self::with(faults, Self::LIMIT_BYTES)
    }

    /// An empty store that gives `Exhausted` when keys and values would take up more than `limit_bytes`.
    pub fn with(faults: Faults, limit_bytes: usize) -> Self {
        Self { inner: Arc::new(Inner { limit_bytes, faults, records: Mutex::default() }) }
    }

    /// The plan of faults.
    pub fn faults(&self) -> &Faults {
        &self.inner.faults
    }

    /// The records as of now: those whose time has run out are gone.
    fn records(&self) -> MutexGuard<'_, Records> {
        let mut records = self.inner.records.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        while records.ends.first().is_some_and(|(end, _)| *end <= now) {
            if let Some((_, key)) = records.ends.pop_first() {
                records.remove(&key);
            }
        }
        records
    }

    fn put_now(&self, key: &Key, value: Bytes, only: Precondition, ttl: Option<Duration>) -> Result<Version> {
        if value.len() > MAX_VALUE_BYTES {
            return Err(Error::invalid("value", format_args!("at most {MAX_VALUE_BYTES} bytes, got {}", value.len())));
        }
        let mut records = self.records();
        records.check(key, only)?;
        let before = records.by_key.get(key).map_or(0, |record| size(key, &record.value));
        let after = records.bytes - before + size(key, &value);
        if after > self.inner.limit_bytes {
            return Err(Error::new(
                ErrorKind::Exhausted,
                format!("the store is full at {} bytes", self.inner.limit_bytes),
            ));
        }
        records.remove(key);
        records.last_version += 1;
        let version = Version(records.last_version);
        // A time that the clock cannot reach is no time at all.
        let ends = ttl.and_then(|ttl| Instant::now().checked_add(ttl));
        if let Some(ends) = ends {
            records.ends.insert((ends, key.clone()));
        }
        records.bytes = after;
        records.by_key.insert(key.clone(), Record { value, version, ends });
        Ok(version)
    }

    fn delete_now(&self, key: &Key, only: Precondition) -> Result<Deletion> {
        if only == Precondition::Absent {
            return Err(Error::invalid("precondition", "a record to delete cannot be demanded to be absent"));
        }
        let mut records = self.records();
        records.check(key, only)?;
        Ok(if records.remove(key) { Deletion::Deleted } else { Deletion::AlreadyGone })
    }

    fn list_now(&self, prefix: &str, after: Option<&Key>, limit: usize) -> Result<Vec<(Key, Versioned)>> {
        if !(1..=MAX_PAGE).contains(&limit) {
            return Err(Error::invalid("limit", format_args!("wants 1 to {MAX_PAGE} records, got {limit}")));
        }
        let records = self.records();
        let begin = match after {
            Some(key) if key.as_str() >= prefix => Bound::Excluded(key.as_str()),
            _ => Bound::Included(prefix),
        };
        Ok(records
            .by_key
            .range::<str, _>((begin, Bound::Unbounded))
            .take_while(|(key, _)| key.as_str().starts_with(prefix))
            .take(limit)
            .map(|(key, record)| (key.clone(), record.seen()))
            .collect())
    }
}

impl Default for MemoryState {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryState").field("records", &self.records().by_key.len()).finish_non_exhaustive()
    }
}

impl Records {
    fn check(&self, key: &Key, only: Precondition) -> Result<()> {
        let there = self.by_key.get(key).map(|record| record.version);
        match (only, there) {
            (Precondition::Absent, Some(version)) => {
                Err(Error::new(ErrorKind::AlreadyExists, format!("there is a record already, version {}", version.0))
                    .on(key.as_str()))
            }
            (Precondition::Version(wanted), there) if there != Some(wanted) => {
                let seen = there.map_or_else(|| "there is none".to_owned(), |version| format!("it is {}", version.0));
                Err(Error::new(ErrorKind::Conflict, format!("the record should have version {}, {seen}", wanted.0))
                    .with_reason(reason::VERSION_MISMATCH)
                    .on(key.as_str()))
            }
            _ => Ok(()),
        }
    }

    fn remove(&mut self, key: &Key) -> bool {
        let Some(record) = self.by_key.remove(key) else { return false };
        if let Some(ends) = record.ends {
            self.ends.remove(&(ends, key.clone()));
        }
        self.bytes -= size(key, &record.value);
        true
    }
}

impl Record {
    fn seen(&self) -> Versioned {
        Versioned { value: self.value.clone(), version: self.version }
    }
}

fn size(key: &Key, value: &Bytes) -> usize {
    key.as_str().len() + value.len()
}

#[async_trait]
impl StateStore for MemoryState {
    async fn get(&self, key: &Key) -> Result<Option<Versioned>> {
        let effect = async { Ok(self.records().by_key.get(key).map(Record::seen)) };
        self.inner.faults.around("state.get", effect).await
    }

    async fn put(&self, key: &Key, value: Bytes, only: Precondition, ttl: Option<Duration>) -> Result<Version> {
        self.inner.faults.around("state.put", async { self.put_now(key, value, only, ttl) }).await
    }

    async fn delete(&self, key: &Key, only: Precondition) -> Result<Deletion> {
        self.inner.faults.around("state.delete", async { self.delete_now(key, only) }).await
    }

    async fn list(&self, prefix: &str, after: Option<&Key>, limit: usize) -> Result<Vec<(Key, Versioned)>> {
        self.inner.faults.around("state.list", async { self.list_now(prefix, after, limit) }).await
    }
}
