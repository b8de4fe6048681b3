//! The one door to libvirt's C library.
//!
//! Every call of the library blocks, and some block for as long as the other side likes. So no call is made
//! anywhere but here, on threads that belong to the door, and every caller has a deadline of its own:
//!
//! ```text
//!   async caller --> lane (permits) --> connection (opened once for all waiters) --> thread (bounded) --> C
//!        ^                                                                               |
//!        +--------------------------- answer, or TimedOut at the deadline <--------------+
//! ```
//!
//! - **Lanes** keep kinds of calls apart: control calls never wait behind agent commands, and the commands of guests
//!   whose agent is silent ([`Lane::Suspect`]) never take the places of the others. A lane spreads its calls over its
//!   connections, since libvirtd reads only 5 requests of one connection at a time.
//! - **Connections** have keep-alive, so that a hung libvirtd ends its calls in seconds, and are opened anew when they
//!   are found dead. Opening has no deadline in libvirt; one thread waits for it and all callers wait for that thread.
//! - **Threads** are the door's own and not the runtime's: a thread that hangs in libvirt must not keep the program
//!   from ending. When its caller has given up, the thread and its places stay taken until libvirt lets it go; so
//!   whatever hangs, there are never more than `max_calls` of them.
//!
//! No object of libvirt's leaves the door: closures get a connection and return plain data.

use std::{
    cell::RefCell,
    collections::VecDeque,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
    time::Duration,
};

use ocr_core::{Error, Result, Retry, error::seconds};
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, timeout_at},
};
use virt::connect::{Connect, ConnectAuth, ConnectCredential, ConnectCredentialType};

use crate::{config::Config, error::Failure};

/// The most control calls at once on one connection: one less than libvirtd reads.
const CONTROL_CALLS_PER_CONNECTION: usize = 4;
/// Uploads and downloads at once.
const BULK_CALLS: usize = 2;
/// How long an idle thread stays.
const IDLE_THREAD: Duration = Duration::from_secs(10);
/// After this, an attempt to connect is given up and another one made beside it.
const OPEN_PATIENCE: Duration = Duration::from_secs(60);
/// The most attempts to connect that hang, for each connection.
const MAX_HUNG_OPENS: usize = 3;
/// Unanswered signs of life after which a connection is dead.
const KEEPALIVE_COUNT: u32 = 3;

/// Which way a call goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Machines, networks, volumes.
    Control,
    /// Commands for guest agents.
    Agent,
    /// Commands for guest agents that were silent last time.
    Suspect,
    /// Streams of data.
    Bulk,
}

/// Whether a call changes anything, which decides what may be said of one that never came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// It only reads: always safe to repeat.
    None,
    /// It changes something.
    Some,
}

/// A call to make.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) operation: &'static str,
    pub(crate) lane: Lane,
    pub(crate) effect: Effect,
    pub(crate) deadline: Duration,
}

/// What a call came to when it did not succeed.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// libvirt said so.
    Libvirt(Failure),
    /// We said so.
    Ours(Error),
}

impl Trouble {
    /// As the error of a call about machines, networks or volumes.
    pub(crate) fn into_error(self) -> Error {
        match self {
            Self::Libvirt(failure) => failure.into_error(),
            Self::Ours(error) => error,
        }
    }

    /// As the error of an agent command.
    pub(crate) fn into_agent_error(self) -> Error {
        match self {
            Self::Libvirt(failure) => failure.into_agent_error(),
            Self::Ours(error) => error,
        }
    }
}

impl From<virt::error::Error> for Trouble {
    fn from(error: virt::error::Error) -> Self {
        Self::Libvirt(error.into())
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Ours(error)
    }
}

/// How busy the door is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Calls that libvirt has not answered yet.
    pub calls: usize,
    /// Those of them whose caller has given up.
    pub given_up: usize,
}

/// See the module's documentation.
pub(crate) struct Door {
    threads: Arc<Threads>,
    control: LaneState,
    agent: LaneState,
    suspect: LaneState,
    bulk: LaneState,
    given_up: Arc<AtomicUsize>,
}

impl fmt::Debug for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Door").field("load", &self.load()).finish_non_exhaustive()
    }
}

