//! Files as one stream: shell text that says where they go, then their contents.

use std::{collections::BTreeMap, fmt::Write as _, io::Write as _};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use sha2::{Digest, Sha256};

use super::runner::quote;
use crate::{Error, PutFile, Result};

/// The most files that the guest's programs get as arguments at once.
const GROUP_FILES: usize = 500;

/// What is shorter is not worth a program in the guest, in bytes.
const WORTH_PACKING: usize = 16 << 10;

/// So much is packed to see whether it pays, in bytes.
const SAMPLE: usize = 64 << 10;

/// What is longer is not packed or summed up on a thread that others wait for, in bytes.
const LONG: u64 = 256 << 10;

/// Files in the order in which they are sent: by folder, and by what is done to them.
#[derive(Clone, Debug)]
pub(super) struct Bundle {
    files: Vec<PutFile>,
    text: String,
}

/// What is sent.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    pub(super) parts: Vec<Bytes>,
    pub(super) packed: bool,
    /// Of all of it, unpacked.
    pub(super) sha256: String,
    /// How long the shell text is.
    pub(super) head_bytes: usize,
}

impl Stream {
    pub(super) fn bytes(&self) -> usize {
        self.parts.iter().map(Bytes::len).sum()
    }
}

/// What asks the guest whether it has the files already.
#[derive(Clone, Debug)]
pub(super) struct List {
    pub(super) bytes: Vec<u8>,
    /// How long the shell text is; a list for `sha256sum -c` follows.
    pub(super) head_bytes: usize,
}

/// Folder and name of an absolute path.
fn split(path: &str) -> (&str, &str) {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    (if folder.is_empty() { "/" } else { folder }, name)
}

fn mode(file: &PutFile) -> u32 {
    file.mode.unwrap_or(0o644)
}

impl Bundle {
    pub(super) fn of(files: &[PutFile]) -> Self {
        type Kind<'a> = (&'a str, bool, u32, Option<&'a str>);
        let mut groups: BTreeMap<Kind<'_>, Vec<&PutFile>> = BTreeMap::new();
        for file in files {
            let kind = (split(&file.path).0, file.make_parents, mode(file), file.owner.as_deref());
            groups.entry(kind).or_default().push(file);
        }
        let (mut ordered, mut sizes, mut text) = (Vec::new(), String::new(), String::new());
        for ((folder, parents, mode, owner), files) in groups {
            for files in files.chunks(GROUP_FILES) {
                text.push_str("g ");
                quote(&mut text, folder);
                // Writing to a string cannot fail.
                let _ = write!(text, " {} {mode:o} ", u8::from(parents));
                quote(&mut text, owner.unwrap_or_default());
                for file in files {
                    text.push(' ');
                    quote(&mut text, &format!("./{}", split(&file.path).1));
                    let _ = write!(sizes, "{} ", file.content.len());
                    ordered.push((*file).clone());
                }
                text.push('\n');
            }
        }
        // The end is no line feed: a shell drops those.
        Self { files: ordered, text: format!("sizes='{sizes}'\n{text}true") }
    }

    /// The file of this number in the order in which they are sent.
    pub(super) fn file(&self, number: u64) -> Option<&PutFile> {
        self.files.get(usize::try_from(number).ok()?)
    }

    pub(super) async fn stream(&self, pack: bool) -> Result<Stream> {
        let long = self.files.iter().map(|file| file.content.len() as u64).sum::<u64>() > LONG;
        if !long {
            return self.stream_here(pack);
        }
        let bundle = self.clone();
        match tokio::task::spawn_blocking(move || bundle.stream_here(pack)).await {
            Ok(stream) => stream,
            Err(cause) => Err(Error::internal("packing files did not end").with_source(cause)),
        }
    }

    fn stream_here(&self, pack: bool) -> Result<Stream> {
        let mut parts = vec![Bytes::from(self.text.clone())];
        parts.extend(self.files.iter().map(|file| file.content.clone()).filter(|content| !content.is_empty()));
        let mut digest = Sha256::new();
        parts.iter().for_each(|part| digest.update(part));
        let sha256 = hex(&digest.finalize());
        let bytes: usize = parts.iter().map(Bytes::len).sum();
        let packed = if pack && bytes > WORTH_PACKING { packed(&parts, bytes) } else { None };
        let (parts, packed) = match packed {
            Some(packed) => (vec![packed], true),
            None => (parts, false),
        };
        Ok(Stream { parts, packed, sha256, head_bytes: self.text.len() })
    }

    /// `None` when a name cannot stand in such a list, or there is nothing to ask about.
    pub(super) fn list(&self) -> Option<List> {
        if self.files.is_empty() || self.files.iter().any(|file| file.path.contains(['\n', '\r', '\\'])) {
            return None;
        }
        let mut kinds: BTreeMap<(u32, Option<&str>), Vec<&PutFile>> = BTreeMap::new();
        for file in &self.files {
            kinds.entry((mode(file), file.owner.as_deref())).or_default().push(file);
        }
        let mut text = String::new();
        for ((mode, owner), files) in kinds {
            for files in files.chunks(GROUP_FILES) {
                let _ = write!(text, "same {mode:o} ");
                quote(&mut text, owner.unwrap_or_default());
                for file in files {
                    text.push(' ');
                    quote(&mut text, &file.path);
                }
                text.push('\n');
            }
        }
        text.push_str("true");
        let head_bytes = text.len();
        for file in &self.files {
            let _ = writeln!(text, "{}  {}", hex(&Sha256::digest(&file.content)), file.path);
        }
        Some(List { bytes: text.into_bytes(), head_bytes })
    }
}

