use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Around, Attempt, Call};
use crate::{Error, ErrorKind, Result, Retry, error::seconds};

/// Makes failed calls again, where that is safe.
///
/// What the error says decides ([`Error::retry`]):
/// - [`Retry::Never`] ends it;
/// - [`Retry::Safe`] is repeated: the call had no effect;
/// - [`Retry::Ambiguous`] is repeated only when the call is repeatable ([`Call::repeatable`]). That is all of them but a
///   reboot, and writes and deletions in a [`StateStore`](crate::StateStore) with a precondition. A deletion whose first
///   answer was lost comes back as `AlreadyGone`.
///
/// Pauses double from `first_pause` to `max_pause`; each is shortened by a random part of up to a half, so that many
/// callers that failed together do not come back together. A command whose own deadline has passed is not repeated.
///
/// # Errors
/// The last attempt's, with the number of attempts in its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryLayer {
    /// How often a call is made at most, the first time included; 0 counts as 1.
    pub max_attempts: u32,
    /// The pause before the second attempt.
    pub first_pause: Duration,
    /// The longest pause.
    pub max_pause: Duration,
    /// No attempt begins later than this after the first one did, plus what the request grants ([`Call::granted`]).
    pub budget: Duration,
}

impl Default for RetryLayer {
    /// Five attempts, pauses from 0.1 to 5 s, within 90 s: a call that hung until the usual limit of
    /// [`TimeoutLayer`](super::TimeoutLayer) is made once more.
    fn default() -> Self {
        Self {
            max_attempts: 5,
            first_pause: Duration::from_millis(100),
            max_pause: Duration::from_secs(5),
            budget: Duration::from_secs(90),
        }
    }
}

impl RetryLayer {
    /// The pause after so many attempts, for a random number from 0 to 1.
    fn pause(&self, attempts: u32, random: f64) -> Duration {
        let doubled = self.first_pause.saturating_mul(2u32.saturating_pow(attempts - 1)).min(self.max_pause);
        doubled.mul_f64(1.0 - random / 2.0)
    }

    fn may_repeat(call: &Call<'_>, error: &Error, elapsed: Duration) -> bool {
        // The command had all the time it asked for: its end is known, and asking again gives the same answer.
        let had_its_time =
            error.kind() == ErrorKind::TimedOut && call.granted.is_some_and(|granted| elapsed >= granted);
        match error.retry() {
            Retry::Never => false,
            Retry::Safe => !had_its_time,
            Retry::Ambiguous => call.repeatable && !had_its_time,
        }
    }
}

impl Around for RetryLayer {
    async fn around<'a, T, F>(&'a self, call: &'a Call<'a>, attempt: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Attempt<'a, T> + Send + Sync + 'a,
    {
        let began = Instant::now();
        let budget = self.budget.saturating_add(call.granted.unwrap_or_default());
        let mut attempts = 0u32;
        loop {
            let error = match attempt().await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            attempts += 1;
            let pause = self.pause(attempts, random());
            let elapsed = began.elapsed();
            if attempts >= self.max_attempts
                || elapsed.saturating_add(pause) > budget
                || !Self::may_repeat(call, &error, elapsed)
            {
                return Err(if attempts > 1 {
                    error.with_note(format_args!("{attempts} attempts in {}", seconds(elapsed)))
                } else {
                    error
                });
            }
            tracing::debug!(
                operation = call.operation,
                resource = %call.resource,
                attempts,
                pause_ms = pause.as_millis() as u64,
                %error,
                "the call failed and will be repeated"
            );
            sleep(pause).await;
        }
    }
}

