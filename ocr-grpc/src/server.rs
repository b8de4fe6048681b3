//! [`Server`]: carries the services over HTTP/2, within limits, and stops when it is told to.
//!
//! The accept loop is our own. The stock one waits for its peers when it stops, for ever if they say nothing; it has
//! no bound on connections, and none on how long a peer may take to say its first word.
//!
//! ```text
//!   bind ---> serve ---------> stop signal ---> drain ----------------> closed
//!             NOT_SERVING        no new          calls end by            whatever
//!             until              connections;    themselves;             peers do
//!             set_ready          NOT_SERVING     open streams end
//!                                                with UNAVAILABLE
//! ```

mod calls;
mod dispatch;
mod greeting;

use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};

use hyper::server::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use ocr_core::{Error, ErrorKind, Result, exec::Executor, lifecycle::Deployer, package::query::Queries};
use tokio::{
    net::{TcpListener, TcpStream, ToSocketAddrs},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    body::Body,
    codegen::Service,
    server::NamedService,
    service::{Routes, RoutesBuilder},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    capability::Announcement,
    deputy::DeputyQueries,
    executor::{Conditions, Features, Injects},
    machiner::Machiner,
    proto::{
        Generation, capabilities::DeployerType, capability_server::CapabilityServer,
        condition_service_server::ConditionServiceServer, deputy_query_service_server::DeputyQueryServiceServer,
        feature_service_server::FeatureServiceServer, inject_service_server::InjectServiceServer, older,
        virtual_machine_service_server::VirtualMachineServiceServer,
    },
    queue::Queue,
    v1::{self, installs_server::InstallsServer, machines_server::MachinesServer, queue_server::QueueServer},
};
use calls::Calls;
use dispatch::{Arriving, Dispatch};
use greeting::Greeting;

/// How long connections without a call may take to say goodbye when the server stops.
const FAREWELL: Duration = Duration::from_secs(1);

/// The longest question about the schema, in bytes: it is a name.
const MAX_QUESTION_BYTES: usize = 16 << 10;

/// The pause after the system could not accept a connection (out of file handles, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What one server takes from its peers. The defaults are for a server whose clients are a few deployers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The largest message, in and out, in bytes. A larger one is refused with RESOURCE_EXHAUSTED.
    pub max_message_bytes: usize,
    /// The most connections at once. A further one is closed at once.
    pub max_connections: usize,
    /// The most calls at once on one connection, open streams included. A further one waits at the client, silently, so
    /// this is far beyond what one client has: one that watches every condition of an exercise does it over one
    /// connection.
    pub max_streams_per_connection: u32,
    /// The most calls at once, open streams included. More are refused with RESOURCE_EXHAUSTED. An open stream takes
    /// about 1.4 KiB.
    pub max_calls: usize,
    /// The largest headers of one call, in bytes.
    pub max_header_list_bytes: u32,
    /// How long a peer may take to say that it speaks HTTP/2.
    pub handshake_deadline: Duration,
    /// What all requests together may hold that have not arrived whole, in bytes. More is refused with
    /// RESOURCE_EXHAUSTED: every call of every connection might hold a whole message otherwise.
    pub max_arriving_bytes: usize,
    /// How long a call's request may take to arrive whole.
    pub request_deadline: Duration,
    /// From one sign of life to the ping that asks for the next.
    pub keepalive_interval: Duration,
    /// How long a ping's answer may take before the connection is closed.
    pub keepalive_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_message_bytes: 4 << 20,
            max_connections: 512,
            max_streams_per_connection: 1 << 16,
            max_calls: 1 << 17,
            max_header_list_bytes: 16 << 10,
            max_arriving_bytes: 256 << 20,
            handshake_deadline: Duration::from_secs(10),
            request_deadline: Duration::from_secs(60),
            keepalive_interval: Duration::from_secs(30),
            keepalive_timeout: Duration::from_secs(10),
        }
    }
}

