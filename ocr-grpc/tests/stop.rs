//! A stop ends by its deadline, whatever peers do, and cuts nothing before.

mod common;

use std::time::{Duration, Instant};

use common::{Held, LONG, Running, soon};
use ocr_grpc::{
    Server, Stopped,
    client::ConditionServiceClient,
    proto::{Condition, Identifier},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

const PREFACE_AND_SETTINGS: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// The deadline of the tests in which something does not end by itself.
const DEADLINE: Duration = Duration::from_millis(500);
/// What a busy machine may add to it.
const SLACK: Duration = Duration::from_secs(10);

#[tokio::test]
async fn peers_that_say_nothing_do_not_hold_it() {
    let server = Running::start(Server::new(), LONG).await;
    let idle = server.tcp().await;
    let mut half = server.tcp().await;
    half.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap();
    // Greets, takes the server's settings, never answers a ping.
    let mut greeted = server.tcp().await;
    greeted.write_all(PREFACE_AND_SETTINGS).await.unwrap();
    soon(greeted.read(&mut [0; 64])).await.unwrap();

    let begun = Instant::now();
    let stopped = server.stopped().await;
    assert!(begun.elapsed() < SLACK, "{:?}", begun.elapsed());
    assert_eq!(stopped.cut_calls, 0);
    drop((idle, half, greeted));
}

#[tokio::test]
async fn open_streams_end_at_once_and_say_why() {
    let held = Held::default();
    let server = Running::start(Server::new().service(held.service()), LONG).await;
    let channel = server.channel().await;
    let mut values =
        soon(ConditionServiceClient::new(channel.clone()).stream(Identifier::default())).await.unwrap().into_inner();
    let mut health = soon(HealthClient::new(channel).watch(HealthCheckRequest::default())).await.unwrap().into_inner();
    soon(health.message()).await.unwrap().unwrap();

    server.begin_stop();
    assert_eq!(soon(values.message()).await.unwrap_err().code(), Code::Unavailable);
    let ended = soon(async {
        loop {
            // Watchers may still be told NOT_SERVING.
            if let Err(status) = health.message().await {
                break status;
            }
        }
    });
    assert_eq!(ended.await.message(), "the server is stopping");
    held.one_dropped().await;
    assert_eq!(server.stopped().await.cut_calls, 0);
}

#[tokio::test]
async fn a_call_at_work_is_waited_for_and_answered() {
    let held = Held::default();
    let server = Running::start(Server::new().service(held.service()), LONG).await;
    let mut client = ConditionServiceClient::new(server.channel().await);
    let work = tokio::spawn(async move { client.create(Condition::default()).await });
    held.one_begun().await;
    server.begin_stop();
    // New connections are refused from now on; the call goes on.
    soon(async { while tokio::net::TcpStream::connect(server.address).await.is_ok() {} }).await;
    held.state().release.notify_one();
    soon(work).await.unwrap().unwrap();
    assert_eq!(server.stopped().await, Stopped { cut_calls: 0, closed_connections: 0 });
}

#[tokio::test]
async fn a_call_that_does_not_end_is_cut_at_the_deadline() {
    let held = Held::default();
    let server = Running::start(Server::new().service(held.service()), DEADLINE).await;
    let mut client = ConditionServiceClient::new(server.channel().await);
    let work = tokio::spawn(async move { client.create(Condition::default()).await });
    held.one_begun().await;
    let begun = Instant::now();
    let stopped = server.stopped().await;
    assert!((DEADLINE..DEADLINE + SLACK).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    assert_eq!(stopped, Stopped { cut_calls: 1, closed_connections: 1 });
    held.one_dropped().await;
    soon(work).await.unwrap().unwrap_err();
}

#[tokio::test]
async fn a_client_that_reads_nothing_does_not_hold_it() {
    let held = Held::default();
    let server = Running::start(Server::new().service(held.service()), DEADLINE).await;
    let mut client = ConditionServiceClient::new(server.channel().await);
    let unread = soon(client.stream(Identifier { value: "x".repeat(1 << 20) })).await.unwrap();
    // More than any window: the stream's task cannot get rid of it.
    for _ in 0..8 {
        held.state().streams.lock().unwrap()[0].send(1.0).unwrap();
    }
    let begun = Instant::now();
    let stopped = server.stopped().await;
    assert!(begun.elapsed() < DEADLINE + SLACK, "{:?}", begun.elapsed());
    assert_eq!(stopped.cut_calls, 1);
    held.one_dropped().await;
    drop(unread);
}

#[tokio::test]
async fn a_server_that_is_dropped_leaves_nothing_running() {
    let held = Held::default();
    let bound = Server::new().service(held.service()).bind("127.0.0.1:0").await.unwrap();
    let address = bound.local_addr();
    let served = tokio::spawn(bound.serve(std::future::pending(), LONG));
    let channel = soon(ocr_grpc::client::connect(&format!("http://{address}"))).await.unwrap();
    let mut client = ConditionServiceClient::new(channel);
    let work = tokio::spawn(async move { client.create(Condition::default()).await });
    held.one_begun().await;
    served.abort();
    held.one_dropped().await;
    soon(work).await.unwrap().unwrap_err();
}
