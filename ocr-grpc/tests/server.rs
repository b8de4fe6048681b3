//! The server: health, reflection, limits, and what every call gets.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use common::{Held, LONG, Running, soon};
use ocr_grpc::{
    CallId, Generation, Limits, Server,
    client::{CapabilityClient, ConditionServiceClient},
    proto::{Capabilities, Condition, Identifier, capabilities::DeployerType},
};
use prost::Message as _;
use prost_types::FileDescriptorProto;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Code, Request, Status, client::Grpc, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_prost::ProstCodec;
use tonic_reflection::pb::{v1, v1alpha};

/// Calls a method by its bare path, as any client may.
async fn call(
    channel: &Channel,
    path: &'static str,
    request: Identifier,
) -> Result<tonic::Response<Capabilities>, Status> {
    let mut client = Grpc::new(channel.clone());
    soon(client.ready()).await.unwrap();
    let codec = ProstCodec::<Identifier, Capabilities>::default();
    soon(client.unary(Request::new(request), http::uri::PathAndQuery::from_static(path), codec)).await
}

async fn health(channel: &Channel, service: &str) -> Result<ServingStatus, Code> {
    let request = HealthCheckRequest { service: service.into() };
    let reply = soon(HealthClient::new(channel.clone()).check(request)).await;
    reply.map(|reply| reply.into_inner().status()).map_err(|status| status.code())
}

#[tokio::test]
async fn a_server_is_not_ready_until_it_says_so() {
    let server = Running::start(Server::new().service(Held::default().service()), LONG).await;
    let channel = server.channel().await;
    for (ready, wanted) in [(false, ServingStatus::NotServing), (true, ServingStatus::Serving)] {
        if ready {
            server.readiness.set_ready(true).await;
        }
        for service in ["", "Capability", "ConditionService"] {
            assert_eq!(health(&channel, service).await, Ok(wanted), "{service:?}");
        }
    }
    assert_eq!(health(&channel, "VirtualMachineService").await, Err(Code::NotFound));
    server.readiness.set_ready(false).await;
    assert_eq!(health(&channel, "").await, Ok(ServingStatus::NotServing));
    server.stopped().await;
}

#[tokio::test]
async fn a_server_announces_what_it_was_told_to() {
    let server = Server::new().announce(DeployerType::Inject).announce(DeployerType::Feature);
    let server = Running::start(server.announce(DeployerType::Inject), LONG).await;
    let mut client = CapabilityClient::new(server.channel().await);
    let reply = soon(client.get_capabilities(())).await.unwrap().into_inner();
    assert_eq!(reply.values().collect::<Vec<_>>(), [DeployerType::Feature, DeployerType::Inject]);
    server.stopped().await;
}

/// What reflection v1 answers: the services, and the file that has a symbol.
async fn reflected(channel: &Channel, symbol: &str) -> Result<(Vec<String>, FileDescriptorProto), Status> {
    use v1::{server_reflection_request::MessageRequest, server_reflection_response::MessageResponse};
    let ask =
        |message_request| v1::ServerReflectionRequest { host: String::new(), message_request: Some(message_request) };
    let questions = vec![
        ask(MessageRequest::ListServices(String::new())),
        ask(MessageRequest::FileContainingSymbol(symbol.to_owned())),
    ];
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel.clone());
    let mut replies = soon(client.server_reflection_info(tokio_stream::iter(questions))).await?.into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) = soon(replies.message()).await?.unwrap().message_response
    else {
        panic!("no list")
    };
    let mut services = list.service.into_iter().map(|service| service.name).collect::<Vec<_>>();
    services.sort();
    let reply = soon(replies.message()).await?.ok_or_else(|| Status::not_found("no file"))?;
    let Some(MessageResponse::FileDescriptorResponse(files)) = reply.message_response else { panic!("no file") };
    Ok((services, FileDescriptorProto::decode(&files.file_descriptor_proto[0][..]).unwrap()))
}

