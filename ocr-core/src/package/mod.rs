//! Deputy packages: manifests, archives, and where they come from.
//!
//! A package is a folder with a `package.toml` at its top and the files that it names; or an archive of such a
//! folder. [`Manifest`] is what `package.toml` says, checked; [`Package`] is that and the files; a [`PackageSource`]
//! finds packages by name and version. [`LocalFolder`] is the source that needs no server; `registry::Registry`
//! (feature `deputy`) asks a registry. What a range's front end wants to know of packages is in `query` (feature
//! `query`).
//!
//! ```
//! use ocr_core::package::{LocalFolder, PackageKind, PackageSource};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # std::fs::create_dir(folder.path().join("motd"))?;
//! std::fs::write(
//!     folder.path().join("motd/package.toml"),
//!     r#"
//!         [package]
//!         name = "motd"
//!         version = "1.0.0"
//!         license = "MIT"
//!         assets = [["motd.txt", "/etc/motd", "644"]]
//!         [content]
//!         type = "feature"
//!         [feature]
//!         type = "configuration"
//!     "#,
//! )?;
//! std::fs::write(folder.path().join("motd/motd.txt"), "Welcome\n")?;
//!
//! let packages = LocalFolder::new(folder.path());
//! let package = packages.fetch("motd", "^1").await?;
//! assert_eq!(package.kind(), PackageKind::Feature);
//! assert_eq!(package.asset_bytes(&package.assets()[0]).await?, "Welcome\n");
//! # Ok(())
//! # }
//! ```

use std::{
    collections::BTreeSet,
    fmt,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use semver::{Version, VersionReq};
use sha2::{Digest, Sha256};

use crate::{Error, ErrorKind, Result, Retry, error::reason, id::shown};

mod archive;
mod folder;
mod manifest;
#[cfg(feature = "query")]
pub mod query;
#[cfg(feature = "deputy")]
pub mod registry;

pub use archive::{UnpackLimits, Unpacked, unpack};
pub use folder::LocalFolder;
pub use manifest::{
    Account, Asset, Condition, Content, ContentFile, Feature, FeatureKind, Inject, Malware, Manifest, PackageKind,
    VirtualMachine,
};

/// Where packages come from.
#[async_trait]
pub trait PackageSource: fmt::Debug + Send + Sync + 'static {
    /// The newest package of this name whose version meets the requirement, unpacked and checked.
    ///
    /// Names are compared without regard to case. A requirement is semver's (`1.2`, `^1`, `>=1, <3`); empty or `*`
    /// is any version, and takes a pre-release only when there is nothing else.
    ///
    /// # Errors
    /// `Invalid` naming `source.name` or `source.version`, or the fault of the package itself; `NotFound` with reason
    /// [`PACKAGE_NOT_FOUND`](crate::error::reason::PACKAGE_NOT_FOUND) and the versions that there are.
    async fn fetch(&self, name: &str, requirement: &str) -> Result<Arc<Package>>;

    /// The version that [`PackageSource::fetch`] would take, without fetching it where the source can tell.
    ///
    /// # Errors
    /// Those of [`PackageSource::fetch`].
    async fn resolve(&self, name: &str, requirement: &str) -> Result<Version> {
        Ok(self.fetch(name, requirement).await?.manifest().version.clone())
    }

    /// All packages, or those of one kind: by name, the newest version first.
    ///
    /// # Errors
    /// `Unsupported` from a source that cannot list.
    async fn list(&self, kind: Option<PackageKind>) -> Result<Vec<PackageSummary>> {
        let _ = kind;
        Err(Error::unsupported("this source of packages cannot list them").during("package.list"))
    }
}

/// What a list says of a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackageSummary {
    /// The package's name.
    pub name: String,
    /// The package's version.
    pub version: Version,
    /// What is in it.
    pub kind: PackageKind,
    /// The package's own words; may be empty.
    pub description: String,
}

/// The largest asset that [`Package::asset_bytes`] reads: 256 MiB.
pub const MAX_ASSET_BYTES: u64 = 256 << 20;

/// A package whose files are here: its manifest was checked and every file that it names exists.
///
/// One that was unpacked takes its files along when it is dropped.
pub struct Package {
    manifest: Arc<Manifest>,
    root: Root,
    digest: String,
}

