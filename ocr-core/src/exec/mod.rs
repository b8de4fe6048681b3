//! The executor: installs features, injects and conditions in guests, and streams conditions' values.
//!
//! # What is promised
//! - **Nothing is left.** The intent is in the store before the first effect. An install that fails takes its files away
//!   again, and its record; one that a killed server left is undone by [`Executor::recover`]. What cannot be undone now,
//!   because the guest does not answer, stays recorded until it can be, or until its machine is gone.
//! - **One at a time.** Every touch of a guest goes through the [`Scheduler`]. An install is one operation there: assets
//!   and action together, so that nobody ever acts on half a package. A guest that does not answer costs no permit: the
//!   operation leaves the queue, waits, and comes again. An install that has begun keeps its machine meanwhile, also
//!   while that reboots.
//! - **A stream lives as long as its condition.** A guest that reboots, an agent that hangs, a script that fails or
//!   writes nonsense: the stream holds, and carries on with the next value. It ends with `NotFound` when the machine or
//!   the condition is gone. [`Executor::conditions`] shows meanwhile what is wrong.
//! - **A caller that goes away** before its install began takes it out of the queue. An install that has begun is
//!   brought to its end and recorded.
//!
//! # What is kept
//! Names, paths, digests, the account's name, a package's delete action, a condition's shell line: who can read the
//! store can read those. A condition's environment is needed again after a restart of this server, and may be secret:
//! [`SecretStorage`] says what becomes of it. The environment of features and injects is not kept, and so their delete
//! action runs without it. Passwords and private keys are never kept, and never reach the guest: its agent becomes the
//! account's user by name.
//! Where guests are logged in to instead, [`Executor::with_credentials`] hands both on to who keeps them.
//!
//! # What is not undone
//! Folders that were made for assets, a file of the guest's that an asset replaced, and whatever an action did.
//!
//! # Example
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::{sync::Arc, time::Duration};
//!
//! use futures::StreamExt;
//! use ocr_core::{
//!     ComputeBackend,
//!     exec::{Account, ConditionRequest, Config, Executor, Parts, Probe, SecretStorage},
//!     memory::{MemoryCloud, MemoryState},
//!     package::LocalFolder,
//!     queue::scheduler::{Scheduler, SchedulerConfig},
//! };
//!
//! let cloud = MemoryCloud::new();
//! let vm = cloud.create_vm(&MemoryCloud::tiny_spec("web-0")).await?.id;
//! let parts = Parts {
//!     guest: Arc::new(cloud.clone()),
//!     compute: Arc::new(cloud),
//!     store: Arc::new(MemoryState::new()),
//!     packages: Arc::new(LocalFolder::new("/srv/packages")),
//!     scheduler: Scheduler::start(SchedulerConfig::default()),
//!     secrets: SecretStorage::Memory,
//!     fleet: None,
//! };
//! let executor = Executor::new(parts, Config::default());
//! executor.recover().await?;
//!
//! let condition = ConditionRequest {
//!     name: "root is there".to_owned(),
//!     vm,
//!     account: Account::default(),
//!     probe: Probe::Command { line: "grep -c ^root: /etc/passwd".to_owned(), interval: Duration::from_secs(10) },
//!     environment: [].into(),
//! };
//! let id = executor.create_condition(condition).await?.id;
//! let mut values = executor.watch(id).await?;
//! assert_eq!(values.next().await.unwrap()?.value, 1.0);
//! # Ok(())
//! # }
//! ```

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use secrecy::SecretString;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::secrets::SecretStorage;
use self::{
    condition::{Ended, Runner, Runners},
    hold::Holds,
    plan::Plan,
    record::{Record, Records, Stage, Stored, StoredProbe},
    remove::{Removal, Removed},
    secrets::Secrets,
    stamp::Stamped,
};
use crate::{
    ComputeBackend, Deletion, Error, ErrorKind, GuestExec, InstallId, Result, Retry, StateStore, VmId,
    credentials::{CredentialSink, Credentials},
    fleet::{Fleet, Gone, Guarded, Listener},
    package::PackageSource,
    queue::{LatenessQuantiles, QueueSnapshot, Scheduler},
};

mod condition;
mod elsewhere;
mod hold;
mod install;
mod output;
mod plan;
mod reboot;
mod record;
mod recover;
mod remove;
mod request;
mod secrets;
mod stamp;
mod stream;
mod turns;
mod value;

