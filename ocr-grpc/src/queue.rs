//! [`Queue`]: `ocr.v1.Queue`, which shows what the executor's queue does.

use std::{
    cmp::Reverse,
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{Stream, stream};
use ocr_core::{
    Error, Result as CoreResult, VmId,
    exec::{ConditionStatus, Executor},
    queue::{LatenessQuantiles, QueueSnapshot as CoreSnapshot, RunningOp, VmQueue, fair::Counters},
};
use tokio::time::{Instant, MissedTickBehavior};
use tonic::{Request, Response, Status};

use crate::{
    CallId, head, parse,
    status::answer,
    v1::{
        ConditionQueue, HolderRequest, HolderResponse, Lateness, MachineQueue, QueueCounters, QueueSnapshot,
        RunningOperation, SnapshotRequest, WatchQueueRequest, queue_server,
    },
};

/// How many of each kind a snapshot shows when it is not said.
const USUAL_TOP: u32 = 100;
/// The most of each kind that a snapshot shows. With [`MAX_TEXT_BYTES`] it keeps a reply below the message limit.
const MAX_TOP: u32 = 1000;
/// How much of a name, of an operation's words and of a fault a snapshot repeats, in bytes.
const MAX_TEXT_BYTES: usize = 512;
/// A look at the queue holds it up, so looks are shared for so long by all who ask.
const SHARED_FOR: Duration = Duration::from_millis(100);
const USUAL_INTERVAL_MS: u64 = 1000;
const MIN_INTERVAL_MS: u64 = 100;
const MAX_INTERVAL_MS: u64 = 3_600_000;

/// `ocr.v1.Queue`. It translates; the executor decides.
#[derive(Clone, Debug)]
pub struct Queue {
    executor: Executor,
    latest: Arc<Mutex<Option<Look>>>,
}

/// What was seen of the queue, and when.
#[derive(Clone, Debug)]
struct Look {
    at: Instant,
    seen: Arc<Seen>,
}

#[derive(Debug)]
struct Seen {
    queue: CoreSnapshot,
    conditions: Vec<ConditionStatus>,
}

/// What a snapshot is to show.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    top: usize,
    vm: Option<VmId>,
}

impl Queue {
    /// The service over this executor.
    pub fn new(executor: Executor) -> Self {
        Self { executor, latest: Arc::default() }
    }

    fn snapshot(&self, wanted: Wanted) -> QueueSnapshot {
        shown(&self.look(), wanted)
    }

    fn look(&self) -> Arc<Seen> {
        // Held during the look: who comes meanwhile gets the same one.
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(look) = latest.as_ref().filter(|look| look.at.elapsed() < SHARED_FOR) {
            return Arc::clone(&look.seen);
        }
        let seen = Arc::new(Seen { queue: self.executor.queue(), conditions: self.executor.conditions() });
        *latest = Some(Look { at: Instant::now(), seen: Arc::clone(&seen) });
        seen
    }
}

impl Wanted {
    fn parse(request: &SnapshotRequest) -> CoreResult<Self> {
        let top = match request.top {
            0 => USUAL_TOP,
            top @ 1..=MAX_TOP => top,
            top => return Err(Error::invalid("top", format_args!("wants at most {MAX_TOP}, got {top}"))),
        };
        let vm = &request.virtual_machine_id;
        let vm = if vm.is_empty() { None } else { Some(parse::vm_id_in("virtual_machine_id", vm)?) };
        Ok(Self { top: top as usize, vm })
    }

    fn has(&self, vm: VmId) -> bool {
        self.vm.is_none_or(|wanted| wanted == vm)
    }
}

#[tonic::async_trait]
impl queue_server::Queue for Queue {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<QueueSnapshot, Status>> + Send>>;

    async fn snapshot(&self, request: Request<SnapshotRequest>) -> Result<Response<QueueSnapshot>, Status> {
        let call = CallId::given(&request);
        answer(&call, Wanted::parse(request.get_ref()).map(|wanted| Queue::snapshot(self, wanted)))
    }

