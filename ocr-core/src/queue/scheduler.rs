//! Runs operations on tokio, in the order that [`fair`](super::fair) gives.
//!
//! There is no dispatcher: as many workers as there are slots each take the lock, give back the machine they had, take
//! the next operation and run it in place. A worker that finds nothing parks, and whoever brings work wakes one; that
//! one wakes the next while there is more. One more task, the time keeper, sleeps until the next tick is due while a
//! worker is parked (busy workers look at the time themselves), and until the first of those that run has to be over:
//! a timer for each run would cost more than all the rest.
//!
//! A machine's gate may be closed ([`Scheduler::close`]): nothing starts there until it is opened. So several processes
//! share machines: the one that owns a machine opens it. [`Scheduler::gate_events`] tells who wants one, and
//! [`Scheduler::resize`] changes how many run at once.
//!
//! The lock is never held while an operation is polled or dropped, so an operation may use the scheduler that runs it.
//! (But one that keeps a [`Scheduler`] or [`Periodic`] of its own scheduler for ever keeps that alive for ever.)

use std::{
    any::Any,
    collections::HashMap,
    fmt,
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use futures::future::BoxFuture;
use tokio::{
    runtime::Handle,
    sync::{Notify, Semaphore, oneshot},
    task::AbortHandle,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::task::TaskTracker;

use super::{
    fair::{Cancelled, Counters, FairQueue, Finished, Full, GateEvent, Limits, OpId, Start},
    label::{Label, Labels},
    lateness::{Lateness, Tally, Trend},
};
use crate::{Error, ErrorKind, Result, Retry, VmId, error::reason};

#[cfg(test)]
mod tests;

/// The most that [`SchedulerConfig::max_connections`] can be. Each is a task, of about a kilobyte.
pub const MAX_CONNECTIONS: usize = 65_536;
/// The shortest interval of a periodic operation: that of tokio's timer.
pub const MIN_INTERVAL: Duration = Duration::from_millis(1);
/// The longest interval of a periodic operation, and the longest limit of any: a year.
pub const MAX_INTERVAL: Duration = Duration::from_secs(365 * 24 * 3600);

/// How long an aborted worker may take to let go. Only one that blocks its thread needs any time at all.
const ABORT_WAIT: Duration = Duration::from_secs(1);
/// Where there is no alarm.
const NEVER_US: u64 = u64::MAX;

/// A scheduler's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// How many operations run at once, on all machines together: at most [`MAX_CONNECTIONS`]. [`Scheduler::resize`]
    /// changes it; with 0 nothing runs until then.
    pub max_connections: usize,
    /// How many operations one machine may have besides the one that runs: one-shots that wait, and periodic ones.
    pub max_queued_per_vm: usize,
    /// How many operations there may be in all.
    pub max_queued: usize,
    /// Whether machines start with their gate closed: then nothing runs on one before [`Scheduler::open`].
    pub gated: bool,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self { max_connections: 50, max_queued_per_vm: 1000, max_queued: 1_000_000, gated: false }
    }
}

/// Runs operations on machines: one at a time on each, [`SchedulerConfig::max_connections`] at once over all, in the
/// order that [`fair`](super::fair) promises. Cloning is cheap; all clones are one scheduler.
///
/// ```
/// use std::time::Duration;
///
/// use futures::FutureExt;
/// use ocr_core::{VmId, queue::{Scheduler, SchedulerConfig}};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> ocr_core::Result<()> {
/// let scheduler = Scheduler::start(SchedulerConfig { max_connections: 10, ..SchedulerConfig::default() });
/// let (vm, limit) = (VmId::random(), Duration::from_secs(5));
///
/// let condition = scheduler.every(vm, "disk usage", Duration::from_secs(30), limit, |tick| {
///     async move {
///         println!("run {}, {:?} late", tick.run, tick.lateness);
///         Ok(())
///     }
///     .boxed()
/// })?;
/// let answer = scheduler.run_once(vm, "install", limit, async { Ok(42) }).await?;
/// assert_eq!(answer, 42);
///
/// drop(condition); // no more runs
/// scheduler.shutdown(Duration::from_secs(10)).await;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Scheduler {
    owner: Arc<Owner>,
}

/// An operation that runs again and again until this is dropped. A run that has begun is let finish.
#[must_use = "dropping it ends the periodic operation"]
pub struct Periodic {
    owner: Arc<Owner>,
    op: OpId,
}

/// One run of a periodic operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// How much later than planned it begins. For the first run: since [`Scheduler::every`].
    pub lateness: Duration,
    /// How many runs came before this one.
    pub run: u64,
    /// How many ticks were skipped between the run before and this one.
    pub skipped: u64,
}

/// What happens at the gates of a scheduler's machines. See [`Scheduler::gate_events`].
pub struct GateEvents {
    shared: Arc<Shared>,
    listener: u64,
}

/// What a scheduler holds at one instant.
#[derive(Clone, Debug)]
pub struct QueueSnapshot {
    /// How many operations are ready and wait for a slot or for their machine.
    pub depth: usize,
    /// How many may run at once.
    pub max_connections: usize,
    /// What the queue did so far.
    pub counters: Counters,
    /// Lateness of the latest few thousand runs of periodic operations, median and 99th percentile.
    pub lateness: Option<LatenessQuantiles>,
    /// Lateness of all runs of periodic operations since the start, but for first ones.
    pub lateness_since_start: LatenessHistogram,
    /// How long first runs and one-shots waited, since the start.
    pub waits_since_start: LatenessHistogram,
    /// What runs, the longest running first.
    pub running: Vec<RunningOp>,
    /// Machines with operations, or on probation, by id.
    pub vms: Vec<VmQueue>,
    /// Periodic operations, by machine.
    pub periodics: Vec<PeriodicStatus>,
}

