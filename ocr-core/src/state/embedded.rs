//! [`EmbeddedStore`]: records in one file, for one machine without any server.
//!
//! The file is a redb database. What makes it a [`StateStore`]:
//!
//! - **Durable.** A write is answered after its commit was synced to the disk. A process killed at any instant loses
//!   nothing that was answered. Writes that wait together share one commit, so that many at once cost one sync.
//! - **One counter of versions** for all keys, stored with the records. It survives deletion, expiry and reopening
//!   without a mark for every key that ever was.
//! - **One process.** The file is locked while it is open. A second opener is told so at once.
//! - **Time** is the wall clock when the file is opened and runs on steadily from there: a clock that is set while
//!   the process runs neither ends nor prolongs a record's life. It never goes back from one opening to the next
//!   either.
//! - **A disk that fails or is full** fails the calls that meet it. The next call opens the file again, so nothing
//!   has to be restarted when the disk has room once more.

use std::{
    collections::VecDeque,
    fmt,
    fs::{self, File, OpenOptions},
    io,
    ops::Bound,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use bytes::Bytes;
use redb::{Database, ReadableDatabase, ReadableTable, Table, TableDefinition};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::Instant,
};

use super::{Key, MAX_PAGE, MAX_VALUE_BYTES, Precondition, StateStore, Version, Versioned};
use crate::{Deletion, Error, ErrorKind, Result, Retry, error::reason};

/// Key to version, end of life ([`NEVER`] without one) and value.
const RECORDS: TableDefinition<&str, (u64, u64, &[u8])> = TableDefinition::new("records");
/// The records that have an end of life, in its order, so that sweeping reads only what it removes.
const ENDS: TableDefinition<(u64, &str), ()> = TableDefinition::new("ends");
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");

const SCHEMA: &str = "schema";
const SCHEMA_NOW: u64 = 1;
const LAST_VERSION: &str = "last_version";
const LAST_TIME_NS: &str = "last_time_ns";

const NEVER: u64 = u64::MAX;
/// The most writes in one commit.
const BATCH: usize = 256;
/// Each commit removes at most this many ended records more than it writes, so sweeping always catches up.
const SWEEP: usize = 64;
/// Writes that wait hold at most this much, in KiB; further ones wait outside.
const WAITING_KIB: usize = 64 << 10;
const CACHE_BYTES: usize = 64 << 20;

/// A [`StateStore`] in one file. See the [module](self).
///
/// Dropping it waits for the commit that runs, and then frees the file.
pub struct EmbeddedStore {
    inner: Arc<Inner>,
}

impl EmbeddedStore {
    /// Opens the file, or makes it. Blocks for as long as the disk takes; after a crash the file is checked and
    /// repaired first.
    ///
    /// A missing folder is made with mode 0700, the file with 0600. A file that is there keeps its mode.
    ///
    /// # Errors
    /// `Conflict` when another process, or this one, has it open; `Unsupported` when a newer version of this software
    /// wrote it; `Denied`, `Exhausted` or `Unavailable` when the disk refuses; `Invalid` when it is something else.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_by(path.as_ref(), Box::new(|file| builder().create_file(file)))
    }

    fn open_by(path: &Path, opener: Opener) -> Result<Self> {
        let database = open_file(path, &opener).map_err(|error| at(path, error))?;
        let last_time_ns = prepare(&database).map_err(|error| at(path, error))?;
        let inner = Inner {
            path: path.to_owned(),
            opener,
            slot: RwLock::new(Slot { database: Some(database), generation: 0, closed: false }),
            clock: Clock::from(last_time_ns),
            queue: Mutex::default(),
            room: Arc::new(Semaphore::new(WAITING_KIB)),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    async fn write(&self, key: &Key, change: Change, only: Precondition) -> Result<Done> {
        let bytes = if let Change::Put { value, .. } = &change { value.len() } else { 0 };
        let room = u32::try_from(1 + (bytes >> 10)).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.inner.room).acquire_many_owned(room).await;
        let room = room.map_err(|_| Error::internal("the store's queue is closed"))?;
        let (answer, answered) = oneshot::channel();
        self.inner.submit(Write { key: key.clone(), change, only, answer, _room: room });
        // Without an answer the runtime stopped before, or the writer died while, the write was done.
        answered.await.unwrap_or_else(|_| {
            Err(Error::unavailable("the store stopped before the write was answered").with_retry(Retry::Ambiguous))
        })
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        let mut slot = self.inner.slot.write().unwrap_or_else(PoisonError::into_inner);
        slot.closed = true;
        slot.database = None;
    }
}

