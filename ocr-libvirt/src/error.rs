//! What libvirt's errors mean: one table from (code, domain, message) to [`ocr_core::Error`].
//!
//! libvirt's code alone does not tell: 1 is «internal error» and 38 is «some system call failed», so for a few
//! codes the message decides. The texts are those of libvirt 9.0 and 11.3; a text that is not known falls through
//! to the code's general meaning.

use std::fmt;

use ocr_core::{Error, ErrorKind, Retry, error::reason};

/// What libvirt reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// `virErrorNumber`.
    pub code: u32,
    /// `virErrorDomain`: the part of libvirt that failed.
    pub domain: u32,
    /// libvirt's own words.
    pub message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "libvirt error {} in part {}: {}", self.code, self.domain, self.message)
    }
}

impl std::error::Error for Failure {}

#[cfg(feature = "libvirt")]
impl From<virt::error::Error> for Failure {
    fn from(error: virt::error::Error) -> Self {
        Self { code: error.code().to_raw(), domain: error.domain().to_raw(), message: error.message().to_owned() }
    }
}

/// `virErrorNumber`, those that are told apart.
pub mod code {
    #![allow(missing_docs, reason = "libvirt's own names")]
    pub const INTERNAL_ERROR: u32 = 1;
    pub const NO_MEMORY: u32 = 2;
    pub const NO_SUPPORT: u32 = 3;
    pub const NO_CONNECT: u32 = 5;
    pub const INVALID_CONN: u32 = 6;
    pub const OPERATION_FAILED: u32 = 9;
    pub const DOM_EXIST: u32 = 28;
    pub const OPERATION_DENIED: u32 = 29;
    pub const NETWORK_EXIST: u32 = 37;
    pub const SYSTEM_ERROR: u32 = 38;
    pub const RPC: u32 = 39;
    pub const NO_DOMAIN: u32 = 42;
    pub const NO_NETWORK: u32 = 43;
    pub const AUTH_FAILED: u32 = 45;
    pub const NO_STORAGE_POOL: u32 = 49;
    pub const NO_STORAGE_VOL: u32 = 50;
    pub const OPERATION_INVALID: u32 = 55;
    pub const CONFIG_UNSUPPORTED: u32 = 67;
    pub const OPERATION_TIMEOUT: u32 = 68;
    pub const ARGUMENT_UNSUPPORTED: u32 = 74;
    pub const OPERATION_ABORTED: u32 = 78;
    pub const AUTH_CANCELLED: u32 = 79;
    pub const OPERATION_UNSUPPORTED: u32 = 84;
    pub const AGENT_UNRESPONSIVE: u32 = 86;
    pub const RESOURCE_BUSY: u32 = 87;
    pub const ACCESS_DENIED: u32 = 88;
    pub const STORAGE_VOL_EXIST: u32 = 90;
    pub const AUTH_UNAVAILABLE: u32 = 94;
    pub const AGENT_UNSYNCED: u32 = 97;
    pub const AGENT_COMMAND_TIMEOUT: u32 = 112;
    pub const AGENT_COMMAND_FAILED: u32 = 113;
}

/// `virErrorDomain`, those that are told apart.
pub mod part {
    #![allow(missing_docs, reason = "libvirt's own names")]
    pub const RPC: u32 = 7;
    pub const QEMU: u32 = 10;
    pub const REMOTE: u32 = 13;
    pub const DOMAIN: u32 = 20;
}