/// An operation that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunningOp {
    /// On which machine.
    pub vm: VmId,
    /// What it is, in the caller's words.
    pub what: String,
    /// For how long it has run.
    pub running_for: Duration,
}

/// One machine's part of the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmQueue {
    /// The machine.
    pub vm: VmId,
    /// Its operations that are ready and wait.
    pub queued: usize,
    /// Its operations in all, those that run or wait for their tick too.
    pub operations: usize,
    /// Which one of them runs.
    pub holder: Option<RunningOp>,
    /// Whether its gate is open.
    pub open: bool,
    /// Whether its last operation hung.
    pub on_probation: bool,
    /// Lateness of the latest few thousand re-runs of its periodic operations.
    pub lateness: Option<LatenessQuantiles>,
}

/// How a periodic operation fares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeriodicStatus {
    /// Its machine.
    pub vm: VmId,
    /// What it is, in the caller's words.
    pub what: String,
    /// The interval asked for.
    pub interval_wanted: Duration,
    /// The interval from start to start, averaged over the last eight or so; none before the third run.
    pub interval_got: Option<Duration>,
    /// How many runs have begun.
    pub runs: u64,
    /// How many ticks were skipped.
    pub skipped: u64,
    /// How much later than planned its runs began; none before the second run.
    pub lateness: Option<LatenessQuantiles>,
}

/// Quantiles of lateness, right to a factor of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatenessQuantiles {
    /// The median.
    pub p50: Duration,
    /// The 99th percentile.
    pub p99: Duration,
}

/// How many values lie where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LatenessHistogram {
    /// Upper bounds, rising, and how many values lie under each and not under the one before.
    pub buckets: Vec<(Duration, u64)>,
    /// How many lie over all bounds.
    pub over: u64,
    /// All values together.
    pub sum: Duration,
}