impl Door {
    pub(crate) fn new(config: &Config) -> Self {
        let target = Arc::new(Target {
            uri: config.uri.clone(),
            credentials: config.user.clone().zip(config.password.clone()),
            keepalive: config.keepalive,
        });
        let lane = |connections: usize, calls: usize| LaneState::new(connections, calls, &target);
        Self {
            threads: Arc::new(Threads::new(config.max_calls)),
            control: lane(config.control_connections, CONTROL_CALLS_PER_CONNECTION),
            agent: lane(config.agent_connections, Config::AGENT_CALLS_PER_CONNECTION),
            suspect: lane(1, Config::AGENT_CALLS_PER_CONNECTION),
            bulk: lane(1, BULK_CALLS),
            given_up: Arc::new(AtomicUsize::new(0)),
        }
    }

    pub(crate) fn load(&self) -> Load {
        Load { calls: self.threads.taken(), given_up: self.given_up.load(Ordering::Relaxed) }
    }

    /// Makes a call and waits for it until its deadline.
    ///
    /// `work` may run more than once, each time after it surely had no effect or when it has none. A call whose
    /// future is dropped before a thread took it up is not made.
    pub(crate) async fn call<T, F>(&self, call: Call, work: F) -> Result<T, Trouble>
    where
        T: Send + 'static,
        F: Fn(&Connect) -> Result<T, Trouble> + Send + 'static,
    {
        let end = Instant::now() + call.deadline;
        let lane = match call.lane {
            Lane::Control => &self.control,
            Lane::Agent => &self.agent,
            Lane::Suspect => &self.suspect,
            Lane::Bulk => &self.bulk,
        };
        let mut work = work;
        // A connection may be found dead twice: once the idle one, once the one opened to a dying libvirtd.
        for _ in 0..3 {
            let busy = || Trouble::Ours(unavailable(call, "too many calls to libvirt are under way"));
            let place = timeout_at(end, lane.place()).await.map_err(|_| busy())?;
            let connection = timeout_at(end, place.connection(&self.threads))
                .await
                .map_err(|_| Trouble::Ours(unavailable(call, "libvirt accepted no connection")))??;
            let permit = timeout_at(end, self.threads.permit()).await.map_err(|_| busy())?;
            let (answer, answered) = oneshot::channel();
            let patience = Patience::new(&self.given_up);
            let caller = Caller(patience.clone());
            let job = move || {
                // The place and the permit are this job's until libvirt lets it go.
                let (place, permit) = (place, permit);
                if !answer.is_closed() {
                    let outcome = attempt(&connection, &place, call.effect, &work);
                    drop_quietly(connection);
                    drop((place, permit));
                    patience.answered();
                    let _ = answer.send((work, outcome));
                }
            };
            self.threads.run(Box::new(job)).map_err(Trouble::Ours)?;
            let answered = timeout_at(end, answered).await;
            drop(caller);
            match answered {
                Ok(Ok((_, Outcome::Done(result)))) => return result,
                Ok(Ok((again, Outcome::Dead))) => work = again,
                Ok(Err(_)) => {
                    return Err(Error::internal("a call to libvirt was dropped").during(call.operation).into());
                }
                Err(_) => {
                    tracing::warn!(
                        operation = call.operation,
                        deadline = %seconds(call.deadline),
                        load = ?self.load(),
                        "libvirt did not answer in time; its thread is left to itself"
                    );
                    let error = Error::timed_out(format!("libvirt did not answer in {}", seconds(call.deadline)));
                    let retry = if call.effect == Effect::None { Retry::Safe } else { Retry::Ambiguous };
                    return Err(error.with_retry(retry).during(call.operation).into());
                }
            }
        }
        Err(unavailable(call, "libvirt's connections end as soon as they are made").into())
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Closing a connection is a call like any other: it must not hold up the caller.
        let lanes = [&self.control, &self.agent, &self.suspect, &self.bulk];
        let open: Vec<_> = lanes.iter().flat_map(|lane| &lane.slots).filter_map(|slot| slot.take()).collect();
        if !open.is_empty() {
            let close = move || drop_quietly(open);
            let _ = std::thread::Builder::new().name("libvirt-close".to_owned()).spawn(close);
        }
    }
}

