//! What the queue costs: the whole scheduler against bare tokio, and the pure policy alone.
//!
//! The work is the same everywhere: an operation of one yield, 64 at once, on 1,000 machines with 10 callers or streams
//! each, all of which always want to run; on a runtime of one thread. Compared is CPU time per operation.
//! - *floor*: no queue at all. A task is spawned for each operation and answers by a oneshot, 64 in flight.
//! - *naive*: what one would write first. A task per stream takes its machine's mutex, then a permit.
//! - *streams*: periodic operations of the scheduler, with its whole policy.
//! - *one-shots*: tasks that await one `run_once` after the other.

use std::{
    collections::VecDeque,
    hint::black_box,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use futures::{FutureExt, task::AtomicWaker};
use ocr_benches::{ROUNDS, cpu_time, figure, median, remark, resident_bytes};
use ocr_core::{
    VmId,
    queue::{
        Scheduler, SchedulerConfig, Tick,
        fair::{FairQueue, Limits, OpId},
    },
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::{Mutex, Notify, Semaphore, oneshot},
    task::yield_now,
    time::sleep,
};
use uuid::Uuid;

/// What the tests of the policy check, to be printed.
#[path = "../../ocr-core/src/queue/fair/tests/sim.rs"]
mod sim;

const VMS: usize = 1000;
const PER_VM: usize = 10;
const SLOTS: usize = 64;
/// Operations before the measurement: each stream has run, and all are in step.
const WARM_UP: u64 = 4 * (VMS * PER_VM) as u64;
const MEASURED: u64 = 400_000;
const LIMIT: Duration = Duration::from_secs(60);
/// Too short to be kept: all streams are always due.
const INTERVAL: Duration = Duration::from_millis(1);

fn main() {
    // First, while the heap is untouched.
    memory(1_000_000, 100, "queue.bytes_per_stream");
    memory(1_000_000, 10, "queue.bytes_per_stream.ten_per_vm");
    for ops in [10_000, 100_000, 1_000_000] {
        let ns = median((0..ROUNDS).map(|_| policy_ns(ops)).collect());
        figure(&format!("queue.policy_ns_per_op.{ops}"), ns, "ns");
    }
    dispatch();
    many();
    two_workers();
    fairness();
    policy_in_simulated_time();
}

fn vm(number: usize) -> VmId {
    VmId::from_uuid(Uuid::from_u128(number as u128))
}

fn runtime() -> Runtime {
    built(Builder::new_current_thread().enable_time().build())
}

fn runtime_of(worker_threads: usize) -> Runtime {
    built(Builder::new_multi_thread().worker_threads(worker_threads).enable_time().build())
}

fn built(runtime: std::io::Result<Runtime>) -> Runtime {
    runtime.unwrap_or_else(|error| panic!("no runtime: {error}"))
}

fn scheduler(max_connections: usize) -> Scheduler {
    let config = SchedulerConfig { max_connections, max_queued: 2_000_000, ..SchedulerConfig::default() };
    Scheduler::start(config)
}

/// Of one operation.
struct Cost {
    cpu_ns: f64,
    wall_ns: f64,
}

/// Counts operations, and tells when there were enough.
#[derive(Clone, Default)]
struct Meter(Arc<(AtomicU64, AtomicU64, Notify)>);

impl Meter {
    async fn op(&self) {
        yield_now().await;
        let (count, goal, reached) = &*self.0;
        if count.fetch_add(1, Relaxed) + 1 == goal.load(Relaxed) {
            reached.notify_one();
        }
    }

    async fn wait_for(&self, operations: u64) {
        let (count, goal, reached) = &*self.0;
        goal.store(count.load(Relaxed) + operations, Relaxed);
        reached.notified().await;
    }

    /// CPU nanoseconds per operation, once warm.
    async fn measure(&self) -> f64 {
        self.measure_after(WARM_UP).await.cpu_ns
    }

    async fn measure_after(&self, warm_up: u64) -> Cost {
        self.wait_for(warm_up).await;
        let (begun, clock) = (cpu_time(), Instant::now());
        self.wait_for(MEASURED).await;
        let per_op = |time: Duration| time.as_nanos() as f64 / MEASURED as f64;
        Cost { cpu_ns: per_op(cpu_time() - begun), wall_ns: per_op(clock.elapsed()) }
    }
}

/// Where a stream gets its results: the latest, and who waits for it.
#[derive(Default)]
struct Slot {
    result: std::sync::Mutex<Option<u64>>,
    reader: AtomicWaker,
}

impl Slot {
    fn put(&self, result: u64) {
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.reader.wake();
    }
}

fn floor() -> f64 {
    let meter = Meter::default();
    runtime().block_on(async {
        let driver = tokio::spawn({
            let meter = meter.clone();
            async move {
                let mut window: VecDeque<oneshot::Receiver<()>> = VecDeque::with_capacity(SLOTS);
                loop {
                    if window.len() == SLOTS
                        && let Some(answer) = window.pop_front()
                    {
                        let _ = answer.await;
                    }
                    let (reply, answer) = oneshot::channel();
                    let meter = meter.clone();
                    tokio::spawn(async move {
                        meter.op().await;
                        let _ = reply.send(());
                    });
                    window.push_back(answer);
                }
            }
        });
        let ns = meter.measure().await;
        driver.abort();
        ns
    })
}

fn naive() -> f64 {
    let meter = Meter::default();
    runtime().block_on(async {
        let slots = Arc::new(Semaphore::new(SLOTS));
        for _ in 0..VMS {
            let machine = Arc::new(Mutex::new(()));
            for _ in 0..PER_VM {
                let (meter, slots, machine) = (meter.clone(), Arc::clone(&slots), Arc::clone(&machine));
                tokio::spawn(async move {
                    loop {
                        let _machine = machine.lock().await;
                        let _slot = slots.acquire().await;
                        meter.op().await;
                    }
                });
            }
        }
        meter.measure().await
    })
}

fn streams() -> f64 {
    streams_on(runtime(), VMS, WARM_UP).cpu_ns
}

/// Ten streams on each machine, that always want to run.
fn streams_on(runtime: Runtime, vms: usize, warm_up: u64) -> Cost {
    let meter = Meter::default();
    runtime.block_on(async {
        let scheduler = scheduler(SLOTS);
        let streams: Vec<_> = (0..vms * PER_VM)
            .map(|number| {
                let meter = meter.clone();
                let slot = Arc::new(Slot::default());
                let run = move |tick: Tick| {
                    let (meter, slot) = (meter.clone(), Arc::clone(&slot));
                    async move {
                        meter.op().await;
                        slot.put(tick.run);
                        Ok(())
                    }
                    .boxed()
                };
                scheduler.every(vm(number % vms), "stream", INTERVAL, LIMIT, run)
            })
            .collect();
        let cost = meter.measure_after(warm_up).await;
        drop(streams);
        cost
    })
}

fn one_shots() -> f64 {
    let meter = Meter::default();
    runtime().block_on(async {
        let scheduler = scheduler(SLOTS);
        for number in 0..VMS * PER_VM {
            let (meter, scheduler) = (meter.clone(), scheduler.clone());
            tokio::spawn(async move {
                loop {
                    let meter = meter.clone();
                    let op = async move {
                        meter.op().await;
                        Ok(())
                    };
                    if scheduler.run_once(vm(number % VMS), "one-shot", LIMIT, op).await.is_err() {
                        return;
                    }
                }
            });
        }
        meter.measure().await
    })
}

fn dispatch() {
    let mut rounds: [Vec<f64>; 4] = Default::default();
    for _ in 0..ROUNDS {
        for (ns, measure) in rounds.iter_mut().zip([floor, naive, streams, one_shots]) {
            ns.push(measure());
        }
    }
    let [floor, naive, streams, one_shots] = rounds;
    let ratio =
        |ours: &[f64], other: &[f64]| median(ours.iter().zip(other).map(|(ours, other)| other / ours).collect());
    remark("operations per CPU second, over those of the floor or of the naive one");
    figure("queue.dispatch_ratio", ratio(&streams, &floor), "x");
    figure("queue.dispatch_ratio.one_shots", ratio(&one_shots, &floor), "x");
    figure("queue.vs_naive", ratio(&streams, &naive), "x");
    for (name, ns) in [("floor", floor), ("naive", naive), ("streams", streams), ("one_shots", one_shots)] {
        figure(&format!("queue.cpu_ns_per_op.{name}"), median(ns), "ns");
    }
}

/// The policy alone: one operation ends, the next one starts, and all others are ready.
fn policy_ns(ops: usize) -> f64 {
    let mut queue = FairQueue::<()>::new(Limits { max_running: SLOTS, max_per_vm: PER_VM, max_total: ops }, false);
    for number in 0..ops {
        if queue.submit_every(vm(number % (ops / PER_VM)), 1, 0).is_err() {
            panic!("the queue has room for {ops}");
        }
    }
    let mut running = VecDeque::new();
    let mut now_us = 0;
    let mut step = |queue: &mut FairQueue| {
        now_us += 1;
        if running.len() == SLOTS
            && let Some(id) = running.pop_front()
        {
            queue.finish(id, now_us, false);
        }
        queue.advance(now_us);
        running.extend(queue.start_next(now_us).map(|start| start.op));
    };
    for _ in 0..2 * ops {
        step(&mut queue);
    }
    let begun = cpu_time();
    for _ in 0..MEASURED {
        step(&mut queue);
    }
    let ns = (cpu_time() - begun).as_nanos() as f64 / MEASURED as f64;
    black_box(queue.counters());
    ns
}

/// The same with 10^5 machines and 10^6 operations: no more than log n more.
fn many() {
    let vms = 100_000;
    let rounds = (0..ROUNDS).map(|_| {
        let few = streams();
        let many = streams_on(runtime(), vms, 2 * (vms * PER_VM) as u64).cpu_ns;
        let floor = floor();
        (floor / many, many / few, many)
    });
    let rounds: Vec<_> = rounds.collect();
    figure("queue.dispatch_ratio.million", median(rounds.iter().map(|round| round.0).collect()), "x");
    figure("queue.cost_of_million", median(rounds.iter().map(|round| round.1).collect()), "x");
    let log = ((vms * PER_VM) as f64).log2() / ((VMS * PER_VM) as f64).log2();
    remark(format_args!("a hundred times the operations at that many times the cost; log n grows by {log:.2}"));
    figure("queue.cpu_ns_per_op.million", median(rounds.iter().map(|round| round.2).collect()), "ns");
}

/// What two worker threads do in the time of one. By the wall clock, since threads that wait for one another use no CPU
/// time: it takes two cores that nobody else uses. Where others use them, little can be said.
fn two_workers() {
    let rounds: Vec<_> = (0..ROUNDS)
        .map(|_| {
            let one = streams_on(runtime_of(1), VMS, WARM_UP);
            let two = streams_on(runtime_of(2), VMS, WARM_UP);
            (one.wall_ns / two.wall_ns, two.cpu_ns / one.cpu_ns, two.cpu_ns / two.wall_ns)
        })
        .collect();
    figure("queue.scale_2_workers", median(rounds.iter().map(|round| round.0).collect()), "x");
    figure("queue.scale_2_workers.cpu_per_op", median(rounds.iter().map(|round| round.1).collect()), "x_of_one");
    let cores = median(rounds.iter().map(|round| round.2).collect());
    remark(format_args!("the two had {cores:.2} cores; the ratio says something only where that is near 2"));
}

/// Jain's index of runs, over streams and over machines, with an operation of 1 ms: one yield is not the same length
/// for all, since tokio looks for other events now and then.
fn fairness() {
    let runs: Arc<Vec<AtomicU64>> = Arc::new((0..VMS * PER_VM).map(|_| AtomicU64::new(0)).collect());
    runtime().block_on(async {
        let scheduler = scheduler(SLOTS);
        let every = |number: usize| {
            let runs = Arc::clone(&runs);
            let run = move |_| {
                runs[number].fetch_add(1, Relaxed);
                async {
                    sleep(Duration::from_millis(1)).await;
                    Ok(())
                }
                .boxed()
            };
            scheduler.every(vm(number % VMS), "stream", Duration::from_millis(50), LIMIT, run)
        };
        let streams: Vec<_> = (0..VMS * PER_VM).map(every).collect();
        sleep(Duration::from_secs(2)).await;
        runs.iter().for_each(|runs| runs.store(0, Relaxed));
        sleep(Duration::from_secs(15)).await;
        drop(streams);
    });
    let ops: Vec<f64> = runs.iter().map(|runs| runs.load(Relaxed) as f64).collect();
    let vms: Vec<f64> = (0..VMS).map(|vm| ops.iter().skip(vm).step_by(VMS).sum()).collect();
    let jain = |values: &[f64]| {
        let (sum, squares) = values.iter().fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
        sum * sum / (values.len() as f64 * squares)
    };
    remark(format_args!("{:.1} runs of each stream", ops.iter().sum::<f64>() / ops.len() as f64));
    figure("queue.jain_ops", jain(&ops), "of_1");
    figure("queue.jain_vms", jain(&vms), "of_1");
}

/// The policy's bounds, on a clock that is simulated.
fn policy_in_simulated_time() {
    let (mut slip, mut jain, mut late) = (0.0f64, 1.0f64, 0.0f64);
    for load in sim::LOADS {
        let steady = sim::steady(load, 3600);
        (slip, jain) = (slip.max(steady.slip_over_optimum), jain.min(steady.jain));
        if load <= 0.95 {
            late = late.max(sim::lateness(load, 3600));
        }
    }
    remark("loads from 0.5 to 3 with intervals of 2, 10 and 60 s, an hour each, the worst of all");
    figure("queue.slip_over_optimum", slip, "x");
    figure("queue.jain_simulated", jain, "of_1");
    remark("up to load 0.95, over the greater of two operations' length and a hundredth of the interval");
    figure("queue.lateness_p99", late, "of_allowed");
    let hung = sim::hung();
    let cases = [("late_join", sim::late_join()), ("churn", sim::churn()), ("flood", sim::flood())];
    for (name, outcome) in cases.iter().map(|(name, outcome)| (*name, outcome)).chain([("hung", &hung)]) {
        figure(&format!("queue.starving.{name}"), outcome.starving as f64, "streams");
    }
    figure("queue.hung_slip", hung.slip_over_optimum, "x");
}

/// What a stream takes that waits for its tick: all that the scheduler keeps of it, its handle, and its part of its
/// machine. Not what its caller's closure captures: here nothing.
fn memory(streams: usize, per_vm: usize, name: &str) {
    static BEGUN: AtomicU64 = AtomicU64::new(0);
    BEGUN.store(0, Relaxed);
    let runtime = runtime();
    let bytes = runtime.block_on(async {
        let scheduler = scheduler(SLOTS);
        yield_now().await;
        let before = resident_bytes();
        let run = |_| {
            BEGUN.fetch_add(1, Relaxed);
            std::future::ready(Ok(())).boxed()
        };
        let handles: Vec<_> = (0..streams)
            .map(|number| scheduler.every(vm(number / per_vm), "condition", Duration::from_secs(3600), LIMIT, run))
            .collect();
        assert!(handles.iter().all(Result::is_ok), "the queue has room for {streams}");
        while BEGUN.load(Relaxed) < streams as u64 {
            yield_now().await;
        }
        let bytes = resident_bytes().saturating_sub(before);
        drop(handles);
        bytes
    });
    figure(name, bytes as f64 / streams as f64, "bytes");
}
