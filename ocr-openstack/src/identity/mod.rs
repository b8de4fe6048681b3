//! The token and the catalogue: got once for all callers, renewed in time.

mod api;
mod wire;

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError},
    time::Duration,
};

use ocr_core::{Error, ErrorKind, Result, Retry};
use reqwest::{Client, Url};
use secrecy::SecretString;
use tokio::{sync::Mutex, time::Instant};

use crate::{Config, Credential, http};

/// Renew this long before the end, or with a quarter of the lifetime left when that is less.
const RENEW_BEFORE: Duration = Duration::from_secs(300);
/// After a renewal that failed the old token serves for so long before the next try.
const RENEW_PAUSE: Duration = Duration::from_secs(10);

/// Keeps a valid [`Session`] at Keystone for all callers.
///
/// ```text
///          first call            5 min or a quarter left            end
///  (none) ------------> Fresh --------------------------> Due ---------> (none)
///    ^                   |  ^                              |
///    |   a service       |  |   one caller renews, others  |
///    +-- refused it -----+  +--- go on with the old one ---+
///        (`refused`)
/// ```
///
/// Nothing runs in the background: who finds the token due renews it.
pub struct Identity {
    client: Client,
    auth_url: Url,
    credential: Credential,
    region: Arc<str>,
    known: StdMutex<Known>,
    /// Held by the one caller that asks Keystone.
    turn: Mutex<()>,
}

#[derive(Default)]
struct Known {
    session: Option<Arc<Session>>,
    renew_not_before: Option<Instant>,
    /// How often Keystone has answered or failed to; tells waiters that their answer is there.
    asked: u64,
    /// How it failed the last time, when it did.
    failure: Option<Failure>,
}

/// What of an error can be told to all who waited for the same answer. The cause goes to the one who asked.
struct Failure {
    kind: ErrorKind,
    retry: Retry,
    message: String,
}

impl Known {
    fn valid(&self, now: Instant) -> Option<&Arc<Session>> {
        self.session.as_ref().filter(|session| now < session.ends)
    }