#[cfg(test)]
mod tests;

pub use self::stream::ConditionStream;

/// How long a package may take to be fetched.
const FETCH_DEADLINE: Duration = Duration::from_secs(600);

/// Installs packages in guests and runs conditions there. Cloning is cheap; all clones are one executor.
#[derive(Clone)]
pub struct Executor {
    inner: Arc<Inner>,
}

/// What an [`Executor`] works with.
#[derive(Clone, Debug)]
pub struct Parts {
    /// Acts inside machines.
    pub guest: Arc<dyn GuestExec>,
    /// Tells machines that are gone from machines that do not answer, and reboots.
    pub compute: Arc<dyn ComputeBackend>,
    /// Keeps what was installed.
    pub store: Arc<dyn StateStore>,
    /// Where packages come from.
    pub packages: Arc<dyn PackageSource>,
    /// One operation per machine, so many at once.
    pub scheduler: Scheduler,
    /// What becomes of secrets that are needed again later.
    pub secrets: SecretStorage,
    /// The other executors on this store, where there are any. The scheduler then is the fleet's gates, and begins
    /// gated and without slots.
    pub fleet: Option<Fleet>,
}

/// An executor's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// How long one action, and one run of a condition, may take.
    pub action_deadline: Duration,
    /// How long to wait for a guest's agent, at first and after a reboot.
    pub ready_deadline: Duration,
    /// The longest pause between two looks while waiting.
    pub ready_interval: Duration,
    /// How much of stdout and stderr a reply carries, in bytes each.
    pub reply_output_bytes: usize,
}

impl Default for Config {
    /// Five minutes for an action, ten for a guest, a look every five seconds at most, 1 MiB of output.
    fn default() -> Self {
        Self {
            action_deadline: Duration::from_secs(300),
            ready_deadline: Duration::from_secs(600),
            ready_interval: Duration::from_secs(5),
            reply_output_bytes: 1 << 20,
        }
    }
}

/// The account that actions run as. Neither secret is ever stored or shown. The default is the agent's own user.
#[derive(Clone, Debug, Default)]
pub struct Account {
    /// The guest's user; empty means the agent's own.
    pub username: String,
    /// Its password, where the backend needs one.
    pub password: SecretString,
    /// Its private key, where the backend needs one.
    pub private_key: SecretString,
}

/// A package by name and version requirement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackageRef {
    /// The package's name.
    pub name: String,
    /// A semver requirement; empty or `*` is any.
    pub version: String,
}

/// What kind of thing is installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InstallKind {
    /// A feature: at deployment.
    Feature,
    /// An inject: during the exercise.
    Inject,
    /// A condition: run again and again.
    Condition,
}

/// A feature or an inject to install. Its `Debug` shows no values of the environment.
#[derive(Clone)]
pub struct InstallRequest {
    /// Feature or Inject.
    pub kind: InstallKind,
    /// The user's name for it.
    pub name: String,
    /// The machine.
    pub vm: VmId,
    /// The package.
    pub package: PackageRef,
    /// As whom the action runs, and whose the assets are.
    pub account: Account,
    /// Laid over the guest's environment.
    pub environment: BTreeMap<String, String>,
}

/// A condition to install. Its `Debug` shows no values of the environment.
#[derive(Clone)]
pub struct ConditionRequest {
    /// The user's name for it.
    pub name: String,
    /// The machine.
    pub vm: VmId,
    /// As whom it runs.
    pub account: Account,
    /// What runs.
    pub probe: Probe,
    /// Laid over the guest's environment.
    pub environment: BTreeMap<String, String>,
}

/// What a condition runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// A condition package; its manifest has the action and the interval.
    Package(PackageRef),
    /// A shell line.
    Command {
        /// The line.
        line: String,
        /// From one planned run to the next.
        interval: Duration,
    },
}

/// What an install returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// Its id, for delete and watch.
    pub id: InstallId,
    /// What the action wrote to stdout, cut to the reply's limit, trailing white space removed.
    pub stdout: String,
    /// Likewise stderr.
    pub stderr: String,
}

/// One value of a condition.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConditionValue {
    /// The condition.
    pub condition: InstallId,
    /// Always finite.
    pub value: f32,
    /// How much later than planned the run began.
    pub lateness: Duration,
}