impl fmt::Debug for EmbeddedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedStore").field("path", &self.inner.path).finish_non_exhaustive()
    }
}

#[async_trait]
impl StateStore for EmbeddedStore {
    async fn get(&self, key: &Key) -> Result<Option<Versioned>> {
        let (inner, wanted) = (Arc::clone(&self.inner), key.clone());
        blocking(move || {
            inner.read(|records, now_ns| {
                Ok(records.get(wanted.as_str())?.and_then(|record| {
                    let (version, ends_ns, value) = record.value();
                    (now_ns < ends_ns)
                        .then(|| Versioned { value: Bytes::copy_from_slice(value), version: Version(version) })
                }))
            })
        })
        .await
        .map_err(|error| error.during("state.get").on(key.as_str()))
    }

    async fn put(&self, key: &Key, value: Bytes, only: Precondition, ttl: Option<Duration>) -> Result<Version> {
        let write = async {
            if value.len() > MAX_VALUE_BYTES {
                return Err(Error::invalid(
                    "value",
                    format_args!("wants at most {MAX_VALUE_BYTES} bytes, got {}", value.len()),
                ));
            }
            match self.write(key, Change::Put { value, ttl }, only).await? {
                Done::Put(version) => Ok(version),
                Done::Deleted(_) => Err(Error::internal("a put was answered as a delete")),
            }
        };
        write.await.map_err(|error: Error| error.during("state.put").on(key.as_str()))
    }

    async fn delete(&self, key: &Key, only: Precondition) -> Result<Deletion> {
        let write = async {
            if only == Precondition::Absent {
                return Err(Error::invalid("precondition", "wants Any or Version for a delete, got Absent"));
            }
            match self.write(key, Change::Delete, only).await? {
                Done::Deleted(deletion) => Ok(deletion),
                Done::Put(_) => Err(Error::internal("a delete was answered as a put")),
            }
        };
        write.await.map_err(|error: Error| error.during("state.delete").on(key.as_str()))
    }

    async fn list(&self, prefix: &str, after: Option<&Key>, limit: usize) -> Result<Vec<(Key, Versioned)>> {
        let read = async {
            if !(1..=MAX_PAGE).contains(&limit) {
                return Err(Error::invalid("limit", format_args!("wants 1 to {MAX_PAGE}, got {limit}")));
            }
            let (inner, prefix, after) = (Arc::clone(&self.inner), prefix.to_owned(), after.cloned());
            blocking(move || {
                let page = inner.read(|records, now_ns| page(records, now_ns, &prefix, after.as_ref(), limit))?;
                page.into_iter().map(|(key, record)| Ok((stored_key(key)?, record))).collect()
            })
            .await
        };
        read.await.map_err(|error| error.during("state.list"))
    }
}

type Records = redb::ReadOnlyTable<&'static str, (u64, u64, &'static [u8])>;

fn page(
    records: &Records,
    now_ns: u64,
    prefix: &str,
    after: Option<&Key>,
    limit: usize,
) -> Result<Vec<(String, Versioned)>, redb::Error> {
    let from = match after {
        Some(after) if after.as_str() >= prefix => Bound::Excluded(after.as_str()),
        _ => Bound::Included(prefix),
    };
    let mut page = Vec::new();
    for entry in records.range::<&str>((from, Bound::Unbounded))? {
        let (key, record) = entry?;
        let (version, ends_ns, value) = record.value();
        if page.len() == limit || !key.value().starts_with(prefix) {
            break;
        }
        if now_ns < ends_ns {
            let record = Versioned { value: Bytes::copy_from_slice(value), version: Version(version) };
            page.push((key.value().to_owned(), record));
        }
    }
    Ok(page)
}

