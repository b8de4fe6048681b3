//! [`ImageBackend`]: the images that machines are made from.

use std::{fmt, path::PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{Deletion, Error, ImageId, Name, Owner, Result, Tags, VmId};

/// Keeps images (Ranger's word: templates).
///
/// Images that somebody else put there are seen, with no `tags`. Each MUST is checked by the conformance
/// case named beside it.
#[async_trait]
pub trait ImageBackend: fmt::Debug + Send + Sync + 'static {
    /// What this backend can do. It never changes while the backend lives.
    fn capabilities(&self) -> ImageCapabilities;

    /// Takes an image in. It is [`ImageState::Active`] only after its checksum was verified, where one is given.
    ///
    /// # Behavior
    /// - Name, tags, format, guest family and users MUST come back as given [case: image_import_visible].
    /// - A repeat of the same spec MUST return the same image [case: image_import_repeat].
    /// - The same request with another spec MUST fail with `AlreadyExists` and change nothing
    ///   [case: image_import_request_reused].
    /// - The same owner and name under another request MUST fail with `AlreadyExists` and leave nothing
    ///   [case: image_import_name_taken].
    /// - A wrong checksum MUST fail with `Invalid` and leave nothing [case: image_import_checksum].
    /// - A source that is not there MUST fail with `NotFound` and leave nothing [case: image_import_missing].
    /// - Without the capability `import` it MUST fail with `Unsupported` [case: image_import_unsupported].
    async fn import_image(&self, spec: &ImageSpec) -> Result<Image>;

    /// Lists the images that match every part of the filter, in no particular order.
    ///
    /// # Behavior
    /// - Owner and name MUST each narrow the list; nothing that matches MUST be an empty list [case: image_find_filter].
    async fn find_images(&self, filter: &ImageFilter) -> Result<Vec<Image>>;

    /// Reads one image.
    ///
    /// # Behavior
    /// - An image that does not exist MUST give `NotFound` [case: image_get_missing].
    async fn get_image(&self, id: ImageId) -> Result<Image>;

    /// Deletes an image. Machines made from it keep running.
    ///
    /// # Behavior
    /// - It MUST be gone afterwards; deleting what is gone MUST be `Ok(AlreadyGone)` [case: image_delete_gone].
    /// - A backend whose machines need the image for their disks refuses with `Conflict` while there are such.
    async fn delete_image(&self, id: ImageId) -> Result<Deletion>;

    /// Makes an image of a machine's disk.
    ///
    /// # Behavior
    /// - The image MUST have the name and tags asked for, and be seen by `get_image` and `find_images` on return
    ///   [case: image_capture_visible]. It is visible only when it is complete.
    /// - A machine that does not exist MUST give `NotFound` and leave nothing [case: image_capture_missing].
    /// - Without the capability `capture` it MUST fail with `Unsupported`, whatever the machine
    ///   [case: image_capture_unsupported].
    async fn capture_vm(&self, vm: VmId, name: &Name, tags: &Tags) -> Result<Image>;

    /// Writes an image's data to a file on this machine; returns its size in bytes.
    ///
    /// # Behavior
    /// - An image that was taken in MUST come out byte for byte, and its size as returned [case: image_export_roundtrip].
    ///   The file appears complete or not at all.
    /// - An image that does not exist MUST give `NotFound` and leave no file [case: image_export_missing].
    /// - Without the capability `export` it MUST fail with `Unsupported`, whatever the image
    ///   [case: image_export_unsupported].
    async fn export_image(&self, id: ImageId, to: &std::path::Path) -> Result<u64>;
}

/// Comfort over any [`ImageBackend`]; no backend implements it.
#[async_trait]
pub trait ImageBackendExt: ImageBackend {
    /// The image that a user means by an id or a name.
    ///
    /// # Errors
    /// `NotFound` naming what was asked for; `Invalid` when several images have the name.
    async fn resolve_image(&self, reference: &str) -> Result<Image> {
        if let Ok(id) = reference.parse::<ImageId>() {
            return self.get_image(id).await.map_err(|error| match error.kind() {
                crate::ErrorKind::NotFound => Error::not_found(format!("templateId: there is no template {id}")),
                _ => error,
            });
        }
        let name = Name::new(reference).map_err(|error| {
            Error::invalid("templateId", format_args!("wants a template's id or name; {}", error.message()))
        })?;
        let filter = ImageFilter { name: Some(name), ..ImageFilter::default() };
        let mut found = self.find_images(&filter).await?;
        match found.len() {
            1 => Ok(found.remove(0)),
            0 => Err(Error::not_found(format!(
                "templateId: no template has the id or name {}",
                crate::id::shown(reference)
            ))
            .during("image.resolve")),
            n => Err(Error::invalid(
                "templateId",
                format_args!("{n} templates are named {}; use the id", crate::id::shown(reference)),
            )),
        }
    }
}

impl<T: ImageBackend + ?Sized> ImageBackendExt for T {}

/// What an [`ImageBackend`] can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageCapabilities {
    /// Whether it can take images in.
    pub import: bool,
    /// Whether it can [`ImageBackend::capture_vm`].
    pub capture: bool,
    /// Whether it can [`ImageBackend::export_image`].
    pub export: bool,
}

/// What to take in.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ImageSpec {
    /// Kept on the image.
    pub tags: Tags,
    /// Unique per owner.
    pub name: Name,
    /// Where the data is.
    pub source: ImageSource,
    /// How the data is laid out. It is never guessed: a guest could have written what a guess would find.
    pub format: DiskFormat,
    /// Lower-case hex SHA-256 of the data.
    pub sha256: Option<String>,
    /// The guest's family.
    pub os_family: OsFamily,
    /// Accounts that exist in the guest. Their secrets are not kept here.
    pub users: Vec<String>,
}

/// Where an image's data comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ImageSource {
    /// A file on this machine.
    File(PathBuf),
    /// An address that the backend itself fetches, where it can.
    Url(String),
}

/// How a disk's data is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// QEMU's own, version 2 or 3.
    Qcow2,
    /// Sector for sector.
    Raw,
}

/// The family of a guest's operating system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OsFamily {
    /// Linux and its like: a POSIX shell, `/` in paths.
    Linux,
    /// Windows: `cmd.exe`, drive letters.
    Windows,
}

/// An image as the backend sees it now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The backend's own id.
    pub id: ImageId,
    /// Its name.
    pub name: Name,
    /// What we keep on it; `None` when this software did not make it.
    pub tags: Option<Tags>,
    /// Whether it can be used.
    pub state: ImageState,
    /// How its data is laid out.
    pub format: DiskFormat,
    /// What its data takes up, in bytes, where known.
    pub size_bytes: Option<u64>,
    /// The guest's family, where known.
    pub os_family: Option<OsFamily>,
    /// Accounts that exist in the guest.
    pub users: Vec<String>,
}

/// Whether an image can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageState {
    /// Its data is on the way.
    Queued,
    /// Ready.
    Active,
    /// It will never be ready; the backend's own words say why.
    Failed(String),
}

/// Which images to list; an empty filter lists all, also those that are not ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageFilter {
    /// Only images with this owner tag.
    pub owner: Option<Owner>,
    /// Only images of exactly this name.
    pub name: Option<Name>,
}

impl ImageFilter {
    /// Whether an image matches; for backends that filter by themselves.
    pub fn matches(&self, image: &Image) -> bool {
        self.owner.as_ref().is_none_or(|owner| image.tags.as_ref().is_some_and(|tags| tags.owner == *owner))
            && self.name.as_ref().is_none_or(|name| image.name == *name)
    }
}