    async fn watch(&self, request: Request<WatchQueueRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let call = CallId::given(&request);
        let request = request.into_inner();
        let interval = match request.interval_ms {
            0 => Ok(USUAL_INTERVAL_MS),
            given @ MIN_INTERVAL_MS..=MAX_INTERVAL_MS => Ok(given),
            given => Err(Error::invalid(
                "interval_ms",
                format_args!("wants {MIN_INTERVAL_MS} to {MAX_INTERVAL_MS}, got {given}"),
            )),
        };
        let asked = interval.and_then(|ms| Ok((ms, Wanted::parse(&request.snapshot.unwrap_or_default())?)));
        let started = asked.map(|(ms, wanted)| {
            let mut ticks = tokio::time::interval(Duration::from_millis(ms));
            // Nothing is looked at before it can be sent, so a slow reader gets what is so then.
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let snapshots = stream::unfold((ticks, self.clone()), move |(mut ticks, queue)| async move {
                ticks.tick().await;
                Some((Ok(queue.snapshot(wanted)), (ticks, queue)))
            });
            Box::pin(snapshots) as Self::WatchStream
        });
        answer(&call, started)
    }

    async fn holder(&self, request: Request<HolderRequest>) -> Result<Response<HolderResponse>, Status> {
        let call = CallId::given(&request);
        let vm = parse::vm_id_in("virtual_machine_id", &request.get_ref().virtual_machine_id);
        answer(
            &call,
            vm.map(|vm| match self.executor.holder(vm) {
                None => HolderResponse::default(),
                Some(holder) => {
                    HolderResponse { held: true, what: text(&holder.what), held_for_ms: ms(holder.held_for) }
                }
            }),
        )
    }
}

fn shown(seen: &Seen, wanted: Wanted) -> QueueSnapshot {
    let Seen { queue, conditions } = seen;
    let all = |vm: VmId| wanted.has(vm);
    let running: Vec<_> = queue.running.iter().filter(|running| all(running.vm)).collect();
    let mut conditions: Vec<_> =
        conditions.iter().filter(|status| all(status.vm)).map(|status| (status.late_now(), status)).collect();
    conditions.sort_by_key(|(late, status)| (Reverse(*late), status.id));
    // A machine is as late as its latest condition: its own lateness knows only of runs that have begun.
    let mut late: HashMap<VmId, Duration> = HashMap::new();
    for (late_now, status) in &conditions {
        let latest = late.entry(status.vm).or_default();
        *latest = (*latest).max(*late_now);
    }
    let mut machines: Vec<_> = queue.vms.iter().filter(|machine| all(machine.vm)).collect();
    machines.sort_by_key(|machine| (Reverse(late.get(&machine.vm)), Reverse(machine.queued), machine.vm));
    QueueSnapshot {
        depth: queue.depth as u64,
        limit: queue.max_connections as u64,
        lateness: queue.lateness.map(Lateness::from),
        counters: Some(queue.counters.into()),
        running_total: running.len() as u64,
        machines_total: machines.len() as u64,
        conditions_total: conditions.len() as u64,
        streams_total: conditions.iter().map(|(_, status)| status.watchers as u64).sum(),
        running: running.into_iter().take(wanted.top).map(RunningOperation::from).collect(),
        machines: machines.into_iter().take(wanted.top).map(MachineQueue::from).collect(),
        conditions: conditions.into_iter().take(wanted.top).map(|(_, status)| status.into()).collect(),
    }
}

impl From<&RunningOp> for RunningOperation {
    fn from(running: &RunningOp) -> Self {
        Self {
            virtual_machine_id: running.vm.to_string(),
            what: text(&running.what),
            running_for_ms: ms(running.running_for),
        }
    }
}

impl From<&VmQueue> for MachineQueue {
    fn from(machine: &VmQueue) -> Self {
        Self {
            virtual_machine_id: machine.vm.to_string(),
            depth: machine.queued as u64,
            operations: machine.operations as u64,
            holder: machine.holder.as_ref().map(RunningOperation::from),
            on_probation: machine.on_probation,
            lateness: machine.lateness.map(Lateness::from),
            open: machine.open,
        }
    }
}

impl From<&ConditionStatus> for ConditionQueue {
    fn from(status: &ConditionStatus) -> Self {
        Self {
            id: status.id.to_string(),
            name: text(&status.name),
            virtual_machine_id: status.vm.to_string(),
            interval_wanted_ms: ms(status.interval),
            interval_got_ms: status.interval_got.map_or(0, ms),
            runs: status.runs,
            skipped: status.skipped,
            lateness: status.lateness_quantiles.map(Lateness::from),
            late_now_us: us(status.late_now()),
            watchers: status.watchers as u64,
            value: status.last_value,
            value_age_ms: status.last_value_age.map_or(0, ms),
            fault: status.fault.as_deref().map(text).unwrap_or_default(),
            consecutive_faults: status.consecutive_faults,
        }
    }
}

