//! Unpacking archives that strangers made.
//!
//! The format is tar, as it is or inside gzip of any number of members. Only files and folders are taken; whatever
//! could reach out of the folder, or fill the disk or the memory, ends the unpacking, and what was written so far is
//! removed. Names and sizes are read by hand: libraries that read long names read them whole, however long.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};
use tar::EntryType;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::{MANIFEST, MANIFEST_MAX_BYTES, blocking, disk_error, hex, inside, text_of};
use crate::{Error, Result, Retry, id::shown};

/// What an archive may cost at most. Each limit is there because some archive goes for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnpackLimits {
    /// Files and folders, together with the folders that are only implied. Default 10,000.
    pub entries: usize,
    /// All that comes out of the compression, in bytes. Default 2 GiB.
    pub total_bytes: u64,
    /// The archive itself, in bytes. Default 2 GiB.
    pub archive_bytes: u64,
    /// How many bytes may come out for one that went in. Default 200.
    pub ratio: u64,
    /// As much may come out before the ratio is looked at, in bytes. Default 16 MiB.
    pub ratio_floor_bytes: u64,
    /// How many names a path may have. Default 32.
    pub depth: usize,
    /// How long a path may be, in bytes. Default 4 KiB.
    pub path_bytes: usize,
}

impl Default for UnpackLimits {
    fn default() -> Self {
        Self {
            entries: 10_000,
            total_bytes: 2 << 30,
            archive_bytes: 2 << 30,
            ratio: 200,
            ratio_floor_bytes: 16 << 20,
            depth: super::PATH_PARTS,
            path_bytes: super::PATH_BYTES,
        }
    }
}

/// An archive's content in a folder of its own, which goes when this is dropped.
#[derive(Debug)]
pub struct Unpacked {
    scratch: Scratch,
    digest: String,
    bytes: u64,
}

impl Unpacked {
    /// The folder.
    pub fn root(&self) -> &Path {
        self.scratch.root()
    }

    /// The archive's SHA-256 in lower hex, of the very bytes that were unpacked.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// What its files take, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn into_parts(self) -> (Scratch, String) {
        (self.scratch, self.digest)
    }
}

/// Unpacks an archive into a new folder under `work` (the system's place for temporary files without), on a blocking
/// thread. Dropping the future ends the work soon after and removes what was written. What a killed process left under
/// `work` is removed by the next one that unpacks there.
///
/// Files get no more rights than 0755 of those in the archive.
///
/// # Errors
/// `Invalid` naming the entry and what is wrong with it, or the limit; `NotFound` when there is no such file;
/// `Exhausted` when the disk is full.
pub async fn unpack(archive: impl Into<PathBuf>, work: Option<&Path>, limits: UnpackLimits) -> Result<Unpacked> {
    let (archive, work) = (archive.into(), work.map(Path::to_owned));
    let cancel = CancellationToken::new();
    let _ends_with_this_future = cancel.clone().drop_guard();
    blocking(move || {
        let source = Source::open(&archive, &limits, cancel)?;
        let scratch = Scratch::new(work.as_deref())?;
        let mut folder = Folder::new(scratch.root(), limits.entries);
        let mut bytes = 0;
        let walked = walk(source, &limits, |member, content| {
            folder.add(member, content)?;
            bytes += member.bytes;
            Ok(ControlFlow::<()>::Continue(()))
        });
        match walked {
            Ok((_, source)) => Ok(Unpacked { scratch, digest: source.digest(), bytes }),
            Err(error) => {
                scratch.remove();
                Err(error)
            }
        }
    })
    .await
    .map_err(|error| error.during("package.unpack"))
}

