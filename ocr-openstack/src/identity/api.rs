//! Keystone's calls, one function each.

use std::time::Duration;

use ocr_core::{Error, ErrorKind, Result, Retry};
use reqwest::{Client, StatusCode, Url};
use secrecy::SecretString;

use super::wire::{AuthAnswer, AuthRequest, Token};
use crate::{
    Credential,
    error::{from_answer, from_transport},
    http,
};

/// `POST /v3/auth/tokens`: a token, and what it is good for.
///
/// # Errors
/// `Denied` for whatever Keystone has against the credential: it tells an unknown one (404) from a wrong secret (401) or
/// not, and to a caller both are the same.
pub(crate) async fn authenticate(
    client: &Client,
    auth_url: &Url,
    credential: &Credential,
) -> Result<(SecretString, Token)> {
    let response = client
        .post(format!("{auth_url}/auth/tokens"))
        .json(&AuthRequest::from(credential))
        .send()
        .await
        .map_err(from_transport)?;
    let (status, headers) = (response.status(), response.headers().clone());
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let body = http::body(response).await?;
    if status != StatusCode::CREATED {
        let error = from_answer(status, header("x-openstack-request-id"), headers.contains_key("retry-after"), &body);
        return Err(match (error.kind(), error.retry()) {
            (ErrorKind::Denied | ErrorKind::NotFound, _) => Error::new(
                ErrorKind::Denied,
                format!("Keystone refused CREDENTIAL_ID with this secret, domain and project: {}", error.message()),
            ),
            // A token too many does no harm.
            (_, Retry::Ambiguous) => error.with_retry(Retry::Safe),
            _ => error,
        });
    }
    let token = header("x-subject-token").ok_or_else(|| Error::internal("Keystone's answer has no token"))?;
    Ok((SecretString::from(token), http::json::<AuthAnswer>(&body)?.token))
}

/// How long a token lasts, by Keystone's own clock: ours may be another.
pub(crate) fn lifetime(token: &Token) -> Result<Duration> {
    let time = |text: &str| {
        humantime::parse_rfc3339(text)
            .map_err(|error| Error::internal("the token has a time that cannot be read").with_source(error))
    };
    let (from, until) = (time(&token.issued_at)?, time(&token.expires_at)?);
    until.duration_since(from).map_err(|_| Error::internal("the token ends before it begins"))
}
