//! [`LocalFolder`]: packages in a folder of this machine.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use async_trait::async_trait;
use semver::Version;
use tokio::sync::OnceCell;

use super::{
    MANIFEST, Manifest, Package, PackageKind, PackageSource, PackageSummary, Requirement, UnpackLimits, archive,
    blocking, disk_error, in_order, manifest, manifest_text, not_found, unpack,
};
use crate::{Error, ErrorKind, Result, Retry, id::shown};

/// The most names in the folder that are looked at.
const SCANNED_MAX: usize = 10_000;
/// The most packages that stay unpacked (or open, for folders) after their last use.
const KEPT_MAX: usize = 32;
const ARCHIVES: [&str; 3] = [".package", ".tar.gz", ".tgz"];

/// A [`PackageSource`] over a folder of this machine.
///
/// It holds packages as folders with a `package.toml`, or as archives named `*.package`, `*.tar.gz` or `*.tgz`, in any
/// mixture; what they are called otherwise does not matter, the manifest has the name. The folder is looked at anew for
/// each call, files that did not change are not read again, and archives stay unpacked for a while.
///
/// A package that cannot be read does not hide the others: it is logged once and passed over. Asked for by name, when
/// no other package answers, it gives its own fault.
#[derive(Debug)]
pub struct LocalFolder {
    folder: PathBuf,
    work: Option<PathBuf>,
    limits: UnpackLimits,
    /// What is known of each package in the folder. Held by one scan at a time.
    known: Arc<tokio::sync::Mutex<HashMap<PathBuf, Known>>>,
    /// Packages by their stamp or digest, the latest used last. A cell is filled once, however many ask.
    kept: Mutex<VecDeque<(Identity, Kept)>>,
}

impl LocalFolder {
    /// A source over this folder. Nothing is read yet; [`LocalFolder::check`] does.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            work: None,
            limits: UnpackLimits::default(),
            known: Arc::default(),
            kept: Mutex::default(),
        }
    }

    /// With other limits for archives.
    #[must_use]
    pub fn with_limits(mut self, limits: UnpackLimits) -> Self {
        self.limits = limits;
        self
    }

    /// With another folder to unpack archives in than the system's for temporary files. It must exist.
    #[must_use]
    pub fn with_work_folder(mut self, work: impl Into<PathBuf>) -> Self {
        self.work = Some(work.into());
        self
    }

    /// Whether the folder can be read, for a check at start-up. Blocks.
    ///
    /// # Errors
    /// `Unavailable` when it does not exist; `Denied`; `Invalid` when it is no folder.
    pub fn check(&self) -> Result<()> {
        read_folder(&self.folder).map(drop)
    }

    async fn scan(&self) -> Result<Vec<Found>> {
        let mut known = Arc::clone(&self.known).lock_owned().await;
        let (folder, limits) = (self.folder.clone(), self.limits);
        blocking(move || scan(&folder, &limits, &mut known)).await
    }

    async fn find(&self, name: &str, requirement: &str) -> Result<Found> {
        manifest::check_name(name).map_err(|wanted| Error::invalid("source.name", wanted))?;
        let requirement = Requirement::parse(requirement)?;
        let mut found = self.scan().await?;
        let (good, bad): (Vec<_>, Vec<_>) =
            found.iter().filter(|found| found.is_called(name)).partition(|found| found.outcome.is_ok());
        let good: Vec<(&Found, &Arc<Manifest>)> =
            good.into_iter().filter_map(|found| Some((found, found.outcome.as_ref().ok()?))).collect();
        if let Some((newest, _)) = requirement.newest(&good, |(_, manifest)| &manifest.version) {
            let path = newest.path.clone();
            let at = found.iter().position(|found| found.path == path).unwrap_or_default();
            return Ok(found.swap_remove(at));
        }
        if let Some(fault) = bad.iter().find_map(|found| found.outcome.as_ref().err()) {
            return Err(fault.error());
        }
        Err(not_found(name, good.iter().map(|(_, manifest)| &manifest.version)))
    }

    async fn load(&self, found: &Found) -> Result<Arc<Package>> {
        let (path, limits) = (found.path.clone(), self.limits);
        if found.is_archive {
            let digest = self.digest(found).await?;
            let kept = self.keep(Identity::Archive(digest.clone()));
            let load = || async {
                let unpacked = unpack(path, self.work.as_deref(), limits).await?;
                if unpacked.digest() != digest {
                    return Err(changed());
                }
                Package::of_unpacked(unpacked).await.map(Arc::new)
            };
            return kept.get_or_try_init(load).await.map(Arc::clone);
        }
        let stamps = {
            let (path, manifest) = (path.clone(), found.outcome.as_ref().ok().map(Arc::clone));
            blocking(move || Ok(stamps(&path, manifest.as_deref()))).await?
        };
        let kept = self.keep(Identity::Folder(path.clone(), stamps));
        kept.get_or_try_init(|| async { Package::open_folder(path).await.map(Arc::new) }).await.map(Arc::clone)
    }

    /// The archive's digest, computed once while the file stays the same.
    async fn digest(&self, found: &Found) -> Result<String> {
        let mut known = Arc::clone(&self.known).lock_owned().await;
        if let Some(digest) =
            known.get(&found.path).filter(|known| known.stamp == found.stamp).and_then(|k| k.digest.clone())
        {
            return Ok(digest);
        }
        drop(known);
        let (path, limits) = (found.path.clone(), self.limits);
        let digest = blocking(move || archive::file_digest(&path, &limits)).await?;
        known = Arc::clone(&self.known).lock_owned().await;
        if let Some(known) = known.get_mut(&found.path).filter(|known| known.stamp == found.stamp) {
            known.digest = Some(digest.clone());
        }
        Ok(digest)
    }

    fn keep(&self, identity: Identity) -> Kept {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(other, _)| *other == identity);
        let entry = at.and_then(|at| kept.remove(at)).unwrap_or_else(|| (identity, Arc::default()));
        let cell = Arc::clone(&entry.1);
        kept.push_back(entry);
        if kept.len() > KEPT_MAX {
            kept.pop_front();
        }
        cell
    }
}

