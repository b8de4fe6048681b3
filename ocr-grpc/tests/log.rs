//! What the log tells of calls: their ids, ends and causes; never their contents.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    io,
    sync::{Arc, Mutex},
};

use common::{Held, LONG, Running, soon};
use ocr_core::{Error, ErrorKind};
use ocr_grpc::{
    CallId, Server,
    client::ConditionServiceClient,
    proto::{Account, Condition, Identifier, Source},
};
use tonic::Request;

const CANARY: &str = "s3cr3t-canary";

/// Everything that is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// The lines about one call.
    fn of(&self, call: &str) -> Vec<String> {
        self.text().lines().filter(|line| line.contains(call)).map(str::to_owned).collect()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One test, because there is one log in a process.
#[tokio::test]
async fn the_log_has_ids_and_causes_and_no_contents() {
    let log = Log::default();
    let writer = log.clone();
    // All targets, at the finest level: the libraries below must not tell either.
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .init();

    // A failure: its cause once, with the id, and not in the status.
    for kind in ErrorKind::ALL {
        let call = format!("failure-{kind}").parse::<CallId>().unwrap();
        let deep = Error::internal("the middle").with_source(io::Error::other("the bottom"));
        let status = ocr_grpc::status(&Error::new(kind, "the top").with_source(deep), &call);
        assert!(!format!("{status:?}").contains("the bottom"));
        let lines = log.of(call.as_str());
        let [line] = &lines[..] else { panic!("{lines:?}") };
        assert!(line.contains("the top") && line.contains("the middle: the bottom"), "{line}");
        let fault_of_ours = kind == ErrorKind::Internal;
        assert_eq!(line.contains("ERROR"), fault_of_ours, "{line}");
    }

    // A call with secrets in every field that may have one.
    let held = Held::default();
    let server = Running::start(Server::new().service(held.service()), LONG).await;
    let mut client = ConditionServiceClient::new(server.channel().await);
    let condition = || Condition {
        account: Some(Account { username: "u".into(), password: CANARY.into(), private_key: CANARY.into() }),
        source: Some(Source::default()),
        command: CANARY.into(),
        environment: vec![format!("TOKEN={CANARY}")],
        ..Default::default()
    };
    held.state().release.notify_one();
    let mut request = Request::new(condition());
    request.metadata_mut().insert(CallId::HEADER, "call-to-its-end".parse().unwrap());
    soon(client.create(request)).await.unwrap();
    held.one_dropped().await;

    // One that its client leaves.
    let mut request = Request::new(Identifier::default());
    request.metadata_mut().insert(CallId::HEADER, "call-that-is-left".parse().unwrap());
    drop(soon(client.stream(request)).await.unwrap());
    held.one_dropped().await;
    server.stopped().await;

    assert!(!log.text().contains(CANARY));
    let ours = |call: &str, words: &str| {
        let lines = log.of(call).into_iter().filter(|line| line.contains(words)).collect::<Vec<_>>();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].contains("/ConditionService/"), "{lines:?}");
    };
    ours("call-to-its-end", "call ended code=Ok");
    ours("call-that-is-left", "call left by its client");
}