impl Scheduler {
    /// Starts a scheduler; its workers are tasks on the current tokio runtime, whose timers must be enabled. They end
    /// with [`Scheduler::shutdown`], or when the last clone and the last [`Periodic`] are dropped.
    ///
    /// Outside of a runtime there is nothing to start on: every operation then fails with `Unavailable`.
    pub fn start(config: SchedulerConfig) -> Self {
        let slots = config.max_connections.min(MAX_CONNECTIONS);
        let limits = Limits { max_running: slots, max_per_vm: config.max_queued_per_vm, max_total: config.max_queued };
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                queue: FairQueue::new(limits, config.gated),
                labels: Labels::default(),
                vms: Vec::new(),
                seats: Vec::new(),
                slots,
                vm_drains: HashMap::new(),
                slot_drains: Vec::new(),
                listener: 0,
                parked: 0,
                alarm_us: NEVER_US,
                closed: false,
                lateness: Lateness::default(),
                late: Tally::default(),
                waits: Tally::default(),
                workers: Vec::new(),
            }),
            config,
            runtime: Handle::try_current().ok(),
            wakeups: Semaphore::new(0),
            alarm: Notify::new(),
            alarm_us: AtomicU64::new(NEVER_US),
            deadline_us: AtomicU64::new(NEVER_US),
            gates: Notify::new(),
            tracker: TaskTracker::new(),
            epoch: Instant::now(),
        });
        if let Some(runtime) = &shared.runtime {
            let time = keep_time(Arc::clone(&shared));
            let time = shared.tracker.spawn_on(time, runtime).abort_handle();
            shared.lock().workers.push(time);
            shared.hire(slots);
        } else {
            tracing::error!("the queue cannot start: it wants a tokio runtime");
            shared.close();
        }
        Self { owner: Arc::new(Owner { shared }) }
    }

    /// Runs an operation once, alone on its machine, when its turn comes. It is queued when the future is first polled.
    ///
    /// Dropping the future while the operation is queued takes it out at once. When it runs already it runs to its end,
    /// since effects in a guest must not be torn, and its result is discarded.
    ///
    /// `limit` is a hard deadline of the run itself: past it the operation is dropped. One that fails with `TimedOut`,
    /// by this or by itself, puts its machine on probation.
    ///
    /// # Errors
    /// - The operation's own.
    /// - `Exhausted` with reason `QUEUE_FULL`: the machine has too many operations, or the queue.
    /// - `TimedOut`: `limit` passed; the operation may have had effects.
    /// - `Unavailable`: the scheduler shuts down. Retry is `Safe` when the operation had not begun, else `Ambiguous`.
    /// - `Internal`: the operation panicked.
    pub fn run_once<T: Send + 'static>(
        &self,
        vm: VmId,
        what: impl Into<String>,
        limit: Duration,
        op: impl Future<Output = Result<T>> + Send + 'static,
    ) -> impl Future<Output = Result<T>> + Send {
        let shared = &*self.owner.shared;
        let (reply, answer) = oneshot::channel();
        let what = what.into();
        let work = Box::new(Once { op: Some(Box::pin(op)), result: None, reply });
        async move {
            let op = shared.submit(vm, None, &what, limit, work)?;
            let mut place = Place { shared, op: Some(op) };
            let result = answer.await;
            place.op = None;
            // Nobody answers when the worker was aborted, or its runtime is gone.
            result.unwrap_or_else(|_| Err(shutting_down(vm).with_retry(Retry::Ambiguous)))
        }
    }

    /// Runs an operation every `interval`, on a fixed grid, until the [`Periodic`] is dropped.
    ///
    /// The first run is as soon as the queue allows. The second is planned up to one interval after the first has ended,
    /// and all others from there, an interval apart; what was started together is so spread over the interval. Ticks
    /// that pass while the operation waits or runs are skipped; [`Tick::skipped`] counts them.
    ///
    /// `limit` is a hard deadline of one run: past it the run is dropped. That, and a run that fails with `TimedOut`,
    /// puts the machine on probation; other errors do not matter to the queue. A run that panics is logged, and the
    /// next one comes all the same.
    ///
    /// # Errors
    /// - `Invalid`: the interval is under [`MIN_INTERVAL`] or over [`MAX_INTERVAL`].
    /// - `Exhausted` with reason `QUEUE_FULL`: the machine has too many operations, or the queue.
    /// - `Unavailable`: the scheduler shuts down.
    pub fn every(
        &self,
        vm: VmId,
        what: impl Into<String>,
        interval: Duration,
        limit: Duration,
        op: impl FnMut(Tick) -> BoxFuture<'static, Result<()>> + Send + 'static,
    ) -> Result<Periodic> {
        self.every_from(None, vm, what, interval, limit, op)
    }

    /// [`Scheduler::every`] of an operation that ran elsewhere, where there is a `next`: it carries on from there, with a
    /// run planned for then and the others an interval apart.
    ///
    /// # Errors
    /// Those of [`Scheduler::every`].
    pub fn every_from(
        &self,
        next: Option<Instant>,
        vm: VmId,
        what: impl Into<String>,
        interval: Duration,
        limit: Duration,
        op: impl FnMut(Tick) -> BoxFuture<'static, Result<()>> + Send + 'static,
    ) -> Result<Periodic> {
        if !(MIN_INTERVAL..=MAX_INTERVAL).contains(&interval) {
            return Err(Error::invalid(
                "interval",
                format_args!("wants a time between {MIN_INTERVAL:?} and 365 days, got {interval:?}"),
            ));
        }
        let interval = Some((interval, next));
        let op = self.owner.shared.submit(vm, interval, &what.into(), limit, Box::new(Every(op)))?;
        Ok(Periodic { owner: Arc::clone(&self.owner), op })
    }

    /// How many slots there is work for now, open gates only: what runs, and what could. It costs next to nothing.
    pub fn demand(&self) -> usize {
        self.owner.shared.lock().queue.demand()
    }

    /// What the scheduler holds now. It costs time in proportion to that, and holds up the queue meanwhile: microseconds
    /// for hundreds of operations, milliseconds for tens of thousands.
    pub fn snapshot(&self) -> QueueSnapshot {
        let shared = &self.owner.shared;
        let now_us = shared.now_us();
        let mut snapshot = {
            let state = shared.lock();
            let running = state.queue.vms().filter_map(|load| state.running(load.vm, load.running?, now_us));
            let periodics = state.queue.periodics().filter_map(|op| state.status(op));
            let vms = state.queue.vms().filter(|load| load.operations > 0 || load.on_probation).map(|load| VmQueue {
                vm: load.vm,
                queued: load.ready,
                operations: load.operations,
                holder: load.running.and_then(|running| state.running(load.vm, running, now_us)),
                open: load.open,
                on_probation: load.on_probation,
                lateness: state
                    .vms
                    .get(load.index)
                    .filter(|seen| seen.vm == load.vm)
                    .and_then(|seen| seen.lateness.quantiles()),
            });
            let counters = state.queue.counters();
            QueueSnapshot {
                depth: counters.ready,
                max_connections: state.slots,
                counters,
                lateness: state.lateness.quantiles(),
                lateness_since_start: state.late.histogram(),
                waits_since_start: state.waits.histogram(),
                running: running.collect(),
                vms: vms.collect(),
                periodics: periodics.collect(),
            }
        };
        snapshot.running.sort_by_key(|running| std::cmp::Reverse(running.running_for));
        snapshot.vms.sort_by_key(|load| load.vm);
        snapshot.periodics.sort_by(|a, b| (a.vm, &a.what).cmp(&(b.vm, &b.what)));
        snapshot
    }

    /// What runs on a machine: why it is busy.
    pub fn holder(&self, vm: VmId) -> Option<RunningOp> {
        let shared = &self.owner.shared;
        let now_us = shared.now_us();
        let state = shared.lock();
        state.running(vm, state.queue.running_on(vm)?, now_us)
    }

    /// Opens a machine's gate: what is ready there takes its turn. It stays open, also while there is nothing to run,
    /// until [`Scheduler::close`].
    ///
    /// A periodic operation whose ticks passed meanwhile has one run pending, planned for the latest of them; the others
    /// are skipped.
    pub fn open(&self, vm: VmId) {
        let shared = &self.owner.shared;
        let state = &mut *shared.lock();
        state.queue.open(vm, shared.now_us());
        shared.rouse(state);
    }

    /// Closes a machine's gate, at once and whether or not the future is awaited: nothing starts there any more. What
    /// runs is let finish; the future resolves when nothing runs there, even if the gate was opened again meanwhile.
    ///
    /// One-shots and periodic operations are still taken. They wait, and cost neither a slot nor polling.
    pub fn close(&self, vm: VmId) -> impl Future<Output = ()> + Send + use<> {
        let shared = &self.owner.shared;
        let state = &mut *shared.lock();
        let drained = state.queue.close(vm).then(|| state.when_drained(vm));
        shared.rouse(state);
        async move {
            if let Some(drained) = drained {
                // Where nobody is left to tell, nothing runs.
                let _ = drained.await;
            }
        }
    }

    /// Closes all gates as [`Scheduler::close`] does, also of machines that are yet to come: from here on the scheduler
    /// is [gated](SchedulerConfig::gated). The future resolves when what ran at the call has ended.
    pub fn close_all(&self) -> impl Future<Output = ()> + Send + use<> {
        let shared = &self.owner.shared;
        let state = &mut *shared.lock();
        let busy: Vec<VmId> = state.queue.vms().filter(|load| load.running.is_some()).map(|load| load.vm).collect();
        state.queue.close_all();
        let drained: Vec<_> = busy.into_iter().map(|vm| state.when_drained(vm)).collect();
        shared.rouse(state);
        async move {
            for drained in drained {
                let _ = drained.await;
            }
        }
    }

    /// What happens at the gates from here on, and what is so now. One listens at a time: for who listened before, it
    /// ends.
    pub fn gate_events(&self) -> GateEvents {
        let shared = &self.owner.shared;
        let state = &mut *shared.lock();
        state.listener += 1;
        state.queue.listen();
        shared.gates.notify_waiters();
        GateEvents { shared: Arc::clone(shared), listener: state.listener }
    }

    /// Changes how many operations run at once (at most [`MAX_CONNECTIONS`]), at once and whether or not the future is
    /// awaited. With 0 nothing starts any more. What runs is let finish; the future resolves when at most so many run.
    pub fn resize(&self, max_connections: usize) -> impl Future<Output = ()> + Send + use<> {
        let shared = &self.owner.shared;
        let slots = max_connections.min(MAX_CONNECTIONS);
        let drained = {
            let state = &mut *shared.lock();
            state.slots = slots;
            state.queue.set_max_running(slots);
            shared.rouse(state);
            (state.queue.counters().running > slots).then(|| {
                let (tell, told) = oneshot::channel();
                state.slot_drains.retain(|(_, tell)| !tell.is_closed());
                state.slot_drains.push((slots, tell));
                told
            })
        };
        shared.hire(slots);
        async move {
            if let Some(drained) = drained {
                let _ = drained.await;
            }
        }
    }

    /// Ends the scheduler: it takes no new work, one-shots that wait fail with `Unavailable`, periodic operations end.
    /// What runs is given until `grace`, then dropped. Returns when all is over.
    ///
    /// Awaited inside an operation of this scheduler, it waits for itself, until `grace`.
    pub async fn shutdown(&self, grace: Duration) {
        let shared = &self.owner.shared;
        shared.close();
        shared.tracker.close();
        if shared.tracker.is_empty() || timeout(grace.min(MAX_INTERVAL), shared.tracker.wait()).await.is_ok() {
            return;
        }
        let workers = std::mem::take(&mut shared.lock().workers);
        tracing::warn!(running = self.snapshot().running.len(), ?grace, "the queue drops what still runs");
        for worker in &workers {
            worker.abort();
        }
        if timeout(ABORT_WAIT, shared.tracker.wait()).await.is_err() {
            tracing::error!(left = shared.tracker.len(), "an operation blocks its thread and cannot be dropped");
        }
    }
}

