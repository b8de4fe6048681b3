//! The journal: one record per machine, from the intent to create it until it is gone.
//!
//! ```text
//!   (none) --intent--> Intent --made--> Made --ready--> Ready
//!                        |               |                |
//!                        |  step failed, server killed    | delete asked for
//!                        v               v                v
//!                     Leaving <----------+----------------+
//!                        |
//!                        +-- machine gone --> (none)
//! ```
//!
//! * **Intent**: nothing may exist yet; whatever does carries the record's request.
//! * **Made**: the backend accepted the machine and gave its id.
//! * **Ready**: the machine was answered to a client, and is the client's until it deletes it.
//! * **Leaving**: the machine is to go, because its create failed or because somebody asked. A failed undo
//!   stays here with its reason, and `reconcile` tries again.

use std::{
    fmt,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::{
    Error, ErrorKind, Key, Name, Precondition, RequestId, Result, StateStore, StateStoreExt, Tags, Version, VmId,
    VmSpec,
};

const SCHEMA: u32 = 1;
const RECORDS: &str = "vm";

/// Where a machine stands, as the journal knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "phase")]
pub enum Phase {
    /// About to be made.
    Intent,
    /// Accepted by the backend, not yet ready.
    Made,
    /// Ready, and owned by whoever asked for it.
    Ready,
    /// To be deleted.
    Leaving {
        /// Why, in words for people.
        why: String,
        /// The last failure to delete it, if any.
        stuck: Option<String>,
    },
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Intent => "intent",
            Self::Made => "made",
            Self::Ready => "ready",
            Self::Leaving { .. } => "leaving",
        })
    }
}

/// What the journal keeps of one machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// The form of this record.
    pub schema: u32,
    /// What is to be made; its tags hold the request.
    pub spec: VmSpec,
    /// The machine's id, as soon as the backend gave it.
    pub id: Option<VmId>,
    /// Where it stands.
    #[serde(flatten)]
    pub phase: Phase,
    /// When the intent was written, in milliseconds since 1970.
    pub since_ms: u64,
}

impl VmRecord {
    pub(super) fn intent(spec: VmSpec) -> Self {
        let since_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        Self { schema: SCHEMA, spec, id: None, phase: Phase::Intent, since_ms }
    }

    /// The request that owns the machine.
    pub fn request(&self) -> &RequestId {
        &self.spec.tags.request
    }
}

/// Whether two requests ask for the same machine: everything is equal but the request id.
pub(super) fn same_machine(one: &VmSpec, other: &VmSpec) -> bool {
    let mut other = other.clone();
    other.tags.request = one.tags.request.clone();
    *one == other
}

/// A record as it was read or written last; moving it on needs it unchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) key: Key,
    pub(super) record: VmRecord,
    version: Version,
}

/// The journal of one owner in a store.
#[derive(Clone, Debug)]
pub(super) struct Journal {
    store: Arc<dyn StateStore>,
}

impl Journal {
    pub(super) fn new(store: Arc<dyn StateStore>) -> Self {
        Self { store }
    }

    /// The key of the machine's record: the same for every request for the same name.
    pub(super) fn key(tags: &Tags, name: &Name) -> Result<Key> {
        Key::of(RECORDS, &[tags.owner.as_str(), &tags.scope.exercise, &tags.scope.deployment, name.as_str()])
    }

    /// Writes the intent, unless the name is taken: then `None`.
    pub(super) async fn begin(&self, key: &Key, record: VmRecord) -> Result<Option<Entry>> {
        match self.store.put_json(key, &record, Precondition::Absent).await {
            Ok(version) => Ok(Some(Entry { key: key.clone(), record, version })),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(None),
            // The answer may have been lost after the write: then the record is there, and is ours.
            Err(error) => match self.read(key).await {
                Ok(Some(entry)) if entry.record.request() == record.request() => Ok(Some(entry)),
                _ => Err(error),
            },
        }
    }

    pub(super) async fn read(&self, key: &Key) -> Result<Option<Entry>> {
        let Some((record, version)) = self.store.get_json::<VmRecord>(key).await? else { return Ok(None) };
        check_schema(key, &record)?;
        Ok(Some(Entry { key: key.clone(), record, version }))
    }

    /// The record that owns a machine, found by what the machine itself carries.
    pub(super) async fn find(&self, tags: &Tags, name: &Name) -> Result<Option<Entry>> {
        let entry = self.read(&Self::key(tags, name)?).await?;
        // The name may belong to a later machine by now.
        Ok(entry.filter(|entry| *entry.record.request() == tags.request))
    }

    /// Moves a record on. Fails with `Conflict` when somebody else has moved it since it was read.
    pub(super) async fn advance(&self, entry: &mut Entry, change: impl FnOnce(&mut VmRecord)) -> Result<()> {
        let mut record = entry.record.clone();
        change(&mut record);
        match self.store.put_json(&entry.key, &record, Precondition::Version(entry.version)).await {
            Ok(version) => {
                entry.version = version;
                entry.record = record;
                Ok(())
            }
            Err(error) => match self.read(&entry.key).await {
                // The answer was lost after the write.
                Ok(Some(now)) if now.record == record && now.version > entry.version => {
                    *entry = now;
                    Ok(())
                }
                _ => Err(error),
            },
        }
    }

    /// Forgets a machine that is gone.
    pub(super) async fn close(&self, entry: &Entry) -> Result<()> {
        let mut version = entry.version;
        loop {
            match self.store.delete(&entry.key, Precondition::Version(version)).await {
                Ok(_) => return Ok(()),
                // Moved or forgotten by somebody else, or by a write whose answer was lost.
                Err(error) if error.kind() == ErrorKind::Conflict => match self.read(&entry.key).await? {
                    Some(now) if now.record.request() == entry.record.request() && now.version > version => {
                        version = now.version;
                    }
                    _ => return Ok(()),
                },
                Err(error) => return Err(error),
            }
        }
    }

    pub(super) async fn all(&self, owner: &str) -> Result<Vec<Entry>> {
        let prefix = format!("{}/", Key::of(RECORDS, &[owner])?);
        let mut entries = Vec::new();
        for (key, record, version) in self.store.list_json::<VmRecord>(&prefix).await? {
            check_schema(&key, &record)?;
            entries.push(Entry { key, record, version });
        }
        Ok(entries)
    }
}

fn check_schema(key: &Key, record: &VmRecord) -> Result<()> {
    if record.schema == SCHEMA {
        return Ok(());
    }
    Err(Error::internal(format!(
        "the record has form {}, this version reads form {SCHEMA}; run the version that wrote it",
        record.schema
    ))
    .on(key.as_str()))
}
