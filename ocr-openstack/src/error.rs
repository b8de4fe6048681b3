//! From OpenStack's answers to [`ocr_core::Error`].

use std::error::Error as StdError;

use ocr_core::{Error, ErrorKind, Retry, error::reason, http};
use reqwest::StatusCode;
use serde_json::Value;

/// The most of a service's own words that an error repeats, in characters.
const SAID_CHARS: usize = 300;

/// A service's own words about a fault of its own: for the log only.
#[derive(Debug)]
struct Said(String);

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the service said: {}", self.0)
    }
}

impl StdError for Said {}

/// The error that an answer stands for. `request_id` is OpenStack's own, by which its logs are searched.
pub(crate) fn from_answer(status: StatusCode, request_id: Option<&str>, retry_after: bool, body: &[u8]) -> Error {
    let fault = Fault::read(body);
    let (kind, retry) = kind_of(status, retry_after, &fault);
    let place = match request_id {
        Some(id) => format!("HTTP {}, request {}", status.as_u16(), ocr_core::id::shown(id)),
        None => format!("HTTP {}", status.as_u16()),
    };
    let own_fault = status.is_server_error();
    let message = match status {
        // What a service says of its own faults is of no use to a caller, and tells too much.
        _ if own_fault => "the service failed",
        _ if fault.message.is_empty() => status.canonical_reason().unwrap_or("the service refused"),
        _ => &fault.message,
    };
    let mut error = Error::new(kind, format!("{message} ({place})"));
    if let Some(retry) = retry {
        error = error.with_retry(retry);
    }
    if status == StatusCode::PRECONDITION_FAILED {
        error = error.with_reason(reason::VERSION_MISMATCH);
    }
    if own_fault && !fault.message.is_empty() {
        error = error.with_source(Said(fault.message));
    }
    error
}

fn kind_of(status: StatusCode, retry_after: bool, fault: &Fault) -> (ErrorKind, Option<Retry>) {
    use ErrorKind::*;
    let kind = match status.as_u16() {
        // Nova answers a full quota with 403, Neutron with 409.
        403 | 409 if fault.is_quota() => Exhausted,
        401 | 403 => Denied,
        404 | 410 => NotFound,
        409 if fault.is_taken() => AlreadyExists,
        409 | 412 => Conflict,
        // 406: a microversion that this cloud is too old or too new for.
        405 | 406 | 501 => Unsupported,
        408 | 504 => TimedOut,
        413 | 429 if retry_after || status == StatusCode::TOO_MANY_REQUESTS => return (Exhausted, Some(Retry::Safe)),
        400..500 => Invalid,
        // The middleware that checks tokens, or a proxy: the service itself did not see the request.
        503 => return (Unavailable, Some(Retry::Safe)),
        // Nearly always one of the service's own services is down; what it did before is not known.
        500.. => return (Unavailable, Some(Retry::Ambiguous)),
        _ => Internal,
    };
    (kind, None)
}

/// What a body says, whichever of OpenStack's shapes it has.
#[derive(Debug, Default)]
struct Fault {
    class: String,
    message: String,
}

impl Fault {
    /// - Keystone `{"error": {"message": ..}}`, Nova `{"itemNotFound": {"message": ..}}`
    /// - Neutron `{"NeutronError": {"type": .., "message": ..}}`, or a text in its place
    /// - Glance and the middleware `{"message": "..<br />", "title": ..}`
    /// - a page of HTML, from a proxy or a crashed service: nothing for people
    fn read(body: &[u8]) -> Self {
        let Ok(Value::Object(body)) = serde_json::from_slice(body) else { return Self::default() };
        let (class, inner) = match body.iter().next() {
            Some((name, inner @ (Value::Object(_) | Value::String(_)))) if body.len() == 1 => (name.as_str(), inner),
            _ => ("", &Value::Object(body.clone())),
        };
        let text = |key| inner.get(key).and_then(Value::as_str);
        let message = text("message").or(inner.as_str()).unwrap_or_default();
        Self { class: text("type").unwrap_or(class).to_owned(), message: plain(message) }
    }

    fn is_quota(&self) -> bool {
        self.class == "OverQuota"
            || self.message.starts_with("Quota exceeded")
            || (self.message.starts_with("Maximum number of ") && self.message.ends_with(" exceeded"))
    }

    fn is_taken(&self) -> bool {
        self.message.contains("already exists")
    }
}

/// One line without tags, cut.
fn plain(text: &str) -> String {
    let text = text.replace("<br />", " ");
    let words: Vec<_> = text.split_whitespace().collect();
    words.join(" ").chars().filter(|c| !c.is_control()).take(SAID_CHARS).collect()
}

