//! [`Cache`]: archives on disk by their checksum, and a few of them unpacked, within a bound.
//!
//! ```text
//! FOLDER/lock                       held while a process uses the folder
//! FOLDER/archives/CHECKSUM.package  verified once, and again by whoever unpacks it
//! FOLDER/work/                      downloads under way and unpacked packages; cleared at start
//! ```
//!
//! What counts to the bound: archives, downloads under way, and what stays unpacked for the next who asks. What is
//! unpacked for somebody now comes on top of it. What is in use is never removed.

use std::{
    collections::{HashMap, VecDeque},
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::SystemTime,
};

use tempfile::{NamedTempFile, TempPath};

use crate::{
    Error, ErrorKind, Result, Retry,
    error::reason,
    package::{Package, blocking, disk_error},
};

/// The most packages that stay unpacked after their last use.
const KEPT_MAX: usize = 16;
const ENDING: &str = "package";

/// Archives by checksum.
#[derive(Debug)]
pub(super) struct Cache {
    archives: PathBuf,
    work: PathBuf,
    limit_bytes: u64,
    state: Mutex<State>,
    _lock: File,
}

#[derive(Debug, Default)]
struct State {
    archives: HashMap<String, Archive>,
    archived_bytes: u64,
    /// For downloads under way.
    reserved_bytes: u64,
    /// Unpacked, the latest used last.
    kept: VecDeque<Kept>,
    kept_bytes: u64,
    /// Whatever is unpacked now, in use or kept.
    unpacked: HashMap<String, Weak<Package>>,
    /// Counts uses.
    clock: u64,
}

#[derive(Debug)]
struct Archive {
    bytes: u64,
    used: u64,
    users: usize,
}

#[derive(Debug)]
struct Kept {
    checksum: String,
    /// Held, so that its files stay.
    _package: Arc<Package>,
    bytes: u64,
}

impl Cache {
    /// Takes the folder for this process, clears what a killed one left, and removes what is over the bound. Blocks.
    pub(super) fn open(folder: &Path, limit_bytes: u64) -> Result<Self> {
        let failed = |error| disk_error(&format!("the package cache {}", folder.display()), error);
        fs::create_dir_all(folder).map_err(failed)?;
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(folder.join("lock"));
        let lock = lock.map_err(failed)?;
        if let Err(error) = lock.try_lock() {
            return Err(match error {
                fs::TryLockError::WouldBlock => {
                    let message = format!("the package cache {} is used by another process", folder.display());
                    Error::new(ErrorKind::Conflict, message).with_retry(Retry::Safe)
                }
                fs::TryLockError::Error(error) => failed(error),
            });
        }
        let (archives, work) = (folder.join("archives"), folder.join("work"));
        match fs::remove_dir_all(&work) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        fs::create_dir(&work).map_err(failed)?;
        fs::create_dir_all(&archives).map_err(failed)?;
        let state = Mutex::new(found(&archives).map_err(failed)?);
        let cache = Self { archives, work, limit_bytes, state, _lock: lock };
        // What does not fit any more goes now; nothing is in use yet.
        cache.make_room(&mut cache.state(), 0)?;
        Ok(cache)
    }

    /// Where downloads are written and archives unpacked.
    pub(super) fn work(&self) -> &Path {
        &self.work
    }

    pub(super) fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    /// The package, if it is unpacked.
    pub(super) fn unpacked(&self, checksum: &str) -> Option<Arc<Package>> {
        let mut state = self.state();
        let package = state.unpacked.get(checksum)?.upgrade()?;
        if let Some(kept) = state.kept.iter().position(|kept| kept.checksum == checksum) {
            let kept = state.kept.remove(kept);
            state.kept.extend(kept);
        }
        Some(package)
    }

    /// The archive, if it is here; it stays until this is dropped.
    pub(super) fn hold(self: &Arc<Self>, checksum: &str) -> Option<Held> {
        let mut state = self.state();
        state.clock += 1;
        let clock = state.clock;
        let archive = state.archives.get_mut(checksum)?;
        archive.used = clock;
        archive.users += 1;
        let held = Held { cache: Arc::clone(self), checksum: checksum.to_owned() };
        drop(state);
        // So that the next process knows what was used last. Nothing depends on it.
        let _ = File::open(held.path()).and_then(|file| file.set_modified(SystemTime::now()));
        Some(held)
    }

    /// Takes a whole archive in under its checksum.
    pub(super) async fn store(
        self: &Arc<Self>,
        checksum: &str,
        part: TempPath,
        reservation: Reservation,
    ) -> Result<Held> {
        let (cache, checksum) = (Arc::clone(self), checksum.to_owned());
        blocking(move || {
            let path = cache.path(&checksum);
            let failed = |error| disk_error("the package cache", error);
            let bytes = fs::metadata(&part).map_err(failed)?.len();
            let mut state = cache.state();
            part.persist(&path).map_err(|error| failed(error.error))?;
            // From reserved to archived under one lock, so that it counts once at any time.
            state.reserved_bytes -= reservation.defuse();
            state.clock += 1;
            let archive = Archive { bytes, used: state.clock, users: 1 };
            state.archived_bytes += bytes;
            if let Some(earlier) = state.archives.insert(checksum.clone(), archive) {
                state.archived_bytes -= earlier.bytes;
            }
            drop(state);
            Ok(Held { cache, checksum })
        })
        .await
    }

