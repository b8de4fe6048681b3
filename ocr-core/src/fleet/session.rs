//! A member's session: a lease in the store, renewed in one write whatever the member owns.
//!
//! ```text
//!   write begins      renewed       stops here    the store lets it run out
//!   |-----------------|-------------|-------------|
//!   0                 ttl/3         ttl - margin  ttl, or later: counted from when the write arrived
//! ```
//!
//! The member counts from the moment before the write, by its own monotonic clock, and the store from the write's arrival:
//! so the member stops first. A session that has stopped is over for good: the next one is another member's.

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::{Error, ErrorKind, Key, MemberId, Precondition, Result, StateStore, StateStoreExt, Version, error::reason};

/// The times of a session, all parts of its time to live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Times {
    pub(super) ttl: Duration,
}

impl Times {
    /// From one renewal to the next.
    pub(super) fn renewal(self) -> Duration {
        self.ttl / 3
    }

    /// The pause after trouble with the store.
    pub(super) fn pause(self) -> Duration {
        self.ttl / 30
    }

    /// The longest wait for one answer of the store.
    pub(super) fn answer(self) -> Duration {
        self.ttl / 3
    }

    /// When work under a lease stops whose last write began at `began`.
    fn stops(self, began: Instant) -> Instant {
        began + self.ttl - self.ttl / 6
    }
}

/// A lease that stands.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) member: MemberId,
    key: Key,
    version: Version,
    began: Instant,
    times: Times,
}

/// The form of [`StateStoreExt::acquire_lease`]'s records.
#[derive(Debug, Serialize, Deserialize)]
struct LeaseRecord {
    holder: String,
}

/// How a renewal went.
#[derive(Debug)]
pub(super) enum Renewal {
    Done,
    /// The lease ran out or was taken away.
    Lost,
    /// Nobody knows; there may be time for another try.
    Failed(Error),
}

pub(super) const MEMBERS: &str = "lease/member_";

/// Where a member's lease is.
pub(super) fn lease_key(member: MemberId) -> Result<Key> {
    Key::new(format!("{MEMBERS}{member}"))
}

/// The member whose lease this is.
pub(super) fn member_of(key: &Key) -> Option<MemberId> {
    key.as_str().strip_prefix(MEMBERS)?.parse().ok()
}

impl Session {
    /// Writes the lease of a new member.
    ///
    /// # Errors
    /// Those of the store.
    pub(super) async fn begin(store: &Arc<dyn StateStore>, member: MemberId, times: Times) -> Result<Self> {
        let key = lease_key(member)?;
        let began = Instant::now();
        let record = value(member)?;
        let put = store.put(&key, record, Precondition::Absent, Some(times.ttl));
        let version = match timeout_at(times.stops(began), put).await {
            Ok(written) => written?,
            Err(_) => return Err(silent(times)),
        };
        Ok(Self { member, key, version, began, times })
    }

    /// When work under it stops.
    pub(super) fn stops(&self) -> Instant {
        self.times.stops(self.began)
    }

    /// Sleeps until it is time to renew.
    pub(super) async fn until_renewal(&self) {
        sleep_until(self.began + self.times.renewal()).await;
    }

    /// Writes the lease again. An earlier renewal whose answer was lost may have changed the version: the name in the
    /// record is nobody else's, so it tells.
    pub(super) async fn renew(&mut self, store: &Arc<dyn StateStore>) -> Renewal {
        let ends = self.stops().min(Instant::now() + self.times.answer());
        let renewed = async {
            for _ in 0..2 {
                let began = Instant::now();
                let only = Precondition::Version(self.version);
                match store.put(&self.key, value(self.member)?, only, Some(self.times.ttl)).await {
                    Ok(version) => {
                        (self.version, self.began) = (version, began);
                        return Ok(true);
                    }
                    Err(error) if error.reason() == Some(reason::VERSION_MISMATCH) => {
                        match store.get_json::<LeaseRecord>(&self.key).await? {
                            Some((record, version)) if record.holder == self.member.to_string() => {
                                self.version = version;
                            }
                            _ => return Ok(false),
                        }
                    }
                    Err(error) => return Err(error),
                }
            }
            Err(Error::unavailable("the lease changes under its owner's hands"))
        };
        match timeout_at(ends, renewed).await {
            Ok(Ok(true)) => Renewal::Done,
            Ok(Ok(false)) => Renewal::Lost,
            Ok(Err(error)) => Renewal::Failed(error),
            Err(_) => Renewal::Failed(silent(self.times)),
        }
    }
}

/// Gives a lease back, when nothing runs under it any more.
pub(super) async fn end(store: &Arc<dyn StateStore>, member: MemberId, times: Times) -> Result<()> {
    match tokio::time::timeout(times.answer(), store.delete(&lease_key(member)?, Precondition::Any)).await {
        Ok(deleted) => deleted.map(drop),
        Err(_) => Err(silent(times)),
    }
}

/// Whether a member's session stands.
///
/// # Errors
/// Those of the store: then nobody knows.
pub(super) async fn is_living(store: &Arc<dyn StateStore>, member: MemberId) -> Result<bool> {
    Ok(store.get(&lease_key(member)?).await?.is_some())
}

fn value(member: MemberId) -> Result<bytes::Bytes> {
    serde_json::to_vec(&LeaseRecord { holder: member.to_string() })
        .map(Into::into)
        .map_err(|error| Error::internal("a lease cannot be written as JSON").with_source(error))
}

fn silent(times: Times) -> Error {
    Error::new(ErrorKind::TimedOut, format!("the store did not answer in {}", crate::error::seconds(times.answer())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Fault, MemoryState};

    const TIMES: Times = Times { ttl: Duration::from_secs(30) };

    async fn begun() -> (MemoryState, Arc<dyn StateStore>, Session) {
        let memory = MemoryState::new();
        let store: Arc<dyn StateStore> = Arc::new(memory.clone());
        let session = Session::begin(&store, MemberId::random(), TIMES).await.unwrap();
        (memory, store, session)
    }

    #[tokio::test(start_paused = true)]
    async fn a_member_stops_before_the_store_lets_its_lease_run_out() {
        let (_, store, session) = begun().await;
        sleep_until(session.stops()).await;
        assert!(is_living(&store, session.member).await.unwrap());
        tokio::time::sleep(TIMES.ttl / 5).await;
        assert!(!is_living(&store, session.member).await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_write_is_counted_from_its_beginning() {
        let (memory, store, mut session) = begun().await;
        session.until_renewal().await;
        let began = Instant::now();
        memory.faults().inject("state.put", 1, Fault::Delay(Duration::from_secs(5)));
        assert!(matches!(session.renew(&store).await, Renewal::Done));
        assert_eq!((began.elapsed(), session.stops()), (Duration::from_secs(5), TIMES.stops(began)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewal_whose_answer_is_lost_does_not_cost_the_session() {
        let (memory, store, mut session) = begun().await;
        for fault in [Fault::After(Error::unavailable("cut")), Fault::HangAfter, Fault::Hang] {
            session.until_renewal().await;
            memory.faults().inject("state.put", 1, fault);
            assert!(matches!(session.renew(&store).await, Renewal::Failed(_)));
            assert!(matches!(session.renew(&store).await, Renewal::Done));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_ran_out_is_never_revived() {
        let (_, store, mut session) = begun().await;
        tokio::time::sleep(TIMES.ttl).await;
        assert!(matches!(session.renew(&store).await, Renewal::Lost));
        assert!(!is_living(&store, session.member).await.unwrap());
    }
}