/// What is installed, as the store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstallRecord {
    /// Its id.
    pub id: InstallId,
    /// Its kind.
    pub kind: InstallKind,
    /// The user's name for it.
    pub name: String,
    /// The machine.
    pub vm: VmId,
    /// Package name and version, for a package.
    pub package: Option<(String, String)>,
    /// From one run to the next, for a condition.
    pub interval: Option<Duration>,
}

/// How a condition that is watched is doing.
#[derive(Clone, Debug, PartialEq)]
pub struct ConditionStatus {
    /// The condition.
    pub id: InstallId,
    /// The user's name for it.
    pub name: String,
    /// The machine.
    pub vm: VmId,
    /// From one planned run to the next.
    pub interval: Duration,
    /// From one run to the next, as it was: averaged over the last eight or so; none before the third run.
    pub interval_got: Option<Duration>,
    /// How many streams there are.
    pub watchers: usize,
    /// How often its turn came.
    pub runs: u64,
    /// The latest value.
    pub last_value: Option<f32>,
    /// How old that one is.
    pub last_value_age: Option<Duration>,
    /// Why the latest run gave no value; may repeat what the condition wrote.
    pub fault: Option<String>,
    /// How many runs in a row gave none.
    pub consecutive_faults: u64,
    /// How many runs were skipped because their time passed while it waited or ran.
    pub skipped: u64,
    /// How much later than planned the latest run began.
    pub lateness: Duration,
    /// The same of the latest few thousand runs; none before the second.
    pub lateness_quantiles: Option<LatenessQuantiles>,
}

impl ConditionStatus {
    /// How late it is now: the 99th percentile of its lateness, or by how much its next value is overdue where that is
    /// more. One that waits for its turn, or gives no values, is late long before a run says so.
    pub fn late_now(&self) -> Duration {
        let overdue = self.last_value_age.map_or(Duration::ZERO, |age| age.saturating_sub(self.interval));
        overdue.max(self.lateness_quantiles.map_or(self.lateness, |lateness| lateness.p99))
    }
}

/// Why a machine is busy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// What has it, such as `install <id>` or `condition <id>`.
    pub what: String,
    /// For how long.
    pub held_for: Duration,
}

/// What [`Executor::recover`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoverReport {
    /// Installs that were incomplete and were taken back, and removals that were finished.
    pub undone: Vec<InstallId>,
    /// Installs whose machine is gone.
    pub forgotten: Vec<InstallId>,
    /// What could not be done now, and why; the next recovery tries again.
    pub failed: Vec<String>,
}

/// A machine's conditions that run for others; none for one that is still looked up.
type Followed = HashMap<InstallId, Option<Arc<Runner>>>;

/// What all clones of an executor share.
struct Inner {
    guest: Arc<dyn GuestExec>,
    compute: Arc<dyn ComputeBackend>,
    packages: Arc<dyn PackageSource>,
    scheduler: Scheduler,
    fleet: Option<Fleet>,
    records: Records,
    config: Config,
    holds: Holds,
    /// Is told the accounts of requests, for guests that are logged in to.
    credentials: Option<Arc<dyn CredentialSink>>,
    /// Installs that this process works on now; a recovery leaves them alone.
    active: Mutex<HashSet<InstallId>>,
    runners: Mutex<Runners>,
    /// Conditions that run here because they are watched through other processes.
    followed: Mutex<HashMap<VmId, Followed>>,
    /// Owns every install and removal, so that none ends with its caller.
    tasks: TaskTracker,
    closing: CancellationToken,
}

impl Executor {
    /// Makes an executor. [`Executor::recover`] should run before it serves.
    pub fn new(parts: Parts, config: Config) -> Self {
        Self::build(parts, config, None)
    }

    /// Likewise for guests that are logged in to: passwords and private keys of requests' accounts go to `credentials`
    /// before the first command.
    pub fn with_credentials(parts: Parts, config: Config, credentials: Arc<dyn CredentialSink>) -> Self {
        Self::build(parts, config, Some(credentials))
    }

