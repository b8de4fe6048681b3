//! What must be known of a QCOW2 file before it is let in: its header, read by ourselves.
//!
//! A header can name other files of the hypervisor as its base or its data. QEMU would open them and hand them to
//! the guest, so an image that names any is refused.

use ocr_core::{Error, Result};

/// How much of a file [`virtual_size`] needs.
pub(crate) const HEADER_BYTES: usize = 104;

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// The incompatible feature «data is in another file».
const EXTERNAL_DATA: u64 = 1 << 2;
/// More is no image but an attack on the disk.
const MAX_VIRTUAL_BYTES: u64 = 64 << 40;

/// Checks a header and returns how large the guest will see the disk, in bytes.
pub(crate) fn virtual_size(header: &[u8]) -> Result<u64> {
    let wrong = |why: &str| Error::invalid("image", why);
    let number = |at: usize| header.get(at..at + 8)?.try_into().ok().map(u64::from_be_bytes);
    if header.get(..4) != Some(&MAGIC) {
        return Err(wrong("is not QCOW2, though it is said to be"));
    }
    let version = header.get(4..8).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
    let incompatible = match version {
        Some(2) => 0,
        Some(3) => number(72).ok_or_else(|| wrong("is cut off within its header"))?,
        _ => return Err(wrong("is QCOW2 of a version that is not known")),
    };
    if number(8) != Some(0) {
        return Err(wrong("is laid over another file; flatten it first"));
    }
    if incompatible & EXTERNAL_DATA != 0 {
        return Err(wrong("keeps its data in another file; put it into one first"));
    }
    match number(24) {
        Some(size) if (1..=MAX_VIRTUAL_BYTES).contains(&size) => Ok(size),
        Some(size) => Err(Error::invalid("image", format_args!("says that its disk is {size} bytes large"))),
        None => Err(wrong("is cut off within its header")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(version: u32, backing: u64, size: u64, features: u64) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&version.to_be_bytes());
        bytes[8..16].copy_from_slice(&backing.to_be_bytes());
        bytes[24..32].copy_from_slice(&size.to_be_bytes());
        bytes[72..80].copy_from_slice(&features.to_be_bytes());
        bytes
    }

    #[test]
    fn a_plain_image_is_let_in() {
        assert_eq!(virtual_size(&header(3, 0, 1 << 30, 0)).unwrap(), 1 << 30);
        assert_eq!(virtual_size(&header(2, 0, 1 << 30, 0xff)).unwrap(), 1 << 30, "version 2 has no features");
    }

    #[test]
    fn images_that_name_other_files_are_refused() {
        for (bytes, why) in [
            (header(3, 512, 1 << 30, 0), "laid over"),
            (header(3, 0, 1 << 30, EXTERNAL_DATA), "in another file"),
            (header(4, 0, 1 << 30, 0), "version"),
            (header(3, 0, 0, 0), "0 bytes"),
            (header(3, 0, u64::MAX, 0), "large"),
            (b"MZ".to_vec(), "not QCOW2"),
        ] {
            assert!(virtual_size(&bytes).unwrap_err().to_string().contains(why), "{why}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(mut bytes in proptest::collection::vec(any::<u8>(), 0..120), real: bool) {
            if real && bytes.len() >= 4 {
                bytes[..4].copy_from_slice(&MAGIC);
            }
            let _ = virtual_size(&bytes);
        }
    }
}
