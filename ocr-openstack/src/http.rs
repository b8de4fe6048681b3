//! The one HTTP client: its limits, and how an answer is read.

use std::{fs, time::Duration};

use ocr_core::{Error, ErrorKind, Result};
use reqwest::{Certificate, Client, Response, redirect, tls};
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
    // One crypto library for the whole process; whoever came first has chosen it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = Client::builder()
        .user_agent(concat!("ocr-openstack/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_LIMIT)
        .timeout(ANSWER_LIMIT)
        // Else it reads `HTTPS_PROXY` and its like from the environment, which is not for a library to do.
        .no_proxy()
        .tls_version_min(tls::Version::TLS_1_2)
        // A redirect would carry the secret to whom it names.
        .redirect(redirect::Policy::none());
    match certificates {
        Certificates::System => {}
        Certificates::SystemAnd(file) => {
            let wrong = |what: &str| Error::invalid("OCR_CA_FILE", format_args!("{what}: {}", file.display()));
            let pem = fs::read(file).map_err(|error| wrong("cannot be read").with_source(error))?;
            let authorities = Certificate::from_pem_bundle(&pem)
                .map_err(|error| wrong("wants certificates as PEM").with_source(error))?;
            if authorities.is_empty() {
                return Err(wrong("has no certificate"));
            }
            builder = builder.tls_certs_merge(authorities);
        }
        Certificates::Unchecked => {
            tracing::warn!("certificates of the cloud are not checked (GLOBAL_INSECURE)");
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
    }
    builder.build().map_err(|error| Error::internal("the HTTP client cannot be made").with_source(error))
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
