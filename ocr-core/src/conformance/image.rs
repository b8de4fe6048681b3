//! Cases of [`ImageBackend`](crate::ImageBackend).

use std::time::Duration;

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::context::{Broken, Check, Context, ensure, fails};
use crate::{
    Deletion, DiskFormat, ErrorKind, Image, ImageFilter, ImageId, ImageSource, ImageSpec, ImageState, OsFamily, Tags,
    VmId,
};

/// The size of the image that is taken in: small, and a whole number of any disk's sectors.
const IMAGE_BYTES: usize = 64 << 10;

/// A raw disk of noise in a folder of its own. The folder lives as long as the case.
struct Source {
    folder: TempDir,
    sha256: String,
}

fn io(error: std::io::Error) -> Broken {
    Broken(format!("the suite's own file cannot be written or read: {error}"))
}

impl Source {
    fn new() -> Check<Self> {
        let data = super::guest::noise(IMAGE_BYTES);
        let folder = tempfile::tempdir().map_err(io)?;
        std::fs::write(folder.path().join("disk.raw"), &data).map_err(io)?;
        Ok(Self { folder, sha256: hex(&data) })
    }

    fn spec(&self, c: &Context<'_>, suffix: &str) -> Check<ImageSpec> {
        Ok(ImageSpec {
            tags: c.tags(),
            name: c.name(suffix)?,
            source: ImageSource::File(self.folder.path().join("disk.raw")),
            format: DiskFormat::Raw,
            sha256: Some(self.sha256.clone()),
            os_family: OsFamily::Linux,
            users: vec!["root".to_owned(), "trainee".to_owned()],
        })
    }
}

