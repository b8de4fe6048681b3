use tempfile::TempDir;

use super::*;
use crate::{
    memory::MemoryState,
    package::{LocalFolder, tests::write_folder},
};

struct Rig {
    _folder: TempDir,
    store: Arc<MemoryState>,
    packages: Arc<LocalFolder>,
}

fn manifest(name: &str, kind: &str, file: &str) -> String {
    format!(
        "[package]\nname = \"{name}\"\nversion = \"1.0.0\"\nlicense = \"MIT\"\n[content]\ntype = \"{kind}\"\n\
         [{kind}]\nfile_path = \"{file}\"\n"
    )
}

impl Rig {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let package = |name: &str, kind: &str, file: &'static str, content: &str| {
            let files = [("package.toml", manifest(name, kind, file)), (file, content.to_owned())];
            write_folder(&folder.path().join(name), &files);
        };
        package("alert", "event", "src/alert.md", "# Alert\n\n![map](map.png)\n");
        std::fs::write(folder.path().join("alert/src/map.png"), vec![1; 700_000]).unwrap();
        package("hello", "banner", "hello.md", "Hello *all*\n");
        package("world", "exercise", "world.yml", "name: world\n");
        package("torn", "event", "torn.md", "![x](none.png)");
        package("huge", "event", "huge.md", &"a".repeat(1 + (1 << 20)));
        std::fs::write(folder.path().join("huge.txt"), "").unwrap();
        Self {
            packages: Arc::new(LocalFolder::new(folder.path())),
            _folder: folder,
            store: Arc::new(MemoryState::new()),
        }
    }

    fn queries(&self, config: Config) -> Queries {
        Queries::new(self.packages.clone(), self.store.clone(), config)
    }

    async fn records(&self) -> usize {
        self.store.list("", None, 1000).await.unwrap().len()
    }
}

#[tokio::test]
async fn a_page_that_one_process_made_is_read_by_another() {
    let rig = Rig::new();
    let made = rig.queries(Config::default()).create("alert", "*").await.unwrap();
    assert_eq!(made.file_name, "alert.html");
    let other = rig.queries(Config::default());
    let parts: Vec<Bytes> = other.read(made.id).await.unwrap().try_collect().await.unwrap();
    assert!(parts.len() > 1 && parts.iter().all(|part| part.len() <= PART_BYTES));
    let page = parts.concat();
    assert_eq!(page.len() as u64, made.bytes);
    assert_eq!(hex(&Sha3_256::digest(&page)), made.checksum);
    assert!(page.starts_with(b"<h1>Alert</h1>\n<p><img src=\"data:image/png;base64,AQEB"));

    assert_eq!(rig.queries(Config::default()).delete(made.id).await.unwrap(), Deletion::Deleted);
    assert_eq!(rig.records().await, 0, "nothing is left");
    assert_eq!(other.delete(made.id).await.unwrap(), Deletion::AlreadyGone);
    assert_eq!(other.read(made.id).await.map(drop).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn the_checksum_is_sha3() {
    // The example of the standard for no bytes at all.
    let empty = "a7ffc6f8bf1ed76651c14756a061d662f580ff4de43b49fa82d80a4b80f8434a";
    assert_eq!(hex(&Sha3_256::digest(b"")), empty);
}

#[tokio::test(start_paused = true)]
async fn pages_that_nobody_deletes_go_by_themselves_and_have_a_bound() {
    let rig = Rig::new();
    let queries = rig.queries(Config { store_bytes: 2_000_000, ttl: Duration::from_secs(60), ..Config::default() });
    queries.create("alert", "*").await.unwrap();
    let kept = queries.create("alert", "*").await.unwrap();
    let records = rig.records().await;
    let error = queries.create("alert", "*").await.unwrap_err();
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Exhausted, Retry::Safe), "{error}");
    assert_eq!(rig.records().await, records, "nothing is left of what was refused");
    queries.create("hello", "*").await.unwrap();

    tokio::time::advance(Duration::from_secs(61)).await;
    assert_eq!(queries.read(kept.id).await.map(drop).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(rig.records().await, 0);
    queries.create("alert", "*").await.unwrap();
}

#[tokio::test]
async fn every_question_has_its_answer_and_every_wrong_one_its_error() {
    let rig = Rig::new();
    let queries = rig.queries(Config::default());
    assert_eq!(queries.scenario("World", "^1").await.unwrap(), "name: world\n");
    assert_eq!(queries.check("hello", "*").await.unwrap(), Version::new(1, 0, 0));
    let events = queries.packages(Some(PackageKind::Event)).await.unwrap();
    assert_eq!(events.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["alert", "huge", "torn"]);
    let banner = queries.create("hello", "*").await.unwrap();
    assert_eq!(whole(queries.read(banner.id).await.unwrap()).await.unwrap(), b"<p>Hello <em>all</em></p>\n");

    let kind_of = |error: &Error| (error.kind(), error.reason());
    let error = queries.scenario("hello", "*").await.unwrap_err();
    assert_eq!(kind_of(&error), (ErrorKind::Invalid, Some(reason::PACKAGE_TYPE)));
    assert!(error.message().contains("wants a package of type exercise; package hello 1.0.0 is of type banner"));
    let error = queries.create("world", "*").await.unwrap_err();
    assert_eq!(kind_of(&error), (ErrorKind::Invalid, Some(reason::PACKAGE_TYPE)));
    let error = queries.create("torn", "*").await.unwrap_err();
    assert_eq!(kind_of(&error), (ErrorKind::Invalid, Some(reason::PACKAGE_MANIFEST)));
    assert_eq!(error.message(), r#"image: "none.png" is not in the package"#);
    let error = queries.create("huge", "*").await.unwrap_err();
    assert_eq!(kind_of(&error), (ErrorKind::Exhausted, Some(reason::PACKAGE_TOO_LARGE)));
    for error in [
        queries.check("none", "*").await.map(drop).unwrap_err(),
        queries.scenario("none", "*").await.map(drop).unwrap_err(),
        queries.create("none", "*").await.map(drop).unwrap_err(),
    ] {
        assert_eq!(kind_of(&error), (ErrorKind::NotFound, Some(reason::PACKAGE_NOT_FOUND)));
    }
}