    fn build(parts: Parts, config: Config, credentials: Option<Arc<dyn CredentialSink>>) -> Self {
        let Parts { guest, compute, store, packages, scheduler, secrets, fleet } = parts;
        let (guest, compute): (Arc<dyn GuestExec>, Arc<dyn ComputeBackend>) = match &fleet {
            Some(fleet) => {
                (Arc::new(Guarded::new(fleet.clone(), guest)), Arc::new(Guarded::new(fleet.clone(), compute)))
            }
            None => (Arc::new(Stamped::new(guest)), compute),
        };
        let inner = Arc::new(Inner {
            guest,
            compute,
            packages,
            scheduler,
            records: Records::new(store, secrets, fleet.clone()),
            config,
            holds: Holds::within(fleet.clone()),
            credentials,
            active: Mutex::default(),
            runners: Mutex::default(),
            followed: Mutex::default(),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
            fleet,
        });
        if let Some(fleet) = &inner.fleet {
            let listener: Weak<dyn Listener> = Arc::downgrade(&inner) as Weak<dyn Listener>;
            fleet.attach(listener);
        }
        Self { inner }
    }

    /// Copies a package's assets into the machine and runs its action; with `restarts`, reboots the machine then.
    ///
    /// Waits until the guest agent answers. Assets belong to the account's user, where one is given.
    ///
    /// # Errors
    /// `Invalid` naming the field, also for a package of another type; `NotFound` for a machine or package that is not
    /// there; `TimedOut` for a guest that does not answer and an action that does not end; `Conflict` with reason
    /// `COMMAND_FAILED` and the output in the text when the action's exit code is not 0. After every error nothing is
    /// installed, and what was copied is removed again, now or by [`Executor::recover`].
    pub async fn install(&self, request: InstallRequest) -> Result<Installed> {
        request::check_install(&request)?;
        let vm = request.vm;
        self.own(move |inner, caller| async move {
            let InstallRequest { kind, name, vm, package, account, environment } = request;
            let mut record = Record::new(kind, name, vm);
            record.user = inner.user(vm, account).await?;
            let plan = inner.plan(&mut record, &package, &caller).await?;
            inner.install(record, Plan { environment, ..plan }, caller).await
        })
        .await
        .map_err(|error| error.during("exec.install").on(format!("vm {vm}")))
    }

    /// Installs a condition; it runs while it is watched, and not before.
    ///
    /// # Errors
    /// `Invalid` naming the field, such as an interval of 0; otherwise those of [`Executor::install`].
    pub async fn create_condition(&self, request: ConditionRequest) -> Result<Installed> {
        request::check_condition(&request)?;
        let vm = request.vm;
        self.own(move |inner, caller| async move {
            let ConditionRequest { name, vm, account, probe, environment } = request;
            let mut record = Record::new(InstallKind::Condition, name, vm);
            record.user = inner.user(vm, account).await?;
            record.secrets = Secrets::of_environment(environment);
            inner.records.check(&record)?;
            let plan = match probe {
                Probe::Package(package) => inner.plan(&mut record, &package, &caller).await?,
                Probe::Command { line, interval } => {
                    record.probe = Some(StoredProbe::new(line, interval));
                    Plan::default()
                }
            };
            if record.touches_guest() {
                return inner.install(record, plan, caller).await;
            }
            // Nothing to copy, so the guest is not needed; that there is such a machine is.
            inner.look_up(vm).await?;
            inner.install_record(record).await
        })
        .await
        .map_err(|error| error.during("exec.create_condition").on(format!("vm {vm}")))
    }

    /// The values of a condition from now on. All streams of a condition share its runs; a slow one misses values and
    /// gets the latest.
    ///
    /// # Errors
    /// `NotFound` when there is no such condition; `Invalid` when the id is of another kind.
    pub async fn watch(&self, condition: InstallId) -> Result<ConditionStream> {
        self.inner.accepting()?;
        self.inner.watch(condition).await
    }

    /// Runs the package's delete action where it has one, and removes the install's assets and its record.
    ///
    /// Files that another install has too stay until that one is removed. When the delete action fails nothing is
    /// removed, and the call can be made again; so can one that failed half way. It is all the same whether the machine
    /// was deleted meanwhile.
    ///
    /// # Errors
    /// `Invalid` when the id is of another kind; `Conflict` with reason `COMMAND_FAILED` when the delete action's exit
    /// code is not 0; `TimedOut` when the guest does not answer.
    pub async fn remove(&self, kind: InstallKind, id: InstallId) -> Result<Deletion> {
        self.own(move |inner, caller| async move { inner.remove(kind, id, caller).await })
            .await
            .map_err(|error| error.during("exec.remove").on(format!("{kind} {id}")))
    }