/// What is known about a failed call, before it is put into words for a caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// No such machine.
    NoDomain,
    /// No such network.
    NoNetwork,
    /// No such storage pool.
    NoPool,
    /// No such volume.
    NoVolume,
    /// The name or id is taken.
    Exists,
    /// The thing is in the wrong state: off, paused, already on.
    WrongState,
    /// Somebody else works on the machine; the call surely had no effect.
    Busy,
    /// The machine has no agent channel.
    AgentAbsent,
    /// The agent is not connected; the command surely was not sent.
    AgentNotConnected,
    /// The agent did not answer, and it is not known whether it got the command.
    AgentSilent,
    /// The agent went away while it worked.
    AgentLost,
    /// The agent answered with an error of its own.
    AgentRefused,
    /// The connection to libvirtd cannot be made.
    CannotConnect,
    /// The connection was closed before the call was sent.
    ConnectionClosed,
    /// The connection was lost while the call was on its way.
    ConnectionLost,
    /// libvirtd does not know us, or does not let us.
    Denied,
    /// libvirt, or this machine's hypervisor, cannot do it.
    Unsupported,
    /// Memory or disk is used up.
    Exhausted,
    /// The answer is larger than libvirt passes on.
    TooLarge,
    /// Anything else.
    Other,
}

impl Failure {
    /// Reads code, part and text.
    pub fn meaning(&self) -> Meaning {
        let has = |text: &str| self.message.contains(text);
        let of_connection = matches!(self.domain, part::RPC | part::REMOTE);
        match self.code {
            code::NO_DOMAIN => Meaning::NoDomain,
            code::NO_NETWORK => Meaning::NoNetwork,
            code::NO_STORAGE_POOL => Meaning::NoPool,
            code::NO_STORAGE_VOL => Meaning::NoVolume,
            code::DOM_EXIST | code::NETWORK_EXIST | code::STORAGE_VOL_EXIST => Meaning::Exists,
            code::OPERATION_FAILED if has("already exists") || has("already defined") => Meaning::Exists,
            code::OPERATION_INVALID => Meaning::WrongState,
            code::OPERATION_TIMEOUT | code::RESOURCE_BUSY => Meaning::Busy,
            code::AGENT_UNRESPONSIVE if has("is not connected") => Meaning::AgentNotConnected,
            code::AGENT_UNRESPONSIVE if has("disappeared") => Meaning::AgentLost,
            // libvirt 11 tells a failed handshake, after which nothing was sent, from a silent command.
            code::AGENT_UNRESPONSIVE if has("synchroniz") => Meaning::AgentNotConnected,
            code::AGENT_UNSYNCED => Meaning::AgentNotConnected,
            code::AGENT_UNRESPONSIVE | code::AGENT_COMMAND_TIMEOUT => Meaning::AgentSilent,
            code::AGENT_COMMAND_FAILED => Meaning::AgentRefused,
            code::ARGUMENT_UNSUPPORTED if has("agent is not configured") => Meaning::AgentAbsent,
            code::INTERNAL_ERROR if has("unable to execute QEMU agent command") => Meaning::AgentRefused,
            code::INTERNAL_ERROR if has("from agent socket") || has("agent monitor") => Meaning::AgentLost,
            code::INTERNAL_ERROR if of_connection && has("client socket is closed") => Meaning::ConnectionClosed,
            code::INTERNAL_ERROR if of_connection => Meaning::ConnectionLost,
            code::SYSTEM_ERROR if of_connection && (has("unable to connect") || has("Failed to connect")) => {
                Meaning::CannotConnect
            }
            code::SYSTEM_ERROR if of_connection && has("resolve address") => Meaning::CannotConnect,
            code::NO_CONNECT => Meaning::CannotConnect,
            code::SYSTEM_ERROR if of_connection => Meaning::ConnectionLost,
            code::INVALID_CONN => Meaning::ConnectionClosed,
            code::NO_MEMORY => Meaning::Exhausted,
            code::SYSTEM_ERROR | code::OPERATION_FAILED | code::INTERNAL_ERROR
                if has("No space left") || has("Cannot allocate memory") || has("Disk quota exceeded") =>
            {
                Meaning::Exhausted
            }
            code::RPC if has("encode message payload") || has("too large") => Meaning::TooLarge,
            code::AUTH_FAILED
            | code::AUTH_CANCELLED
            | code::AUTH_UNAVAILABLE
            | code::OPERATION_DENIED
            | code::ACCESS_DENIED => Meaning::Denied,
            code::NO_SUPPORT | code::CONFIG_UNSUPPORTED | code::OPERATION_UNSUPPORTED | code::ARGUMENT_UNSUPPORTED => {
                Meaning::Unsupported
            }
            _ => Meaning::Other,
        }
    }

