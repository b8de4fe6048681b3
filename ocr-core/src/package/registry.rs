//! [`Registry`]: packages from a Deputy registry, over HTTP.
//!
//! ```text
//! name, requirement --versions--> newest that is not yanked, with its checksum
//!     unpacked already? -> share it
//!     in the cache?     -> unpack it
//!     else              -> download (resumed where it broke off), compare the checksum, keep, unpack
//! ```
//!
//! Whoever asks for a package that somebody else is fetching waits for the same download. The work belongs to those
//! that wait: it goes on while one of them is left, and ends with the last.

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    io::{Seek, SeekFrom, Write},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use futures::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};
use reqwest::{Response, StatusCode, header};
use secrecy::SecretString;
use semver::Version;
use sha2::{Digest, Sha256};
use tempfile::TempPath;
use tokio::{sync::Semaphore, time::Instant};

use self::{
    cache::{Cache, Held, Reservation},
    wire::{Api, WireVersion},
};
use super::{
    Package, PackageKind, PackageSource, PackageSummary, Requirement, UnpackLimits, blocking, disk_error, hex, listed,
    manifest, not_found, unpack,
};
pub use crate::http::Certificates;
use crate::{Error, ErrorKind, Result, Retry, error::reason, id::shown};

mod cache;
mod wire;

/// The most pages of a list that are read.
const PAGES_MAX: u64 = 1000;
/// The most versions that a list gives.
const LIST_MAX: usize = 20_000;
/// How many bytes of a download are written at once.
const WRITE_BYTES: usize = 1 << 20;
/// Room that a download of unknown size asks for at a time, in bytes.
const ROOM_STEP_BYTES: u64 = 16 << 20;
/// However well they go on, a download has no more connections than this.
const CONNECTIONS_MAX: u32 = 1000;

/// How to reach a registry, and what it may cost. Its `Debug` hides the token.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// The registry's address, without `/api/v1`.
    pub url: String,
    /// For registries that want one for reading.
    pub token: Option<SecretString>,
    /// Which certificates of the registry are believed.
    pub certificates: Certificates,
    /// Folder of the cache, made when it is not there. One process at a time uses it.
    pub cache_folder: PathBuf,
    /// What the cache may take on disk, in bytes. Default 10 GiB.
    pub cache_bytes: u64,
    /// What a package may cost.
    pub limits: UnpackLimits,
    /// Default 10 s.
    pub connect_deadline: Duration,
    /// For every answer but an archive as a whole. Default 30 s.
    pub answer_deadline: Duration,
    /// How long a download may stand still before its connection counts as broken. Default 30 s.
    pub stall_deadline: Duration,
    /// For a download as a whole, with all its connections. Default 30 min.
    pub download_deadline: Duration,
    /// How many requests in a row may fail without a byte of progress. Default 5.
    pub tries: u32,
    /// After the first failure; it doubles with each further one, up to 5 s. Default 200 ms.
    pub pause: Duration,
    /// How many downloads run at once. Default 8.
    pub downloads: usize,
}

impl Config {
    /// With the usual limits.
    pub fn new(url: impl Into<String>, cache_folder: impl Into<PathBuf>) -> Self {
        Self {
            url: url.into(),
            token: None,
            certificates: Certificates::System,
            cache_folder: cache_folder.into(),
            cache_bytes: 10 << 30,
            limits: UnpackLimits::default(),
            connect_deadline: Duration::from_secs(10),
            answer_deadline: Duration::from_secs(30),
            stall_deadline: Duration::from_secs(30),
            download_deadline: Duration::from_secs(1800),
            tries: 5,
            pause: Duration::from_millis(200),
            downloads: 8,
        }
    }

    /// Whether the address is one, without asking anybody.
    ///
    /// # Errors
    /// `Invalid` naming `DEPUTY_REGISTRY`.
    pub fn check(&self) -> Result<()> {
        wire::base(&self.url).map(drop)
    }
}

