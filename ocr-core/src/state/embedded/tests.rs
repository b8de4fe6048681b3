use std::{
    collections::{BTreeMap, HashMap},
    io::{BufRead, BufReader, Write as _},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use proptest::prelude::*;
use redb::{ReadableTableMetadata, StorageBackend, backends::FileBackend};
use tempfile::TempDir;

use super::*;
use crate::{FencingToken, StateStoreExt};

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

fn fresh() -> (TempDir, EmbeddedStore) {
    let folder = TempDir::new().unwrap();
    let store = EmbeddedStore::open(folder.path().join("state.redb")).unwrap();
    (folder, store)
}

fn reopen(store: EmbeddedStore) -> EmbeddedStore {
    let path = store.path().to_owned();
    drop(store);
    EmbeddedStore::open(path).unwrap()
}

async fn put(store: &EmbeddedStore, name: &str, value: &'static str) -> Version {
    store.put(&key(name), Bytes::from(value), Precondition::Any, None).await.unwrap()
}

async fn value(store: &EmbeddedStore, name: &str) -> Option<Bytes> {
    store.get(&key(name)).await.unwrap().map(|record| record.value)
}

fn stored(store: &EmbeddedStore) -> (u64, u64) {
    let slot = store.inner.slot.read().unwrap();
    let transaction = slot.database.as_ref().unwrap().begin_read().unwrap();
    (transaction.open_table(RECORDS).unwrap().len().unwrap(), transaction.open_table(ENDS).unwrap().len().unwrap())
}

#[tokio::test]
async fn a_record_comes_back_as_written() {
    let (_folder, store) = fresh();
    for bytes in [Bytes::new(), Bytes::from_static(b"\0\xff"), Bytes::from(vec![7; MAX_VALUE_BYTES])] {
        let version = store.put(&key("a"), bytes.clone(), Precondition::Any, None).await.unwrap();
        assert_eq!(store.get(&key("a")).await.unwrap(), Some(Versioned { value: bytes, version }));
    }
    assert_eq!(store.get(&key("never/written")).await.unwrap(), None);
}

#[tokio::test]
async fn a_value_over_the_limit_is_refused() {
    let (_folder, store) = fresh();
    let big = Bytes::from(vec![0; MAX_VALUE_BYTES + 1]);
    let error = store.put(&key("a"), big, Precondition::Any, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().starts_with("state.put (a): value: wants at most 1048576 bytes"), "{error}");
    assert_eq!(value(&store, "a").await, None);
}

#[tokio::test(start_paused = true)]
async fn versions_grow_over_overwriting_deletion_expiry_and_reopening() {
    let (_folder, mut store) = fresh();
    let mut last = Version(0);
    for round in 0..3 {
        for _ in 0..2 {
            let version = put(&store, "a", "x").await;
            assert!(version > last);
            last = version;
        }
        assert_eq!(store.delete(&key("a"), Precondition::Any).await.unwrap(), Deletion::Deleted);
        if round == 1 {
            let ttl = Some(Duration::from_secs(1));
            last = store.put(&key("a"), Bytes::new(), Precondition::Absent, ttl).await.unwrap();
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        store = reopen(store);
    }
}

#[tokio::test]
async fn absent_means_that_there_is_no_record() {
    let (_folder, store) = fresh();
    let first = store.put(&key("a"), Bytes::from("1"), Precondition::Absent, None).await.unwrap();
    let error = store.put(&key("a"), Bytes::from("2"), Precondition::Absent, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    let record = store.get(&key("a")).await.unwrap().unwrap();
    assert_eq!((record.value, record.version), (Bytes::from("1"), first));
}

#[tokio::test]
async fn a_write_with_another_version_changes_nothing() {
    let (_folder, store) = fresh();
    let missing = store.put(&key("a"), Bytes::new(), Precondition::Version(Version(1)), None).await.unwrap_err();
    let first = put(&store, "a", "1").await;
    let second = store.put(&key("a"), Bytes::from("2"), Precondition::Version(first), None).await.unwrap();
    let stale = store.put(&key("a"), Bytes::from("3"), Precondition::Version(first), None).await.unwrap_err();
    let stale_delete = store.delete(&key("a"), Precondition::Version(first)).await.unwrap_err();
    for error in [missing, stale, stale_delete] {
        assert_eq!((error.kind(), error.reason()), (ErrorKind::Conflict, Some(reason::VERSION_MISMATCH)), "{error}");
    }
    assert_eq!(store.get(&key("a")).await.unwrap().unwrap().version, second);
}

#[tokio::test]
async fn of_many_at_once_exactly_one_wins() {
    let (_folder, store) = fresh();
    let race = |only| {
        let store = &store;
        async move {
            let writes = (0..40).map(|n: u8| async move {
                store.put(&key("a"), Bytes::from(vec![n]), only, None).await.ok().map(|version| (n, version))
            });
            let winners: Vec<_> = futures::future::join_all(writes).await.into_iter().flatten().collect();
            assert_eq!(winners.len(), 1);
            let record = store.get(&key("a")).await.unwrap().unwrap();
            assert_eq!((record.value, record.version), (Bytes::from(vec![winners[0].0]), winners[0].1));
            winners[0].1
        }
    };
    let version = race(Precondition::Absent).await;
    race(Precondition::Version(version)).await;
}

#[tokio::test(start_paused = true)]
async fn a_record_lives_exactly_as_long_as_its_time() {
    let (_folder, store) = fresh();
    let ttl = Duration::from_millis(100);
    let version = store.put(&key("a"), Bytes::from("1"), Precondition::Any, Some(ttl)).await.unwrap();
    tokio::time::advance(ttl - Duration::from_nanos(1_000_000)).await;
    assert!(value(&store, "a").await.is_some());
    assert_eq!(store.list("a", None, 10).await.unwrap().len(), 1);
    tokio::time::advance(Duration::from_nanos(1_000_000)).await;
    assert_eq!(value(&store, "a").await, None);
    assert_eq!(store.list("a", None, 10).await.unwrap(), vec![]);
    let error = store.put(&key("a"), Bytes::new(), Precondition::Version(version), None).await.unwrap_err();
    assert_eq!(error.reason(), Some(reason::VERSION_MISMATCH));
    assert_eq!(store.delete(&key("a"), Precondition::Any).await.unwrap(), Deletion::AlreadyGone);
    assert!(store.put(&key("a"), Bytes::new(), Precondition::Absent, None).await.unwrap() > version);
}

#[tokio::test(start_paused = true)]
async fn a_write_without_a_time_takes_the_earlier_one_away() {
    let (_folder, store) = fresh();
    store.put(&key("a"), Bytes::new(), Precondition::Any, Some(Duration::from_secs(1))).await.unwrap();
    put(&store, "a", "kept").await;
    tokio::time::advance(Duration::from_secs(3600)).await;
    put(&store, "b", "a commit that sweeps").await;
    assert_eq!(value(&store, "a").await, Some(Bytes::from("kept")));
    assert_eq!(stored(&store), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_time_to_live_without_end_is_none() {
    let (_folder, store) = fresh();
    store.put(&key("a"), Bytes::new(), Precondition::Any, Some(Duration::MAX)).await.unwrap();
    assert_eq!(stored(&store), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_time_to_live_outlasts_reopening() {
    let (_folder, store) = fresh();
    store.put(&key("short"), Bytes::new(), Precondition::Any, Some(Duration::from_secs(5))).await.unwrap();
    store.put(&key("long"), Bytes::new(), Precondition::Any, Some(Duration::from_secs(3600))).await.unwrap();
    tokio::time::advance(Duration::from_secs(10)).await;
    // The time of the last write is the earliest that the next opening starts from.
    put(&store, "x", "").await;
    let store = reopen(store);
    assert_eq!(value(&store, "short").await, None);
    assert!(value(&store, "long").await.is_some());
    tokio::time::advance(Duration::from_secs(3590)).await;
    assert_eq!(value(&store, "long").await, None);
}

#[tokio::test(start_paused = true)]
async fn ended_records_are_swept_in_steps() {
    let (_folder, store) = fresh();
    let count = SWEEP * 3;
    let writes = (0..count).map(|n| {
        let (store, key) = (&store, key(&format!("t/{n:04}")));
        async move { store.put(&key, Bytes::new(), Precondition::Any, Some(Duration::from_secs(1))).await }
    });
    futures::future::try_join_all(writes).await.unwrap();
    assert_eq!(stored(&store), (count as u64, count as u64));
    tokio::time::advance(Duration::from_secs(1)).await;
    let mut left = count as u64;
    while left > 0 {
        put(&store, "x", "").await;
        let now = stored(&store).1;
        assert!(now < left && left - now <= SWEEP as u64 + 1, "{left} -> {now}");
        left = now;
    }
    assert_eq!(stored(&store), (1, 0));
}

#[tokio::test]
async fn deleting_what_is_gone_is_fine_unless_a_version_is_demanded() {
    let (_folder, store) = fresh();
    assert_eq!(store.delete(&key("a"), Precondition::Any).await.unwrap(), Deletion::AlreadyGone);
    let error = store.delete(&key("a"), Precondition::Version(Version(1))).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Conflict, Some(reason::VERSION_MISMATCH)));
    let version = put(&store, "a", "1").await;
    assert_eq!(store.delete(&key("a"), Precondition::Absent).await.unwrap_err().kind(), ErrorKind::Invalid);
    assert!(value(&store, "a").await.is_some());
    assert_eq!(store.delete(&key("a"), Precondition::Version(version)).await.unwrap(), Deletion::Deleted);
    assert_eq!(value(&store, "a").await, None);
}

#[tokio::test]
async fn a_list_is_by_bytes_in_order_and_in_pages() {
    let (_folder, store) = fresh();
    for name in ["b", "a/c", "a/b/c", "a/bc", "a/b", "a", "a-b", "a/B"] {
        put(&store, name, "").await;
    }
    let names = |page: Vec<(Key, Versioned)>| page.into_iter().map(|(key, _)| key.to_string()).collect::<Vec<_>>();
    assert_eq!(names(store.list("a/b", None, MAX_PAGE).await.unwrap()), ["a/b", "a/b/c", "a/bc"]);
    assert_eq!(names(store.list("", None, 3).await.unwrap()), ["a", "a-b", "a/B"]);
    assert_eq!(names(store.list("", Some(&key("a/B")), 2).await.unwrap()), ["a/b", "a/b/c"]);
    // `after` need not exist, may lie before all that matches, and behind.
    assert_eq!(names(store.list("a/b", Some(&key("a/b/a")), 9).await.unwrap()), ["a/b/c", "a/bc"]);
    assert_eq!(names(store.list("a/b", Some(&key("0")), 9).await.unwrap()), ["a/b", "a/b/c", "a/bc"]);
    assert_eq!(names(store.list("a/b", Some(&key("z")), 9).await.unwrap()), [""; 0]);
    for limit in [0, MAX_PAGE + 1] {
        assert_eq!(store.list("", None, limit).await.unwrap_err().kind(), ErrorKind::Invalid);
    }
}

#[tokio::test]
async fn all_is_there_again_after_reopening() {
    let (_folder, store) = fresh();
    let version = put(&store, "a", "1").await;
    put(&store, "b", "2").await;
    store.delete(&key("b"), Precondition::Any).await.unwrap();
    let store = reopen(store);
    assert_eq!(store.list("", None, 10).await.unwrap(), [(key("a"), Versioned { value: Bytes::from("1"), version })]);
}

#[tokio::test(start_paused = true)]
async fn fencing_tokens_grow_over_reopening() {
    let (_folder, store) = fresh();
    let ttl = Duration::from_secs(10);
    let first = store.acquire_lease("vm", "one", ttl).await.unwrap().token();
    let store = reopen(store);
    let error = store.acquire_lease("vm", "two", ttl).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    tokio::time::advance(ttl).await;
    let second = store.acquire_lease("vm", "two", ttl).await.unwrap().token();
    assert!(second > first && first > FencingToken(0));
}

#[cfg(unix)]
#[test]
fn folder_and_file_are_for_their_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("made/for us/state.redb");
    let store = EmbeddedStore::open(&path).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().unwrap()), 0o700);
    assert_eq!(mode(&folder.path().join("made")), 0o700);
    // Nothing but the file itself is left of its making.
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    drop(store);
}

#[test]
fn a_second_opening_in_the_same_process_is_refused() {
    let (_folder, store) = fresh();
    let error = EmbeddedStore::open(store.path()).unwrap_err();
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Conflict, Retry::Safe));
    let path = store.path().to_owned();
    drop(store);
    EmbeddedStore::open(path).unwrap();
}

