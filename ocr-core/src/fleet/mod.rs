//! Several executors on one store: each machine belongs to one of them at a time, and all share one limit.
//!
//! # What is promised
//! - **One operation at a time on a machine, over all processes**, through pauses, restarts of the store, and notices that
//!   are lost. Work under a session stops before the store lets the session's lease run out.
//! - **Never more operations at once than the limit**, over all processes.
//! - **Nothing is asked of the store while nothing changes hands**: one write a renewal, whatever a member owns.
//! - **A machine goes where its work is.** One that somebody else has one-shots for is handed over between two operations;
//!   when both have some, they take turns.
//! - **A condition runs once**, however many members watch it: the machine's owner runs it and sends its values to the others.
//!
//! # How
//! ```text
//!       process A                      store                          process B
//!   +---------------+      lease/member_A  (renewed, ttl)        +---------------+
//!   | session A     |----> lease/member_B                   <----| session B     |
//!   | gates of its  |      owner/<vm> {member, token}  CAS       | gates of its  |
//!   | machines open |      quota {member: held, wanted}  CAS     | machines open |
//!   +---------------+                                            +---------------+
//!          ^  notices (hints): "B wants vm", "vm is yours", "B watches c", "c gave 1.0"  ^
//!          +----------------------------------------------------------------------------+
//!
//!   handover      B                                  A                          store
//!                 |--- wants vm -------------------->|                            |
//!                 |                                  | closes vm's gate, waits    |
//!                 |                                  | until nothing runs there   |
//!                 |                                  |--- owner = B, token + 1 -->|
//!                 |<-- vm is yours, version ---------|                            |
//!                 |--- owner = B, token + 1 (version) --------------------------->|
//!                 | opens vm's gate                  |                            |
//! ```
//! - A *member* is one session of one process, under a fresh random id. A session that is lost is never revived: the
//!   process joins again as another member. So "this member is dead" stays true for ever, and may be acted upon.
//! - Ownership begins with a member's own write and with nothing else; `machine.rs` says why.
//! - The token of a machine rises with each write, to the time in microseconds or more; the guard puts it on every request,
//!   and the guest-side runner refuses an older one. So a command that was under way when its session ended is the last.
//! - What a lost notice would have told is found at the next renewal by whoever waits for it.
//! - While the store is away sessions lapse, gates close, and nothing runs; when it is back each process joins by itself.
//!
//! # What is weaker
//! A store that forgets writes it has confirmed (a failover without replicas that confirm) may let two members own one
//! machine until the older one's session ends. The guest-side runner still refuses the older one's commands; the limit may
//! be passed for that time.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use futures::future::BoxFuture;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::session::Times;
use crate::{
    Error, ErrorKind, FencingToken, InstallId, MemberId, Result, Retry, Signals, StateStore, VmId, error::reason,
    queue::Scheduler,
};

mod actor;
mod guard;
mod machine;
mod message;
mod quota;
mod session;
mod share;

#[cfg(test)]
mod tests;

pub use guard::Guarded;

/// One process's part in a fleet. Cloning is cheap; all clones are one. It leaves with [`Fleet::leave`]; when the last
/// clone is dropped without, its session runs out.
#[derive(Clone)]
pub struct Fleet {
    shared: Arc<Shared>,
    _life: Arc<Life>,
}

/// What a [`Fleet`] works with.
#[derive(Clone, Debug)]
pub struct FleetParts {
    /// The store that all members share.
    pub store: Arc<dyn StateStore>,
    /// Carries notices between them.
    pub signals: Arc<dyn Signals>,
    /// Where this process's operations wait; it must begin with all gates closed and no slots.
    pub gates: Arc<dyn Gates>,
}

/// A fleet's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FleetConfig {
    /// How long a session stands without a renewal: the time after which the machines of a killed process are free.
    pub lease_ttl: Duration,
    /// How many operations run at once over all members. The least of all members' limits holds.
    pub max_connections: usize,
}

