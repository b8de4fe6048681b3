//! A storage volume: a file in a pool's folder.

use ocr_core::{DiskFormat, Owner, Result, VmId};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{Quantity, read, write};

/// What a volume is, as its name tells. Names that are none of ours are templates that somebody put there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// A machine's disk.
    Disk {
        /// A digest of the owner's name.
        owner: String,
        /// The machine.
        vm: VmId,
    },
    /// The data of an image that we took in; visible only through its record.
    ImageData {
        /// The name of the record.
        record: String,
    },
    /// What we keep about an image, as JSON; the image exists once this is complete.
    ImageRecord,
    /// The disk of the guest that tries whether hardware virtualisation works.
    Probe,
    /// Anything else.
    Foreign,
}

impl Role {
    /// Reads a volume's name.
    pub fn of(name: &str) -> Self {
        if name.starts_with(IMAGE_PREFIX) {
            if name.ends_with(RECORD_SUFFIX) {
                return Self::ImageRecord;
            }
            if let Some((record, _)) = name.rsplit_once('-') {
                return Self::ImageData { record: format!("{record}{RECORD_SUFFIX}") };
            }
        }
        if name.starts_with(PROBE_PREFIX) {
            return Self::Probe;
        }
        let parts = || {
            let (owner, vm) = name.strip_prefix(DISK_PREFIX)?.strip_suffix(".qcow2")?.split_once('-')?;
            let fine = owner.len() == 8 && owner.bytes().all(|b| b.is_ascii_hexdigit());
            Some(Self::Disk { owner: fine.then(|| owner.to_owned())?, vm: vm.parse().ok()? })
        };
        parts().unwrap_or(Self::Foreign)
    }
}

const DISK_PREFIX: &str = "ocr-vm-";
const IMAGE_PREFIX: &str = "ocr-image-";
const PROBE_PREFIX: &str = "ocr-probe-";
const RECORD_SUFFIX: &str = ".json";

/// Eight hex digits for an owner.
pub fn owner_mark(owner: &Owner) -> String {
    Sha256::digest(owner.as_str().as_bytes()).iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

/// The name of a machine's disk. The machine is in it, so that no disk is left that nobody owns.
pub fn disk_name(owner: &Owner, vm: VmId) -> String {
    format!("{DISK_PREFIX}{}-{vm}.qcow2", owner_mark(owner))
}

/// The name of a probe's disk, and of its domain.
pub fn probe_name(id: Uuid) -> String {
    format!("{PROBE_PREFIX}{id}")
}

/// The name of the record of an owner's image: the same for every request, so that libvirt refuses the second.
pub fn image_record_name(owner: &Owner, name: &str) -> String {
    let digest = Sha256::digest(format!("{owner}\n{name}").as_bytes());
    let digest: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    format!("{IMAGE_PREFIX}{}-{digest}{RECORD_SUFFIX}", owner_mark(owner))
}

/// Whether a record is of one of this owner's images.
pub fn is_image_of(record: &str, owner: &Owner) -> bool {
    record.strip_prefix(IMAGE_PREFIX).is_some_and(|rest| rest.starts_with(&format!("{}-", owner_mark(owner))))
}

/// A fresh name for the data that a record stands for.
pub fn image_data_name(record: &str, format: DiskFormat) -> String {
    let stem = record.strip_suffix(RECORD_SUFFIX).unwrap_or(record);
    let fresh = Uuid::new_v4().simple().to_string();
    format!("{stem}-{}.{}", &fresh[..12], format_name(format))
}

/// The name that libvirt knows a format by.
pub fn format_name(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Qcow2 => "qcow2",
        DiskFormat::Raw => "raw",
    }
}

/// A volume to make.
#[derive(Clone, Debug)]
pub struct Volume<'a> {
    /// Its name in the pool.
    pub name: &'a str,
    /// How large the guest sees it, in bytes.
    pub capacity_bytes: u64,
    /// How its data is laid out.
    pub format: DiskFormat,
    /// What it is laid over: path and format. The format is always said: what is guessed, a guest can forge.
    pub backing: Option<(&'a str, DiskFormat)>,
}

impl Volume<'_> {
    /// The volume's XML.
    ///
    /// # Errors
    /// `Internal` when it cannot be written.
    pub fn xml(&self) -> Result<String> {
        write(&Written {
            name: self.name,
            capacity: Quantity::bytes(self.capacity_bytes),
            allocation: Quantity::bytes(0),
            target: WrittenTarget { format: Format { kind: format_name(self.format) } },
            backing: self
                .backing
                .map(|(path, format)| WrittenBacking { path, format: Format { kind: format_name(format) } }),
        })
    }
}

#[derive(Debug, Serialize)]
#[serde(rename = "volume")]
struct Written<'a> {
    name: &'a str,
    capacity: Quantity,
    allocation: Quantity,
    target: WrittenTarget,
    #[serde(rename = "backingStore", skip_serializing_if = "Option::is_none")]
    backing: Option<WrittenBacking<'a>>,
}

#[derive(Debug, Serialize)]
struct WrittenTarget {
    format: Format,
}

#[derive(Debug, Serialize)]
struct WrittenBacking<'a> {
    path: &'a str,
    format: Format,
}

