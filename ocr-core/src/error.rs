//! The one error type of the library.
//!
//! Programs look at [`Error::kind`] and, where kinds are too coarse, at [`Error::reason`]; layers
//! look at [`Error::retry`]; people read the text; the log follows [`std::error::Error::source`].
//! A cause is either in the message or in the source, never in both.

use std::{error::Error as StdError, fmt, sync::Arc};

/// What every fallible call of this library returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as far as a program has to tell cases apart.
///
/// `docs/ERRORS.md` maps each kind to its gRPC and HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The thing named does not exist (any more).
    NotFound,
    /// Another thing already has this name, or this request was used for something else.
    AlreadyExists,
    /// The request can never succeed as it stands; the message names the field and what is wanted.
    Invalid,
    /// The thing is in a state that forbids the call: changed by somebody else, stopped, busy.
    Conflict,
    /// A quota, a limit or a disk is used up.
    Exhausted,
    /// The backend, or this guest, cannot do this at all.
    Unsupported,
    /// The caller, or our credentials at the backend, may not do this.
    Denied,
    /// The backend cannot be reached or is not ready; it may be later.
    Unavailable,
    /// A deadline passed before the outcome was known.
    TimedOut,
    /// A fault of ours, or an answer that makes no sense.
    Internal,
}

impl ErrorKind {
    /// All kinds, for tables and tests.
    pub const ALL: [ErrorKind; 10] = [
        Self::NotFound,
        Self::AlreadyExists,
        Self::Invalid,
        Self::Conflict,
        Self::Exhausted,
        Self::Unsupported,
        Self::Denied,
        Self::Unavailable,
        Self::TimedOut,
        Self::Internal,
    ];

