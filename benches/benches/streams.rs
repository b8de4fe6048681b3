//! What an open condition stream costs: memory while it is silent, CPU for each value that it carries.
//!
//! Servers run as processes of their own, so that nothing of the clients is in their figures; the first process is the
//! client. Every server has one worker thread. All carry the same message over TCP.
//! - *bare*: tonic's own server with the least that can be a stream: a slot for one value, and a waker.
//! - *shared*: our server with the real executor, where each of a few conditions has many streams.
//! - *own*: the same, where each stream has a condition of its own; it carries a runner and a place in the queue too.
//!
//! A burst is one value to each stream. Conditions wait at a gate for it, in guests that answer at once, so that the
//! burst has a beginning.

use std::{
    env, fmt,
    io::{BufRead, BufReader, Lines, Write},
    pin::Pin,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream::SelectAll, task::AtomicWaker};
use ocr_benches::{ROUNDS, cpu_time, figure, median, remark, resident_bytes};
use ocr_core::{
    ComputeBackend, Deletion, ExecOutput, ExecRequest, GuestCapabilities, GuestExec, GuestInfo, PutFiles, RemoveFiles,
    Result, VmId,
    exec::{Account, ConditionRequest, Config, Executor, Parts, Probe, SecretStorage},
    memory::{MemoryCloud, MemoryState},
    package::LocalFolder,
    queue::{Scheduler, SchedulerConfig},
};
use ocr_grpc::{
    Limits, Server,
    client::ConditionServiceClient,
    proto::{
        Condition, ConditionStreamResponse, ExecutorResponse, Identifier,
        condition_service_server::{ConditionService, ConditionServiceServer},
    },
};
use tokio::{
    net::TcpListener,
    runtime::{Builder, Runtime},
    sync::Semaphore,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Endpoint};
use tracing_subscriber::{EnvFilter, layer::SubscriberExt as _, util::SubscriberInitExt as _};

const STREAMS: usize = 50_000;
/// Each with 2,000 streams. With 10 it is the same, within a tenth.
const CONNECTIONS: usize = 25;
/// Conditions of the *shared* server; each has `STREAMS / SHARED` streams.
const SHARED: usize = 50;
/// Conditions on one machine, of the *own* server.
const PER_VM: usize = 100;
const SLOTS: usize = 64;
/// Long against a burst, so that no condition comes twice in one.
const SHARED_INTERVAL: Duration = Duration::from_secs(2);
const OWN_INTERVAL: Duration = Duration::from_secs(8);
/// Opened at once on one connection.
const OPENING: usize = 64;
const ROLE: &str = "OCR_BENCH_STREAMS_ROLE";

fn main() {
    match env::var(ROLE).as_deref() {
        Ok("bare") => serve_bare(),
        Ok("shared") => serve_ours(SHARED, SHARED, SHARED_INTERVAL),
        Ok("own") => serve_ours(STREAMS, STREAMS / PER_VM, OWN_INTERVAL),
        _ => measure(),
    }
}

// The client.

fn measure() {
    let runtime = runtime();
    let wanted = env::var("OCR_BENCH_STREAMS_ONLY").unwrap_or_default();
    if wanted != "own" {
        let mut bare = Peer::start("bare");
        let mut shared = Peer::start("shared");
        let bare_streams = Streams::open(&runtime, &mut bare);
        let shared_streams = Streams::open(&runtime, &mut shared);
        figure("streams.bytes_per_stream.bare", bare_streams.bytes, "bytes");
        figure("streams.bytes_per_stream.shared", shared_streams.bytes, "bytes");
        figure("streams.opened_per_second.bare", bare_streams.opened_per_second, "1/s");
        figure("streams.opened_per_second.shared", shared_streams.opened_per_second, "1/s");
        let (mut floor, mut ours) = (Vec::new(), Vec::new());
        // The first burst is not like the others: buffers are made.
        for _ in 0..=ROUNDS {
            floor.push(bare_streams.burst(&runtime, &mut bare));
            ours.push(shared_streams.burst(&runtime, &mut shared));
        }
        let (floor, ours) = (&floor[1..], &ours[1..]);
        ratio("streams.burst_ratio", floor, ours);
        report("bare", floor);
        report("shared", ours);
        figure("streams.bytes_per_stream.bare.used", bare_streams.bytes_now(&mut bare), "bytes");
        figure("streams.bytes_per_stream.shared.used", shared_streams.bytes_now(&mut shared), "bytes");
    }
    if wanted != "shared" {
        let mut own = Peer::start("own");
        let streams = Streams::open(&runtime, &mut own);
        figure("streams.bytes_per_stream", streams.bytes, "bytes");
        figure("streams.opened_per_second.own", streams.opened_per_second, "1/s");
        let ours: Vec<_> = (0..=ROUNDS).map(|_| streams.burst(&runtime, &mut own)).collect();
        report("own", &ours[1..]);
        figure("streams.bytes_per_stream.used", streams.bytes_now(&mut own), "bytes");
    }
}