/// Reads `package.toml` out of an archive without unpacking the rest. Blocks.
pub(super) fn manifest_text(archive: &Path, limits: &UnpackLimits) -> Result<String> {
    let source = Source::open(archive, limits, CancellationToken::new())?;
    let (found, _) = walk(source, limits, |member, content| {
        if member.path != Path::new(MANIFEST) || member.is_folder {
            return Ok(ControlFlow::Continue(()));
        }
        let mut bytes = Vec::new();
        content.take(MANIFEST_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Stop::Read)?;
        if bytes.len() as u64 > MANIFEST_MAX_BYTES {
            return Err(Stop::Refused(format!("package.toml wants at most {MANIFEST_MAX_BYTES} bytes")));
        }
        Ok(ControlFlow::Break(bytes))
    })?;
    found.map_or_else(|| Err(Error::not_found("there is no package.toml at the top of the archive")), text_of)
}

/// The SHA-256 of a file, in lower hex. Blocks.
pub(super) fn file_digest(archive: &Path, limits: &UnpackLimits) -> Result<String> {
    let mut source = Source::open(archive, limits, CancellationToken::new())?;
    io::copy(&mut source, &mut io::sink()).map_err(|error| disk_error("the archive", error))?;
    Ok(source.digest())
}

/// Why the walk through an archive stopped.
#[derive(Debug)]
enum Stop {
    /// The archive breaks a rule; the text says which.
    Refused(String),
    /// Reading failed; [`Shared::fault`] may know better why.
    Read(io::Error),
    /// Our own disk failed.
    Write(io::Error),
}

/// A file or folder of the archive that keeps all rules.
struct Member {
    path: PathBuf,
    is_folder: bool,
    bytes: u64,
    mode: u32,
}

/// What both ends of the reading chain know.
#[derive(Default)]
struct Shared {
    /// Bytes that were read of the archive.
    packed: Cell<u64>,
    /// The real cause of an [`io::Error`] that went through other hands.
    fault: RefCell<Option<Error>>,
}

impl Shared {
    fn fail(&self, error: Error) -> io::Error {
        self.fault.borrow_mut().get_or_insert(error);
        io::Error::other("reading stopped")
    }
}

/// The archive as it is: counted, hashed, cancellable.
struct Source {
    file: File,
    digest: Sha256,
    limit_bytes: u64,
    cancel: CancellationToken,
    shared: Rc<Shared>,
}

impl Source {
    fn open(path: &Path, limits: &UnpackLimits, cancel: CancellationToken) -> Result<Self> {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::not_found("there is no such archive"));
            }
            Err(error) => return Err(disk_error("the archive", error)),
        };
        // Opening a pipe would block.
        if !metadata.is_file() {
            return Err(refused("is not a file"));
        }
        if metadata.len() > limits.archive_bytes {
            return Err(refused(format_args!("is larger than {} bytes", limits.archive_bytes)));
        }
        let file = File::open(path).map_err(|error| disk_error("the archive", error))?;
        let (digest, shared) = (Sha256::new(), Rc::default());
        Ok(Self { file, digest, limit_bytes: limits.archive_bytes, cancel, shared })
    }

    fn digest(self) -> String {
        hex(&self.digest.finalize())
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(self.shared.fail(Error::unavailable("unpacking was given up")));
        }
        let count = self.file.read(buffer).map_err(|error| self.shared.fail(disk_error("the archive", error)))?;
        self.digest.update(&buffer[..count]);
        self.shared.packed.set(self.shared.packed.get() + count as u64);
        // It may have grown since it was looked at.
        if self.shared.packed.get() > self.limit_bytes {
            return Err(self.shared.fail(refused(format_args!("is larger than {} bytes", self.limit_bytes))));
        }
        Ok(count)
    }
}

/// What comes out of the compression: every byte of it counts, whatever it is part of.
struct Plain {
    inner: Decoder,
    limits: UnpackLimits,
    shared: Rc<Shared>,
    bytes: u64,
    ended: bool,
}

enum Decoder {
    Gzip(Box<MultiGzDecoder<BufReader<Source>>>),
    Stored(BufReader<Source>),
}