impl fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scheduler").field("config", &self.owner.shared.config).finish_non_exhaustive()
    }
}

impl Periodic {
    /// How it fares.
    pub fn status(&self) -> Option<PeriodicStatus> {
        let state = self.owner.shared.lock();
        state.status(self.op)
    }
}

impl Drop for Periodic {
    fn drop(&mut self) {
        self.owner.shared.cancel(self.op);
    }
}

impl fmt::Debug for Periodic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Periodic").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl GateEvents {
    /// The next event; none when the scheduler ends, or somebody else listens.
    ///
    /// It is so when it is received: what was overtaken is not told. Each is told once, until it changes, so that for
    /// each machine at most one waits. Dropping the future loses nothing.
    pub async fn recv(&mut self) -> Option<GateEvent> {
        loop {
            let noted = self.shared.gates.notified();
            {
                let state = &mut *self.shared.lock();
                if state.closed || state.listener != self.listener {
                    return None;
                }
                if let Some(event) = state.queue.next_event() {
                    return Some(event);
                }
            }
            noted.await;
        }
    }
}

impl fmt::Debug for GateEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GateEvents").finish_non_exhaustive()
    }
}

/// What clones and handles hold; the workers hold [`Shared`]. When the last owner goes, the workers end.
struct Owner {
    shared: Arc<Shared>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// A one-shot's place in the queue, for as long as its caller waits.
struct Place<'a> {
    shared: &'a Shared,
    op: Option<OpId>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(op) = self.op {
            self.shared.cancel(op);
        }
    }
}

struct Shared {
    state: Mutex<State>,
    config: SchedulerConfig,
    runtime: Option<Handle>,
    /// One permit for each worker that was woken and has not noticed yet.
    wakeups: Semaphore,
    /// Tells the time keeper that the alarm moved to an earlier time.
    alarm: Notify,
    /// As [`State::alarm_us`], to look at without the lock.
    alarm_us: AtomicU64,
    /// No run that waits has to be over before this.
    deadline_us: AtomicU64,
    /// Tells who listens that there is an event.
    gates: Notify,
    tracker: TaskTracker,
    epoch: Instant,
}

struct State {
    queue: FairQueue<Task>,
    labels: Labels,
    /// By [`Start::vm_index`].
    vms: Vec<VmSeen>,
    /// What each worker runs.
    seats: Vec<Seat>,
    /// How many may run at once. There may be more workers, after it was lowered.
    slots: usize,
    /// Who waits until nothing runs on a machine.
    vm_drains: HashMap<VmId, Vec<oneshot::Sender<()>>>,
    /// Who waits until at most so many run.
    slot_drains: Vec<(usize, oneshot::Sender<()>)>,
    /// Who listens at the gates: the latest.
    listener: u64,
    /// Workers that wait to be woken.
    parked: usize,
    /// When the time keeper will look again.
    alarm_us: u64,
    closed: bool,
    /// Of all periodic operations.
    lateness: Lateness,
    /// The same since the start.
    late: Tally,
    /// Of first runs and one-shots, since the start.
    waits: Tally,
    workers: Vec<AbortHandle>,
}

