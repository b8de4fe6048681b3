//! The id of one call: in the log, in the reply's headers, and in the text of an internal fault.

use std::{fmt, str::FromStr, sync::Arc};

use http::HeaderMap;
use uuid::Uuid;

/// Names one call. It is on every log line of the call and in the reply's [`CallId::HEADER`], so that a user's report
/// and the operator's log meet.
///
/// A client may bring its own in the same header. Clones share their text.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct CallId(Arc<str>);

impl CallId {
    /// The header, of requests and of replies.
    pub const HEADER: &str = "x-request-id";
    /// The longest id that a client may bring, in bytes.
    pub const MAX_BYTES: usize = 64;

    /// A new random id.
    pub fn random() -> Self {
        let mut text = Uuid::encode_buffer();
        Self(Arc::from(&*Uuid::new_v4().simple().encode_lower(&mut text)))
    }

    /// The id that the client brought, or a new one where it brought none or an unfit one.
    pub fn of(headers: &HeaderMap) -> Self {
        headers
            .get(Self::HEADER)
            .and_then(|value| value.to_str().ok())
            .and_then(|text| text.parse().ok())
            .unwrap_or_else(Self::random)
    }

    /// The id that the server gave this request. A service that is called without the server makes its own.
    pub(crate) fn given<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get().cloned().unwrap_or_else(Self::random)
    }

    /// The text, at most [`CallId::MAX_BYTES`] ASCII letters, digits and `-_.`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Why a text is no [`CallId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotACallId;

impl fmt::Display for NotACallId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "wants 1 to {} ASCII letters, digits and - _ .", CallId::MAX_BYTES)
    }
}

impl std::error::Error for NotACallId {}

impl FromStr for CallId {
    type Err = NotACallId;

    fn from_str(text: &str) -> Result<Self, NotACallId> {
        let fit = (1..=Self::MAX_BYTES).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        if fit { Ok(Self(text.into())) } else { Err(NotACallId) }
    }
}

impl fmt::Display for CallId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for CallId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CallId({})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_id_is_kept_where_it_is_fit_for_a_log() {
        let mut headers = HeaderMap::new();
        let own = CallId::of(&headers);
        assert_eq!(own.as_str().parse::<CallId>(), Ok(own.clone()));
        assert_ne!(own, CallId::of(&headers));

        headers.insert(CallId::HEADER, "range-7.deploy_1".parse().unwrap());
        assert_eq!(CallId::of(&headers).as_str(), "range-7.deploy_1");

        for unfit in ["", "a b", "a=b", "a\tb", &"x".repeat(65)] {
            headers.insert(CallId::HEADER, unfit.parse().unwrap());
            assert_ne!(CallId::of(&headers).as_str(), unfit);
        }
    }
}