/// A [`PackageSource`] over a Deputy registry. Cloning is cheap; all clones share one cache.
///
/// # Errors of `fetch`
/// | fault | kind | reason |
/// |---|---|---|
/// | the registry is away, or makes no sense | `Unavailable` | `REGISTRY_UNAVAILABLE` |
/// | a download takes longer than its deadline | `TimedOut` | `REGISTRY_UNAVAILABLE` |
/// | the registry refuses us | `Denied` | |
/// | no such package, no version that would do | `NotFound` | `PACKAGE_NOT_FOUND` |
/// | all versions that would do are yanked | `Conflict` | `PACKAGE_YANKED` |
/// | other bytes than the checksum says | `Conflict` | `PACKAGE_CHECKSUM` |
/// | no archive, or a dangerous one | `Invalid` | `PACKAGE_ARCHIVE` |
/// | a broken manifest, or another package's | `Invalid` | `PACKAGE_MANIFEST` |
/// | larger than allowed | `Exhausted` | `PACKAGE_TOO_LARGE` |
/// | all of the cache is in use | `Exhausted` | `PACKAGE_CACHE_FULL` |
/// | the disk is full | `Exhausted` | |
///
/// None of them leaves anything in the cache's folder for work.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    api: Api,
    cache: Arc<Cache>,
    config: Config,
    /// What is being fetched, by checksum. A flight lives as long as somebody waits for it.
    flights: Mutex<HashMap<String, WeakShared<Flight>>>,
    downloads: Semaphore,
}

type Flight = BoxFuture<'static, Result<Arc<Package>>>;

/// The version that was chosen.
#[derive(Clone, Debug)]
struct Chosen {
    name: String,
    version: Version,
    /// The version as the registry spells it.
    spelling: String,
    checksum: String,
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "package {} {}", self.name, self.version)
    }
}