impl Plain {
    fn new(source: Source, limits: &UnpackLimits) -> Result<Self> {
        let shared = Rc::clone(&source.shared);
        let mut reader = BufReader::with_capacity(64 << 10, source);
        let start = reader.fill_buf().map_err(|error| from_read(&shared, error))?;
        let inner = match start {
            [] => return Err(refused("is empty")),
            [0x1f, 0x8b, ..] => Decoder::Gzip(Box::new(MultiGzDecoder::new(reader))),
            _ => Decoder::Stored(reader),
        };
        Ok(Self { inner, limits: *limits, shared, bytes: 0, ended: false })
    }

    fn into_source(self) -> Source {
        match self.inner {
            Decoder::Gzip(decoder) => decoder.into_inner().into_inner(),
            Decoder::Stored(reader) => reader.into_inner(),
        }
    }
}

impl Read for Plain {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = match &mut self.inner {
            Decoder::Gzip(decoder) => decoder.read(buffer)?,
            Decoder::Stored(reader) => reader.read(buffer)?,
        };
        self.ended |= count == 0 && !buffer.is_empty();
        self.bytes += count as u64;
        let UnpackLimits { total_bytes, ratio, ratio_floor_bytes, .. } = self.limits;
        if self.bytes > total_bytes {
            return Err(self.shared.fail(refused(format_args!("unpacks to more than {total_bytes} bytes"))));
        }
        let fair_bytes = self.shared.packed.get().saturating_mul(ratio).saturating_add(ratio_floor_bytes);
        if self.bytes > fair_bytes {
            return Err(self.shared.fail(refused(format_args!("unpacks to more than {ratio} times its size"))));
        }
        Ok(count)
    }
}

/// Goes through an archive, member by member, until its end or until `visit` breaks off.
fn walk<T>(
    source: Source,
    limits: &UnpackLimits,
    mut visit: impl FnMut(&Member, &mut dyn Read) -> Result<ControlFlow<T>, Stop>,
) -> Result<(Option<T>, Source)> {
    let shared = Rc::clone(&source.shared);
    let mut archive = tar::Archive::new(Plain::new(source, limits)?);
    let walked = members(&mut archive, limits, &mut visit);
    let mut plain = archive.into_inner();
    let walked = walked.and_then(|broken_off| match broken_off {
        Some(value) => Ok(Some(value)),
        None => finish(&mut plain).map(|()| None),
    });
    match walked {
        Ok(value) => Ok((value, plain.into_source())),
        Err(Stop::Refused(fault)) => Err(refused(fault)),
        Err(Stop::Read(error)) => Err(from_read(&shared, error)),
        Err(Stop::Write(error)) => Err(disk_error("the folder to unpack into", error)),
    }
}

