//! Runs conditions while somebody watches, and streams their values.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use futures::FutureExt;
use tokio::time::Instant;

use super::{
    ConditionStatus, ConditionStream, Inner, InstallKind, lock,
    output::cut_for_error,
    record::{Record, Stage},
    stream::Channel,
    turns::gone,
    value::parse_value,
};
use crate::{
    Error, ErrorKind, ExecOutput, ExecRequest, GuestCapabilities, InstallId, Result, VmId,
    error::reason,
    queue::scheduler::{Periodic, Tick},
};

/// How much of a condition's output is fetched, in bytes: a value is short, and an explanation may follow on stderr.
const FETCHED_BYTES: u64 = 16 << 10;
/// What a turn may take beside the condition itself.
const TURN_MARGIN: Duration = Duration::from_secs(30);
/// After so many faults in a row, and again after as many more, it is looked up whether there is anything left to watch.
const FAULTS_TO_LOOK_UP: u64 = 3;

/// One condition that is watched. All its streams share it; with the last of them it goes, and its runs with it.
#[derive(Debug)]
pub(super) struct Runner {
    shared: Arc<Shared>,
    /// A stream works on when nobody has the executor itself any more.
    inner: Arc<Inner>,
    periodic: Mutex<Option<Periodic>>,
}

/// What a runner and its runs share. A run may outlive the runner.
#[derive(Debug)]
struct Shared {
    record: Kept,
    line: Box<str>,
    interval: Duration,
    deadline: Duration,
    channel: Channel,
    status: Mutex<Status>,
}

/// What runs need of a record. There may be tens of thousands, so it is no more than that.
struct Kept {
    id: InstallId,
    vm: VmId,
    name: Box<str>,
    user: Option<Box<str>>,
    environment: BTreeMap<String, String>,
}

/// Why a watch ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    MachineGone,
    Removed,
    ShuttingDown,
}

#[derive(Debug, Default)]
struct Status {
    runs: u64,
    value: Option<(f32, Instant)>,
    /// Boxed: most have none.
    fault: Option<Box<Fault>>,
    faults: u64,
    lateness: Duration,
}

/// A run that gave no value.
#[derive(Clone, Debug)]
struct Fault {
    class: FaultClass,
    text: String,
}

/// What makes one fault another one for the log. Texts hold numbers and outputs that change with each run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FaultClass {
    Held,
    Refused(ErrorKind, Option<&'static str>),
    ExitCode(i32),
    NoValue,
}

impl Inner {
    /// A stream of a condition's values, from the runner that is there or a new one.
    pub(super) async fn watch(self: &Arc<Self>, id: InstallId) -> Result<ConditionStream> {
        let record = self.condition(id).await?;
        let runner = self.runner(record)?;
        let stream = ConditionStream::new(runner);
        // A removal drops the record first and ends the runner then, so one of both is seen here.
        self.condition(id).await?;
        Ok(stream)
    }

    async fn condition(&self, id: InstallId) -> Result<Record> {
        let missing =
            || Error::not_found("there is no such condition").during("exec.watch").on(format!("condition {id}"));
        let record = self.records.get(id).await?.ok_or_else(missing)?.record;
        if record.kind() != InstallKind::Condition {
            return Err(Error::invalid("id", format_args!("wants a condition; {id} is of kind {}", record.kind()))
                .during("exec.watch"));
        }
        // What is not yet, or no longer, completely there has no values.
        if record.stage == Stage::Installed { Ok(record) } else { Err(missing()) }
    }

