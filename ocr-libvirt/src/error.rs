//! libvirt's error codes as errors of the core.
//!
//! The table was made by provoking each fault on libvirt 9.0; where 11.3 says it otherwise both are read.

use ocr_core::{Error, ErrorKind, Retry, error::reason};

/// What libvirt said: its number, the part of it that said so, and its words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) code: i64,
    pub(crate) domain: i64,
    pub(crate) message: String,
}

#[cfg(feature = "libvirt")]
impl From<virt::error::Error> for Fault {
    fn from(error: virt::error::Error) -> Self {
        Self {
            code: i64::from(error.code().to_raw()),
            domain: i64::from(error.domain().to_raw()),
            message: error.message().to_owned(),
        }
    }
}

/// libvirt's number for "no such volume".
pub(crate) const NO_VOLUME: i64 = 50;
/// libvirt's number for "no such domain".
pub(crate) const NO_DOMAIN: i64 = 42;
/// libvirt's number for "not in this state".
pub(crate) const OPERATION_INVALID: i64 = 55;
/// libvirt's number for "this volume exists".
pub(crate) const VOLUME_EXISTS: i64 = 90;

/// The part of libvirt that talks to its daemon.
const RPC: i64 = 7;

impl Fault {
    /// Whether the connection is of no more use.
    pub(crate) fn lost_connection(&self) -> bool {
        self.domain == RPC
            && ["client socket is closed", "keepalive timeout", "End of file while reading", "Broken pipe"]
                .iter()
                .any(|text| self.message.contains(text))
    }

    /// Whether libvirt refused a definition because its name or UUID is taken.
    fn is_taken(&self) -> bool {
        self.message.contains("already exists") || self.message.contains("already defined")
    }

    /// The error as callers of the core know it.
    pub(crate) fn into_error(self) -> Error {
        let says = |text: &str| self.message.contains(text);
        let not_ready = |retry| {
            Error::unavailable("the guest agent does not answer")
                .with_reason(reason::AGENT_NOT_READY)
                .with_retry(retry)
        };
        let error = match self.code {
            42 => Error::not_found("there is no such machine").with_reason(reason::GUEST_GONE),
            43 => Error::not_found("there is no such network"),
            49 => Error::not_found("there is no such storage pool"),
            NO_VOLUME => Error::not_found("there is no such volume"),
            // Not connected: surely not sent. Anything else may have been received by the agent.
            86 if says("is not connected") => not_ready(Retry::Safe),
            86 | 112 => not_ready(Retry::Ambiguous),
            1 if says("agent socket") => not_ready(Retry::Ambiguous),
            // The agent's own refusal: its words tell what the caller did.
            113 => Error::internal(self.message.clone()),
            1 if says("unable to execute QEMU agent command") => Error::internal(self.message.clone()),
            OPERATION_INVALID if says("is not running") => {
                Error::new(ErrorKind::Conflict, "the machine is not running").with_reason(reason::GUEST_NOT_RUNNING)
            }
            OPERATION_INVALID => Error::new(ErrorKind::Conflict, self.message.clone()),
            74 if says("agent is not configured") => {
                Error::unsupported("the machine has no channel for a guest agent").with_reason(reason::AGENT_ABSENT)
            }
            VOLUME_EXISTS => Error::new(ErrorKind::AlreadyExists, "a volume of this name exists"),
            9 if self.is_taken() => Error::new(ErrorKind::AlreadyExists, self.message.clone()),
            // Another job holds the domain: ours has not begun.
            68 => Error::unavailable("another operation holds the machine").with_retry(Retry::Safe),
            45 | 79 | 88 => Error::new(ErrorKind::Denied, format!("libvirt refuses us: {}", self.message)),
            2 => Error::new(ErrorKind::Exhausted, "the hypervisor has no memory left"),
            _ if says("No space left on device") => {
                Error::new(ErrorKind::Exhausted, "the hypervisor's disk is full").with_retry(Retry::Never)
            }
            3 | 67 => Error::unsupported(self.message.clone()),
            38 if says("unable to connect") || says("Failed to connect socket") || says("Unable to resolve") => {
                Error::unavailable(format!("libvirt cannot be reached: {}", self.message))
            }
            _ if self.lost_connection() => {
                let unsent = says("client socket is closed");
                Error::unavailable("the connection to libvirt was lost")
                    .with_retry(if unsent { Retry::Safe } else { Retry::Ambiguous })
            }
            _ => Error::internal(format!("libvirt: {}", self.message)),
        };
        error.with_source(Source(self))
    }
}

