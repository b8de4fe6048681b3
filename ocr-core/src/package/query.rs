//! [`Queries`]: what a range's front end asks of packages.
//!
//! Packages by kind, the scenario of an exercise, whether a package exists, and events and banners as HTML. A page of
//! HTML is made by one call and read by another, maybe of another process: it is kept in the [`StateStore`] in between,
//! in pieces, for a time, within a bound.
//!
//! ```text
//! document/ID         what it is: name, size, checksum, whether all of it is there
//! document-part/ID/N  a piece of it
//! ```
//!
//! Ranger never deletes what it made, so every record has a time to live.

use std::{fmt, path::Path, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use semver::Version;
use serde::{Deserialize, Serialize};
use sha3::{Digest, Sha3_256};

use super::{
    Content, ContentFile, Package, PackageKind, PackageSource, PackageSummary, blocking, disk_error, hex, read_at_most,
    resolve,
};
use crate::{
    Deletion, DocumentId, Error, ErrorKind, Key, Precondition, Result, Retry, StateStore, StateStoreExt, error::reason,
    id::shown, state::MAX_VALUE_BYTES,
};

mod html;

/// The longest scenario, in bytes: 3 MiB. It is one message.
pub const MAX_SCENARIO_BYTES: u64 = 3 << 20;
/// The longest Markdown, in bytes: 1 MiB.
pub const MAX_MARKDOWN_BYTES: u64 = 1 << 20;
/// A piece in the store, in bytes. Smaller than it might be, for stores that are reached over a network.
const PART_BYTES: usize = MAX_VALUE_BYTES / 4;

/// What queries may cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// How long a page may be read after it was made. Default 1 h.
    pub ttl: Duration,
    /// The largest page, its images included, in bytes. Default 16 MiB.
    pub page_bytes: usize,
    /// What all pages in the store may take, in bytes. Default 256 MiB.
    pub store_bytes: u64,
    /// How long a package may take to be fetched, and a list to be made. Default 5 min.
    pub deadline: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(3600),
            page_bytes: 16 << 20,
            store_bytes: 256 << 20,
            deadline: Duration::from_secs(300),
        }
    }
}

/// Answers questions about packages. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Queries {
    packages: Arc<dyn PackageSource>,
    store: Arc<dyn StateStore>,
    config: Config,
}

/// A page that can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Names it.
    pub id: DocumentId,
    /// Lower hex SHA3-256 of the page.
    pub checksum: String,
    /// The Markdown file's name, ending in `.html`.
    pub file_name: String,
    /// How long the page is.
    pub bytes: u64,
}

/// A page, piece by piece.
pub type Pages = Pin<Box<dyn Stream<Item = Result<Bytes>> + Send>>;

/// What the store has of a page.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    checksum: String,
    file_name: String,
    bytes: u64,
    parts: u32,
    /// Whether all parts are there.
    whole: bool,
}

impl Queries {
    /// Answers from these packages, and keeps pages in this store.
    pub fn new(packages: Arc<dyn PackageSource>, store: Arc<dyn StateStore>, config: Config) -> Self {
        Self { packages, store, config }
    }

    /// All packages, or those of one kind: by name, the newest version first.
    ///
    /// # Errors
    /// Those of [`PackageSource::list`]; `TimedOut`.
    pub async fn packages(&self, kind: Option<PackageKind>) -> Result<Vec<PackageSummary>> {
        self.in_time("package.list", self.packages.list(kind)).await
    }

    /// The version that would be taken.
    ///
    /// # Errors
    /// Those of [`PackageSource::resolve`]; `TimedOut`.
    pub async fn check(&self, name: &str, requirement: &str) -> Result<Version> {
        self.in_time("package.resolve", self.packages.resolve(name, requirement)).await
    }