/// What is known of how a machine's periodic operations fare.
struct VmSeen {
    vm: VmId,
    lateness: Lateness,
}

/// What an operation does, and how it fares: 40 bytes.
#[derive(Default)]
struct Task {
    /// Taken while it runs.
    work: Option<Box<dyn Work>>,
    /// How it fares, if it is periodic.
    fare: Fare,
    limit_s: f32,
    /// What it is; none while there is no operation.
    label: Option<Label>,
}

/// What is known of how a periodic operation fares.
#[derive(Clone, Copy, Default)]
struct Fare {
    /// Moving average from start to start.
    gap_us: f32,
    late_us: f32,
    skipped: u32,
    lateness: Trend,
}

/// What a worker runs.
#[derive(Clone)]
struct Seat {
    op: Option<OpId>,
    /// Counts its runs.
    run: u64,
    until_us: u64,
    bell: Arc<Bell>,
}

/// Tells a worker that its run has to be over.
#[derive(Default)]
struct Bell {
    /// Which of its runs.
    run: AtomicU64,
    /// The worker's task keeps its waker.
    waker: OnceLock<Waker>,
}

/// How a run ended.
enum Ending {
    Done,
    /// It failed with `TimedOut`.
    Hung,
    Panicked(Box<dyn Any + Send>),
}

type Run = BoxFuture<'static, Result<()>>;

/// An operation, of whatever kind and result type.
trait Work: Send {
    /// Begins a run. A one-shot is its own run.
    fn begin(&mut self, tick: Tick) -> Option<Run>;
    /// Polls a one-shot. When it is over it is dropped, and its result is kept.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Ending>;
    /// Drops a one-shot and keeps this as its result.
    fn give_up(&mut self, error: Error);
    /// Hands a one-shot's result to its caller, if one still waits.
    fn deliver(self: Box<Self>);
}

struct Every<F>(F);

impl<F: FnMut(Tick) -> Run + Send> Work for Every<F> {
    fn begin(&mut self, tick: Tick) -> Option<Run> {
        Some((self.0)(tick))
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<Ending> {
        Poll::Ready(Ending::Done)
    }

    fn give_up(&mut self, _: Error) {}

    fn deliver(self: Box<Self>) {}
}

struct Once<T, F> {
    op: Option<Pin<Box<F>>>,
    result: Option<Result<T>>,
    reply: oneshot::Sender<Result<T>>,
}

impl<T: Send, F: Future<Output = Result<T>> + Send> Work for Once<T, F> {
    fn begin(&mut self, _: Tick) -> Option<Run> {
        None
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Ending> {
        let Some(op) = &mut self.op else { return Poll::Ready(Ending::Done) };
        let result = ready!(op.as_mut().poll(context));
        self.op = None;
        let ending = ending(&result);
        self.result = Some(result);
        Poll::Ready(ending)
    }

    fn give_up(&mut self, error: Error) {
        self.result = Some(Err(error));
        self.op = None;
    }

    fn deliver(self: Box<Self>) {
        if let Some(result) = self.result {
            // The caller may be gone.
            let _ = self.reply.send(result);
        }
    }
}

fn ending<T>(result: &Result<T>) -> Ending {
    match result {
        Err(error) if error.kind() == ErrorKind::TimedOut => Ending::Hung,
        _ => Ending::Done,
    }
}

/// A run that a worker has taken.
struct Taken {
    op: OpId,
    vm: VmId,
    tick: Tick,
    until_us: u64,
    limit: Duration,
    work: Box<dyn Work>,
}

/// A run that is over.
struct Done {
    op: OpId,
    hung: bool,
    work: Box<dyn Work>,
    /// It gave others their turn meanwhile.
    waited: bool,
}

enum Turn {
    Run(Taken),
    Park,
    End,
}

struct Worker {
    shared: Arc<Shared>,
    seat: usize,
    bell: Arc<Bell>,
    /// Counts its runs.
    run: u64,
    ended: bool,
}

impl Worker {
    async fn work(mut self) {
        poll_fn(|context| {
            self.bell.waker.get_or_init(|| context.waker().clone());
            Poll::Ready(())
        })
        .await;
        let mut done = None;
        loop {
            let (turn, over) = self.turn(done.take());
            if let Some(work) = over {
                quietly(|| work.deliver());
            }
            match turn {
                Turn::Run(taken) => {
                    let over = self.perform(taken).await;
                    if !over.waited {
                        // Operations that never wait must not keep the thread from other tasks.
                        tokio::task::coop::consume_budget().await;
                    }
                    done = Some(over);
                }
                Turn::Park => {
                    if let Ok(permit) = self.shared.wakeups.acquire().await {
                        permit.forget();
                    }
                }
                Turn::End => break,
            }
        }
        self.ended = true;
    }

