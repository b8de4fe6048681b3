//! The registry client against a registry that speaks Deputy's wire, with every fault that one may have.
#![cfg(feature = "deputy")]
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/registry.rs"]
mod support;

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::join_all;
use ocr_core::{
    ComputeBackend, Error, ErrorKind, Result, Retry, StateStore,
    error::reason,
    exec::{self, Executor, InstallKind, InstallRequest, PackageRef},
    memory::{MemoryCloud, MemoryState},
    package::{
        Package, PackageKind, PackageSource, UnpackLimits,
        registry::{Certificates, Config, Registry},
    },
    queue::scheduler::{Scheduler, SchedulerConfig},
};
use proptest::prelude::*;
use semver::{Version, VersionReq};
use serde_json::json;
use support::{Faults, TOKEN, TestRegistry, checksum, feature, frame, manifest, members, pack};
use tempfile::TempDir;
use tokio::task::JoinSet;

const LONG: Duration = Duration::from_secs(30);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future).await.expect("it takes for ever")
}

/// Looks again and again; what is dropped in a task is removed by another thread.
async fn until(what: &str, mut look: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !look() {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A registry, and a cache for its client.
struct Rig {
    server: TestRegistry,
    folder: TempDir,
}

impl Rig {
    async fn new() -> Self {
        Self { server: TestRegistry::start().await, folder: TempDir::new().unwrap() }
    }

    /// Settings of which no test has to wait for long.
    fn config(&self) -> Config {
        let mut config = Config::new(self.server.url(), self.folder.path().join("cache"));
        config.pause = Duration::from_millis(1);
        config.tries = 3;
        config
    }

    fn client(&self) -> Registry {
        Registry::open(self.config()).unwrap()
    }

    /// The names in a folder of the cache.
    fn names(&self, folder: &str) -> BTreeSet<String> {
        let entries = fs::read_dir(self.folder.path().join("cache").join(folder)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    async fn nothing_is_left(&self) {
        until("something is left in the folder for work", || self.names("work").is_empty()).await;
        // Nor anywhere else.
        let known: BTreeSet<String> = ["archives", "lock", "work"].map(str::to_owned).into();
        assert_eq!(self.names(""), known);
    }
}

async fn content(package: &Package) -> String {
    let bytes = package.asset_bytes(&package.assets()[0]).await.unwrap();
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn failed(result: Result<Arc<Package>>) -> Error {
    result.map(|package| panic!("{package} was fetched")).unwrap_err()
}

#[track_caller]
fn assert_error(error: &Error, kind: ErrorKind, reason: Option<&str>, text: &str) {
    assert_eq!((error.kind(), error.reason()), (kind, reason), "{error}");
    assert!(error.to_string().contains(text), "{text:?} is not in {error}");
}

/// Bytes that do not compress, from a seed.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut noise = Vec::with_capacity(bytes);
    while noise.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    noise.truncate(bytes);
    noise
}

#[tokio::test]
async fn a_package_that_was_published_over_the_wire_is_fetched() {
    let rig = Rig::new().await;
    let archive = feature("Web", "1.0.0", b"one");
    let metadata = |version: &str, archive: &[u8]| {
        json!({
            "name": "Web", "package_type": "feature", "version": version, "description": "a test", "license": "MIT",
            "readme_path": null, "package_size": archive.len(), "categories": [], "checksum": checksum(archive),
        })
    };
    let publish = |version: &str, archive: &[u8], token: &str| {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let request = client.post(format!("{}api/v1/package", rig.server.url())).bearer_auth(token);
        let body = frame(&metadata(version, archive), archive);
        async move { request.body(body).send().await.unwrap().status().as_u16() }
    };
    let client = rig.client();
    assert_eq!(publish("1.0.0", &archive, "wrong").await, 401);
    assert_eq!(publish("1.0.0", &archive, TOKEN).await, 200);
    assert_eq!(publish("1.0.0", &archive, TOKEN).await, 409, "not newer than the newest");
    assert_eq!(publish("1.1.0", &feature("Web", "1.1.0", b"two"), TOKEN).await, 200);

    for name in ["web", "WEB", "Web"] {
        let package = client.fetch(name, "^1").await.unwrap();
        assert_eq!(package.to_string(), "package Web 1.1.0", "names are compared without regard to case");
        assert_eq!(content(&package).await, "two");
    }
    let package = client.fetch("web", "=1.0.0").await.unwrap();
    assert_eq!((package.kind(), package.digest()), (PackageKind::Feature, checksum(&archive).as_str()));
    assert_eq!(rig.server.counts().downloads, 2, "each archive once");

    // Asking what there is fetches nothing.
    assert_eq!(client.resolve("web", "*").await.unwrap(), Version::new(1, 1, 0));
    assert_eq!(rig.server.counts().downloads, 2);
    assert!(rig.server.counts().requirements.contains(&"^1".to_owned()), "the registry is told what is wanted");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_highest_version_that_is_wanted_and_not_yanked_is_chosen(
        versions in prop::collection::btree_map((0_u64..3, 0_u64..3, 0_u64..2, any::<bool>()), any::<bool>(), 0..8),
        requirement in prop::sample::select(vec![
            "", "*", "0", "1", "^1.1", "~1.0", "=1.0.0", "=1.0.0-rc.1", ">=1, <2", ">=1.1.0-rc.1", "2.2.1", ">9",
        ]),
    ) {
        let all: Vec<(Version, bool)> = versions
            .into_iter()
            .map(|((major, minor, patch, is_final), yanked)| {
                let pre = if is_final { "" } else { "-rc.1" };
                (format!("{major}.{minor}.{patch}{pre}").parse().unwrap(), yanked)
            })
            .collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let chosen = runtime.block_on(async {
            let rig = Rig::new().await;
            for (version, yanked) in &all {
                rig.server.add("web", &version.to_string(), "feature", "not looked at");
                if *yanked {
                    rig.server.yank("web", &version.to_string());
                }
            }
            rig.client().resolve("web", requirement).await
        });

        // The rule in other words: from the newest down, the first that will do.
        let any = requirement.is_empty() || requirement == "*";
        let wanted = |version: &Version| any || VersionReq::parse(requirement).unwrap().matches(version);
        let mut rank: Vec<&(Version, bool)> = all.iter().filter(|(version, _)| wanted(version)).collect();
        rank.sort_by_key(|(version, _)| (any && !version.pre.is_empty(), std::cmp::Reverse(version.clone())));
        match (rank.iter().find(|(_, yanked)| !yanked), rank.first()) {
            (Some((version, _)), _) => prop_assert_eq!(&chosen.unwrap(), version),
            (None, Some(_)) => prop_assert_eq!(chosen.unwrap_err().reason(), Some(reason::PACKAGE_YANKED)),
            (None, None) => prop_assert_eq!(chosen.unwrap_err().reason(), Some(reason::PACKAGE_NOT_FOUND)),
        }
    }
}

#[tokio::test]
async fn what_is_not_there_is_told_from_what_was_yanked() {
    let rig = Rig::new().await;
    let client = rig.client();
    rig.server.add("web", "1.0.0", "feature", feature("web", "1.0.0", b"one"));
    rig.server.add("web", "1.1.0", "feature", feature("web", "1.1.0", b"two"));
    rig.server.yank("web", "1.1.0");

    let error = failed(client.fetch("db", "1").await);
    assert_error(&error, ErrorKind::NotFound, Some(reason::PACKAGE_NOT_FOUND), "there is no package db");
    let error = failed(client.fetch("web", "3").await);
    assert_error(&error, ErrorKind::NotFound, Some(reason::PACKAGE_NOT_FOUND), "there are 1.0.0");
    let error = failed(client.fetch("web", "=1.1.0").await);
    let text = "version 1.1.0 was yanked by its publisher; there are 1.0.0";
    assert_error(&error, ErrorKind::Conflict, Some(reason::PACKAGE_YANKED), text);
    assert_eq!(client.fetch("web", "1").await.unwrap().to_string(), "package web 1.0.0");

    let error = failed(client.fetch("web", "one").await);
    assert_error(&error, ErrorKind::Invalid, None, "source.version: wants a version requirement");
    let error = failed(client.fetch("../web", "1").await);
    assert_error(&error, ErrorKind::Invalid, None, "source.name: wants 1 to 128");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_waiters_share_one_download() {
    let rig = Rig::new().await;
    let archive = feature("web", "1.0.0", &noise(1, 300_000));
    rig.server.add("web", "1.0.0", "feature", archive.clone());
    let client = rig.client();
    rig.server.hold_downloads(true);
    let mut waiters = JoinSet::new();
    for _ in 0..100 {
        let client = client.clone();
        waiters.spawn(async move { client.fetch("web", "1").await });
    }
    until("all ask for versions", || rig.server.counts().lists == 100).await;
    until("the download begins", || rig.server.counts().downloads == 1).await;
    rig.server.hold_downloads(false);
    let packages: Vec<_> = soon(waiters.join_all()).await.into_iter().map(Result::unwrap).collect();
    assert!(packages.iter().all(|package| Arc::ptr_eq(package, &packages[0])));
    let counts = rig.server.counts();
    assert_eq!((counts.downloads, counts.archive_bytes), (1, archive.len() as u64));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiter_that_goes_away_cancels_nothing_for_the_others_and_the_last_one_ends_it() {
    let rig = Rig::new().await;
    rig.server.add("web", "1.0.0", "feature", feature("web", "1.0.0", &noise(1, 100_000)));
    let client = rig.client();
    rig.server.hold_downloads(true);
    let start = || {
        let client = client.clone();
        tokio::spawn(async move { client.fetch("web", "1").await })
    };
    // The first one polls the download; it is the one to go.
    let first = start();
    until("the download begins", || rig.server.counts().downloads == 1).await;
    let others = [start(), start()];
    until("the others ask too", || rig.server.counts().lists == 3).await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    rig.server.hold_downloads(false);
    for other in others {
        assert_eq!(soon(other).await.unwrap().unwrap().to_string(), "package web 1.0.0");
    }
    assert_eq!(rig.server.counts().downloads, 1);

    rig.server.add("db", "1.0.0", "feature", feature("db", "1.0.0", b"one"));
    rig.server.forget_counts();
    rig.server.fault(Faults { endless: true, ..Faults::default() });
    let waiters = [(); 3].map(|()| {
        let client = client.clone();
        tokio::spawn(async move { client.fetch("db", "1").await })
    });
    until("the download is under way", || rig.server.counts().archive_bytes > 0).await;
    waiters.iter().for_each(|waiter| waiter.abort());
    until("the download ends with its last waiter", || rig.server.counts().ended == 1).await;
    for waiter in waiters {
        assert!(waiter.await.unwrap_err().is_cancelled());
    }
    drop(client);
    rig.nothing_is_left().await;
}

#[tokio::test]
async fn a_broken_download_goes_on_where_it_broke_off() {
    let rig = Rig::new().await;
    let archive = feature("web", "1.0.0", &noise(2, 400_000));
    let size = archive.len() as u64;
    rig.server.add("web", "1.0.0", "feature", archive);
    rig.server.fault(Faults { drops: 5, drop_after_bytes: 50_000, ..Faults::default() });
    let package = soon(rig.client().fetch("web", "1")).await.unwrap();
    assert_eq!(package.asset_bytes(&package.assets()[0]).await.unwrap(), noise(2, 400_000));
    let counts = rig.server.counts();
    assert_eq!(counts.downloads, 6, "more breaks than tries, but each brought something");
    assert_eq!(counts.ranges, [50_000, 100_000, 150_000, 200_000, 250_000]);
    assert_eq!(counts.archive_bytes, size, "no byte twice");
}

#[tokio::test]
async fn a_download_without_ranges_starts_over() {
    let rig = Rig::new().await;
    rig.server.add("web", "1.0.0", "feature", feature("web", "1.0.0", &noise(3, 100_000)));
    rig.server.fault(Faults { drops: 2, drop_after_bytes: 50_000, no_ranges: true, ..Faults::default() });
    soon(rig.client().fetch("web", "1")).await.unwrap();
    assert_eq!(rig.server.counts().downloads, 3);
}

#[tokio::test]
async fn pieces_of_two_archives_are_never_one_package() {
    let rig = Rig::new().await;
    let (one, two) = (feature("web", "1.0.0", &noise(4, 100_000)), feature("web", "1.0.0", &noise(5, 100_000)));
    rig.server.add("web", "1.0.0", "feature", one);
    rig.server.fault(Faults { drops: 1, drop_after_bytes: 50_000, ..Faults::default() });
    let client = rig.client();
    let fetching = {
        let client = client.clone();
        tokio::spawn(async move { client.fetch("web", "1").await })
    };
    until("the first piece came", || rig.server.counts().downloads > 0).await;
    // The registry is put on another state; its etag is another, and so nothing is resumed.
    rig.server.replace("web", "1.0.0", two);
    let outcome = soon(fetching).await.unwrap();
    match outcome {
        Ok(package) => assert_eq!(package.asset_bytes(&package.assets()[0]).await.unwrap(), noise(4, 100_000)),
        Err(error) => assert_eq!(error.reason(), Some(reason::PACKAGE_CHECKSUM), "{error}"),
    }
    drop(client);
    rig.nothing_is_left().await;
}

/// A fault, and what comes of it.
struct Case {
    what: &'static str,
    faults: Faults,
    kind: ErrorKind,
    reason: Option<&'static str>,
    text: &'static str,
}

#[tokio::test]
async fn every_fault_of_the_registry_has_its_own_error_and_leaves_nothing() {
    let down = Some(reason::REGISTRY_UNAVAILABLE);
    let none = Faults::default;
    let cases = [
        Case {
            what: "wrong checksum",
            faults: Faults { wrong_checksum: true, ..none() },
            kind: ErrorKind::Conflict,
            reason: Some(reason::PACKAGE_CHECKSUM),
            text: "the archive is not what the registry's checksum says",
        },
        Case {
            what: "errors without end",
            faults: Faults { errors: u32::MAX, ..none() },
            kind: ErrorKind::Unavailable,
            reason: down,
            text: "the package registry answered 500 (3 tries)",
        },
        Case {
            what: "breaks without progress",
            faults: Faults { drops: u32::MAX, drop_after_bytes: 0, ..none() },
            kind: ErrorKind::Unavailable,
            reason: down,
            text: "the connection to the package registry broke (3 tries, 0 of ",
        },
        Case {
            what: "endless body",
            faults: Faults { endless: true, ..none() },
            kind: ErrorKind::Exhausted,
            reason: Some(reason::PACKAGE_TOO_LARGE),
            text: "the archive is larger than 1048576 bytes",
        },
        Case {
            what: "huge body",
            faults: Faults { huge: true, ..none() },
            kind: ErrorKind::Exhausted,
            reason: Some(reason::PACKAGE_TOO_LARGE),
            text: "the archive is larger than 1048576 bytes",
        },
        Case {
            what: "JSON that ends in the middle",
            faults: Faults { truncated_json: true, ..none() },
            kind: ErrorKind::Unavailable,
            reason: down,
            text: "the package registry's answer makes no sense",
        },
        Case {
            what: "one byte at a time",
            faults: Faults { drip: Some(Duration::from_millis(5)), ..none() },
            kind: ErrorKind::TimedOut,
            reason: down,
            text: "bytes came in 0.5 s",
        },
        Case {
            what: "a body that stands still",
            faults: Faults { drip: Some(Duration::from_secs(600)), ..none() },
            kind: ErrorKind::Unavailable,
            reason: down,
            text: "the package registry stopped answering",
        },
        Case {
            what: "no token",
            faults: Faults { private: true, ..none() },
            kind: ErrorKind::Denied,
            reason: None,
            text: "DEPUTY_TOKEN",
        },
        Case {
            what: "a redirect",
            faults: Faults { redirect: true, ..none() },
            kind: ErrorKind::Unavailable,
            reason: down,
            text: "the package registry answered 302; DEPUTY_REGISTRY may be the address of something else",
        },
    ];
    for Case { what, faults, kind, reason, text } in cases {
        let rig = Rig::new().await;
        rig.server.add("web", "1.0.0", "feature", feature("web", "1.0.0", &noise(6, 60_000)));
        rig.server.fault(faults);
        let mut config = rig.config();
        config.limits = UnpackLimits { archive_bytes: 1 << 20, ..UnpackLimits::default() };
        (config.stall_deadline, config.download_deadline) = (Duration::from_millis(100), Duration::from_millis(500));
        let client = Registry::open(config).unwrap();
        let error = failed(soon(client.fetch("web", "1")).await);
        println!("{what}: {error}");
        assert_error(&error, kind, reason, text);
        assert!(error.to_string().starts_with("package.fetch (package "), "{error}");
        rig.nothing_is_left().await;
        assert!(rig.names("archives").is_empty(), "{what}");

        // The fault over, the same client serves.
        if kind != ErrorKind::TimedOut {
            rig.server.fault(Faults::default());
            soon(client.fetch("web", "1")).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_registry_that_is_not_there_is_away_and_is_asked_again() {
    let rig = Rig::new().await;
    let mut config = rig.config();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    config.url = format!("http://{free}/");
    let client = Registry::open(config).unwrap();
    let error = failed(client.fetch("web", "1").await);
    let text = "the package registry cannot be reached (3 tries)";
    assert_error(&error, ErrorKind::Unavailable, Some(reason::REGISTRY_UNAVAILABLE), text);
    assert_eq!(error.retry(), Retry::Safe);
    assert!(!error.to_string().contains(&free.to_string()), "an address is the operator's, not the caller's: {error}");
    rig.nothing_is_left().await;

    // A few faults in a row are got over.
    let client = {
        drop(client);
        rig.client()
    };
    rig.server.add("web", "1.0.0", "feature", feature("web", "1.0.0", b"one"));
    rig.server.fault(Faults { errors: 2, ..Faults::default() });
    client.fetch("web", "1").await.unwrap();
}

#[tokio::test]
async fn every_fault_of_a_package_has_its_own_error_and_leaves_nothing() {
    let web = |content: &str| manifest("web", "1.0.0", "", "feature", content);
    let good = web("[feature]\ntype = \"service\"\n");
    let link = {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        header.set_entry_type(tar::EntryType::Symlink);
        tar.append_link(&mut header, "package.toml", "/etc/passwd").unwrap();
        members(&tar.into_inner().unwrap())
    };
    let missing = manifest("web", "1.0.0", "[\"a\", \"/a\"]", "feature", "[feature]\ntype = \"service\"\n");
    let archive = Some(reason::PACKAGE_ARCHIVE);
    let of_manifest = Some(reason::PACKAGE_MANIFEST);
    for (bytes, reason, text) in [
        (b"this is no archive, however long one looks at it".to_vec(), archive, "package archive: "),
        (Vec::new(), archive, "package archive: is empty"),
        (feature("web", "1.0.0", b"x")[..100].to_vec(), archive, "package archive: ends too early"),
        (link, archive, "package archive: the entry \"package.toml\" is a link"),
        (pack(&[("a", b"b")]), of_manifest, "package.toml: is not at the top of the archive"),
        (pack(&[("package.toml", b"[package")]), of_manifest, "package.toml: line 1"),
        (pack(&[("package.toml", missing.as_bytes())]), of_manifest, "assets[0]: \"a\" is not in the package"),
        (
            feature("db", "1.0.0", b"x"),
            of_manifest,
            "says package db 1.0.0, but the registry has it as package web 1.0.0",
        ),
        (feature("web", "1.0.1", b"x"), of_manifest, "says package web 1.0.1"),
    ] {
        let rig = Rig::new().await;
        let client = rig.client();
        rig.server.add("web", "1.0.0", "feature", bytes);
        let error = failed(client.fetch("web", "1").await);
        println!("{error}");
        assert_error(&error, ErrorKind::Invalid, reason, text);
        drop(client);
        rig.nothing_is_left().await;

        // Put right at the registry it is right here.
        rig.server.add("web", "1.1.0", "feature", pack(&[("package.toml", good.replace("1.0.0", "1.1.0").as_bytes())]));
        let client = rig.client();
        client.fetch("web", "1").await.unwrap();
    }
}

#[tokio::test]
async fn a_bomb_is_refused_and_leaves_nothing() {
    let rig = Rig::new().await;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    std::io::Write::write_all(&mut encoder, &pack(&[])).unwrap();
    let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best()));
    let mut header = tar::Header::new_gnu();
    header.set_size(64 << 20);
    header.set_mode(0o644);
    tar.append_data(&mut header, "zeros", std::io::Read::take(std::io::repeat(0), 64 << 20)).unwrap();
    rig.server.add("web", "1.0.0", "feature", tar.into_inner().unwrap().finish().unwrap());
    let error = failed(rig.client().fetch("web", "1").await);
    assert_error(&error, ErrorKind::Invalid, Some(reason::PACKAGE_ARCHIVE), "unpacks to more than 200 times its size");
    rig.nothing_is_left().await;
}

#[tokio::test]
async fn the_cache_outlives_its_process_and_is_verified() {
    let rig = Rig::new().await;
    let archive = feature("web", "1.0.0", &noise(7, 50_000));
    let name = format!("{}.package", rig.server.add("web", "1.0.0", "feature", archive));
    let client = rig.client();
    let error = Registry::open(rig.config()).unwrap_err();
    assert_error(&error, ErrorKind::Conflict, None, "is used by another process");
    drop(client.fetch("web", "1").await.unwrap());
    drop(client);

    // A kill leaves downloads, and folders where packages were unpacked.
    let cache = rig.folder.path().join("cache");
    until("the cache is free again", || Registry::open(rig.config()).is_ok()).await;
    fs::write(cache.join("work/part-abc"), "half").unwrap();
    fs::create_dir_all(cache.join("work/ocr-package-x/content")).unwrap();
    fs::write(cache.join("archives/notes.txt"), "not ours").unwrap();

    let client = rig.client();
    assert!(rig.names("work").is_empty());
    assert!(rig.names("archives").contains("notes.txt"), "what is not ours stays");
    client.fetch("web", "1").await.unwrap();
    assert_eq!(rig.server.counts().downloads, 1, "it was in the cache");
    drop(client);

    for damage in [&b"short"[..], &[0; 60_000], &feature("web", "1.0.0", b"other")] {
        until("the cache is free again", || Registry::open(rig.config()).is_ok()).await;
        fs::write(cache.join("archives").join(&name), damage).unwrap();
        let before = rig.server.counts().downloads;
        let client = rig.client();
        let package = client.fetch("web", "1").await.unwrap();
        assert_eq!(package.asset_bytes(&package.assets()[0]).await.unwrap(), noise(7, 50_000));
        assert_eq!(rig.server.counts().downloads, before + 1, "what is damaged is fetched again");
    }
}

/// Bytes of all files below a folder.
fn size(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { size(&path) } else { fs::metadata(path).unwrap().len() }).sum()
}

#[tokio::test]
async fn the_cache_keeps_within_its_bound_and_gives_up_what_was_used_least_lately() {
    let rig = Rig::new().await;
    let names: Vec<String> = (0..5).map(|nth| format!("p{nth}")).collect();
    for (nth, name) in names.iter().enumerate() {
        rig.server.add(name, "1.0.0", "feature", feature(name, "1.0.0", &noise(nth as u64, 100_000)));
    }
    let mut config = rig.config();
    config.cache_bytes = 350_000;
    let client = Registry::open(config).unwrap();
    let archives = rig.folder.path().join("cache/archives");
    let downloads = |client: Registry, name: String| {
        let server = &rig.server;
        async move {
            let before = server.counts().downloads;
            client.fetch(&name, "1").await.unwrap();
            server.counts().downloads - before
        }
    };
    for name in &names[..3] {
        assert_eq!(downloads(client.clone(), name.clone()).await, 1);
    }
    assert_eq!(downloads(client.clone(), names[0].clone()).await, 0, "three fit");
    assert_eq!(downloads(client.clone(), names[3].clone()).await, 1);
    assert!(size(&archives) <= 350_000);
    assert_eq!(downloads(client.clone(), names[0].clone()).await, 0, "used lately");
    assert_eq!(downloads(client.clone(), names[1].clone()).await, 1, "used least lately");
    assert!(size(&archives) <= 350_000);
    // With nobody using anything, all of the folder is within the bound.
    let cache = rig.folder.path().join("cache");
    until("all is within the bound", || size(&cache) <= 350_000).await;

    let mut config = rig.config();
    config.cache_bytes = 150_000;
    drop(client);
    let client = {
        until("the cache is free again", || Registry::open(rig.config()).is_ok()).await;
        Registry::open(config).unwrap()
    };
    assert!(size(&archives) <= 150_000, "a smaller bound holds from the start");
    assert_eq!(downloads(client.clone(), names[1].clone()).await, 0, "what was used last is kept over a restart");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_use_is_never_removed_and_a_full_cache_says_so() {
    let rig = Rig::new().await;
    for (nth, name) in ["a", "b", "c"].into_iter().enumerate() {
        rig.server.add(name, "1.0.0", "feature", feature(name, "1.0.0", &noise(nth as u64, 100_000)));
    }
    let mut config = rig.config();
    config.cache_bytes = 250_000;
    let client = Registry::open(config).unwrap();
    let in_use = client.fetch("a", "1").await.unwrap();
    // Two downloads are all that fits; each has its room while it is under way.
    rig.server.fault(Faults { drip: Some(Duration::from_millis(10)), ..Faults::default() });
    let slow = {
        let client = client.clone();
        tokio::spawn(async move { client.fetch("b", "1").await })
    };
    until("b is under way", || rig.server.counts().downloads == 2).await;
    let bytes = rig.server.counts().archive_bytes;
    until("b has room", || rig.server.counts().archive_bytes > bytes + 10).await;
    rig.server.fault(Faults::default());
    client.fetch("c", "1").await.unwrap();
    assert_eq!(content_len(&in_use).await, 100_000, "a package in use is whole, whatever became of its archive");

    let mut config = rig.config();
    config.cache_folder = rig.folder.path().join("other");
    config.cache_bytes = 150_000;
    rig.server.fault(Faults { drip: Some(Duration::from_millis(10)), ..Faults::default() });
    let full = Registry::open(config).unwrap();
    let before = rig.server.counts().downloads;
    let other_slow = {
        let full = full.clone();
        tokio::spawn(async move { full.fetch("b", "1").await })
    };
    until("b is under way there", || rig.server.counts().downloads == before + 1).await;
    let bytes = rig.server.counts().archive_bytes;
    until("b has room there", || rig.server.counts().archive_bytes > bytes + 10).await;
    rig.server.fault(Faults::default());
    let error = failed(full.fetch("c", "1").await);
    let text = "the package cache of 150000 bytes is full of packages in use";
    assert_error(&error, ErrorKind::Exhausted, Some(reason::PACKAGE_CACHE_FULL), text);
    slow.abort();
    other_slow.abort();
}

async fn content_len(package: &Package) -> usize {
    package.asset_bytes(&package.assets()[0]).await.unwrap().len()
}

#[tokio::test]
async fn a_list_is_followed_to_its_end() {
    let rig = Rig::new().await;
    let client = rig.client();
    assert_eq!(client.list(None).await.unwrap(), []);
    for nth in 0..250 {
        rig.server.add(&format!("feature-{nth:03}"), "1.0.0", "Feature", "not looked at");
    }
    rig.server.add("world", "1.0.0", "exercise", "not looked at");
    rig.server.add("world", "1.1.0", "exercise", "not looked at");
    rig.server.add("world", "1.2.0", "exercise", "not looked at");
    rig.server.yank("world", "1.1.0");
    rig.server.add("odd", "1.0.0", "something-new", "not looked at");
    rig.server.forget_counts();
    let features = client.list(Some(PackageKind::Feature)).await.unwrap();
    assert_eq!(features.len(), 250);
    assert!(features.is_sorted_by_key(|one| one.name.clone()));
    assert_eq!(rig.server.counts().searches, 3);
    let exercises = client.list(Some(PackageKind::Exercise)).await.unwrap();
    let versions: Vec<String> = exercises.iter().map(|one| one.version.to_string()).collect();
    assert_eq!(versions, ["1.2.0", "1.0.0"], "the newest first, the yanked not at all");
    // Where a page may be empty and not the last.
    rig.server.fault(Faults { late_filter: true, ..Faults::default() });
    assert_eq!(client.list(Some(PackageKind::Exercise)).await.unwrap(), exercises);
    rig.server.fault(Faults::default());
    assert_eq!(client.list(None).await.unwrap().len(), 252);
}

#[tokio::test]
async fn a_registry_that_wants_a_token_gets_it() {
    let rig = Rig::new().await;
    rig.server.add("web", "1.0.0", "feature", feature("web", "1.0.0", b"one"));
    rig.server.fault(Faults { private: true, ..Faults::default() });
    let mut config = rig.config();
    config.token = Some(TOKEN.to_owned().into());
    let client = Registry::open(config).unwrap();
    client.fetch("web", "1").await.unwrap();
    assert!(!format!("{client:?}").contains(TOKEN));
}

#[test]
fn settings_that_cannot_be_used_are_named() {
    let folder = TempDir::new().unwrap();
    let config = |url: &str, certificates| {
        let mut config = Config::new(url, folder.path().join("cache"));
        config.certificates = certificates;
        Registry::open(config).map(drop).unwrap_err()
    };
    let error = config("registry.example", Certificates::System);
    assert_error(&error, ErrorKind::Invalid, None, "DEPUTY_REGISTRY: wants an address");
    let error = config("https://h/", Certificates::SystemAnd(folder.path().join("none.pem")));
    assert_error(&error, ErrorKind::Invalid, None, "DEPUTY_CA_FILE: cannot be read");
    fs::write(folder.path().join("bad.pem"), "not PEM").unwrap();
    let error = config("https://h/", Certificates::SystemAnd(folder.path().join("bad.pem")));
    assert_error(&error, ErrorKind::Invalid, None, "DEPUTY_CA_FILE: ");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_packages_at_once_arrive_whole() {
    let rig = Rig::new().await;
    for nth in 0..20_u64 {
        let name = format!("p{nth}");
        rig.server.add(&name, "1.0.0", "feature", feature(&name, "1.0.0", &noise(nth, 50_000)));
    }
    rig.server.fault(Faults { drops: 20, drop_after_bytes: 20_000, chunked: true, ..Faults::default() });
    let mut config = rig.config();
    config.downloads = 3;
    let client = Registry::open(config).unwrap();
    let packages = join_all((0..20).map(|nth| {
        let client = client.clone();
        async move { client.fetch(&format!("p{nth}"), "1").await }
    }));
    for (nth, package) in (0..).zip(soon(packages).await) {
        let package = package.unwrap();
        assert_eq!(package.asset_bytes(&package.assets()[0]).await.unwrap(), noise(nth, 50_000));
    }
}

#[tokio::test]
async fn a_package_that_cannot_be_had_leaves_the_guest_and_the_store_untouched() {
    let rig = Rig::new().await;
    rig.server.add("web", "1.0.0", "feature", feature("web", "1.0.0", b"echo up"));
    rig.server.add("text", "1.0.0", "event", {
        let manifest = manifest("text", "1.0.0", "", "event", "[event]\nfile_path = \"a.md\"\n");
        pack(&[("package.toml", manifest.as_bytes()), ("a.md", b"# A")])
    });
    rig.server.add("noise", "1.0.0", "feature", noise(8, 1000));
    rig.server.add("old", "1.0.0", "feature", feature("old", "1.0.0", b"echo up"));
    rig.server.yank("old", "1.0.0");
    let (cloud, store) = (MemoryCloud::new(), MemoryState::new());
    let vm = cloud.create_vm(&MemoryCloud::tiny_spec("web-0")).await.unwrap().id;
    let parts = exec::Parts {
        guest: Arc::new(cloud.clone()),
        compute: Arc::new(cloud.clone()),
        store: Arc::new(store.clone()),
        packages: Arc::new(rig.client()),
        secrets: exec::SecretStorage::Memory,
        fleet: None,
        scheduler: Scheduler::start(SchedulerConfig::default()),
    };
    let executor = Executor::new(parts, exec::Config::default());
    let install = |kind, package: &str| {
        let request = InstallRequest {
            kind,
            name: "it".to_owned(),
            vm,
            package: PackageRef { name: package.to_owned(), version: "1".to_owned() },
            account: exec::Account::default(),
            environment: [].into(),
        };
        let executor = executor.clone();
        async move { soon(executor.install(request)).await }
    };
    let guest_calls = || -> u64 {
        let calls = ["guest_info", "put_file", "get_file", "remove_file", "exec"];
        calls.iter().map(|call| cloud.faults().calls(&format!("guest.{call}"))).sum()
    };
    let (feature, inject) = (InstallKind::Feature, InstallKind::Inject);
    let wrong_checksum = Faults { wrong_checksum: true, ..Faults::default() };
    let down = Faults { errors: u32::MAX, ..Faults::default() };
    for (kind, package, faults, wanted, reason) in [
        (feature, "none", Faults::default(), ErrorKind::NotFound, reason::PACKAGE_NOT_FOUND),
        (feature, "old", Faults::default(), ErrorKind::Conflict, reason::PACKAGE_YANKED),
        (feature, "noise", Faults::default(), ErrorKind::Invalid, reason::PACKAGE_ARCHIVE),
        (feature, "text", Faults::default(), ErrorKind::Invalid, reason::PACKAGE_TYPE),
        (inject, "web", Faults::default(), ErrorKind::Invalid, reason::PACKAGE_TYPE),
        (feature, "web", wrong_checksum, ErrorKind::Conflict, reason::PACKAGE_CHECKSUM),
        (feature, "web", down, ErrorKind::Unavailable, reason::REGISTRY_UNAVAILABLE),
    ] {
        rig.server.fault(faults);
        let error = install(kind, package).await.unwrap_err();
        assert_eq!((error.kind(), error.reason()), (wanted, Some(reason)), "{error}");
        assert_eq!(guest_calls(), 0, "{error}");
        assert_eq!(store.list("", None, 10).await.unwrap(), [], "{error}");
    }
    rig.server.fault(Faults::default());
    let installed = install(feature, "web").await.unwrap();
    assert_eq!(installed.stdout, "up");
    assert!(guest_calls() > 0);
}

/// A door with TLS in front of a registry. It ends when the set is dropped.
async fn with_tls(plain: &TestRegistry, own: &rcgen::CertifiedKey<rcgen::KeyPair>) -> (String, JoinSet<()>) {
    use tokio_rustls::{TlsAcceptor, rustls};

    let key = rustls::pki_types::PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}/", listener.local_addr().unwrap().port());
    let address = plain.url().trim_start_matches("http://").trim_end_matches('/').to_owned();
    let mut door = JoinSet::new();
    door.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((connection, _)) = listener.accept().await {
            let (acceptor, address) = (acceptor.clone(), address.clone());
            connections.spawn(async move {
                // A client that does not like the certificate ends the handshake.
                let Ok(mut outer) = acceptor.accept(connection).await else { return };
                let mut inner = tokio::net::TcpStream::connect(address).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut outer, &mut inner).await;
            });
        }
    });
    (url, door)
}

#[tokio::test]
async fn a_certificate_that_nobody_vouches_for_is_refused_unless_told_otherwise() {
    let rig = Rig::new().await;
    rig.server.add("web", "1.0.0", "feature", feature("web", "1.0.0", b"one"));
    let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let stranger = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (url, _door) = with_tls(&rig.server, &own).await;
    let fetch = |certificates| {
        let mut config = rig.config();
        (config.url, config.certificates) = (url.clone(), certificates);
        config.cache_folder = TempDir::new_in(rig.folder.path()).unwrap().keep();
        async move { Registry::open(config).unwrap().fetch("web", "1").await }
    };
    let pem = |name: &str, own: &rcgen::CertifiedKey<rcgen::KeyPair>| {
        let path = rig.folder.path().join(name);
        fs::write(&path, own.cert.pem()).unwrap();
        Certificates::SystemAnd(path)
    };
    for certificates in [Certificates::System, pem("stranger.pem", &stranger)] {
        let error = failed(fetch(certificates).await);
        assert_error(&error, ErrorKind::Unavailable, Some(reason::REGISTRY_UNAVAILABLE), "DEPUTY_CA_FILE");
        assert_eq!(error.retry(), Retry::Never, "asking again changes nothing");
    }
    for certificates in [Certificates::Unchecked, pem("own.pem", &own)] {
        fetch(certificates).await.unwrap();
    }
}