const SERVED: [&str; 5] = [
    "Capability",
    "ConditionService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

#[tokio::test]
async fn reflection_tells_what_is_served_in_the_generation_that_is_spoken() {
    for (generation, reply) in [(Generation::Newer, ".ExecutorResponse"), (Generation::Older, ".Identifier")] {
        let server = Server::new().generation(generation).service(Held::default().service());
        let server = Running::start(server, LONG).await;
        let channel = server.channel().await;
        let (services, file) = reflected(&channel, "ConditionService.create").await.unwrap();
        assert_eq!(services, SERVED);
        let service = file.service.iter().find(|service| service.name() == "ConditionService").unwrap();
        assert_eq!(service.method[0].output_type(), reply);
        assert!(reflected(&channel, "FeatureService").await.is_err(), "it is not served");
        let (_, file) = reflected(&channel, "google.protobuf.Empty").await.unwrap();
        assert_eq!(file.name(), "google/protobuf/empty.proto");
        server.stopped().await;
    }
}

#[tokio::test]
async fn the_older_reflection_protocol_answers_too() {
    use v1alpha::{server_reflection_request::MessageRequest, server_reflection_response::MessageResponse};
    let server = Running::start(Server::new().service(Held::default().service()), LONG).await;
    let question = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(server.channel().await);
    let mut replies = soon(client.server_reflection_info(tokio_stream::iter([question]))).await.unwrap().into_inner();
    let reply = soon(replies.message()).await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = reply.message_response else { panic!("{reply:?}") };
    let mut services = list.service.into_iter().map(|service| service.name).collect::<Vec<_>>();
    services.sort();
    assert_eq!(services, SERVED);
    server.stopped().await;
}

#[tokio::test]
async fn reflection_can_be_switched_off() {
    let server = Running::start(Server::new().reflection(false), LONG).await;
    let refused = reflected(&server.channel().await, "Capability").await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
    server.stopped().await;
}

#[tokio::test]
async fn a_service_that_is_there_twice_is_refused() {
    let server = Server::new().service(Held::default().service()).service(Held::default().service());
    let error = server.bind("127.0.0.1:0").await.unwrap_err();
    assert!(error.to_string().contains("ConditionService is there twice"), "{error}");
}

#[tokio::test]
async fn an_address_that_is_taken_is_named() {
    let server = Server::new().bind("127.0.0.1:0").await.unwrap();
    let taken = server.local_addr();
    let error = Server::new().bind(taken).await.unwrap_err();
    assert!(error.to_string().contains(&taken.to_string()), "{error}");
}

#[tokio::test]
async fn a_message_over_the_limit_is_refused_with_resource_exhausted() {
    let server = Running::start(Server::new(), LONG).await;
    let channel = server.channel().await;
    // The message is its value and a frame of 5 bytes: a tag and the length.
    let limit = Limits::default().max_message_bytes;
    let fits = Identifier { value: "x".repeat(limit - 5) };
    assert_eq!(fits.encoded_len(), limit);
    call(&channel, "/Capability/GetCapabilities", fits).await.unwrap();

    let over = Identifier { value: "x".repeat(limit - 4) };
    let status = call(&channel, "/Capability/GetCapabilities", over).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.message().contains("4194304"), "{status:?}");
    call(&channel, "/Capability/GetCapabilities", Identifier::default()).await.unwrap();
    server.stopped().await;
}

#[tokio::test]
async fn an_unknown_method_is_refused_with_words() {
    let server = Running::start(Server::new(), LONG).await;
    let channel = server.channel().await;
    for path in ["/VirtualMachineService/create", "/Capability/getCapabilities", "/nothing/at/all"] {
        let status = call(&channel, path, Identifier::default()).await.unwrap_err();
        assert_eq!(
            (status.code(), status.message()),
            (Code::Unimplemented, "this server has no such service or method")
        );
    }
    server.stopped().await;
}

#[tokio::test]
async fn every_reply_has_the_id_of_its_call() {
    let server = Running::start(Server::new(), LONG).await;
    let mut client = CapabilityClient::new(server.channel().await);
    let reply = soon(client.get_capabilities(())).await.unwrap();
    assert!(reply.metadata().get(CallId::HEADER).is_some());

    let mut request = Request::new(());
    request.metadata_mut().insert(CallId::HEADER, "mine-7".parse().unwrap());
    let reply = soon(client.get_capabilities(request)).await.unwrap();
    assert_eq!(reply.metadata().get(CallId::HEADER).unwrap(), "mine-7");
    server.stopped().await;
}

#[tokio::test]
async fn headers_over_the_limit_are_refused_and_others_go_on() {
    let server = Running::start(Server::new(), LONG).await;
    let mut client = CapabilityClient::new(server.channel().await);
    let mut request = Request::new(());
    request.metadata_mut().insert("x-large", "x".repeat(20 << 10).parse().unwrap());
    soon(client.get_capabilities(request)).await.unwrap_err();
    soon(client.get_capabilities(())).await.unwrap();
    server.stopped().await;
}