    /// Gives back what this worker had, and takes what it does next. The second part is work that is over: to be
    /// delivered and dropped without the lock.
    fn turn(&mut self, done: Option<Done>) -> (Turn, Option<Box<dyn Work>>) {
        let shared = Arc::clone(&self.shared);
        let now_us = shared.now_us();
        let state = &mut *shared.lock();
        let over = done.and_then(|done| match state.finish(self.seat, done.op, now_us, done.hung) {
            Finished::Gone => {
                state.forget(done.op);
                Some(done.work)
            }
            Finished::Again => {
                state.queue.kept_mut(done.op).work = Some(done.work);
                None
            }
        });
        if state.closed {
            shared.rest(state);
            return (Turn::End, over);
        }
        state.queue.advance(now_us);
        if let Some(start) = state.queue.start_next(now_us) {
            if let Some(taken) = self.take(state, start, now_us) {
                shared.rouse(state);
                return (Turn::Run(taken), over);
            }
            debug_assert!(false, "{start:?} has no work");
            state.queue.cancel(start.op);
            state.finish(self.seat, start.op, now_us, false);
        }
        shared.rest(state);
        state.parked += 1;
        shared.rouse(state);
        (Turn::Park, over)
    }

    fn take(&mut self, state: &mut State, start: Start, now_us: u64) -> Option<Taken> {
        let task = state.queue.kept_mut(start.op);
        let work = task.work.take()?;
        let limit_s = task.limit_s;
        let late_us = now_us.saturating_sub(start.planned_us);
        if let Some(interval_us) = start.interval_us {
            task.fare.note(interval_us, start.run, start.skipped, late_us);
        }
        if start.run == 0 {
            state.waits.record(late_us);
        } else {
            state.lateness.record(late_us);
            state.late.record(late_us);
            state.seen(start.vm_index, start.vm).record(late_us);
        }
        let limit = Duration::try_from_secs_f32(limit_s).unwrap_or(MAX_INTERVAL);
        let until_us = now_us.saturating_add(limit.as_micros() as u64);
        self.run += 1;
        let seat = &mut state.seats[self.seat];
        (seat.op, seat.run, seat.until_us) = (Some(start.op), self.run, until_us);
        let tick = Tick { lateness: Duration::from_micros(late_us), run: start.run, skipped: start.skipped };
        Some(Taken { op: start.op, vm: start.vm, tick, until_us, limit, work })
    }

    async fn perform(&self, taken: Taken) -> Done {
        let Taken { op, vm, tick, until_us, limit, mut work } = taken;
        let mut waited = false;
        let ending = match catch_unwind(AssertUnwindSafe(|| work.begin(tick))) {
            Err(panic) => Some(Ending::Panicked(panic)),
            Ok(mut run) => {
                let ending = poll_fn(|context| {
                    if waited && self.bell.run.load(Ordering::Acquire) == self.run {
                        return Poll::Ready(None);
                    }
                    let poll = catch_unwind(AssertUnwindSafe(|| match &mut run {
                        Some(run) => run.as_mut().poll(context).map(|result| ending(&result)),
                        None => work.poll(context),
                    }));
                    match poll.unwrap_or_else(|panic| Poll::Ready(Ending::Panicked(panic))) {
                        Poll::Ready(ending) => Poll::Ready(Some(ending)),
                        Poll::Pending => {
                            if !waited {
                                waited = true;
                                self.shared.watch(until_us);
                            }
                            Poll::Pending
                        }
                    }
                })
                .await;
                quietly(|| drop(run));
                ending
            }
        };
        let hung = match ending {
            Some(Ending::Done) => false,
            Some(Ending::Hung) => true,
            Some(Ending::Panicked(panic)) => {
                let what = self.what(op);
                let message = panic_message(&*panic);
                tracing::error!(%vm, what, message, "an operation panicked");
                let error = Error::internal("the operation panicked").with_source(message);
                quietly(|| work.give_up(error.during("queue.run_once").on(resource(vm, &what))));
                false
            }
            None => {
                let what = self.what(op);
                tracing::warn!(%vm, what, ?limit, "an operation ran past its limit and was dropped");
                let error =
                    Error::timed_out(format!("the operation was dropped when its limit of {limit:?} had passed"));
                quietly(|| work.give_up(error.during("queue.run_once").on(resource(vm, &what))));
                true
            }
        };
        Done { op, hung, work, waited }
    }

    /// Only for what is rare: it takes the lock.
    fn what(&self, op: OpId) -> String {
        self.shared.lock().what(op)
    }
}

impl Drop for Worker {
    /// A worker that did not end by itself was aborted, or its runtime is gone: without it the queue would stand.
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        self.shared.close();
        let state = &mut *self.shared.lock();
        if let Some(op) = state.seats[self.seat].op {
            state.queue.cancel(op);
            state.finish(self.seat, op, self.shared.now_us(), false);
            // Its work was dropped with the run.
            state.forget(op);
        }
        self.shared.rest(state);
    }
}

/// Sleeps until the next tick is due and wakes a worker for it, as long as one is parked; and until a run has to be
/// over, to tell its worker.
async fn keep_time(shared: Arc<Shared>) {
    loop {
        let alarm_us = {
            let state = &mut *shared.lock();
            if state.closed && state.queue.counters().running == 0 {
                return;
            }
            let now_us = shared.now_us();
            state.queue.advance(now_us);
            shared.ring(state, now_us);
            shared.rouse(state);
            let due_us = state.queue.next_due_us().filter(|_| state.parked > 0).unwrap_or(NEVER_US);
            shared.set_alarm(state, due_us)
        };
        let earlier = shared.alarm.notified();
        if alarm_us == NEVER_US {
            earlier.await;
        } else {
            tokio::select! {
                () = sleep_until(shared.instant(alarm_us)) => {}
                () = earlier => {}
            }
        }
    }
}

impl Shared {
    /// Nothing panics with the lock held but for a fault of this module; then the queue is still the best there is.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_us(&self) -> u64 {
        self.epoch.elapsed().as_micros() as u64
    }