impl Default for FleetConfig {
    /// Half a minute, and 50 operations.
    fn default() -> Self {
        Self { lease_ttl: Duration::from_secs(30), max_connections: 50 }
    }
}

impl FleetConfig {
    /// The shortest [`FleetConfig::lease_ttl`]; less leaves no time for the store to answer.
    pub const MIN_TTL: Duration = Duration::from_millis(300);
    /// The longest.
    pub const MAX_TTL: Duration = Duration::from_secs(3600);
}

/// What lets operations begin. A scheduler is one.
pub trait Gates: fmt::Debug + Send + Sync + 'static {
    /// Lets operations on this machine begin.
    fn open(&self, vm: VmId);
    /// Lets none begin any more, from the call on; the future ends when none runs there, or when the gate was opened again.
    fn close(&self, vm: VmId) -> BoxFuture<'static, ()>;
    /// Lets none begin on any machine.
    fn close_all(&self);
    /// Lets so many run at once, from the call on; the future ends when no more than that run.
    fn resize(&self, slots: usize) -> BoxFuture<'static, ()>;
    /// How many operations run, or could if there were slots.
    fn demand(&self) -> usize;
}

impl Gates for Scheduler {
    fn open(&self, vm: VmId) {
        Scheduler::open(self, vm);
    }

    fn close(&self, vm: VmId) -> BoxFuture<'static, ()> {
        Box::pin(Scheduler::close(self, vm))
    }

    fn close_all(&self) {
        // Nobody waits for what runs: its calls are dropped.
        drop(Scheduler::close_all(self));
    }

    fn resize(&self, slots: usize) -> BoxFuture<'static, ()> {
        Box::pin(Scheduler::resize(self, slots))
    }

    fn demand(&self) -> usize {
        Scheduler::demand(self)
    }
}

/// What an executor is told. Calls must return at once, and may come more often than there is news.
pub trait Listener: Send + Sync + 'static {
    /// A machine became this member's, or is it no more: [`Fleet::is_ours`] tells.
    fn machine_changed(&self, vm: VmId);
    /// These conditions of a machine of ours are watched elsewhere, and no others.
    fn followed(self: Arc<Self>, vm: VmId, conditions: Vec<InstallId>);
    /// A condition that is watched here was run elsewhere.
    fn ran_elsewhere(&self, run: RunReport);
    /// Something may be gone: the store tells.
    fn look_again(self: Arc<Self>, what: Gone);
}

/// What may be gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// An install.
    Install(InstallId),
    /// A machine.
    Vm(VmId),
    /// Anything: notices were lost.
    Any,
}

/// One run of a condition.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RunReport {
    /// The machine.
    pub vm: VmId,
    /// The condition.
    pub condition: InstallId,
    /// What it gave, if anything.
    pub value: Option<f32>,
    /// How much later than planned it began.
    pub lateness: Duration,
}

/// Whether this process is a member now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    /// It tries to join for the first time.
    Joining,
    /// It is this member.
    Member(MemberId),
    /// It was one, and tries to join again.
    Lost,
    /// It has left.
    Left,
}

/// Somebody has one-shots for a machine, as long as this lives.
#[must_use = "the need ends when it is dropped"]
pub struct Need {
    shared: Arc<Shared>,
    vm: VmId,
}

/// A machine that is held does not change hands, as long as this lives.
#[must_use = "the machine may go when it is dropped"]
pub struct Pin {
    shared: Arc<Shared>,
    vm: VmId,
}

/// A condition is watched here, as long as this lives.
#[must_use = "the watch ends when it is dropped"]
pub struct Watch {
    shared: Arc<Shared>,
    vm: VmId,
    condition: InstallId,
}

/// Leave to act on a machine.
#[derive(Debug)]
pub struct Permit {
    token: FencingToken,
    over: CancellationToken,
    /// A session is not over before all calls under it have ended.
    _call: tokio_util::task::task_tracker::TaskTrackerToken,
}

