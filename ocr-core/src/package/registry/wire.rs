//! [`Api`]: the registry's HTTP interface, one function per call.

use std::time::Duration;

use reqwest::{Client, Method, RequestBuilder, Response, StatusCode, Url, header};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, de::DeserializeOwned};

use super::Config;
use crate::{Error, ErrorKind, Result, Retry, error::reason, http, package::PackageKind};

/// The largest answer that is read but for archives, in bytes: 16 MiB.
const BODY_LIMIT_BYTES: usize = 16 << 20;
/// Packages on one page of a list.
const PAGE: usize = 100;

/// The registry, over HTTP.
#[derive(Debug)]
pub(super) struct Api {
    client: Client,
    base: Url,
    token: Option<SecretString>,
    answer_deadline: Duration,
}

/// One version of a package, as far as it is looked at. (Dates may be out of any range, so they are not read.) Older
/// registries write snake case.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WireVersion {
    pub(super) version: String,
    #[serde(default)]
    pub(super) description: Option<String>,
    #[serde(default, alias = "is_yanked")]
    pub(super) is_yanked: bool,
    #[serde(default)]
    pub(super) checksum: String,
}

/// One package of a list.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WirePackage {
    pub(super) name: String,
    #[serde(default, alias = "package_type")]
    pub(super) package_type: String,
    #[serde(default)]
    pub(super) versions: Vec<WireVersion>,
}

/// One page of a list.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WirePage {
    pub(super) packages: Vec<WirePackage>,
    #[serde(default, alias = "total_pages")]
    pub(super) total_pages: u64,
}

impl Api {
    pub(super) fn new(config: &Config) -> Result<Self> {
        Ok(Self {
            client: client(config)?,
            base: base(&config.url)?,
            token: config.token.clone(),
            answer_deadline: config.answer_deadline,
        })
    }

    /// The versions that meet the requirement, the yanked left out; or all of them, the yanked too. An unknown package
    /// has none.
    pub(super) async fn versions(&self, name: &str, requirement: Option<&str>) -> Result<Vec<WireVersion>> {
        let mut request = self.get(&[name]);
        if let Some(requirement) = requirement {
            request = request.query(&[("version_requirement", requirement)]);
        }
        let response = self.send(request).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(Vec::new());
        }
        if response.status() == StatusCode::BAD_REQUEST {
            return Err(Error::invalid("source.version", "the registry does not take this version requirement"));
        }
        self.json(response).await
    }

    /// One page of all packages or those of one kind. The first is 1.
    pub(super) async fn page(&self, kind: Option<PackageKind>, page: u64) -> Result<WirePage> {
        let mut request = self.get(&[]).query(&[("page", page), ("limit", PAGE as u64)]);
        if let Some(kind) = kind {
            request = request.query(&[("type", kind.as_str())]);
        }
        let response = self.send(request).await?;
        self.json(response).await
    }

    /// An archive, from a byte on where `from` is not 0. The body is not read yet.
    pub(super) async fn download(
        &self,
        name: &str,
        version: &str,
        from: u64,
        etag: Option<&header::HeaderValue>,
    ) -> Result<Response> {
        let mut request = self.get(&[name, version, "download"]);
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
            if let Some(etag) = etag {
                request = request.header(header::IF_RANGE, etag);
            }
        }
        self.send(request).await
    }

    fn get(&self, parts: &[&str]) -> RequestBuilder {
        let mut url = self.base.clone();
        // The base was checked: it can have a path.
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(["api", "v1", "package"]).extend(parts);
        }
        let request = self.client.request(Method::GET, url);
        match &self.token {
            Some(token) => request.bearer_auth(token.expose_secret()),
            None => request,
        }
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response> {
        self.within(async { request.send().await.map_err(from_transport) }).await
    }

    async fn within<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::time::timeout(self.answer_deadline, work).await.unwrap_or_else(|_| {
            let deadline = crate::error::seconds(self.answer_deadline);
            Err(down(format!("the package registry gave no answer in {deadline}")))
        })
    }

    async fn json<T: DeserializeOwned>(&self, response: Response) -> Result<T> {
        if !response.status().is_success() {
            return Err(from_status(response.status()));
        }
        let body = self.within(body(response)).await?;
        serde_json::from_slice(&body)
            .map_err(|error| down("the package registry's answer makes no sense").with_source(error))
    }
}