#[derive(Debug, Serialize)]
struct Format {
    #[serde(rename = "@type")]
    kind: &'static str,
}

/// What we want to know of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its name in the pool.
    pub name: String,
    /// How large the guest sees it, in bytes.
    pub capacity_bytes: u64,
    /// What it takes up, in bytes.
    pub allocation_bytes: Option<u64>,
    /// Where it is on the hypervisor.
    pub path: String,
    /// How its data is laid out, when it is a format that we use.
    pub format: Option<DiskFormat>,
    /// The path of what it is laid over.
    pub backing: Option<String>,
    /// When it was written last, in seconds since 1970.
    pub modified_s: Option<u64>,
}

impl Seen {
    /// Reads a volume's XML.
    ///
    /// # Errors
    /// `Internal` when it makes no sense.
    pub fn parse(xml: &str) -> Result<Self> {
        let volume: ReadVolume = read(xml)?;
        let modified = volume.target.timestamps.and_then(|stamps| stamps.mtime);
        Ok(Self {
            name: volume.name,
            capacity_bytes: volume.capacity.and_then(|size| size.in_bytes("bytes")).unwrap_or(0),
            allocation_bytes: volume.allocation.and_then(|size| size.in_bytes("bytes")),
            path: volume.target.path,
            format: match volume.target.format.as_ref().map(|format| format.kind.as_str()) {
                Some("qcow2") => Some(DiskFormat::Qcow2),
                Some("raw") => Some(DiskFormat::Raw),
                _ => None,
            },
            backing: volume.backing.and_then(|backing| backing.path).filter(|path| !path.is_empty()),
            modified_s: modified.and_then(|text| text.split('.').next()?.parse().ok()),
        })
    }
}

#[derive(Debug, Deserialize)]
struct ReadVolume {
    name: String,
    capacity: Option<Quantity>,
    allocation: Option<Quantity>,
    target: ReadTarget,
    #[serde(rename = "backingStore")]
    backing: Option<ReadBacking>,
}

#[derive(Debug, Deserialize)]
struct ReadTarget {
    #[serde(default)]
    path: String,
    format: Option<ReadFormat>,
    timestamps: Option<ReadStamps>,
}

#[derive(Debug, Deserialize)]
struct ReadStamps {
    mtime: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ReadFormat {
    #[serde(rename = "@type")]
    kind: String,
}

#[derive(Debug, Deserialize)]
struct ReadBacking {
    path: Option<String>,
}

/// What we want to know of a pool.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Pool {
    /// `dir`, `logical` and so on.
    #[serde(rename = "@type")]
    pub kind: String,
    /// Its UUID.
    pub uuid: String,
}

impl Pool {
    /// Reads a pool's XML.
    ///
    /// # Errors
    /// `Internal` when it makes no sense.
    pub fn parse(xml: &str) -> Result<Self> {
        read(xml)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_names_the_format_of_what_it_is_laid_over() {
        let volume = Volume {
            name: "ocr-vm-1.qcow2",
            capacity_bytes: 1 << 30,
            format: DiskFormat::Qcow2,
            backing: Some(("/pool/a & b.img", DiskFormat::Raw)),
        };
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/volume-overlay.xml");
        let xml = volume.xml().unwrap();
        if std::env::var_os("OCR_UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, format!("{xml}\n")).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap().trim_end(), xml);
        let seen = Seen::parse(&xml).unwrap();
        assert_eq!((seen.capacity_bytes, seen.format), (1 << 30, Some(DiskFormat::Qcow2)));
        assert_eq!(seen.backing.as_deref(), Some("/pool/a & b.img"));
    }

    #[test]
    fn a_volume_of_libvirts_is_read() {
        let seen = Seen::parse(
            "<volume type='file'><name>g.qcow2</name><key>/p/g.qcow2</key><capacity unit='bytes'>100663296</capacity>
             <allocation unit='bytes'>25821184</allocation><physical unit='bytes'>25821184</physical>
             <target><path>/p/g.qcow2</path><format type='qcow2'/><permissions><mode>0644</mode></permissions>
             <timestamps><atime>1.5</atime><mtime>1700000000.123456</mtime></timestamps><compat>1.1</compat>
             </target></volume>",
        )
        .unwrap();
        assert_eq!((seen.capacity_bytes, seen.modified_s), (100_663_296, Some(1_700_000_000)));
        assert_eq!((seen.format, seen.backing), (Some(DiskFormat::Qcow2), None));
    }

    #[test]
    fn names_tell_what_a_volume_is() {
        let owner = Owner::new("o").unwrap();
        let vm = VmId::random();
        assert_eq!(Role::of(&disk_name(&owner, vm)), Role::Disk { owner: owner_mark(&owner), vm });
        let record = image_record_name(&owner, "debian");
        assert_eq!(Role::of(&record), Role::ImageRecord);
        assert_eq!(Role::of(&image_data_name(&record, DiskFormat::Raw)), Role::ImageData { record });
        assert_eq!(Role::of(&probe_name(Uuid::nil())), Role::Probe);
        for foreign in ["debian.qcow2", "ocr-vm-x.qcow2", "ocr-vm-zzzzzzzz-1.qcow2", "ocr-vm-.qcow2", ""] {
            assert_eq!(Role::of(foreign), Role::Foreign, "{foreign}");
        }
    }
}