/// The error for a request that got no answer.
pub(crate) fn from_transport(error: reqwest::Error) -> Error {
    // The address is said once, by the resource of the error.
    let error = error.without_url();
    if http::is_bad_certificate(&error) {
        return Error::unavailable(
            "the certificate cannot be verified; name its authority in OCR_CA_FILE or set GLOBAL_INSECURE",
        )
        .with_retry(Retry::Never)
        .with_source(error);
    }
    if error.is_timeout() {
        // Before there is a connection, nothing can have happened.
        let retry = if error.is_connect() { Retry::Safe } else { Retry::Ambiguous };
        return Error::timed_out("no answer in time").with_retry(retry).with_source(error);
    }
    if error.is_connect() {
        return Error::unavailable("cannot be reached").with_source(error);
    }
    if error.is_builder() {
        return Error::internal("the request cannot be built").with_source(error);
    }
    Error::unavailable("the connection broke").with_retry(Retry::Ambiguous).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(name: &str) -> Error {
        let samples: Value = serde_json::from_str(include_str!("../tests/samples/errors.json")).unwrap();
        let sample = samples.as_array().unwrap().iter().find(|sample| sample["name"] == name).unwrap();
        let status = StatusCode::from_u16(sample["status"].as_u64().unwrap() as u16).unwrap();
        let body = match &sample["body"] {
            Value::String(text) => text.clone(),
            json => json.to_string(),
        };
        from_answer(status, sample["request_id"].as_str(), false, body.as_bytes())
    }

    #[test]
    fn every_recorded_answer_has_its_kind() {
        use ErrorKind::*;
        use Retry::*;
        for (name, kind, retry) in [
            ("nova/create_bad_image_400", Invalid, Never),
            ("nova/quota_ram_403", Exhausted, Never),
            ("nova/create_port_quota_403", Exhausted, Never),
            ("nova/diagnostics_member_403", Denied, Never),
            ("nova/server_404", NotFound, Never),
            ("nova/action_while_building_409", Conflict, Never),
            ("nova/flavor_create_conflict_409", AlreadyExists, Never),
            ("nova/keypair_create_conflict_409", AlreadyExists, Never),
            ("nova/create_port_in_use_409", Conflict, Never),
            ("nova/microversion_too_high_406", Unsupported, Never),
            ("nova/create_too_large_413", Invalid, Never),
            ("nova/create_neutron_down", Unavailable, Ambiguous),
            ("nova/keystone_down_new_token_503", Unavailable, Safe),
            ("nova/token_revoked_401", Denied, Never),
            ("neutron/network_404", NotFound, Never),
            ("neutron/quota_network_2_409", Exhausted, Never),
            ("neutron/network_in_use_409", Conflict, Never),
            ("neutron/security_group_rule_conflict_409", AlreadyExists, Never),
            ("neutron/if_match_412", Conflict, Never),
            ("neutron/subnet_bad_cidr_400", Invalid, Never),
            ("neutron/mysql_down_get_500", Unavailable, Ambiguous),
            ("neutron/network_create_provider_member_403", Denied, Never),
            ("glance/image_404", NotFound, Never),
            ("glance/image_publicize_member_403", Denied, Never),
            ("glance/image_upload_again_409", Conflict, Never),
            ("glance/image_download_after_mismatch_500", Unavailable, Ambiguous),
            ("keystone/project_404", NotFound, Never),
            ("keystone/auth_malformed_400", Invalid, Never),
            ("keystone/users_forbidden_403", Denied, Never),
        ] {
            let error = recorded(name);
            assert_eq!((error.kind(), error.retry()), (kind, retry), "{name}: {error}");
        }
    }

    #[test]
    fn the_text_is_the_services_own_in_one_line_with_status_and_request() {
        assert_eq!(
            recorded("nova/quota_ram_403").message(),
            "Quota exceeded for ram: Requested 2048, but already used 0 of 1024 ram \
             (HTTP 403, request \"req-ddc61161-8588-473c-9959-9bbb02d05581\")"
        );
        assert_eq!(
            recorded("glance/image_404").message(),
            "No image found with ID 00000000-0000-0000-0000-000000000000 \
             (HTTP 404, request \"req-980a7cb4-9820-4c76-9b51-d989ec5c02ec\")"
        );
        assert!(recorded("keystone/auth_malformed_400").message().len() < SAID_CHARS + 80);
    }

    #[test]
    fn what_a_service_says_of_its_own_fault_goes_to_the_log_only() {
        let error = recorded("nova/create_neutron_down");
        assert!(error.message().starts_with("the service failed (HTTP 500, request "), "{error}");
        let source = error.source().unwrap().to_string();
        assert!(source.contains("keystoneauth1.exceptions.connection.ConnectFailure"), "{source}");
        let html = recorded("glance/image_download_after_mismatch_500");
        assert_eq!(html.message(), "the service failed (HTTP 500)");
        assert!(html.source().is_none());
    }

    #[test]
    fn a_wrong_version_has_its_reason_and_a_busy_service_may_be_asked_again() {
        assert_eq!(recorded("neutron/if_match_412").reason(), Some(reason::VERSION_MISMATCH));
        for (status, retry_after) in [(413, true), (429, false), (429, true)] {
            let error = from_answer(StatusCode::from_u16(status).unwrap(), None, retry_after, b"");
            assert_eq!((error.kind(), error.retry()), (ErrorKind::Exhausted, Retry::Safe), "{status}");
        }
    }

    #[test]
    fn no_answer_is_too_strange() {
        for body in [&b""[..], b"\xff\xfe", b"[]", b"{}", b"null", br#"{"NeutronError": "a text"}"#, br#"{"a": {}}"#] {
            for status in 300..600 {
                let error = from_answer(StatusCode::from_u16(status).unwrap(), Some("a\nb"), false, body);
                assert!(!error.message().starts_with(' ') && !error.message().contains('\n'), "{error}");
            }
        }
    }
}