fn stored_key(text: String) -> Result<Key> {
    Key::new(text).map_err(|error| Error::internal("the store holds a key that is none").with_source(error))
}

/// The one door to blocking threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => Err(Error::internal("the store failed inside").with_source(error)),
        Err(_) => Err(Error::unavailable("the program is stopping")),
    }
}

struct Inner {
    path: PathBuf,
    opener: Opener,
    slot: RwLock<Slot>,
    clock: Clock,
    queue: Mutex<Queue>,
    room: Arc<Semaphore>,
}

type Opener = Box<dyn Fn(File) -> Result<Database, redb::DatabaseError> + Send + Sync>;

struct Slot {
    /// `None` after the disk failed, until the next call opens it again; for ever once `closed`.
    database: Option<Database>,
    /// Counts openings, so that a late report of a fault does not close a database opened after it.
    generation: u64,
    closed: bool,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Write>,
    /// Whether a [`Writer`] exists. It takes all that waits, also what comes while it works.
    writing: bool,
}

struct Write {
    key: Key,
    change: Change,
    only: Precondition,
    answer: oneshot::Sender<Result<Done>>,
    _room: OwnedSemaphorePermit,
}

enum Change {
    Put { value: Bytes, ttl: Option<Duration> },
    Delete,
}

enum Done {
    Put(Version),
    Deleted(Deletion),
}

impl Inner {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(self: &Arc<Self>, write: Write) {
        let first = {
            let mut queue = self.queue();
            queue.waiting.push_back(write);
            !std::mem::replace(&mut queue.writing, true)
        };
        if first {
            let writer = Writer { inner: Arc::clone(self), ended: false };
            tokio::task::spawn_blocking(move || writer.run());
        }
    }

    fn read<T>(&self, work: impl FnOnce(&Records, u64) -> Result<T, redb::Error>) -> Result<T> {
        self.with_database(|database| {
            let records = database.begin_read()?.open_table(RECORDS)?;
            work(&records, self.clock.now_ns())
        })
        .map_err(|fault| fault.into_error(Retry::Safe))
    }

    /// Works with the database, opening it again when an earlier call found it broken.
    fn with_database<T>(&self, work: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, Fault> {
        let mut slot = self.slot.read().unwrap_or_else(PoisonError::into_inner);
        while slot.database.is_none() {
            drop(slot);
            self.reopen()?;
            slot = self.slot.read().unwrap_or_else(PoisonError::into_inner);
        }
        let Some(database) = &slot.database else { return Err(Fault::Closed) };
        let generation = slot.generation;
        let result = work(database);
        drop(slot);
        result.map_err(|error| {
            if breaks(&error) {
                let mut slot = self.slot.write().unwrap_or_else(PoisonError::into_inner);
                if slot.generation == generation {
                    slot.database = None;
                }
            }
            Fault::Store(error)
        })
    }

    fn reopen(&self) -> Result<(), Fault> {
        let mut slot = self.slot.write().unwrap_or_else(PoisonError::into_inner);
        if slot.closed {
            return Err(Fault::Closed);
        }
        if slot.database.is_none() {
            let database = open_file(&self.path, &self.opener).map_err(Fault::Reopen)?;
            prepare(&database).map_err(Fault::Reopen)?;
            slot.database = Some(database);
            slot.generation += 1;
            tracing::warn!(path = %self.path.display(), "opened the state file again after a fault");
        }
        Ok(())
    }
}

/// Does the writes that wait, in batches, until none does.
struct Writer {
    inner: Arc<Inner>,
    /// Whether it ended because nothing waited any more.
    ended: bool,
}

impl Writer {
    fn run(mut self) {
        loop {
            let batch: Vec<Write> = {
                let mut queue = self.inner.queue();
                let count = queue.waiting.len().min(BATCH);
                if count == 0 {
                    queue.writing = false;
                    self.ended = true;
                    return;
                }
                queue.waiting.drain(..count).collect()
            };
            self.write(batch);
        }
    }

