//! The connections: kept while they are of use, shared, and never more than so many.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    task::AbortHandle,
    time::Instant,
};

use super::{
    Jump, SshConfig,
    address::{Addresses, not_ready},
    key,
    pin::{Host, HostKeys},
    session::{Dial, Refusal, Session, denied},
};
use crate::{Error, Result, VmId, credentials::Credentials, error::seconds};

/// Accounts of machines of which something is kept although there is no connection now.
const IDLE_SEATS: usize = 16 << 10;

/// One account of one machine, with one set of secrets.
type Place = (VmId, [u8; 32]);

/// All connections.
#[derive(Debug)]
pub(super) struct Pool {
    dial: Dial,
    addresses: Arc<dyn Addresses>,
    jump: Option<Jump>,
    connect_limit: Duration,
    idle_limit: Duration,
    login_grace: Duration,
    max_connections: usize,
    permits: Arc<Semaphore>,
    /// Told when somebody has done with a connection, which may make room then.
    freed: Arc<Notify>,
    /// The jump host's connections count apart: machines that use up all places must not lock it out.
    jump_seat: Arc<Seat>,
    seats: Mutex<HashMap<Place, Arc<Seat>>>,
    sweeper: Mutex<Option<AbortHandle>>,
}

/// A connection in use.
#[derive(Debug)]
pub(super) struct Used {
    session: Option<Arc<Session>>,
    freed: Arc<Notify>,
}

impl std::ops::Deref for Used {
    type Target = Arc<Session>;

    fn deref(&self) -> &Arc<Session> {
        #[expect(clippy::expect_used, reason = "it is taken by drop alone")]
        self.session.as_ref().expect("a connection in use is there")
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        // First let go, then say so.
        self.session = None;
        self.freed.notify_one();
    }
}

/// A connection's place. Whoever finds it empty connects, and the others wait for that.
#[derive(Debug, Default)]
struct Seat {
    session: tokio::sync::Mutex<Option<Arc<Session>>>,
    login: Mutex<Login>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Login {
    /// Whether the account was let in before.
    accepted: bool,
    /// When it was first refused.
    refused: Option<Instant>,
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(sweeper) = self.sweeper.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            sweeper.abort();
        }
    }
}

impl Pool {
    pub(super) fn new(addresses: Arc<dyn Addresses>, keys: HostKeys, config: &SshConfig) -> Arc<Self> {
        Arc::new(Self {
            dial: Dial { keys, keepalive: config.keepalive, keepalive_max: config.keepalive_max },
            addresses,
            jump: config.jump.clone(),
            connect_limit: config.connect_limit,
            idle_limit: config.idle_limit,
            login_grace: config.login_grace,
            max_connections: config.max_connections,
            permits: Arc::new(Semaphore::new(config.max_connections)),
            freed: Arc::default(),
            jump_seat: Arc::default(),
            seats: Mutex::default(),
            sweeper: Mutex::default(),
        })
    }

    /// A connection that is there, or a new one.
    pub(super) async fn session(self: &Arc<Self>, vm: VmId, credentials: &Credentials) -> Result<Used> {
        let seat = self.seat((vm, key::digest(credentials)));
        let late = || not_ready(format!("there is no SSH connection after {}", seconds(self.connect_limit)));
        let connected = tokio::time::timeout(self.connect_limit, self.occupy(vm, credentials, &seat));
        match connected.await.map_err(|_| late())? {
            Ok(session) => {
                session.touch();
                Ok(Used { session: Some(session), freed: Arc::clone(&self.freed) })
            }
            Err(Refusal::Other(error)) => Err(error),
            Err(Refusal::Login(why)) => Err(self.refused(&seat, why)),
        }
    }

    async fn occupy(
        self: &Arc<Self>,
        vm: VmId,
        credentials: &Credentials,
        seat: &Seat,
    ) -> Result<Arc<Session>, Refusal> {
        let mut place = seat.session.lock().await;
        if let Some(session) = place.as_ref().filter(|session| session.is_usable()) {
            return Ok(Arc::clone(session));
        }
        *place = None;
        // First, because it tells a machine that is gone or off from one that does not answer.
        let at = self.addresses.locate(vm).await?;
        let through = match &self.jump {
            None => None,
            Some(jump) => Some(self.jump_session(jump).await?),
        };
        let permit = self.permit().await?;
        let session = Box::pin(self.dial.connect(Host::Machine(vm), &at, credentials, through, Some(permit))).await?;
        tracing::debug!(%vm, session = %session.name, "connected by SSH");
        let session = Arc::new(session);
        *place = Some(Arc::clone(&session));
        *seat.login.lock().unwrap_or_else(PoisonError::into_inner) = Login { accepted: true, refused: None };
        self.sweep_later();
        Ok(session)
    }