struct Shared {
    store: Arc<dyn StateStore>,
    signals: Arc<dyn Signals>,
    gates: Arc<dyn Gates>,
    times: Times,
    limit: u32,
    live: Mutex<Live>,
    local: Mutex<Local>,
    /// Something in `local` changed.
    changed: Notify,
    listener: Mutex<Option<Weak<dyn Listener>>>,
    membership: watch::Sender<Membership>,
    leaving: CancellationToken,
    tasks: TaskTracker,
}

/// What this member may do now.
#[derive(Default)]
struct Live {
    session: Option<LiveSession>,
    owned: HashMap<VmId, FencingToken>,
    /// Conditions that we run, and who else watches them.
    followed: HashMap<InstallId, Vec<MemberId>>,
}

#[derive(Clone)]
struct LiveSession {
    member: MemberId,
    stops: Instant,
    over: CancellationToken,
    calls: TaskTracker,
}

/// What this process needs, whoever it is in the fleet.
#[derive(Default)]
struct Local {
    needs: HashMap<VmId, Needs>,
    /// Machines whose needs changed. Never more than there are machines with needs.
    dirty: HashSet<VmId>,
    /// When the last known run of a condition began that is watched here, or that we run.
    ran: HashMap<InstallId, Instant>,
    /// Runs to be told to members: the latest of each condition.
    outbox: HashMap<MemberId, HashMap<InstallId, (RunReport, Instant)>>,
}

#[derive(Debug, Default)]
struct Needs {
    once: u32,
    pins: u32,
    turns: u32,
    fenced: Option<FencingToken>,
    watched: BTreeMap<InstallId, u32>,
}

impl Needs {
    fn is_empty(&self) -> bool {
        self.once == 0 && self.pins == 0 && self.watched.is_empty()
    }
}

/// Ends the fleet's tasks with its last clone.
struct Life {
    shared: Arc<Shared>,
}

impl Drop for Life {
    fn drop(&mut self) {
        self.shared.leaving.cancel();
    }
}

