//! Runs conditions while somebody watches, and streams their values.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
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
    turns::{gone, is_elsewhere},
    value::parse_value,
};
use crate::{
    Error, ErrorKind, ExecOutput, ExecRequest, GuestCapabilities, InstallId, Result, VmId,
    error::reason,
    fleet::RunReport,
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
    /// None while another process runs it.
    periodic: Mutex<Option<Periodic>>,
}

/// The runners that there are, each as long as somebody watches.
#[derive(Debug, Default)]
pub(super) struct Runners {
    by_id: HashMap<InstallId, Weak<Runner>>,
    by_vm: HashMap<VmId, BTreeSet<InstallId>>,
}

impl Runners {
    fn get(&self, id: InstallId) -> Option<Arc<Runner>> {
        self.by_id.get(&id).and_then(Weak::upgrade)
    }

    fn insert(&mut self, runner: &Arc<Runner>) {
        let record = &runner.shared.record;
        self.by_id.insert(record.id, Arc::downgrade(runner));
        self.by_vm.entry(record.vm).or_default().insert(record.id);
    }

    fn remove(&mut self, vm: VmId, id: InstallId) {
        self.by_id.remove(&id);
        if let Some(ids) = self.by_vm.get_mut(&vm) {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_vm.remove(&vm);
            }
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        assert_eq!(self.by_id.len(), self.by_vm.values().map(BTreeSet::len).sum::<usize>());
        self.by_id.len()
    }

    fn all(&self) -> Vec<Arc<Runner>> {
        self.by_id.values().filter_map(Weak::upgrade).collect()
    }

    fn of(&self, vm: VmId) -> Vec<Arc<Runner>> {
        self.by_vm.get(&vm).into_iter().flatten().filter_map(|id| self.get(*id)).collect()
    }
}

/// What a runner and its runs share. A run may outlive the runner.
#[derive(Debug)]
struct Shared {
    record: Kept,
    line: Box<str>,
    interval: Duration,
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
        // Before the runner: it is this that brings the machine here, or its values.
        let watch = self.fleet.as_ref().map(|fleet| fleet.watch(record.vm, id));
        let runner = self.runner(record)?;
        let stream = ConditionStream::new(runner, watch);
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

