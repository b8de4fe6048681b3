//! [`StateStore`]: versioned records, and leases with fencing tokens over them.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Deletion, Error, ErrorKind, Result, Retry, error::reason};

#[cfg(feature = "embedded")]
pub mod embedded;
#[cfg(feature = "redis")]
pub mod redis;

/// Keeps records under keys, each with a version that only grows.
///
/// A write that returned is durable as far as the implementation says (see its own page). Each MUST is
/// checked by the conformance case named beside it.
#[async_trait]
pub trait StateStore: fmt::Debug + Send + Sync + 'static {
    /// Reads one record; `None` when there is none or its time has run out.
    ///
    /// # Behavior
    /// - A record MUST come back as written, of any bytes up to [`MAX_VALUE_BYTES`] [case: state_roundtrip].
    /// - A key never written MUST give `None` [case: state_get_missing].
    async fn get(&self, key: &Key) -> Result<Option<Versioned>>;

    /// Writes one record and returns its new version.
    ///
    /// # Behavior
    /// - The version MUST be greater than every earlier one of this key, deleted and expired ones too
    ///   [case: state_versions_grow]. Fencing tokens rest on this.
    /// - [`Precondition::Absent`] MUST fail with `AlreadyExists` and change nothing when there is a record
    ///   [case: state_put_absent]; [`Precondition::Version`] MUST fail with `Conflict`, reason `VERSION_MISMATCH`, and change
    ///   nothing when another version or none is there [case: state_put_version].
    /// - Of several at once with the same precondition exactly one MUST win [case: state_put_race].
    /// - With a time to live the record MUST be gone after it, and not before [case: state_ttl]; a write without one
    ///   MUST take an earlier one away [case: state_ttl_cleared].
    /// - A value over [`MAX_VALUE_BYTES`] MUST fail with `Invalid` and change nothing [case: state_value_too_large].
    async fn put(&self, key: &Key, value: Bytes, only: Precondition, ttl: Option<Duration>) -> Result<Version>;

    /// Deletes one record.
    ///
    /// # Behavior
    /// - It MUST be gone; one that is not there MUST be `Ok(AlreadyGone)`, unless a version was demanded
    ///   [case: state_delete].
    /// - With [`Precondition::Version`] another version or none MUST fail with `Conflict` and change nothing
    ///   [case: state_delete_version]. [`Precondition::Absent`] makes no sense here and MUST fail with `Invalid`
    ///   [case: state_delete_absent].
    async fn delete(&self, key: &Key, only: Precondition) -> Result<Deletion>;

    /// Lists records whose key begins with the prefix and comes after `after`, in the order of their keys.
    ///
    /// # Behavior
    /// - It MUST give each matching record once, in order, at most `limit` (1 to [`MAX_PAGE`]) of them
    ///   [case: state_list_pages]; another limit MUST fail with `Invalid` [case: state_list_limit]. What is written
    ///   meanwhile may or may not be in it.
    /// - A prefix MUST match by bytes: `a/b` matches `a/b`, `a/bc` and `a/b/c` [case: state_list_prefix].
    async fn list(&self, prefix: &str, after: Option<&Key>, limit: usize) -> Result<Vec<(Key, Versioned)>>;
}

/// The largest value, in bytes: 1 MiB.
pub const MAX_VALUE_BYTES: usize = 1 << 20;
/// The longest page of [`StateStore::list`].
pub const MAX_PAGE: usize = 1000;

/// A record's key: 1 to 1024 bytes of ASCII letters, digits and `- _ . : /`.
///
/// Parts are separated by `/`, the first one names the kind of record.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

impl Key {
    /// The longest key, in bytes.
    pub const MAX_BYTES: usize = 1024;

