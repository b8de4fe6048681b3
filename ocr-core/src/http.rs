//! What our HTTP clients have in common: how they speak, which certificates they believe, and how they tell that one is
//! not believed.

use std::{error::Error as StdError, fs, io, path::PathBuf};

use reqwest::{Certificate, Client, ClientBuilder, redirect, tls};

use crate::{Error, Result};

/// Which certificates are believed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Certificates {
    /// Those that the system believes.
    #[default]
    System,
    /// Those too that this PEM file vouches for.
    SystemAnd(PathBuf),
    /// All of them, whoever made them. Only for laboratories.
    Unchecked,
}

/// A client that takes nothing from the environment, follows no redirect and believes these certificates. What is left
/// to the caller are its name and its deadlines. Of `whose` certificates they are is for the log.
///
/// # Errors
/// `Invalid` naming `setting` when the file of certificates cannot be used.
pub fn builder(certificates: &Certificates, setting: &str, whose: &str) -> Result<ClientBuilder> {
    // One crypto library for the whole process; whoever came first has chosen it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = Client::builder()
        // Else it reads `HTTPS_PROXY` and its like from the environment, which is not for a library to do.
        .no_proxy()
        .tls_version_min(tls::Version::TLS_1_2)
        // A redirect would carry the secret to whom it names.
        .redirect(redirect::Policy::none());
    match certificates {
        Certificates::System => Ok(builder),
        Certificates::SystemAnd(file) => {
            let wrong = |what: &str| Error::invalid(setting, format_args!("{what}: {}", file.display()));
            let pem = fs::read(file).map_err(|error| wrong("cannot be read").with_source(error))?;
            let authorities = Certificate::from_pem_bundle(&pem)
                .map_err(|error| wrong("wants certificates as PEM").with_source(error))?;
            if authorities.is_empty() {
                return Err(wrong("has no certificate"));
            }
            Ok(builder.tls_certs_merge(authorities))
        }
        Certificates::Unchecked => {
            tracing::warn!("certificates of {whose} are not checked (GLOBAL_INSECURE)");
            Ok(builder.tls_danger_accept_invalid_certs(true))
        }
    }
}

/// Makes the client.
///
/// # Errors
/// `Internal` when it cannot be made.
pub fn build(builder: ClientBuilder) -> Result<Client> {
    builder.build().map_err(|error| Error::internal("the HTTP client cannot be made").with_source(error))
}

/// Whether a request failed because the server's certificate is not believed.
pub fn is_bad_certificate(error: &reqwest::Error) -> bool {
    let mut cause = error.source();
    while let Some(current) = cause {
        if matches!(current.downcast_ref(), Some(rustls::Error::InvalidCertificate(_))) {
            return true;
        }
        // An `io::Error` leaves the error that it wraps out of `source`.
        cause = match current.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => current.source(),
        };
    }
    false
}