    fn is_due(&self, session: &Session, now: Instant) -> bool {
        now >= session.renew_at && self.renew_not_before.is_none_or(|begin| now >= begin)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("auth_url", &self.auth_url.as_str())
            .field("credential", &self.credential)
            .field("region", &self.region)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// Makes the client; asks nothing yet.
    ///
    /// # Errors
    /// `Invalid` naming `OCR_CA_FILE` when that cannot be used.
    pub fn new(config: &Config) -> Result<Self> {
        Ok(Self {
            client: http::client(&config.certificates)?,
            auth_url: config.auth_url.clone(),
            credential: config.credential.clone(),
            region: config.region.as_str().into(),
            known: StdMutex::default(),
            turn: Mutex::default(),
        })
    }

    /// A session whose token still lasts.
    ///
    /// Of many callers at once one asks Keystone and the others wait for its answer, good or bad: a wrong secret that is
    /// tried by a hundred callers locks the account.
    ///
    /// # Errors
    /// `Denied` when Keystone refuses the credential; `Unavailable` or `TimedOut` when it does not answer.
    pub async fn session(&self) -> Result<Arc<Session>> {
        let now = Instant::now();
        let (old, asked) = {
            let known = self.known();
            match known.valid(now) {
                Some(session) if !known.is_due(session, now) => return Ok(session.clone()),
                old => (old.cloned(), known.asked),
            }
        };
        let _turn = match (&old, self.turn.try_lock()) {
            (_, Ok(turn)) => turn,
            (Some(old), Err(_)) => return Ok(old.clone()),
            (None, Err(_)) => self.turn.lock().await,
        };
        if let Some(answer) = self.answer_since(asked) {
            return answer;
        }
        let answer = self.authenticate().await;
        let mut known = self.known();
        known.asked += 1;
        known.failure = None;
        match (answer, old) {
            (Ok(session), _) => {
                known.renew_not_before = None;
                Ok(known.session.insert(Arc::new(session)).clone())
            }
            (Err(error), Some(old)) if Instant::now() < old.ends => {
                tracing::warn!(%error, "the token could not be renewed; the old one still lasts");
                known.renew_not_before = Some(Instant::now() + RENEW_PAUSE);
                Ok(old)
            }
            (Err(error), _) => {
                let message = error.message().to_owned();
                known.failure = Some(Failure { kind: error.kind(), retry: error.retry(), message });
                Err(self.named(error))
            }
        }
    }

    /// Forgets a session whose token a service refused (401), so that the next caller gets a new one.
    pub fn refused(&self, session: &Arc<Session>) {
        let mut known = self.known();
        // Somebody else may have renewed it meanwhile.
        if known.session.as_ref().is_some_and(|current| Arc::ptr_eq(current, session)) {
            known.session = None;
        }
    }

    fn answer_since(&self, asked: u64) -> Option<Result<Arc<Session>>> {
        let known = self.known();
        if known.asked == asked {
            return None;
        }
        if let Some(session) = known.valid(Instant::now()) {
            return Some(Ok(session.clone()));
        }
        let Failure { kind, retry, message } = known.failure.as_ref()?;
        Some(Err(self.named(Error::new(*kind, message).with_retry(*retry))))
    }

    async fn authenticate(&self) -> Result<Session> {
        let began = Instant::now();
        let (secret, token) = api::authenticate(&self.client, &self.auth_url, &self.credential).await?;
        let lifetime = api::lifetime(&token)?;
        tracing::debug!(lifetime_s = lifetime.as_secs(), "got a token from Keystone");
        let ends = began + lifetime;
        Ok(Session {
            token: secret,
            project_id: token.project.map(|project| project.id),
            region: self.region.clone(),
            catalog: token.catalog,
            renew_at: ends - RENEW_BEFORE.min(lifetime / 4),
            ends,
        })
    }

    fn named(&self, error: Error) -> Error {
        error.during("identity.authenticate").on(self.auth_url.as_str())
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A token, and where the cloud's services are. Its `Debug` hides the token.
pub struct Session {
    token: SecretString,
    project_id: Option<String>,
    region: Arc<str>,
    catalog: Vec<wire::Service>,
    renew_at: Instant,
    ends: Instant,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("project_id", &self.project_id).finish_non_exhaustive()
    }
}

/// Whom an endpoint is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interface {
    /// Everybody.
    Public,
    /// Machines inside the cloud's own network.
    Internal,
    /// Operators.
    Admin,
}

impl Interface {
    fn as_str(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Internal => "internal",
            Self::Admin => "admin",
        }
    }
}

impl Session {
    /// The token, for the header `X-Auth-Token`.
    pub fn token(&self) -> &SecretString {
        &self.token
    }

    /// The project that the token is for.
    pub fn project_id(&self) -> Option<&str> {
        self.project_id.as_deref()
    }

    /// Where a service is, by its type (`compute`, `network`, `image`), in our region.
    ///
    /// # Errors
    /// `Unsupported` when the cloud has no such service; `Invalid` naming `REGION`, with the regions that there are,
    /// when our region has no such endpoint.
    pub fn endpoint(&self, service: &str, interface: Interface) -> Result<Url> {
        let mut regions = BTreeSet::new();
        for endpoint in self.catalog.iter().filter(|known| known.sort == service).flat_map(|known| &known.endpoints) {
            if endpoint.interface != interface.as_str() {
                continue;
            }
            let region = endpoint.region_id.as_deref().unwrap_or_default();
            if region == &*self.region {
                return Url::parse(&endpoint.url).map_err(|error| {
                    Error::internal(format!("the catalogue's address of {service} makes no sense")).with_source(error)
                });
            }
            regions.insert(region);
        }
        let interface = interface.as_str();
        if regions.is_empty() {
            return Err(Error::unsupported(format!("the catalogue has no {interface} endpoint of {service}")));
        }
        let regions = regions.into_iter().collect::<Vec<_>>().join(", ");
        Err(Error::invalid(
            "REGION",
            format_args!("{:?} has no {interface} endpoint of {service}; regions with one: {regions}", &*self.region),
        ))
    }
}