/// A server to be: the services and how they are carried.
///
/// ```no_run
/// # async fn example(deployer: ocr_core::lifecycle::Deployer) -> ocr_core::Result<()> {
/// use std::time::Duration;
///
/// let server = ocr_grpc::Server::new().deployer(deployer.clone()).bind("127.0.0.1:0").await?;
/// let readiness = server.readiness();
/// let stop = tokio_util::sync::CancellationToken::new();
/// let running = tokio::spawn(server.serve(stop.clone().cancelled_owned(), Duration::from_secs(25)));
/// deployer.reconcile().await?;
/// readiness.set_ready(true).await;
/// # let _ = running;
/// # Ok(())
/// # }
/// ```
pub struct Server {
    limits: Limits,
    generation: Generation,
    reflection: bool,
    deployer: Option<Deployer>,
    executor: Option<Executor>,
    queries: Option<Queries>,
    announced: Vec<DeployerType>,
    others: Vec<(&'static str, AddService)>,
}

type AddService = Box<dyn FnOnce(&mut RoutesBuilder) + Send>;

impl Default for Server {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("limits", &self.limits)
            .field("generation", &self.generation)
            .field("reflection", &self.reflection)
            .field("services", &self.service_names())
            .finish()
    }
}

impl Server {
    /// A server with the usual limits, of the newer generation, with reflection, and without any service but
    /// `Capability` and health.
    pub fn new() -> Self {
        Self {
            limits: Limits::default(),
            generation: Generation::default(),
            reflection: true,
            deployer: None,
            executor: None,
            queries: None,
            announced: Vec::new(),
            others: Vec::new(),
        }
    }

    /// Sets the limits.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Sets the generation of the contract that is spoken.
    pub fn generation(mut self, generation: Generation) -> Self {
        self.generation = generation;
        self
    }

    /// Sets whether clients may ask for the schema (reflection, v1 and v1alpha).
    pub fn reflection(mut self, reflection: bool) -> Self {
        self.reflection = reflection;
        self
    }

    /// Serves `VirtualMachineService` and `ocr.v1.Machines` over this deployer.
    pub fn deployer(mut self, deployer: Deployer) -> Self {
        self.deployer = Some(deployer);
        self
    }

    /// Serves `FeatureService`, `InjectService`, `ConditionService`, `ocr.v1.Installs` and `ocr.v1.Queue` over this
    /// executor.
    pub fn executor(mut self, executor: Executor) -> Self {
        self.executor = Some(executor);
        self
    }

    /// Serves `DeputyQueryService` over these answers.
    pub fn queries(mut self, queries: Queries) -> Self {
        self.queries = Some(queries);
        self
    }

    /// Serves a further service. Its own limits are its own concern.
    pub fn service<S>(mut self, service: S) -> Self
    where
        S: Service<http::Request<Body>, Response = http::Response<Body>, Error = std::convert::Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        let add = move |routes: &mut RoutesBuilder| {
            routes.add_service(service);
        };
        self.others.push((S::NAME, Box::new(add)));
        self
    }

    /// Announces what a [`Server::service`] does. All others announce themselves.
    pub fn announce(mut self, served: DeployerType) -> Self {
        self.announced.push(served);
        self
    }

    /// The names of the services, as health and reflection know them.
    fn service_names(&self) -> Vec<&'static str> {
        let mut names = vec!["Capability"];
        if self.deployer.is_some() {
            names.extend(["VirtualMachineService", "ocr.v1.Machines"]);
        }
        if self.executor.is_some() {
            names.extend(["FeatureService", "InjectService", "ConditionService", "ocr.v1.Installs", "ocr.v1.Queue"]);
        }
        if self.queries.is_some() {
            names.push("DeputyQueryService");
        }
        names.extend(self.others.iter().map(|(name, _)| *name));
        names
    }

    /// Takes the address; port 0 takes a free one. Nothing is answered before [`Bound::serve`].
    ///
    /// # Errors
    /// `Invalid` for a service that is there twice, `Unavailable` when the address cannot be had.
    pub async fn bind(self, address: impl ToSocketAddrs + fmt::Debug) -> Result<Bound> {
        let names = self.service_names();
        if let Some(twice) = names.iter().enumerate().find_map(|(i, name)| names[..i].contains(name).then_some(name)) {
            return Err(Error::invalid("services", format_args!("{twice} is there twice")));
        }
        let limits = self.limits;
        let (reporter, health) = tonic_health::server::health_reporter();
        let readiness = Readiness { reporter, services: names.iter().copied().chain([""]).collect() };
        readiness.set_ready(false).await;
        let mut routes = RoutesBuilder::default();
        routes.add_service(health);
        if self.reflection {
            add_reflection(&mut routes, self.generation, &names)?;
        }
        let mut announced = self.announced;
        let max = limits.max_message_bytes;
        if let Some(deployer) = self.deployer {
            announced.push(DeployerType::VirtualMachine);
            let service = VirtualMachineServiceServer::new(Machiner::new(deployer.clone()));
            routes.add_service(service.max_decoding_message_size(max).max_encoding_message_size(max));
            let service = MachinesServer::new(v1::Machines::new(deployer));
            routes.add_service(service.max_decoding_message_size(max).max_encoding_message_size(max));
        }
        if let Some(executor) = self.executor {
            announced.extend([DeployerType::Feature, DeployerType::Inject, DeployerType::Condition]);
            let service = FeatureServiceServer::new(Features::new(executor.clone()));
            routes.add_service(service.max_decoding_message_size(max).max_encoding_message_size(max));
            let service = InjectServiceServer::new(Injects::new(executor.clone()));
            routes.add_service(service.max_decoding_message_size(max).max_encoding_message_size(max));
            let service = InstallsServer::new(v1::Installs::new(executor.clone()));
            routes.add_service(service.max_decoding_message_size(max).max_encoding_message_size(max));
            let service = QueueServer::new(Queue::new(executor.clone()));
            routes.add_service(service.max_decoding_message_size(max).max_encoding_message_size(max));
            let service = Conditions::new(executor);
            match self.generation {
                Generation::Newer => {
                    let service = ConditionServiceServer::new(service);
                    routes.add_service(service.max_decoding_message_size(max).max_encoding_message_size(max));
                }
                Generation::Older => {
                    let service = older::condition_service_server::ConditionServiceServer::new(service);
                    routes.add_service(service.max_decoding_message_size(max).max_encoding_message_size(max));
                }
            }
        }
        if let Some(queries) = self.queries {
            announced.extend([DeployerType::EventInfo, DeployerType::DeputyQuery]);
            let service = DeputyQueryServiceServer::new(DeputyQueries::new(queries));
            routes.add_service(service.max_decoding_message_size(max).max_encoding_message_size(max));
        }
        let service = CapabilityServer::new(Announcement::new(announced));
        routes.add_service(service.max_decoding_message_size(max).max_encoding_message_size(max));
        for (_, add) in self.others {
            add(&mut routes);
        }

        let bind = async {
            let listener = TcpListener::bind(&address).await?;
            let local_address = listener.local_addr()?;
            Ok((listener, local_address))
        };
        let (listener, local_address) = bind.await.map_err(|cause: std::io::Error| {
            let message = format!("the address {address:?} cannot be bound");
            Error::new(ErrorKind::Unavailable, message).during("server.bind").with_source(cause)
        })?;
        let calls = Calls::default();
        Ok(Bound { limits, listener, local_address, routes: routes.routes().prepare(), readiness, calls })
    }
}