#[tokio::test]
async fn a_connection_over_the_limit_is_closed_and_a_place_that_is_left_is_free() {
    let limits = Limits { max_connections: 2, ..Limits::default() };
    let server = Running::start(Server::new().limits(limits), LONG).await;
    let (first, second) = (server.channel().await, server.channel().await);
    assert_eq!(health(&first, "").await, Ok(ServingStatus::NotServing));
    assert_eq!(health(&second, "").await, Ok(ServingStatus::NotServing));
    let mut third = server.tcp().await;
    assert_eq!(soon(third.read(&mut [0])).await.unwrap_or(0), 0, "it is closed");
    assert_eq!(health(&first, "").await, Ok(ServingStatus::NotServing));

    drop(second);
    soon(async {
        loop {
            let mut next = server.tcp().await;
            // The server speaks first: its settings. It closes when its place is not free yet.
            if next.read(&mut [0]).await.is_ok_and(|read_bytes| read_bytes == 1) {
                break;
            }
        }
    })
    .await;
    server.stopped().await;
}

#[tokio::test]
async fn a_peer_that_never_greets_is_closed_at_the_deadline() {
    let limits = Limits { handshake_deadline: Duration::from_millis(100), ..Limits::default() };
    let server = Running::start(Server::new().limits(limits), LONG).await;
    let mut silent = server.tcp().await;
    let mut other = server.tcp().await;
    other.write_all(b"PRI * HTTP/2.0").await.unwrap();
    for peer in [&mut silent, &mut other] {
        let mut heard = Vec::new();
        // An end or a reset; not a wait for ever.
        let _ = soon(peer.read_to_end(&mut heard)).await;
    }
    assert_eq!(health(&server.channel().await, "").await, Ok(ServingStatus::NotServing));
    server.stopped().await;
}

#[tokio::test]
async fn a_peer_that_greets_and_then_ignores_pings_is_closed() {
    let interval = Duration::from_millis(100);
    let limits = Limits { keepalive_interval: interval, keepalive_timeout: interval, ..Limits::default() };
    let server = Running::start(Server::new().limits(limits), LONG).await;
    let mut peer = server.tcp().await;
    peer.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut heard = Vec::new();
    let _ = soon(peer.read_to_end(&mut heard)).await;
    assert!(!heard.is_empty());
    server.stopped().await;
}

#[tokio::test]
async fn the_limits_are_in_the_servers_settings() {
    let server = Running::start(Server::new(), LONG).await;
    let mut peer = server.tcp().await;
    peer.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut header = [0; 9];
    soon(peer.read_exact(&mut header)).await.unwrap();
    assert_eq!(header[3], 4, "a SETTINGS frame");
    let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
    let mut payload = vec![0; length as usize];
    soon(peer.read_exact(&mut payload)).await.unwrap();
    let settings = payload.chunks(6).map(|setting| {
        (
            u16::from_be_bytes([setting[0], setting[1]]),
            u32::from_be_bytes([setting[2], setting[3], setting[4], setting[5]]),
        )
    });
    let settings = settings.collect::<std::collections::BTreeMap<_, _>>();
    assert_eq!((settings.get(&3), settings.get(&6)), (Some(&(1 << 16)), Some(&(16 << 10))), "{settings:?}");
    server.stopped().await;
}