/// libvirt's own words, for the log.
#[derive(Debug, thiserror::Error)]
#[error("libvirt error {}, part {}: {}", .0.code, .0.domain, .0.message)]
struct Source(Fault);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_provoked_fault_has_its_kind_its_hint_and_its_reason() {
        use ErrorKind::*;
        use Retry::*;
        let agent = Some(reason::AGENT_NOT_READY);
        let table = [
            (86, 10, "Guest agent is not responding: QEMU guest agent is not connected", Unavailable, Safe, agent),
            (86, 10, "Guest agent is not responding: Guest agent not available for now", Unavailable, Ambiguous, agent),
            (86, 10, "Guest agent is not responding: didn't respond to synchronization within '5' seconds", Unavailable, Ambiguous, agent),
            (112, 10, "guest agent command timed out", Unavailable, Ambiguous, agent),
            (86, 10, "Guest agent is not responding: Guest agent disappeared while executing command", Unavailable, Ambiguous, agent),
            (1, 10, "internal error: End of file from agent socket", Unavailable, Ambiguous, agent),
            (1, 10, "internal error: unable to execute QEMU agent command 'guest-exec': no", Internal, Never, None),
            (113, 10, "unable to execute QEMU agent command 'guest-exec': no", Internal, Never, None),
            (55, 20, "Requested operation is not valid: domain is not running", Conflict, Never, Some(reason::GUEST_NOT_RUNNING)),
            (55, 10, "Requested operation is not valid: domain is not running", Conflict, Never, Some(reason::GUEST_NOT_RUNNING)),
            (74, 10, "argument unsupported: QEMU guest agent is not configured", Unsupported, Never, Some(reason::AGENT_ABSENT)),
            (42, 10, "Domain not found", NotFound, Never, Some(reason::GUEST_GONE)),
            (43, 19, "Network not found", NotFound, Never, None),
            (49, 18, "Storage pool not found", NotFound, Never, None),
            (50, 18, "Storage volume not found", NotFound, Never, None),
            (9, 20, "operation failed: domain 'x' already exists with uuid 1", AlreadyExists, Never, None),
            (9, 20, "operation failed: domain 'x' is already defined with uuid 1", AlreadyExists, Never, None),
            (90, 18, "storage volume 'x' exists already", AlreadyExists, Never, None),
            (68, 0, "Timed out during operation: cannot acquire state change lock", Unavailable, Safe, None),
            (38, 7, "unable to connect to server at 'h:1': Connection refused", Unavailable, Safe, None),
            (38, 7, "Failed to connect socket to '/x': No such file or directory", Unavailable, Safe, None),
            (38, 7, "End of file while reading data: Input/output error", Unavailable, Ambiguous, None),
            (1, 7, "internal error: client socket is closed", Unavailable, Safe, None),
            (1, 7, "internal error: connection closed due to keepalive timeout", Unavailable, Ambiguous, None),
            (45, 7, "authentication failed: authentication failed", Denied, Never, None),
            (3, 10, "this function is not supported by the connection driver", Unsupported, Never, None),
            (67, 10, "unsupported configuration: filterref", Unsupported, Never, None),
            (38, 18, "cannot write: No space left on device", Exhausted, Never, None),
            (1, 10, "something else", Internal, Never, None),
        ];
        for (code, domain, message, kind, retry, reason) in table {
            let error = Fault { code, domain, message: message.to_owned() }.into_error();
            assert_eq!((error.kind(), error.retry(), error.reason()), (kind, retry, reason), "{code} {message}");
        }
    }
}