#[async_trait]
impl PackageSource for LocalFolder {
    async fn fetch(&self, name: &str, requirement: &str) -> Result<Arc<Package>> {
        let fetched = async {
            let found = self.find(name, requirement).await?;
            self.load(&found).await.map_err(|error| error.on(found.place()))
        };
        fetched.await.map_err(|error| error.during("package.fetch").on(format!("package {}", shown(name))))
    }

    async fn resolve(&self, name: &str, requirement: &str) -> Result<Version> {
        let found = self.find(name, requirement).await.and_then(|found| match &found.outcome {
            Ok(manifest) => Ok(manifest.version.clone()),
            Err(fault) => Err(fault.error()),
        });
        found.map_err(|error| error.during("package.resolve").on(format!("package {}", shown(name))))
    }

    async fn list(&self, kind: Option<PackageKind>) -> Result<Vec<PackageSummary>> {
        let found = self.scan().await.map_err(|error| error.during("package.list"))?;
        let mut packages: Vec<PackageSummary> = found
            .iter()
            .filter_map(|found| found.outcome.as_ref().ok())
            .filter(|manifest| kind.is_none_or(|kind| manifest.kind() == kind))
            .map(|manifest| PackageSummary {
                name: manifest.name.clone(),
                version: manifest.version.clone(),
                kind: manifest.kind(),
                description: manifest.description.clone(),
            })
            .collect();
        in_order(&mut packages);
        Ok(packages)
    }
}

fn changed() -> Error {
    Error::new(ErrorKind::Conflict, "the archive was changed while it was read").with_retry(Retry::Safe)
}

/// When it is the same, so is the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
    /// Inode and time of the last change of any kind, where there are such.
    change: (u64, i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
        #[cfg(unix)]
        let change = {
            use std::os::unix::fs::MetadataExt;
            (metadata.ino(), metadata.ctime(), metadata.ctime_nsec())
        };
        #[cfg(not(unix))]
        let change = (0, 0, 0);
        Some(Self { bytes: metadata.len(), modified: metadata.modified().ok(), change })
    }
}

type Kept = Arc<OnceCell<Arc<Package>>>;

#[derive(Debug, PartialEq, Eq)]
enum Identity {
    Archive(String),
    Folder(PathBuf, Vec<Option<Stamp>>),
}

/// The stamps of all files that a package in a folder is made of.
fn stamps(folder: &Path, manifest: Option<&Manifest>) -> Vec<Option<Stamp>> {
    let mut files = vec![Path::new(MANIFEST)];
    if let Some(manifest) = manifest {
        files.extend(manifest.assets.iter().map(|asset| asset.source.as_path()));
        files.extend(manifest.content.file().map(|(_, file)| file));
    }
    files.iter().map(|file| Stamp::of(&folder.join(file))).collect()
}

/// What a scan found out about one package.
#[derive(Clone, Debug)]
struct Known {
    stamp: Stamp,
    outcome: Result<Arc<Manifest>, Arc<Fault>>,
    digest: Option<String>,
}