impl Fleet {
    /// Begins to join. It keeps trying, and joins again whenever its session is lost, until it leaves.
    ///
    /// # Errors
    /// `Invalid` for a time to live under [`FleetConfig::MIN_TTL`] or over [`FleetConfig::MAX_TTL`], and for a limit of 0.
    pub fn start(parts: FleetParts, config: &FleetConfig) -> Result<Self> {
        let FleetParts { store, signals, gates } = parts;
        if !(FleetConfig::MIN_TTL..=FleetConfig::MAX_TTL).contains(&config.lease_ttl) {
            return Err(Error::invalid(
                "lease_ttl",
                format_args!(
                    "wants {:?} to {:?}, got {:?}",
                    FleetConfig::MIN_TTL,
                    FleetConfig::MAX_TTL,
                    config.lease_ttl
                ),
            ));
        }
        let limit = u32::try_from(config.max_connections).unwrap_or(u32::MAX);
        if limit == 0 {
            return Err(Error::invalid("max_connections", "must be at least 1"));
        }
        let shared = Arc::new(Shared {
            store,
            signals,
            gates,
            times: Times { ttl: config.lease_ttl },
            limit,
            live: Mutex::default(),
            local: Mutex::default(),
            changed: Notify::new(),
            listener: Mutex::new(None),
            membership: watch::Sender::new(Membership::Joining),
            leaving: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        shared.tasks.spawn(actor::run(Arc::clone(&shared)));
        Ok(Self { _life: Arc::new(Life { shared: Arc::clone(&shared) }), shared })
    }

    /// Says who is told what happens.
    pub fn attach(&self, listener: Weak<dyn Listener>) {
        *lock(&self.shared.listener) = Some(listener);
    }

    /// Whether this process is a member now, and each change of that.
    pub fn membership(&self) -> watch::Receiver<Membership> {
        self.shared.membership.subscribe()
    }

    /// This process's name in the fleet, while it is a member.
    pub fn member(&self) -> Option<MemberId> {
        self.shared.session().map(|session| session.member)
    }

    /// [`Fleet::member`], for work that must not be taken for abandoned.
    ///
    /// # Errors
    /// `Conflict` with reason `LEASE_LOST`, safe to repeat, while this process is no member.
    pub fn require_member(&self) -> Result<MemberId> {
        self.member().ok_or_else(|| {
            Error::new(ErrorKind::Conflict, "this executor has no session with the others' store now")
                .with_reason(reason::LEASE_LOST)
                .with_retry(Retry::Safe)
        })
    }

    /// Whether a member's session stands.
    ///
    /// # Errors
    /// Those of the store: then nobody knows.
    pub async fn is_living(&self, member: MemberId) -> Result<bool> {
        session::is_living(&self.shared.store, member).await
    }

    /// Says that there is a one-shot for a machine, which brings the machine here.
    pub fn need(&self, vm: VmId) -> Need {
        self.shared.change(vm, |needs| needs.once += 1);
        Need { shared: Arc::clone(&self.shared), vm }
    }

    /// Keeps a machine here while it is ours.
    pub fn pin(&self, vm: VmId) -> Pin {
        self.shared.change(vm, |needs| needs.pins += 1);
        Pin { shared: Arc::clone(&self.shared), vm }
    }

    /// Says that a condition is watched here: it is run here or elsewhere.
    pub fn watch(&self, vm: VmId, condition: InstallId) -> Watch {
        self.shared.change(vm, |needs| *needs.watched.entry(condition).or_default() += 1);
        Watch { shared: Arc::clone(&self.shared), vm, condition }
    }

    /// Whether operations on this machine run here now.
    pub fn is_ours(&self, vm: VmId) -> bool {
        lock(&self.shared.live).owned.contains_key(&vm)
    }

    /// Leave to act on a machine now.
    ///
    /// # Errors
    /// `Conflict` with reason `LEASE_LOST`, safe to repeat, when the machine is not ours.
    pub fn permit(&self, vm: VmId) -> Result<Permit> {
        let live = lock(&self.shared.live);
        let session = live.session.as_ref().filter(|session| Instant::now() < session.stops);
        match (session, live.owned.get(&vm)) {
            (Some(session), Some(token)) => {
                Ok(Permit { token: *token, over: session.over.clone(), _call: session.calls.token() })
            }
            (None, _) => Err(lost(vm, "this executor has no session with the others' store now")),
            (_, None) => Err(lost(vm, "another executor has the machine now")),
        }
    }

    /// A guest refused this token though the machine is ours: it has seen a newer one, of a store that has forgotten it or
    /// of an executor whose clock is ahead. The machine gets a newer token.
    pub(crate) fn fenced(&self, vm: VmId, token: FencingToken) {
        let ours = lock(&self.shared.live).owned.get(&vm) == Some(&token);
        if ours {
            tracing::warn!(%vm, "a guest has seen a newer token than its owner's; it gets another one");
            self.shared.change(vm, |needs| needs.fenced = Some(token));
        }
    }

    /// Notes that a run of a condition begins here now.
    pub fn began(&self, condition: InstallId) {
        lock(&self.shared.local).ran.insert(condition, Instant::now());
    }

    /// When the last known run of a condition began, here or elsewhere.
    pub fn last_run(&self, condition: InstallId) -> Option<Instant> {
        lock(&self.shared.local).ran.get(&condition).copied()
    }

    /// Tells a run of ours to those who watch the condition elsewhere.
    pub fn report(&self, run: RunReport) {
        let Some(watchers) = lock(&self.shared.live).followed.get(&run.condition).cloned() else { return };
        {
            let mut local = lock(&self.shared.local);
            let began = local.ran.get(&run.condition).copied().unwrap_or_else(Instant::now);
            for watcher in watchers {
                local.outbox.entry(watcher).or_default().insert(run.condition, (run, began));
            }
        }
        self.shared.changed.notify_one();
    }

    /// Tells all that something is gone, after the store was.
    pub fn announce(&self, gone: Gone) {
        let call = match gone {
            Gone::Install(id) => message::Call::Removed(id),
            Gone::Vm(vm) => message::Call::Gone(vm),
            Gone::Any => return,
        };
        let shared = Arc::clone(&self.shared);
        self.shared.tasks.spawn(async move { shared.call(call).await });
    }

    /// Deletes the records of machines whose owners are gone, but for those that changed in the last hour.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn sweep(&self) -> Result<usize> {
        actor::sweep(&self.shared).await
    }

    /// Gives everything back at once: waits until nothing runs, for `grace` at most, and ends the session.
    pub async fn leave(&self, grace: Duration) {
        self.shared.leaving.cancel();
        self.shared.tasks.close();
        if tokio::time::timeout(grace, self.shared.tasks.wait()).await.is_err() {
            tracing::warn!(?grace, "the fleet was not left in time; the session runs out by itself");
        }
    }
}

impl Shared {
    fn session(&self) -> Option<LiveSession> {
        lock(&self.live).session.clone().filter(|session| Instant::now() < session.stops)
    }