    /// The text of an exercise's scenario (SDL).
    ///
    /// # Errors
    /// Those of [`PackageSource::fetch`]; `Invalid` with reason `PACKAGE_TYPE` for a package of another kind; `TimedOut`.
    pub async fn scenario(&self, name: &str, requirement: &str) -> Result<String> {
        let package = self.fetch(name, requirement).await?;
        let scenario = async {
            let Content::Exercise(file) = package.content() else {
                return Err(wrong_kind(&package, "exercise"));
            };
            read_text(&package, file, MAX_SCENARIO_BYTES).await
        };
        scenario.await.map_err(|error| error.during("package.scenario").on(package.to_string()))
    }

    /// Makes the page of an event or a banner, which can be read until its time has run out.
    ///
    /// # Errors
    /// Those of [`PackageSource::fetch`]; `Invalid` with reason `PACKAGE_TYPE` for a package of another kind, or naming
    /// the image that is not in the package; `Exhausted` when the page is too large, or too many are kept; `TimedOut`.
    pub async fn create(&self, name: &str, requirement: &str) -> Result<Document> {
        let package = self.fetch(name, requirement).await?;
        let made = async {
            let (Content::Event(file) | Content::Banner(file)) = package.content() else {
                return Err(wrong_kind(&package, "event or banner"));
            };
            let markdown = read_text(&package, file, MAX_MARKDOWN_BYTES).await?;
            let page = self.page(&package, file, markdown).await?;
            self.keep(&file.file_path, page.into()).await
        };
        made.await.map_err(|error| error.during("package.page").on(package.to_string()))
    }

    /// Reads a page, piece by piece.
    ///
    /// # Errors
    /// `NotFound` when there is none, or its time has run out; those of the store.
    pub async fn read(&self, id: DocumentId) -> Result<Pages> {
        let gone = move || Error::not_found("the page is gone").during("package.read_page").on(format!("page {id}"));
        let found = self.store.get_json::<Record>(&head_key(id)?).await?;
        let Some((record, _)) = found.filter(|(record, _)| record.whole) else { return Err(gone()) };
        let store = Arc::clone(&self.store);
        let parts = stream::iter(0..record.parts).then(move |part| {
            let store = Arc::clone(&store);
            async move {
                let part = store.get(&part_key(id, part)?).await?;
                part.map(|part| part.value).ok_or_else(gone)
            }
        });
        Ok(Box::pin(parts))
    }