fn members<T>(
    archive: &mut tar::Archive<Plain>,
    limits: &UnpackLimits,
    visit: &mut impl FnMut(&Member, &mut dyn Read) -> Result<ControlFlow<T>, Stop>,
) -> Result<Option<T>, Stop> {
    let mut name: Option<Vec<u8>> = None;
    let mut size: Option<u64> = None;
    let mut count = 0;
    for entry in archive.entries().map_err(Stop::Read)?.raw(true) {
        let mut entry = entry.map_err(Stop::Read)?;
        count += 1;
        // An entry may have two more that describe it.
        if count > limits.entries.saturating_mul(3) {
            return Err(too_many(limits.entries));
        }
        let header_bytes = entry.size();
        let entry_type = entry.header().entry_type();
        let long_name = match entry_type {
            EntryType::GNULongName => {
                let mut long = small(&mut entry, limits.path_bytes as u64 + 1)?;
                long.pop_if(|last| *last == 0);
                Some(long)
            }
            EntryType::XHeader => {
                let pax = Pax::parse(&small(&mut entry, PAX_MAX_BYTES)?)?;
                if pax.size.is_some() && size.replace(pax.size.unwrap_or_default()).is_some() {
                    return Err(Stop::Refused("describes an entry twice".to_owned()));
                }
                if pax.path.is_none() {
                    continue;
                }
                pax.path
            }
            EntryType::XGlobalHeader => {
                let pax = Pax::parse(&small(&mut entry, PAX_MAX_BYTES)?)?;
                if pax.path.is_some() || pax.size.is_some() {
                    return Err(Stop::Refused("gives one name or size to all entries".to_owned()));
                }
                continue;
            }
            _ => None,
        };
        if let Some(long) = long_name {
            if name.replace(long).is_some() {
                return Err(Stop::Refused("names an entry twice".to_owned()));
            }
            continue;
        }
        let name = name.take().unwrap_or_else(|| entry.header().path_bytes().into_owned());
        let Ok(name) = String::from_utf8(name) else {
            return Err(Stop::Refused("has an entry whose name is not UTF-8".to_owned()));
        };
        let refuse = |fault: &str| Stop::Refused(format!("the entry {} {fault}", shown(&name)));
        // Readers disagree on which of the two counts; archives that look different to each are made of that.
        if size.take().is_some_and(|size| size != header_bytes) {
            return Err(refuse("has two sizes"));
        }
        let is_folder = match entry_type {
            EntryType::Directory => true,
            EntryType::Regular => false,
            EntryType::Symlink | EntryType::Link | EntryType::GNULongLink => return Err(refuse("is a link")),
            EntryType::GNUSparse => return Err(refuse("is a sparse file")),
            _ => return Err(refuse("is neither a file nor a folder")),
        };
        if !is_folder && name.ends_with('/') {
            return Err(refuse("is a file with the name of a folder"));
        }
        if is_folder && header_bytes != 0 {
            return Err(refuse("is a folder with content"));
        }
        // Archives of a folder often begin with the folder itself.
        if is_folder && matches!(name.as_str(), "." | "./") {
            continue;
        }
        let path = inside(&name, limits.depth, limits.path_bytes).map_err(refuse)?;
        let mode = entry.header().mode().map_err(Stop::Read)?;
        let member = Member { path, is_folder, bytes: header_bytes, mode };
        if let ControlFlow::Break(value) = visit(&member, &mut entry)? {
            return Ok(Some(value));
        }
    }
    if name.is_some() || size.is_some() {
        return Err(Stop::Refused("ends too early".to_owned()));
    }
    Ok(None)
}

fn too_many(limit: usize) -> Stop {
    Stop::Refused(format!("has more than {limit} files and folders"))
}

/// After the last entry comes the mark of the end and then nothing but zeros. Reading them also has the checksum of
/// the last part compared.
fn finish(plain: &mut Plain) -> Result<(), Stop> {
    if plain.ended {
        return Err(Stop::Refused("ends too early".to_owned()));
    }
    let mut buffer = [0; 8 << 10];
    loop {
        match plain.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) if buffer[..count].iter().all(|&byte| byte == 0) => {}
            Ok(_) => return Err(Stop::Refused("goes on after its end".to_owned())),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Stop::Read(error)),
        }
    }
}

const PAX_MAX_BYTES: u64 = 64 << 10;