    fn runner(self: &Arc<Self>, record: Record) -> Result<Arc<Runner>> {
        let mut runners = lock(&self.runners);
        if self.closing.is_cancelled() {
            return Err(super::shutting_down());
        }
        if let Some(runner) = runners.get(&record.id).and_then(Weak::upgrade) {
            return Ok(runner);
        }
        let Record { id, vm, name, user, environment, probe, .. } = record;
        let Some(probe) = probe else {
            return Err(Error::internal("a condition without a command").on(format!("condition {id}")));
        };
        let interval = probe.interval();
        let shared = Arc::new(Shared {
            line: probe.line.into(),
            interval,
            deadline: self.config.action_deadline,
            channel: Channel::default(),
            status: Mutex::default(),
            record: Kept { id, vm, name: name.into(), user: user.map(Into::into), environment },
        });
        let periodic = {
            let (inner, shared) = (Arc::downgrade(self), shared.clone());
            let limit = self.config.action_deadline.saturating_add(TURN_MARGIN);
            self.scheduler.every(vm, format!("condition {id}"), interval, limit, move |tick| {
                let (inner, shared) = (inner.clone(), shared.clone());
                async move {
                    match inner.upgrade() {
                        Some(inner) => inner.tick(&shared, tick).await,
                        None => Ok(()),
                    }
                }
                .boxed()
            })?
        };
        let runner = Arc::new(Runner { shared, inner: self.clone(), periodic: Mutex::new(Some(periodic)) });
        runners.insert(id, Arc::downgrade(&runner));
        Ok(runner)
    }

    /// One run. The error is for the queue, which keeps machines that hang apart from the others.
    async fn tick(self: &Arc<Self>, shared: &Arc<Shared>, tick: Tick) -> Result<()> {
        let (id, vm) = (shared.record.id, shared.record.vm);
        shared.begin(tick.lateness);
        if self.holds.is_held(vm) {
            shared.fail(Fault {
                class: FaultClass::Held,
                text: "an install keeps the machine, or waits for its reboot".to_owned(),
            });
            return Ok(());
        }
        let error = match self.guest.exec(vm, &shared.request(&self.guest.capabilities())).await {
            Ok(output) => {
                match read(&output) {
                    Ok(value) => shared.succeed(value, tick.lateness),
                    Err(fault) => {
                        shared.fail(fault);
                        self.look_up_after_faults(shared, None).await;
                    }
                }
                return Ok(());
            }
            Err(error) => error,
        };
        shared
            .fail(Fault { class: FaultClass::Refused(error.kind(), error.reason()), text: error.message().to_owned() });
        self.look_up_after_faults(shared, Some(&error)).await;
        tracing::trace!(%id, %vm, %error, "a condition could not be run");
        Err(error)
    }

    /// Ends the watch of what is gone: at once when the guest call says so, after some faults otherwise.
    async fn look_up_after_faults(self: &Arc<Self>, shared: &Shared, refused: Option<&Error>) {
        let (id, vm) = (shared.record.id, shared.record.vm);
        let at_once = refused.is_some_and(|error| error.reason() == Some(reason::GUEST_GONE));
        if !at_once && !lock(&shared.status).faults.is_multiple_of(FAULTS_TO_LOOK_UP) {
            return;
        }
        // A guest that answered is there.
        if refused.is_some() && self.is_gone(vm).await {
            self.end_watch(id, Ended::MachineGone);
            // Not in this turn: the machine's other records are the store's business, not the guest's.
            let inner = self.clone();
            self.tasks.spawn(async move {
                if let Err(error) = inner.forget(vm).await {
                    tracing::warn!(%vm, %error, "a deleted machine's installs stay recorded until recovery");
                }
            });
        } else if matches!(self.records.get(id).await, Ok(None)) {
            // Another process removed it.
            self.end_watch(id, Ended::Removed);
        }
    }

    /// Ends a condition's runs and all its streams.
    pub(super) fn end_watch(&self, id: InstallId, ended: Ended) {
        let runner = lock(&self.runners).remove(&id);
        if let Some(runner) = runner.and_then(|runner| runner.upgrade()) {
            runner.end(ended);
        }
    }

    /// Ends all watches of a machine, or of all.
    pub(super) fn end_watches(&self, vm: Option<VmId>, ended: Ended) {
        for runner in self.watched() {
            if vm.is_none_or(|vm| runner.shared.record.vm == vm) {
                self.end_watch(runner.shared.record.id, ended);
            }
        }
    }

    fn watched(&self) -> Vec<Arc<Runner>> {
        lock(&self.runners).values().filter_map(Weak::upgrade).collect()
    }

    pub(super) fn condition_statuses(&self) -> Vec<ConditionStatus> {
        let mut statuses: Vec<_> = self.watched().iter().map(|runner| runner.status()).collect();
        statuses.sort_by_key(|status| status.id);
        statuses
    }
}

