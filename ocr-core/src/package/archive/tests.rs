use std::collections::BTreeMap;

use flate2::{Compression, write::GzEncoder};
use proptest::prelude::*;

use super::*;
use crate::{
    ErrorKind,
    package::tests::{feature, paths},
};

const FILE: u8 = b'0';
const FOLDER: u8 = b'5';

/// One entry, whatever is wrong with it.
fn entry_of(name: &[u8], kind: u8, size: u64, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_entry_type(EntryType::new(kind));
    header.set_mode(0o644);
    header.set_size(size);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn entry(name: &str, kind: u8, content: &[u8]) -> Vec<u8> {
    entry_of(name.as_bytes(), kind, content.len() as u64, content)
}

fn link(name: &str, kind: u8, target: &str) -> Vec<u8> {
    let mut bytes = entry(name, kind, b"");
    let header = tar::Header::from_byte_slice(&bytes[..512]).clone();
    let mut header = header;
    header.set_link_name_literal(target).unwrap();
    header.set_cksum();
    bytes.copy_from_slice(header.as_bytes());
    bytes
}

fn pax(kind: u8, records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut content = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let length =
            (1..).map(|digits| rest + digits).find(|length| length.to_string().len() + rest == *length).unwrap();
        content.extend_from_slice(format!("{length} {key}=").as_bytes());
        content.extend_from_slice(value);
        content.push(b'\n');
    }
    entry("pax", kind, &content)
}

fn gnu_long(kind: u8, text: &[u8]) -> Vec<u8> {
    entry("././@LongLink", kind, &[text, b"\0"].concat())
}

