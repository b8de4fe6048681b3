//! The one door to the C library: every call leaves here for a blocking thread, with a deadline.
//!
//! ```text
//!   caller --permit--> blocking thread --> connection --> libvirtd
//!      |                     |
//!      +---- deadline ------ + the thread is written off until the C call returns; its permit goes with it
//! ```
//!
//! So a libvirtd that hangs costs a bounded number of threads, and callers an error within their deadline. Connections
//! come in pools: ordinary calls, agent commands, and agent commands to guests that did not answer lately, which
//! therefore never hold up the others. A connection that is lost is opened anew by the next call.

use std::{
    collections::HashSet,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, Once, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use ocr_core::{Error, ErrorKind, Result, Retry, VmId, error::seconds};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use virt::{
    connect::{Connect, ConnectAuth, ConnectCredential, ConnectCredentialType},
    domain::Domain,
};

use crate::{config::Config, error::Fault};

/// Calls in flight over one connection. libvirtd serves five of one client at once.
const CALLS_PER_CONNECTION: usize = 3;
/// A ping every so many seconds, so that a connection to nowhere ends.
const KEEPALIVE_S: i32 = 3;
/// So many unanswered pings end it.
const KEEPALIVE_COUNT: u32 = 3;
/// Beyond an agent command's own limit: libvirt first waits for the agent's sync, at most 5 s.
const AGENT_MARGIN: Duration = Duration::from_secs(8);
/// How many guests are remembered as not answering.
const MAX_SUSPECTS: usize = 10_000;

/// What a call through the door comes to inside the blocking thread.
pub(crate) type Raw<T> = std::result::Result<T, virt::error::Error>;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Door {
    control: Pool,
    agents: Pool,
    /// For guests that did not answer lately.
    waiting_room: Pool,
    suspects: Mutex<HashSet<VmId>>,
    call_deadline: Duration,
}

impl Door {
    pub(crate) fn new(config: &Config) -> Self {
        start_event_loop();
        let how = Arc::new(How { uri: config.uri.clone(), user: config.user.clone(), password: config.password.clone() });
        Self {
            control: Pool::new(&how, config.control_connections),
            agents: Pool::new(&how, config.agent_connections),
            waiting_room: Pool::new(&how, config.agent_connections),
            suspects: Mutex::default(),
            call_deadline: config.call_deadline,
        }
    }

    /// An ordinary call. `call` runs on a blocking thread and may make several of libvirt's.
    pub(crate) async fn call<T, F>(&self, operation: &'static str, call: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connect) -> Raw<T> + Send + 'static,
    {
        self.call_within(operation, self.call_deadline, call).await?.map_err(|fault| fault.into_error().during(operation))
    }

    /// Likewise, with libvirt's own fault for callers who tell codes apart.
    pub(crate) async fn call_within<T, F>(
        &self,
        operation: &'static str,
        deadline: Duration,
        call: F,
    ) -> Result<std::result::Result<T, Fault>>
    where
        T: Send + 'static,
        F: FnOnce(&Connect) -> Raw<T> + Send + 'static,
    {
        self.control.run(operation, deadline, call).await
    }

    /// One command to a guest's agent, and its answer.
    pub(crate) async fn agent(&self, vm: VmId, command: String, limit: Duration) -> Result<String> {
        const OPERATION: &str = "libvirt.agent_command";
        let timeout_s = i32::try_from(limit.as_secs().max(1)).unwrap_or(i32::MAX);
        let uuid = *vm.as_uuid();
        let call = move |connect: &Connect| -> Raw<String> {
            // Without a look at its XML: one round trip is enough, and the domain's absence shows here.
            let domain: Domain = connect.lookup_domain_by_uuid(uuid)?;
            domain.qemu_agent_command(&command, timeout_s, 0)
        };
        let suspect = self.suspects().contains(&vm);
        let pool = if suspect { &self.waiting_room } else { &self.agents };
        let outcome = pool.run(OPERATION, limit + AGENT_MARGIN, call).await;
        let outcome = outcome.and_then(|answer| answer.map_err(Fault::into_error));
        self.remember(vm, &outcome);
        outcome.map_err(|error| error.during(OPERATION).on(format!("vm {vm}")))
    }

    /// A guest that did not answer in time is suspect until it answers.
    fn remember(&self, vm: VmId, outcome: &Result<String>) {
        let mut suspects = self.suspects();
        match outcome {
            Err(error) if error.retry() == Retry::Ambiguous => {
                if suspects.len() < MAX_SUSPECTS {
                    suspects.insert(vm);
                }
            }
            Err(error) if error.kind() == ErrorKind::Unavailable => {}
            _ => {
                suspects.remove(&vm);
            }
        }
    }

    fn suspects(&self) -> std::sync::MutexGuard<'_, HashSet<VmId>> {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connections of one sort, each with its permits.
#[derive(Debug)]
struct Pool {
    lines: Vec<Line>,
    next: AtomicUsize,
}

#[derive(Clone)]
struct Line {
    how: Arc<How>,
    permits: Arc<Semaphore>,
    connection: Arc<Mutex<Option<Connect>>>,
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line").field("free", &self.permits.available_permits()).finish_non_exhaustive()
    }
}

/// How connections are opened.
struct How {
    uri: String,
    user: Option<String>,
    password: Option<SecretString>,
}

impl Pool {
    fn new(how: &Arc<How>, lines: usize) -> Self {
        let line = || Line {
            how: how.clone(),
            permits: Arc::new(Semaphore::new(CALLS_PER_CONNECTION)),
            connection: Arc::default(),
        };
        Self { lines: (0..lines).map(|_| line()).collect(), next: AtomicUsize::new(0) }
    }

    async fn run<T, F>(
        &self,
        operation: &'static str,
        deadline: Duration,
        call: F,
    ) -> Result<std::result::Result<T, Fault>>
    where
        T: Send + 'static,
        F: FnOnce(&Connect) -> Raw<T> + Send + 'static,
    {
        let end = tokio::time::Instant::now() + deadline;
        let late = |what: &str, retry| {
            Error::timed_out(format!("{what} within {}", seconds(deadline))).with_retry(retry).during(operation)
        };
        let (line, permit) = tokio::time::timeout_at(end, self.permit())
            .await
            .map_err(|_| late("libvirt had no room for the call", Retry::Safe))??;
        let work = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            // virt panics where libvirt breaks its word; a thread of the pool must survive that.
            catch_unwind(AssertUnwindSafe(|| line.run(call)))
        });
        match tokio::time::timeout_at(end, work).await {
            Ok(Ok(Ok(outcome))) => Ok(outcome),
            Ok(Ok(Err(_)) | Err(_)) => Err(Error::internal("a call into libvirt panicked").during(operation)),
            Err(_) => Err(late("libvirt did not answer", Retry::Ambiguous)),
        }
    }

    /// A permit of the freest line.
    async fn permit(&self) -> Result<(Line, OwnedSemaphorePermit)> {
        let closed = |_| Error::internal("the door to libvirt is closed");
        let start = self.next.fetch_add(1, Ordering::Relaxed);
        for at in 0..self.lines.len() {
            let line = &self.lines[(start + at) % self.lines.len()];
            if let Ok(permit) = line.permits.clone().try_acquire_owned() {
                return Ok((line.clone(), permit));
            }
        }
        // All are busy: whichever is free first.
        let waits = self.lines.iter().map(|line| {
            let line = line.clone();
            Box::pin(async move { line.permits.clone().acquire_owned().await.map(|permit| (line, permit)) })
        });
        futures::future::select_all(waits).await.0.map_err(closed)
    }
}