#[test]
fn what_is_no_state_file_is_named_and_left_alone() {
    let folder = TempDir::new().unwrap();
    let text = folder.path().join("text");
    fs::write(&text, "not a database").unwrap();
    let foreign = folder.path().join("foreign");
    {
        let database = Database::create(&foreign).unwrap();
        let transaction = database.begin_write().unwrap();
        transaction.open_table(TableDefinition::<u64, u64>::new("other")).unwrap().insert(1, 1).unwrap();
        transaction.commit().unwrap();
    }
    for path in [&text, &foreign, &folder.path().to_owned()] {
        let error = EmbeddedStore::open(path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
    assert_eq!(fs::read_to_string(&text).unwrap(), "not a database");
}

#[test]
fn a_file_of_a_newer_schema_is_refused() {
    let (_folder, store) = fresh();
    {
        let slot = store.inner.slot.read().unwrap();
        let transaction = slot.database.as_ref().unwrap().begin_write().unwrap();
        transaction.open_table(META).unwrap().insert(SCHEMA, SCHEMA_NOW + 1).unwrap();
        transaction.commit().unwrap();
    }
    let path = store.path().to_owned();
    drop(store);
    let error = EmbeddedStore::open(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.message().contains("newer version") && error.message().contains("schema 2"), "{error}");
}

#[test]
fn an_empty_file_becomes_a_store() {
    let file = tempfile::NamedTempFile::new().unwrap();
    drop(EmbeddedStore::open(file.path()).unwrap());
    drop(EmbeddedStore::open(file.path()).unwrap());
}

#[test]
fn a_runtime_that_stops_leaves_no_caller_waiting_and_the_store_whole() {
    let (_folder, store) = fresh();
    let store = Arc::new(store);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let started = Arc::clone(&store);
    runtime.block_on(async { put(&store, "a", "1").await });
    for n in 0..50 {
        let store = Arc::clone(&started);
        runtime.spawn(async move { store.put(&key(&format!("n/{n}")), Bytes::new(), Precondition::Any, None).await });
    }
    runtime.shutdown_background();
    drop(started);
    let other = tokio::runtime::Builder::new_current_thread().build().unwrap();
    other.block_on(async {
        // Whatever became of the fifty: a write that meets the end of the other runtime is told that it was not
        // begun, and the next one is done.
        while let Err(error) = store.put(&key("b"), Bytes::new(), Precondition::Any, None).await {
            assert_eq!(error.retry(), Retry::Safe, "{error}");
        }
        assert_eq!(value(&store, "a").await, Some(Bytes::from("1")));
    });
}

/// A file whose disk can be told to fail, to hold back its syncs, or to skip them.
#[derive(Debug, Default)]
struct Disk {
    fails: AtomicBool,
    skips: AtomicBool,
    held: AtomicBool,
    syncs: AtomicUsize,
    openings: AtomicUsize,
}

#[derive(Debug)]
struct DiskFile(FileBackend, Arc<Disk>);

impl DiskFile {
    fn check(&self) -> io::Result<()> {
        match self.1.fails.load(Ordering::SeqCst) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }
}

impl StorageBackend for DiskFile {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check()?;
        self.0.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        while self.1.held.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        self.check()?;
        self.1.syncs.fetch_add(1, Ordering::SeqCst);
        if self.1.skips.load(Ordering::SeqCst) { Ok(()) } else { self.0.sync_data() }
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check()?;
        self.0.write(offset, data)
    }
    fn close(&self) -> io::Result<()> {
        self.0.close()
    }
}

fn on_disk(disk: &Arc<Disk>, path: &Path) -> EmbeddedStore {
    let disk = Arc::clone(disk);
    let opener = move |file| {
        disk.openings.fetch_add(1, Ordering::SeqCst);
        builder().create_with_backend(DiskFile(FileBackend::new(file)?, Arc::clone(&disk)))
    };
    EmbeddedStore::open_by(path, Box::new(opener)).unwrap()
}

#[tokio::test]
async fn writes_that_wait_share_a_commit() {
    let (folder, disk) = (TempDir::new().unwrap(), Arc::new(Disk::default()));
    let store = on_disk(&disk, &folder.path().join("state"));
    let before = disk.syncs.load(Ordering::SeqCst);
    disk.held.store(true, Ordering::SeqCst);
    let mut writes: Vec<_> = (0..200)
        .map(|n| {
            let (store, key) = (&store, key(&format!("n/{n}")));
            Box::pin(async move { store.put(&key, Bytes::new(), Precondition::Absent, None).await })
        })
        .collect();
    // The first commit is held back, so each of these comes to wait.
    for write in &mut writes {
        assert!(futures::poll!(write).is_pending());
    }
    disk.held.store(false, Ordering::SeqCst);
    let mut versions = futures::future::try_join_all(writes).await.unwrap();
    versions.sort();
    versions.dedup();
    assert_eq!(versions.len(), 200);
    let syncs = disk.syncs.load(Ordering::SeqCst) - before;
    assert!(syncs <= 6, "{syncs} syncs");
}

#[tokio::test]
async fn a_full_disk_fails_its_calls_and_nothing_after_it_has_room_again() {
    let (folder, disk) = (TempDir::new().unwrap(), Arc::new(Disk::default()));
    let store = on_disk(&disk, &folder.path().join("state"));
    let first = put(&store, "a", "1").await;
    disk.fails.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        let error = store.put(&key("a"), Bytes::from("2"), Precondition::Any, None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exhausted, "{error:?}");
    }
    disk.fails.store(false, Ordering::SeqCst);
    assert!(value(&store, "a").await.is_some());
    let second = put(&store, "a", "3").await;
    assert!(second > first);
    assert!(disk.openings.load(Ordering::SeqCst) > 1);
    drop(store);
    let store = EmbeddedStore::open(folder.path().join("state")).unwrap();
    let record = store.get(&key("a")).await.unwrap().unwrap();
    assert_eq!((record.value, record.version), (Bytes::from("3"), second));
}

