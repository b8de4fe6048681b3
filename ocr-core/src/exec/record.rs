//! What the store keeps of an install, and how.
//!
//! What is secret of it is sealed, or stays in this process; see [`secrets`](super::secrets).
//!
//! Two keys for each: the record under its own id, and an empty one under its machine, so that a machine's records are
//! found without reading everybody's. The record is written first, since it is the intent, and deleted first; a
//! machine's key alone means nothing.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    Deletion, Error, ErrorKind, InstallId, Key, MemberId, Precondition, Result, Retry, StateStore, Version, Versioned,
    VmId,
    error::reason,
    exec::{
        InstallKind, InstallRecord, SecretStorage,
        secrets::{Kept, Place, Secrets},
    },
    fleet::Fleet,
    state::{MAX_PAGE, MAX_VALUE_BYTES},
};

/// The form of the records this version writes.
///
/// 1 had a condition's environment in clear; 2 has it sealed.
const SCHEMA: u32 = 2;
/// The longest that one call of the store may take.
const CALL_LIMIT: Duration = Duration::from_secs(30);
const RECORDS: &str = "exec/install/";
const BY_VM: &str = "exec/vm/";

/// How far an install has come.
///
/// ```text
///            intent            assets are there        all done
///  (none) ----------> Copying ------------------> Acting --------> Installed
///                        |                          |                 | remove
///                        | undo                     | undo            v
///                        v                          v              Removing
///                     (none) <----------------------+-----------------+
/// ```
///
/// What a killed server leaves in `Copying`, `Acting` or `Removing` is undone or finished by `Executor::recover`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stage {
    /// Some assets may be there, each whole or not at all. No action has run.
    Copying,
    /// All assets were written; the action may have run, and may have changed them.
    Acting,
    /// All of it succeeded and the caller was, or could have been, told.
    Installed,
    /// A removal began.
    Removing,
}

/// One install.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    schema: u32,
    pub(super) id: InstallId,
    pub(super) kind: StoredKind,
    pub(super) name: String,
    pub(super) vm: VmId,
    pub(super) stage: Stage,
    /// Which member of the fleet works on it, unless it is installed: others leave it alone while that one lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) member: Option<MemberId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) package: Option<StoredPackage>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) assets: Vec<StoredAsset>,
    /// The account's name; the switch to it needs no secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) user: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) delete_action: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) probe: Option<StoredProbe>,
    /// What is needed again later and nobody may read. It never is a part of the record's own text.
    #[serde(skip)]
    pub(super) secrets: Secrets,
}

/// A record as the store has it.
#[derive(Serialize)]
struct Form<'a> {
    #[serde(flatten)]
    record: &'a Record,
    #[serde(flatten)]
    kept: Kept,
}

/// What is read of it.
#[derive(Deserialize)]
struct Read {
    #[serde(flatten)]
    record: Record,
    #[serde(flatten)]
    kept: Kept,
    /// Of the first schema, which had it in clear.
    #[serde(default)]
    environment: BTreeMap<String, String>,
}

