//! [`ImageBackend`] in memory.

use std::{
    io,
    path::Path,
    sync::{Arc, OnceLock},
};

use async_trait::async_trait;
use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::{
    Inner, MemoryCloud, MemoryOptions, World, full, gone,
    shell::programs,
    tree::{ROOT, Tree},
};
use crate::{
    Deletion, DiskFormat, Error, ErrorKind, Image, ImageBackend, ImageCapabilities, ImageFilter, ImageId, ImageSource,
    ImageSpec, ImageState, Name, OsFamily, Result, Tags, VmId, VmState,
};

pub(super) struct StoredImage {
    pub(super) seen: Image,
    /// Whether machines made from it have a guest agent.
    pub(super) agent: bool,
    made: Option<Made>,
    data: Data,
}

/// What made it, to know a repeat.
enum Made {
    Import(ImageSpec),
    Capture(VmId),
}

#[derive(Clone)]
enum Data {
    /// What was taken in. Machines made from it have the files of every guest here.
    Bytes(Bytes),
    /// A guest's files; exported as a tar archive.
    Files(Arc<Tree>),
}

impl StoredImage {
    /// The files that a new machine begins with.
    pub(super) fn files(&self, options: &MemoryOptions) -> Arc<Tree> {
        match &self.data {
            Data::Files(files) => files.clone(),
            Data::Bytes(_) => base_files(options, self.seen.users.iter().find(|user| *user != ROOT).map_or("", |u| u)),
        }
    }
}

/// The images that somebody else made.
pub(super) fn furnish(world: &mut World, options: &MemoryOptions) {
    let files = base_files(options, "user");
    for (name, id, agent) in [("tiny", MemoryCloud::tiny(), true), ("mute", MemoryCloud::mute(), false)] {
        if let Ok(name) = Name::new(name) {
            let seen = Image {
                id,
                name,
                tags: None,
                state: ImageState::Active,
                format: DiskFormat::Raw,
                size_bytes: None,
                os_family: Some(OsFamily::Linux),
                users: vec![ROOT.to_owned(), "user".to_owned()],
            };
            world.images.insert(id, StoredImage { seen, agent, made: None, data: Data::Files(files.clone()) });
        }
    }
}

/// A guest's users: root, and those of the image.
pub(super) fn users(named: &[String]) -> Vec<String> {
    let others = named.iter().filter(|user| *user != ROOT).cloned();
    std::iter::once(ROOT.to_owned()).chain(others).collect()
}

/// The files that every guest begins with.
pub(super) fn base_files(options: &MemoryOptions, user: &str) -> Arc<Tree> {
    static USUAL: OnceLock<Arc<Tree>> = OnceLock::new();
    let usual = user == "user" && options.disk_bytes == MemoryOptions::default().disk_bytes;
    if usual {
        return USUAL.get_or_init(|| Arc::new(furnished(options.disk_bytes, user))).clone();
    }
    Arc::new(furnished(options.disk_bytes, user))
}

fn furnished(limit_bytes: u64, user: &str) -> Tree {
    let mut tree = Tree::new(limit_bytes);
    let folders = [
        "/bin",
        "/dev",
        "/etc",
        "/home",
        "/opt",
        "/root",
        "/run",
        "/sbin",
        "/srv",
        "/tmp",
        "/usr/bin",
        "/usr/local/bin",
        "/usr/sbin",
        "/var/lib",
        "/var/log",
        "/var/tmp",
    ];
    let mut passwd = "root:x:0:0:root:/root:/bin/sh\n".to_owned();
    if !user.is_empty() {
        passwd.push_str(&format!("{user}:x:1000:1000::/home/{user}:/bin/sh\n"));
    }
    let home = format!("/home/{user}");
    let mut furnish = || {
        folders.iter().try_for_each(|folder| tree.make_folders(ROOT, folder))?;
        for name in programs::NAMES {
            let path = format!("/bin/{name}");
            tree.write(ROOT, &path, &[programs::MARK, name.as_bytes()].concat(), false)?;
            tree.set_mode(ROOT, &path, 0o755)?;
        }
        tree.write(ROOT, "/etc/passwd", passwd.as_bytes(), false)?;
        tree.write(
            ROOT,
            "/etc/os-release",
            b"NAME=\"Memory Linux\"\nPRETTY_NAME=\"Memory Linux 1\"\nID=memory\n",
            false,
        )?;
        tree.set_mode(ROOT, "/tmp", 0o1777)?;
        tree.set_mode(ROOT, "/var/tmp", 0o1777)?;
        tree.set_mode(ROOT, "/root", 0o700)?;
        if !user.is_empty() {
            tree.make_folders(ROOT, &home)?;
            tree.set_owner(ROOT, &home, user)?;
        }
        Ok::<(), super::tree::Fail>(())
    };
    // A disk too small for its system is an empty disk.
    let _too_small = furnish();
    tree
}