enum Root {
    Unpacked(archive::Scratch),
    Folder(PathBuf),
}

impl Package {
    /// Opens a folder with a `package.toml`. The folder is only read, and stays its owner's: who changes a file
    /// afterwards changes what [`Package::asset_bytes`] gives.
    ///
    /// # Errors
    /// `Invalid` naming the field of the manifest at fault; `NotFound` when there is no `package.toml`.
    pub async fn open_folder(folder: impl Into<PathBuf>) -> Result<Self> {
        let folder = folder.into();
        blocking(move || Self::open_folder_blocking(&folder)).await
    }

    fn open_folder_blocking(folder: &Path) -> Result<Self> {
        let manifest = Arc::new(Manifest::parse(&manifest_text(folder)?)?);
        let files = files_of(&manifest, folder)?;
        let digest = digest_of(folder, &files)?;
        Ok(Self { manifest, root: Root::Folder(folder.to_owned()), digest })
    }

    /// Unpacks an archive and opens what was in it.
    ///
    /// # Errors
    /// Those of [`unpack`] and [`Package::open_folder`].
    pub async fn open_archive(archive: impl Into<PathBuf>, limits: UnpackLimits) -> Result<Self> {
        Self::of_unpacked(unpack(archive, None, limits).await?).await
    }

    async fn of_unpacked(unpacked: Unpacked) -> Result<Self> {
        blocking(move || {
            let manifest = Arc::new(Manifest::parse(&manifest_text(unpacked.root())?)?);
            files_of(&manifest, unpacked.root())?;
            let (scratch, digest) = unpacked.into_parts();
            Ok(Self { manifest, root: Root::Unpacked(scratch), digest })
        })
        .await
    }

    /// What `package.toml` says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What is in the package.
    pub fn content(&self) -> &Content {
        &self.manifest.content
    }

    /// What kind of package it is.
    pub fn kind(&self) -> PackageKind {
        self.manifest.kind()
    }

    /// The files to copy into a guest, in the manifest's order.
    pub fn assets(&self) -> &[Asset] {
        &self.manifest.assets
    }

    /// The folder that holds the files. For [`Asset`]s, [`Package::asset_bytes`] is safer.
    pub fn root(&self) -> &Path {
        match &self.root {
            Root::Unpacked(scratch) => scratch.root(),
            Root::Folder(folder) => folder,
        }
    }

    /// Lower hex SHA-256: of the archive, or of a folder's `package.toml` and all files it names. Equal digests mean
    /// equal packages.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Reads an asset whole, at most [`MAX_ASSET_BYTES`], on a blocking thread.
    ///
    /// # Errors
    /// `Invalid` when it is not in the package or too large; `Unavailable` when the disk fails.
    pub async fn asset_bytes(&self, asset: &Asset) -> Result<Bytes> {
        self.read(&asset.source).await
    }

    /// Reads the file of a `[event]`, `[exercise]` or `[banner]` whole, with the same limit as an asset.
    ///
    /// # Errors
    /// Those of [`Package::asset_bytes`].
    pub async fn file_bytes(&self, file: &ContentFile) -> Result<Bytes> {
        self.read(&file.file_path).await
    }

    async fn read(&self, source: &Path) -> Result<Bytes> {
        let (root, source) = (self.root().to_owned(), source.to_owned());
        blocking(move || {
            let field = format!("package file {}", shown(&source.to_string_lossy()));
            let path = resolve(&root, &source, &field)?;
            let file = File::open(path).map_err(|error| disk_error(&field, error))?;
            read_at_most(file, MAX_ASSET_BYTES, &field).map(Bytes::from)
        })
        .await
        .map_err(|error| error.during("package.read").on(self.to_string()))
    }
}

impl fmt::Display for Package {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "package {} {}", self.manifest.name, self.manifest.version)
    }
}

impl fmt::Debug for Package {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Package")
            .field("name", &self.manifest.name)
            .field("version", &self.manifest.version)
            .field("kind", &self.kind())
            .field("digest", &self.digest)
            .finish_non_exhaustive()
    }
}

const MANIFEST: &str = "package.toml";
const MANIFEST_MAX_BYTES: u64 = 1 << 20;