impl Runner {
    fn end(&self, ended: Ended) {
        // Its queued run leaves the queue with it.
        drop(lock(&self.periodic).take());
        self.shared.channel.end(ended);
    }

    /// The queue knows when it ran, and this what came of it.
    fn status(&self) -> ConditionStatus {
        let queued = lock(&self.periodic).as_ref().and_then(Periodic::status);
        let mut status = self.shared.public();
        if let Some(queued) = queued {
            status.interval_got = queued.interval_got;
            status.skipped = queued.skipped;
            status.lateness_quantiles = queued.lateness;
        }
        status
    }

    pub(super) fn id(&self) -> InstallId {
        self.shared.record.id
    }

    pub(super) fn channel(&self) -> &Channel {
        &self.shared.channel
    }

    pub(super) fn end_error(&self, ended: Ended) -> Error {
        self.shared.end_error(ended)
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        let mut runners = lock(&self.inner.runners);
        let id = self.shared.record.id;
        // A later runner may have taken the place; this one has no strong reference left.
        if runners.get(&id).is_some_and(|runner| runner.strong_count() == 0) {
            runners.remove(&id);
        }
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").field("id", &self.id).field("vm", &self.vm).finish_non_exhaustive()
    }
}

impl Shared {
    fn request(&self, guest: &GuestCapabilities) -> ExecRequest {
        ExecRequest {
            user: self.record.user.as_deref().map(str::to_owned),
            environment: self.record.environment.clone(),
            deadline: self.deadline,
            output_limit_bytes: FETCHED_BYTES.min(guest.max_output_bytes),
            ..ExecRequest::shell(&*self.line)
        }
    }

    fn begin(&self, lateness: Duration) {
        let mut status = lock(&self.status);
        status.runs += 1;
        status.lateness = lateness;
    }

    fn succeed(&self, value: f32, lateness: Duration) {
        let (id, vm) = (self.record.id, self.record.vm);
        {
            let mut status = lock(&self.status);
            status.value = Some((value, Instant::now()));
            status.faults = 0;
            if status.fault.take().is_some() {
                tracing::info!(%id, %vm, value, "a condition gives values again");
            }
        }
        self.channel.publish(value, lateness);
    }

    fn fail(&self, fault: Fault) {
        let (id, vm) = (self.record.id, self.record.vm);
        let mut status = lock(&self.status);
        status.faults += 1;
        if status.fault.as_ref().is_none_or(|last| last.class != fault.class) {
            // Not the text: it may repeat what the guest wrote.
            tracing::warn!(%id, %vm, fault = ?fault.class, "a condition gives no value");
        }
        status.fault = Some(Box::new(fault));
    }

    fn public(&self) -> ConditionStatus {
        let status = lock(&self.status);
        ConditionStatus {
            id: self.record.id,
            name: self.record.name.to_string(),
            vm: self.record.vm,
            interval: self.interval,
            interval_got: None,
            watchers: self.channel.streams(),
            runs: status.runs,
            last_value: status.value.map(|(value, _)| value),
            last_value_age: status.value.map(|(_, at)| at.elapsed()),
            fault: status.fault.as_ref().map(|fault| fault.text.clone()),
            consecutive_faults: status.faults,
            skipped: 0,
            lateness: status.lateness,
            lateness_quantiles: None,
        }
    }

    fn end_error(&self, ended: Ended) -> Error {
        let error = match ended {
            Ended::MachineGone => gone(self.record.vm),
            Ended::Removed => Error::not_found("the condition was removed"),
            Ended::ShuttingDown => super::shutting_down(),
        };
        error.during("exec.watch").on(format!("condition {}", self.record.id))
    }
}

fn read(output: &ExecOutput) -> Result<f32, Fault> {
    if !output.success() {
        let text = match cut_for_error(&output.stderr, output.stderr_truncated) {
            text if text.is_empty() => format!("ended with exit code {}", output.exit_code),
            text => format!("ended with exit code {}; stderr: {text}", output.exit_code),
        };
        return Err(Fault { class: FaultClass::ExitCode(output.exit_code), text });
    }
    parse_value(&output.stdout).map_err(|text| Fault { class: FaultClass::NoValue, text })
}
