use std::{error::Error as _, iter::successors};

use tokio::time::Instant;
use tracing::{Instrument, Span, field::Empty};

use super::{Around, Attempt, Call};
use crate::{Error, Result};

/// A `tracing` span for each call, and one event for each call that failed.
///
/// The span `call` is of level debug, target `ocr_core::call`, with the fields `operation`, `resource`, `outcome` (`ok`,
/// the error's kind, or `dropped` when the caller did not wait for the end) and `elapsed_ms`. The event is of level debug
/// too, with `kind`, `retry`, `reason`, the `error` and its `causes`: whoever answers for the call decides
/// whether it deserves more noise. Requests and answers are never recorded.
#[derive(Clone, Copy, Debug, Default)]
pub struct TraceLayer;

const TARGET: &str = "ocr_core::call";

impl Around for TraceLayer {
    async fn around<'a, T, F>(&'a self, call: &'a Call<'a>, attempt: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Attempt<'a, T> + Send + Sync + 'a,
    {
        let span = tracing::debug_span!(
            target: TARGET,
            "call",
            operation = call.operation,
            resource = %call.resource,
            outcome = Empty,
            elapsed_ms = Empty,
        );
        let mut end = End { span: span.clone(), began: Instant::now(), outcome: "dropped" };
        let result = attempt().instrument(span.clone()).await;
        match &result {
            Ok(_) => end.outcome = "ok",
            Err(error) => {
                end.outcome = error.kind().as_str();
                tracing::debug!(
                    target: TARGET,
                    parent: &span,
                    kind = error.kind().as_str(),
                    retry = ?error.retry(),
                    reason = error.reason(),
                    %error,
                    causes = causes(error),
                    "the call failed"
                );
            }
        }
        result
    }
}

/// What is behind an error, outermost first. By hand, because not every subscriber follows the sources of an error.
fn causes(error: &Error) -> Option<String> {
    let causes: Vec<_> = successors(error.source(), |&cause| cause.source()).map(ToString::to_string).collect();
    (!causes.is_empty()).then(|| causes.join(": "))
}

/// Writes the outcome down when the call ends, also when it ends by being dropped.
struct End {
    span: Span,
    began: Instant,
    outcome: &'static str,
}

impl Drop for End {
    fn drop(&mut self) {
        self.span.record("outcome", self.outcome);
        self.span.record("elapsed_ms", self.began.elapsed().as_millis() as u64);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::pending,
        io,
        sync::{Arc, Mutex},
        time::Duration,
    };

    use serde_json::Value;
    use tokio::time::{sleep, timeout};
    use tracing_subscriber::fmt::format::FmtSpan;

    use super::*;
    use crate::{VmId, error::reason, layer::Resource};

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Log {
        /// Starts to record what this thread logs, spans when they close.
        fn start(&self) -> tracing::subscriber::DefaultGuard {
            crate::test_log::listen();
            let log = self.clone();
            let subscriber = tracing_subscriber::fmt()
                .json()
                .with_max_level(tracing::Level::TRACE)
                .with_span_events(FmtSpan::CLOSE)
                .with_writer(move || log.clone())
                .finish();
            tracing::subscriber::set_default(subscriber)
        }

        fn lines(&self) -> Vec<Value> {
            let bytes = self.0.lock().unwrap();
            serde_json::Deserializer::from_slice(&bytes).into_iter().map(|line| line.unwrap()).collect()
        }
    }

    fn call() -> Call<'static> {
        Call::new("guest.exec", Resource::Vm(VmId::from_uuid(uuid::Uuid::nil())))
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_is_a_span_with_its_outcome_and_time() {
        let log = Log::default();
        let _guard = log.start();
        let answer = TraceLayer
            .around(&call(), || {
                Box::pin(async {
                    sleep(Duration::from_millis(250)).await;
                    Ok("contents")
                })
            })
            .await;
        answer.unwrap();
        let lines = log.lines();
        assert_eq!(lines.len(), 1, "{lines:?}");
        let span = &lines[0]["span"];
        assert_eq!(span["operation"], "guest.exec");
        assert_eq!(span["resource"], "vm 00000000-0000-0000-0000-000000000000");
        assert_eq!(span["outcome"], "ok");
        assert_eq!(span["elapsed_ms"], 250);
        assert!(!lines[0].to_string().contains("contents"));
    }

    #[tokio::test]
    async fn a_failure_is_logged_once_with_its_cause() {
        let log = Log::default();
        let _guard = log.start();
        let error = TraceLayer
            .around(&call(), || {
                Box::pin(async {
                    Err::<(), _>(
                        Error::unavailable("the agent does not answer")
                            .with_reason(reason::AGENT_NOT_READY)
                            .with_source(io::Error::other("channel closed")),
                    )
                })
            })
            .await
            .unwrap_err();
        assert_eq!(error.message(), "the agent does not answer");
        let lines = log.lines();
        let [event, closed] = &lines[..] else { panic!("{lines:?}") };
        let fields = &event["fields"];
        assert_eq!(event["level"], "DEBUG");
        assert_eq!(fields["kind"], "unavailable");
        assert_eq!(fields["retry"], "Safe");
        assert_eq!(fields["reason"], reason::AGENT_NOT_READY);
        assert_eq!(fields["error"], "the agent does not answer");
        assert_eq!(fields["causes"], "channel closed");
        assert_eq!(event["span"]["operation"], "guest.exec");
        assert_eq!(closed["span"]["outcome"], "unavailable");
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_nobody_waited_for_is_seen_as_dropped() {
        let log = Log::default();
        let _guard = log.start();
        let call = call();
        let hung = TraceLayer.around(&call, || Box::pin(pending::<Result<()>>()));
        assert!(timeout(Duration::from_secs(1), hung).await.is_err());
        let lines = log.lines();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert_eq!(lines[0]["span"]["outcome"], "dropped");
        assert_eq!(lines[0]["span"]["elapsed_ms"], 1000);
    }
}
