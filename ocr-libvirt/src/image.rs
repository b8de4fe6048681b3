//! Images: [`ImageBackend`] over the volumes of the pool.
//!
//! Every volume that is a disk and none of ours is a template that somebody put there. An image that we take in is two
//! volumes: its data, and a record that says what we know of it. The record is written last, when the data's checksum
//! is known to be right, and it alone makes the image visible; its name follows from owner and name, so libvirt
//! refuses the second one.

use std::{
    fs::File,
    io::{ErrorKind as IoKind, Read, Seek},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use ocr_core::{
    Deletion, DiskFormat, Error, ErrorKind, Image, ImageBackend, ImageCapabilities, ImageFilter, ImageId, ImageSource,
    ImageSpec, ImageState, Name, OsFamily, Owner, Result, Tags, VmId,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;
use virt::{connect::Connect, storage_pool::StoragePool, storage_vol::StorageVol, stream::Stream};

use crate::{
    backend::{Inner, Libvirt, delete_volume, found, patiently, pool},
    door::{Call, Effect, Lane, Trouble},
    error::{Failure, Meaning},
    qcow2,
    xml::volume::{self, Role, Seen, Volume},
};

const CAPABILITIES: ImageCapabilities = ImageCapabilities { import: true, capture: false, export: false };

/// How long taking an image in may take.
const IMPORT_DEADLINE: Duration = Duration::from_secs(3600);
/// How much is sent at once.
const CHUNK_BYTES: usize = 256 << 10;
/// A record larger than this is none.
const MAX_RECORD_BYTES: usize = 64 << 10;
/// Data without a record is left alone for so long: somebody may be about to write the record.
const UNFINISHED: Duration = Duration::from_secs(24 * 3600);

/// What we keep about an image of ours.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    tags: Tags,
    name: Name,
    data: String,
    format: DiskFormat,
    sha256: String,
    os_family: OsFamily,
    users: Vec<String>,
}

#[async_trait]
impl ImageBackend for Libvirt {
    fn capabilities(&self) -> ImageCapabilities {
        CAPABILITIES
    }

    async fn import_image(&self, spec: &ImageSpec) -> Result<Image> {
        let resource = format!("image {}", spec.name);
        let ImageSource::File(path) = &spec.source else {
            return Err(Error::unsupported("this backend takes images from files only")
                .during("image.import_image")
                .on(resource));
        };
        let import = Import { spec: spec.clone(), path: path.clone(), this: self.clone() };
        let call =
            Call { operation: "image.import_image", lane: Lane::Bulk, effect: Effect::Some, deadline: IMPORT_DEADLINE };
        let imported = self.inner.door.call(call, move |connect| import.run(connect)).await;
        imported.map_err(|trouble| trouble.into_error().during("image.import_image").on(resource))
    }

    async fn find_images(&self, filter: &ImageFilter) -> Result<Vec<Image>> {
        let (filter, inner) = (filter.clone(), self.inner.clone());
        let find = move |connect: &Connect| {
            let pool = pool(connect, &inner.config.pool)?;
            // Files that somebody put into the folder are seen after a refresh only.
            if filter.name.is_none() {
                refresh(&pool);
                return images(connect, &pool, inner.pool, &filter);
            }
            let found = images(connect, &pool, inner.pool, &filter)?;
            if !found.is_empty() {
                return Ok(found);
            }
            refresh(&pool);
            images(connect, &pool, inner.pool, &filter)
        };
        self.inner.control("image.find_images", Effect::None, find).await
    }

    async fn get_image(&self, id: ImageId) -> Result<Image> {
        let inner = self.inner.clone();
        let get = move |connect: &Connect| {
            let pool = pool(connect, &inner.config.pool)?;
            let Some(volume) = volume_of(&pool, inner.pool, id)? else { return Ok(None) };
            image_of(connect, &pool, inner.pool, &volume)
        };
        let image = self.inner.control("image.get_image", Effect::None, get).await;
        let image = image.map_err(|error| error.on(format!("image {id}")))?;
        image.ok_or_else(|| no_image(id).during("image.get_image"))
    }

    async fn delete_image(&self, id: ImageId) -> Result<Deletion> {
        let inner = self.inner.clone();
        let delete = move |connect: &Connect| {
            let pool = pool(connect, &inner.config.pool)?;
            let Some(data) = volume_of(&pool, inner.pool, id)? else { return Ok(Deletion::AlreadyGone) };
            let Role::ImageData { record } = Role::of(&data.name()?) else {
                let why = "this software did not take the image in, so it does not delete it";
                return Err(Error::new(ErrorKind::Denied, why).into());
            };
            let path = data.path()?;
            for volume in pool.list_all_volumes(0)? {
                let Role::Disk { vm, .. } = Role::of(&volume.name()?) else { continue };
                let Some(xml) = found(volume.xml_desc(0))? else { continue };
                if Seen::parse(&xml)?.backing.as_deref() == Some(path.as_str()) {
                    let why = format!("the disk of machine {vm} is laid over the image");
                    return Err(Error::new(ErrorKind::Conflict, why).into());
                }
            }
            // Without its record the image is gone; data that a crash leaves here is swept.
            if let Some(record) = found(pool.lookup_storage_vol_by_name(&record))? {
                delete_volume(&record)?;
            }
            delete_volume(&data)?;
            Ok(Deletion::Deleted)
        };
        let deleted = self.inner.control("image.delete_image", Effect::Some, delete).await;
        deleted.map_err(|error| error.on(format!("image {id}")))
    }

    async fn capture_vm(&self, _vm: VmId, _name: &Name, _tags: &Tags) -> Result<Image> {
        Err(Error::unsupported("this backend cannot capture a machine's disk").during("image.capture_vm"))
    }

    async fn export_image(&self, _id: ImageId, _to: &Path) -> Result<u64> {
        Err(Error::unsupported("this backend cannot export an image").during("image.export_image"))
    }
}

impl Libvirt {
    /// Deletes data of this owner's images that no record speaks of, a day after it was written last: what an
    /// import or a deletion that was cut off leaves. Returns the names of the deleted volumes.
    ///
    /// # Errors
    /// Those of any call to libvirt.
    pub async fn sweep_images(&self, owner: &Owner) -> Result<Vec<String>> {
        let (pool_name, owner) = (self.inner.config.pool.clone(), owner.clone());
        let sweep = move |connect: &Connect| {
            let pool = pool(connect, &pool_name)?;
            let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let mut deleted = Vec::new();
            for volume in pool.list_all_volumes(0)? {
                let name = volume.name()?;
                let Role::ImageData { record } = Role::of(&name) else { continue };
                if !volume::is_image_of(&record, &owner)
                    || read_record(connect, &pool, &record)?.is_some_and(|r| r.data == name)
                {
                    continue;
                }
                let Some(xml) = found(volume.xml_desc(0))? else { continue };
                let age_s = Seen::parse(&xml)?.modified_s.map_or(0, |modified_s| now_s.saturating_sub(modified_s));
                if age_s > UNFINISHED.as_secs() && delete_volume(&volume)?.is_some() {
                    deleted.push(name);
                }
            }
            Ok(deleted)
        };
        self.inner.control("libvirt.sweep_images", Effect::Some, sweep).await
    }
}

fn no_image(id: ImageId) -> Error {
    Error::not_found("there is no such image").on(format!("image {id}"))
}

/// The id of a volume as an image.
fn image_id(pool: Uuid, volume: &str) -> ImageId {
    ImageId::from_uuid(Uuid::new_v5(&pool, volume.as_bytes()))
}

// --- on a thread of the door's ------------------------------------------------------------------------------

/// The volume that a machine's disk is laid over; `None` when there is no such image.
pub(crate) fn template(connect: &Connect, inner: &Inner, id: ImageId) -> Result<Option<Seen>, Trouble> {
    let pool = pool(connect, &inner.config.pool)?;
    let Some(volume) = volume_of(&pool, inner.pool, id)? else { return Ok(None) };
    if image_of(connect, &pool, inner.pool, &volume)?.is_none() {
        return Ok(None);
    }
    Ok(Some(Seen::parse(&volume.xml_desc(0)?)?))
}

/// Makes libvirt look at the folder. It refuses while a volume is being made; then the next one will see.
fn refresh(pool: &StoragePool) {
    if let Err(error) = pool.refresh(0) {
        tracing::debug!(error = error.message(), "the pool could not be refreshed");
    }
}

fn volume_of(pool: &StoragePool, pool_id: Uuid, id: ImageId) -> Result<Option<StorageVol>, Trouble> {
    for attempt in 0..2 {
        if attempt > 0 {
            refresh(pool);
        }
        for volume in pool.list_all_volumes(0)? {
            if image_id(pool_id, &volume.name()?) == id {
                return Ok(Some(volume));
            }
        }
    }
    Ok(None)
}

fn images(connect: &Connect, pool: &StoragePool, id: Uuid, filter: &ImageFilter) -> Result<Vec<Image>, Trouble> {
    let mut images = Vec::new();
    for volume in pool.list_all_volumes(0)? {
        // The name of somebody else's image is the volume's: no need to ask libvirt about the others.
        let name = volume.name()?;
        let is_other = filter.owner.is_some() || filter.name.as_ref().is_some_and(|wanted| wanted.as_str() != name);
        if Role::of(&name) == Role::Foreign && is_other {
            continue;
        }
        if let Some(image) = image_of(connect, pool, id, &volume)?
            && filter.matches(&image)
        {
            images.push(image);
        }
    }
    Ok(images)
}

/// A volume as an image; `None` when it is none, not complete, or gone.
fn image_of(
    connect: &Connect,
    pool: &StoragePool,
    pool_id: Uuid,
    volume: &StorageVol,
) -> Result<Option<Image>, Trouble> {
    let volume_name = volume.name()?;
    let record = match Role::of(&volume_name) {
        Role::Foreign => None,
        Role::ImageData { record } => match read_record(connect, pool, &record)? {
            Some(record) if record.data == volume_name => Some(record),
            _ => return Ok(None),
        },
        Role::Disk { .. } | Role::ImageRecord | Role::Probe => return Ok(None),
    };
    let Some(xml) = found(volume.xml_desc(0))? else { return Ok(None) };
    let seen = Seen::parse(&xml)?;
    let Some(format) = seen.format else { return Ok(None) };
    let name = match &record {
        Some(record) => record.name.clone(),
        None => match Name::new(volume_name.as_str()) {
            Ok(name) => name,
            Err(_) => return Ok(None),
        },
    };
    Ok(Some(Image {
        id: image_id(pool_id, &volume_name),
        name,
        state: ImageState::Active,
        format: record.as_ref().map_or(format, |record| record.format),
        size_bytes: seen.allocation_bytes,
        os_family: record.as_ref().map(|record| record.os_family),
        users: record.as_ref().map(|record| record.users.clone()).unwrap_or_default(),
        tags: record.map(|record| record.tags),
    }))
}

/// A record that is there and complete.
fn read_record(connect: &Connect, pool: &StoragePool, name: &str) -> Result<Option<Record>, Trouble> {
    let Some(volume) = found(pool.lookup_storage_vol_by_name(name))? else { return Ok(None) };
    let Some(info) = found(volume.info())? else { return Ok(None) };
    let length = info.capacity.min(MAX_RECORD_BYTES as u64);
    let stream = Stream::new(connect, 0)?;
    match volume.download(&stream, 0, length, 0).map_err(Failure::from) {
        Ok(()) => {}
        // Gone, or being made at this moment: not there yet.
        Err(failure) if matches!(failure.meaning(), Meaning::NoVolume | Meaning::WrongState) => return Ok(None),
        Err(failure) => return Err(Trouble::Libvirt(failure)),
    }
    let json = receive(stream, MAX_RECORD_BYTES)?;
    Ok(serde_json::from_slice(&json).ok())
}

/// Everything that a stream brings.
pub(crate) fn receive(stream: Stream, max_bytes: usize) -> Result<Vec<u8>, Trouble> {
    through(stream, |stream| {
        let mut bytes = Vec::new();
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            match stream.recv(&mut buffer)? {
                0 => return Ok(bytes),
                n => bytes.extend_from_slice(buffer.get(..usize::try_from(n).unwrap_or(0)).unwrap_or_default()),
            }
            if bytes.len() > max_bytes {
                return Err(Error::internal("libvirt sends more than it was asked for").into());
            }
        }
    })
}