/// A package that cannot be read.
#[derive(Debug)]
struct Fault {
    kind: ErrorKind,
    message: String,
    /// What it may be called: by its manifest, or else by its file.
    names: Vec<String>,
    place: String,
}

impl Fault {
    fn error(&self) -> Error {
        Error::new(self.kind, self.message.clone()).on(self.place.clone())
    }
}

#[derive(Debug)]
struct Found {
    path: PathBuf,
    is_archive: bool,
    stamp: Stamp,
    outcome: Result<Arc<Manifest>, Arc<Fault>>,
}

impl Found {
    fn is_called(&self, name: &str) -> bool {
        match &self.outcome {
            Ok(manifest) => manifest.name.eq_ignore_ascii_case(name),
            Err(fault) => fault.names.iter().any(|other| other.eq_ignore_ascii_case(name)),
        }
    }

    fn place(&self) -> String {
        place(&self.path)
    }
}

fn place(path: &Path) -> String {
    format!("package file {}", path.file_name().unwrap_or_default().to_string_lossy())
}

fn read_folder(folder: &Path) -> Result<fs::ReadDir> {
    let what = format!("the package folder {}", folder.display());
    fs::read_dir(folder).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::unavailable(format!("{what} does not exist")),
        io::ErrorKind::NotADirectory => Error::new(ErrorKind::Invalid, format!("{what} is not a folder")),
        _ => disk_error(&what, error),
    })
}

/// All packages of the folder: folders before archives, each in the order of their names, so that of two with the same
/// name and version it is always the same that counts.
fn scan(folder: &Path, limits: &UnpackLimits, known: &mut HashMap<PathBuf, Known>) -> Result<Vec<Found>> {
    let mut candidates = Vec::new();
    for (count, entry) in read_folder(folder)?.enumerate() {
        if count == SCANNED_MAX {
            return Err(Error::new(
                ErrorKind::Exhausted,
                format!("the package folder {} has more than {SCANNED_MAX} entries", folder.display()),
            ));
        }
        let entry = entry.map_err(|error| disk_error("the package folder", error))?;
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(stamp) = Stamp::of(&path.join(MANIFEST)) {
            candidates.push((false, path, stamp));
        } else if ARCHIVES.iter().any(|ending| name.ends_with(ending)) && !name.starts_with('.') {
            candidates.extend(Stamp::of(&path).map(|stamp| (true, path, stamp)));
        }
    }
    candidates.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
    let there: HashSet<&Path> = candidates.iter().map(|candidate| candidate.1.as_path()).collect();
    known.retain(|path, _| there.contains(path.as_path()));
    let found = candidates.into_iter().map(|(is_archive, path, stamp)| {
        let outcome = match known.get(&path).filter(|known| known.stamp == stamp) {
            Some(known) => known.outcome.clone(),
            None => {
                let outcome = read_manifest(&path, is_archive, limits);
                // A disk that failed may be better the next time.
                if !outcome.as_ref().is_err_and(|fault| fault.kind == ErrorKind::Unavailable) {
                    known.insert(path.clone(), Known { stamp, outcome: outcome.clone(), digest: None });
                }
                outcome
            }
        };
        Found { path, is_archive, stamp, outcome }
    });
    Ok(found.collect())
}

fn read_manifest(path: &Path, is_archive: bool, limits: &UnpackLimits) -> Result<Arc<Manifest>, Arc<Fault>> {
    let text = if is_archive { archive::manifest_text(path, limits) } else { manifest_text(path) };
    let mut names = file_names(path);
    let manifest = text.and_then(|text| Manifest::parse(&text).inspect_err(|_| names.extend(Manifest::name_in(&text))));
    manifest.map(Arc::new).map_err(|error| {
        tracing::warn!(package = %path.display(), %error, "passed over a package that cannot be read");
        Arc::new(Fault { kind: error.kind(), message: error.message().to_owned(), names, place: place(path) })
    })
}

/// What a package may be called by the name of its file: `a-1.2.3.tar.gz` gives `a-1.2.3` and `a`.
fn file_names(path: &Path) -> Vec<String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = ARCHIVES.iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(&name);
    let bare = stem
        .match_indices('-')
        .find(|&(at, _)| Version::parse(&stem[at + 1..]).is_ok())
        .map(|(at, _)| stem[..at].to_owned());
    std::iter::once(stem.to_owned()).chain(bare).collect()
}

#[cfg(test)]
mod tests;
