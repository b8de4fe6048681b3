//! A server on a free port, and a service whose calls the test holds in its hand.

#![allow(dead_code, clippy::unwrap_used, reason = "each test file uses its part")]

use std::{net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, stream};
use ocr_grpc::{
    Load, Readiness, Server, Stopped,
    proto::{
        Condition, ConditionStreamResponse, ExecutorResponse, Identifier,
        condition_service_server::{ConditionService, ConditionServiceServer},
    },
};
use tokio::{
    net::TcpStream,
    sync::{Notify, Semaphore, mpsc},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, transport::Channel};

/// Longer than anything here takes; reaching it is a failure.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// Fails the test when a future takes for ever.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future).await.expect("it takes for ever")
}

/// A running server.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) readiness: Readiness,
    pub(crate) load: Load,
    stop: CancellationToken,
    served: JoinHandle<Stopped>,
}

impl Running {
    pub(crate) async fn start(server: Server, drain_deadline: Duration) -> Self {
        let bound = server.bind("127.0.0.1:0").await.unwrap();
        let (address, readiness, load) = (bound.local_addr(), bound.readiness(), bound.load());
        let stop = CancellationToken::new();
        let served = tokio::spawn(bound.serve(stop.clone().cancelled_owned(), drain_deadline));
        Self { address, readiness, load, stop, served }
    }

    pub(crate) async fn channel(&self) -> Channel {
        soon(ocr_grpc::client::connect(&format!("http://{}", self.address))).await.unwrap()
    }

    pub(crate) async fn tcp(&self) -> TcpStream {
        soon(TcpStream::connect(self.address)).await.unwrap()
    }

    pub(crate) fn begin_stop(&self) {
        self.stop.cancel();
    }

    pub(crate) async fn stopped(self) -> Stopped {
        self.stop.cancel();
        soon(self.served).await.unwrap()
    }
}

/// A `ConditionService` whose calls wait for the test.
#[derive(Clone, Default)]
pub(crate) struct Held(Arc<State>);

pub(crate) struct State {
    /// One permit for each `create` that has begun.
    pub(crate) begun: Semaphore,
    /// Lets one `create` end.
    pub(crate) release: Notify,
    /// One permit for each `create` or `stream` that was dropped or has ended.
    pub(crate) dropped: Semaphore,
    /// The sending sides of the open streams.
    pub(crate) streams: std::sync::Mutex<Vec<mpsc::UnboundedSender<f32>>>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            begun: Semaphore::new(0),
            release: Notify::new(),
            dropped: Semaphore::new(0),
            streams: std::sync::Mutex::default(),
        }
    }
}

impl Held {
    pub(crate) fn service(&self) -> ConditionServiceServer<Held> {
        ConditionServiceServer::new(self.clone())
    }

    pub(crate) fn state(&self) -> &State {
        &self.0
    }

    pub(crate) async fn one_begun(&self) {
        soon(self.0.begun.acquire()).await.unwrap().forget();
    }

    pub(crate) async fn one_dropped(&self) {
        soon(self.0.dropped.acquire()).await.unwrap().forget();
    }
}

/// Counts when it is dropped.
struct AtDrop(Arc<State>);

impl Drop for AtDrop {
    fn drop(&mut self) {
        self.0.dropped.add_permits(1);
    }
}

#[tonic::async_trait]
impl ConditionService for Held {
    type streamStream = Pin<Box<dyn Stream<Item = Result<ConditionStreamResponse, Status>> + Send>>;

    async fn create(&self, request: Request<Condition>) -> Result<Response<ExecutorResponse>, Status> {
        assert_ne!(request.get_ref().name, "panic", "as the test wants it");
        let _at_drop = AtDrop(Arc::clone(&self.0));
        self.0.begun.add_permits(1);
        self.0.release.notified().await;
        Ok(Response::new(ExecutorResponse::default()))
    }

    async fn stream(&self, request: Request<Identifier>) -> Result<Response<Self::streamStream>, Status> {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        self.0.streams.lock().unwrap().push(sender);
        self.0.begun.add_permits(1);
        let at_drop = AtDrop(Arc::clone(&self.0));
        let id = request.into_inner().value;
        Ok(Response::new(Box::pin(stream::poll_fn(move |cx| {
            let _ = &at_drop;
            receiver.poll_recv(cx).map(|value| {
                value.map(|value| Ok(ConditionStreamResponse { response: id.clone(), command_return_value: value }))
            })
        }))))
    }

    async fn delete(&self, _: Request<Identifier>) -> Result<Response<()>, Status> {
        Ok(Response::new(()))
    }
}