    /// Whether the connection is of no more use.
    pub fn ends_connection(&self) -> bool {
        matches!(self.meaning(), Meaning::ConnectionClosed | Meaning::ConnectionLost | Meaning::CannotConnect)
    }

    /// Whether the agent no longer knows a process: it restarted, or has given the result away.
    pub fn is_unknown_pid(&self) -> bool {
        self.meaning() == Meaning::AgentRefused && (self.message.contains("'pid'") || self.message.contains("PID"))
    }

    /// The error of a call about machines, networks or volumes.
    ///
    /// libvirt's words are in the text where only they tell what is wrong, and in the source otherwise.
    pub fn into_error(self) -> Error {
        let told = |kind: ErrorKind, failure: &Failure| Error::new(kind, format!("libvirt: {}", failure.message));
        let error = match self.meaning() {
            Meaning::NoDomain => Error::not_found("there is no such machine"),
            Meaning::NoNetwork => Error::not_found("there is no such network"),
            Meaning::NoPool => Error::not_found("there is no such storage pool"),
            Meaning::NoVolume => Error::not_found("there is no such volume"),
            Meaning::Exists => return told(ErrorKind::AlreadyExists, &self),
            Meaning::WrongState => return told(ErrorKind::Conflict, &self),
            Meaning::Busy => Error::unavailable("another call works on the machine"),
            Meaning::AgentAbsent
            | Meaning::AgentNotConnected
            | Meaning::AgentSilent
            | Meaning::AgentLost
            | Meaning::AgentRefused => return self.into_agent_error(),
            Meaning::CannotConnect => return told(ErrorKind::Unavailable, &self),
            Meaning::ConnectionClosed => Error::unavailable("the connection to libvirt is closed"),
            Meaning::ConnectionLost => {
                Error::unavailable("the connection to libvirt was lost during the call").with_retry(Retry::Ambiguous)
            }
            Meaning::Denied => return told(ErrorKind::Denied, &self),
            Meaning::Unsupported => return told(ErrorKind::Unsupported, &self),
            Meaning::Exhausted => return told(ErrorKind::Exhausted, &self),
            Meaning::TooLarge => Error::new(ErrorKind::Exhausted, "the answer is larger than libvirt passes on"),
            Meaning::Other => return told(ErrorKind::Internal, &self),
        };
        error.with_source(self)
    }

    /// The error of an agent command: [`ocr_core::GuestExec`]'s table.
    pub fn into_agent_error(self) -> Error {
        let error = match self.meaning() {
            Meaning::AgentAbsent => {
                Error::unsupported("the machine has no channel for a guest agent").with_reason(reason::AGENT_ABSENT)
            }
            Meaning::AgentNotConnected => {
                Error::unavailable("the guest agent is not connected").with_reason(reason::AGENT_NOT_READY)
            }
            Meaning::AgentSilent => Error::unavailable("the guest agent does not answer")
                .with_reason(reason::AGENT_NOT_READY)
                .with_retry(Retry::Ambiguous),
            Meaning::AgentLost => Error::unavailable("the guest agent went away during the command")
                .with_reason(reason::AGENT_NOT_READY)
                .with_retry(Retry::Ambiguous),
            Meaning::Busy => {
                Error::unavailable("another program waits for this guest's agent").with_reason(reason::AGENT_NOT_READY)
            }
            Meaning::NoDomain => Error::not_found("the machine is gone").with_reason(reason::GUEST_GONE),
            Meaning::WrongState => {
                Error::new(ErrorKind::Conflict, "the machine is not running").with_reason(reason::GUEST_NOT_RUNNING)
            }
            Meaning::AgentRefused => return self.into_refusal(),
            _ => return self.into_error(),
        };
        error.with_source(self)
    }