/// Uses a stream and ends it one way or the other: one that is only dropped stays open in libvirtd.
pub(crate) fn through<T>(stream: Stream, work: impl FnOnce(&Stream) -> Result<T, Trouble>) -> Result<T, Trouble> {
    match work(&stream) {
        Ok(value) => {
            stream.finish()?;
            Ok(value)
        }
        Err(trouble) => {
            let _ = stream.abort();
            Err(trouble)
        }
    }
}

pub(crate) fn send(stream: &Stream, mut bytes: &[u8]) -> Result<(), Trouble> {
    while !bytes.is_empty() {
        let sent = usize::try_from(stream.send(bytes)?).unwrap_or(0);
        if sent == 0 {
            return Err(Error::internal("libvirt takes no more data").into());
        }
        bytes = bytes.get(sent..).unwrap_or_default();
    }
    Ok(())
}

/// An image to take in.
struct Import {
    spec: ImageSpec,
    path: PathBuf,
    this: Libvirt,
}

impl Import {
    fn run(&self, connect: &Connect) -> Result<Image, Trouble> {
        let inner = &self.this.inner;
        let pool = pool(connect, &inner.config.pool)?;
        let record = volume::image_record_name(&self.spec.tags.owner, self.spec.name.as_str());
        if let Some(image) = self.existing(connect, &pool, &record)? {
            return Ok(image);
        }
        let (mut file, length) = self.open()?;
        let capacity = match self.spec.format {
            DiskFormat::Raw => length,
            DiskFormat::Qcow2 => {
                let mut header = Vec::with_capacity(qcow2::HEADER_BYTES);
                let limit = qcow2::HEADER_BYTES as u64;
                (&mut file).take(limit).read_to_end(&mut header).map_err(unreadable)?;
                file.rewind().map_err(unreadable)?;
                qcow2::virtual_size(&header)?
            }
        };
        let name = volume::image_data_name(&record, self.spec.format);
        let wanted = Volume { name: &name, capacity_bytes: capacity, format: self.spec.format, backing: None };
        let data = StorageVol::create_xml(&pool, &wanted.xml()?, 0)?;
        let published = self
            .upload(connect, &data, &mut file, length)
            .and_then(|sha256| self.publish(connect, &pool, &record, &name, sha256));
        match published {
            Ok(true) => {}
            // Somebody else was quicker with this name.
            Ok(false) => {
                delete_volume(&data)?;
                let existing = self.existing(connect, &pool, &record)?;
                return existing.ok_or_else(|| Error::unavailable("the image changes under our hands").into());
            }
            Err(trouble) => {
                if let Err(left) = delete_volume(&data) {
                    tracing::warn!(volume = name, ?left, "the data of a refused image is left; a sweep takes it");
                }
                return Err(trouble);
            }
        }
        let image = image_of(connect, &pool, inner.pool, &data)?;
        image.ok_or_else(|| Error::unavailable("the image was deleted at once").into())
    }