#[tokio::test]
async fn a_failed_precondition_costs_no_sync() {
    let (folder, disk) = (TempDir::new().unwrap(), Arc::new(Disk::default()));
    let store = on_disk(&disk, &folder.path().join("state"));
    put(&store, "a", "1").await;
    let before = disk.syncs.load(Ordering::SeqCst);
    store.put(&key("a"), Bytes::new(), Precondition::Absent, None).await.unwrap_err();
    store.delete(&key("b"), Precondition::Any).await.unwrap();
    assert_eq!(disk.syncs.load(Ordering::SeqCst), before);
}

const CHILD: &str = "OCR_TEST_STATE_FILE";

fn child(test: &str, path: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("state::embedded::tests::{test}"), "--nocapture"]).env(CHILD, path);
    command
}

#[test]
fn an_answered_write_survives_sigkill() {
    if let Some(path) = std::env::var_os(CHILD) {
        write_until_killed(Path::new(&path));
    }
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("state.redb");
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut answered: HashMap<String, (u64, u64)> = HashMap::new();
    let mut newest = 0;
    for round in 0..8 {
        let mut process = child("an_answered_write_survives_sigkill", &path).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        // Killed sooner in one round and later in another; what was answered until it died is read to the end.
        let mut wanted = 1 + round * 23;
        let mut killed = false;
        while let Some(Ok(line)) = lines.next() {
            let words: Vec<&str> = line.split(' ').collect();
            let ["answered", name, count, version] = words[..] else { continue };
            let (count, version) = (count.parse().unwrap(), version.parse().unwrap());
            answered.insert(name.to_owned(), (count, version));
            wanted -= 1;
            if wanted == 0 {
                process.kill().unwrap();
                killed = true;
                wanted = i32::MAX;
            }
        }
        process.wait().unwrap();
        assert!(killed, "the child ended by itself");

        let store = EmbeddedStore::open(&path).unwrap();
        for (name, &(count, version)) in &answered {
            let record = runtime.block_on(store.get(&key(name))).unwrap().unwrap();
            let found: u64 = std::str::from_utf8(&record.value).unwrap().parse().unwrap();
            assert!(found >= count && record.version.0 >= version, "{name}: {found} < {count}");
            newest = newest.max(version);
        }
        let version = runtime.block_on(put(&store, "parent", "")).0;
        assert!(version > newest);
        newest = version;
    }
    assert!(answered.len() > 4);
}