    pub(super) fn runner(self: &Arc<Self>, record: Record) -> Result<Arc<Runner>> {
        let mut runners = lock(&self.runners);
        if self.closing.is_cancelled() {
            return Err(super::shutting_down());
        }
        if let Some(runner) = runners.get(record.id) {
            drop(runners);
            runner.engage()?;
            return Ok(runner);
        }
        let environment = record.secrets.environment()?.clone();
        let Record { id, vm, name, user, probe, .. } = record;
        let Some(probe) = probe else {
            return Err(Error::internal("a condition without a command").on(format!("condition {id}")));
        };
        let interval = probe.interval();
        let shared = Arc::new(Shared {
            line: probe.line.into(),
            interval,
            channel: Channel::default(),
            status: Mutex::default(),
            record: Kept { id, vm, name: name.into(), user: user.map(Into::into), environment },
        });
        let runner = Arc::new(Runner { shared, inner: self.clone(), periodic: Mutex::default() });
        runners.insert(&runner);
        drop(runners);
        // From here on a change of the machine's owner finds it.
        runner.engage()?;
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
        if let Some(fleet) = &self.fleet {
            fleet.began(id);
        }
        let report = |value| {
            if let Some(fleet) = &self.fleet {
                fleet.report(RunReport { vm, condition: id, value, lateness: tick.lateness });
            }
        };
        let error =
            match self.guest.exec(vm, &shared.request(self.config.action_deadline, &self.guest.capabilities())).await {
                Ok(output) => {
                    match read(&output) {
                        Ok(value) => {
                            shared.succeed(value, tick.lateness);
                            report(Some(value));
                        }
                        Err(fault) => {
                            shared.fail(fault);
                            report(None);
                            self.look_up_after_faults(shared, None).await;
                        }
                    }
                    return Ok(());
                }
                // Nothing is known of the guest: the stream holds until the machine has an owner again.
                Err(error) if is_elsewhere(&error) => return Ok(()),
                Err(error) => error,
            };
        report(None);
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
        let runner = {
            let mut runners = lock(&self.runners);
            let runner = runners.get(id);
            if let Some(runner) = &runner {
                runners.remove(runner.shared.record.vm, id);
            }
            runner
        };
        if let Some(runner) = runner {
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
        lock(&self.runners).all()
    }

    pub(super) fn runner_of(&self, id: InstallId) -> Option<Arc<Runner>> {
        lock(&self.runners).get(id)
    }

    pub(super) fn runners_on(&self, vm: VmId) -> Vec<Arc<Runner>> {
        lock(&self.runners).of(vm)
    }

    pub(super) fn watched_ids(&self) -> Vec<(InstallId, VmId)> {
        self.watched().iter().map(|runner| (runner.shared.record.id, runner.shared.record.vm)).collect()
    }

    pub(super) fn condition_statuses(&self) -> Vec<ConditionStatus> {
        let mut statuses: Vec<_> = self.watched().iter().map(|runner| runner.status()).collect();
        statuses.sort_by_key(|status| status.id);
        statuses
    }
}

impl Runner {
    /// Runs it here when its machine is this process's, and not otherwise.
    ///
    /// Where it ran elsewhere before, it carries on from there: a change of owner is no reason to run it twice.
    ///
    /// # Errors
    /// Those of the queue.
    pub(super) fn engage(&self) -> Result<()> {
        let (inner, shared) = (&self.inner, &self.shared);
        let (id, vm) = (shared.record.id, shared.record.vm);
        let mut periodic = lock(&self.periodic);
        let ours = inner.fleet.as_ref().is_none_or(|fleet| fleet.is_ours(vm));
        if !ours || shared.channel.has_ended() {
            drop(periodic.take());
        } else if periodic.is_none() {
            let last_run = inner.fleet.as_ref().and_then(|fleet| fleet.last_run(id));
            let limit = inner.config.action_deadline.saturating_add(TURN_MARGIN);
            let next = last_run.map(|began| began + shared.interval);
            let (inner, run) = (Arc::downgrade(inner), Arc::clone(shared));
            *periodic = Some(self.inner.scheduler.every_from(
                next,
                vm,
                format!("condition {id}"),
                shared.interval,
                limit,
                move |tick| {
                    let (inner, shared) = (inner.clone(), run.clone());
                    async move {
                        match inner.upgrade() {
                            Some(inner) => inner.tick(&shared, tick).await,
                            None => Ok(()),
                        }
                    }
                    .boxed()
                },
            )?);
        }
        Ok(())
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

    pub(super) fn vm(&self) -> VmId {
        self.shared.record.vm
    }

    /// Takes a value that another process's run gave.
    pub(super) fn take(&self, value: f32, lateness: Duration) {
        self.shared.begin(lateness);
        self.shared.succeed(value, lateness);
    }

    fn end(&self, ended: Ended) {
        let mut periodic = lock(&self.periodic);
        self.shared.channel.end(ended);
        // Its queued run leaves the queue with it.
        let periodic = periodic.take();
        drop(periodic);
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        let mut runners = lock(&self.inner.runners);
        let (id, vm) = (self.shared.record.id, self.shared.record.vm);
        // A later runner may have taken the place; this one has no strong reference left.
        if runners.by_id.get(&id).is_some_and(|runner| runner.strong_count() == 0) {
            runners.remove(vm, id);
        }
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").field("id", &self.id).field("vm", &self.vm).finish_non_exhaustive()
    }
}

impl Shared {
    fn request(&self, deadline: Duration, guest: &GuestCapabilities) -> ExecRequest {
        ExecRequest {
            user: self.record.user.as_deref().map(str::to_owned),
            environment: self.record.environment.clone(),
            deadline,
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
