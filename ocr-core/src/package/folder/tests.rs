use std::{fs::File, io::Write};

use tempfile::TempDir;

use super::*;
use crate::{
    error::reason,
    package::tests::{feature, write_folder},
};

struct Rig {
    folder: TempDir,
    work: TempDir,
    source: LocalFolder,
}

impl Rig {
    fn new() -> Self {
        let (folder, work) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let source = LocalFolder::new(folder.path()).with_work_folder(work.path());
        Self { folder, work, source }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn folder(&self, at: &str, name: &str, version: &str) {
        write_folder(&self.path(at), &feature(name, version));
    }

    fn archive(&self, at: &str, name: &str, version: &str) {
        let file = File::create(self.path(at)).unwrap();
        let mut archive = tar::Builder::new(flate2::write::GzEncoder::new(file, flate2::Compression::fast()));
        for (path, content) in feature(name, version) {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            archive.append_data(&mut header, path, content.as_bytes()).unwrap();
        }
        archive.into_inner().unwrap().finish().unwrap();
    }

    async fn fetch(&self, name: &str, requirement: &str) -> Result<Arc<Package>> {
        self.source.fetch(name, requirement).await
    }

    async fn version(&self, name: &str, requirement: &str) -> String {
        self.fetch(name, requirement).await.unwrap().manifest().version.to_string()
    }

    fn unpacked(&self) -> usize {
        fs::read_dir(self.work.path()).unwrap().count()
    }
}

#[tokio::test]
async fn folders_and_archives_are_found_by_name_and_requirement() {
    let rig = Rig::new();
    rig.folder("anything", "web", "1.0.0");
    rig.archive("web-1.2.0.package", "Web", "1.2.0");
    rig.archive("x.tar.gz", "web", "1.10.0");
    rig.archive("y.tgz", "db", "3.0.0");
    fs::write(rig.path("README.md"), "no package").unwrap();
    fs::create_dir(rig.path("empty")).unwrap();
    for (requirement, wanted) in [("", "1.10.0"), ("*", "1.10.0"), ("~1.2", "1.2.0"), ("=1.0.0", "1.0.0")] {
        assert_eq!(rig.version("WEB", requirement).await, wanted);
    }
    assert_eq!(rig.version("db", "^3").await, "3.0.0");
    let listed: Vec<String> = (rig.source.list(None).await.unwrap().iter())
        .map(|package| format!("{} {} {}", package.name, package.version, package.kind))
        .collect();
    assert_eq!(listed, ["db 3.0.0 feature", "web 1.10.0 feature", "Web 1.2.0 feature", "web 1.0.0 feature"]);
    assert_eq!(rig.source.list(Some(PackageKind::Condition)).await.unwrap(), vec![]);
}

#[tokio::test]
async fn what_is_not_there_is_answered_with_what_is() {
    let rig = Rig::new();
    rig.folder("a", "web", "1.0.0");
    rig.folder("b", "web", "1.1.0");
    let error = rig.fetch("web", "^2").await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::NotFound, Some(reason::PACKAGE_NOT_FOUND)));
    assert_eq!(
        error.to_string(),
        r#"package.fetch (package "web"): no version of web meets the requirement; there are 1.1.0, 1.0.0"#
    );
    let error = rig.fetch("other", "").await.unwrap_err();
    assert_eq!((error.reason(), error.message()), (Some(reason::PACKAGE_NOT_FOUND), "there is no package other"));
    for n in 0..30 {
        rig.folder(&format!("many{n}"), "many", &format!("1.{n}.0"));
    }
    let error = rig.fetch("many", "2").await.unwrap_err();
    assert!(error.message().ends_with("1.10.0 and 10 older"), "{error}");
}

#[tokio::test]
async fn bad_requests_name_their_field() {
    let rig = Rig::new();
    for (name, requirement, wanted) in [
        ("", "", "source.name: wants 1 to 128"),
        ("../web", "", "source.name: wants 1 to 128"),
        ("web", "newest", "source.version: wants a version requirement"),
        ("web", "1.2.3.4", "source.version: wants a version requirement"),
    ] {
        let error = rig.fetch(name, requirement).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.message().starts_with(wanted), "{error}");
    }
}

#[tokio::test]
async fn a_missing_folder_is_named() {
    let rig = Rig::new();
    let path = rig.path("none");
    let source = LocalFolder::new(&path);
    for error in
        [source.fetch("web", "").await.unwrap_err(), source.list(None).await.unwrap_err(), source.check().unwrap_err()]
    {
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert_eq!(error.message(), format!("the package folder {} does not exist", path.display()));
    }
    fs::write(&path, "").unwrap();
    assert_eq!(source.check().unwrap_err().kind(), ErrorKind::Invalid);
    fs::remove_file(&path).unwrap();
    write_folder(&path.join("a"), &feature("web", "1.0.0"));
    source.check().unwrap();
    assert!(source.fetch("web", "").await.is_ok(), "it may come later");
}