    /// The image that has our name: the same request's is the answer, another's is in the way. And so is an image
    /// of another name that the same request made.
    fn existing(&self, connect: &Connect, pool: &StoragePool, record: &str) -> Result<Option<Image>, Trouble> {
        let taken = |why: String| Err(Error::new(ErrorKind::AlreadyExists, why).into());
        let Some(kept) = read_record(connect, pool, record)? else {
            for volume in pool.list_all_volumes(0)? {
                let name = volume.name()?;
                if Role::of(&name) == Role::ImageRecord
                    && volume::is_image_of(&name, &self.spec.tags.owner)
                    && let Some(other) = read_record(connect, pool, &name)?
                    && (&other.tags.owner, &other.tags.request) == (&self.spec.tags.owner, &self.spec.tags.request)
                {
                    return taken(format!("request {} has already made image {}", other.tags.request, other.name));
                }
            }
            return Ok(None);
        };
        if kept.tags.request != self.spec.tags.request {
            return taken(format!("there is already an image {}", self.spec.name));
        }
        let Some(data) = found(pool.lookup_storage_vol_by_name(&kept.data))? else { return Ok(None) };
        image_of(connect, pool, self.this.inner.pool, &data)
    }

    fn open(&self) -> Result<(File, u64), Trouble> {
        let file = File::open(&self.path).map_err(|error| match error.kind() {
            IoKind::NotFound => Error::not_found("the image's file is not there").with_source(error),
            _ => unreadable(error),
        })?;
        let metadata = file.metadata().map_err(unreadable)?;
        if !metadata.is_file() || metadata.len() == 0 {
            return Err(Error::invalid("source", "is not a file with data").into());
        }
        Ok((file, metadata.len()))
    }