impl From<LatenessQuantiles> for Lateness {
    fn from(lateness: LatenessQuantiles) -> Self {
        Self { p50_us: us(lateness.p50), p99_us: us(lateness.p99) }
    }
}

impl From<Counters> for QueueCounters {
    fn from(counters: Counters) -> Self {
        Self {
            submitted: counters.submitted,
            refused: counters.refused,
            started_first: counters.started_first,
            started_again: counters.started_again,
            finished: counters.finished,
            hung: counters.hung,
            cancelled: counters.cancelled,
            skipped: counters.skipped_ticks,
        }
    }
}

fn text(text: &str) -> String {
    head(text, MAX_TEXT_BYTES).to_owned()
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use ocr_core::{InstallId, queue::LatenessHistogram};
    use prost::Message as _;

    use super::*;
    use crate::Limits;

    const LONG: Duration = Duration::from_secs(u32::MAX as u64);

    fn running(vm: VmId) -> RunningOp {
        RunningOp { vm, what: "ä".repeat(4096), running_for: LONG }
    }

    fn condition(vm: VmId, late: Duration) -> ConditionStatus {
        ConditionStatus {
            id: InstallId::random(),
            name: "ä".repeat(4096),
            vm,
            interval: LONG,
            interval_got: Some(LONG),
            watchers: u32::MAX as usize,
            runs: u64::MAX,
            last_value: Some(0.5),
            last_value_age: Some(LONG),
            fault: Some("ä".repeat(4096)),
            consecutive_faults: u64::MAX,
            skipped: u64::MAX,
            lateness: late,
            lateness_quantiles: Some(LatenessQuantiles { p50: late, p99: late }),
        }
    }

    fn machine(vm: VmId) -> VmQueue {
        VmQueue {
            vm,
            queued: usize::MAX,
            operations: usize::MAX,
            holder: Some(running(vm)),
            open: true,
            on_probation: true,
            lateness: Some(LatenessQuantiles { p50: LONG, p99: LONG }),
        }
    }

    fn seen(vms: &[VmId]) -> Seen {
        let counters = Counters { submitted: u64::MAX, finished: u64::MAX, ..Counters::default() };
        let queue = CoreSnapshot {
            depth: usize::MAX,
            max_connections: usize::MAX,
            counters,
            lateness: Some(LatenessQuantiles { p50: LONG, p99: LONG }),
            lateness_since_start: LatenessHistogram::default(),
            waits_since_start: LatenessHistogram::default(),
            running: vms.iter().copied().map(running).collect(),
            vms: vms.iter().copied().map(machine).collect(),
            periodics: Vec::new(),
        };
        let late = |place: usize| Duration::from_millis(place as u64);
        let conditions = vms.iter().enumerate().map(|(place, vm)| condition(*vm, late(place)));
        Seen { queue, conditions: conditions.collect() }
    }

    #[test]
    fn the_largest_snapshot_fits_in_a_message() {
        let vms: Vec<_> = (0..MAX_TOP + 100).map(|_| VmId::random()).collect();
        let snapshot = shown(&seen(&vms), Wanted { top: MAX_TOP as usize, vm: None });
        assert_eq!(
            (snapshot.running.len(), snapshot.machines.len(), snapshot.conditions.len()),
            (MAX_TOP as usize, MAX_TOP as usize, MAX_TOP as usize)
        );
        assert_eq!(snapshot.conditions_total, u64::from(MAX_TOP) + 100);
        assert!(snapshot.encoded_len() <= Limits::default().max_message_bytes, "{}", snapshot.encoded_len());
    }

    #[test]
    fn the_latest_come_first_and_one_machine_can_be_asked_for() {
        let vms: Vec<_> = (0..5).map(|_| VmId::random()).collect();
        let seen = seen(&vms);
        let snapshot = shown(&seen, Wanted { top: 3, vm: None });
        let latest: Vec<_> = vms.iter().rev().take(3).map(ToString::to_string).collect();
        let conditions: Vec<_> = snapshot.conditions.iter().map(|one| one.virtual_machine_id.clone()).collect();
        let machines: Vec<_> = snapshot.machines.iter().map(|one| one.virtual_machine_id.clone()).collect();
        assert_eq!((conditions, machines), (latest.clone(), latest));

        let one = shown(&seen, Wanted { top: 3, vm: Some(vms[0]) });
        assert_eq!((one.running_total, one.machines_total, one.conditions_total), (1, 1, 1));
        assert_eq!(one.conditions[0].virtual_machine_id, vms[0].to_string());
    }
}
