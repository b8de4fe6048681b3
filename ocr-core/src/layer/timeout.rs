use std::time::Duration;

use super::{Around, Attempt, Call, check_prefix};
use crate::{Error, Result, error::seconds};

/// Gives up on calls that do not answer.
///
/// The limit is that of the longest matching operation prefix, plus what the request itself grants
/// ([`Call::granted`]): a command with a deadline of five minutes has five minutes and the limit of `guest.exec`.
///
/// | operations | limit by default |
/// |---|---|
/// | `state.` | 10 s |
/// | `guest.put_files`, `guest.get_file` | 300 s |
/// | `image.import_image`, `image.capture_vm`, `image.export_image` | 3600 s |
/// | all others | 60 s |
///
/// # Errors
/// `TimedOut`, which is ambiguous: the call may still have its effect, even later.
#[derive(Clone, Debug)]
pub struct TimeoutLayer {
    // A dozen entries at most: a walk beats a map.
    limits: Vec<(&'static str, Duration)>,
    others: Duration,
}

impl Default for TimeoutLayer {
    fn default() -> Self {
        const TRANSFER: Duration = Duration::from_secs(300);
        const WHOLE_DISK: Duration = Duration::from_secs(3600);
        Self::new(Duration::from_secs(60))
            .limit("state.", Duration::from_secs(10))
            .limit("guest.put_files", TRANSFER)
            .limit("guest.get_file", TRANSFER)
            .limit("image.import_image", WHOLE_DISK)
            .limit("image.capture_vm", WHOLE_DISK)
            .limit("image.export_image", WHOLE_DISK)
    }
}

impl TimeoutLayer {
    /// One limit for all operations.
    pub fn new(limit: Duration) -> Self {
        Self { limits: Vec::new(), others: limit }
    }

    /// Sets the limit of an operation (`compute.create_vm`) or of all whose name begins so (`compute.`).
    ///
    /// # Panics
    /// When no operation begins so.
    pub fn limit(mut self, prefix: &'static str, limit: Duration) -> Self {
        check_prefix(prefix);
        self.limits.retain(|(known, _)| *known != prefix);
        self.limits.push((prefix, limit));
        self
    }

    /// How long a call may take.
    pub fn limit_of(&self, call: &Call<'_>) -> Duration {
        let matching = self.limits.iter().filter(|(prefix, _)| call.operation.starts_with(prefix));
        let limit = matching.max_by_key(|(prefix, _)| prefix.len()).map_or(self.others, |(_, limit)| *limit);
        limit.saturating_add(call.granted.unwrap_or_default())
    }
}

impl Around for TimeoutLayer {
    async fn around<'a, T, F>(&'a self, call: &'a Call<'a>, attempt: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Attempt<'a, T> + Send + Sync + 'a,
    {
        let limit = self.limit_of(call);
        tokio::time::timeout(limit, attempt()).await.unwrap_or_else(|_| {
            Err(Error::timed_out(format!("no answer within the limit of {}", seconds(limit)))
                .during(call.operation)
                .on(call.resource.to_string()))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::{ErrorKind, Retry, VmId, layer::Resource};

    fn call(operation: &'static str) -> Call<'static> {
        Call::new(operation, Resource::Vm(VmId::from_uuid(uuid::Uuid::nil())))
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_hangs_is_given_up_and_named() {
        let layer = TimeoutLayer::new(Duration::from_millis(2500));
        let began = Instant::now();
        let error = layer.around(&call("compute.get_vm"), || Box::pin(pending::<Result<()>>())).await.unwrap_err();
        assert_eq!(began.elapsed(), Duration::from_millis(2500));
        assert_eq!((error.kind(), error.retry()), (ErrorKind::TimedOut, Retry::Ambiguous));
        assert_eq!(
            error.to_string(),
            "compute.get_vm (vm 00000000-0000-0000-0000-000000000000): no answer within the limit of 2.5 s"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_in_time_passes_through() {
        let layer = TimeoutLayer::new(Duration::from_secs(2));
        let call = call("compute.get_vm");
        let answer = layer.around(&call, || {
            Box::pin(async {
                sleep(Duration::from_secs(1)).await;
                Ok(7)
            })
        });
        assert_eq!(answer.await.unwrap(), 7);
        let error = layer.around(&call, || Box::pin(ready(Err::<(), _>(Error::not_found("gone"))))).await.unwrap_err();
        assert_eq!(error.to_string(), "gone");
    }

    #[test]
    fn the_longest_prefix_decides_and_the_latest_word_on_it() {
        let layer = TimeoutLayer::new(Duration::from_secs(1))
            .limit("compute.create_vm", Duration::from_secs(9))
            .limit("compute.", Duration::from_secs(2))
            .limit("compute.create_vm", Duration::from_secs(3));
        assert_eq!(layer.limit_of(&call("compute.create_vm")), Duration::from_secs(3));
        assert_eq!(layer.limit_of(&call("compute.get_vm")), Duration::from_secs(2));
        assert_eq!(layer.limit_of(&call("network.get_network")), Duration::from_secs(1));
    }

    #[test]
    fn what_the_request_grants_comes_on_top() {
        let layer = TimeoutLayer::new(Duration::from_secs(10));
        let exec = Call { granted: Some(Duration::from_secs(300)), ..call("guest.exec") };
        assert_eq!(layer.limit_of(&exec), Duration::from_secs(310));
        let endless = Call { granted: Some(Duration::MAX), ..exec };
        assert_eq!(layer.limit_of(&endless), Duration::MAX);
    }
}