/// Lower hex SHA-256. It becomes the name of a file.
fn is_checksum(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

impl Registry {
    /// Opens the cache; the registry is not asked anything yet. Blocks for as long as old downloads take to remove.
    ///
    /// # Errors
    /// `Invalid` naming `DEPUTY_REGISTRY` or `DEPUTY_CA_FILE`; `Conflict` when another process uses the cache; those of
    /// the disk.
    pub fn open(config: Config) -> Result<Self> {
        let open = || {
            let api = Api::new(&config)?;
            let cache = Arc::new(Cache::open(&config.cache_folder, config.cache_bytes)?);
            Ok((api, cache))
        };
        let (api, cache) = open().map_err(|error: Error| error.during("package.open"))?;
        let downloads = Semaphore::new(config.downloads.max(1));
        Ok(Self { inner: Arc::new(Inner { api, cache, config, flights: Mutex::default(), downloads }) })
    }

    async fn find(&self, name: &str, requirement: &str) -> Result<Arc<Package>> {
        let chosen = self.inner.choose(name, requirement).await?;
        let package = self.inner.flight(&chosen).await.map_err(|error| error.on(chosen.to_string()))?;
        // One archive may be listed under two names; it has one.
        let manifest = package.manifest();
        if !manifest.name.eq_ignore_ascii_case(&chosen.name) || manifest.version != chosen.version {
            return Err(Error::invalid(
                "package.toml",
                format_args!("says {package}, but the registry has it as {chosen}"),
            )
            .with_reason(reason::PACKAGE_MANIFEST));
        }
        Ok(package)
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

#[async_trait]
impl PackageSource for Registry {
    async fn fetch(&self, name: &str, requirement: &str) -> Result<Arc<Package>> {
        let fetched = self.find(name, requirement).await;
        fetched.map_err(|error| error.during("package.fetch").on(format!("package {}", shown(name))))
    }

    async fn resolve(&self, name: &str, requirement: &str) -> Result<Version> {
        let chosen = self.inner.choose(name, requirement).await;
        chosen
            .map(|chosen| chosen.version)
            .map_err(|error| error.during("package.resolve").on(format!("package {}", shown(name))))
    }

    async fn list(&self, kind: Option<PackageKind>) -> Result<Vec<PackageSummary>> {
        self.inner.list(kind).await.map_err(|error| error.during("package.list"))
    }
}

impl Inner {
    /// The newest version that meets the requirement and is not yanked.
    async fn choose(&self, name: &str, requirement: &str) -> Result<Chosen> {
        manifest::check_name(name).map_err(|wanted| Error::invalid("source.name", wanted))?;
        let wanted = Requirement::parse(requirement)?;
        let text = match &wanted {
            Requirement::Any => "*".to_owned(),
            Requirement::Of(requirement) => requirement.to_string(),
        };
        // The registry knows no case; where one does, it knows the lower one.
        let name = name.to_ascii_lowercase();
        let found = versions(self.retried(|| self.api.versions(&name, Some(&text))).await?);
        let good: Vec<&Listed> = found.iter().filter(|one| !one.yanked).collect();
        if let Some(newest) = wanted.newest(&good, |one| &one.version) {
            return newest.chosen(name);
        }
        // Why is there none? The list without a requirement has the yanked too, and pre-releases.
        let all = versions(self.retried(|| self.api.versions(&name, None)).await?);
        let (yanked, good): (Vec<&Listed>, Vec<&Listed>) = all.iter().partition(|one| one.yanked);
        if let Some(newest) = wanted.newest(&good, |one| &one.version) {
            return newest.chosen(name);
        }
        if let Some(newest) = wanted.newest(&yanked, |one| &one.version) {
            let others = match listed(good.iter().map(|one| &one.version)) {
                None => String::new(),
                Some(listed) => format!("; there are {listed}"),
            };
            let message = format!("version {} was yanked by its publisher{others}", newest.version);
            return Err(Error::new(ErrorKind::Conflict, message).with_reason(reason::PACKAGE_YANKED));
        }
        Err(not_found(&name, good.iter().map(|one| &one.version)))
    }

    /// Shares one flight among all that want the same archive.
    fn flight(self: &Arc<Self>, chosen: &Chosen) -> Shared<Flight> {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(&chosen.checksum).and_then(WeakShared::upgrade)
            // One that failed is over; who comes later tries anew.
            && !matches!(flight.peek(), Some(Err(_)))
        {
            return flight;
        }
        flights.retain(|_, flight| flight.upgrade().is_some());
        let (inner, own) = (Arc::clone(self), chosen.clone());
        let flight = async move { inner.bring(&own).await }.boxed().shared();
        if let Some(weak) = flight.downgrade() {
            flights.insert(chosen.checksum.clone(), weak);
        }
        flight
    }

    /// The package, by the shortest way there is.
    async fn bring(&self, chosen: &Chosen) -> Result<Arc<Package>> {
        if let Some(package) = self.cache.unpacked(&chosen.checksum) {
            return Ok(package);
        }
        if let Some(held) = self.cache.hold(&chosen.checksum) {
            match self.open(held, chosen).await {
                Err(error) if error.reason() == Some(reason::PACKAGE_CHECKSUM) => {
                    tracing::warn!(%chosen, "the archive in the cache is damaged; fetching it again");
                }
                opened => return opened,
            }
        }
        let held = self.download(chosen).await?;
        self.open(held, chosen).await
    }

    /// Unpacks an archive of the cache, which must be what its name says; one that is no good is removed.
    async fn open(&self, held: Held, chosen: &Chosen) -> Result<Arc<Package>> {
        let opened = async {
            let unpacked = unpack(held.path(), Some(self.cache.work()), self.config.limits).await.map_err(|error| {
                let is_archives = error.kind() == ErrorKind::Invalid;
                if is_archives { error.with_reason(reason::PACKAGE_ARCHIVE) } else { error }
            })?;
            if unpacked.digest() != chosen.checksum {
                return Err(wrong_checksum());
            }
            let bytes = unpacked.bytes();
            let package = Package::of_unpacked(unpacked).await.map_err(|error| match error.kind() {
                // Not there is another thing than no such package.
                ErrorKind::NotFound => Error::invalid("package.toml", "is not at the top of the archive")
                    .with_reason(reason::PACKAGE_MANIFEST),
                ErrorKind::Invalid => error.with_reason(reason::PACKAGE_MANIFEST),
                _ => error,
            })?;
            Ok((Arc::new(package), bytes))
        };
        match opened.await {
            Ok((package, bytes)) => {
                self.cache.keep(&chosen.checksum, &package, bytes);
                Ok(package)
            }
            Err(error) => {
                let damaged = error.kind() == ErrorKind::Invalid && self.is_damaged(&held, &chosen.checksum).await;
                if error.retry() == Retry::Never {
                    self.cache.forget(held);
                }
                Err(if damaged { wrong_checksum() } else { error })
            }
        }
    }

    /// Whether an archive that cannot be unpacked is another than it was when it came.
    async fn is_damaged(&self, held: &Held, checksum: &str) -> bool {
        let (path, limits) = (held.path(), self.config.limits);
        let digest = blocking(move || super::archive::file_digest(&path, &limits)).await;
        digest.is_ok_and(|digest| digest != checksum)
    }

    async fn download(&self, chosen: &Chosen) -> Result<Held> {
        let mut part = Part::new(&self.cache).await?;
        let deadline = self.config.download_deadline;
        let received = async {
            // The semaphore is never closed.
            let _slot = self.downloads.acquire().await;
            self.receive(chosen, &mut part).await
        };
        let received = tokio::time::timeout(deadline, received).await;
        received.unwrap_or_else(|_| {
            let message = format!("only {} came in {}", part.so_far(), crate::error::seconds(deadline));
            Err(Error::timed_out(message).with_reason(reason::REGISTRY_UNAVAILABLE).with_retry(Retry::Safe))
        })?;
        part.store(&self.cache, &chosen.checksum).await
    }

    /// Receives the whole archive, over as many connections as it takes while they bring something.
    async fn receive(&self, chosen: &Chosen, part: &mut Part) -> Result<()> {
        let (mut failures, mut restarted) = (0, false);
        for connection in 1..=CONNECTIONS_MAX {
            let before = part.bytes;
            let resumed = before > 0;
            match self.receive_on(chosen, part).await {
                Ok(()) if part.checksum() == chosen.checksum => {
                    tracing::debug!(%chosen, bytes = part.bytes, connection, "downloaded");
                    return Ok(());
                }
                // Pieces of two connections may be of two archives; those of one are what the registry has.
                Ok(()) if resumed && !restarted => {
                    tracing::warn!(%chosen, "the pieces of a download do not fit; starting over");
                    restarted = true;
                    part.restart().await?;
                }
                Ok(()) => return Err(wrong_checksum()),
                Err(error) if error.retry() == Retry::Safe && error.reason() == Some(reason::REGISTRY_UNAVAILABLE) => {
                    failures = if part.bytes > before { 1 } else { failures + 1 };
                    if failures >= self.config.tries {
                        let note = format!("{failures} tries, {}", part.so_far());
                        return Err(error.with_note(note));
                    }
                    tracing::info!(%chosen, bytes = part.bytes, %error, "a download broke off; going on");
                    tokio::time::sleep(self.pause(failures)).await;
                }
                Err(error) => return Err(error),
            }
        }
        Err(wire::down(format!("the download broke off {CONNECTIONS_MAX} times; {}", part.so_far())))
    }

    /// Receives what one connection gives. `Ok` means that there is no more.
    async fn receive_on(&self, chosen: &Chosen, part: &mut Part) -> Result<()> {
        let mut response = self.api.download(&chosen.name, &chosen.spelling, part.bytes, part.etag.as_ref()).await?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT if range_start(&response) == Some(part.bytes) => {}
            // It is another archive now, or this registry resumes nothing.
            StatusCode::OK => part.restart().await?,
            StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::PARTIAL_CONTENT => {
                part.restart().await?;
                return Err(wire::down("the package registry does not resume a download"));
            }
            status => return Err(wire::from_status(status)),
        }
        part.etag = response.headers().get(header::ETAG).cloned();
        let limit_bytes = self.config.limits.archive_bytes.min(self.cache.limit_bytes());
        part.total = response.content_length().map(|left| part.bytes.saturating_add(left));
        if let Some(total) = part.total {
            within(total, limit_bytes)?;
            part.room.grow_to(total).await?;
        }
        let mut told = Instant::now();
        loop {
            let chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break,
                Err(error) => {
                    // What came is good; the next connection begins behind it.
                    part.flush().await?;
                    return Err(wire::from_transport(error));
                }
            };
            within(part.bytes + chunk.len() as u64, limit_bytes)?;
            part.add(&chunk).await?;
            if told.elapsed() >= Duration::from_secs(10) {
                told = Instant::now();
                tracing::info!(%chosen, bytes = part.bytes, total = part.total, "downloading");
            }
        }
        part.flush().await?;
        if part.total.is_some_and(|total| part.bytes < total) {
            return Err(wire::down("the connection to the package registry broke"));
        }
        Ok(())
    }

    async fn list(&self, kind: Option<PackageKind>) -> Result<Vec<PackageSummary>> {
        let mut packages = Vec::new();
        for page in 1.. {
            let found = self.retried(|| self.api.page(kind, page)).await?;
            // A registry may sort out other kinds after it has cut the pages: an empty one is not the last.
            let is_last = page >= found.total_pages;
            for package in found.packages {
                // Kinds to come are not ours to name.
                let Ok(own) = package.package_type.parse::<PackageKind>() else { continue };
                if kind.is_some_and(|kind| kind != own) || manifest::check_name(&package.name).is_err() {
                    continue;
                }
                packages.extend(versions(package.versions).into_iter().filter(|one| !one.yanked).map(|one| {
                    PackageSummary {
                        name: package.name.clone(),
                        version: one.version,
                        kind: own,
                        description: one.description,
                    }
                }));
            }
            if packages.len() > LIST_MAX || (page == PAGES_MAX && !is_last) {
                let message = format!("the package registry lists more than {LIST_MAX} versions or {PAGES_MAX} pages");
                return Err(Error::new(ErrorKind::Exhausted, message));
            }
            if is_last {
                break;
            }
        }
        super::in_order(&mut packages);
        Ok(packages)
    }

    /// Asks again while the registry is away, as often as the settings say.
    async fn retried<T, F: Future<Output = Result<T>>>(&self, ask: impl Fn() -> F) -> Result<T> {
        let mut failures = 0;
        loop {
            match ask().await {
                Err(error) if error.retry() == Retry::Safe => {
                    failures += 1;
                    if failures >= self.config.tries {
                        return Err(error.with_note(format!("{failures} tries")));
                    }
                    tokio::time::sleep(self.pause(failures)).await;
                }
                outcome => return outcome,
            }
        }
    }

    fn pause(&self, failures: u32) -> Duration {
        let doubled = 2_u32.saturating_pow(failures.saturating_sub(1));
        self.config.pause.saturating_mul(doubled).min(Duration::from_secs(5))
    }
}

fn wrong_checksum() -> Error {
    Error::new(ErrorKind::Conflict, "the archive is not what the registry's checksum says")
        .with_reason(reason::PACKAGE_CHECKSUM)
}

fn within(bytes: u64, limit_bytes: u64) -> Result<()> {
    if bytes <= limit_bytes {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Exhausted, format!("the archive is larger than {limit_bytes} bytes"))
        .with_reason(reason::PACKAGE_TOO_LARGE))
}