/// All parts packed, when that makes them a good deal shorter.
fn packed(parts: &[Bytes], bytes: usize) -> Option<Bytes> {
    // A piece out of the middle tells more of a whole than its beginning, which is often unlike the rest.
    let mut sample = Vec::with_capacity(SAMPLE);
    let mut skip = bytes.saturating_sub(SAMPLE) / 2;
    for part in parts {
        let from = skip.min(part.len());
        skip -= from;
        let to = part.len().min(from + SAMPLE - sample.len());
        sample.extend_from_slice(&part[from..to]);
    }
    let pays = |packed: usize, whole: usize| packed < whole / 10 * 8;
    if !pays(gzip(&[Bytes::from(sample.clone())])?.len(), sample.len()) {
        return None;
    }
    let packed = gzip(parts)?;
    pays(packed.len(), bytes).then(|| packed.into())
}

fn gzip(parts: &[Bytes]) -> Option<Vec<u8>> {
    // A guest's agent takes a few megabytes a second at best: packing well pays more than packing fast.
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(6));
    // Writing to memory cannot fail.
    parts.iter().try_for_each(|part| encoder.write_all(part)).ok()?;
    encoder.finish().ok()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Shell text that names paths, in as many texts as it takes to keep each within the limit, and at least one.
pub(super) fn paths(paths: &[String], limit_bytes: usize) -> Vec<(String, &[String])> {
    const END: &str = "true\n#ocr";
    let mut texts = Vec::new();
    let mut rest = paths;
    loop {
        let (mut text, mut count) = (String::new(), 0);
        for path in rest.iter().take(GROUP_FILES) {
            let mut word = String::new();
            quote(&mut word, path);
            if count > 0 && text.len() + word.len() + END.len() + 4 > limit_bytes {
                break;
            }
            text.push_str(if count == 0 { "g " } else { " " });
            text.push_str(&word);
            count += 1;
        }
        if count > 0 {
            text.push('\n');
        }
        text.push_str(END);
        let (these, others) = rest.split_at(count);
        texts.push((text, these));
        rest = others;
        if rest.is_empty() {
            return texts;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_path_is_in_one_text_and_texts_keep_to_the_limit(
            all in proptest::collection::vec("/[a-z' ]{1,30}", 0..1200), limit_bytes in 100_usize..5000,
        ) {
            let texts = paths(&all, limit_bytes);
            prop_assert!(!texts.is_empty());
            let named: Vec<_> = texts.iter().flat_map(|(_, these)| these.iter().cloned()).collect();
            prop_assert_eq!(&named, &all);
            for (text, these) in texts {
                prop_assert!(these.len() <= GROUP_FILES && (text.len() <= limit_bytes || these.len() == 1), "{}", text.len());
                prop_assert!(text.ends_with("true\n#ocr"));
            }
        }

        #[test]
        fn contents_come_in_the_order_of_the_sizes_and_of_the_numbers(
            sizes in proptest::collection::vec((0_usize..50, 0_u32..3, 0_u8..4), 0..40),
        ) {
            let file = |(i, (size, mode, folder)): (usize, &(usize, u32, u8))| PutFile {
                mode: Some(0o600 + mode), ..PutFile::new(format!("/{folder}/{i}"), vec![i as u8; *size])
            };
            let files: Vec<_> = sizes.iter().enumerate().map(file).collect();
            let bundle = Bundle::of(&files);
            let stream = bundle.stream_here(false).unwrap();
            let whole = stream.parts.concat();
            let text = std::str::from_utf8(&whole[..stream.head_bytes]).unwrap();
            let mut rest = &whole[stream.head_bytes..];
            let sizes = text.strip_prefix("sizes='").unwrap().split('\'').next().unwrap();
            let mut number = 0;
            for size in sizes.split_whitespace() {
                let (content, behind) = rest.split_at(size.parse().unwrap());
                prop_assert_eq!(content, &bundle.file(number).unwrap().content[..]);
                (rest, number) = (behind, number + 1);
            }
            prop_assert!(rest.is_empty() && bundle.file(number).is_none() && number == files.len() as u64);
        }
    }

    #[test]
    fn only_what_becomes_shorter_is_packed() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        let noise: Vec<u8> = (0..200_000).map(|_| next()).collect();
        let packed = |content: Vec<u8>| Bundle::of(&[PutFile::new("/f", content)]).stream_here(true).unwrap();
        assert!(!packed(noise).packed && !packed(b"short".to_vec()).packed);
        let text = packed(b"line of text\n".repeat(20_000));
        assert!(text.packed && text.bytes() < 10_000);
    }
}