fn manifest_text(folder: &Path) -> Result<String> {
    let path = folder.join(MANIFEST);
    match fs::metadata(&path) {
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => return Err(Error::invalid(MANIFEST, "wants to be a file")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::not_found("there is no package.toml at the top of the package"));
        }
        Err(error) => return Err(disk_error(MANIFEST, error)),
    }
    let file = File::open(path).map_err(|error| disk_error(MANIFEST, error))?;
    text_of(read_at_most(file, MANIFEST_MAX_BYTES, MANIFEST)?)
}

fn text_of(bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|_| Error::invalid(MANIFEST, "wants text in UTF-8"))
}

fn read_at_most(file: impl Read, limit_bytes: u64, field: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(|error| disk_error(field, error))?;
    if bytes.len() as u64 > limit_bytes {
        return Err(Error::invalid(field, format_args!("wants at most {limit_bytes} bytes")));
    }
    Ok(bytes)
}

/// The files that the manifest names, each once, found and checked.
fn files_of(manifest: &Manifest, root: &Path) -> Result<Vec<PathBuf>> {
    let mut files = BTreeSet::new();
    for (index, asset) in manifest.assets.iter().enumerate() {
        let field = format!("package.toml: assets[{index}]");
        let path = resolve(root, &asset.source, &field)?;
        let bytes = fs::metadata(path).map_err(|error| disk_error(&field, error))?.len();
        if bytes > MAX_ASSET_BYTES {
            return Err(Error::invalid(
                &field,
                format_args!("wants a file of at most {MAX_ASSET_BYTES} bytes, this one has {bytes}"),
            ));
        }
        files.insert(asset.source.clone());
    }
    if let Some((field, file)) = manifest.content.file() {
        resolve(root, file, &format!("package.toml: {field}"))?;
        files.insert(file.to_owned());
    }
    Ok(files.into_iter().collect())
}

/// Where a file of the package really is: inside it, through whatever links, and a regular file.
fn resolve(root: &Path, source: &Path, field: &str) -> Result<PathBuf> {
    let missing = || Error::invalid(field, format_args!("{} is not in the package", shown(&source.to_string_lossy())));
    let root = root.canonicalize().map_err(|error| disk_error(field, error))?;
    let path = match root.join(source).canonicalize() {
        Ok(path) => path,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Err(missing());
        }
        Err(error) => return Err(disk_error(field, error)),
    };
    if !path.starts_with(&root) {
        return Err(Error::invalid(
            field,
            format_args!("{} leaves the package through a link", shown(&source.to_string_lossy())),
        ));
    }
    // A pipe or a device would block whoever opens it.
    if !fs::metadata(&path).map_err(|error| disk_error(field, error))?.is_file() {
        return Err(Error::invalid(
            field,
            format_args!("wants a file, {} is a folder or something else", shown(&source.to_string_lossy())),
        ));
    }
    Ok(path)
}

fn digest_of(root: &Path, files: &[PathBuf]) -> Result<String> {
    let mut digest = Sha256::new();
    for source in std::iter::once(Path::new(MANIFEST)).chain(files.iter().map(PathBuf::as_path)) {
        let field = format!("package file {}", shown(&source.to_string_lossy()));
        let mut file = File::open(resolve(root, source, &field)?).map_err(|error| disk_error(&field, error))?;
        let mut one = Sha256::new();
        io::copy(&mut file, &mut one).map_err(|error| disk_error(&field, error))?;
        // Of fixed length each, so that no two lists of files look the same.
        digest.update(Sha256::digest(source.as_os_str().as_encoded_bytes()));
        digest.update(one.finalize());
    }
    Ok(hex(&digest.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn disk_error(what: &str, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            Error::new(ErrorKind::Denied, format!("{what}: this process may not read it"))
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Error::new(ErrorKind::Exhausted, format!("{what}: the disk is full"))
        }
        io::ErrorKind::NotFound => Error::unavailable(format!("{what}: it is gone")),
        _ => Error::unavailable(format!("{what}: the disk failed")),
    }
    .with_retry(Retry::Safe)
    .with_source(error)
}

/// The one door to blocking threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => Err(Error::internal("reading a package failed inside").with_source(error)),
        Err(_) => Err(Error::unavailable("the program is stopping")),
    }
}