#[tokio::test]
async fn a_broken_package_hides_no_other_and_gives_its_fault_when_asked_for() {
    let rig = Rig::new();
    rig.folder("good", "web", "1.0.0");
    rig.folder("bad", "db", "1.0.0");
    let manifest = fs::read_to_string(rig.path("bad/package.toml")).unwrap();
    fs::write(rig.path("bad/package.toml"), manifest.replace("\"service\"", "\"thing\"")).unwrap();
    fs::write(rig.path("mail-2.0.0-rc.1.package"), "no archive at all").unwrap();
    fs::create_dir(rig.path("shell")).unwrap();
    fs::write(rig.path("shell/package.toml"), "[[[").unwrap();

    assert_eq!(rig.version("web", "").await, "1.0.0");
    assert_eq!(rig.source.list(None).await.unwrap().len(), 1);
    for (name, wanted) in [
        ("DB", "package.fetch (package file bad): package.toml: feature.type: wants service"),
        ("mail", "package.fetch (package file mail-2.0.0-rc.1.package): package archive: "),
        ("shell", "package.fetch (package file shell): package.toml: line 1: "),
    ] {
        let error = rig.fetch(name, "").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().starts_with(wanted), "{error}");
    }
    // A good version of the same name answers instead.
    rig.folder("db2", "db", "0.9.0");
    assert_eq!(rig.version("db", "").await, "0.9.0");
    // Mended, it counts at once.
    fs::write(rig.path("bad/package.toml"), manifest).unwrap();
    assert_eq!(rig.version("db", "").await, "1.0.0");
}

#[tokio::test]
async fn a_package_whose_files_are_missing_says_so() {
    let rig = Rig::new();
    rig.folder("a", "web", "1.0.0");
    fs::remove_file(rig.path("a/src/run.sh")).unwrap();
    let error = rig.fetch("web", "").await.unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"package.fetch (package file a): package.toml: assets[0]: "src/run.sh" is not in the package"#
    );
}

#[tokio::test]
async fn an_archive_is_unpacked_once_however_many_ask() {
    let rig = Rig::new();
    rig.archive("web.package", "web", "1.0.0");
    let fetches = (0..20).map(|_| rig.fetch("web", ""));
    let packages = futures::future::try_join_all(fetches).await.unwrap();
    assert!(packages.iter().all(|package| Arc::ptr_eq(package, &packages[0])));
    assert_eq!(rig.unpacked(), 1);
    // The same bytes under another name are the same package.
    fs::copy(rig.path("web.package"), rig.path("again.package")).unwrap();
    fs::remove_file(rig.path("web.package")).unwrap();
    assert!(Arc::ptr_eq(&rig.fetch("web", "").await.unwrap(), &packages[0]));
}

#[tokio::test]
async fn what_was_changed_is_read_again() {
    let rig = Rig::new();
    rig.archive("web.package", "web", "1.0.0");
    rig.folder("db", "db", "1.0.0");
    let (web, db) = (rig.fetch("web", "").await.unwrap(), rig.fetch("db", "").await.unwrap());
    assert!(Arc::ptr_eq(&rig.fetch("db", "").await.unwrap(), &db));
    rig.archive("web.package", "web", "1.0.1");
    fs::write(rig.path("db/src/run.sh"), "changed").unwrap();
    let (newer, changed) = (rig.fetch("web", "").await.unwrap(), rig.fetch("db", "").await.unwrap());
    assert_eq!(newer.manifest().version.to_string(), "1.0.1");
    assert_ne!(changed.digest(), db.digest());
    assert_eq!(changed.asset_bytes(&changed.assets()[0]).await.unwrap(), "changed");
    // Who still has the old one can still read it.
    assert!(web.asset_bytes(&web.assets()[0]).await.unwrap().ends_with(b"echo web 1.0.0\n"));
    fs::remove_file(rig.path("web.package")).unwrap();
    assert_eq!(rig.fetch("web", "").await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn only_so_many_archives_stay_unpacked() {
    let rig = Rig::new();
    for n in 0..KEPT_MAX + 5 {
        rig.archive(&format!("p{n}.package"), &format!("p{n}"), "1.0.0");
        rig.fetch(&format!("p{n}"), "").await.unwrap();
    }
    while rig.unpacked() > KEPT_MAX {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(rig.unpacked(), KEPT_MAX);
    assert!(rig.fetch("p0", "").await.is_ok());
}

#[tokio::test]
async fn of_two_with_the_same_version_the_folder_counts() {
    let rig = Rig::new();
    rig.archive("a.package", "web", "1.0.0");
    rig.folder("z", "web", "1.0.0");
    assert!(rig.fetch("web", "").await.unwrap().root().ends_with("z"));
    assert_eq!(rig.source.list(None).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_bomb_by_name_is_refused_and_leaves_nothing() {
    let rig = Rig::new();
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let mut header = tar::Header::new_gnu();
    let manifest = &feature("bomb", "1.0.0")[0].1;
    header.set_size(manifest.len() as u64);
    header.set_path("package.toml").unwrap();
    header.set_mode(0o644);
    header.set_cksum();
    let mut bytes = [header.as_bytes(), manifest.as_bytes()].concat();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    header.set_size(64 << 20);
    header.set_path("src/run.sh").unwrap();
    header.set_cksum();
    bytes.extend_from_slice(header.as_bytes());
    let bomb = [gzip(&bytes), gzip(&vec![0; 1 << 20]).repeat(64)].concat();
    fs::write(rig.path("bomb.package"), bomb).unwrap();
    rig.folder("web", "web", "1.0.0");
    let error = rig.fetch("bomb", "").await.unwrap_err();
    assert!(error.message().contains("more than 200 times its size"), "{error}");
    assert_eq!(rig.unpacked(), 0);
    assert!(rig.fetch("web", "").await.is_ok());
}

#[test]
fn names_are_guessed_from_files() {
    for (file, wanted) in [
        ("web.package", &["web"][..]),
        ("web-1.2.3.tar.gz", &["web-1.2.3", "web"]),
        ("my-web-1.2.3-rc.1.tgz", &["my-web-1.2.3-rc.1", "my-web"]),
        ("web", &["web"]),
    ] {
        assert_eq!(file_names(Path::new(file)), wanted);
    }
}