    async fn jump_session(&self, jump: &Jump) -> Result<Arc<Session>> {
        let mut place = self.jump_seat.session.lock().await;
        if let Some(session) = place.as_ref().filter(|session| session.is_usable()) {
            session.touch();
            return Ok(Arc::clone(session));
        }
        *place = None;
        let host = Host::Jump(jump.at.to_string());
        let connected = Box::pin(self.dial.connect(host, &jump.at, &jump.credentials, None, None)).await;
        let session = Arc::new(connected.map_err(|refusal| match refusal {
            Refusal::Login(why) => denied(why).with_note("this is the jump host"),
            Refusal::Other(error) => error.with_note("this is the jump host"),
        })?);
        *place = Some(Arc::clone(&session));
        Ok(session)
    }

    /// A guest that boots may not know the account yet; afterwards a refusal is one.
    fn refused(&self, seat: &Seat, why: String) -> Error {
        let mut login = seat.login.lock().unwrap_or_else(PoisonError::into_inner);
        let first = *login.refused.get_or_insert_with(Instant::now);
        if !login.accepted && first.elapsed() < self.login_grace {
            return not_ready(why).with_note("a guest that still boots may not know the account yet");
        }
        denied(why)
    }

    /// A place for one more connection; the one unused for longest makes room.
    async fn permit(&self) -> Result<OwnedSemaphorePermit> {
        let wait = async {
            loop {
                let mut freed = std::pin::pin!(self.freed.notified());
                // From now on nothing is missed.
                freed.as_mut().enable();
                if let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() {
                    return permit;
                }
                let idle = self.idle(Duration::ZERO);
                match idle.into_iter().min_by_key(|(_, used)| *used) {
                    Some((seat, _)) if close(&seat) => {}
                    _ => freed.await,
                }
            }
        };
        let limit = self.connect_limit.mul_f64(0.9);
        tokio::time::timeout(limit, wait).await.map_err(|_| {
            not_ready(format!("all {} SSH connections were in use for {}", self.max_connections, seconds(limit)))
        })
    }

    fn seats(&self) -> MutexGuard<'_, HashMap<Place, Arc<Seat>>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seat(&self, place: Place) -> Arc<Seat> {
        let mut seats = self.seats();
        if seats.len() >= IDLE_SEATS && !seats.contains_key(&place) {
            seats.retain(|_, seat| !is_free(seat));
        }
        Arc::clone(seats.entry(place).or_default())
    }

    /// Connections that nobody uses, for at least so long, and since when.
    fn idle(&self, at_least: Duration) -> Vec<(Arc<Seat>, Instant)> {
        let seats: Vec<_> = self.seats().values().cloned().collect();
        let used = |seat: &Arc<Seat>| {
            let place = seat.session.try_lock().ok()?;
            let session = place.as_ref().filter(|session| Arc::strong_count(session) == 1)?;
            Some(session.used()).filter(|used| used.elapsed() >= at_least || !session.is_usable())
        };
        seats.into_iter().filter_map(|seat| used(&seat).map(|used| (seat, used))).collect()
    }

    /// Begins to close what is not used, unless that goes on already. It ends with the last connection.
    fn sweep_later(self: &Arc<Self>) {
        let mut sweeper = self.sweeper.lock().unwrap_or_else(PoisonError::into_inner);
        if sweeper.as_ref().is_some_and(|sweeper| !sweeper.is_finished()) {
            return;
        }
        let (pool, pause) = (Arc::downgrade(self), self.idle_limit / 2);
        *sweeper = Some(tokio::spawn(sweep(pool, pause)).abort_handle());
    }

    fn sweep(&self) -> bool {
        for (seat, _) in self.idle(self.idle_limit) {
            close(&seat);
        }
        let left = self.seats().values().any(|seat| seat.session.try_lock().is_ok_and(|place| place.is_some()));
        if let Ok(mut place) = self.jump_seat.session.try_lock()
            && let Some(session) = place.as_ref()
            && Arc::strong_count(session) == 1
            && (session.used().elapsed() >= self.idle_limit || !session.is_usable())
        {
            *place = None;
        }
        left || self.jump_seat.session.try_lock().is_ok_and(|place| place.is_some())
    }

    /// How many connections to machines there are now.
    pub(super) fn connections(&self) -> usize {
        self.max_connections - self.permits.available_permits()
    }
}

/// Closes a connection that nobody uses. Whether it was so.
fn close(seat: &Seat) -> bool {
    let Ok(mut place) = seat.session.try_lock() else { return false };
    // A session that others hold too is not ours to close.
    let idle = place.as_ref().is_some_and(|session| Arc::strong_count(session) == 1);
    if idle {
        *place = None;
    }
    idle
}

/// Whether nothing of a seat is worth keeping.
fn is_free(seat: &Arc<Seat>) -> bool {
    Arc::strong_count(seat) == 1 && seat.session.try_lock().is_ok_and(|place| place.is_none())
}

async fn sweep(pool: Weak<Pool>, pause: Duration) {
    loop {
        tokio::time::sleep(pause).await;
        let Some(pool) = pool.upgrade() else { return };
        if !pool.sweep() {
            // Under the lock that a new one is begun under, so that no connection is left without.
            let sweeper = pool.sweeper.lock().unwrap_or_else(PoisonError::into_inner);
            if pool.connections() == 0 {
                drop(sweeper);
                return;
            }
        }
    }
}