    /// Checks and wraps a key.
    ///
    /// # Errors
    /// `Invalid` when it is empty, too long, has an empty part or a character that is not allowed.
    pub fn new(text: impl Into<String>) -> Result<Self> {
        let text = text.into();
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':' | '/');
        if text.len() > Self::MAX_BYTES || text.split('/').any(str::is_empty) || !text.chars().all(allowed) {
            return Err(Error::invalid(
                "key",
                format_args!(
                    "wants 1 to {} bytes of ASCII letters, digits and - _ . : in parts separated by /, got {}",
                    Self::MAX_BYTES,
                    crate::id::shown(&text)
                ),
            ));
        }
        Ok(Self(text))
    }

    /// A key of parts that users chose: each part is escaped so that it can hold any text.
    ///
    /// # Errors
    /// `Invalid` when the whole is too long.
    pub fn of(kind: &str, parts: &[&str]) -> Result<Self> {
        let mut text = kind.to_owned();
        for part in parts {
            text.push('/');
            // An empty part must stay a part; `_` alone stands for it because `_` itself is escaped.
            if part.is_empty() {
                text.push('_');
            }
            for byte in part.bytes() {
                match byte {
                    b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' => text.push(byte as char),
                    _ => text.push_str(&format!("_{byte:02x}")),
                }
            }
        }
        Self::new(text)
    }

    /// The key's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::borrow::Borrow<str> for Key {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.0)
    }
}

/// A record's version: it grows with every write of the key, for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version(pub u64);

/// A record's value and version.
#[derive(Clone, PartialEq, Eq)]
pub struct Versioned {
    /// The bytes that were written.
    pub value: Bytes,
    /// The version that the write returned.
    pub version: Version,
}

impl fmt::Debug for Versioned {
    // Values may belong to users; their size is enough for a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Versioned").field("version", &self.version.0).field("bytes", &self.value.len()).finish()
    }
}

/// What must hold for a write to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precondition {
    /// Nothing.
    Any,
    /// There is no record.
    Absent,
    /// The record has this version.
    Version(Version),
}

/// Comfort over any [`StateStore`]; no store implements it.
#[async_trait]
pub trait StateStoreExt: StateStore {
    /// Reads a record of JSON.
    ///
    /// # Errors
    /// Those of [`StateStore::get`]; `Internal` when the record is not of this type.
    async fn get_json<T: DeserializeOwned>(&self, key: &Key) -> Result<Option<(T, Version)>> {
        match self.get(key).await? {
            None => Ok(None),
            Some(Versioned { value, version }) => Ok(Some((from_json(key, &value)?, version))),
        }
    }

    /// Writes a record as JSON.
    ///
    /// # Errors
    /// Those of [`StateStore::put`].
    async fn put_json<T: Serialize + Sync>(&self, key: &Key, value: &T, only: Precondition) -> Result<Version> {
        self.put(key, to_json(key, value)?, only, None).await
    }

    /// All records of JSON under a prefix, page by page.
    ///
    /// # Errors
    /// Those of [`StateStore::list`]; `Internal` when a record is not of this type.
    async fn list_json<T: DeserializeOwned + Send>(&self, prefix: &str) -> Result<Vec<(Key, T, Version)>> {
        let mut all = Vec::new();
        let mut after: Option<Key> = None;
        loop {
            let page = self.list(prefix, after.as_ref(), MAX_PAGE).await?;
            let last = page.len() < MAX_PAGE;
            after = page.last().map(|(key, _)| key.clone());
            for (key, record) in page {
                let value = from_json(&key, &record.value)?;
                all.push((key, value, record.version));
            }
            if last {
                return Ok(all);
            }
        }
    }

