//! Images taken in, found and given out wrongly.

use super::{invented, mutants, renamed, swap};
use crate::{
    Deletion, DiskFormat, Error, ErrorKind, Image, ImageBackend, ImageFilter, ImageSource, ImageSpec, RequestId,
    Result, Tags, memory::MemoryCloud,
};

async fn made_by(cloud: &MemoryCloud, tags: &Tags) -> Result<Option<Image>> {
    let images = cloud.find_images(&ImageFilter::default()).await?;
    Ok(images.into_iter().find(|image| image.tags.as_ref().is_some_and(|made| made.request == tags.request)))
}

async fn another(cloud: &MemoryCloud, spec: &ImageSpec) -> Result<Image> {
    let tags = Tags { request: RequestId::random(), ..spec.tags.clone() };
    cloud.import_image(&ImageSpec { tags, name: renamed(&spec.name), ..spec.clone() }).await
}

mutants! { Image
    "an image's users are lost" fails [image_import_visible] {
        get_image: |w, id| Ok(Image { users: Vec::new(), ..w.cloud().get_image(id).await? })
    }
    "an image's format is guessed" fails [image_import_visible] {
        import_image: |w, spec| w.cloud().import_image(&ImageSpec { format: DiskFormat::Qcow2, ..spec }).await
    }
    "an image's guest family is lost" fails [image_import_visible] {
        get_image: |w, id| Ok(Image { os_family: None, ..w.cloud().get_image(id).await? })
    }
    "an image's tags are lost" fails [image_import_visible image_capture_visible] {
        get_image: |w, id| Ok(Image { tags: None, ..w.cloud().get_image(id).await? })
    }
    "a repeat takes a second image in" fails [image_import_repeat] {
        import_image: |w, spec| match made_by(w.cloud(), &spec.tags).await? {
            Some(made) if made.name == spec.name => another(w.cloud(), &spec).await,
            _ => w.cloud().import_image(&spec).await,
        }
    }
    "a reused request returns the old image" fails [image_import_request_reused] {
        import_image: |w, spec| match made_by(w.cloud(), &spec.tags).await? {
            Some(made) => Ok(made),
            None => w.cloud().import_image(&spec).await,
        }
    }
    "a taken name returns the old image" fails [image_import_name_taken] {
        import_image: |w, spec| {
            let filter = ImageFilter { owner: Some(spec.tags.owner.clone()), name: Some(spec.name.clone()) };
            match w.cloud().find_images(&filter).await?.pop() {
                Some(made) => Ok(made),
                None => w.cloud().import_image(&spec).await,
            }
        }
    }
    "the checksum is not looked at" fails [image_import_checksum] {
        import_image: |w, spec| w.cloud().import_image(&ImageSpec { sha256: None, ..spec }).await
    }
    "a wrong checksum is told and the image kept" fails [image_import_checksum] {
        import_image: |w, spec| {
            let result = w.cloud().import_image(&spec).await;
            if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Invalid) {
                w.cloud().import_image(&ImageSpec { sha256: None, ..spec }).await?;
            }
            result
        }
    }
    "a source that is not there is invalid" fails [image_import_missing] {
        import_image: |w, spec| swap(w.cloud().import_image(&spec).await, ErrorKind::NotFound, ErrorKind::Invalid)
    }
    "a source that is not there leaves an image" fails [image_import_missing] {
        import_image: |w, spec| {
            let result = w.cloud().import_image(&spec).await;
            if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound) {
                let there = ImageSource::File("/dev/null".into());
                w.cloud().import_image(&ImageSpec { source: there, sha256: None, ..spec }).await?;
            }
            result
        }
    }
    "import without the capability is called invalid" (less) fails [image_import_unsupported] {
        import_image: |w, spec| swap(w.cloud().import_image(&spec).await, ErrorKind::Unsupported, ErrorKind::Invalid)
    }
    "find ignores the owner" fails [image_find_filter] {
        find_images: |w, filter| w.cloud().find_images(&ImageFilter { owner: None, ..filter }).await
    }
    "find ignores the name" fails [image_find_filter] {
        find_images: |w, filter| w.cloud().find_images(&ImageFilter { name: None, ..filter }).await
    }
    "find takes a name for a beginning" fails [image_find_filter] {
        find_images: |w, filter| {
            let images = w.cloud().find_images(&ImageFilter { name: None, owner: filter.owner.clone() }).await?;
            let begins = |image: &Image| {
                filter.name.as_ref().is_none_or(|name| image.name.as_str().starts_with(name.as_str()))
            };
            Ok(images.into_iter().filter(begins).collect())
        }
    }
    "an image that does not exist is our own fault" fails [image_get_missing] {
        get_image: |w, id| match invented(id.as_uuid()) {
            true => Err(Error::internal("no such image")),
            false => w.cloud().get_image(id).await,
        }
    }
    "deleting an image does nothing" fails [image_delete_gone leaves_nothing] {
        delete_image: |w, id| match w.cloud().get_image(id).await {
            Ok(_) => Ok(Deletion::Deleted),
            Err(_) => Ok(Deletion::AlreadyGone),
        }
    }
    "deleting an image that is gone is an error" fails [image_delete_gone] {
        delete_image: |w, id| match w.cloud().delete_image(id).await? {
            Deletion::AlreadyGone => Err(Error::not_found("no such image")),
            deleted => Ok(deleted),
        }
    }
    "a captured image has another name" fails [image_capture_visible] {
        capture_vm: |w, (vm, name, tags)| w.cloud().capture_vm(vm, &renamed(&name), &tags).await
    }
    "what does not exist is captured as something else" fails [image_capture_missing] {
        capture_vm: |w, (vm, name, tags)| {
            let vm = if invented(vm.as_uuid()) { w.cloud().add_foreign_vm(&name) } else { vm };
            w.cloud().capture_vm(vm, &name, &tags).await
        }
    }
    "capture without the capability looks for the machine first" (less) fails [image_capture_unsupported] {
        capture_vm: |_, _| Err(Error::not_found("no such machine"))
    }
    "half of an image comes out" fails [image_export_roundtrip] {
        export_image: |w, (id, to)| {
            let size = w.cloud().export_image(id, &to).await?;
            let data = std::fs::read(&to).unwrap_or_default();
            std::fs::write(&to, &data[..data.len() / 2]).map_err(|error| Error::internal("io").with_source(error))?;
            Ok(size / 2)
        }
    }
    "an export tells no size" fails [image_export_roundtrip] {
        export_image: |w, (id, to)| w.cloud().export_image(id, &to).await.map(|_| 0)
    }
    "a refused export leaves a file" fails [image_export_missing] {
        export_image: |w, (id, to)| {
            std::fs::write(&to, b"").map_err(|error| Error::internal("io").with_source(error))?;
            w.cloud().export_image(id, &to).await
        }
    }
    "what does not exist is exported empty" fails [image_export_missing] {
        export_image: |w, (id, to)| match invented(id.as_uuid()) {
            true => Ok(0),
            false => w.cloud().export_image(id, &to).await,
        }
    }
    "export without the capability is fine" (less) fails [image_export_unsupported] {
        export_image: |_, _| Ok(0)
    }
}
