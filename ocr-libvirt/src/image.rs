//! [`ImageBackend`] for libvirt: templates are volumes of the pool.
//!
//! A volume that somebody put into the pool is a template without tags. One that was taken in here has two volumes
//! beside it: `NAME.ocr`, a record with its tags, and, until its data is whole and verified, `NAME.part`. While that
//! is there the image is queued, and no machine can be made from it. A repeat after a kill begins anew.

use std::{
    fs::File,
    io::{Read, Write},
    path::Path,
};

use async_trait::async_trait;
use ocr_core::{
    Deletion, DiskFormat, Error, ErrorKind, Image, ImageBackend, ImageCapabilities, ImageFilter, ImageId, ImageSource,
    ImageSpec, ImageState, Name, Result, Tags, VmId,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use virt::{connect::Connect, storage_vol::StorageVol, stream::Stream};

use crate::{
    domain::{VolumeView, derived, machine_of_disk, volume_xml},
    door::Raw,
    error::NO_VOLUME,
    link::{Libvirt, if_there, pool_of, unless},
};

const RECORD: &str = ".ocr";
const PART: &str = ".part";
/// The most that a record may take; more is none of ours.
const MAX_RECORD_BYTES: u64 = 64 << 10;
/// How much is sent at once. libvirt's own messages end at 256 KiB.
const CHUNK_BYTES: usize = 256 << 10;

/// The id of the image that a volume is.
pub(crate) fn image_id(pool_id: &str, volume: &str) -> ImageId {
    ImageId::from_uuid(derived(&[pool_id, volume, "image"]))
}

/// What is kept beside an image that was taken in.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    spec: ImageSpec,
}

#[async_trait]
impl ImageBackend for Libvirt {
    fn capabilities(&self) -> ImageCapabilities {
        ImageCapabilities { import: true, capture: false, export: false }
    }

    async fn import_image(&self, spec: &ImageSpec) -> Result<Image> {
        let ImageSource::File(path) = &spec.source else {
            return Err(Error::unsupported("libvirt takes images from files of this machine").during("image.import"));
        };
        let volume = volume_name(&spec.tags, &spec.name, spec.format);
        let id = image_id(&self.inner.pool_id, &volume);
        if let Some(found) = self.find_one(|image| image.name == spec.name && owner_of(image) == Some(&spec.tags.owner)).await? {
            let same = self.record(&volume).await?.is_some_and(|record| record.spec == *spec);
            if !same {
                return Err(Error::new(ErrorKind::AlreadyExists, "the name is taken by another image")
                    .during("image.import")
                    .on(format!("image {}", spec.name)));
            }
            if found.state == ImageState::Active {
                return Ok(found);
            }
        }
        let source = Source::open(path, spec).await?;
        let record = serde_json::to_vec(&Record { spec: spec.clone() })
            .map_err(|error| Error::internal("a record cannot be written").with_source(error))?;
        let part = volume_xml(&format!("{volume}{PART}"), 0, "raw")?;
        let beside = volume_xml(&format!("{volume}{RECORD}"), record.len() as u64, "raw")?;
        let data = volume_xml(&volume, source.bytes, format_name(spec.format))?;
        let (pool, name, path) = (self.inner.config.pool.clone(), volume.clone(), path.clone());
        let wanted = spec.sha256.clone();
        let outcome = self
            .inner
            .door
            .call_within("image.import", self.inner.config.transfer_deadline, move |connect| {
                let pool = pool_of(connect, &pool)?;
                remove(&pool, &[&name, &format!("{name}{RECORD}")])?;
                unless(StorageVol::create_xml(&pool, &part, 0).map(drop), &[crate::error::VOLUME_EXISTS])?;
                upload(connect, &StorageVol::create_xml(&pool, &beside, 0)?, record.len() as u64, &mut record.as_slice())?;
                let target = StorageVol::create_xml(&pool, &data, 0)?;
                let mut read = Hashing::new(&path);
                upload(connect, &target, source.bytes, &mut read)?;
                let found = read.finish();
                if wanted.is_none_or(|wanted| wanted.eq_ignore_ascii_case(&found)) {
                    remove(&pool, &[&format!("{name}{PART}")])?;
                    // Sizes and formats are read anew from what is there now.
                    pool.refresh(0)?;
                    return Ok(Ok(()));
                }
                remove(&pool, &[&name, &format!("{name}{RECORD}"), &format!("{name}{PART}")])?;
                Ok(Err(found))
            })
            .await?;
        match outcome.map_err(|fault| fault.into_error().during("image.import"))? {
            Ok(()) => self.get_image(id).await,
            Err(found) => Err(Error::invalid("sha256", format_args!("the data's SHA-256 is {found}"))
                .during("image.import")
                .on(format!("image {}", spec.name))),
        }
    }