/// Where a partial answer begins.
fn range_start(response: &Response) -> Option<u64> {
    let range = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// A version of a list, read.
#[derive(Clone, Debug)]
struct Listed {
    version: Version,
    spelling: String,
    yanked: bool,
    checksum: String,
    description: String,
}

impl Listed {
    fn chosen(&self, name: String) -> Result<Chosen> {
        if !is_checksum(&self.checksum) {
            return Err(wire::down(format!(
                "the package registry gives {name} {} a checksum that is none",
                self.version
            ))
            .with_retry(Retry::Never));
        }
        Ok(Chosen {
            name,
            version: self.version.clone(),
            spelling: self.spelling.clone(),
            checksum: self.checksum.clone(),
        })
    }
}

/// Versions that are none cannot be asked for, so they are passed over.
fn versions(wire: Vec<WireVersion>) -> Vec<Listed> {
    let read = wire.into_iter().filter_map(|one| {
        Some(Listed {
            version: Version::parse(&one.version).ok()?,
            spelling: one.version,
            yanked: one.is_yanked,
            checksum: one.checksum.to_ascii_lowercase(),
            description: one.description.unwrap_or_default(),
        })
    });
    read.collect()
}

/// A download under way. Its file goes when this is dropped.
struct Part {
    file: Option<File>,
    path: TempPath,
    room: Reservation,
    limit_bytes: u64,
    /// What came, the buffer included.
    bytes: u64,
    digest: Sha256,
    buffer: Vec<u8>,
    total: Option<u64>,
    etag: Option<header::HeaderValue>,
}

impl Part {
    async fn new(cache: &Arc<Cache>) -> Result<Self> {
        let work = cache.work().to_owned();
        let (file, path) = blocking(move || Ok(cache::part(&work)?.into_parts())).await?;
        Ok(Self {
            file: Some(file),
            path,
            room: cache.reserve(),
            limit_bytes: cache.limit_bytes(),
            bytes: 0,
            digest: Sha256::new(),
            buffer: Vec::new(),
            total: None,
            etag: None,
        })
    }

    async fn add(&mut self, chunk: &[u8]) -> Result<()> {
        let bytes = self.bytes + chunk.len() as u64;
        if bytes > self.room.bytes() {
            // Where the size is known, there is room already; else it is asked for in steps.
            let step = bytes.div_ceil(ROOM_STEP_BYTES).saturating_mul(ROOM_STEP_BYTES);
            self.room.grow_to(step.min(self.limit_bytes).max(bytes)).await?;
        }
        self.digest.update(chunk);
        self.buffer.extend_from_slice(chunk);
        self.bytes = bytes;
        if self.buffer.len() >= WRITE_BYTES {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<()> {
        let buffer = std::mem::take(&mut self.buffer);
        if buffer.is_empty() {
            return Ok(());
        }
        self.with_file(move |file| file.write_all(&buffer)).await
    }

    async fn restart(&mut self) -> Result<()> {
        self.buffer.clear();
        (self.bytes, self.digest, self.total, self.etag) = (0, Sha256::new(), None, None);
        self.with_file(|file| {
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0)).map(drop)
        })
        .await
    }

    async fn with_file(&mut self, work: impl FnOnce(&mut File) -> std::io::Result<()> + Send + 'static) -> Result<()> {
        // Gone only when an earlier write failed, and then nobody goes on.
        let Some(mut file) = self.file.take() else { return Err(Error::internal("a download lost its file")) };
        let file = blocking(move || {
            work(&mut file).map_err(|error| disk_error("the package cache", error))?;
            Ok(file)
        })
        .await?;
        self.file = Some(file);
        Ok(())
    }

    fn checksum(&self) -> String {
        hex(&self.digest.clone().finalize())
    }

    fn so_far(&self) -> String {
        match self.total {
            Some(total) => format!("{} of {total} bytes", self.bytes),
            None => format!("{} bytes", self.bytes),
        }
    }

    async fn store(self, cache: &Arc<Cache>, checksum: &str) -> Result<Held> {
        drop(self.file);
        cache.store(checksum, self.path, self.room).await
    }
}