    fn instant(&self, at_us: u64) -> Instant {
        self.epoch + Duration::from_micros(at_us)
    }

    fn submit(
        &self,
        vm: VmId,
        interval: Option<(Duration, Option<Instant>)>,
        what: &str,
        limit: Duration,
        work: Box<dyn Work>,
    ) -> Result<OpId> {
        let now_us = self.now_us();
        let state = &mut *self.lock();
        if state.closed {
            return Err(shutting_down(vm));
        }
        let op = match interval {
            None => state.queue.submit_once(vm, now_us),
            Some((interval, None)) => state.queue.submit_every(vm, interval.as_micros() as u64, now_us),
            Some((interval, Some(next))) => {
                let due_us = next.saturating_duration_since(self.epoch).as_micros() as u64;
                state.queue.resume_every(vm, interval.as_micros() as u64, due_us, now_us)
            }
        };
        let op = op.map_err(|full| self.full(vm, full))?;
        let label = Some(state.labels.keep(what));
        let limit_s = limit.min(MAX_INTERVAL).as_secs_f32();
        *state.queue.kept_mut(op) = Task { work: Some(work), fare: Fare::default(), limit_s, label };
        self.rouse(state);
        Ok(op)
    }

    /// Sees that a run that waits is over in time.
    fn watch(&self, until_us: u64) {
        if until_us < self.deadline_us.load(Ordering::SeqCst) {
            self.deadline_us.fetch_min(until_us, Ordering::SeqCst);
        }
        // This and what `set_alarm` does are in opposite order: one of the two sees the other.
        if until_us < self.alarm_us.load(Ordering::SeqCst) {
            let state = &mut *self.lock();
            if until_us < state.alarm_us {
                self.set_alarm(state, until_us);
                self.alarm.notify_one();
            }
        }
    }

    /// When the time keeper looks again: then, or when the first run has to be over.
    fn set_alarm(&self, state: &mut State, at_us: u64) -> u64 {
        state.alarm_us = at_us;
        self.alarm_us.store(at_us, Ordering::SeqCst);
        let deadline_us = self.deadline_us.load(Ordering::SeqCst);
        if deadline_us < at_us {
            state.alarm_us = deadline_us;
            self.alarm_us.store(deadline_us, Ordering::SeqCst);
        }
        state.alarm_us
    }

    /// Tells the workers whose run has to be over.
    fn ring(&self, state: &mut State, now_us: u64) {
        if self.deadline_us.load(Ordering::SeqCst) > now_us {
            return;
        }
        let mut deadline_us = NEVER_US;
        for seat in state.seats.iter_mut().filter(|seat| seat.op.is_some()) {
            if seat.until_us <= now_us {
                seat.until_us = NEVER_US;
                seat.bell.run.store(seat.run, Ordering::Release);
                if let Some(waker) = seat.bell.waker.get() {
                    waker.wake_by_ref();
                }
            }
            deadline_us = deadline_us.min(seat.until_us);
        }
        self.deadline_us.store(deadline_us, Ordering::SeqCst);
    }

    /// Where nothing runs there is no deadline. A timer that nobody needs would still wake the time keeper, and a paused
    /// clock would run to it.
    fn rest(&self, state: &State) {
        if state.queue.counters().running == 0 && (state.closed || self.deadline_us.load(Ordering::SeqCst) != NEVER_US)
        {
            self.deadline_us.store(NEVER_US, Ordering::SeqCst);
            self.alarm.notify_one();
        }
    }

    /// Sees that there are so many workers.
    fn hire(self: &Arc<Self>, slots: usize) {
        let Some(runtime) = &self.runtime else { return };
        let seats = {
            let state = &mut *self.lock();
            let seats = if state.closed { 0..0 } else { state.seats.len()..slots };
            let bells: Vec<_> = seats.map(|seat| (seat, Arc::new(Bell::default()))).collect();
            let seat = |bell| Seat { op: None, run: 0, until_us: NEVER_US, bell };
            state.seats.extend(bells.iter().map(|(_, bell)| seat(Arc::clone(bell))));
            bells
        };
        // Without the lock: where the runtime ends just now, a worker is dropped here, and takes it.
        let hired: Vec<_> = seats
            .into_iter()
            .map(|(seat, bell)| {
                let worker = Worker { shared: Arc::clone(self), seat, bell, run: 0, ended: false };
                self.tracker.spawn_on(worker.work(), runtime).abort_handle()
            })
            .collect();
        self.lock().workers.extend(hired);
    }

    fn cancel(&self, op: OpId) {
        let work = {
            let state = &mut *self.lock();
            match state.queue.cancel(op) {
                Cancelled::Removed => {
                    // Less work never frees a slot, but the machine may now offer something else.
                    self.rouse(state);
                    state.forget(op)
                }
                Cancelled::Running | Cancelled::Unknown => None,
            }
        };
        drop(work);
    }

    /// Wakes a worker when there is work for it, and the time keeper when it would sleep too long.
    ///
    /// This holds after every change: when something can start and a worker is parked, one that was woken is on its way
    /// to the lock. Each that comes calls this again, so one wake-up is enough for any amount of work.
    fn rouse(&self, state: &mut State) {
        if state.queue.has_event() {
            self.gates.notify_one();
        }
        if state.parked == 0 {
            return;
        }
        if state.queue.can_start() {
            state.parked -= 1;
            self.wakeups.add_permits(1);
        }
        if state.parked > 0
            && let Some(due_us) = state.queue.next_due_us()
            && due_us < state.alarm_us
        {
            self.set_alarm(state, due_us);
            self.alarm.notify_one();
        }
    }