    /// The agent's own error. libvirt passes on only its text.
    fn into_refusal(self) -> Error {
        let words = refusal(&self.message);
        if words.contains("has been disabled")
            || words.contains("is disabled")
            || words.contains("not allowed")
            || words.contains("has not been found")
        {
            return Error::unsupported(format!("the guest agent forbids it: {words}"))
                .with_reason(reason::AGENT_COMMAND_DISABLED);
        }
        Error::internal(format!("the guest agent says: {words}"))
    }
}

/// The agent's words out of `...unable to execute QEMU agent command 'X': WORDS`.
fn refusal(message: &str) -> &str {
    message
        .split_once("QEMU agent command ")
        .and_then(|(_, rest)| rest.split_once("': "))
        .map_or(message, |(_, words)| words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(code: u32, domain: u32, message: &str) -> Failure {
        Failure { code, domain, message: message.to_owned() }
    }

    /// Each row was seen on libvirt 9.0.0 (or 11.3.0): code, part, text, then what an agent's caller is told.
    #[test]
    fn the_agents_errors_are_told_apart() {
        use ErrorKind as K;
        use Retry as R;
        type Row = (u32, u32, &'static str, ErrorKind, Retry, Option<&'static str>);
        let rows: &[Row] = &[
            (
                86,
                10,
                "Guest agent is not responding: QEMU guest agent is not connected",
                K::Unavailable,
                R::Safe,
                Some(reason::AGENT_NOT_READY),
            ),
            (
                86,
                10,
                "Guest agent is not responding: Guest agent not available for now",
                K::Unavailable,
                R::Ambiguous,
                Some(reason::AGENT_NOT_READY),
            ),
            (
                86,
                10,
                "Guest agent is not responding: guest agent didn't respond to synchronization within '5' seconds",
                K::Unavailable,
                R::Safe,
                Some(reason::AGENT_NOT_READY),
            ),
            (
                112,
                10,
                "guest agent command timed out: guest agent didn't respond to command within '3' seconds",
                K::Unavailable,
                R::Ambiguous,
                Some(reason::AGENT_NOT_READY),
            ),
            (
                86,
                10,
                "Guest agent is not responding: Guest agent disappeared while executing command",
                K::Unavailable,
                R::Ambiguous,
                Some(reason::AGENT_NOT_READY),
            ),
            (
                1,
                10,
                "internal error: End of file from agent socket",
                K::Unavailable,
                R::Ambiguous,
                Some(reason::AGENT_NOT_READY),
            ),
            (
                74,
                10,
                "argument unsupported: QEMU guest agent is not configured",
                K::Unsupported,
                R::Never,
                Some(reason::AGENT_ABSENT),
            ),
            (
                55,
                20,
                "Requested operation is not valid: domain is not running",
                K::Conflict,
                R::Never,
                Some(reason::GUEST_NOT_RUNNING),
            ),
            (
                55,
                10,
                "Requested operation is not valid: domain is not running",
                K::Conflict,
                R::Never,
                Some(reason::GUEST_NOT_RUNNING),
            ),
            (
                42,
                10,
                "Domain not found: no domain with matching uuid 'x'",
                K::NotFound,
                R::Never,
                Some(reason::GUEST_GONE),
            ),
            (
                68,
                0,
                "Timed out during operation: cannot acquire state change lock \
                 (held by agent=qemuDispatchDomainAgentCommand)",
                K::Unavailable,
                R::Safe,
                Some(reason::AGENT_NOT_READY),
            ),
            (
                1,
                10,
                "internal error: unable to execute QEMU agent command 'guest-exec': \
                 The command guest-exec has been disabled for this instance",
                K::Unsupported,
                R::Never,
                Some(reason::AGENT_COMMAND_DISABLED),
            ),
            (
                113,
                10,
                "guest agent command failed: unable to execute QEMU agent command 'guest-exec': \
                 Command guest-exec has been disabled",
                K::Unsupported,
                R::Never,
                Some(reason::AGENT_COMMAND_DISABLED),
            ),
            (
                1,
                10,
                "internal error: unable to execute QEMU agent command 'guest-file-open': failed to open file",
                K::Internal,
                R::Never,
                None,
            ),
            (39, 7, "Unable to encode message payload", K::Exhausted, R::Never, None),
            (38, 7, "End of file while reading data: Input/output error", K::Unavailable, R::Ambiguous, None),
            (1, 7, "internal error: client socket is closed", K::Unavailable, R::Safe, None),
            (1, 7, "internal error: connection closed due to keepalive timeout", K::Unavailable, R::Ambiguous, None),
        ];
        for (code, domain, message, kind, retry, reason) in rows {
            let error = failure(*code, *domain, message).into_agent_error();
            assert_eq!((error.kind(), error.retry(), error.reason()), (*kind, *retry, *reason), "{message}");
        }
    }

    #[test]
    fn the_errors_of_other_calls_are_told_apart() {
        use ErrorKind as K;
        use Retry as R;
        let rows: &[(u32, u32, &str, K, R)] = &[
            (42, 10, "Domain not found", K::NotFound, R::Never),
            (49, 18, "Storage pool not found", K::NotFound, R::Never),
            (50, 18, "Storage volume not found", K::NotFound, R::Never),
            (43, 19, "Network not found", K::NotFound, R::Never),
            (9, 20, "operation failed: domain 'x' already exists with uuid 1", K::AlreadyExists, R::Never),
            (9, 20, "operation failed: domain 'x' is already defined with uuid 1", K::AlreadyExists, R::Never),
            (9, 10, "operation failed: something else", K::Internal, R::Never),
            (90, 18, "storage volume 'x' exists already", K::AlreadyExists, R::Never),
            (55, 10, "Requested operation is not valid: domain is already running", K::Conflict, R::Never),
            (68, 0, "Timed out during operation: cannot acquire state change lock", K::Unavailable, R::Safe),
            (45, 7, "authentication failed: authentication failed", K::Denied, R::Never),
            (38, 7, "unable to connect to server at 'h:1': Connection refused", K::Unavailable, R::Safe),
            (38, 7, "Failed to connect socket to '/run/x': No such file", K::Unavailable, R::Safe),
            (38, 7, "Unable to resolve address 'x' service '1': Name unknown", K::Unavailable, R::Safe),
            (38, 0, "Cannot get interface MTU on 'brnope': No such device", K::Internal, R::Never),
            (38, 18, "cannot fill file '/p/x': No space left on device", K::Exhausted, R::Never),
            (67, 10, "unsupported configuration: filterref is not supported", K::Unsupported, R::Never),
            (3, 12, "this function is not supported by the connection driver", K::Unsupported, R::Never),
        ];
        for (code, domain, message, kind, retry) in rows {
            let error = failure(*code, *domain, message).into_error();
            assert_eq!((error.kind(), error.retry()), (*kind, *retry), "{message}");
        }
    }

    #[test]
    fn libvirts_words_are_in_the_text_or_in_the_source_but_not_in_both() {
        for (code, message) in [(42, "Domain not found: uuid"), (67, "unsupported configuration: x"), (1, "odd")] {
            let error = failure(code, 10, message).into_error();
            let in_source = std::error::Error::source(&error).is_some_and(|s| s.to_string().contains(message));
            assert_ne!(error.to_string().contains(message), in_source, "{message}");
        }
    }

    #[test]
    fn only_failures_of_the_connection_end_it() {
        assert!(failure(38, 7, "End of file while reading data: Input/output error").ends_connection());
        assert!(failure(1, 7, "internal error: client socket is closed").ends_connection());
        assert!(!failure(86, 10, "QEMU guest agent is not connected").ends_connection());
        assert!(!failure(39, 7, "Unable to encode message payload").ends_connection());
        assert!(!failure(42, 10, "Domain not found").ends_connection());
    }

    #[test]
    fn a_lost_pid_is_known() {
        assert!(
            failure(
                1,
                10,
                "internal error: unable to execute QEMU agent command 'guest-exec-status': Invalid parameter 'pid'"
            )
            .is_unknown_pid()
        );
        assert!(
            !failure(
                1,
                10,
                "internal error: unable to execute QEMU agent command 'guest-exec': Failed to execute child process"
            )
            .is_unknown_pid()
        );
    }
}