/// The content of an entry that describes another one.
fn small(entry: &mut tar::Entry<'_, impl Read>, limit_bytes: u64) -> Result<Vec<u8>, Stop> {
    if entry.size() > limit_bytes {
        return Err(Stop::Refused("has too long a name or description of an entry".to_owned()));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(Stop::Read)?;
    if bytes.len() as u64 != entry.size() {
        return Err(Stop::Refused("ends too early".to_owned()));
    }
    Ok(bytes)
}

/// An extended header: records of `length key=value` and a line feed, where the length counts the whole record.
#[derive(Debug, Default, PartialEq)]
struct Pax {
    path: Option<Vec<u8>>,
    size: Option<u64>,
}

impl Pax {
    fn parse(mut bytes: &[u8]) -> Result<Self, Stop> {
        let damaged = || Stop::Refused("has a damaged description of an entry".to_owned());
        let mut pax = Self::default();
        while !bytes.is_empty() {
            let space = bytes.iter().position(|&byte| byte == b' ').ok_or_else(damaged)?;
            let length = std::str::from_utf8(&bytes[..space]).ok().and_then(|text| text.parse::<usize>().ok());
            let record = length.and_then(|length| bytes.get(space + 1..length)).ok_or_else(damaged)?;
            bytes = &bytes[length.unwrap_or_default()..];
            let record = record.strip_suffix(b"\n").ok_or_else(damaged)?;
            let equals = record.iter().position(|&byte| byte == b'=').ok_or_else(damaged)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" if pax.path.is_none() => pax.path = Some(value.to_owned()),
                b"size" if pax.size.is_none() => {
                    let size = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                    pax.size = Some(size.ok_or_else(damaged)?);
                }
                b"path" | b"size" => return Err(damaged()),
                b"linkpath" => return Err(Stop::Refused("has a link".to_owned())),
                sparse if sparse.starts_with(b"GNU.sparse.") => {
                    return Err(Stop::Refused("has a sparse file".to_owned()));
                }
                _ => {}
            }
        }
        Ok(pax)
    }
}

/// Writes members into a folder that nobody else writes to. No link is ever made in it, so a path that goes only down
/// stays in it.
struct Folder<'a> {
    root: &'a Path,
    entries: HashMap<PathBuf, Kind>,
    limit: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Folder,
    /// A folder that was named only as part of a path so far.
    ImpliedFolder,
}

impl<'a> Folder<'a> {
    fn new(root: &'a Path, limit: usize) -> Self {
        Self { root, entries: HashMap::new(), limit }
    }

    fn add(&mut self, member: &Member, content: &mut dyn Read) -> Result<(), Stop> {
        let refuse =
            |path: &Path, fault| Stop::Refused(format!("the entry {} {fault}", shown(&path.to_string_lossy())));
        let mut parents: Vec<&Path> = member.path.ancestors().skip(1).filter(|path| *path != Path::new("")).collect();
        parents.reverse();
        for parent in parents {
            match self.entries.get(parent) {
                Some(Kind::File) => return Err(refuse(parent, "is a file and a folder")),
                Some(Kind::Folder | Kind::ImpliedFolder) => {}
                None => self.make(parent, Kind::ImpliedFolder)?,
            }
        }
        match (self.entries.get(&member.path), member.is_folder) {
            (None, true) => self.make(&member.path, Kind::Folder),
            (Some(Kind::ImpliedFolder), true) => {
                self.entries.insert(member.path.clone(), Kind::Folder);
                Ok(())
            }
            (None, false) => {
                self.count(&member.path, Kind::File)?;
                write_file(&self.root.join(&member.path), member, content)
            }
            (Some(_), _) => Err(refuse(&member.path, "is there twice")),
        }
    }

    fn make(&mut self, path: &Path, kind: Kind) -> Result<(), Stop> {
        self.count(path, kind)?;
        fs::create_dir(self.root.join(path)).map_err(Stop::Write)
    }

    fn count(&mut self, path: &Path, kind: Kind) -> Result<(), Stop> {
        if self.entries.len() == self.limit {
            return Err(too_many(self.limit));
        }
        self.entries.insert(path.to_owned(), kind);
        Ok(())
    }
}

fn write_file(path: &Path, member: &Member, content: &mut dyn Read) -> Result<(), Stop> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600 | (member.mode & 0o755));
    #[cfg(not(unix))]
    let _ = member.mode;
    let mut file = options.open(path).map_err(Stop::Write)?;
    let mut buffer = vec![0; 64 << 10];
    let mut left = member.bytes;
    while left > 0 {
        match content.read(&mut buffer) {
            Ok(0) => return Err(Stop::Refused("ends too early".to_owned())),
            Ok(count) => {
                file.write_all(&buffer[..count]).map_err(Stop::Write)?;
                left = left.saturating_sub(count as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Stop::Read(error)),
        }
    }
    Ok(())
}