    /// What is completely installed, on one machine or on all, in no particular order. Records that this version cannot
    /// read are left out and logged; [`Executor::recover`] reports them.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn list(&self, vm: Option<VmId>) -> Result<Vec<InstallRecord>> {
        let records = &self.inner.records;
        let mut found = Vec::new();
        let mut keep = |read: Result<Stored>| match read {
            Ok(stored) if matches!(stored.record.stage, Stage::Installed | Stage::Removing) => {
                found.push(stored.record.public());
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "an install cannot be listed"),
        };
        if let Some(vm) = vm {
            for id in records.ids_of(vm).await? {
                match records.get(id).await {
                    Ok(Some(stored)) => keep(Ok(stored)),
                    Ok(None) => {}
                    Err(error) if error.kind() == ErrorKind::Internal => keep(Err(error)),
                    Err(error) => return Err(error),
                }
            }
            return Ok(found);
        }
        let mut after = None;
        loop {
            let (page, next) = records.page(after.as_ref()).await?;
            page.into_iter().for_each(&mut keep);
            match next {
                Some(_) => after = next,
                None => return Ok(found),
            }
        }
    }

    /// How the conditions are doing that are watched now, in the order of their ids.
    pub fn conditions(&self) -> Vec<ConditionStatus> {
        self.inner.condition_statuses()
    }

    /// Why a machine is busy: the operation that runs there, or the install that keeps it while it waits, mostly for a
    /// reboot. None when it is free.
    pub fn holder(&self, vm: VmId) -> Option<Holder> {
        let running = self.inner.scheduler.holder(vm);
        // A hold outlives its runs and says less: the run goes first.
        running.map(|running| Holder { what: running.what, held_for: running.running_for }).or_else(|| {
            let held_for = self.inner.holds.held_for(vm)?;
            Some(Holder { what: "an install that waits for its guest, as after a reboot".to_owned(), held_for })
        })
    }

    /// What the queue holds now; see [`Scheduler::snapshot`] for what that costs.
    pub fn queue(&self) -> QueueSnapshot {
        self.inner.scheduler.snapshot()
    }

    /// Drops all records of a machine that was deleted and ends its watches. Touches no guest; a repeat changes nothing.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn forget_vm(&self, vm: VmId) -> Result<Vec<InstallId>> {
        self.inner.forget(vm).await
    }

    /// Undoes installs and finishes removals that a killed server left, and forgets machines that are gone.
    ///
    /// Never waits for a guest that does not answer: what it has is kept for the next recovery. Repeats change nothing.
    /// The installs that are under way in this executor are left alone; with a fleet, so are those of its other members
    /// while they live. A member that died counts as living until its session has run out: the next recovery sees to it.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn recover(&self) -> Result<RecoverReport> {
        self.inner.accepting()?;
        self.inner.recover().await.map_err(|error| error.during("exec.recover"))
    }

    /// Takes no more requests, ends all streams, and waits for what has begun. Says how many installs and removals were
    /// still under way after `grace`; they are left to [`Executor::recover`].
    pub async fn shutdown(&self, grace: Duration) -> usize {
        let inner = &self.inner;
        inner.closing.cancel();
        inner.end_watches(None, Ended::ShuttingDown);
        drop(std::mem::take(&mut *lock(&inner.followed)));
        inner.tasks.close();
        // What is still under way is counted below; there is nothing else to do about it.
        let _ = tokio::time::timeout(grace, inner.tasks.wait()).await;
        inner.tasks.len()
    }

    /// Runs work in a task of the executor's. When the caller goes away the work is told, and decides for itself.
    async fn own<T, F>(&self, work: impl FnOnce(Arc<Inner>, CancellationToken) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.inner.accepting()?;
        let caller = self.inner.closing.child_token();
        let _gone = caller.clone().drop_guard();
        match self.inner.tasks.spawn(work(self.inner.clone(), caller)).await {
            Ok(result) => result,
            Err(error) => Err(Error::internal("the executor's task ended before its work").with_source(error)),
        }
    }
}

impl Inner {
    fn accepting(&self) -> Result<()> {
        if self.closing.is_cancelled() { Err(shutting_down()) } else { Ok(()) }
    }