fn add_reflection(routes: &mut RoutesBuilder, generation: Generation, services: &[&str]) -> Result<()> {
    // Each version lists both: it is what is served.
    let builder = || {
        tonic_reflection::server::Builder::configure()
            .register_file_descriptor_set(generation.descriptors_of(services))
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET)
            .include_reflection_service(false)
    };
    let broken = |cause| Error::internal("the schema cannot be served").during("server.bind").with_source(cause);
    let service = builder().build_v1().map_err(broken)?;
    routes.add_service(service.max_decoding_message_size(MAX_QUESTION_BYTES));
    let service = builder().build_v1alpha().map_err(broken)?;
    routes.add_service(service.max_decoding_message_size(MAX_QUESTION_BYTES));
    Ok(())
}

/// Says over gRPC health whether the server is ready: for each of its services and, under the empty name, for all.
///
/// A new server is not, so that it can put its house in order first.
#[derive(Clone, Debug)]
pub struct Readiness {
    reporter: HealthReporter,
    services: Vec<&'static str>,
}

impl Readiness {
    /// Tells SERVING or NOT_SERVING, to those that ask and to those that watch.
    pub async fn set_ready(&self, ready: bool) {
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in &self.services {
            self.reporter.set_service_status(service, status).await;
        }
    }
}

/// A server that has its address.
#[derive(Debug)]
pub struct Bound {
    limits: Limits,
    listener: TcpListener,
    local_address: SocketAddr,
    routes: Routes,
    readiness: Readiness,
    calls: Calls,
}

/// Says how much a server has to do.
#[derive(Clone, Debug)]
pub struct Load {
    calls: Calls,
}

impl Load {
    /// Calls that are open now, streams included.
    pub fn calls(&self) -> usize {
        self.calls.len()
    }

    /// Calls without an end of their own that are open now: condition streams, and watches of health and of the queue.
    pub fn streams(&self) -> usize {
        self.calls.open_ended()
    }
}

/// How a server stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Calls that were still going at the deadline and were cut.
    pub cut_calls: usize,
    /// Connections that had to be closed because their peers did not close them.
    pub closed_connections: usize,
}