    async fn find_images(&self, filter: &ImageFilter) -> Result<Vec<Image>> {
        let volumes = self.volumes("image.find").await?;
        let mut images = Vec::new();
        for volume in volumes.iter().filter(|volume| is_data(&volume.name)) {
            let has = |suffix: &str| volumes.iter().any(|other| other.name == format!("{}{suffix}", volume.name));
            let record = if has(RECORD) { self.record(&volume.name).await? } else { None };
            let image = self.image(volume, record, has(PART))?;
            if filter.matches(&image) {
                images.push(image);
            }
        }
        Ok(images)
    }

    async fn get_image(&self, id: ImageId) -> Result<Image> {
        self.find_one(|image| image.id == id)
            .await?
            .ok_or_else(|| Error::not_found(format!("there is no template {id}")).during("image.get"))
    }

    async fn delete_image(&self, id: ImageId) -> Result<Deletion> {
        let volumes = self.volumes("image.delete").await?;
        let found = volumes
            .iter()
            .find(|volume| is_data(&volume.name) && image_id(&self.inner.pool_id, &volume.name) == id);
        let Some(volume) = found else { return Ok(Deletion::AlreadyGone) };
        let on = |error: Error| error.during("image.delete").on(format!("image {id}"));
        if self.record(&volume.name).await?.is_none() {
            return Err(on(Error::new(ErrorKind::Denied, "this template was not taken in here and is not touched")));
        }
        let users = volumes.iter().filter(|other| other.backing.as_ref() == Some(&volume.path)).count();
        if users > 0 {
            return Err(on(Error::new(
                ErrorKind::Conflict,
                format!("{users} machines have their disks over this template; delete them first"),
            )));
        }
        let (pool, name) = (self.inner.config.pool.clone(), volume.name.clone());
        self.inner
            .door
            .call("image.delete", move |connect| {
                // The data first: a record without data is nothing, data without a record would be a stranger's.
                remove(&pool_of(connect, &pool)?, &[&name, &format!("{name}{PART}"), &format!("{name}{RECORD}")])
            })
            .await
            .map_err(on)?;
        Ok(Deletion::Deleted)
    }

    async fn capture_vm(&self, _vm: VmId, _name: &Name, _tags: &Tags) -> Result<Image> {
        Err(Error::unsupported("capturing is not in this version yet").during("image.capture"))
    }

    async fn export_image(&self, _id: ImageId, _to: &Path) -> Result<u64> {
        Err(Error::unsupported("exporting is not in this version yet").during("image.export"))
    }
}

impl Libvirt {
    /// The first image that fits; files that were put into the pool behind libvirt's back are found too.
    async fn find_one(&self, fits: impl Fn(&Image) -> bool) -> Result<Option<Image>> {
        let find = |images: Vec<Image>| images.into_iter().find(|image| fits(image));
        if let Some(found) = find(self.find_images(&ImageFilter::default()).await?) {
            return Ok(Some(found));
        }
        self.refresh().await;
        Ok(find(self.find_images(&ImageFilter::default()).await?))
    }

    /// Has libvirt look at the pool's folder again. It refuses while it makes a volume, and that is no harm.
    async fn refresh(&self) {
        let pool = self.inner.config.pool.clone();
        let refreshed = self.inner.door.call("image.refresh", move |connect| pool_of(connect, &pool)?.refresh(0).map(drop));
        if let Err(error) = refreshed.await {
            tracing::debug!(%error, "the pool was not refreshed");
        }
    }