    fn change(&self, vm: VmId, change: impl FnOnce(&mut Needs)) {
        let mut local = lock(&self.local);
        let needs = local.needs.entry(vm).or_default();
        change(needs);
        local.dirty.insert(vm);
        drop(local);
        self.changed.notify_one();
    }

    fn listener(&self) -> Option<Arc<dyn Listener>> {
        lock(&self.listener).as_ref()?.upgrade()
    }

    /// Tells all members. A notice that cannot be sent is one that is lost.
    async fn call(&self, call: message::Call) {
        let (Ok(topic), Some(payload)) = (message::fleet_topic(), message::write(&call)) else { return };
        self.send(&topic, payload).await;
    }

    async fn send(&self, topic: &crate::Key, payload: bytes::Bytes) {
        match tokio::time::timeout(self.times.answer(), self.signals.send(topic, payload)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%topic, %error, "a notice was not sent"),
            Err(_) => tracing::debug!(%topic, "a notice was not sent in time"),
        }
    }
}

impl Need {
    /// Says that a one-shot had its turn, so that others may have theirs.
    pub fn had_its_turn(&self) {
        self.shared.change(self.vm, |needs| needs.turns += 1);
    }
}

impl Drop for Need {
    fn drop(&mut self) {
        self.shared.change(self.vm, |needs| needs.once -= 1);
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.shared.change(self.vm, |needs| needs.pins -= 1);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.change(self.vm, |needs| {
            if let Some(count) = needs.watched.get_mut(&self.condition) {
                *count -= 1;
                if *count == 0 {
                    needs.watched.remove(&self.condition);
                }
            }
        });
    }
}

impl Permit {
    /// The token to put on requests.
    pub fn token(&self) -> FencingToken {
        self.token
    }

    /// Makes a call, and drops it when the session ends.
    ///
    /// # Errors
    /// The call's own; `Conflict` with reason `LEASE_LOST` when the session ended first.
    pub async fn during<T>(&self, vm: VmId, call: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.over.cancelled() => Err(lost(vm, "the session ended while the call was under way")),
            result = call => result,
        }
    }
}

fn lost(vm: VmId, message: &str) -> Error {
    Error::new(ErrorKind::Conflict, message)
        .with_reason(reason::LEASE_LOST)
        .with_retry(Retry::Safe)
        .on(format!("vm {vm}"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change under these locks is a single one, so a panic elsewhere leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Fleet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fleet").field("membership", &*self.shared.membership.borrow()).finish_non_exhaustive()
    }
}

macro_rules! debug_vm {
    ($($name:ident),*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).field("vm", &self.vm).finish_non_exhaustive()
            }
        }
    )*};
}

debug_vm!(Need, Pin, Watch);