    fn write(&self, batch: Vec<Write>) {
        let mut committing = false;
        let result = self.inner.with_database(|database| commit(database, &self.inner.clock, &batch, &mut committing));
        match result {
            Ok(done) => {
                for (write, done) in batch.into_iter().zip(done) {
                    // Nobody waits any more when the caller gave up; the write stands all the same.
                    let _ = write.answer.send(done);
                }
            }
            Err(fault) => {
                let retry = if committing { Retry::Ambiguous } else { Retry::Safe };
                tracing::warn!(path = %self.inner.path.display(), writes = batch.len(), fault = %fault, "a commit failed");
                let error = fault.into_error(retry);
                for write in batch {
                    let _ = write.answer.send(Err(copy(&error)));
                }
            }
        }
    }
}

impl Drop for Writer {
    /// When it ends early (a panic, a runtime that never ran it), those who wait must not wait for ever.
    fn drop(&mut self) {
        if !self.ended {
            let mut queue = self.inner.queue();
            queue.writing = false;
            for write in queue.waiting.drain(..) {
                let _ = write.answer.send(Err(Error::unavailable("the program is stopping").with_retry(Retry::Safe)));
            }
        }
    }
}

/// Does all writes of a batch in one transaction. A write that fails its precondition changes nothing; its answer
/// still waits for the commit, because it may rest on an earlier write of the same batch.
fn commit(
    database: &Database,
    clock: &Clock,
    batch: &[Write],
    committing: &mut bool,
) -> Result<Vec<Result<Done>>, redb::Error> {
    let transaction = database.begin_write()?;
    let mut done = Vec::with_capacity(batch.len());
    let changed = {
        let mut tables = Tables {
            records: transaction.open_table(RECORDS)?,
            ends: transaction.open_table(ENDS)?,
            now_ns: clock.now_ns(),
            last_version: 0,
        };
        let mut meta = transaction.open_table(META)?;
        let before = meta.get(LAST_VERSION)?.map_or(0, |version| version.value());
        tables.last_version = before;
        let mut changed = false;
        for write in batch {
            let result = tables.apply(write)?;
            changed |= matches!(result, Ok(Done::Put(_) | Done::Deleted(Deletion::Deleted)));
            done.push(result);
        }
        if changed {
            tables.sweep(batch.len() + SWEEP)?;
            meta.insert(LAST_VERSION, tables.last_version)?;
            meta.insert(LAST_TIME_NS, tables.now_ns)?;
        }
        changed
    };
    if changed {
        *committing = true;
        transaction.commit()?;
    } else {
        transaction.abort()?;
    }
    Ok(done)
}

struct Tables<'t> {
    records: Table<'t, &'static str, (u64, u64, &'static [u8])>,
    ends: Table<'t, (u64, &'static str), ()>,
    now_ns: u64,
    last_version: u64,
}

impl Tables<'_> {
    fn apply(&mut self, write: &Write) -> Result<Result<Done>, redb::Error> {
        let key = write.key.as_str();
        let stored = self.records.get(key)?.map(|record| {
            let (version, ends_ns, _) = record.value();
            (version, ends_ns)
        });
        let live = stored.filter(|&(_, ends_ns)| self.now_ns < ends_ns).map(|(version, _)| Version(version));
        if let Err(error) = check(write.only, live) {
            return Ok(Err(error));
        }
        match &write.change {
            Change::Put { value, ttl } => {
                let ends_ns = ttl
                    .map_or(NEVER, |ttl| self.now_ns.saturating_add(u64::try_from(ttl.as_nanos()).unwrap_or(u64::MAX)));
                self.last_version += 1;
                self.forget_end(key, stored)?;
                self.records.insert(key, (self.last_version, ends_ns, value.as_ref()))?;
                if ends_ns != NEVER {
                    self.ends.insert((ends_ns, key), ())?;
                }
                Ok(Ok(Done::Put(Version(self.last_version))))
            }
            // One that ended is left to the sweep.
            Change::Delete if live.is_none() => Ok(Ok(Done::Deleted(Deletion::AlreadyGone))),
            Change::Delete => {
                self.forget_end(key, stored)?;
                self.records.remove(key)?;
                Ok(Ok(Done::Deleted(Deletion::Deleted)))
            }
        }
    }

    fn forget_end(&mut self, key: &str, stored: Option<(u64, u64)>) -> Result<(), redb::Error> {
        if let Some((_, ends_ns)) = stored.filter(|&(_, ends_ns)| ends_ns != NEVER) {
            self.ends.remove((ends_ns, key))?;
        }
        Ok(())
    }

    fn sweep(&mut self, at_most: usize) -> Result<(), redb::Error> {
        for _ in 0..at_most {
            let ended = self.ends.first()?.and_then(|(entry, _)| {
                let (ends_ns, key) = entry.value();
                (ends_ns <= self.now_ns).then(|| (ends_ns, key.to_owned()))
            });
            let Some((ends_ns, key)) = ended else { return Ok(()) };
            self.ends.remove((ends_ns, key.as_str()))?;
            self.records.remove(key.as_str())?;
        }
        Ok(())
    }
}