    fn image(&self, volume: &VolumeView, record: Option<Record>, partial: bool) -> Result<Image> {
        let id = image_id(&self.inner.pool_id, &volume.name);
        let format = if volume.format == "qcow2" { DiskFormat::Qcow2 } else { DiskFormat::Raw };
        let stem = Path::new(&volume.name).file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let name = match &record {
            Some(record) => record.spec.name.clone(),
            None => Name::new(stem).or_else(|_| Name::new(id.to_string()))?,
        };
        Ok(Image {
            id,
            name,
            state: if partial { ImageState::Queued } else { ImageState::Active },
            format,
            size_bytes: Some(volume.allocation_bytes),
            os_family: record.as_ref().map(|record| record.spec.os_family),
            users: record.as_ref().map(|record| record.spec.users.clone()).unwrap_or_default(),
            tags: record.map(|record| record.spec.tags),
        })
    }

    /// The record beside a volume; `None` where there is none that can be read.
    async fn record(&self, volume: &str) -> Result<Option<Record>> {
        let (pool, name) = (self.inner.config.pool.clone(), format!("{volume}{RECORD}"));
        let bytes = self
            .inner
            .door
            .call("image.find", move |connect| {
                let Some(volume) = if_there(pool_of(connect, &pool)?.lookup_storage_vol_by_name(&name), NO_VOLUME)? else {
                    return Ok(None);
                };
                let length = volume.info()?.capacity.min(MAX_RECORD_BYTES);
                if_there(download(connect, &volume, length), NO_VOLUME)
            })
            .await?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }
}

fn owner_of(image: &Image) -> Option<&ocr_core::Owner> {
    image.tags.as_ref().map(|tags| &tags.owner)
}

/// Whether a volume holds an image's data: it is no machine's disk and nothing of ours beside one.
fn is_data(volume: &str) -> bool {
    machine_of_disk(volume).is_none() && !volume.ends_with(RECORD) && !volume.ends_with(PART)
}

/// Unique per owner and name, and safe as a file's name.
fn volume_name(tags: &Tags, name: &Name, format: DiskFormat) -> String {
    let unique = derived(&[tags.owner.as_str(), name.as_str(), "volume"]).simple().to_string();
    format!("ocr-image-{unique}.{}", format_name(format))
}

fn format_name(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Qcow2 => "qcow2",
        DiskFormat::Raw => "raw",
    }
}

/// A file that is to be taken in.
struct Source {
    bytes: u64,
}

impl Source {
    /// Looks at the file before anything is made of it.
    async fn open(path: &Path, spec: &ImageSpec) -> Result<Self> {
        let (path, format) = (path.to_owned(), spec.format);
        let look = move || {
            let shown = path.display().to_string();
            let mut file = File::open(&path).map_err(|error| {
                let missing = error.kind() == std::io::ErrorKind::NotFound;
                let kind = if missing { ErrorKind::NotFound } else { ErrorKind::Invalid };
                Error::new(kind, format!("source: the file {shown} cannot be read")).with_source(error)
            })?;
            let unreadable = |error| Error::invalid("source", format_args!("{shown} cannot be read")).with_source(error);
            let metadata = file.metadata().map_err(unreadable)?;
            if !metadata.is_file() || metadata.len() == 0 {
                return Err(Error::invalid("source", format_args!("{shown} is no file, or empty")));
            }
            let mut header = [0; 112];
            let read = file.read(&mut header).map_err(unreadable)?;
            if format == DiskFormat::Qcow2 {
                check_qcow2(&header[..read])?;
            }
            Ok(Self { bytes: metadata.len() })
        };
        let looked = tokio::task::spawn_blocking(look).await;
        looked
            .unwrap_or_else(|error| Err(Error::internal("a file could not be looked at").with_source(error)))
            .map_err(|error| error.during("image.import"))
    }
}