impl Inner {
    fn image_capabilities(&self) -> ImageCapabilities {
        let options = &self.options;
        ImageCapabilities { import: options.import, capture: options.capture, export: options.export }
    }

    /// The image that this request made already, or `None` when name and request are free.
    fn made_already(world: &World, tags: &Tags, name: &Name, same: impl Fn(&Made) -> bool) -> Result<Option<Image>> {
        for image in world.images.values() {
            let Some((made, theirs)) = image.made.as_ref().zip(image.seen.tags.as_ref()) else { continue };
            if theirs.owner != tags.owner {
                continue;
            }
            if theirs == tags && image.seen.name == *name && same(made) {
                return Ok(Some(image.seen.clone()));
            }
            let why = if theirs.request == tags.request {
                format!("the request {} already made another image", tags.request)
            } else if image.seen.name == *name {
                format!("another request already made an image named {name}")
            } else {
                continue;
            };
            return Err(Error::new(ErrorKind::AlreadyExists, why).on(format!("image {}", image.seen.id)));
        }
        Ok(None)
    }

    fn keep_image(&self, world: &mut World, mut image: StoredImage) -> Result<Image> {
        if world.images.len() >= self.options.max_images {
            return Err(full("images", self.options.max_images));
        }
        image.seen.id = ImageId::from_uuid(self.id(world, "image"));
        let seen = image.seen.clone();
        world.images.insert(seen.id, image);
        Ok(seen)
    }

    async fn import_image(&self, spec: &ImageSpec) -> Result<Image> {
        if !self.options.import {
            return Err(Error::unsupported("this backend takes no images in"));
        }
        let same = |made: &Made| matches!(made, Made::Import(made) if made == spec);
        let made = Self::made_already(&self.world(), &spec.tags, &spec.name, same)?;
        if let Some(image) = made {
            return Ok(image);
        }
        let data = match &spec.source {
            ImageSource::File(path) => read_bounded(path, self.options.max_image_bytes).await?,
            ImageSource::Url(_) => return Err(Error::unsupported("source: this backend takes files only")),
        };
        if let Some(wanted) = &spec.sha256 {
            let found: String = Sha256::digest(&data).iter().map(|byte| format!("{byte:02x}")).collect();
            if *wanted != found {
                return Err(Error::invalid("sha256", format_args!("wants {wanted}, the data has {found}")));
            }
        }
        let mut world = self.world();
        // Somebody with the same request may have been quicker.
        if let Some(image) = Self::made_already(&world, &spec.tags, &spec.name, same)? {
            return Ok(image);
        }
        let seen = Image {
            id: ImageId::from_uuid(uuid::Uuid::nil()),
            name: spec.name.clone(),
            tags: Some(spec.tags.clone()),
            state: ImageState::Active,
            format: spec.format,
            size_bytes: Some(data.len() as u64),
            os_family: Some(spec.os_family),
            users: spec.users.clone(),
        };
        let image =
            StoredImage { seen, agent: true, made: Some(Made::Import(spec.clone())), data: Data::Bytes(data.into()) };
        self.keep_image(&mut world, image)
    }

    fn capture_vm(&self, id: VmId, name: &Name, tags: &Tags) -> Result<Image> {
        if !self.options.capture {
            return Err(Error::unsupported("this backend cannot capture machines"));
        }
        let mut world = self.world();
        let same = |made: &Made| matches!(made, Made::Capture(vm) if *vm == id);
        if let Some(image) = Self::made_already(&world, tags, name, same)? {
            return Ok(image);
        }
        self.settle(&mut world, id);
        let machine = world.vms.get(&id).filter(|machine| machine.vm.state != VmState::Deleting);
        let machine = machine.ok_or_else(|| gone(id))?;
        let source = machine.vm.image.and_then(|image| world.images.get(&image));
        let image = StoredImage {
            seen: Image {
                id: ImageId::from_uuid(uuid::Uuid::nil()),
                name: name.clone(),
                tags: Some(tags.clone()),
                state: ImageState::Active,
                format: DiskFormat::Raw,
                size_bytes: None,
                os_family: source.map_or(Some(OsFamily::Linux), |image| image.seen.os_family),
                users: machine.users.clone(),
            },
            agent: source.is_none_or(|image| image.agent),
            made: Some(Made::Capture(id)),
            data: Data::Files(machine.files.clone()),
        };
        self.keep_image(&mut world, image)
    }