impl Bound {
    /// The address; its port is the real one.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_address
    }

    /// The handle that tells whether the server is ready.
    pub fn readiness(&self) -> Readiness {
        self.readiness.clone()
    }

    /// The handle that tells how much there is to do.
    pub fn load(&self) -> Load {
        Load { calls: self.calls.clone() }
    }

    /// Serves until `stop`, then drains for at most `drain_deadline`, then closes what is left, whatever peers do.
    ///
    /// Dropping this closes everything at once.
    pub async fn serve(self, stop: impl Future<Output = ()> + Send, drain_deadline: Duration) -> Stopped {
        let Self { limits, listener, local_address, routes, readiness, calls } = self;
        tracing::info!(address = %local_address, "serving");
        let stopping = CancellationToken::new();
        let _kill_at_drop = KillAtDrop(calls.clone());
        let connection = Arc::new(Connection::new(limits, routes, calls.clone(), stopping.clone()));
        let mut connections = JoinSet::new();

        accept(&listener, &limits, &connection, &mut connections, stop).await;

        tracing::info!(calls = calls.len(), connections = connections.len(), "stopping");
        drop(listener);
        let end = Instant::now() + drain_deadline;
        readiness.set_ready(false).await;
        stopping.cancel();
        calls.stop();
        let drain = async {
            loop {
                calls.wait().await;
                let farewell = tokio::time::timeout(FAREWELL, all_ended(&mut connections));
                // A call may have come in before its peer heard that we stop; then wait again.
                if farewell.await.is_ok() || calls.len() == 0 {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout_at(end, drain).await;
        while connections.try_join_next().is_some() {}
        let stopped = Stopped { cut_calls: calls.len(), closed_connections: connections.len() };
        calls.kill();
        connections.shutdown().await;
        calls.wait().await;
        tracing::info!(cut_calls = stopped.cut_calls, closed_connections = stopped.closed_connections, "stopped");
        stopped
    }
}

async fn all_ended(connections: &mut JoinSet<()>) {
    while connections.join_next().await.is_some() {}
}

async fn accept(
    listener: &TcpListener,
    limits: &Limits,
    connection: &Arc<Connection>,
    connections: &mut JoinSet<()>,
    stop: impl Future<Output = ()> + Send,
) {
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut stop => return,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((_, peer)) if connections.len() >= limits.max_connections => {
                tracing::warn!(%peer, limit = limits.max_connections, "too many connections; a new one is closed");
            }
            Ok((stream, peer)) => {
                connections.spawn(Arc::clone(connection).run(stream, peer));
            }
            Err(error) => {
                tracing::warn!(%error, "no connection could be accepted");
                tokio::select! {
                    () = &mut stop => return,
                    () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                }
            }
        }
    }
}

struct KillAtDrop(Calls);

impl Drop for KillAtDrop {
    fn drop(&mut self) {
        self.0.kill();
    }
}

/// What all connections have in common.
struct Connection {
    limits: Limits,
    http: http2::Builder<Calls>,
    routes: Routes,
    calls: Calls,
    stopping: CancellationToken,
    arriving: Arc<Arriving>,
}

impl Connection {
    fn new(limits: Limits, routes: Routes, calls: Calls, stopping: CancellationToken) -> Self {
        let mut http = http2::Builder::new(calls.clone());
        http.timer(TokioTimer::new())
            .max_concurrent_streams(limits.max_streams_per_connection)
            .max_header_list_size(limits.max_header_list_bytes)
            .keep_alive_interval(limits.keepalive_interval)
            .keep_alive_timeout(limits.keepalive_timeout);
        Self { limits, http, routes, calls, stopping, arriving: Arriving::new(limits.max_arriving_bytes) }
    }

    async fn run(self: Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        let _ = stream.set_nodelay(true);
        let (io, greeted) = Greeting::new(stream, self.limits.handshake_deadline);
        let dispatch = Dispatch {
            routes: self.routes.clone(),
            calls: self.calls.clone(),
            max_calls: self.limits.max_calls,
            request_deadline: self.limits.request_deadline,
            arriving: Arc::clone(&self.arriving),
            peer: Arc::new(peer),
        };
        let mut serving = std::pin::pin!(self.http.serve_connection(TokioIo::new(io), dispatch));
        let ended = tokio::select! {
            ended = &mut serving => ended,
            () = self.stopping.cancelled() => {
                if !greeted.yet() {
                    return;
                }
                serving.as_mut().graceful_shutdown();
                serving.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%peer, %error, "connection ended");
        }
    }
}
