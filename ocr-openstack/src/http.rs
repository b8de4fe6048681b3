//! The one HTTP client: its limits, and how an answer is read.

use std::time::Duration;

use ocr_core::{Error, ErrorKind, Result, http};
use reqwest::{Client, Response};
use serde::de::DeserializeOwned;

use crate::{Certificates, error::from_transport};

const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// For an answer as a whole. (A cloud without its message queue keeps a request for minutes.)
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// The largest answer that is read, in bytes: 16 MiB.
const BODY_LIMIT_BYTES: usize = 16 << 20;

/// # Errors
/// `Invalid` naming `OCR_CA_FILE` when that cannot be used.
pub(crate) fn client(certificates: &Certificates) -> Result<Client> {
    let builder = http::builder(certificates, "OCR_CA_FILE", "the cloud")?
        .user_agent(concat!("ocr-openstack/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_LIMIT)
        .timeout(ANSWER_LIMIT);
    http::build(builder)
}

/// Reads an answer's body, but no more than the limit.
pub(crate) async fn body(mut response: Response) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(from_transport)? {
        if body.len() + chunk.len() > BODY_LIMIT_BYTES {
            return Err(Error::new(
                ErrorKind::Exhausted,
                format!("the answer is longer than {BODY_LIMIT_BYTES} bytes"),
            ));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// Reads JSON of the form that the caller knows.
pub(crate) fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    serde_json::from_slice(body)
        .map_err(|error| Error::internal("the answer has another form than expected").with_source(error))
}
