//! [`status`]: the one way from an [`Error`] to a gRPC status.

use std::{
    error::Error as StdError,
    fmt::{self, Write as _},
    time::Duration,
};

use ocr_core::{Error, ErrorKind, Retry};
use tonic::{Code, Response, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

use crate::CallId;

/// The domain in every `google.rpc.ErrorInfo`: who defines its reasons.
pub const DOMAIN: &str = "ocr";

/// The pause that `google.rpc.RetryInfo` asks for.
pub const RETRY_DELAY: Duration = Duration::from_secs(1);

/// How much of a message is sent, counted as it is on the wire, in bytes. Text and details together stay below the
/// 8 KiB of headers that the strictest clients take.
const MAX_MESSAGE_COST_BYTES: usize = 5 << 10;

/// The gRPC code of each kind.
pub fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::Invalid => Code::InvalidArgument,
        // Retrying does not help either; PERMISSION_DENIED is for the caller's own rights, of which there are none yet.
        ErrorKind::Conflict | ErrorKind::Denied => Code::FailedPrecondition,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        ErrorKind::Unsupported => Code::Unimplemented,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::TimedOut => Code::DeadlineExceeded,
        // Kinds to come are ours to map before anybody can see them.
        _ => Code::Internal,
    }
}

/// What the client is told of a failed call.
///
/// The status has the error's text and, as details, `google.rpc.ErrorInfo` (reason, [`DOMAIN`], kind, retry hint and
/// the call's id), `google.rpc.BadRequest` naming the field of an `Invalid`, and `google.rpc.RetryInfo` where the call
/// may simply be made again. The causes go to the log, once, here; they never cross the wire. Of an internal fault the
/// client is told the call's id and nothing else.
pub fn status(error: &Error, call: &CallId) -> Status {
    log(error, call);
    let kind = error.kind();
    let code = code(kind);
    let message = match code {
        Code::Internal => format!("an internal fault; the server's log has it under request id {call}"),
        _ => cut(&error.to_string()),
    };
    let reason = error.reason().map_or_else(|| kind.as_str().to_ascii_uppercase(), str::to_owned);
    let mut info = vec![("kind", kind.as_str()), ("retry", retry(error.retry())), ("request_id", call.as_str())];
    if let (Some(operation), false) = (error.operation(), code == Code::Internal) {
        info.push(("operation", operation));
    }
    let info = info.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned()));
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, info.collect::<std::collections::HashMap<_, _>>());
    if kind == ErrorKind::Invalid {
        // `Error::invalid` puts the field first; without one the violation is of the request as a whole.
        let (field, wanted) = match error.message().split_once(": ") {
            Some((field, wanted)) if !field.contains(char::is_whitespace) => (field, wanted),
            _ => ("", error.message()),
        };
        details.set_bad_request(vec![FieldViolation::new(field, cut_to(wanted, MAX_MESSAGE_COST_BYTES / 5))]);
    }
    if error.retry() == Retry::Safe {
        details.set_retry_info(Some(RETRY_DELAY));
    }
    Status::with_error_details(code, message, details)
}

/// A call's reply.
pub(crate) fn answer<T>(call: &CallId, result: ocr_core::Result<T>) -> Result<Response<T>, Status> {
    result.map(Response::new).map_err(|error| status(&error, call))
}

fn retry(retry: Retry) -> &'static str {
    match retry {
        Retry::Never => "never",
        Retry::Safe => "safe",
        Retry::Ambiguous => "ambiguous",
    }
}

/// One line per failed call. Faults of ours are errors, faults of the world warnings, faults of the caller neither.
fn log(error: &Error, call: &CallId) {
    let kind = error.kind().as_str();
    let reason = error.reason();
    let causes = Causes(error);
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::AlreadyExists | ErrorKind::Invalid | ErrorKind::Unsupported => {
            tracing::info!(request_id = %call, kind, reason, %causes, "call refused: {error}");
        }
        ErrorKind::Conflict
        | ErrorKind::Exhausted
        | ErrorKind::Denied
        | ErrorKind::Unavailable
        | ErrorKind::TimedOut => {
            tracing::warn!(request_id = %call, kind, reason, %causes, "call failed: {error}");
        }
        _ => tracing::error!(request_id = %call, kind, reason, %causes, "call failed by a fault of ours: {error}"),
    }
}

/// The chain of sources, outermost first.
struct Causes<'a>(&'a Error);

