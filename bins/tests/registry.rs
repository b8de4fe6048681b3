//! The servers with packages from a registry: over gRPC to the program, over HTTP from it.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../../ocr-core/tests/support/registry.rs"]
mod registry;
mod support;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use ocr_grpc::{client::DeputyQueryServiceClient, proto::Source};
use registry::{Faults, TestRegistry, feature, manifest, pack};
use serde_json::json;
use support::{OCR, SOON, Said, Server, command, keeper, run, soon, until};

/// `ocr serve --backend memory` with packages from a registry.
struct Rig {
    registry: TestRegistry,
    server: Server,
    folder: PathBuf,
}

async fn serve(registry: &TestRegistry, folder: &Path) -> Server {
    let mut serve = command(OCR);
    serve.args(["serve", "--backend", "memory", "--listen", "127.0.0.1:0", "--registry", &registry.url()]);
    serve.arg("--registry-cache").arg(folder.join("cache"));
    let server = Server::start(serve, &folder.join("log"));
    server.serving(SOON).await;
    server
}

impl Rig {
    async fn start() -> Self {
        let registry = TestRegistry::start().await;
        let folder = keeper().new_folder("registry");
        let server = serve(&registry, &folder).await;
        Self { registry, server, folder }
    }

    /// Runs `ocr` against it.
    async fn ocr(&self, arguments: &[&str]) -> Said {
        let mut ocr = command(OCR);
        ocr.envs([("OCR_MACHINER", self.server.url()), ("OCR_EXECUTOR", self.server.url())]).args(arguments);
        run(SOON, ocr).await
    }
}

/// Downloads that are not whole.
fn parts(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder.join("cache/work")).unwrap();
    entries.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("part-")).count()
}

fn text(name: &str, kind: &str, file: &str, content: &[u8]) -> Vec<u8> {
    let manifest = manifest(name, "1.0.0", "", kind, &format!("[{kind}]\nfile_path = \"{file}\"\n"));
    pack(&[("package.toml", manifest.as_bytes()), (file, content)])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_installs_and_shows_what_the_registry_has() {
    let rig = Rig::start().await;
    rig.registry.add("web", "1.0.0", "feature", feature("web", "1.0.0", b"echo one"));
    rig.registry.add("web", "1.1.0", "feature", feature("web", "1.1.0", b"echo two"));
    rig.registry.add("web", "1.2.0", "feature", feature("web", "1.2.0", b"echo three"));
    rig.registry.yank("web", "1.2.0");
    rig.registry.add("world", "1.0.0", "exercise", text("world", "exercise", "world.yml", b"name: world\n"));
    rig.registry.add("alert", "1.0.0", "event", text("alert", "event", "alert.md", b"# Alert\n"));

    let listed = rig.ocr(&["--json", "package", "list", "--type", "feature"]).await.json();
    let version = |version| json!({ "name": "web", "version": version, "type": "feature" });
    assert_eq!(listed, json!([version("1.1.0"), version("1.0.0")]));
    let listed = rig.ocr(&["package", "list"]).await.fine();
    assert_eq!(listed.lines().count(), 4, "{listed}");

    let create = ["--json", "vm", "create", "web-0", "-t", "tiny", "--ram", "64MiB", "-l", "default"];
    let vm = rig.ocr(&create).await.json();
    let vm = vm["id"].as_str().unwrap();
    let installed = rig.ocr(&["--json", "feature", "install", vm, "Web@^1"]).await.json();
    assert_eq!(installed["stdout"], "two");
    let installed = rig.ocr(&["--json", "feature", "install", vm, "web@=1.0.0"]).await.json();
    assert_eq!(installed["stdout"], "one");

    assert_eq!(rig.ocr(&["package", "show", "world"]).await.fine(), "name: world\n");
    let shown = rig.ocr(&["--json", "package", "show", "alert"]).await.json();
    assert_eq!(shown["text"], "<h1>Alert</h1>\n");
    assert_eq!(rig.ocr(&["package", "check", "web@1.0"]).await.fine(), "web@1.0 is there\n");
    let failure = rig.ocr(&["package", "check", "web@=1.2.0"]).await.failed();
    assert!(failure.contains("was yanked") && failure.contains("Failed to get package checksum"), "{failure}");
    let failure = rig.ocr(&["package", "show", "web"]).await.failed();
    assert!(failure.contains("wants a package of type event or banner"), "{failure}");

    rig.registry.fault(Faults { wrong_checksum: true, ..Faults::default() });
    rig.registry.add("db", "1.0.0", "feature", feature("db", "1.0.0", b"echo db"));
    let failure = rig.ocr(&["feature", "install", vm, "db"]).await.failed();
    assert!(failure.contains("the archive is not what the registry's checksum says"), "{failure}");
    // What was unpacked goes with the server or with its next start; downloads are gone.
    assert!(rig.server.terminate().await.success());
    assert_eq!(parts(&rig.folder), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_during_a_download_leaves_nothing_after_the_next_start() {
    let rig = Rig::start().await;
    rig.registry.add("alert", "1.0.0", "event", text("alert", "event", "alert.md", b"# Alert\n"));
    rig.registry.fault(Faults { drip: Some(Duration::from_millis(20)), ..Faults::default() });
    let mut client = DeputyQueryServiceClient::new(rig.server.channel().await);
    let source = || Source { name: "alert".to_owned(), version: "*".to_owned() };
    let cut = tokio::spawn(async move { client.create(source()).await });
    until(SOON, "the download is under way", async || (rig.registry.counts().archive_bytes > 0).then_some(())).await;
    assert_eq!(parts(&rig.folder), 1);
    let Rig { registry, server, folder } = rig;
    server.kill();
    cut.await.unwrap().unwrap_err();

    registry.fault(Faults::default());
    let server = serve(&registry, &folder).await;
    assert_eq!(parts(&folder), 0);
    let mut client = DeputyQueryServiceClient::new(server.channel().await);
    let made = soon("create", client.create(source())).await.unwrap().into_inner();
    assert_eq!(made.size, "<h1>Alert</h1>\n".len() as i64);
}