fn write_until_killed(path: &Path) -> ! {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let store = Arc::new(EmbeddedStore::open(path).unwrap());
    runtime.block_on(async {
        for task in 0..8 {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let name = format!("counter/{task}");
                let record = store.get(&key(&name)).await.unwrap();
                let mut count: u64 =
                    record.map_or(0, |record| std::str::from_utf8(&record.value).unwrap().parse().unwrap());
                loop {
                    count += 1;
                    let value = Bytes::from(count.to_string());
                    let version = store.put(&key(&name), value, Precondition::Any, None).await.unwrap();
                    let mut out = io::stdout().lock();
                    writeln!(out, "answered {name} {count} {}", version.0).unwrap();
                    out.flush().unwrap();
                }
            });
        }
        std::future::pending::<()>().await;
    });
    unreachable!("it waits for ever")
}

#[test]
fn another_process_is_told_who_is_in_the_way() {
    if let Some(path) = std::env::var_os(CHILD) {
        let error = EmbeddedStore::open(Path::new(&path)).unwrap_err();
        writeln!(io::stdout().lock(), "refused {:?} {error}", error.kind()).unwrap();
        return;
    }
    let (_folder, store) = fresh();
    let output = child("another_process_is_told_who_is_in_the_way", store.path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("refused Conflict"), "{text}");
    assert!(text.contains("another process has it open"), "{text}");
    assert!(text.contains(&store.path().display().to_string()), "{text}");
}