    /// Takes a lease, or says who holds it.
    ///
    /// The token is the version of the lease's record, so it is greater than that of every earlier holder.
    ///
    /// # Errors
    /// `Conflict` while somebody else holds it; those of [`StateStore::put`].
    async fn acquire_lease(&self, name: &str, holder: &str, ttl: Duration) -> Result<Lease> {
        let key = Key::of("lease", &[name])?;
        let record = to_json(&key, &LeaseRecord { holder: holder.to_owned() })?;
        // The clock starts before the write: the store may count from the write's start on.
        let started = tokio::time::Instant::now();
        match self.put(&key, record, Precondition::Absent, Some(ttl)).await {
            Ok(version) => Ok(Lease {
                key,
                holder: holder.to_owned(),
                token: FencingToken(version.0),
                version,
                ttl,
                ends: started + ttl,
            }),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                let holder = match self.get_json::<LeaseRecord>(&key).await? {
                    Some((record, _)) => record.holder,
                    None => "somebody who has just let go".to_owned(),
                };
                Err(Error::new(ErrorKind::Conflict, format!("the lease is held by {holder}"))
                    .with_retry(Retry::Safe)
                    .during("state.acquire_lease")
                    .on(format!("lease {name}")))
            }
            Err(error) => Err(error),
        }
    }

    /// Makes a lease last for its time to live from now on. The token stays.
    ///
    /// # Errors
    /// `Conflict`, reason `LEASE_LOST`, when it ran out or was taken over: stop all work under it at once.
    async fn renew_lease(&self, lease: &mut Lease) -> Result<()> {
        let record = to_json(&lease.key, &LeaseRecord { holder: lease.holder.clone() })?;
        let started = tokio::time::Instant::now();
        let version = self
            .put(&lease.key, record, Precondition::Version(lease.version), Some(lease.ttl))
            .await
            .map_err(lease_lost)?;
        lease.version = version;
        lease.ends = started + lease.ttl;
        Ok(())
    }

    /// Lets a lease go. One that ran out is `AlreadyGone`.
    ///
    /// # Errors
    /// Those of [`StateStore::delete`].
    async fn release_lease(&self, lease: Lease) -> Result<Deletion> {
        match self.delete(&lease.key, Precondition::Version(lease.version)).await {
            Err(error) if error.kind() == ErrorKind::Conflict => Ok(Deletion::AlreadyGone),
            other => other,
        }
    }
}

impl<T: StateStore + ?Sized> StateStoreExt for T {}

fn lease_lost(error: Error) -> Error {
    if error.reason() == Some(reason::VERSION_MISMATCH) {
        return Error::new(ErrorKind::Conflict, "the lease ran out or was taken over")
            .with_reason(reason::LEASE_LOST)
            .during("state.renew_lease");
    }
    error
}

fn to_json<T: Serialize>(key: &Key, value: &T) -> Result<Bytes> {
    serde_json::to_vec(value)
        .map(Bytes::from)
        .map_err(|error| Error::internal("a record cannot be written as JSON").on(key.as_str()).with_source(error))
}

fn from_json<T: DeserializeOwned>(key: &Key, value: &[u8]) -> Result<T> {
    serde_json::from_slice(value).map_err(|error| {
        Error::internal("the stored record has another form than this version reads")
            .on(key.as_str())
            .with_source(error)
    })
}

#[derive(Serialize, Deserialize)]
struct LeaseRecord {
    holder: String,
}

/// Greater for every later holder of a lease. Whoever sees an older one than the newest seen refuses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FencingToken(pub u64);

/// A lease that was taken. Work under it stops before [`Lease::ends`], by this process's own clock.
#[derive(Debug)]
pub struct Lease {
    key: Key,
    holder: String,
    token: FencingToken,
    version: Version,
    ttl: Duration,
    ends: tokio::time::Instant,
}

impl Lease {
    /// The token to send along with every effect.
    pub fn token(&self) -> FencingToken {
        self.token
    }

    /// When it ends unless it is renewed.
    pub fn ends(&self) -> tokio::time::Instant {
        self.ends
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn keys_of_parts_never_collide(a in ".{0,20}", b in ".{0,20}", c in ".{0,20}", d in ".{0,20}") {
            let one = Key::of("k", &[&a, &b]).unwrap();
            let two = Key::of("k", &[&c, &d]).unwrap();
            prop_assert_eq!(one == two, a == c && b == d);
        }
    }

    #[test]
    fn keys_have_a_form() {
        assert!(Key::new("vm/a.b:c-d_e").is_ok());
        for bad in ["", "/a", "a/", "a//b", "a b", "ä"] {
            assert!(Key::new(bad).is_err(), "{bad:?}");
        }
        assert!(Key::new("a".repeat(1025)).is_err());
    }
}