fn not_found<'a>(name: &str, versions: impl Iterator<Item = &'a Version>) -> Error {
    let message = match listed(versions) {
        None => format!("there is no package {name}"),
        Some(listed) => format!("no version of {name} meets the requirement; there are {listed}"),
    };
    Error::not_found(message).with_reason(reason::PACKAGE_NOT_FOUND)
}

/// The most versions that a message lists.
const LISTED_MAX: usize = 20;

/// Versions as a message lists them, the newest first.
fn listed<'a>(versions: impl Iterator<Item = &'a Version>) -> Option<String> {
    let mut versions: Vec<&Version> = versions.collect();
    versions.sort_by(|a, b| b.cmp(a));
    versions.dedup();
    let more = versions.len().saturating_sub(LISTED_MAX);
    let listed: Vec<String> = versions.iter().take(LISTED_MAX).map(ToString::to_string).collect();
    match (listed.is_empty(), more) {
        (true, _) => None,
        (false, 0) => Some(listed.join(", ")),
        (false, more) => Some(format!("{} and {more} older", listed.join(", "))),
    }
}

/// As [`PackageSource::list`] has them, each version once.
fn in_order(packages: &mut Vec<PackageSummary>) {
    let order = |package: &PackageSummary| package.name.to_ascii_lowercase();
    packages.sort_by(|a, b| order(a).cmp(&order(b)).then_with(|| b.version.cmp(&a.version)));
    packages.dedup_by(|a, b| order(a) == order(b) && a.version == b.version);
}

/// Which versions are wanted.
enum Requirement {
    Any,
    Of(VersionReq),
}

impl Requirement {
    fn parse(text: &str) -> Result<Self> {
        match text.trim() {
            "" | "*" => Ok(Self::Any),
            text => VersionReq::parse(text).map(Self::Of).map_err(|error| {
                Error::invalid(
                    "source.version",
                    format_args!(
                        "wants a version requirement such as 1.2, ^1 or \">=1, <3\", got {}: {error}",
                        shown(text)
                    ),
                )
            }),
        }
    }

    /// The newest that meets it. Of several with the same version the first.
    fn newest<'a, T>(&self, candidates: &'a [T], version: impl Fn(&T) -> &Version) -> Option<&'a T> {
        let newest_of = |wanted: &dyn Fn(&Version) -> bool| {
            candidates
                .iter()
                .rev()
                .filter(|candidate| wanted(version(candidate)))
                .max_by(|a, b| version(a).cmp(version(b)))
        };
        match self {
            Self::Of(requirement) => newest_of(&|version| requirement.matches(version)),
            Self::Any => newest_of(&|version| version.pre.is_empty()).or_else(|| newest_of(&|_| true)),
        }
    }
}

/// The most parts that a path in a package may have.
const PATH_PARTS: usize = 32;
const PATH_BYTES: usize = 4096;
const PATH_PART_BYTES: usize = 255;

/// A path inside a package: relative, going down only. The same rule for what a manifest names and what an archive
/// holds.
fn inside(text: &str, parts: usize, bytes: usize) -> Result<PathBuf, &'static str> {
    if text.len() > bytes {
        return Err("is too long a path");
    }
    if text.chars().any(char::is_control) {
        return Err("has a control character in its path");
    }
    if text.contains('\\') {
        return Err("has a \\ in its path; / separates folders");
    }
    if text.starts_with('/') {
        return Err("is an absolute path");
    }
    let mut path = PathBuf::new();
    let mut count = 0;
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err("climbs out with .."),
            part if count == 0 && is_drive(part) => return Err("is an absolute path"),
            part if part.len() > PATH_PART_BYTES => return Err("has too long a name in its path"),
            part => {
                path.push(part);
                count += 1;
            }
        }
    }
    match count {
        0 => Err("names no file"),
        _ if count > parts => Err("lies too deep"),
        _ => Ok(path),
    }
}

/// Whether Windows would take it for the beginning of another place, also after a `./`.
fn is_drive(part: &str) -> bool {
    matches!(part.as_bytes(), [letter, b':', ..] if letter.is_ascii_alphabetic())
}

#[cfg(test)]
mod tests;