/// What the documentation of the trait says, in a few lines.
#[derive(Default)]
struct Model {
    records: BTreeMap<String, (Vec<u8>, Version, Option<Duration>)>,
    now: Duration,
    newest: u64,
}

impl Model {
    fn live(&self, key: &str) -> Option<&(Vec<u8>, Version, Option<Duration>)> {
        self.records.get(key).filter(|(_, _, ends)| ends.is_none_or(|ends| self.now < ends))
    }

    fn refusal(&self, key: &str, only: Precondition) -> Option<ErrorKind> {
        match (only, self.live(key)) {
            (Precondition::Absent, Some(_)) => Some(ErrorKind::AlreadyExists),
            (Precondition::Version(wanted), live) if live.map(|record| record.1) != Some(wanted) => {
                Some(ErrorKind::Conflict)
            }
            _ => None,
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Put(String, Vec<u8>, Only, Option<Duration>),
    Delete(String, Only),
    Get(String),
    List(String, Option<String>, usize),
    Wait(Duration),
    Reopen,
}

#[derive(Clone, Copy, Debug)]
enum Only {
    Any,
    Absent,
    Right,
    Wrong,
}

fn names() -> impl Strategy<Value = String> {
    proptest::sample::select(vec!["a", "a/a", "a/b", "ab", "b", "b/a"]).prop_map(str::to_owned)
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let only = || proptest::sample::select(vec![Only::Any, Only::Any, Only::Absent, Only::Right, Only::Wrong]);
    let bytes = || proptest::collection::vec(any::<u8>(), 0..20);
    let ttl = proptest::option::of((1u64..20).prop_map(Duration::from_millis));
    let step = prop_oneof![
        8 => (names(), bytes(), only(), ttl).prop_map(|(key, value, only, ttl)| Step::Put(key, value, only, ttl)),
        4 => (names(), only()).prop_map(|(key, only)| Step::Delete(key, only)),
        4 => names().prop_map(Step::Get),
        4 => (proptest::sample::select(vec!["", "a", "a/", "b", "c"]), proptest::option::of(names()), 1usize..5)
            .prop_map(|(prefix, after, limit)| Step::List(prefix.to_owned(), after, limit)),
        2 => (1u64..20).prop_map(|ms| Step::Wait(Duration::from_millis(ms))),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..60)
}

async fn agrees_with_the_model(steps: Vec<Step>) {
    let (folder, disk) = (TempDir::new().unwrap(), Arc::new(Disk::default()));
    disk.skips.store(true, Ordering::SeqCst);
    let path = folder.path().join("state");
    let mut store = on_disk(&disk, &path);
    let mut model = Model::default();
    let demand = |model: &Model, name: &str, only| match only {
        Only::Any => Precondition::Any,
        Only::Absent => Precondition::Absent,
        Only::Right => model.live(name).map_or(Precondition::Absent, |record| Precondition::Version(record.1)),
        Only::Wrong => Precondition::Version(Version(model.newest + 1)),
    };
    for step in steps {
        match step {
            Step::Put(name, value, only, ttl) => {
                let only = demand(&model, &name, only);
                let result = store.put(&key(&name), Bytes::from(value.clone()), only, ttl).await;
                assert_eq!(result.as_ref().err().map(Error::kind), model.refusal(&name, only));
                if let Ok(version) = result {
                    assert!(version.0 > model.newest);
                    model.newest = version.0;
                    let ends = ttl.map(|ttl| model.now + ttl);
                    model.records.insert(name, (value, version, ends));
                }
            }
            Step::Delete(name, only) => {
                let only = demand(&model, &name, only);
                let result = store.delete(&key(&name), only).await;
                if only == Precondition::Absent {
                    assert_eq!(result.unwrap_err().kind(), ErrorKind::Invalid);
                    continue;
                }
                assert_eq!(result.as_ref().err().map(Error::kind), model.refusal(&name, only));
                if let Ok(deletion) = result {
                    assert_eq!(deletion == Deletion::Deleted, model.live(&name).is_some());
                    model.records.remove(&name);
                }
            }
            Step::Get(name) => {
                let found = store.get(&key(&name)).await.unwrap();
                let found = found.map(|record| (record.value.to_vec(), record.version));
                assert_eq!(found, model.live(&name).map(|(value, version, _)| (value.clone(), *version)));
            }
            Step::List(prefix, after, limit) => {
                let after = after.map(|after| key(&after));
                let found = store.list(&prefix, after.as_ref(), limit).await.unwrap();
                let found: Vec<_> = found.into_iter().map(|(key, record)| (key.to_string(), record.version)).collect();
                let wanted: Vec<_> = (model.records.keys())
                    .filter(|name| name.starts_with(&prefix))
                    .filter(|name| after.as_ref().is_none_or(|after| name.as_str() > after.as_str()))
                    .filter_map(|name| model.live(name).map(|record| (name.clone(), record.1)))
                    .take(limit)
                    .collect();
                assert_eq!(found, wanted);
            }
            Step::Wait(time) => {
                tokio::time::advance(time).await;
                model.now += time;
            }
            Step::Reopen => {
                // Time does not go back over an opening if a write was the last to see it.
                let version = store.put(&key("clock"), Bytes::new(), Precondition::Any, None).await.unwrap();
                store.delete(&key("clock"), Precondition::Any).await.unwrap();
                model.newest = version.0;
                let opened_ns = store.inner.clock.now_ns();
                drop(store);
                store = on_disk(&disk, &path);
                // The wall clock went on by itself; the model has to know by how much.
                model.now += Duration::from_nanos(store.inner.clock.now_ns() - opened_ns);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn it_agrees_with_a_map(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(agrees_with_the_model(steps));
    }
}