/// Refuses what would have QEMU read other files than this one.
fn check_qcow2(header: &[u8]) -> Result<()> {
    let wrong = |what: &str| Err(Error::invalid("source", what));
    let u32_at = |at: usize| header.get(at..at + 4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
    let u64_at = |at: usize| Some((u64::from(u32_at(at)?) << 32) | u64::from(u32_at(at + 4)?));
    if header.get(..4) != Some(b"QFI\xfb") {
        return wrong("is not a qcow2 image");
    }
    let Some(version @ (2 | 3)) = u32_at(4) else { return wrong("is a qcow2 image of an unknown version") };
    if u64_at(8) != Some(0) {
        return wrong("is a qcow2 image with a backing file; flatten it first");
    }
    // Bit 2 of the incompatible features: the data is in another file.
    if version == 3 && u64_at(72).is_none_or(|features| features & 4 != 0) {
        return wrong("is a qcow2 image with an external data file; flatten it first");
    }
    Ok(())
}

/// A file that is hashed as it is read.
struct Hashing {
    file: std::io::Result<File>,
    digest: Sha256,
}

impl Hashing {
    fn new(path: &Path) -> Self {
        Self { file: File::open(path), digest: Sha256::new() }
    }

    fn finish(self) -> String {
        self.digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl Read for Hashing {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let file = match &mut self.file {
            Ok(file) => file,
            Err(error) => return Err(std::io::Error::new(error.kind(), error.to_string())),
        };
        let read = file.read(buffer)?;
        self.digest.update(&buffer[..read]);
        Ok(read)
    }
}

fn remove(pool: &virt::storage_pool::StoragePool, names: &[&str]) -> Raw<()> {
    for name in names {
        if let Some(volume) = if_there(pool.lookup_storage_vol_by_name(name), NO_VOLUME)? {
            unless(volume.delete(0).map(drop), &[NO_VOLUME])?;
        }
    }
    Ok(())
}

/// Sends exactly `length` bytes; a source that ends early or fails fails the call.
fn upload(connect: &Connect, volume: &StorageVol, length: u64, source: &mut dyn Read) -> Raw<()> {
    let stream = Stream::new(connect, 0)?;
    volume.upload(&stream, 0, length, 0)?;
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut left = length;
    while left > 0 {
        let most = usize::try_from(left).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
        let read = match source.read(&mut buffer[..most]) {
            Ok(read) if read > 0 => read,
            _ => {
                stream.abort()?;
                return Err(virt::error::Error::last_error());
            }
        };
        let mut sent = 0;
        while sent < read {
            sent += usize::try_from(stream.send(&buffer[sent..read])?).unwrap_or(0);
        }
        left -= read as u64;
    }
    stream.finish()
}

fn download(connect: &Connect, volume: &StorageVol, length: u64) -> Raw<Vec<u8>> {
    let stream = Stream::new(connect, 0)?;
    volume.download(&stream, 0, length, 0)?;
    let mut bytes = Vec::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let read = usize::try_from(stream.recv(&mut buffer)?).unwrap_or(0);
        if read == 0 {
            break;
        }
        // Writing to memory cannot fail.
        let _ = bytes.write_all(&buffer[..read]);
    }
    stream.finish()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(version: u32, backing: u64, features: u64) -> Vec<u8> {
        let mut header = vec![0; 112];
        header[..4].copy_from_slice(b"QFI\xfb");
        header[4..8].copy_from_slice(&version.to_be_bytes());
        header[8..16].copy_from_slice(&backing.to_be_bytes());
        header[72..80].copy_from_slice(&features.to_be_bytes());
        header
    }

    #[test]
    fn an_image_that_reads_other_files_is_refused() {
        assert!(check_qcow2(&header(3, 0, 0)).is_ok());
        assert!(check_qcow2(&header(2, 0, 0)).is_ok());
        assert!(check_qcow2(&header(3, 104, 0)).is_err());
        assert!(check_qcow2(&header(3, 0, 4)).is_err());
        assert!(check_qcow2(&header(4, 0, 0)).is_err());
        assert!(check_qcow2(b"\x7fELF").is_err());
        assert!(check_qcow2(b"").is_err());
        assert!(check_qcow2(&header(3, 0, 0)[..40]).is_err());
    }
}