    async fn export_image(&self, id: ImageId, to: &Path) -> Result<u64> {
        if !self.options.export {
            return Err(Error::unsupported("this backend cannot export images"));
        }
        let data = self.world().images.get(&id).map(|image| image.data.clone()).ok_or_else(|| no_image(id))?;
        let to = to.to_owned();
        let written = tokio::task::spawn_blocking(move || write_whole(&data, &to)).await;
        let written = written.map_err(|error| Error::internal("the export was ended").with_source(error))?;
        written.map_err(|error| {
            Error::invalid("path", "the image's data cannot be written there")
                .on(format!("image {id}"))
                .with_source(error)
        })
    }
}

fn no_image(id: ImageId) -> Error {
    Error::not_found("there is no such image").on(format!("image {id}"))
}

async fn read_bounded(path: &Path, limit_bytes: u64) -> Result<Vec<u8>> {
    let shown = || path.display().to_string();
    let unreadable = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Error::not_found("source: there is no such file").on(shown()),
        _ => Error::invalid("source", "the file cannot be read").on(shown()).with_source(error),
    };
    let size = tokio::fs::metadata(path).await.map_err(unreadable)?.len();
    if size > limit_bytes {
        let why = format!("an image in memory has at most {limit_bytes} bytes, this one has {size}");
        return Err(Error::new(ErrorKind::Exhausted, why).on(shown()));
    }
    tokio::fs::read(path).await.map_err(unreadable)
}

/// Writes to a temporary name beside the target, then renames: nobody sees a part.
fn write_whole(data: &Data, to: &Path) -> io::Result<u64> {
    let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    match data {
        Data::Bytes(bytes) => io::Write::write_all(&mut file, bytes)?,
        Data::Files(files) => {
            let mut archive = tar::Builder::new(&mut file);
            for (path, node) in files.iter().filter(|(path, _)| *path != "/") {
                let mut header = tar::Header::new_gnu();
                header.set_mode(node.mode);
                header.set_username(&node.owner)?;
                let content = node.content.as_ref().map_or(&[][..], |content| content.as_slice());
                header.set_entry_type(if node.is_folder() {
                    tar::EntryType::Directory
                } else {
                    tar::EntryType::Regular
                });
                header.set_size(content.len() as u64);
                archive.append_data(&mut header, path.trim_start_matches('/'), content)?;
            }
            archive.finish()?;
        }
    }
    let size = file.as_file().metadata()?.len();
    file.persist(to)?;
    Ok(size)
}

#[async_trait]
impl ImageBackend for MemoryCloud {
    fn capabilities(&self) -> ImageCapabilities {
        self.inner.image_capabilities()
    }

    async fn import_image(&self, spec: &ImageSpec) -> Result<Image> {
        self.inner.faults.around("image.import_image", self.inner.import_image(spec)).await
    }

    async fn find_images(&self, filter: &ImageFilter) -> Result<Vec<Image>> {
        let effect = async {
            let world = self.world();
            Ok(world.images.values().map(|image| &image.seen).filter(|image| filter.matches(image)).cloned().collect())
        };
        self.inner.faults.around("image.find_images", effect).await
    }

    async fn get_image(&self, id: ImageId) -> Result<Image> {
        let effect = async { self.world().images.get(&id).map(|image| image.seen.clone()).ok_or_else(|| no_image(id)) };
        self.inner.faults.around("image.get_image", effect).await
    }

    async fn delete_image(&self, id: ImageId) -> Result<Deletion> {
        let effect = async {
            let removed = self.world().images.remove(&id);
            Ok(if removed.is_some() { Deletion::Deleted } else { Deletion::AlreadyGone })
        };
        self.inner.faults.around("image.delete_image", effect).await
    }

    async fn capture_vm(&self, vm: VmId, name: &Name, tags: &Tags) -> Result<Image> {
        self.inner.faults.around("image.capture_vm", async { self.inner.capture_vm(vm, name, tags) }).await
    }

    async fn export_image(&self, id: ImageId, to: &Path) -> Result<u64> {
        self.inner.faults.around("image.export_image", self.inner.export_image(id, to)).await
    }
}
