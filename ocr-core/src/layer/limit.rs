use std::{sync::Arc, time::Duration};

use tokio::{sync::Semaphore, time::timeout};

use super::{Around, Attempt, Call};
use crate::{
    Error, ErrorKind, Result, Retry,
    error::{reason, seconds},
};

/// Lets so many calls run at once; the others wait for their turn, in order of arrival, for a limited time.
///
/// Clones share the places: one clone around each trait of a backend limits the backend as a whole.
#[derive(Clone, Debug)]
pub struct LimitLayer {
    places: Arc<Semaphore>,
    max_in_flight: usize,
    max_wait: Duration,
}

impl LimitLayer {
    /// At most `max_in_flight` calls at once (at least 1), each waiting for its turn for at most `max_wait`.
    pub fn new(max_in_flight: usize, max_wait: Duration) -> Self {
        let max_in_flight = max_in_flight.clamp(1, Semaphore::MAX_PERMITS);
        Self { places: Arc::new(Semaphore::new(max_in_flight)), max_in_flight, max_wait }
    }
}

impl Around for LimitLayer {
    /// # Errors
    /// `Exhausted`, reason `QUEUE_FULL`, when no place came free in time; the call was not made.
    async fn around<'a, T, F>(&'a self, call: &'a Call<'a>, attempt: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Attempt<'a, T> + Send + Sync + 'a,
    {
        // The semaphore is never closed: the only fault is the wait.
        let Ok(Ok(_place)) = timeout(self.max_wait, self.places.acquire()).await else {
            return Err(Error::new(
                ErrorKind::Exhausted,
                format!("{} calls run already, and none ended in {}", self.max_in_flight, seconds(self.max_wait)),
            )
            .with_retry(Retry::Safe)
            .with_reason(reason::QUEUE_FULL)
            .during(call.operation)
            .on(call.resource.to_string()));
        };
        attempt().await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use tokio::{task::JoinSet, time::sleep};

    use super::*;
    use crate::layer::Resource;

    const CALL: Call<'static> =
        Call { operation: "compute.list_vms", resource: Resource::Matching("vms"), repeatable: true, granted: None };

    #[tokio::test(start_paused = true)]
    async fn no_more_calls_run_at_once_than_allowed_and_clones_share_the_places() {
        let limit = LimitLayer::new(3, Duration::from_secs(60));
        let now = Arc::new(AtomicUsize::new(0));
        let most = Arc::new(AtomicUsize::new(0));
        let mut calls = JoinSet::new();
        for _ in 0..20 {
            let (limit, now, most) = (limit.clone(), now.clone(), most.clone());
            calls.spawn(async move {
                limit
                    .around(&CALL, || {
                        let (now, most) = (&now, &most);
                        Box::pin(async move {
                            most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
                            sleep(Duration::from_secs(1)).await;
                            now.fetch_sub(1, SeqCst);
                            Ok(())
                        })
                    })
                    .await
            });
        }
        for result in calls.join_all().await {
            result.unwrap();
        }
        assert_eq!(most.load(SeqCst), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_waited_too_long_is_refused_and_was_not_made() {
        let limit = LimitLayer::new(1, Duration::from_secs(5));
        let made = AtomicUsize::new(0);
        let call = || {
            limit.around(&CALL, || {
                Box::pin(async {
                    made.fetch_add(1, SeqCst);
                    sleep(Duration::from_secs(10)).await;
                    Ok(())
                })
            })
        };
        let (first, second) = tokio::join!(call(), call());
        first.unwrap();
        let error = second.unwrap_err();
        assert_eq!((error.kind(), error.retry()), (ErrorKind::Exhausted, Retry::Safe));
        assert_eq!(error.reason(), Some(reason::QUEUE_FULL));
        assert_eq!(made.load(SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_is_dropped_gives_its_place_back() {
        let limit = LimitLayer::new(1, Duration::from_secs(5));
        let hung = limit.around(&CALL, || Box::pin(std::future::pending::<Result<()>>()));
        assert!(timeout(Duration::from_secs(1), hung).await.is_err());
        limit.around(&CALL, || Box::pin(async { Ok(()) })).await.unwrap();
    }
}