fn ratio(name: &str, floor: &[Burst], ours: &[Burst]) {
    let ratio =
        |of: fn(&Burst) -> f64| median(floor.iter().zip(ours).map(|(floor, ours)| of(floor) / of(ours)).collect());
    remark("the server's CPU time for one value to each stream: bare, over ours");
    figure(name, ratio(|burst| burst.cpu_us), "x");
    figure(&format!("{name}.wall"), ratio(|burst| burst.wall_us), "x");
}

fn report(name: &str, bursts: &[Burst]) {
    figure(
        &format!("streams.cpu_us_per_value.{name}"),
        median(bursts.iter().map(|burst| burst.cpu_us).collect()),
        "us",
    );
    figure(
        &format!("streams.wall_us_per_value.{name}"),
        median(bursts.iter().map(|burst| burst.wall_us).collect()),
        "us",
    );
}

struct Burst {
    cpu_us: f64,
    wall_us: f64,
}

/// A server in a process of its own.
struct Peer {
    child: Child,
    input: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    address: String,
    conditions: Vec<String>,
}

impl Peer {
    fn start(role: &str) -> Self {
        let mut child = Command::new(ok(env::current_exe()))
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{role}: {error}"));
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else { panic!("no pipes") };
        let lines = BufReader::new(output).lines();
        let mut peer = Self { child, input, lines, address: String::new(), conditions: Vec::new() };
        peer.address = peer.line();
        let count = peer.number();
        peer.conditions = (0..count).map(|_| peer.line()).collect();
        peer
    }

    fn line(&mut self) -> String {
        ok(self.lines.next().unwrap_or_else(|| panic!("the server has ended")))
    }

    fn number(&mut self) -> usize {
        ok(self.line().parse())
    }