#[tokio::test]
async fn thousands_of_streams_open_and_close_on_one_connection_and_calls_go_on_beside_them() {
    const STREAMS: usize = 3000;
    let held = Held::default();
    let server = Running::start(Server::new().service(held.service()), LONG).await;
    let client = ConditionServiceClient::new(server.channel().await);
    for _ in 0..2 {
        let mut streams = Vec::new();
        for _ in 0..STREAMS {
            streams.push(soon(client.clone().stream(Identifier::default())).await.unwrap());
        }
        assert_eq!((server.load.calls(), server.load.streams()), (STREAMS, STREAMS));
        soon(client.clone().delete(Identifier::default())).await.unwrap();
        drop(streams);
        for _ in 0..STREAMS {
            held.one_dropped().await;
        }
        soon(async {
            while server.load.calls() > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        assert_eq!(server.load.streams(), 0);
        soon(client.clone().delete(Identifier::default())).await.unwrap();
    }
    server.stopped().await;
}

#[tokio::test]
async fn calls_over_the_limit_of_all_connections_together_are_refused() {
    let held = Held::default();
    let limits = Limits { max_calls: 2, ..Limits::default() };
    let server = Running::start(Server::new().limits(limits).service(held.service()), LONG).await;
    let mut first = ConditionServiceClient::new(server.channel().await);
    let mut second = ConditionServiceClient::new(server.channel().await);
    let stream = soon(first.stream(Identifier::default())).await.unwrap();
    let _other = soon(second.stream(Identifier::default())).await.unwrap();
    for client in [&mut first, &mut second] {
        let status = soon(client.delete(Identifier::default())).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        assert!(status.message().contains("open calls"), "{status:?}");
    }
    drop(stream);
    soon(async { while first.delete(Identifier::default()).await.is_err() {} }).await;
    server.stopped().await;
}

#[tokio::test]
async fn a_request_that_never_ends_is_given_up() {
    let limits = Limits { request_deadline: Duration::from_millis(100), ..Limits::default() };
    let server = Running::start(Server::new().limits(limits), LONG).await;
    let mut client = Grpc::new(server.channel().await);
    soon(client.ready()).await.unwrap();
    let codec = ProstCodec::<(), Capabilities>::default();
    let path = http::uri::PathAndQuery::from_static("/Capability/GetCapabilities");
    let endless = Request::new(futures::stream::pending());
    let status = soon(client.client_streaming(endless, path, codec)).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    server.stopped().await;
}

#[tokio::test]
async fn requests_that_do_not_end_hold_a_bounded_part_of_memory() {
    let limits = Limits { max_arriving_bytes: 1 << 20, ..Limits::default() };
    let server = Running::start(Server::new().limits(limits), LONG).await;
    let channel = server.channel().await;
    let large = || Identifier { value: "x".repeat(700_000) };
    let send_large =
        || async { call(&channel, "/Capability/GetCapabilities", large()).await.map_err(|status| status.code()) };
    send_large().await.unwrap();

    // A whole message, but the request is not at its end.
    let mut client = Grpc::new(channel.clone());
    soon(client.ready()).await.unwrap();
    let endless = tokio_stream::StreamExt::chain(tokio_stream::iter([large()]), futures::stream::pending());
    let endless = tokio::spawn(async move {
        let codec = ProstCodec::<Identifier, Capabilities>::default();
        let path = http::uri::PathAndQuery::from_static("/Capability/GetCapabilities");
        client.client_streaming(Request::new(endless), path, codec).await
    });
    soon(async { while send_large().await.err() != Some(Code::ResourceExhausted) {} }).await;
    endless.abort();
    soon(async { while send_large().await.is_err() {} }).await;
    server.stopped().await;
}

#[tokio::test]
async fn a_handler_that_panics_fails_its_call_alone() {
    let held = Held::default();
    let server = Running::start(Server::new().service(held.service()), LONG).await;
    let mut client = ConditionServiceClient::new(server.channel().await);
    let mut values = soon(client.stream(Identifier::default())).await.unwrap().into_inner();
    let status = soon(client.create(Condition { name: "panic".into(), ..Default::default() })).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(status.message().starts_with("an internal fault; the server's log has it under"), "{status:?}");
    held.state().streams.lock().unwrap()[0].send(1.0).unwrap();
    assert_eq!(soon(values.message()).await.unwrap().unwrap().command_return_value, 1.0);
    server.stopped().await;
}

#[tokio::test]
async fn a_client_that_leaves_is_noticed_at_once() {
    let held = Held::default();
    let server = Running::start(Server::new().service(held.service()), LONG).await;
    let mut client = ConditionServiceClient::new(server.channel().await);

    // In mid-stream.
    let mut values = soon(client.stream(Identifier { value: "c".into() })).await.unwrap().into_inner();
    held.state().streams.lock().unwrap()[0].send(0.5).unwrap();
    let value = soon(values.message()).await.unwrap().unwrap();
    assert_eq!((value.response.as_str(), value.command_return_value), ("c", 0.5));
    drop(values);
    held.one_dropped().await;

    // Before the first value.
    drop(soon(client.stream(Identifier::default())).await.unwrap());
    held.one_dropped().await;

    // While a call is at work.
    held.one_begun().await;
    held.one_begun().await;
    let mut other = client.clone();
    let work = tokio::spawn(async move { other.create(Condition::default()).await });
    held.one_begun().await;
    work.abort();
    held.one_dropped().await;
    server.stopped().await;
}

#[tokio::test]
async fn a_client_that_dies_with_its_connection_is_noticed_at_once() {
    let held = Held::default();
    let server = Running::start(Server::new().service(held.service()), LONG).await;
    // Its own runtime, so that its whole connection goes with it.
    let address = format!("http://{}", server.address);
    let (told, opened) = tokio::sync::oneshot::channel();
    let client = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let channel = ocr_grpc::client::connect(&address).await.unwrap();
            let values = ConditionServiceClient::new(channel).stream(Identifier::default()).await.unwrap();
            told.send(()).unwrap();
            std::mem::forget(values);
        });
        runtime.shutdown_background();
    });
    soon(opened).await.unwrap();
    client.join().unwrap();
    held.one_dropped().await;
    server.stopped().await;
}