fn unavailable(call: Call, why: &str) -> Error {
    Error::unavailable(format!("{why}; waited {}", seconds(call.deadline))).during(call.operation)
}

enum Outcome<T> {
    Done(Result<T, Trouble>),
    /// The connection was dead and the work had no effect.
    Dead,
}

/// One attempt, on a thread of the door's.
fn attempt<T, F>(connection: &Arc<Open>, place: &Place, effect: Effect, work: &F) -> Outcome<T>
where
    F: Fn(&Connect) -> Result<T, Trouble>,
{
    let guarded = catch_unwind(AssertUnwindSafe(|| {
        if !connection.connect.is_alive().unwrap_or(false) {
            return Outcome::Dead;
        }
        match work(&connection.connect) {
            Err(Trouble::Libvirt(failure)) if failure.ends_connection() => match effect {
                Effect::None => Outcome::Dead,
                Effect::Some => Outcome::Done(Err(Trouble::Ours(failure.into_error().with_retry(Retry::Ambiguous)))),
            },
            result => Outcome::Done(result),
        }
    }));
    let outcome = guarded.unwrap_or_else(|_| {
        Outcome::Done(Err(Error::internal("the binding to libvirt panicked").with_retry(Retry::Ambiguous).into()))
    });
    let broken = match &outcome {
        Outcome::Dead => true,
        Outcome::Done(Err(_)) => !connection.connect.is_alive().unwrap_or(false),
        Outcome::Done(Ok(_)) => false,
    };
    if broken {
        place.slot().discard(connection);
    }
    outcome
}

/// One call's count in [`Load::given_up`]: from when its caller leaves until libvirt answers.
struct Patience {
    state: AtomicU8,
    given_up: Arc<AtomicUsize>,
}

impl Drop for Patience {
    fn drop(&mut self) {
        // A job that was never begun, or that panicked.
        self.answered();
    }
}

impl Patience {
    const WAITING: u8 = 0;
    const ANSWERED: u8 = 1;
    const LEFT: u8 = 2;

    fn new(given_up: &Arc<AtomicUsize>) -> Arc<Self> {
        Arc::new(Self { state: AtomicU8::new(Self::WAITING), given_up: given_up.clone() })
    }