fn check(only: Precondition, live: Option<Version>) -> Result<()> {
    match (only, live) {
        (Precondition::Any, _) | (Precondition::Absent, None) => Ok(()),
        (Precondition::Version(wanted), Some(version)) if wanted == version => Ok(()),
        (Precondition::Absent, Some(version)) => {
            Err(Error::new(ErrorKind::AlreadyExists, format!("there is a record already, version {}", version.0)))
        }
        (Precondition::Version(wanted), live) => {
            let found = live.map_or_else(|| "there is none".to_owned(), |version| format!("it has {}", version.0));
            Err(Error::new(ErrorKind::Conflict, format!("the record should have version {}, but {found}", wanted.0))
                .with_reason(reason::VERSION_MISMATCH))
        }
    }
}

/// Nanoseconds since 1970 that never go back, whatever happens to the wall clock.
struct Clock {
    opened_ns: u64,
    opened: Instant,
}

impl Clock {
    /// Starts at the wall clock, or where it stood when the file was last written, whichever is later.
    fn from(last_ns: u64) -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { opened_ns: u64::try_from(wall.as_nanos()).unwrap_or(0).max(last_ns), opened: Instant::now() }
    }

    fn now_ns(&self) -> u64 {
        let since = Instant::now().saturating_duration_since(self.opened);
        self.opened_ns.saturating_add(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

/// Opens the file, or makes it whole under another name and then gives it its own. A file in the making that a crash
/// left half done would be refused for ever.
fn open_file(path: &Path, opener: &Opener) -> Result<Database, OpenFault> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_folder(folder)?;
    loop {
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) if file.metadata()?.is_file() => return Ok(opener(file)?),
            Ok(_) => return Err(OpenFault::NotAFile),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => return Err(OpenFault::NotAFile),
            Err(error) => return Err(error.into()),
        }
        // Its mode is 0600.
        let (file, made) = tempfile::Builder::new().prefix(".state-").suffix(".new").tempfile_in(folder)?.into_parts();
        let database = opener(file)?;
        prepare(&database)?;
        match made.persist_noclobber(path) {
            Ok(()) => {
                // Without this a power cut may lose the name of a file whose content is safe.
                File::open(folder)?.sync_all()?;
                return Ok(database);
            }
            // Somebody else was faster: theirs it is.
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.error.into()),
        }
    }
}