/// The store's own words for [`InstallKind`], so that renaming a variant never makes records unreadable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum StoredKind {
    Feature,
    Inject,
    Condition,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredPackage {
    pub(super) name: String,
    pub(super) version: String,
    pub(super) sha256: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredAsset {
    pub(super) path: String,
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredProbe {
    pub(super) line: String,
    pub(super) interval_ms: u64,
}

impl StoredProbe {
    pub(super) fn new(line: String, interval: Duration) -> Self {
        Self { line, interval_ms: u64::try_from(interval.as_millis()).unwrap_or(u64::MAX) }
    }

    pub(super) fn interval(&self) -> Duration {
        Duration::from_millis(self.interval_ms)
    }
}

impl From<InstallKind> for StoredKind {
    fn from(kind: InstallKind) -> Self {
        match kind {
            InstallKind::Feature => Self::Feature,
            InstallKind::Inject => Self::Inject,
            InstallKind::Condition => Self::Condition,
        }
    }
}

impl From<StoredKind> for InstallKind {
    fn from(kind: StoredKind) -> Self {
        match kind {
            StoredKind::Feature => Self::Feature,
            StoredKind::Inject => Self::Inject,
            StoredKind::Condition => Self::Condition,
        }
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record")
            .field("id", &self.id)
            .field("kind", &self.kind)
            .field("name", &self.name)
            .field("vm", &self.vm)
            .field("stage", &self.stage)
            .field("member", &self.member)
            .field("package", &self.package)
            .field("assets", &self.assets)
            .field("user", &self.user)
            .field("delete_action", &self.delete_action)
            .field("probe", &self.probe)
            .field("secrets", &self.secrets)
            .finish()
    }
}

impl Record {
    /// A record with no more than what every install has, at its first stage.
    pub(super) fn new(kind: InstallKind, name: String, vm: VmId) -> Self {
        Self {
            schema: SCHEMA,
            id: InstallId::random(),
            kind: kind.into(),
            name,
            vm,
            stage: Stage::Copying,
            member: None,
            package: None,
            assets: Vec::new(),
            user: None,
            delete_action: None,
            probe: None,
            secrets: Secrets::default(),
        }
    }

    pub(super) fn kind(&self) -> InstallKind {
        self.kind.into()
    }

    /// Whether its machine has to be touched to undo or remove it.
    pub(super) fn touches_guest(&self) -> bool {
        !self.assets.is_empty() || self.delete_action.is_some()
    }

    /// Checks that the store can take it.
    pub(super) fn check_size(&self) -> Result<()> {
        let bytes = to_json(self)?.len() + self.secrets.stored_bytes();
        if bytes > MAX_VALUE_BYTES {
            return Err(Error::invalid(
                "assets",
                format_args!(
                    "the record of {} assets would take {bytes} bytes; at most {MAX_VALUE_BYTES} can be stored",
                    self.assets.len()
                ),
            ));
        }
        Ok(())
    }

    /// Its part for other programs.
    pub(super) fn public(&self) -> InstallRecord {
        InstallRecord {
            id: self.id,
            kind: self.kind(),
            name: self.name.clone(),
            vm: self.vm,
            package: self.package.as_ref().map(|package| (package.name.clone(), package.version.clone())),
            interval: self.probe.as_ref().map(StoredProbe::interval),
        }
    }
}

fn to_json(value: &impl Serialize) -> Result<Bytes> {
    serde_json::to_vec(value)
        .map(Bytes::from)
        .map_err(|error| Error::internal("an install cannot be written as JSON").with_source(error))
}

/// A record and the version a write of it must name.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) record: Record,
    pub(super) version: Version,
}

/// The installs in a store.
#[derive(Clone, Debug)]
pub(super) struct Records {
    store: Arc<dyn StateStore>,
    secrets: Place,
    fleet: Option<Fleet>,
}

impl Records {
    pub(super) fn new(store: Arc<dyn StateStore>, secrets: SecretStorage, fleet: Option<Fleet>) -> Self {
        Self { store, secrets: Place::new(secrets), fleet }
    }

    /// Who works on a record that is at this stage from now on: this process.
    fn worker(&self, stage: Stage) -> Result<Option<MemberId>> {
        match &self.fleet {
            Some(fleet) if stage != Stage::Installed => fleet.require_member().map(Some),
            _ => Ok(None),
        }
    }

    /// Whether the session ended under which this record's work began.
    pub(super) fn is_of_another_session(&self, record: &Record) -> bool {
        self.fleet.as_ref().is_some_and(|fleet| record.member != fleet.member())
    }

    /// Checks that a record's secrets may be kept, before anything is done for it.
    ///
    /// # Errors
    /// `Conflict` with reason `SEALED` when there is no key to seal them with.
    pub(super) fn check(&self, record: &Record) -> Result<()> {
        self.secrets.check(&record.secrets)
    }

    fn read(&self, key: &Key, value: &[u8]) -> Result<Record> {
        #[derive(Deserialize)]
        struct Schema {
            schema: u32,
        }
        let unreadable = |error: serde_json::Error| {
            Error::internal("the stored install has another form than this version reads")
                .on(key.as_str())
                .with_source(error)
        };
        let Schema { schema } = serde_json::from_slice(value).map_err(unreadable)?;
        if schema > SCHEMA {
            return Err(Error::internal(format!(
                "the stored install has form {schema}, written by a newer version; this one reads up to {SCHEMA}"
            ))
            .on(key.as_str()));
        }
        let Read { mut record, kept, environment } = serde_json::from_slice(value).map_err(unreadable)?;
        record.schema = SCHEMA;
        record.secrets = match schema {
            1 => Secrets::of_environment(environment),
            _ => self.secrets.find(key.as_str(), record.id, kept),
        };
        Ok(record)
    }

    fn write(&self, key: &Key, record: &Record) -> Result<Bytes> {
        let kept = self.secrets.keep(key.as_str(), record.id, &record.secrets)?;
        to_json(&Form { record, kept })
    }

    /// Writes a new record.
    pub(super) async fn create(&self, record: &Record) -> Result<Stored> {
        let key = key(record.id)?;
        let record = Record { member: self.worker(record.stage)?, ..record.clone() };
        let version = self.put(&key, self.write(&key, &record)?, Precondition::Absent).await?;
        self.put(&index_key(record.vm, record.id)?, Bytes::new(), Precondition::Any).await?;
        Ok(Stored { record, version })
    }

    pub(super) async fn get(&self, id: InstallId) -> Result<Option<Stored>> {
        let key = key(id)?;
        match bounded(self.store.get(&key)).await? {
            None => Ok(None),
            Some(Versioned { value, version }) => Ok(Some(Stored { record: self.read(&key, &value)?, version })),
        }
    }

    /// Moves a record to another stage, if nobody else has changed it.
    ///
    /// A write whose outcome is unknown is looked up, and repeated until `deadline`: it must not be that the guest is
    /// ahead of the store for a hiccup of the store.
    pub(super) async fn advance(&self, stored: &mut Stored, stage: Stage, deadline: Duration) -> Result<()> {
        let next = Record { stage, member: self.worker(stage)?, ..stored.record.clone() };
        let key = key(next.id)?;
        let ends = tokio::time::Instant::now() + deadline;
        let mut pause = Duration::from_millis(20);
        let mut expected = stored.version;
        loop {
            let error = match self.put(&key, self.write(&key, &next)?, Precondition::Version(expected)).await {
                Ok(version) => {
                    *stored = Stored { record: next, version };
                    return Ok(());
                }
                Err(error) if error.retry() == Retry::Never && error.reason() != Some(reason::VERSION_MISMATCH) => {
                    return Err(error);
                }
                Err(error) => error,
            };
            // An earlier try of this very call may be what made the version another one.
            match self.get(next.id).await {
                Ok(Some(seen)) if seen.record == next => {
                    *stored = seen;
                    return Ok(());
                }
                Ok(Some(seen)) if seen.record == stored.record => expected = seen.version,
                Ok(_) => {
                    return Err(Error::new(ErrorKind::Conflict, "the install was removed or changed meanwhile")
                        .with_source(error));
                }
                Err(_) => {}
            }
            if tokio::time::Instant::now() + pause > ends {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// Drops a record, whatever it says by now.
    pub(super) async fn delete(&self, vm: VmId, id: InstallId) -> Result<Deletion> {
        let deletion = bounded(self.store.delete(&key(id)?, Precondition::Any)).await?;
        self.secrets.forget(id);
        self.delete_index(vm, id).await?;
        Ok(deletion)
    }

    /// The ids of a machine's installs, also of some that are gone.
    pub(super) async fn ids_of(&self, vm: VmId) -> Result<Vec<InstallId>> {
        let prefix = format!("{BY_VM}{vm}/");
        let mut ids = Vec::new();
        let mut after: Option<Key> = None;
        loop {
            let page = bounded(self.store.list(&prefix, after.as_ref(), MAX_PAGE)).await?;
            ids.extend(page.iter().filter_map(|(key, _)| id_in(key)));
            if page.len() < MAX_PAGE {
                return Ok(ids);
            }
            after = page.last().map(|(key, _)| key.clone());
        }
    }

    /// A machine's installs.
    pub(super) async fn of_vm(&self, vm: VmId) -> Result<Vec<Stored>> {
        let mut found = Vec::new();
        for id in self.ids_of(vm).await? {
            found.extend(self.get(id).await?);
        }
        Ok(found)
    }

    /// A page of all installs, and where the next one begins. Those that cannot be read are errors of their own.
    pub(super) async fn page(&self, after: Option<&Key>) -> Result<(Vec<Result<Stored>>, Option<Key>)> {
        let page = bounded(self.store.list(RECORDS, after, MAX_PAGE)).await?;
        let next = (page.len() == MAX_PAGE).then(|| page.last().map(|(key, _)| key.clone())).flatten();
        let read = page
            .into_iter()
            .map(|(key, Versioned { value, version })| self.read(&key, &value).map(|record| Stored { record, version }))
            .collect();
        Ok((read, next))
    }

    /// Machines' keys, a page at a time.
    pub(super) async fn index_page(&self, after: Option<&Key>) -> Result<(Vec<(VmId, InstallId)>, Option<Key>)> {
        let page = bounded(self.store.list(BY_VM, after, MAX_PAGE)).await?;
        let next = (page.len() == MAX_PAGE).then(|| page.last().map(|(key, _)| key.clone())).flatten();
        Ok((page.iter().filter_map(|(key, _)| Some((vm_in(key)?, id_in(key)?))).collect(), next))
    }

    /// Drops a machine's key that has no record.
    pub(super) async fn delete_index(&self, vm: VmId, id: InstallId) -> Result<()> {
        bounded(self.store.delete(&index_key(vm, id)?, Precondition::Any)).await.map(drop)
    }

    async fn put(&self, key: &Key, value: Bytes, only: Precondition) -> Result<Version> {
        bounded(self.store.put(key, value, only, None)).await
    }
}

/// A store that does not answer must not keep an install, and with it a machine, for ever.
async fn bounded<T>(call: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(CALL_LIMIT, call).await {
        Ok(result) => result,
        Err(_) => Err(Error::timed_out(format!("the store did not answer in {}", crate::error::seconds(CALL_LIMIT)))),
    }
}

fn key(id: InstallId) -> Result<Key> {
    Key::new(format!("{RECORDS}{id}"))
}

fn index_key(vm: VmId, id: InstallId) -> Result<Key> {
    Key::new(format!("{BY_VM}{vm}/{id}"))
}

fn id_in(key: &Key) -> Option<InstallId> {
    key.as_str().rsplit('/').next()?.parse().ok()
}

fn vm_in(key: &Key) -> Option<VmId> {
    key.as_str().strip_prefix(BY_VM)?.split('/').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        memory::MemoryState,
        seal::{SealKey, Sealer},
    };

    fn record() -> Record {
        let mut record = Record::new(InstallKind::Condition, "c".into(), VmId::random());
        record.probe = Some(StoredProbe { line: "echo 1".into(), interval_ms: 1500 });
        record.secrets = Secrets::of_environment([("TOKEN".into(), "canary-value".into())].into());
        record
    }

    fn records() -> Records {
        let sealer = Sealer::new(vec![SealKey::generate()]).unwrap();
        Records::new(Arc::new(MemoryState::new()), SecretStorage::Sealed(Arc::new(sealer)), None)
    }

    #[test]
    fn a_record_comes_back_as_written() {
        let (records, record) = (records(), record());
        let key = key(record.id).unwrap();
        let text = records.write(&key, &record).unwrap();
        assert_eq!(records.read(&key, &text).unwrap(), record);
        assert!(!String::from_utf8_lossy(&text).contains("canary"), "{text:?}");
    }

    #[test]
    fn a_record_of_the_first_version_stays_readable() {
        let text = r#"{"schema":1,"id":"6f1c1d3e-8d0b-4a58-9d7f-0b1c2d3e4f50","kind":"feature","name":"web",
            "vm":"11111111-2222-4333-8444-555555555555","stage":"installed",
            "package":{"name":"web","version":"1.0.0","sha256":"00"},
            "assets":[{"path":"/srv/a","bytes":3,"sha256":"11"}],"user":"ada","delete_action":"rm -rf /srv",
            "environment":{"A":"b"}}"#;
        let key = Key::new("exec/install/x").unwrap();
        let records = records();
        let record = records.read(&key, text.as_bytes()).unwrap();
        assert_eq!(
            (record.kind(), record.stage, record.user.as_deref()),
            (InstallKind::Feature, Stage::Installed, Some("ada"))
        );
        assert_eq!(record.assets[0].path, "/srv/a");
        // From its next write on it has the second form.
        let text = records.write(&key, &record).unwrap();
        assert!(!String::from_utf8_lossy(&text).contains("environment"), "{text:?}");
        assert_eq!(
            *records.read(&key, &text).unwrap().secrets.environment().unwrap(),
            [("A".into(), "b".into())].into()
        );
    }

    #[test]
    fn a_record_of_a_later_version_is_refused_and_named() {
        let key = Key::new("exec/install/x").unwrap();
        let error = records().read(&key, br#"{"schema":3,"new":true}"#).unwrap_err();
        assert!(error.to_string().contains("newer version") && error.to_string().contains("exec/install/x"), "{error}");
    }

    #[test]
    fn a_record_shows_no_values_of_its_environment() {
        let shown = format!("{:?}", record());
        assert!(shown.contains("TOKEN") && !shown.contains("canary"), "{shown}");
    }

    #[test]
    fn keys_give_their_ids_back() {
        let (vm, id) = (VmId::random(), InstallId::random());
        let key = index_key(vm, id).unwrap();
        assert_eq!((vm_in(&key), id_in(&key)), (Some(vm), Some(id)));
    }

    #[test]
    fn a_record_that_no_store_takes_is_refused_beforehand() {
        let mut record = record();
        let asset = StoredAsset { path: format!("/{}", "x".repeat(200)), bytes: 1, sha256: "0".repeat(64) };
        record.assets = vec![asset.clone(); 3000];
        record.check_size().unwrap();
        record.assets.extend(vec![asset; 3000]);
        let error = record.check_size().unwrap_err();
        assert!(error.to_string().contains("6000 assets"), "{error}");
    }
}
