//! An outsider's backend, a [`StateStore`] in one JSON file that is rewritten with every change, and its proof:
//! `cargo test -p ocr-core --features conformance --examples`.

use std::{collections::BTreeMap, fs, path::PathBuf, sync::Mutex, time::Duration, time::SystemTime};

use ocr_core::{Deletion, Error, ErrorKind, Key, Precondition, Result, StateStore, Version, Versioned, error::reason};

/// A value as text (each byte is the character of its number), its version, and its end.
type Row = (String, u64, Option<SystemTime>);
/// The last version, one count for all keys so that it also grows over what was deleted, and the rows by key.
type Records = (u64, BTreeMap<String, Row>);
#[derive(Debug)]
struct FileStore(PathBuf, Mutex<Records>);

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::internal("the store's file cannot be read or written").with_source(error)
}

impl FileStore {
    fn open(path: PathBuf) -> Result<Self> {
        let text = if path.exists() { fs::read(&path).map_err(broken)? } else { b"[0,{}]".into() };
        Ok(Self(path, Mutex::new(serde_json::from_slice(&text).map_err(broken)?)))
    }

    /// Works on a copy; a change is kept only once it is in the file under its final name.
    fn with<T>(&self, writes: bool, act: impl FnOnce(&mut Records) -> Result<T>) -> Result<T> {
        let mut kept = self.1.lock().map_err(|_| Error::internal("a writer panicked"))?;
        let mut next = kept.clone();
        next.1.retain(|_, (.., end)| end.is_none_or(|end| end > SystemTime::now()));
        let answer = act(&mut next)?;
        if writes {
            let new = self.0.with_extension("new");
            fs::write(&new, serde_json::to_vec(&next).map_err(broken)?).map_err(broken)?;
            fs::File::open(&new).and_then(|file| file.sync_all()).map_err(broken)?;
            fs::rename(&new, &self.0).map_err(broken)?;
            *kept = next;
        }
        Ok(answer)
    }
}

fn ensure(holds: bool, field: &str, wanted: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::invalid(field, wanted)) }
}
fn check(there: Option<&Row>, only: Precondition) -> Result<()> {
    let conflict = Error::new(ErrorKind::Conflict, "another version is there").with_reason(reason::VERSION_MISMATCH);
    match (only, there) {
        (Precondition::Absent, Some(_)) => Err(Error::new(ErrorKind::AlreadyExists, "there is a record")),
        (Precondition::Version(wanted), there) if there.is_none_or(|row| row.1 != wanted.0) => Err(conflict),
        _ => Ok(()),
    }
}
fn seen((value, version, _): &Row) -> Versioned {
    Versioned { value: value.chars().map(|c| c as u8).collect(), version: Version(*version) }
}

#[async_trait::async_trait]
impl StateStore for FileStore {
    async fn get(&self, key: &Key) -> Result<Option<Versioned>> {
        self.with(false, |(_, rows)| Ok(rows.get(key.as_str()).map(seen)))
    }
    async fn put(&self, key: &Key, value: bytes::Bytes, only: Precondition, ttl: Option<Duration>) -> Result<Version> {
        ensure(value.len() <= ocr_core::state::MAX_VALUE_BYTES, "value", "is too large")?;
        let (value, end) = (value.iter().copied().map(char::from).collect(), ttl.map(|ttl| SystemTime::now() + ttl));
        self.with(true, |(last, rows)| {
            check(rows.get(key.as_str()), only)?;
            *last += 1;
            rows.insert(key.to_string(), (value, *last, end));
            Ok(Version(*last))
        })
    }
    async fn delete(&self, key: &Key, only: Precondition) -> Result<Deletion> {
        ensure(only != Precondition::Absent, "precondition", "what is to be deleted cannot be absent")?;
        self.with(true, |(_, rows)| {
            check(rows.get(key.as_str()), only)?;
            Ok(rows.remove(key.as_str()).map_or(Deletion::AlreadyGone, |_| Deletion::Deleted))
        })
    }
    async fn list(&self, prefix: &str, after: Option<&Key>, limit: usize) -> Result<Vec<(Key, Versioned)>> {
        ensure((1..=ocr_core::state::MAX_PAGE).contains(&limit), "limit", "wants 1 to 1000")?;
        let wanted = |key: &&str| key.starts_with(prefix) && after.is_none_or(|after| *key > after.as_str());
        self.with(false, |(_, rows)| {
            let page = rows.iter().filter(|(key, _)| wanted(&key.as_str())).take(limit);
            page.map(|(key, row)| Ok((Key::new(key.as_str())?, seen(row)))).collect()
        })
    }
}

fn main() -> Result<()> {
    FileStore::open("outsider.json".into()).map(drop)
}
#[cfg(all(test, feature = "conformance"))]
#[tokio::test]
async fn it_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let store = std::sync::Arc::new(FileStore::open(folder.path().join("state.json")).unwrap());
    let subject = ocr_core::conformance::Subject { state: Some(store), ..Default::default() };
    ocr_core::conformance::assert_all(&subject).await;
}