    fn answered(&self) {
        if self.state.swap(Self::ANSWERED, Ordering::AcqRel) == Self::LEFT {
            self.given_up.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// The caller's end of a [`Patience`].
struct Caller(Arc<Patience>);

impl Drop for Caller {
    fn drop(&mut self) {
        let Patience { state, given_up } = &*self.0;
        let left = state.compare_exchange(Patience::WAITING, Patience::LEFT, Ordering::AcqRel, Ordering::Acquire);
        if left.is_ok() {
            given_up.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// --- lanes --------------------------------------------------------------------------------------------------

struct LaneState {
    slots: Vec<Arc<Slot>>,
    permits: Arc<Semaphore>,
}

impl LaneState {
    fn new(connections: usize, calls_per_connection: usize, target: &Arc<Target>) -> Self {
        Self {
            slots: (0..connections).map(|_| Arc::new(Slot::new(target.clone()))).collect(),
            permits: Arc::new(Semaphore::new(connections * calls_per_connection)),
        }
    }

    /// Waits for a place and takes it on the connection with the fewest calls. As there are only so many permits,
    /// no connection gets more than its share.
    async fn place(&self) -> Place {
        // The semaphore is never closed.
        let permit = self.permits.clone().acquire_owned().await.ok();
        let slot = self.slots.iter().min_by_key(|slot| slot.calls.load(Ordering::Relaxed)).cloned();
        // A lane has at least one connection.
        let slot = slot.unwrap_or_else(|| unreachable!("a lane without connections"));
        slot.calls.fetch_add(1, Ordering::Relaxed);
        Place { slot, _permit: permit }
    }
}

/// A call's place on a connection.
struct Place {
    slot: Arc<Slot>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Place {
    fn slot(&self) -> &Slot {
        &self.slot
    }

    async fn connection(&self, threads: &Arc<Threads>) -> Result<Arc<Open>, Trouble> {
        Slot::connection(&self.slot, threads).await
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.slot.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

// --- connections --------------------------------------------------------------------------------------------

/// Where connections go to.
struct Target {
    uri: String,
    credentials: Option<(String, SecretString)>,
    keepalive: Duration,
}

/// An open connection.
struct Open {
    connect: Connect,
}

/// One connection of a lane: closed, being opened, or open.
struct Slot {
    target: Arc<Target>,
    calls: AtomicUsize,
    state: Mutex<SlotState>,
    changed: Notify,
}

#[derive(Default)]
struct SlotState {
    open: Option<Arc<Open>>,
    /// When the current attempt to connect began, and its number.
    opening: Option<(Instant, u64)>,
    attempts: u64,
    /// Attempts that nobody waits for any more and that libvirt has not ended.
    hung: usize,
    /// How the last attempt failed, and its number.
    failed: Option<(u64, Failure)>,
}

impl Slot {
    fn new(target: Arc<Target>) -> Self {
        Self { target, calls: AtomicUsize::new(0), state: Mutex::default(), changed: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, SlotState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<Arc<Open>> {
        self.lock().open.take()
    }

    /// Forgets a connection that is dead, unless another one has taken its place. Only on a thread of the door's:
    /// closing is a call.
    fn discard(&self, dead: &Arc<Open>) {
        let mut state = self.lock();
        if state.open.as_ref().is_some_and(|open| Arc::ptr_eq(open, dead)) {
            state.open = None;
        }
    }

    /// The connection, opened when there is none; all callers wait for the same attempt.
    async fn connection(self: &Arc<Self>, threads: &Arc<Threads>) -> Result<Arc<Open>, Trouble> {
        let mut waited_for = None;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let attempt = {
                let mut state = self.lock();
                if let Some(open) = &state.open {
                    return Ok(open.clone());
                }
                if let (Some(waited), Some((number, failure))) = (waited_for, &state.failed)
                    && *number >= waited
                {
                    return Err(Trouble::Libvirt(failure.clone()));
                }
                match state.opening {
                    Some((since, number)) if since.elapsed() < OPEN_PATIENCE || state.hung >= MAX_HUNG_OPENS => {
                        waited_for.get_or_insert(number);
                        None
                    }
                    stale => {
                        state.hung += usize::from(stale.is_some());
                        state.attempts += 1;
                        let number = state.attempts;
                        state.opening = Some((Instant::now(), number));
                        waited_for.get_or_insert(number);
                        Some(number)
                    }
                }
            };
            if let Some(number) = attempt {
                let slot = self.clone();
                let opener = Opening { slot, number };
                let permit = threads.permit().await;
                threads.run(Box::new(move || {
                    let _permit = permit;
                    let result = catch_unwind(AssertUnwindSafe(|| open(&opener.slot.target)));
                    opener.finish(result.unwrap_or_else(|_| Err(panicked())));
                }))?;
            }
            // An attempt that hangs is looked at again once it may be given up.
            let _ = tokio::time::timeout(OPEN_PATIENCE, changed).await;
        }
    }
}

/// An attempt to connect. When it is dropped before it began (its caller left, or there was no thread), the next
/// caller makes one of its own.
struct Opening {
    slot: Arc<Slot>,
    number: u64,
}

impl Opening {
    fn finish(self, result: Result<Connect, Failure>) {
        let surplus = {
            let mut state = self.slot.lock();
            let is_current = self.end(&mut state);
            state.hung -= usize::from(!is_current);
            match result {
                Ok(connect) if state.open.is_none() => {
                    state.open = Some(Arc::new(Open { connect }));
                    None
                }
                Ok(connect) => Some(connect),
                Err(failure) => {
                    if is_current {
                        state.failed = Some((self.number, failure));
                    }
                    None
                }
            }
        };
        self.slot.changed.notify_waiters();
        drop_quietly(surplus);
    }

    /// Takes the attempt off the books; whether it was the one that callers wait for.
    fn end(&self, state: &mut SlotState) -> bool {
        let is_current = state.opening.is_some_and(|(_, number)| number == self.number);
        if is_current {
            state.opening = None;
        }
        is_current
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        let mut state = self.slot.lock();
        if self.end(&mut state) {
            drop(state);
            self.slot.changed.notify_waiters();
        }
    }
}

thread_local! {
    /// What [`give_credentials`] answers: libvirt asks on the thread that opens, and the binding takes no closure.
    static CREDENTIALS: RefCell<Option<(String, SecretString)>> = const { RefCell::new(None) };
}

fn give_credentials(asked: &mut Vec<ConnectCredential>) {
    CREDENTIALS.with_borrow(|credentials| {
        let Some((user, password)) = credentials else { return };
        for question in asked {
            question.result = match question.typed {
                ConnectCredentialType::AuthName | ConnectCredentialType::UserName => Some(user.clone()),
                ConnectCredentialType::Passphrase => Some(password.expose_secret().to_owned()),
                _ => None,
            };
        }
    });
}

/// Opens a connection; it takes as long as it takes.
fn open(target: &Target) -> Result<Connect, Failure> {
    start_event_loop()?;
    let connect = match &target.credentials {
        None => Connect::open(Some(&target.uri)),
        Some(credentials) => {
            CREDENTIALS.set(Some(credentials.clone()));
            let kinds = vec![
                ConnectCredentialType::AuthName,
                ConnectCredentialType::UserName,
                ConnectCredentialType::Passphrase,
            ];
            let opened = Connect::open_auth(Some(&target.uri), &mut ConnectAuth::new(kinds, give_credentials), 0);
            CREDENTIALS.set(None);
            opened
        }
    }?;
    let interval_s = i32::try_from(target.keepalive.as_secs()).unwrap_or(i32::MAX);
    // Drivers without a connection of their own (test:///) have none to keep alive.
    if let Err(error) = connect.set_keep_alive(interval_s, KEEPALIVE_COUNT) {
        tracing::debug!(error = error.message(), "this connection has no keep-alive");
    }
    Ok(connect)
}

fn panicked() -> Failure {
    Failure {
        code: crate::error::code::INTERNAL_ERROR,
        domain: 0,
        message: "the binding to libvirt panicked while it connected".to_owned(),
    }
}

/// Drops something of libvirt's; the binding panics when closing fails.
fn drop_quietly<T>(value: T) {
    let _ = catch_unwind(AssertUnwindSafe(|| drop(value)));
}

/// Runs libvirt's event loop, which keep-alive needs, once for the whole program: libvirt knows one loop only, it
/// must be there before the first connection, and it cannot be taken away again. So its thread lives as long as
/// the program.
fn start_event_loop() -> Result<(), Failure> {
    static STARTED: OnceLock<Result<(), Failure>> = OnceLock::new();
    STARTED
        .get_or_init(|| {
            // Errors come back from each call; libvirt need not print them too.
            virt::error::clear_error_callback();
            virt::event::event_register_default_impl()?;
            let run = || {
                loop {
                    if virt::event::event_run_default_impl().is_err() {
                        // It waits for events by itself; only its failing must not become a busy loop.
                        std::thread::sleep(Duration::from_millis(100));
                    }
                }
            };
            let spawned = std::thread::Builder::new().name("libvirt-events".to_owned()).spawn(run);
            spawned.map(drop).map_err(|error| Failure {
                code: crate::error::code::NO_MEMORY,
                domain: 0,
                message: format!("no thread for libvirt's events: {error}"),
            })
        })
        .clone()
}

// --- threads ------------------------------------------------------------------------------------------------

type Job = Box<dyn FnOnce() + Send>;

/// Threads that come when needed and go when idle, never more than there are permits.
struct Threads {
    permits: Arc<Semaphore>,
    max: usize,
    state: Mutex<ThreadState>,
    wake: Condvar,
}

#[derive(Default)]
struct ThreadState {
    jobs: VecDeque<Job>,
    idle: usize,
}

impl Threads {
    fn new(max: usize) -> Self {
        Self { permits: Arc::new(Semaphore::new(max)), max, state: Mutex::default(), wake: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, ThreadState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a job may be run. The job must hold the permit to its end.
    async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        // The semaphore is never closed.
        self.permits.clone().acquire_owned().await.ok()
    }

    fn taken(&self) -> usize {
        self.max - self.permits.available_permits()
    }

    fn run(self: &Arc<Self>, job: Job) -> Result<()> {
        let mut state = self.lock();
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() {
            self.wake.notify_one();
            return Ok(());
        }
        drop(state);
        let threads = self.clone();
        let spawned = std::thread::Builder::new().name("libvirt-call".to_owned()).spawn(move || threads.work());
        spawned.map(drop).map_err(|error| {
            self.lock().jobs.pop_back();
            Error::new(ocr_core::ErrorKind::Exhausted, "no thread can be had for a call to libvirt").with_source(error)
        })
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                drop_quietly(catch_unwind(AssertUnwindSafe(job)));
                state = self.lock();
                continue;
            }
            state.idle += 1;
            let waited = self.wake.wait_timeout(state, IDLE_THREAD).unwrap_or_else(PoisonError::into_inner);
            state = waited.0;
            state.idle -= 1;
            if waited.1.timed_out() && state.jobs.is_empty() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use ocr_core::ErrorKind;

    use super::*;

    fn door(max_calls: usize) -> Door {
        Door::new(&Config { uri: "test:///default".to_owned(), max_calls, ..Config::default() })
    }

    const CALL: Call =
        Call { operation: "test.call", lane: Lane::Control, effect: Effect::None, deadline: Duration::from_secs(20) };

    /// Work that ends when the sender is dropped.
    fn hang() -> (mpsc::Sender<()>, impl Fn(&Connect) -> Result<(), Trouble> + Send + 'static) {
        let (gate, closed) = mpsc::channel::<()>();
        let closed = Mutex::new(closed);
        let work = move |_: &Connect| {
            let _ = closed.lock().unwrap().recv();
            Ok(())
        };
        (gate, work)
    }

    async fn until(mut done: impl FnMut() -> bool) {
        for _ in 0..1000 {
            if done() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("waited too long");
    }

    #[tokio::test]
    async fn a_call_is_answered() {
        let name = door(4).call(CALL, |connect| Ok(connect.hostname()?)).await.unwrap();
        assert!(!name.is_empty());
    }

    #[tokio::test]
    async fn libvirts_error_comes_back_as_it_is() {
        let result = door(4).call(CALL, |connect| Ok(connect.lookup_domain_by_name("none")?.name()?)).await;
        let Err(Trouble::Libvirt(failure)) = result else { panic!("{result:?}") };
        assert_eq!(failure.code, crate::error::code::NO_DOMAIN);
    }

    #[tokio::test]
    async fn a_call_that_hangs_costs_its_caller_the_deadline_and_others_nothing() {
        let door = door(4);
        let (gate, work) = hang();
        let short = Call { effect: Effect::Some, deadline: Duration::from_millis(100), ..CALL };
        let error = door.call(short, work).await.unwrap_err().into_error();
        assert_eq!((error.kind(), error.retry()), (ErrorKind::TimedOut, Retry::Ambiguous));
        assert_eq!(error.operation(), Some("test.call"));
        assert_eq!(door.load(), Load { calls: 1, given_up: 1 });
        door.call(CALL, |connect| Ok(connect.hostname()?)).await.unwrap();
        drop(gate);
        until(|| door.load() == Load { calls: 0, given_up: 0 }).await;
    }

    #[tokio::test]
    async fn reading_past_the_deadline_is_safe_to_repeat() {
        let (_gate, work) = hang();
        let short = Call { deadline: Duration::from_millis(50), ..CALL };
        assert_eq!(door(4).call(short, work).await.unwrap_err().into_error().retry(), Retry::Safe);
    }

    #[tokio::test]
    async fn however_many_calls_hang_threads_are_bounded() {
        let door = door(2);
        let short = Call { deadline: Duration::from_millis(100), ..CALL };
        let gates: Vec<_> = {
            let mut gates = Vec::new();
            for _ in 0..2 {
                let (gate, work) = hang();
                gates.push(gate);
                assert_eq!(door.call(short, work).await.unwrap_err().into_error().kind(), ErrorKind::TimedOut);
            }
            gates
        };
        // No thread is left: the call is not made, and says so.
        let error = door.call(short, |_| -> Result<(), Trouble> { panic!("made") }).await.unwrap_err().into_error();
        assert_eq!((error.kind(), error.retry()), (ErrorKind::Unavailable, Retry::Safe));
        assert_eq!(door.load(), Load { calls: 2, given_up: 2 });
        drop(gates);
        until(|| door.load().calls == 0).await;
        door.call(CALL, |connect| Ok(connect.hostname()?)).await.unwrap();
    }

    #[tokio::test]
    async fn lanes_do_not_wait_for_each_other() {
        let door = door(16);
        let mut gates = Vec::new();
        for _ in 0..Config::AGENT_CALLS_PER_CONNECTION {
            let (gate, work) = hang();
            gates.push(gate);
            let short = Call { lane: Lane::Suspect, deadline: Duration::from_millis(50), ..CALL };
            door.call(short, work).await.unwrap_err();
        }
        let full = Call { lane: Lane::Suspect, deadline: Duration::from_millis(50), ..CALL };
        let error = door.call(full, |_| Ok(())).await.unwrap_err().into_error();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        for lane in [Lane::Control, Lane::Agent, Lane::Bulk] {
            door.call(Call { lane, ..CALL }, |connect| Ok(connect.hostname()?)).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_panic_in_the_binding_is_an_error_and_the_thread_goes_on() {
        let door = door(1);
        for _ in 0..3 {
            let result: Result<(), Trouble> = door.call(CALL, |_| panic!("on purpose")).await;
            assert_eq!(result.unwrap_err().into_error().kind(), ErrorKind::Internal);
        }
        door.call(CALL, |connect| Ok(connect.hostname()?)).await.unwrap();
        until(|| door.load() == Load { calls: 0, given_up: 0 }).await;
    }

    #[tokio::test]
    async fn a_libvirt_that_is_not_there_is_unavailable_for_all_who_ask() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("none");
        let uri = format!("qemu+unix:///system?socket={}", socket.display());
        let door = Arc::new(Door::new(&Config { uri, ..Config::default() }));
        let mut callers = tokio::task::JoinSet::new();
        for _ in 0..20 {
            let door = door.clone();
            callers.spawn(async move { door.call(CALL, |_| Ok(())).await.unwrap_err().into_error() });
        }
        for error in callers.join_all().await {
            assert_eq!((error.kind(), error.retry()), (ErrorKind::Unavailable, Retry::Safe), "{error}");
        }
    }

    #[tokio::test]
    async fn one_that_accepts_and_never_answers_holds_one_thread_and_no_caller() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("mute");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let uri = format!("qemu+unix:///system?socket={}", socket.display());
        let config = Config { uri, control_connections: 1, ..Config::default() };
        let door = Door::new(&config);
        let short = Call { deadline: Duration::from_millis(200), ..CALL };
        for _ in 0..5 {
            let error = door.call(short, |_| Ok(())).await.unwrap_err().into_error();
            assert_eq!((error.kind(), error.retry()), (ErrorKind::Unavailable, Retry::Safe), "{error}");
        }
        assert_eq!(door.load().calls, 1);
        // It goes away: the attempt ends, and the next caller makes another one.
        drop(listener);
        until(|| door.load().calls == 0).await;
    }

    #[tokio::test]
    async fn a_call_whose_caller_left_before_it_began_is_not_made() {
        let door = Arc::new(door(1));
        let (gate, work) = hang();
        let busy = tokio::spawn({
            let door = door.clone();
            async move { door.call(CALL, work).await }
        });
        until(|| door.load().calls == 1).await;
        let made = Arc::new(AtomicUsize::new(0));
        let count = made.clone();
        let short = Call { deadline: Duration::from_millis(50), ..CALL };
        let left = door.call(short, move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        left.await.unwrap_err();
        drop(gate);
        busy.await.unwrap().unwrap();
        assert_eq!(made.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn credentials_are_given_and_wrong_ones_refused() {
        let folder = tempfile::tempdir().unwrap();
        let node = folder.path().join("node.xml");
        std::fs::write(&node, "<node><auth><user password='right'>range</user></auth></node>").unwrap();
        let open = |password: &str| {
            Door::new(&Config {
                uri: format!("test://{}", node.display()),
                user: Some("range".to_owned()),
                password: Some(password.to_owned().into()),
                ..Config::default()
            })
        };
        open("right").call(CALL, |connect| Ok(connect.hostname()?)).await.unwrap();
        let error = open("wrong").call(CALL, |connect| Ok(connect.hostname()?)).await.unwrap_err().into_error();
        assert_eq!(error.kind(), ErrorKind::Denied);
        assert!(!format!("{error:?}").contains("wrong"));
    }
}