impl fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// A chain that is longer is a ring.
        const MAX_CAUSES: usize = 16;
        let chain = std::iter::successors(self.0.source(), |&cause| cause.source());
        for (i, cause) in chain.take(MAX_CAUSES).enumerate() {
            if i > 0 {
                f.write_str(": ")?;
            }
            write!(f, "{cause}")?;
        }
        Ok(())
    }
}

/// What a character costs on the wire: percent-encoded in `grpc-message`, and in base64 once more in the details.
fn cost_bytes(c: char) -> usize {
    let encoded = if c.is_ascii_graphic() && c != '%' || c == ' ' { 1 } else { 3 * c.len_utf8() };
    encoded + (4 * c.len_utf8()).div_ceil(3)
}

fn cut(message: &str) -> String {
    cut_to(message, MAX_MESSAGE_COST_BYTES)
}

fn cut_to(message: &str, max_cost_bytes: usize) -> String {
    let mut spent = 0;
    for (at, c) in message.char_indices() {
        spent += cost_bytes(c);
        if spent > max_cost_bytes {
            let mut text = message[..at].to_owned();
            let _ = write!(text, "... (cut, {} bytes in all)", message.len());
            return text;
        }
    }
    message.to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn call() -> CallId {
        "call-1".parse().unwrap()
    }

    #[test]
    fn every_kind_has_its_code() {
        let codes = ErrorKind::ALL.map(code);
        assert_eq!(
            codes,
            [
                Code::NotFound,
                Code::AlreadyExists,
                Code::InvalidArgument,
                Code::FailedPrecondition,
                Code::ResourceExhausted,
                Code::Unimplemented,
                Code::FailedPrecondition,
                Code::Unavailable,
                Code::DeadlineExceeded,
                Code::Internal,
            ]
        );
    }

    #[test]
    fn a_cause_never_crosses_the_wire() {
        for kind in ErrorKind::ALL {
            let error = Error::new(kind, "it failed").with_source(std::io::Error::other("hidden-cause"));
            let status = status(&error, &call());
            let wire = format!("{status:?} {:?}", String::from_utf8_lossy(status.details()));
            assert!(!wire.contains("hidden-cause"), "{kind}: {wire}");
            assert_eq!(status.message().contains("it failed"), kind != ErrorKind::Internal, "{kind}");
        }
    }

    #[test]
    fn of_an_internal_fault_the_client_gets_the_id_that_the_log_has() {
        let status = status(&Error::internal("the record at key x is broken").during("state.get"), &call());
        assert_eq!(status.message(), "an internal fault; the server's log has it under request id call-1");
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!(info.metadata["request_id"], "call-1");
        assert_eq!(info.reason, "INTERNAL");
        assert!(!info.metadata.contains_key("operation"));
    }

    #[test]
    fn an_invalid_request_has_its_field_in_the_details() {
        let status = status(&Error::invalid("virtualMachine.configuration.cpu", "wants at least 1, got 0"), &call());
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "virtualMachine.configuration.cpu: wants at least 1, got 0");
        let details = status.get_error_details();
        let [violation] = &details.bad_request().unwrap().field_violations[..] else { panic!("{details:?}") };
        assert_eq!(violation.field, "virtualMachine.configuration.cpu");
        assert_eq!(violation.description, "wants at least 1, got 0");
        assert!(details.retry_info().is_none());
    }

    #[test]
    fn only_a_safe_retry_is_announced() {
        for (error, announced) in [
            (Error::unavailable("the agent does not answer").with_reason("AGENT_NOT_READY"), true),
            (Error::new(ErrorKind::Exhausted, "the queue is full").with_retry(Retry::Safe), true),
            (Error::timed_out("no answer in 5 s"), false),
            (Error::not_found("no such machine"), false),
        ] {
            let details = status(&error, &call()).get_error_details();
            assert_eq!(details.retry_info().map(|info| info.retry_delay), announced.then_some(Some(RETRY_DELAY)));
        }
        let details = status(&Error::unavailable("no").with_reason("AGENT_NOT_READY").during("guest.exec"), &call())
            .get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("AGENT_NOT_READY", DOMAIN));
        assert_eq!(info.metadata["operation"], "guest.exec");
        assert_eq!(info.metadata["retry"], "safe");
    }

    proptest! {
        #[test]
        fn a_status_fits_in_any_clients_headers(text in "\\PC{0,3000}", field in "[a-z.]{1,20}", raw in any::<String>()) {
            for error in [Error::invalid(&field, &text), Error::new(ErrorKind::Conflict, format!("{text}\n{raw}"))] {
                let reply = status(&error, &call()).into_http::<()>();
                let size: usize = reply.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
                prop_assert!(size < 8 << 10, "{size}");
            }
        }
    }
}