fn archive(entries: &[Vec<u8>]) -> Vec<u8> {
    [entries.concat(), vec![0; 1024]].concat()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// As many zeros as one wants, in a small gzip: one member again and again.
fn zeros(mib: usize) -> Vec<u8> {
    gzip(&vec![0; 1 << 20]).repeat(mib)
}

struct Rig {
    outer: TempDir,
}

impl Rig {
    fn new() -> Self {
        let outer = TempDir::new().unwrap();
        fs::create_dir(outer.path().join("work")).unwrap();
        fs::write(outer.path().join("secret"), "untouched").unwrap();
        Self { outer }
    }

    fn work(&self) -> PathBuf {
        self.outer.path().join("work")
    }

    async fn unpack_with(&self, bytes: &[u8], limits: UnpackLimits) -> Result<Unpacked> {
        let path = self.outer.path().join("archive");
        fs::write(&path, bytes).unwrap();
        unpack(path, Some(&self.work()), limits).await
    }

    async fn unpack(&self, bytes: &[u8]) -> Result<Unpacked> {
        self.unpack_with(bytes, UnpackLimits::default()).await
    }

    /// Nothing is left of any unpacking, and nothing else was touched.
    async fn assert_clean(&self) {
        // What is dropped in a task is removed by another thread.
        while fs::read_dir(self.work()).unwrap().count() > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.assert_outside_is_untouched();
    }

    fn assert_outside_is_untouched(&self) {
        let mut names: Vec<_> = fs::read_dir(self.outer.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["archive", "secret", "work"]);
        assert_eq!(fs::read_to_string(self.outer.path().join("secret")).unwrap(), "untouched");
    }
}

/// All files below a folder, and folders with a `/` at the end.
fn tree(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            let metadata = fs::symlink_metadata(&path).unwrap();
            assert!(metadata.is_dir() || metadata.is_file(), "{name} is a link or worse");
            if metadata.is_dir() {
                found.insert(name + "/", Vec::new());
                folders.push(path);
            } else {
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    found
}

fn good() -> Vec<u8> {
    archive(&[
        entry("./", FOLDER, b""),
        entry("package.toml", FILE, b"[package]"),
        entry("src/a/b.sh", FILE, b"one"),
        entry("src/", FOLDER, b""),
        entry("./src/empty", FILE, b""),
    ])
}

fn good_tree() -> BTreeMap<String, Vec<u8>> {
    [("package.toml", "[package]"), ("src/", ""), ("src/a/", ""), ("src/a/b.sh", "one"), ("src/empty", "")]
        .into_iter()
        .map(|(name, content)| (name.to_owned(), content.as_bytes().to_vec()))
        .collect()
}

#[tokio::test]
async fn an_archive_is_unpacked_whole_stored_or_in_any_number_of_members() {
    let rig = Rig::new();
    let plain = good();
    let members = plain.chunks(100).map(gzip).collect::<Vec<_>>().concat();
    for bytes in [plain.clone(), gzip(&plain), members] {
        let unpacked = rig.unpack(&bytes).await.unwrap();
        assert_eq!(tree(unpacked.root()), good_tree());
        assert_eq!(unpacked.digest(), hex(&Sha256::digest(&bytes)));
        drop(unpacked);
        rig.assert_clean().await;
    }
}

#[tokio::test]
async fn long_names_of_both_sorts_are_read() {
    let rig = Rig::new();
    let long = ["d".repeat(120), "e".repeat(120)].join("/");
    for described in
        [gnu_long(b'L', long.as_bytes()), pax(b'x', &[("mtime", b"1.5"), ("path", long.as_bytes()), ("size", b"3")])]
    {
        let bytes = archive(&[pax(b'g', &[("comment", b"a commit")]), described, entry("short", FILE, b"abc")]);
        let unpacked = rig.unpack(&bytes).await.unwrap();
        assert_eq!(fs::read(unpacked.root().join(&long)).unwrap(), b"abc");
        assert!(!unpacked.root().join("short").exists());
    }
}

#[cfg(unix)]
#[tokio::test]
async fn only_plain_rights_are_kept() {
    use std::os::unix::fs::PermissionsExt;
    let rig = Rig::new();
    let file = |name: &str, mode| {
        let bytes = entry(name, FILE, b"");
        let mut header = tar::Header::from_byte_slice(&bytes).clone();
        header.set_mode(mode);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let bytes = archive(&[file("suid", 0o6777), file("none", 0), file("plain", 0o640)]);
    let unpacked = rig.unpack(&bytes).await.unwrap();
    let mode = |name| fs::metadata(unpacked.root().join(name)).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode("suid") & !0o755, 0);
    assert_eq!(mode("suid") & 0o700, 0o700);
    assert_eq!(mode("none"), 0o600);
    assert_eq!(mode("plain") & !0o640, 0);
}

#[tokio::test]
async fn evil_archives_are_refused_and_leave_nothing() {
    let rig = Rig::new();
    let file = |name: &str| archive(&[entry(name, FILE, b"x")]);
    let named = |name: &[u8]| archive(&[pax(b'x', &[("path", name)]), entry("a", FILE, b"x")]);
    let kind = |kind: u8| archive(&[entry("a", kind, b"")]);
    let cut = |mut bytes: Vec<u8>, at: usize| {
        bytes.truncate(at);
        bytes
    };
    let spoiled = |mut bytes: Vec<u8>, at: usize| {
        bytes[at] ^= 0x55;
        bytes
    };
    let huge = |name: &str, kind| archive(&[entry_of(name.as_bytes(), kind, 7 << 30, b"x")]);
    let good = good();
    let packed = gzip(&good);
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("an absolute path", file("/etc/x"), "is an absolute path"),
        ("an absolute path of Windows", file("C:/x"), "is an absolute path"),
        ("a path that climbs out", file("../x"), "climbs out"),
        ("a path that climbs out later", file("a/../../x"), "climbs out"),
        ("a path that climbs but stays", file("a/../x"), "climbs out"),
        ("a folder that climbs out", archive(&[entry("..", FOLDER, b"")]), "climbs out"),
        ("a path for Windows that climbs out", file("..\\x"), "has a \\ in its path"),
        ("a pax path that climbs out", named(b"../x"), "climbs out"),
        ("an absolute pax path", named(b"/etc/x"), "is an absolute path"),
        ("a pax path with NUL", named(b"a\0/../../x"), "has a control character"),
        ("a pax path of nothing", named(b""), "names no file"),
        ("a pax path not in UTF-8", named(b"\xff"), "not UTF-8"),
        ("a GNU path that climbs out", archive(&[gnu_long(b'L', b"../x"), entry("a", FILE, b"")]), "climbs out"),
        ("a name not in UTF-8", archive(&[entry_of(b"a\xff", FILE, 0, b"")]), "not UTF-8"),
        ("a name with a line feed", file("a\nb"), "has a control character"),
        ("no name", file(""), "names no file"),
        ("a path too deep", file(&vec!["a"; 33].join("/")), "lies too deep"),
        ("a path too long", named("abc/".repeat(1025).trim_end_matches('/').as_bytes()), "is too long a path"),
        ("a GNU name too long", archive(&[gnu_long(b'L', &[b'a'; 5000]), entry("a", FILE, b"")]), "too long a name"),
        ("a part of a path too long", named("a".repeat(256).as_bytes()), "has too long a name in its path"),
        (
            "a pax header too long",
            archive(&[pax(b'x', &[("comment", &[b'a'; 70_000])]), entry("a", FILE, b"")]),
            "too long a name",
        ),
        ("a symbolic link", archive(&[link("a", b'2', "/etc/passwd")]), "is a link"),
        ("a hard link", archive(&[link("a", b'1', "../secret")]), "is a link"),
        ("a link to write through", archive(&[link("a", b'2', ".."), entry("a/x", FILE, b"x")]), "is a link"),
        ("a GNU long link", archive(&[gnu_long(b'K', b"../secret"), link("a", b'2', "x")]), "is a link"),
        ("a pax link", archive(&[pax(b'x', &[("linkpath", b"/etc")]), entry("a", FILE, b"")]), "has a link"),
        ("a character device", kind(b'3'), "is neither"),
        ("a block device", kind(b'4'), "is neither"),
        ("a pipe", kind(b'6'), "is neither"),
        ("a contiguous file", kind(b'7'), "is neither"),
        ("a part of another volume", kind(b'M'), "is neither"),
        ("a label", kind(b'V'), "is neither"),
        ("an unknown kind", kind(b'Z'), "is neither"),
        ("a sparse file", kind(b'S'), "is a sparse file"),
        (
            "a sparse file by pax",
            archive(&[pax(b'x', &[("GNU.sparse.size", b"99999999999")]), entry("a", FILE, b"")]),
            "has a sparse file",
        ),
        ("two sizes", archive(&[pax(b'x', &[("size", b"0")]), entry("a", FILE, b"hidden")]), "has two sizes"),
        ("one name for all", archive(&[pax(b'g', &[("path", b"b")]), entry("a", FILE, b"")]), "to all entries"),
        (
            "two names",
            archive(&[gnu_long(b'L', b"b"), pax(b'x', &[("path", b"c")]), entry("a", FILE, b"")]),
            "names an entry twice",
        ),
        (
            "two pax names",
            archive(&[pax(b'x', &[("path", b"b"), ("path", b"c")]), entry("a", FILE, b"")]),
            "damaged description",
        ),
        (
            "a pax record that lies",
            archive(&[entry("pax", b'x', b"99 path=a\n"), entry("a", FILE, b"")]),
            "damaged description",
        ),
        (
            "a pax record of length 0",
            archive(&[entry("pax", b'x', b"0 path=a\n"), entry("a", FILE, b"")]),
            "damaged description",
        ),
        ("a name for nothing", archive(&[gnu_long(b'L', b"b")]), "ends too early"),
        ("a file twice", archive(&[entry("a", FILE, b"1"), entry("./a", FILE, b"2")]), "is there twice"),
        ("a folder twice", archive(&[entry("a", FOLDER, b""), entry("a/", FOLDER, b"")]), "is there twice"),
        ("a file as a folder", archive(&[entry("a", FILE, b"1"), entry("a/b", FILE, b"2")]), "is a file and a folder"),
        ("a folder as a file", archive(&[entry("a/b", FILE, b"1"), entry("a", FILE, b"2")]), "is there twice"),
        ("a file with the name of a folder", file("a/"), "is a file with the name of a folder"),
        ("a folder with content", archive(&[entry("a", FOLDER, b"x")]), "is a folder with content"),
        ("a wrong checksum", spoiled(file("abc"), 1), "is damaged"),
        ("a size that is no number", spoiled(file("abc"), 130), "is damaged"),
        ("too many descriptions", gzip(&archive(&vec![pax(b'g', &[]); 30_001])), "more than 10000"),
        ("a file of 7 GiB that is not there", huge("a", FILE), "ends too early"),
        ("a GNU name of 7 GiB", huge("a", b'L'), "too long a name"),
        ("a pax header of 7 GiB", huge("a", b'x'), "too long a name"),
        ("nothing", Vec::new(), "is empty"),
        ("text", b"hello, this is no archive".repeat(30), "is damaged"),
        ("text in gzip", gzip(&b"hello, this is no archive".repeat(30)), "is damaged"),
        ("gzip of nothing", gzip(b""), "ends too early"),
        ("zip", b"PK\x03\x04".repeat(200), "is damaged"),
        ("cut in a file", cut(file("a"), 512), "ends too early"),
        ("cut in a header", cut(good.clone(), 700), "is damaged"),
        ("cut before the mark of the end", cut(good.clone(), good.len() - 1024), "ends too early"),
        ("cut gzip", cut(packed.clone(), packed.len() - 20), "ends too early"),
        ("cut checksum of gzip", cut(packed.clone(), packed.len() - 4), "ends too early"),
        ("spoiled checksum of gzip", spoiled(packed.clone(), packed.len() - 6), "is damaged"),
        ("more after the end", [good.clone(), entry("late", FILE, b"x")].concat(), "goes on after its end"),
        ("more after the end of gzip", [packed.clone(), b"junk".repeat(10)].concat(), "is damaged"),
        ("an archive after the archive", [packed.clone(), packed.clone()].concat(), "goes on after its end"),
        (
            "a bomb in a file",
            [gzip(&entry_of(b"a", FILE, 7 << 30, b"")), zeros(7 << 10)].concat(),
            "more than 200 times",
        ),
        ("a bomb of 10 GiB after the end", [packed.clone(), zeros(10 << 10)].concat(), "more than 200 times"),
        (
            "a bomb of files",
            (0..40)
                .flat_map(|n| [gzip(&entry_of(n.to_string().as_bytes(), FILE, 1 << 20, b"")), zeros(1)].concat())
                .collect(),
            "more than 200 times",
        ),
    ];
    assert!(cases.len() > 60);
    for (label, bytes, wanted) in cases {
        let error = rig.unpack(&bytes).await.map(drop).expect_err(label);
        assert_eq!(error.kind(), ErrorKind::Invalid, "{label}: {error}");
        assert!(error.message().starts_with("package archive: "), "{label}: {error}");
        assert!(error.message().contains(wanted), "{label}: {error}");
        assert!(error.to_string().len() < 400, "{label}: {error}");
        assert_eq!(fs::read_dir(rig.work()).unwrap().count(), 0, "{label}: it is gone when the error comes");
        rig.assert_outside_is_untouched();
    }
}

#[tokio::test]
async fn limits_are_kept_exactly() {
    let rig = Rig::new();
    let bytes = good();
    let limits = UnpackLimits {
        entries: 5,
        total_bytes: bytes.len() as u64,
        archive_bytes: bytes.len() as u64,
        ..UnpackLimits::default()
    };
    assert!(rig.unpack_with(&bytes, limits).await.is_ok());
    for (limits, wanted) in [
        (UnpackLimits { entries: 4, ..limits }, "more than 4 files and folders"),
        (UnpackLimits { total_bytes: limits.total_bytes - 1, ..limits }, "unpacks to more than"),
        (UnpackLimits { archive_bytes: limits.archive_bytes - 1, ..limits }, "is larger than"),
        (UnpackLimits { depth: 2, ..limits }, "lies too deep"),
        (UnpackLimits { path_bytes: 11, ..limits }, "is too long a path"),
    ] {
        let error = rig.unpack_with(&bytes, limits).await.unwrap_err();
        assert!(error.message().contains(wanted), "{error}");
    }
    rig.assert_clean().await;
}

#[tokio::test]
async fn a_missing_archive_or_work_folder_is_named() {
    let rig = Rig::new();
    let error = unpack(rig.outer.path().join("none"), None, UnpackLimits::default()).await.unwrap_err();
    assert_eq!((error.kind(), error.message()), (ErrorKind::NotFound, "there is no such archive"));
    let error = unpack(rig.work(), None, UnpackLimits::default()).await.unwrap_err();
    assert_eq!(error.message(), "package archive: is not a file");
    fs::remove_dir(rig.work()).unwrap();
    let error = rig.unpack(&good()).await.unwrap_err();
    assert!(error.message().contains("work: it is gone"), "{error}");
}

#[test]
fn a_walk_that_is_given_up_ends_between_two_reads() {
    let rig = Rig::new();
    let path = rig.outer.path().join("archive");
    let file = vec![1; 1 << 20];
    fs::write(&path, archive(&[entry("a", FILE, &file), entry("b", FILE, &file)])).unwrap();
    let (limits, cancel) = (UnpackLimits::default(), CancellationToken::new());
    let source = Source::open(&path, &limits, cancel.clone()).unwrap();
    let mut seen = Vec::new();
    let error = walk(source, &limits, |member, _| {
        seen.push(member.path.clone());
        cancel.cancel();
        Ok(ControlFlow::<()>::Continue(()))
    })
    .map(drop)
    .unwrap_err();
    assert_eq!((error.kind(), error.message()), (ErrorKind::Unavailable, "unpacking was given up"));
    assert_eq!(seen, [Path::new("a")]);
}

#[tokio::test]
async fn a_future_that_is_dropped_leaves_nothing() {
    let rig = Rig::new();
    let file = vec![1; 1 << 20];
    let bytes = archive(&(0..50).map(|n| entry(&n.to_string(), FILE, &file)).collect::<Vec<_>>());
    let mut unpacking = Box::pin(rig.unpack(&bytes));
    assert!(futures::poll!(&mut unpacking).is_pending());
    drop(unpacking);
    rig.assert_clean().await;
}

#[tokio::test]
async fn what_a_killed_process_left_is_removed_and_what_lives_is_not() {
    let rig = Rig::new();
    let living = rig.unpack(&good()).await.unwrap();
    let left = rig.work().join(format!("{PREFIX}left"));
    fs::create_dir_all(left.join(CONTENT)).unwrap();
    fs::write(left.join(LOCK), "").unwrap();
    fs::write(left.join(CONTENT).join("file"), "x").unwrap();
    let young = rig.work().join(format!("{PREFIX}young"));
    let foreign = rig.work().join("something else");
    fs::create_dir(&young).unwrap();
    fs::create_dir(&foreign).unwrap();
    let second = rig.unpack(&good()).await.unwrap();
    assert!(!left.exists());
    assert!(young.exists() && foreign.exists());
    assert_eq!(tree(living.root()), good_tree());
    assert_eq!(tree(second.root()), good_tree());
}

#[test]
fn the_manifest_is_read_without_unpacking() {
    let rig = Rig::new();
    let path = rig.outer.path().join("archive");
    let limits = UnpackLimits::default();
    let mut bytes = gzip(&good());
    fs::write(&path, &bytes).unwrap();
    assert_eq!(manifest_text(&path, &limits).unwrap(), "[package]");
    assert_eq!(file_digest(&path, &limits).unwrap(), hex(&Sha256::digest(&bytes)));
    bytes.truncate(10);
    for (bytes, wanted) in [
        (archive(&[entry("a/package.toml", FILE, b"")]), "there is no package.toml at the top of the archive"),
        (archive(&[entry("package.toml", FILE, &vec![b' '; (1 << 20) + 1])]), "package.toml wants at most"),
        (archive(&[entry("package.toml", FILE, b"\xff")]), "package.toml: wants text in UTF-8"),
        (bytes, "ends too early"),
    ] {
        fs::write(&path, bytes).unwrap();
        let error = manifest_text(&path, &limits).unwrap_err();
        assert!(error.message().contains(wanted), "{error}");
    }
    rig.assert_outside_is_untouched();
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn any_names_stay_inside_or_are_refused(names in proptest::collection::vec((paths(), any::<bool>(), 0..3u8), 1..6)) {
        let entries: Vec<_> = names
            .iter()
            .map(|(name, is_folder, how)| {
                let kind = if *is_folder { FOLDER } else { FILE };
                match how {
                    0 if name.len() <= 100 => entry(name, kind, b""),
                    1 => [gnu_long(b'L', name.as_bytes()), entry("short", kind, b"")].concat(),
                    _ => [pax(b'x', &[("path", name.as_bytes())]), entry("short", kind, b"")].concat(),
                }
            })
            .collect();
        let rig = Rig::new();
        runtime().block_on(async {
            if let Ok(unpacked) = rig.unpack(&archive(&entries)).await {
                // It looks for links too.
                tree(unpacked.root());
            }
            rig.assert_clean().await;
        });
    }

    #[test]
    fn any_split_into_members_gives_the_same(cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..6)) {
        let plain = good();
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(plain.len())).chain([0, plain.len()]).collect();
        cuts.sort();
        let bytes: Vec<u8> = cuts.windows(2).flat_map(|cut| gzip(&plain[cut[0]..cut[1]])).collect();
        let rig = Rig::new();
        let unpacked = runtime().block_on(rig.unpack(&bytes)).unwrap();
        prop_assert_eq!(tree(unpacked.root()), good_tree());
    }

    #[test]
    fn spoiled_archives_neither_panic_nor_reach_out(
        spoils in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
        packed in any::<bool>(),
        repair in any::<bool>(),
    ) {
        let mut bytes = archive(&[
            pax(b'x', &[("path", b"src/a"), ("size", b"3")]),
            entry("a", FILE, b"one"),
            gnu_long(b'L', b"src/b"),
            entry("b", FILE, b"two"),
            entry("c/", FOLDER, b""),
        ]);
        if packed && !repair {
            bytes = gzip(&bytes);
        }
        for (at, byte) in spoils {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if repair {
            // With the checksums right again the spoiled fields themselves are read.
            for block in bytes.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
                let mut header = tar::Header::from_byte_slice(block).clone();
                header.set_cksum();
                block.copy_from_slice(header.as_bytes());
            }
            if packed {
                bytes = gzip(&bytes);
            }
        }
        let rig = Rig::new();
        runtime().block_on(async {
            if let Ok(unpacked) = rig.unpack(&bytes).await {
                tree(unpacked.root());
            }
            rig.assert_clean().await;
        });
    }

    #[test]
    fn any_pax_header_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..60), text in "[0-9]{0,3} ?(path|size|x)?=?[a-z0-9]{0,5}\n?") {
        let _ = Pax::parse(&bytes);
        let _ = Pax::parse(text.as_bytes());
    }
}

#[tokio::test]
async fn an_archive_opens_as_a_package_and_its_files_go_with_it() {
    let rig = Rig::new();
    let files: Vec<_> =
        feature("web", "1.0.0").iter().map(|(path, content)| entry(path, FILE, content.as_bytes())).collect();
    let bytes = gzip(&archive(&files));
    let path = rig.outer.path().join("archive");
    fs::write(&path, &bytes).unwrap();
    let package = super::super::Package::open_archive(path, UnpackLimits::default()).await.unwrap();
    assert_eq!(package.digest(), hex(&Sha256::digest(&bytes)));
    let asset = package.assets()[0].clone();
    assert!(package.asset_bytes(&asset).await.unwrap().starts_with(b"#!/bin/sh"));
    let root = package.root().to_owned();
    drop(package);
    while root.exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
}