    /// Removes an archive that is no good.
    pub(super) fn forget(&self, held: Held) {
        let mut state = self.state();
        let path = held.path();
        state.remove(&held.checksum);
        let _ = fs::remove_file(path);
        drop(state);
        // There is no such archive any more, so nobody uses it less.
        drop(held);
    }

    /// Lets the next who asks have the unpacked package, as long as there is room.
    pub(super) fn keep(&self, checksum: &str, package: &Arc<Package>, bytes: u64) {
        let mut state = self.state();
        state.unpacked.retain(|_, package| package.strong_count() > 0);
        state.unpacked.insert(checksum.to_owned(), Arc::downgrade(package));
        // No archive goes for it: unpacking again is cheaper than fetching again.
        while state.kept.len() >= KEPT_MAX || state.bytes() + bytes > self.limit_bytes {
            if !state.unkeep() {
                return;
            }
        }
        state.kept_bytes += bytes;
        state.kept.push_back(Kept { checksum: checksum.to_owned(), _package: Arc::clone(package), bytes });
    }

    /// A download of no bytes yet.
    pub(super) fn reserve(self: &Arc<Self>) -> Reservation {
        Reservation { cache: Arc::clone(self), bytes: 0 }
    }

    fn make_room(&self, state: &mut State, bytes: u64) -> Result<()> {
        while state.bytes().saturating_add(bytes) > self.limit_bytes {
            if state.unkeep() {
                continue;
            }
            let idle = state.archives.iter().filter(|(_, archive)| archive.users == 0);
            let Some(oldest) = idle.min_by_key(|(_, archive)| archive.used).map(|(checksum, _)| checksum.clone())
            else {
                let message = format!("the package cache of {} bytes is full of packages in use", self.limit_bytes);
                return Err(Error::new(ErrorKind::Exhausted, message)
                    .with_reason(reason::PACKAGE_CACHE_FULL)
                    .with_retry(Retry::Safe));
            };
            // Under the lock, or else one of the same checksum that comes meanwhile would go instead.
            match fs::remove_file(self.path(&oldest)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(disk_error("the package cache", error));
                }
                _ => state.remove(&oldest),
            }
            tracing::debug!(checksum = %oldest, "removed the archive that was used least lately");
        }
        Ok(())
    }

    fn path(&self, checksum: &str) -> PathBuf {
        self.archives.join(format!("{checksum}.{ENDING}"))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn bytes(&self) -> u64 {
        self.archived_bytes + self.reserved_bytes + self.kept_bytes
    }

    fn remove(&mut self, checksum: &str) {
        if let Some(archive) = self.archives.remove(checksum) {
            self.archived_bytes -= archive.bytes;
        }
    }

    /// Lets go of the unpacked package that was used least lately. In use it stays on disk, but counts no more.
    fn unkeep(&mut self) -> bool {
        let Some(kept) = self.kept.pop_front() else { return false };
        self.kept_bytes -= kept.bytes;
        true
    }
}

/// The archives of an earlier process, the latest used last; what is none of ours is left alone.
fn found(folder: &Path) -> io::Result<State> {
    let mut archives = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let checksum = path.file_stem().and_then(|stem| stem.to_str()).filter(|stem| super::is_checksum(stem));
        let (Some(checksum), Some(ENDING)) = (checksum, path.extension().and_then(|ending| ending.to_str())) else {
            continue;
        };
        let metadata = fs::symlink_metadata(&path)?;
        if metadata.is_file() {
            archives.push((metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH), checksum.to_owned(), metadata.len()));
        }
    }
    archives.sort();
    let mut state = State::default();
    for (_, checksum, bytes) in archives {
        state.clock += 1;
        state.archived_bytes += bytes;
        state.archives.insert(checksum, Archive { bytes, used: state.clock, users: 0 });
    }
    Ok(state)
}

/// An archive that is in use.
#[derive(Debug)]
pub(super) struct Held {
    cache: Arc<Cache>,
    checksum: String,
}

impl Held {
    pub(super) fn path(&self) -> PathBuf {
        self.cache.path(&self.checksum)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(archive) = self.cache.state().archives.get_mut(&self.checksum) {
            archive.users = archive.users.saturating_sub(1);
        }
    }
}

/// Room for a download; given back when dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    cache: Arc<Cache>,
    bytes: u64,
}

impl Reservation {
    /// Makes room for so many bytes in all, and no less than before.
    pub(super) async fn grow_to(&mut self, bytes: u64) -> Result<()> {
        let more = bytes.saturating_sub(self.bytes);
        if more == 0 {
            return Ok(());
        }
        let cache = Arc::clone(&self.cache);
        // Counted by a reservation of its own, so that it is given back when this future is dropped meanwhile.
        let grown = blocking(move || {
            let mut state = cache.state();
            cache.make_room(&mut state, more)?;
            state.reserved_bytes += more;
            drop(state);
            Ok(Reservation { cache, bytes: more })
        })
        .await?;
        self.bytes += grown.defuse();
        Ok(())
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The bytes, which the caller accounts for from here on.
    fn defuse(mut self) -> u64 {
        std::mem::take(&mut self.bytes)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.cache.state().reserved_bytes -= self.bytes;
        }
    }
}

/// A new file for a download. Blocks.
pub(super) fn part(work: &Path) -> Result<NamedTempFile> {
    tempfile::Builder::new().prefix("part-").tempfile_in(work).map_err(|error| disk_error("the package cache", error))
}

#[cfg(test)]
mod tests;