impl Line {
    /// On a blocking thread.
    fn run<T>(&self, call: impl FnOnce(&Connect) -> Raw<T>) -> std::result::Result<T, Fault> {
        let connection = self.connected()?;
        let outcome = call(&connection).map_err(Fault::from);
        if outcome.as_ref().is_err_and(Fault::lost_connection) {
            self.forget();
        }
        outcome
    }

    fn connected(&self) -> std::result::Result<Connect, Fault> {
        // Held while opening: a daemon that hangs is asked for one connection a line, not for one a call.
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = connection.as_ref()
            && open.is_alive().unwrap_or(false)
        {
            return Ok(open.clone());
        }
        *connection = None;
        let open = self.how.open()?;
        *connection = Some(open.clone());
        Ok(open)
    }

    fn forget(&self) {
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl How {
    fn open(&self) -> std::result::Result<Connect, Fault> {
        let connect = match (&self.user, &self.password) {
            (Some(user), Some(password)) => {
                // The callback is a bare function, so what it answers with lies in a place of its own for as long.
                let _turn = CREDENTIALS.fill(user, password);
                let kinds = vec![ConnectCredentialType::AuthName, ConnectCredentialType::Passphrase];
                Connect::open_auth(Some(&self.uri), &mut ConnectAuth::new(kinds, answer), 0)
            }
            _ => Connect::open(Some(&self.uri)),
        }
        .map_err(Fault::from)?;
        // A driver in this process (test:///default) has nothing to keep alive.
        let _ = connect.set_keep_alive(KEEPALIVE_S, KEEPALIVE_COUNT);
        Ok(connect)
    }
}

/// What the C library's callback answers with.
struct Credentials {
    turn: Mutex<()>,
    held: Mutex<Option<(String, SecretString)>>,
}

static CREDENTIALS: Credentials = Credentials { turn: Mutex::new(()), held: Mutex::new(None) };

impl Credentials {
    /// Holds them for as long as the answer lives; one opening at a time.
    fn fill(&'static self, user: &str, password: &SecretString) -> impl Drop + use<> {
        struct Turn {
            _turn: std::sync::MutexGuard<'static, ()>,
        }
        impl Drop for Turn {
            fn drop(&mut self) {
                *CREDENTIALS.held.lock().unwrap_or_else(PoisonError::into_inner) = None;
            }
        }
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Some((user.to_owned(), password.clone()));
        Turn { _turn: turn }
    }
}

fn answer(asked: &mut Vec<ConnectCredential>) {
    let held = CREDENTIALS.held.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((user, password)) = held.as_ref() else { return };
    for credential in asked {
        credential.result = match credential.typed {
            ConnectCredentialType::AuthName => Some(user.clone()),
            ConnectCredentialType::Passphrase => Some(password.expose_secret().to_owned()),
            _ => None,
        };
    }
}

/// Runs libvirt's event loop, which keep-alive needs, on a thread of its own: once in a process, as the C library
/// wants it, and to the process's end, as the C library gives no way to stop it.
fn start_event_loop() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        // libvirt prints its errors to stderr unless it is told not to; they are in ours.
        virt::error::clear_error_callback();
        if let Err(error) = virt::event::event_register_default_impl() {
            tracing::warn!(%error, "libvirt's event loop cannot be registered; a hung libvirtd is noticed late");
            return;
        }
        let run = || {
            loop {
                if let Err(error) = virt::event::event_run_default_impl() {
                    tracing::debug!(%error, "libvirt's event loop stumbled");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("libvirt-events".to_owned()).spawn(run) {
            tracing::warn!(%error, "libvirt's event loop has no thread; a hung libvirtd is noticed late");
        }
    });
}