async fn body(mut response: Response) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(from_transport)? {
        if body.len() + chunk.len() > BODY_LIMIT_BYTES {
            return Err(down(format!("the package registry's answer is longer than {BODY_LIMIT_BYTES} bytes"))
                .with_retry(Retry::Never));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// An address without anything that a request must not carry.
pub(super) fn base(text: &str) -> Result<Url> {
    let invalid = |wanted: &str| Err(Error::invalid("DEPUTY_REGISTRY", wanted));
    let Ok(url) = Url::parse(text) else {
        return invalid("wants an address such as https://registry.example/");
    };
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return invalid("wants an http or https address");
    }
    // Not repeated in the message: what stands there may be a password.
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return invalid("wants an address without user, query and fragment");
    }
    Ok(url)
}

fn client(config: &Config) -> Result<Client> {
    let builder = http::builder(&config.certificates, "DEPUTY_CA_FILE", "the package registry")?
        .user_agent(concat!("ocr-core/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(config.connect_deadline)
        .read_timeout(config.stall_deadline);
    http::build(builder)
}

/// What only reads can always be asked for again.
pub(super) fn down(message: impl Into<String>) -> Error {
    Error::unavailable(message).with_reason(reason::REGISTRY_UNAVAILABLE)
}

/// The error for an answer that is none of the expected.
pub(super) fn from_status(status: StatusCode) -> Error {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Error::new(
            ErrorKind::Denied,
            format!("the package registry refuses us ({}); it may want another DEPUTY_TOKEN", status.as_u16()),
        ),
        StatusCode::NOT_FOUND => {
            Error::not_found("the package registry does not have it").with_reason(reason::PACKAGE_NOT_FOUND)
        }
        status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
            down(format!("the package registry answered {}", status.as_u16()))
        }
        status => down(format!(
            "the package registry answered {}; DEPUTY_REGISTRY may be the address of something else",
            status.as_u16()
        ))
        .with_retry(Retry::Never),
    }
}

/// The error for a request that got no answer, or an answer that broke off.
pub(super) fn from_transport(error: reqwest::Error) -> Error {
    // The address is said once, in the log at start.
    let error = error.without_url();
    if http::is_bad_certificate(&error) {
        return down(
            "the package registry's certificate cannot be verified; name its authority in DEPUTY_CA_FILE or set \
             GLOBAL_INSECURE",
        )
        .with_retry(Retry::Never)
        .with_source(error);
    }
    let message = if error.is_connect() {
        "the package registry cannot be reached"
    } else if error.is_timeout() {
        "the package registry stopped answering"
    } else if error.is_builder() {
        return Error::internal("the request to the package registry cannot be built").with_source(error);
    } else {
        "the connection to the package registry broke"
    };
    down(message).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api(url: &str) -> Result<Api> {
        Api::new(&Config::new(url, "unused"))
    }

    #[test]
    fn addresses_keep_their_own_path_and_names_stay_names() {
        for (url, want) in [
            ("http://h:9000", "http://h:9000/api/v1/package/a/1.0.0+x/download"),
            ("http://h:9000/", "http://h:9000/api/v1/package/a/1.0.0+x/download"),
            ("https://h/deputy", "https://h/deputy/api/v1/package/a/1.0.0+x/download"),
            ("https://h/deputy/", "https://h/deputy/api/v1/package/a/1.0.0+x/download"),
        ] {
            let request = api(url).unwrap().get(&["a", "1.0.0+x", "download"]).build().unwrap();
            assert_eq!(request.url().as_str(), want);
        }
        let request = api("http://h").unwrap().get(&["../../x", "?a=b"]).build().unwrap();
        assert_eq!(request.url().as_str(), "http://h/api/v1/package/..%2F..%2Fx/%3Fa=b");
    }

    #[test]
    fn an_address_with_a_password_is_refused_and_not_repeated() {
        for bad in ["", "h:9000", "ftp://h/", "http://user:canary@h/", "http://h/?token=canary", "http://h/#canary"] {
            let error = api(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}");
            assert!(error.message().starts_with("DEPUTY_REGISTRY: ") && !format!("{error:?}").contains("canary"));
        }
    }

    #[test]
    fn the_token_is_sent_and_never_shown() {
        let mut config = Config::new("http://h/", "unused");
        config.token = Some("canary".to_owned().into());
        let api = Api::new(&config).unwrap();
        let request = api.get(&[]).build().unwrap();
        assert_eq!(request.headers()[header::AUTHORIZATION], "Bearer canary");
        assert!(!format!("{config:?}{api:?}{request:?}").contains("canary"));
    }
}