    /// Sends the file; returns the digest of what was sent, when it is the one that was asked for.
    fn upload(&self, connect: &Connect, data: &StorageVol, file: &mut File, length: u64) -> Result<String, Trouble> {
        let mut hash = Sha256::new();
        through(begin_upload(connect, data, length)?, |stream| {
            let mut buffer = vec![0; CHUNK_BYTES];
            let mut left = length;
            while left > 0 {
                let most = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK_BYTES);
                let n = file.read(buffer.get_mut(..most).unwrap_or_default()).map_err(unreadable)?;
                let chunk = buffer.get(..n).unwrap_or_default();
                if chunk.is_empty() {
                    return Err(Error::invalid("source", "became shorter while it was read").into());
                }
                hash.update(chunk);
                send(stream, chunk)?;
                left -= n as u64;
            }
            Ok(())
        })?;
        let sha256: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        match &self.spec.sha256 {
            Some(wanted) if !wanted.eq_ignore_ascii_case(&sha256) => {
                Err(Error::invalid("sha256", format_args!("the data has {sha256}, not what was asked for")).into())
            }
            _ => Ok(sha256),
        }
    }

    /// Writes the record; `false` when there is one already.
    fn publish(
        &self,
        connect: &Connect,
        pool: &StoragePool,
        record: &str,
        data: &str,
        sha256: String,
    ) -> Result<bool, Trouble> {
        let kept = Record {
            version: 1,
            tags: self.spec.tags.clone(),
            name: self.spec.name.clone(),
            data: data.to_owned(),
            format: self.spec.format,
            sha256,
            os_family: self.spec.os_family,
            users: self.spec.users.clone(),
        };
        let json =
            serde_json::to_vec(&kept).map_err(|e| Error::internal("a record cannot be written").with_source(e))?;
        let length = json.len() as u64;
        if json.len() > MAX_RECORD_BYTES {
            return Err(Error::invalid("users", "are too many to be kept with the image").into());
        }
        let wanted = Volume { name: record, capacity_bytes: length, format: DiskFormat::Raw, backing: None };
        let xml = wanted.xml()?;
        let volume = match StorageVol::create_xml(pool, &xml, 0).map_err(Failure::from) {
            Ok(volume) => volume,
            Err(failure) if failure.meaning() == Meaning::Exists => {
                if read_record(connect, pool, record)?.is_some() {
                    return Ok(false);
                }
                // A record that was begun and never written: nobody sees it, and it would be in the way for ever.
                if let Some(stale) = found(pool.lookup_storage_vol_by_name(record))? {
                    delete_volume(&stale)?;
                }
                StorageVol::create_xml(pool, &xml, 0)?
            }
            Err(failure) => return Err(Trouble::Libvirt(failure)),
        };
        through(begin_upload(connect, &volume, length)?, |stream| send(stream, &json))?;
        Ok(true)
    }
}

/// A stream into a volume. Whoever lists images may be reading the volume at this moment, and is waited for.
fn begin_upload(connect: &Connect, volume: &StorageVol, length: u64) -> Result<Stream, Trouble> {
    patiently(|| {
        let stream = Stream::new(connect, 0)?;
        volume.upload(&stream, 0, length, 0)?;
        Ok(stream)
    })
}

fn unreadable(error: std::io::Error) -> Error {
    Error::new(ErrorKind::Invalid, "source: the image's file cannot be read").with_source(error)
}