fn refused(fault: impl fmt::Display) -> Error {
    Error::invalid("package archive", fault)
}

/// The cause that the reading chain kept; without one the bytes themselves are at fault.
fn from_read(shared: &Shared, error: io::Error) -> Error {
    if let Some(fault) = shared.fault.borrow_mut().take() {
        return fault;
    }
    match error.kind() {
        io::ErrorKind::UnexpectedEof => refused("ends too early").with_source(error),
        _ => refused(format_args!("is damaged: {}", shown(&error.to_string()))).with_source(error),
    }
}

const PREFIX: &str = "ocr-package-";
const LOCK: &str = "lock";
const CONTENT: &str = "content";
/// The most names of the work folder that are looked at for what was left there.
const LEFT_MAX: usize = 10_000;
/// A folder without a lock file is in the making, unless it is as old as this.
const IN_THE_MAKING: Duration = Duration::from_secs(3600);

/// A folder for one package, removed when dropped. A lock in it says that its process lives, so that others can tell
/// what a killed process left behind.
pub(super) struct Scratch {
    root: PathBuf,
    held: Option<(TempDir, File)>,
}

impl Scratch {
    fn new(work: Option<&Path>) -> Result<Self> {
        let work = work.map_or_else(tempfile::env::temp_dir, Path::to_owned);
        let make = || -> io::Result<Option<Self>> {
            let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in(&work)?;
            let lock = OpenOptions::new().write(true).create_new(true).open(folder.path().join(LOCK))?;
            let root = folder.path().join(CONTENT);
            // Between the two lines above somebody else may have taken the lock, and the folder for left behind.
            if lock.try_lock().is_err() || fs::create_dir(&root).is_err() {
                return Ok(None);
            }
            sweep(&work, folder.path());
            Ok(Some(Self { root, held: Some((folder, lock)) }))
        };
        for _ in 0..3 {
            let what = format!("the folder to unpack into, {}", work.display());
            if let Some(scratch) = make().map_err(|error| disk_error(&what, error))? {
                return Ok(scratch);
            }
        }
        Err(Error::unavailable("the folder to unpack into is swept all the time").with_retry(Retry::Safe))
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Removes it before this returns. Blocks.
    fn remove(mut self) {
        self.held = None;
    }
}

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Scratch").field(&self.root).finish()
    }
}

impl Drop for Scratch {
    /// Thousands of files take their time to remove; a thread that runs tasks has none.
    fn drop(&mut self) {
        if let (Some(held), Ok(runtime)) = (self.held.take(), tokio::runtime::Handle::try_current()) {
            drop(runtime.spawn_blocking(move || drop(held)));
        }
    }
}

/// Removes what killed processes left in the work folder, as far as it is ours. Nothing depends on it.
fn sweep(work: &Path, own: &Path) {
    let Ok(entries) = fs::read_dir(work) else { return };
    for entry in entries.take(LEFT_MAX).flatten() {
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with(PREFIX) && path != own && is_left(&path, own) {
            let removed = fs::remove_dir_all(&path);
            tracing::info!(path = %path.display(), removed = removed.is_ok(), "removed what a killed process left");
        }
    }
}

fn is_left(path: &Path, own: &Path) -> bool {
    let (Ok(metadata), Ok(own)) = (fs::symlink_metadata(path), fs::symlink_metadata(own)) else { return false };
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        if metadata.uid() != own.uid() {
            return false;
        }
    }
    #[cfg(not(unix))]
    let _ = own;
    if !metadata.is_dir() {
        return false;
    }
    match OpenOptions::new().write(true).open(path.join(LOCK)) {
        Ok(lock) => lock.try_lock().is_ok(),
        Err(_) => metadata.modified().ok().and_then(|made| made.elapsed().ok()).is_some_and(|age| age > IN_THE_MAKING),
    }
}

#[cfg(test)]
mod tests;