    /// Fetches a package, and reads what is to be done and recorded.
    async fn plan(&self, record: &mut Record, package: &PackageRef, caller: &CancellationToken) -> Result<Plan> {
        let planned = async { plan::plan(record, self.packages.fetch(&package.name, &package.version).await?).await };
        let planned = tokio::select! {
            planned = tokio::time::timeout(FETCH_DEADLINE, planned) => planned,
            () = caller.cancelled() => return Err(Error::unavailable("the request was given up before it began")),
        };
        planned.map_err(|_| {
            Error::timed_out(format!(
                "package {} was not fetched in {}",
                crate::id::shown(&package.name),
                crate::error::seconds(FETCH_DEADLINE)
            ))
        })?
    }

    async fn remove(self: Arc<Self>, kind: InstallKind, id: InstallId, caller: CancellationToken) -> Result<Deletion> {
        let Some(stored) = self.records.get(id).await? else {
            return Ok(Deletion::AlreadyGone);
        };
        if stored.record.kind() != kind {
            return Err(Error::invalid("id", format_args!("wants a {kind}; {id} is a {}", stored.record.kind())));
        }
        let begun = matches!(stored.record.stage, Stage::Copying | Stage::Acting);
        if self.is_active(id) || begun && self.is_worked_on_elsewhere(&stored.record).await? {
            return Err(Error::new(ErrorKind::Conflict, "it is still being installed").with_retry(Retry::Safe));
        }
        let removed = if stored.record.touches_guest() {
            let removal = Removal::remove(&self, id, stored.record.vm);
            self.clone().run_removal(removal, self.config.ready_deadline, &caller).await?
        } else {
            // Nothing to wait for in the queue.
            match self.records.delete(stored.record.vm, id).await? {
                Deletion::Deleted => Removed::Done,
                Deletion::AlreadyGone => Removed::Absent,
            }
        };
        if removed == Removed::Forgotten
            && let Some(sink) = &self.credentials
            && let Err(error) = sink.forget(stored.record.vm).await
        {
            tracing::warn!(vm = %stored.record.vm, %error, "the credentials of a machine that is gone are still kept");
        }
        self.end_watch(
            id,
            match removed {
                Removed::Forgotten => Ended::MachineGone,
                Removed::Done | Removed::Absent | Removed::Kept => Ended::Removed,
            },
        );
        if let Some(fleet) = &self.fleet {
            fleet.announce(Gone::Install(id));
        }
        tracing::info!(%id, vm = %stored.record.vm, %kind, ?removed, "removed");
        Ok(match removed {
            Removed::Absent => Deletion::AlreadyGone,
            Removed::Done | Removed::Forgotten | Removed::Kept => Deletion::Deleted,
        })
    }

    /// The user that actions run as. What opens its account is handed on and kept nowhere here.
    async fn user(&self, vm: VmId, account: Account) -> Result<Option<String>> {
        let Account { username, password, private_key } = account;
        if username.is_empty() {
            return Ok(None);
        }
        if let Some(sink) = &self.credentials {
            let credentials = Credentials::of(username.as_str()).with_password(password).with_private_key(private_key);
            if credentials.has_secret() {
                sink.remember(vm, credentials).await?;
            }
        }
        Ok(Some(username))
    }

    fn activate(&self, id: InstallId) -> Active<'_> {
        lock(&self.active).insert(id);
        Active { inner: self, id }
    }

    fn is_active(&self, id: InstallId) -> bool {
        lock(&self.active).contains(&id)
    }
}

/// While it lives its install is left alone by recoveries.
struct Active<'a> {
    inner: &'a Inner,
    id: InstallId,
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        lock(&self.inner.active).remove(&self.id);
    }
}

fn shutting_down() -> Error {
    Error::unavailable("the executor is shutting down")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change under these locks is a single one, so a panic elsewhere leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Executor").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").finish_non_exhaustive()
    }
}

impl fmt::Debug for InstallRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InstallRequest")
            .field("kind", &self.kind)
            .field("name", &self.name)
            .field("vm", &self.vm)
            .field("package", &self.package)
            .field("account", &self.account)
            .field("environment", &self.environment.keys().collect::<Vec<_>>())
            .finish()
    }
}

impl fmt::Debug for ConditionRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConditionRequest")
            .field("name", &self.name)
            .field("vm", &self.vm)
            .field("account", &self.account)
            .field("probe", &self.probe)
            .field("environment", &self.environment.keys().collect::<Vec<_>>())
            .finish()
    }
}

impl fmt::Display for InstallKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Feature => "feature",
            Self::Inject => "inject",
            Self::Condition => "condition",
        })
    }
}