/// From 0 to 1. Good enough to spread callers, from a source that is at hand.
fn random() -> f64 {
    let bits = uuid::Uuid::new_v4().as_u128() as u32;
    f64::from(bits) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    use proptest::prelude::*;

    use super::*;
    use crate::layer::Resource;

    const CALL: Call<'static> =
        Call { operation: "compute.list_vms", resource: Resource::Matching("vms"), repeatable: true, granted: None };

    /// Makes a call that fails with the errors given and then succeeds; returns the result and the attempts made.
    async fn run(layer: &RetryLayer, call: Call<'_>, failures: u32, error: fn() -> Error) -> (Result<()>, u32) {
        let made = AtomicU32::new(0);
        let result = layer
            .around(&call, || {
                Box::pin(async { if made.fetch_add(1, SeqCst) < failures { Err(error()) } else { Ok(()) } })
            })
            .await;
        (result, made.into_inner())
    }

    fn safe() -> Error {
        Error::unavailable("not now")
    }

    fn ambiguous() -> Error {
        Error::timed_out("who knows")
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_without_effect_is_repeated_until_it_succeeds() {
        let began = Instant::now();
        let (result, made) = run(&RetryLayer::default(), Call { repeatable: false, ..CALL }, 3, safe).await;
        result.unwrap();
        assert_eq!(made, 4);
        // 100 + 200 + 400 ms, each shortened by at most a half.
        let (least, most) = (Duration::from_millis(350), Duration::from_millis(705));
        assert!((least..most).contains(&began.elapsed()), "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_final_error_is_not_repeated_and_stays_as_it_is() {
        for kind in ErrorKind::ALL {
            let made = AtomicU32::new(0);
            let result = RetryLayer::default()
                .around(&CALL, || {
                    made.fetch_add(1, SeqCst);
                    Box::pin(async move { Err::<(), _>(Error::new(kind, "no").with_retry(Retry::Never)) })
                })
                .await;
            assert_eq!(result.unwrap_err().to_string(), "no");
            assert_eq!(made.into_inner(), 1, "{kind}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_unknown_outcome_is_repeated_only_when_the_call_is_repeatable() {
        let layer = RetryLayer::default();
        let (result, made) = run(&layer, CALL, 1, ambiguous).await;
        result.unwrap();
        assert_eq!(made, 2);
        let (result, made) = run(&layer, Call { repeatable: false, ..CALL }, 1, ambiguous).await;
        assert_eq!(result.unwrap_err().retry(), Retry::Ambiguous);
        assert_eq!(made, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_error_says_how_often_it_was_tried() {
        let layer = RetryLayer { first_pause: Duration::ZERO, max_attempts: 3, ..RetryLayer::default() };
        let (result, made) = run(&layer, CALL, u32::MAX, safe).await;
        assert_eq!(made, 3);
        let error = result.unwrap_err();
        assert_eq!((error.kind(), error.retry()), (ErrorKind::Unavailable, Retry::Safe));
        assert_eq!(error.to_string(), "not now (3 attempts in 0 s)");
    }

    #[tokio::test(start_paused = true)]
    async fn no_attempt_begins_after_the_budget() {
        let layer = RetryLayer { max_attempts: u32::MAX, budget: Duration::from_secs(20), ..RetryLayer::default() };
        let began = Instant::now();
        let (result, made) = run(&layer, CALL, u32::MAX, safe).await;
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Unavailable);
        assert!(began.elapsed() <= Duration::from_secs(20), "{:?}", began.elapsed());
        assert!(made >= 6, "{made}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_request_grants_is_added_to_the_budget() {
        // The answer of a command that ran for 100 s is lost: it is asked for again.
        let call = Call { granted: Some(Duration::from_secs(300)), ..CALL };
        let made = AtomicU32::new(0);
        let layer = RetryLayer::default();
        let result = layer.around(&call, || {
            let first = made.fetch_add(1, SeqCst) == 0;
            Box::pin(async move {
                if first {
                    sleep(Duration::from_secs(100)).await;
                    return Err(Error::unavailable("connection lost").with_retry(Retry::Ambiguous));
                }
                Ok(())
            })
        });
        result.await.unwrap();
        assert_eq!(made.into_inner(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_command_past_its_own_deadline_is_not_asked_for_again() {
        let call = Call { granted: Some(Duration::from_secs(3)), ..CALL };
        let made = AtomicU32::new(0);
        let layer = RetryLayer::default();
        let result = layer.around(&call, || {
            made.fetch_add(1, SeqCst);
            Box::pin(async {
                sleep(Duration::from_secs(3)).await;
                Err::<(), _>(Error::timed_out("the command did not end in 3 s"))
            })
        });
        assert_eq!(result.await.unwrap_err().kind(), ErrorKind::TimedOut);
        assert_eq!(made.into_inner(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn no_attempt_counts_as_one() {
        for max_attempts in [0, 1] {
            let layer = RetryLayer { max_attempts, ..RetryLayer::default() };
            let (result, made) = run(&layer, CALL, u32::MAX, safe).await;
            assert_eq!((result.unwrap_err().to_string().as_str(), made), ("not now", 1));
        }
    }

    proptest! {
        #[test]
        fn a_pause_is_between_a_half_and_the_whole_of_the_doubled_one(
            first_ms in 0u64..100_000, max_ms in 0u64..1_000_000, attempts in 1u32..=u32::MAX, random in 0.0f64..=1.0,
        ) {
            let layer = RetryLayer {
                first_pause: Duration::from_millis(first_ms),
                max_pause: Duration::from_millis(max_ms),
                ..RetryLayer::default()
            };
            let whole_ms = (u128::from(first_ms) << (attempts - 1).min(40)).min(u128::from(max_ms));
            let whole = Duration::from_millis(whole_ms as u64);
            let pause = layer.pause(attempts, random);
            prop_assert!(pause <= whole, "{pause:?} > {whole:?}");
            prop_assert!(pause + Duration::from_nanos(1) >= whole / 2, "{pause:?} < {whole:?} / 2");
        }

        #[test]
        fn a_random_number_is_from_0_to_1(_ in 0..100) {
            prop_assert!((0.0..=1.0).contains(&random()));
        }
    }
}