    /// The kind's stable name, in snake case, for logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::AlreadyExists => "already_exists",
            Self::Invalid => "invalid",
            Self::Conflict => "conflict",
            Self::Exhausted => "exhausted",
            Self::Unsupported => "unsupported",
            Self::Denied => "denied",
            Self::Unavailable => "unavailable",
            Self::TimedOut => "timed_out",
            Self::Internal => "internal",
        }
    }

    fn default_retry(self) -> Retry {
        match self {
            Self::Unavailable => Retry::Safe,
            Self::TimedOut => Retry::Ambiguous,
            _ => Retry::Never,
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether the same call may be made again, for layers that retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Retry {
    /// The same call will fail in the same way.
    Never,
    /// The call surely had no effect, and may succeed later.
    Safe,
    /// The call may have had its effect; only an idempotent call may be repeated.
    Ambiguous,
}

/// Stable reasons, finer than a kind, that some program tells apart.
pub mod reason {
    /// The machine has no guest agent channel at all: waiting is useless.
    pub const AGENT_ABSENT: &str = "AGENT_ABSENT";
    /// The agent does not answer now: the guest boots, reboots, or the agent hangs.
    pub const AGENT_NOT_READY: &str = "AGENT_NOT_READY";
    /// The agent answers, but its configuration forbids the command.
    pub const AGENT_COMMAND_DISABLED: &str = "AGENT_COMMAND_DISABLED";
    /// The machine itself is gone.
    pub const GUEST_GONE: &str = "GUEST_GONE";
    /// The machine exists but is not running.
    pub const GUEST_NOT_RUNNING: &str = "GUEST_NOT_RUNNING";
    /// The command ran in the guest and ended with an exit code other than 0.
    pub const COMMAND_FAILED: &str = "COMMAND_FAILED";
    /// A lease was lost or taken over by a holder with a newer token.
    pub const LEASE_LOST: &str = "LEASE_LOST";
    /// A guest has seen a newer fencing token than the request's.
    pub const FENCED: &str = "FENCED";
    /// A write expected another version than the one stored.
    pub const VERSION_MISMATCH: &str = "VERSION_MISMATCH";
    /// The package named is not in the registry, or no version matches.
    pub const PACKAGE_NOT_FOUND: &str = "PACKAGE_NOT_FOUND";
    /// A secret was sealed with a key that is not at hand, or there is no key to seal one with.
    pub const SEALED: &str = "SEALED";
    /// The queue is full; come back later.
    pub const QUEUE_FULL: &str = "QUEUE_FULL";
}

/// A failed operation.
///
/// ```
/// use ocr_core::{Error, ErrorKind, Retry};
///
/// let error = Error::new(ErrorKind::NotFound, "no image has this id")
///     .during("image.get")
///     .on("image 6f1c");
/// assert_eq!(error.to_string(), "image.get (image 6f1c): no image has this id");
/// assert_eq!(error.retry(), Retry::Never);
/// ```
///
/// Clones share their cause, so that one outcome can be told to many waiters.
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    retry: Retry,
    reason: Option<&'static str>,
    operation: Option<&'static str>,
    resource: Option<String>,
    message: String,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of this kind with a text for people. The text must not hold secrets.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            retry: kind.default_retry(),
            reason: None,
            operation: None,
            resource: None,
            message: message.into(),
            source: None,
        }))
    }

    /// [`ErrorKind::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    /// [`ErrorKind::Invalid`] for a field: `"{field}: {wanted}"`.
    pub fn invalid(field: &str, wanted: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Invalid, format!("{field}: {wanted}"))
    }

    /// [`ErrorKind::Internal`].
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// [`ErrorKind::Unavailable`].
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unavailable, message)
    }

    /// [`ErrorKind::TimedOut`].
    pub fn timed_out(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::TimedOut, message)
    }

    /// [`ErrorKind::Unsupported`].
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// Sets the retry hint when the kind's usual one is wrong.
    pub fn with_retry(mut self, retry: Retry) -> Self {
        self.0.retry = retry;
        self
    }

    /// Sets one of the stable [`reason`]s.
    pub fn with_reason(mut self, reason: &'static str) -> Self {
        self.0.reason = Some(reason);
        self
    }

    /// Names the operation, as `trait.method`. The innermost name stays.
    pub fn during(mut self, operation: &'static str) -> Self {
        self.0.operation.get_or_insert(operation);
        self
    }

    /// Names the thing the operation worked on. The innermost name stays.
    pub fn on(mut self, resource: impl Into<String>) -> Self {
        self.0.resource.get_or_insert_with(|| resource.into());
        self
    }

    /// Adds to the text for people, in brackets: what a layer did about the error.
    pub fn with_note(mut self, note: impl fmt::Display) -> Self {
        self.0.message = format!("{} ({note})", self.0.message);
        self
    }

    /// Keeps the cause for the log. It never crosses the wire.
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(Arc::from(source.into()));
        self
    }

    /// The kind, for programs.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether the call may be repeated, for layers.
    pub fn retry(&self) -> Retry {
        self.0.retry
    }

    /// One of the stable [`reason`]s, where the kind is too coarse.
    pub fn reason(&self) -> Option<&'static str> {
        self.0.reason
    }

    /// The operation that failed, as `trait.method`.
    pub fn operation(&self) -> Option<&'static str> {
        self.0.operation
    }

    /// The thing the operation worked on.
    pub fn resource(&self) -> Option<&str> {
        self.0.resource.as_deref()
    }

    /// The text for people, without operation and resource.
    pub fn message(&self) -> &str {
        &self.0.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.operation, &self.0.resource) {
            (Some(operation), Some(resource)) => write!(f, "{operation} ({resource}): ")?,
            (Some(operation), None) => write!(f, "{operation}: ")?,
            (None, Some(resource)) => write!(f, "{resource}: ")?,
            (None, None) => {}
        }
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("retry", &self.0.retry)
            .field("reason", &self.0.reason)
            .field("operation", &self.0.operation)
            .field("resource", &self.0.resource)
            .field("message", &self.0.message)
            .field("source", &self.0.source)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|s| s as _)
    }
}

/// `None` for `NotFound`, for look-ups where absence is an answer.
pub(crate) fn none_if_not_found<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A duration as messages give it: `0.25 s`, `300 s`.
pub fn seconds(duration: std::time::Duration) -> String {
    format!("{} s", (duration.as_secs_f64() * 1000.0).round() / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_context_stays() {
        let error = Error::not_found("gone").during("a.b").on("x").during("c.d").on("y");
        assert_eq!(error.to_string(), "a.b (x): gone");
    }

    #[test]
    fn only_unavailable_is_safe_to_repeat_by_default() {
        for kind in ErrorKind::ALL {
            let want = match kind {
                ErrorKind::Unavailable => Retry::Safe,
                ErrorKind::TimedOut => Retry::Ambiguous,
                _ => Retry::Never,
            };
            assert_eq!(Error::new(kind, "").retry(), want, "{kind}");
        }
    }

    #[test]
    fn a_cause_is_in_the_source_and_not_in_the_text() {
        let error = Error::internal("the store could not be read").with_source(std::io::Error::other("bad sector"));
        assert!(!error.to_string().contains("bad sector"));
        assert_eq!(error.source().map(|s| s.to_string()).as_deref(), Some("bad sector"));
    }
}
