//! The contract's clients, for those that call a server.

use std::time::Duration;

use ocr_core::{Error, ErrorKind, Result, Retry, error::reason};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

pub use crate::proto::{
    capability_client::CapabilityClient, condition_service_client::ConditionServiceClient,
    deputy_query_service_client::DeputyQueryServiceClient, feature_service_client::FeatureServiceClient,
    inject_service_client::InjectServiceClient, older, virtual_machine_service_client::VirtualMachineServiceClient,
};
pub use crate::v1::{installs_client::InstallsClient, machines_client::MachinesClient, queue_client::QueueClient};

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Connects to a server such as `http://127.0.0.1:9000`. A server that dies later is noticed by keep-alive.
///
/// # Errors
/// `Invalid` for an address that is none, `Unavailable` when nobody answers there.
pub async fn connect(address: &str) -> Result<Channel> {
    let invalid = |cause| {
        let shown = ocr_core::id::shown(address);
        Error::invalid("address", format_args!("wants a URL such as http://127.0.0.1:9000, got {shown}"))
            .with_source(cause)
    };
    let endpoint = Endpoint::from_shared(address.to_owned()).map_err(invalid)?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_DEADLINE)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    endpoint.connect().await.map_err(|cause| {
        Error::unavailable(format!("no server answers at {address}")).during("client.connect").with_source(cause)
    })
}

/// The error that a server of ours meant by a status. Of another server's status it makes the best.
pub fn error(status: &Status) -> Error {
    let details = status.get_error_details();
    let info = details.error_info();
    let told = |key: &str| info.and_then(|info| info.metadata.get(key)).map(String::as_str);
    let kind = told("kind").and_then(|kind| ErrorKind::ALL.into_iter().find(|known| known.as_str() == kind));
    let mut error = Error::new(kind.unwrap_or_else(|| kind_of(status.code())), status.message());
    match told("retry") {
        Some("never") => error = error.with_retry(Retry::Never),
        Some("safe") => error = error.with_retry(Retry::Safe),
        Some("ambiguous") => error = error.with_retry(Retry::Ambiguous),
        _ => {}
    }
    if let Some(known) = info.and_then(|info| REASONS.into_iter().find(|known| *known == info.reason)) {
        error = error.with_reason(known);
    }
    error
}

const REASONS: [&str; 20] = [
    reason::AGENT_ABSENT,
    reason::AGENT_NOT_READY,
    reason::AGENT_COMMAND_DISABLED,
    reason::GUEST_GONE,
    reason::GUEST_NOT_RUNNING,
    reason::COMMAND_FAILED,
    reason::LEASE_LOST,
    reason::FENCED,
    reason::VERSION_MISMATCH,
    reason::PACKAGE_NOT_FOUND,
    reason::PACKAGE_YANKED,
    reason::PACKAGE_CHECKSUM,
    reason::PACKAGE_ARCHIVE,
    reason::PACKAGE_MANIFEST,
    reason::PACKAGE_TYPE,
    reason::PACKAGE_TOO_LARGE,
    reason::PACKAGE_CACHE_FULL,
    reason::REGISTRY_UNAVAILABLE,
    reason::SEALED,
    reason::QUEUE_FULL,
];

fn kind_of(code: Code) -> ErrorKind {
    match code {
        Code::NotFound => ErrorKind::NotFound,
        Code::AlreadyExists => ErrorKind::AlreadyExists,
        Code::InvalidArgument | Code::OutOfRange => ErrorKind::Invalid,
        Code::FailedPrecondition | Code::Aborted => ErrorKind::Conflict,
        Code::ResourceExhausted => ErrorKind::Exhausted,
        Code::Unimplemented => ErrorKind::Unsupported,
        Code::PermissionDenied | Code::Unauthenticated => ErrorKind::Denied,
        Code::Unavailable => ErrorKind::Unavailable,
        Code::DeadlineExceeded | Code::Cancelled => ErrorKind::TimedOut,
        Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => ErrorKind::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_comes_back_as_the_server_meant_it() {
        for kind in ErrorKind::ALL {
            for retry in [Retry::Never, Retry::Safe, Retry::Ambiguous] {
                for known in REASONS {
                    let sent = Error::new(kind, "words").with_retry(retry).with_reason(known);
                    let got = error(&crate::status(&sent, &crate::CallId::random()));
                    assert_eq!((got.kind(), got.retry(), got.reason()), (kind, retry, Some(known)));
                }
            }
        }
    }

    #[test]
    fn a_status_without_details_is_read_by_its_code() {
        for kind in ErrorKind::ALL {
            let got = error(&Status::new(crate::code(kind), "words"));
            let wanted = if kind == ErrorKind::Denied { ErrorKind::Conflict } else { kind };
            assert_eq!(got.kind(), wanted);
        }
    }
}