fn hex(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Our images of this case.
async fn listed(c: &Context<'_>) -> Check<Vec<Image>> {
    let filter = ImageFilter { owner: Some(c.subject.owner.clone()), name: None };
    let mut images = c.image()?.find_images(&filter).await?;
    images.retain(|image| image.tags.as_ref().is_some_and(|tags| tags.scope == c.scope()));
    Ok(images)
}

async fn only(c: &Context<'_>, id: ImageId) -> Check {
    let listed = listed(c).await?;
    ensure!(listed.len() == 1 && listed[0].id == id, "there must be one image, {id}; found are {listed:?}");
    Ok(())
}

async fn nothing_made(c: &Context<'_>) -> Check {
    let listed = listed(c).await?;
    ensure!(listed.is_empty(), "nothing may be left of what was refused, there is {listed:?}");
    Ok(())
}

/// Waits until an image is ready.
async fn active(c: &Context<'_>, id: ImageId) -> Check<Image> {
    let end = tokio::time::Instant::now() + c.deadline();
    let mut pause = Duration::from_millis(20);
    loop {
        let image = c.image()?.get_image(id).await?;
        match &image.state {
            ImageState::Active => return Ok(image),
            ImageState::Failed(why) => return Err(Broken(format!("the image failed: {why}"))),
            ImageState::Queued => {}
        }
        ensure!(tokio::time::Instant::now() < end, "the image is still queued after the deadline");
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(Duration::from_secs(1));
    }
}

pub(super) async fn image_import_visible(c: &Context<'_>) -> Check {
    let source = Source::new()?;
    let spec = source.spec(c, "a")?;
    let made = c.image()?.import_image(&spec).await?;
    let got = active(c, made.id).await?;
    only(c, made.id).await?;
    for image in [&got, &listed(c).await?[0]] {
        ensure!(image.name == spec.name, "name {:?} instead of {:?}", image.name, spec.name);
        ensure!(image.tags.as_ref() == Some(&spec.tags), "tags {:?} instead of {:?}", image.tags, spec.tags);
        ensure!(image.format == spec.format, "format {:?} instead of {:?}", image.format, spec.format);
        ensure!(image.os_family == Some(spec.os_family), "guest family {:?}", image.os_family);
        ensure!(image.users == spec.users, "users {:?} instead of {:?}", image.users, spec.users);
    }
    Ok(())
}

pub(super) async fn image_import_repeat(c: &Context<'_>) -> Check {
    let source = Source::new()?;
    let spec = source.spec(c, "a")?;
    let first = c.image()?.import_image(&spec).await?.id;
    let second = c.image()?.import_image(&spec).await?.id;
    ensure!(first == second, "a repeat gave {second} after {first}");
    only(c, first).await
}

pub(super) async fn image_import_request_reused(c: &Context<'_>) -> Check {
    let source = Source::new()?;
    let spec = source.spec(c, "a")?;
    let made = c.image()?.import_image(&spec).await?.id;
    let result = c.image()?.import_image(&ImageSpec { name: c.name("b")?, ..spec }).await;
    fails(result, &[ErrorKind::AlreadyExists], "the same request for another name")?;
    only(c, made).await
}

pub(super) async fn image_import_name_taken(c: &Context<'_>) -> Check {
    let source = Source::new()?;
    let spec = source.spec(c, "a")?;
    let made = c.image()?.import_image(&spec).await?.id;
    let result = c.image()?.import_image(&ImageSpec { tags: c.tags(), ..spec }).await;
    fails(result, &[ErrorKind::AlreadyExists], "a name under another request")?;
    only(c, made).await
}

pub(super) async fn image_import_checksum(c: &Context<'_>) -> Check {
    let source = Source::new()?;
    let spec = ImageSpec { sha256: Some(hex(b"something else")), ..source.spec(c, "a")? };
    fails(c.image()?.import_image(&spec).await, &[ErrorKind::Invalid], "a wrong checksum")?;
    nothing_made(c).await
}

pub(super) async fn image_import_missing(c: &Context<'_>) -> Check {
    let source = Source::new()?;
    let missing = ImageSource::File(source.folder.path().join("no-such-disk.raw"));
    let spec = ImageSpec { source: missing, ..source.spec(c, "a")? };
    fails(c.image()?.import_image(&spec).await, &[ErrorKind::NotFound], "a source that is not there")?;
    nothing_made(c).await
}

pub(super) async fn image_import_unsupported(c: &Context<'_>) -> Check {
    let source = Source::new()?;
    let result = c.image()?.import_image(&source.spec(c, "a")?).await;
    fails(result, &[ErrorKind::Unsupported], "import without the capability")?;
    nothing_made(c).await
}

pub(super) async fn image_find_filter(c: &Context<'_>) -> Check {
    let source = Source::new()?;
    let spec = source.spec(c, "a")?;
    let one = c.image()?.import_image(&spec).await?.id;
    let two = c.image()?.import_image(&source.spec(c, "ab")?).await?.id;
    let other_owner = Tags { owner: c.other_owner()?, ..c.tags() };
    let three = c.image()?.import_image(&ImageSpec { tags: other_owner, ..spec.clone() }).await?.id;
    let (owner, name) = (Some(c.subject.owner.clone()), Some(spec.name));
    let rows = [
        ("owner", ImageFilter { owner: owner.clone(), name: None }, [true, true, false]),
        ("name", ImageFilter { owner: None, name: name.clone() }, [true, false, true]),
        ("owner and name", ImageFilter { owner, name }, [true, false, false]),
        ("nothing", ImageFilter::default(), [true, true, true]),
        ("a name of nothing", ImageFilter { owner: None, name: Some(c.name("nobody")?) }, [false, false, false]),
    ];
    for (what, filter, wanted) in rows {
        let listed = c.image()?.find_images(&filter).await?;
        let found = [one, two, three].map(|id| listed.iter().any(|image| image.id == id));
        ensure!(found == wanted, "filtered by {what}: of three images {found:?} are found instead of {wanted:?}");
        let strange = listed.iter().find(|image| !filter.matches(image));
        ensure!(strange.is_none(), "filtered by {what}: {strange:?} does not match");
    }
    Ok(())
}

pub(super) async fn image_get_missing(c: &Context<'_>) -> Check {
    fails(c.image()?.get_image(ImageId::random()).await, &[ErrorKind::NotFound], "an id that nobody has")?;
    Ok(())
}

pub(super) async fn image_delete_gone(c: &Context<'_>) -> Check {
    let source = Source::new()?;
    let id = c.image()?.import_image(&source.spec(c, "a")?).await?.id;
    active(c, id).await?;
    let deletion = c.image()?.delete_image(id).await?;
    ensure!(deletion == Deletion::Deleted, "deleting an image that is there gave {deletion:?}");
    fails(c.image()?.get_image(id).await, &[ErrorKind::NotFound], "a deleted image")?;
    nothing_made(c).await?;
    for id in [id, ImageId::random()] {
        let deletion = c.image()?.delete_image(id).await?;
        ensure!(deletion == Deletion::AlreadyGone, "deleting what is not there gave {deletion:?}");
    }
    Ok(())
}

pub(super) async fn image_capture_visible(c: &Context<'_>) -> Check {
    let vm = c.running("a").await?.id;
    let (name, tags) = (c.name("b")?, c.tags());
    let made = c.image()?.capture_vm(vm, &name, &tags).await?;
    let image = active(c, made.id).await?;
    ensure!(image.name == name, "name {:?} instead of {name:?}", image.name);
    ensure!(image.tags.as_ref() == Some(&tags), "tags {:?} instead of {tags:?}", image.tags);
    only(c, made.id).await
}

pub(super) async fn image_capture_missing(c: &Context<'_>) -> Check {
    let result = c.image()?.capture_vm(VmId::random(), &c.name("a")?, &c.tags()).await;
    fails(result, &[ErrorKind::NotFound], "capturing a machine that does not exist")?;
    nothing_made(c).await
}

pub(super) async fn image_capture_unsupported(c: &Context<'_>) -> Check {
    let result = c.image()?.capture_vm(VmId::random(), &c.name("a")?, &c.tags()).await;
    fails(result, &[ErrorKind::Unsupported], "capture without the capability")?;
    Ok(())
}

pub(super) async fn image_export_roundtrip(c: &Context<'_>) -> Check {
    let source = Source::new()?;
    let id = c.image()?.import_image(&source.spec(c, "a")?).await?.id;
    active(c, id).await?;
    let to = source.folder.path().join("exported.raw");
    let size = c.image()?.export_image(id, &to).await?;
    let data = std::fs::read(&to).map_err(io)?;
    ensure!(size == data.len() as u64, "{size} bytes were told, {} are there", data.len());
    let found = hex(&data);
    ensure!(found == source.sha256, "the data has the digest {found} instead of {}", source.sha256);
    Ok(())
}

pub(super) async fn image_export_missing(c: &Context<'_>) -> Check {
    let folder = tempfile::tempdir().map_err(io)?;
    let to = folder.path().join("exported.raw");
    let result = c.image()?.export_image(ImageId::random(), &to).await;
    fails(result, &[ErrorKind::NotFound], "exporting an image that does not exist")?;
    let left = std::fs::read_dir(folder.path()).map_err(io)?.count();
    ensure!(left == 0, "{left} files were left of a refused export");
    Ok(())
}

pub(super) async fn image_export_unsupported(c: &Context<'_>) -> Check {
    let folder = tempfile::tempdir().map_err(io)?;
    let result = c.image()?.export_image(ImageId::random(), &folder.path().join("exported.raw")).await;
    fails(result, &[ErrorKind::Unsupported], "export without the capability")?;
    Ok(())
}
