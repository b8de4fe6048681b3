//! `DeputyQueryService` over a real connection, and over two servers with one store.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{fs, path::Path, sync::Arc, time::Duration};

use common::{Running, soon};
use futures::TryStreamExt;
use ocr_core::{
    ErrorKind,
    error::reason,
    memory::MemoryState,
    package::{
        LocalFolder,
        query::{Config, Queries},
    },
};
use ocr_grpc::{
    Generation, Server,
    client::{CapabilityClient, DeputyQueryServiceClient},
    deputy::PACKAGE_MISSING,
    proto::{GetPackagesQuery, Identifier, Source, capabilities::DeployerType},
};
use tempfile::TempDir;
use tonic::{Code, transport::Channel};

fn write(folder: &Path, name: &str, version: &str, kind: &str, file: &str, content: &[u8]) {
    let package = folder.join(format!("{name}-{version}"));
    fs::create_dir_all(&package).unwrap();
    fs::write(package.join(file), content).unwrap();
    let manifest = format!(
        "[package]\nname = \"{name}\"\nversion = \"{version}\"\nlicense = \"MIT\"\n[content]\ntype = \"{kind}\"\n\
         [{kind}]\nfile_path = \"{file}\"\n"
    );
    fs::write(package.join("package.toml"), manifest).unwrap();
}

fn packages() -> TempDir {
    let folder = TempDir::new().unwrap();
    write(folder.path(), "alert", "1.0.0", "event", "alert.md", b"# Alert\n\n![map](map.png)\n");
    fs::write(folder.path().join("alert-1.0.0/map.png"), vec![7; 500_000]).unwrap();
    write(folder.path(), "world", "1.0.0", "exercise", "world.yml", b"name: old\n");
    write(folder.path(), "world", "1.1.0", "exercise", "world.yml", b"name: new\n");
    folder
}

async fn start(folder: &Path, store: &Arc<MemoryState>, generation: Generation) -> Running {
    let queries = Queries::new(Arc::new(LocalFolder::new(folder)), store.clone(), Config::default());
    Running::start(Server::new().generation(generation).queries(queries), Duration::from_secs(1)).await
}

async fn client(server: &Running) -> DeputyQueryServiceClient<Channel> {
    DeputyQueryServiceClient::new(server.channel().await)
}

fn source(name: &str, version: &str) -> Source {
    Source { name: name.to_owned(), version: version.to_owned() }
}

#[tokio::test]
async fn a_page_that_one_server_made_is_streamed_and_deleted_by_another() {
    let (folder, store) = (packages(), Arc::new(MemoryState::new()));
    let (one, two) =
        (start(folder.path(), &store, Generation::Newer).await, start(folder.path(), &store, Generation::Older).await);
    let made = soon(client(&one).await.create(source("alert", "*"))).await.unwrap().into_inner();
    assert_eq!((made.filename.as_str(), made.checksum.len()), ("alert.html", 64));
    assert!(made.checksum.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')));
    let id = || Identifier { value: made.id.clone() };
    let mut other = client(&two).await;
    let stream = soon(other.stream(id())).await.unwrap().into_inner();
    let chunks: Vec<_> = soon(stream.try_collect()).await.unwrap();
    assert!(chunks.len() > 10 && chunks.iter().all(|one| (1..=32 << 10).contains(&one.chunk.len())));
    let page: Vec<u8> = chunks.into_iter().flat_map(|one| one.chunk).collect();
    assert_eq!(page.len() as i64, made.size);
    assert!(page.starts_with(b"<h1>Alert</h1>") && page.len() > 500_000);

    for _ in ["gone", "gone already"] {
        soon(other.delete(id())).await.unwrap();
    }
    let status = soon(client(&one).await.stream(id())).await.map(drop).unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let status = soon(other.stream(Identifier { value: "x".to_owned() })).await.map(drop).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    one.stopped().await;
    two.stopped().await;
}

#[tokio::test]
async fn packages_scenarios_and_existence_are_answered_in_both_generations() {
    for generation in [Generation::Newer, Generation::Older] {
        let (folder, store) = (packages(), Arc::new(MemoryState::new()));
        let server = start(folder.path(), &store, generation).await;
        let announced = soon(CapabilityClient::new(server.channel().await).get_capabilities(())).await.unwrap();
        let announced: Vec<_> = announced.get_ref().values().collect();
        assert_eq!(announced, [DeployerType::EventInfo, DeployerType::DeputyQuery]);

        let mut client = client(&server).await;
        let query = |kind: &str| GetPackagesQuery { package_type: kind.to_owned() };
        let list = soon(client.get_packages_by_type(query("Exercise"))).await.unwrap().into_inner().packages;
        let list: Vec<_> = list.iter().map(|one| [&one.name, &one.version, &one.r#type].map(String::as_str)).collect();
        assert_eq!(list, [["world", "1.1.0", "exercise"], ["world", "1.0.0", "exercise"]]);
        assert_eq!(soon(client.get_packages_by_type(query(""))).await.unwrap().get_ref().packages.len(), 3);
        let status = soon(client.get_packages_by_type(query("game"))).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");

        let sdl = soon(client.get_scenario(source("WORLD", "^1"))).await.unwrap().into_inner().sdl;
        assert_eq!(sdl, "name: new\n");
        let sdl = soon(client.get_scenario(source("world", "=1.0.0"))).await.unwrap().into_inner().sdl;
        assert_eq!(sdl, "name: old\n");
        let status = soon(client.get_scenario(source("alert", "*"))).await.unwrap_err();
        let error = ocr_grpc::client::error(&status);
        assert_eq!((error.kind(), error.reason()), (ErrorKind::Invalid, Some(reason::PACKAGE_TYPE)));

        soon(client.check_package_exists(source("alert", "*"))).await.unwrap();
        for (name, version, code) in
            [("none", "*", Code::NotFound), ("alert", "2", Code::NotFound), ("alert", "two", Code::InvalidArgument)]
        {
            let status = soon(client.check_package_exists(source(name, version))).await.unwrap_err();
            assert_eq!(status.code(), code);
            assert!(status.message().contains("Failed to get package checksum"), "{status:?}");
        }
        assert_eq!(PACKAGE_MISSING, "Failed to get package checksum");

        // Nobody knows what is missing when the source itself is away.
        fs::remove_dir_all(folder.path()).unwrap();
        let status = soon(client.check_package_exists(source("alert", "*"))).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert!(!status.message().contains(PACKAGE_MISSING), "{status:?}");
        server.stopped().await;
    }
}