    /// Takes no more work, drops what waits and lets the workers end.
    fn close(&self) {
        let waiting = {
            let state = &mut *self.lock();
            if state.closed {
                return;
            }
            state.closed = true;
            self.wakeups.add_permits(std::mem::take(&mut state.parked));
            self.alarm.notify_one();
            self.gates.notify_waiters();
            let all: Vec<OpId> = state.queue.operations().collect();
            let waits = |op| {
                let vm = state.queue.vm(op)?;
                match state.queue.cancel(op) {
                    Cancelled::Removed => state.forget(op).map(|work| (vm, work)),
                    Cancelled::Running | Cancelled::Unknown => None,
                }
            };
            all.into_iter().filter_map(waits).collect::<Vec<_>>()
        };
        for (vm, mut work) in waiting {
            quietly(|| {
                work.give_up(shutting_down(vm));
                work.deliver();
            });
        }
    }

    fn full(&self, vm: VmId, full: Full) -> Error {
        let message = match full {
            Full::Vm => {
                format!("{} operations are queued for this machine, which is the limit", self.config.max_queued_per_vm)
            }
            Full::Total => format!("{} operations are queued, which is the limit", self.config.max_queued),
        };
        Error::new(ErrorKind::Exhausted, message)
            .with_reason(reason::QUEUE_FULL)
            .with_retry(Retry::Safe)
            .during("queue.submit")
            .on(format!("virtual machine {vm}"))
    }
}

impl State {
    /// Ends a run, and tells who waits for that.
    fn finish(&mut self, seat: usize, op: OpId, now_us: u64, hung: bool) -> Finished {
        let seat = &mut self.seats[seat];
        (seat.op, seat.until_us) = (None, NEVER_US);
        if !self.vm_drains.is_empty()
            && let Some(vm) = self.queue.vm(op)
        {
            for tell in self.vm_drains.remove(&vm).into_iter().flatten() {
                let _ = tell.send(());
            }
        }
        let finished = self.queue.finish(op, now_us, hung);
        if !self.slot_drains.is_empty() {
            let running = self.queue.counters().running;
            let (over, wait) = self.slot_drains.drain(..).partition(|(slots, _)| running <= *slots);
            self.slot_drains = wait;
            for (_, tell) in over {
                let _ = tell.send(());
            }
        }
        finished
    }

    /// Resolves when what runs on a machine has ended.
    fn when_drained(&mut self, vm: VmId) -> oneshot::Receiver<()> {
        let (tell, told) = oneshot::channel();
        let drains = self.vm_drains.entry(vm).or_default();
        drains.retain(|tell| !tell.is_closed());
        drains.push(tell);
        told
    }

    fn running(&self, vm: VmId, (op, since_us): (OpId, u64), now_us: u64) -> Option<RunningOp> {
        let what = self.what(op);
        Some(RunningOp { vm, what, running_for: Duration::from_micros(now_us.saturating_sub(since_us)) })
    }

    /// Drops what is known of an operation that is gone. Its work is to be dropped without the lock.
    fn forget(&mut self, op: OpId) -> Option<Box<dyn Work>> {
        let task = std::mem::take(self.queue.kept_mut(op));
        if let Some(label) = task.label {
            self.labels.drop(label);
        }
        task.work
    }

    fn seen(&mut self, vm_index: usize, vm: VmId) -> &mut Lateness {
        let fresh = || VmSeen { vm, lateness: Lateness::default() };
        if self.vms.len() <= vm_index {
            self.vms.resize_with(vm_index + 1, fresh);
        }
        let seen = &mut self.vms[vm_index];
        if seen.vm != vm {
            *seen = fresh();
        }
        &mut seen.lateness
    }

    fn what(&self, op: OpId) -> String {
        let label = self.queue.kept(op).label.as_ref();
        label.map(|label| self.labels.text(label).to_owned()).unwrap_or_default()
    }

    fn status(&self, op: OpId) -> Option<PeriodicStatus> {
        let (vm, interval_us, runs) = self.queue.periodic(op)?;
        let fare = &self.queue.kept(op).fare;
        Some(PeriodicStatus {
            vm,
            what: self.what(op),
            interval_wanted: Duration::from_micros(interval_us),
            interval_got: (fare.gap_us > 0.0).then(|| Duration::from_micros(fare.gap_us as u64)),
            runs,
            skipped: fare.skipped.into(),
            lateness: fare.lateness.quantiles(),
        })
    }
}

impl Fare {
    fn note(&mut self, interval_us: u64, run: u64, skipped: u64, late_us: u64) {
        // From the first run to the second is no interval: there the spread comes in.
        if run >= 2 {
            let gap_us = (interval_us * (1 + skipped)) as f32 + late_us as f32 - self.late_us;
            self.gap_us += (gap_us - self.gap_us) / if run == 2 { 1.0 } else { 8.0 };
        }
        if run >= 1 {
            self.lateness.record(late_us);
        }
        self.late_us = late_us as f32;
        self.skipped = self.skipped.saturating_add(skipped as u32);
    }
}

fn shutting_down(vm: VmId) -> Error {
    Error::unavailable("the queue is shutting down").during("queue.submit").on(format!("virtual machine {vm}"))
}

fn resource(vm: VmId, what: &str) -> String {
    format!("{what} on virtual machine {vm}")
}

/// Operations are other people's code, and so is what runs when they are dropped: it must not end a worker.
fn quietly(action: impl FnOnce()) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(action)) {
        tracing::error!(message = panic_message(&*panic), "an operation panicked when it was dropped");
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("the panic has no text").to_owned()
}
