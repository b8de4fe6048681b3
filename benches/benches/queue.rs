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
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures::FutureExt;
use ocr_benches::{ROUNDS, cpu_time, figure, median, remark, resident_bytes};
use ocr_core::{
    VmId,
    queue::{
        Scheduler, SchedulerConfig,
        fair::{FairQueue, Limits},
    },
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::{Mutex, Notify, Semaphore, oneshot},
    task::yield_now,
};
use uuid::Uuid;

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
    memory();
    for ops in [10_000, 100_000] {
        let ns = median((0..ROUNDS).map(|_| policy_ns(ops)).collect());
        figure(&format!("queue.policy_ns_per_op.{ops}"), ns, "ns");
    }
    dispatch();
}

fn vm(number: usize) -> VmId {
    VmId::from_uuid(Uuid::from_u128(number as u128))
}

fn runtime() -> Runtime {
    match Builder::new_current_thread().enable_time().build() {
        Ok(runtime) => runtime,
        Err(error) => panic!("no runtime: {error}"),
    }
}

fn scheduler(max_connections: usize) -> Scheduler {
    Scheduler::start(SchedulerConfig { max_connections, ..SchedulerConfig::default() })
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
        self.wait_for(WARM_UP).await;
        let begun = cpu_time();
        self.wait_for(MEASURED).await;
        (cpu_time() - begun).as_nanos() as f64 / MEASURED as f64
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
    let meter = Meter::default();
    runtime().block_on(async {
        let scheduler = scheduler(SLOTS);
        let streams: Vec<_> = (0..VMS * PER_VM)
            .map(|number| {
                let meter = meter.clone();
                let run = move |_| {
                    let meter = meter.clone();
                    async move {
                        meter.op().await;
                        Ok(())
                    }
                    .boxed()
                };
                scheduler.every(vm(number % VMS), "stream", INTERVAL, LIMIT, run)
            })
            .collect();
        let ns = meter.measure().await;
        drop(streams);
        ns
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
    let mut queue = FairQueue::new(Limits { max_running: SLOTS, max_per_vm: PER_VM, max_total: ops }, false);
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

/// What a stream takes that waits for its tick: all that the scheduler keeps of it and of a tenth of its machine, with
/// a closure that holds one pointer.
fn memory() {
    let streams = 200_000;
    let runtime = runtime();
    let bytes = runtime.block_on(async {
        let scheduler = scheduler(SLOTS);
        let begun = Arc::new(AtomicU64::new(0));
        yield_now().await;
        let before = resident_bytes();
        let handles: Vec<_> = (0..streams)
            .map(|number| {
                let begun = Arc::clone(&begun);
                let run = move |_| {
                    begun.fetch_add(1, Relaxed);
                    std::future::ready(Ok(())).boxed()
                };
                scheduler.every(vm(number / PER_VM), "condition", Duration::from_secs(3600), LIMIT, run)
            })
            .collect();
        while begun.load(Relaxed) < streams as u64 {
            yield_now().await;
        }
        let bytes = resident_bytes().saturating_sub(before);
        drop(handles);
        bytes
    });
    figure("queue.bytes_per_op", bytes as f64 / streams as f64, "bytes");
}