fn make_folder(folder: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

/// Checks the schema, makes the tables of a new file, and gives the time of the last write.
fn prepare(database: &Database) -> Result<u64, OpenFault> {
    let is_new = {
        let transaction = database.begin_read().map_err(redb::Error::from)?;
        transaction.list_tables().map_err(redb::Error::from)?.next().is_none()
    };
    if is_new {
        let make = || -> Result<(), redb::Error> {
            let transaction = database.begin_write()?;
            transaction.open_table(RECORDS)?;
            transaction.open_table(ENDS)?;
            transaction.open_table(META)?.insert(SCHEMA, SCHEMA_NOW)?;
            Ok(transaction.commit()?)
        };
        make()?;
        return Ok(0);
    }
    let read = || -> Result<(Option<u64>, u64), redb::Error> {
        let meta = database.begin_read()?.open_table(META)?;
        let schema = meta.get(SCHEMA)?.map(|schema| schema.value());
        let last_time_ns = meta.get(LAST_TIME_NS)?.map_or(0, |time| time.value());
        Ok((schema, last_time_ns))
    };
    match read() {
        Ok((Some(SCHEMA_NOW), last_time_ns)) => Ok(last_time_ns),
        Ok((Some(schema), _)) if schema > SCHEMA_NOW => Err(OpenFault::Newer(schema)),
        Ok(_) | Err(redb::Error::TableDoesNotExist(_) | redb::Error::TableTypeMismatch { .. }) => {
            Err(OpenFault::NotOurs)
        }
        Err(error) => Err(error.into()),
    }
}

/// Why the file could not be opened.
#[derive(Debug, thiserror::Error)]
enum OpenFault {
    #[error("it is not a regular file")]
    NotAFile,
    #[error("it is a database of something else")]
    NotOurs,
    #[error("a newer version of this software wrote it (schema {0}, this one reads {SCHEMA_NOW})")]
    Newer(u64),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Open(#[from] redb::DatabaseError),
    #[error(transparent)]
    Store(#[from] redb::Error),
}

fn at(path: &Path, fault: OpenFault) -> Error {
    fault.into_error().during("state.open").on(format!("state file {}", path.display()))
}

impl OpenFault {
    fn into_error(self) -> Error {
        use redb::{DatabaseError as D, StorageError as S};
        match self {
            Self::NotAFile | Self::NotOurs => Error::new(ErrorKind::Invalid, self.to_string()),
            Self::Newer(_) => Error::unsupported(self.to_string()),
            Self::Open(D::DatabaseAlreadyOpen) => {
                Error::new(ErrorKind::Conflict, "another process has it open, or this one twice")
                    .with_retry(Retry::Safe)
            }
            Self::Open(D::UpgradeRequired(_)) => {
                Error::unsupported("it has an older format that this version no longer reads")
            }
            Self::Open(D::Storage(S::Io(error))) if error.kind() == io::ErrorKind::InvalidData => {
                Error::new(ErrorKind::Invalid, "it is no state file").with_source(error)
            }
            Self::Io(error) | Self::Open(D::Storage(S::Io(error))) => disk_error(error),
            Self::Open(error) => store_error(error.into()),
            Self::Store(error) => store_error(error),
        }
    }
}

/// Why a call failed for reasons of the store.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("the store is closed")]
    Closed,
    #[error("the state file cannot be opened again: {0}")]
    Reopen(OpenFault),
    #[error(transparent)]
    Store(redb::Error),
}

impl Fault {
    fn into_error(self, retry: Retry) -> Error {
        match self {
            Self::Closed => Error::unavailable("the store is closed").with_retry(Retry::Never),
            Self::Reopen(fault) => fault.into_error().with_retry(Retry::Safe),
            Self::Store(error) => store_error(error).with_retry(retry),
        }
    }
}

/// Whether the database must be opened again before it is of any use.
fn breaks(error: &redb::Error) -> bool {
    use redb::Error as E;
    matches!(error, E::Io(_) | E::PreviousIo | E::DatabaseClosed | E::LockPoisoned(_))
}

fn store_error(error: redb::Error) -> Error {
    match error {
        redb::Error::Io(error) => disk_error(error),
        redb::Error::PreviousIo => Error::unavailable("the disk failed a call before this one"),
        redb::Error::Corrupted(_) => Error::internal("the state file is damaged").with_source(error),
        other => Error::internal("the state file cannot be used").with_source(other),
    }
}

fn disk_error(error: io::Error) -> Error {
    use io::ErrorKind as K;
    match error.kind() {
        K::StorageFull | K::QuotaExceeded | K::FileTooLarge => {
            Error::new(ErrorKind::Exhausted, "the disk of the state file is full")
        }
        K::PermissionDenied | K::ReadOnlyFilesystem => {
            Error::new(ErrorKind::Denied, "this process may not read and write the state file")
        }
        _ => Error::unavailable("the disk of the state file failed"),
    }
    .with_source(error)
}

/// The same error for each write of a batch. The cause was logged with the batch.
fn copy(error: &Error) -> Error {
    Error::new(error.kind(), error.message()).with_retry(error.retry())
}

#[cfg(test)]
mod tests;