    /// Removes a page.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn delete(&self, id: DocumentId) -> Result<Deletion> {
        let key = head_key(id)?;
        let Some((record, _)) = self.store.get_json::<Record>(&key).await? else {
            return Ok(Deletion::AlreadyGone);
        };
        // The head last: as long as it is there, somebody can delete the rest.
        for part in 0..record.parts {
            self.store.delete(&part_key(id, part)?, Precondition::Any).await?;
        }
        self.store.delete(&key, Precondition::Any).await
    }

    async fn fetch(&self, name: &str, requirement: &str) -> Result<Arc<Package>> {
        self.in_time("package.fetch", self.packages.fetch(name, requirement)).await
    }

    async fn in_time<T>(&self, what: &'static str, work: impl Future<Output = Result<T>>) -> Result<T> {
        let deadline = self.config.deadline;
        tokio::time::timeout(deadline, work).await.unwrap_or_else(|_| {
            let message = format!("no answer about packages in {}", crate::error::seconds(deadline));
            Err(Error::timed_out(message).with_retry(Retry::Safe).during(what))
        })
    }

    async fn page(&self, package: &Arc<Package>, file: &ContentFile, markdown: String) -> Result<String> {
        let (package, path, limit_bytes) = (Arc::clone(package), file.file_path.clone(), self.config.page_bytes);
        blocking(move || {
            let read = move |path: &Path| {
                let text = path.to_string_lossy();
                let field = format!("package file {}", shown(&text));
                let resolved = resolve(package.root(), path, "image")
                    .map_err(|error| error.with_reason(reason::PACKAGE_MANIFEST))?;
                let file = std::fs::File::open(resolved).map_err(|error| disk_error(&field, error))?;
                read_at_most(file, limit_bytes as u64, &field)
            };
            html::render(&markdown, &path, limit_bytes, Arc::new(read))
        })
        .await
    }

    async fn keep(&self, file: &Path, page: Bytes) -> Result<Document> {
        let file_name = file.with_extension("html");
        let id = DocumentId::random();
        let document = Document {
            id,
            checksum: hex(&Sha3_256::digest(&page)),
            file_name: file_name.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            bytes: page.len() as u64,
        };
        let kept = self.write(&document, page).await;
        if kept.is_err()
            && let Err(error) = self.delete(id).await
        {
            tracing::warn!(page = %id, %error, "a page that was not kept stays until its time has run out");
        }
        kept.map(|()| document)
    }

    async fn write(&self, document: &Document, page: Bytes) -> Result<()> {
        let parts: Vec<Bytes> = (0..page.len())
            .step_by(PART_BYTES)
            .map(|from| page.slice(from..page.len().min(from + PART_BYTES)))
            .collect();
        let mut record = Record {
            checksum: document.checksum.clone(),
            file_name: document.file_name.clone(),
            bytes: document.bytes,
            parts: u32::try_from(parts.len()).unwrap_or(u32::MAX),
            whole: false,
        };
        // First, so that it counts before it takes room, and is found by who deletes.
        self.write_head(document.id, &record).await?;
        self.check_room().await?;
        for (number, part) in (0..).zip(parts) {
            self.store.put(&part_key(document.id, number)?, part, Precondition::Any, Some(self.config.ttl)).await?;
        }
        record.whole = true;
        self.write_head(document.id, &record).await
    }

    async fn write_head(&self, id: DocumentId, record: &Record) -> Result<()> {
        let value = serde_json::to_vec(record)
            .map_err(|error| Error::internal("a record cannot be written as JSON").with_source(error))?;
        self.store.put(&head_key(id)?, value.into(), Precondition::Any, Some(self.config.ttl)).await.map(drop)
    }

    /// Whether all pages together, this one included, are within their bound.
    async fn check_room(&self) -> Result<()> {
        let kept = self.store.list_json::<Record>("document/").await?;
        let bytes: u64 = kept.iter().map(|(_, record, _)| record.bytes).sum();
        if bytes <= self.config.store_bytes {
            return Ok(());
        }
        let message = format!(
            "pages that were made and not deleted take more than {} bytes; each is kept for {}",
            self.config.store_bytes,
            crate::error::seconds(self.config.ttl)
        );
        Err(Error::new(ErrorKind::Exhausted, message).with_retry(Retry::Safe))
    }
}

fn head_key(id: DocumentId) -> Result<Key> {
    Key::of("document", &[&id.to_string()])
}

fn part_key(id: DocumentId, part: u32) -> Result<Key> {
    Key::of("document-part", &[&id.to_string(), &format!("{part:05}")])
}

fn wrong_kind(package: &Package, wanted: impl fmt::Display) -> Error {
    let text = format_args!("wants a package of type {wanted}; {package} is of type {}", package.kind());
    Error::invalid("source", text).with_reason(reason::PACKAGE_TYPE)
}

async fn read_text(package: &Package, file: &ContentFile, limit_bytes: u64) -> Result<String> {
    let bytes = package.file_bytes(file).await?;
    let name = file.file_path.display();
    if bytes.len() as u64 > limit_bytes {
        return Err(Error::new(ErrorKind::Exhausted, format!("{name} is larger than {limit_bytes} bytes"))
            .with_reason(reason::PACKAGE_TOO_LARGE));
    }
    String::from_utf8(bytes.into()).map_err(|_| {
        Error::new(ErrorKind::Invalid, format!("{name} is not UTF-8")).with_reason(reason::PACKAGE_MANIFEST)
    })
}

/// A page whole, for those that have room for it.
///
/// # Errors
/// The first of its pieces.
pub async fn whole(pages: Pages) -> Result<Vec<u8>> {
    pages
        .try_fold(Vec::new(), |mut whole, part| async move {
            whole.extend_from_slice(&part);
            Ok(whole)
        })
        .await
}

#[cfg(test)]
mod tests;