    fn ask(&mut self, what: &str) -> usize {
        ok(writeln!(self.input, "{what}"));
        self.number()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Streams {
    received: Arc<AtomicUsize>,
    before: usize,
    bytes: f64,
    opened_per_second: f64,
}

impl Streams {
    /// Opens all streams; a task for each connection reads them.
    fn open(runtime: &Runtime, peer: &mut Peer) -> Self {
        let before = peer.ask("rss");
        let received = Arc::new(AtomicUsize::new(0));
        let began = Instant::now();
        let address = format!("http://{}", peer.address);
        runtime.block_on(async {
            let mut tasks = Vec::new();
            for connection in 0..CONNECTIONS {
                let channel = ok(ok(Endpoint::from_shared(address.clone())).connect().await);
                let ids: Vec<_> = (connection..STREAMS)
                    .step_by(CONNECTIONS)
                    .map(|number| peer.conditions[number % peer.conditions.len()].clone())
                    .collect();
                tasks.push(tokio::spawn(async move {
                    let opening = futures::stream::iter(ids).map(|value| {
                        let mut client = ConditionServiceClient::new(channel.clone());
                        async move { ok(client.stream(Identifier { value }).await).into_inner() }
                    });
                    opening.buffer_unordered(OPENING).collect::<SelectAll<_>>().await
                }));
            }
            for task in tasks {
                let mut streams = ok(task.await);
                let received = Arc::clone(&received);
                tokio::spawn(async move {
                    // It ends with its server.
                    while let Some(Ok(_)) = streams.next().await {
                        received.fetch_add(1, Relaxed);
                    }
                });
            }
        });
        let seconds = began.elapsed().as_secs_f64();
        let after = peer.ask("rss");
        let bytes = (after.saturating_sub(before)) as f64 / STREAMS as f64;
        Self { received, before, bytes, opened_per_second: STREAMS as f64 / seconds }
    }

    fn bytes_now(&self, peer: &mut Peer) -> f64 {
        peer.ask("rss").saturating_sub(self.before) as f64 / STREAMS as f64
    }

    /// One value to each stream.
    fn burst(&self, runtime: &Runtime, peer: &mut Peer) -> Burst {
        while peer.ask("ready") == 0 {
            std::thread::sleep(Duration::from_millis(20));
        }
        let goal = self.received.load(Relaxed) + STREAMS;
        let cpu = peer.ask("cpu");
        let began = Instant::now();
        peer.ask("burst");
        runtime.block_on(async {
            while self.received.load(Relaxed) < goal {
                assert!(
                    began.elapsed() < Duration::from_secs(60),
                    "values are missing: {} of {goal}",
                    self.received.load(Relaxed)
                );
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        let wall_us = began.elapsed().as_micros() as f64 / STREAMS as f64;
        let cpu_us = (peer.ask("cpu") - cpu) as f64 / 1000.0 / STREAMS as f64;
        Burst { cpu_us, wall_us }
    }
}

// The servers.

/// Answers the client's questions until it goes.
fn answer(ready: impl Fn() -> bool, burst: impl Fn()) {
    for line in std::io::stdin().lines() {
        let number = match ok(line).as_str() {
            "rss" => resident_bytes(),
            "cpu" => cpu_time().as_nanos() as usize,
            "ready" => usize::from(ready()),
            "burst" => {
                burst();
                0
            }
            other => panic!("{other}?"),
        };
        say(number);
    }
}

fn say(text: impl fmt::Display) {
    ok(writeln!(std::io::stdout().lock(), "{text}"));
}

#[derive(Debug, Default)]
struct Slot {
    waker: AtomicWaker,
    value: Mutex<Option<f32>>,
}

/// The least that can be a stream of values.
struct SlotStream {
    slot: Arc<Slot>,
    id: String,
}

impl Stream for SlotStream {
    type Item = Result<ConditionStreamResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.slot.waker.register(cx.waker());
        match self.slot.value.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(value) => Poll::Ready(Some(Ok(ConditionStreamResponse {
                response: self.id.clone(),
                command_return_value: value,
            }))),
            None => Poll::Pending,
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Bare {
    slots: Arc<Mutex<Vec<Arc<Slot>>>>,
}

#[tonic::async_trait]
impl ConditionService for Bare {
    type streamStream = SlotStream;

    async fn create(&self, _: Request<Condition>) -> Result<Response<ExecutorResponse>, Status> {
        Err(Status::unimplemented("create"))
    }

    async fn stream(&self, request: Request<Identifier>) -> Result<Response<SlotStream>, Status> {
        let slot = Arc::<Slot>::default();
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&slot));
        Ok(Response::new(SlotStream { slot, id: request.into_inner().value }))
    }

    async fn delete(&self, _: Request<Identifier>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented("delete"))
    }
}

fn serve_bare() {
    let runtime = runtime();
    let bare = Bare::default();
    let listener = ok(runtime.block_on(TcpListener::bind("127.0.0.1:0")));
    say(ok(listener.local_addr()));
    say(1);
    say(uuid::Uuid::new_v4());
    let serving =
        tonic::transport::Server::builder().add_service(ConditionServiceServer::new(bare.clone())).serve_with_incoming(
            TcpListenerStream::new(listener).map(|stream| stream.inspect(|stream| ok(stream.set_nodelay(true)))),
        );
    runtime.spawn(serving);
    answer(
        || true,
        || {
            for slot in bare.slots.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                *slot.value.lock().unwrap_or_else(PoisonError::into_inner) = Some(1.0);
                slot.waker.wake();
            }
        },
    );
}

fn serve_ours(conditions: usize, vms: usize, interval: Duration) {
    // As the programs log, but for the writing: what a call keeps for its log lines counts.
    let filter = EnvFilter::new("warn,ocr_core=info,ocr_grpc=info");
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::sink);
    ok(tracing_subscriber::registry().with(filter).with(log).try_init());
    let runtime = runtime();
    let gate = Arc::new(Semaphore::new(0));
    let (executor, scheduler, ids) = runtime.block_on(executor(&gate, conditions, vms, interval));
    let limits = Limits { max_streams_per_connection: STREAMS as u32, ..Limits::default() };
    let bound = ok(runtime.block_on(Server::new().limits(limits).executor(executor).bind("127.0.0.1:0")));
    say(bound.local_addr());
    say(ids.len());
    ids.iter().for_each(say);
    runtime.spawn(bound.serve(std::future::pending(), Duration::ZERO));
    answer(
        // All wait, at the gate or behind those that do.
        || {
            let counters = scheduler.snapshot().counters;
            counters.ready + counters.running == conditions
        },
        || gate.add_permits(conditions),
    );
}

async fn executor(
    gate: &Arc<Semaphore>,
    conditions: usize,
    vms: usize,
    interval: Duration,
) -> (Executor, Scheduler, Vec<String>) {
    let cloud = MemoryCloud::new();
    let mut machines = Vec::new();
    for number in 0..vms {
        machines.push(ok(cloud.create_vm(&MemoryCloud::tiny_spec(&format!("web-{number}"))).await).id);
    }
    let scheduler = Scheduler::start(SchedulerConfig { max_connections: SLOTS, ..SchedulerConfig::default() });
    let parts = Parts {
        guest: Arc::new(Gated { gate: Arc::clone(gate) }),
        compute: Arc::new(cloud),
        store: Arc::new(MemoryState::new()),
        packages: Arc::new(LocalFolder::new("/nonexistent")),
        scheduler: scheduler.clone(),
        secrets: SecretStorage::Memory,
        fleet: None,
    };
    let executor = Executor::new(parts, Config::default());
    let mut ids = Vec::new();
    for number in 0..conditions {
        let condition = ConditionRequest {
            name: "is the web server up".to_owned(),
            vm: machines[number % vms],
            account: Account::default(),
            probe: Probe::Command { line: "systemctl is-active -q nginx && echo 1".to_owned(), interval },
            environment: [].into(),
        };
        ids.push(ok(executor.create_condition(condition).await).id.to_string());
    }
    (executor, scheduler, ids)
}

/// Guests that answer at once when the gate opens.
#[derive(Debug)]
struct Gated {
    gate: Arc<Semaphore>,
}

#[tonic::async_trait]
impl GuestExec for Gated {
    fn capabilities(&self) -> GuestCapabilities {
        GuestCapabilities { max_file_bytes: 1 << 20, max_output_bytes: 1 << 20, users: false, streaming: false }
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        Err(unused(vm))
    }

    async fn put_files(&self, vm: VmId, _: &PutFiles) -> Result<()> {
        Err(unused(vm))
    }

    async fn get_file(&self, vm: VmId, _: &str, _: u64) -> Result<Bytes> {
        Err(unused(vm))
    }

    async fn remove_files(&self, vm: VmId, _: &RemoveFiles) -> Result<Vec<Result<Deletion>>> {
        Err(unused(vm))
    }

    async fn exec(&self, _: VmId, _: &ExecRequest) -> Result<ExecOutput> {
        ok(self.gate.acquire().await).forget();
        Ok(ExecOutput {
            exit_code: 0,
            stdout: Bytes::from_static(b"1\n"),
            stderr: Bytes::new(),
            stdout_truncated: false,
            stderr_truncated: false,
        })
    }
}

fn unused(vm: VmId) -> ocr_core::Error {
    ocr_core::Error::unsupported(format!("only conditions run on {vm}"))
}

fn runtime() -> Runtime {
    ok(Builder::new_multi_thread().worker_threads(1).enable_all().build())
}

fn ok<T, E: fmt::Display>(result: Result<T, E>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}
