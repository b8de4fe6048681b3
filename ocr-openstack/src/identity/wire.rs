//! Keystone's JSON, as far as it is used.

use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};

use crate::Credential;

// No `Debug`: this holds the secret in clear, for as long as a request takes.
#[derive(Serialize)]
pub(crate) struct AuthRequest<'a> {
    auth: Auth<'a>,
}

#[derive(Serialize)]
struct Auth<'a> {
    identity: Method<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<Scope<'a>>,
}

#[derive(Serialize)]
struct Method<'a> {
    methods: [&'static str; 1],
    #[serde(flatten)]
    proof: Proof<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Proof<'a> {
    ApplicationCredential { id: &'a str, secret: &'a str },
    Password { user: User<'a> },
}

#[derive(Serialize)]
struct User<'a> {
    name: &'a str,
    domain: Named<'a>,
    password: &'a str,
}

#[derive(Serialize)]
struct Scope<'a> {
    project: Project<'a>,
}

#[derive(Serialize)]
struct Project<'a> {
    name: &'a str,
    domain: Named<'a>,
}

#[derive(Serialize)]
struct Named<'a> {
    name: &'a str,
}

impl<'a> From<&'a Credential> for AuthRequest<'a> {
    fn from(credential: &'a Credential) -> Self {
        let (method, proof, scope) = match credential {
            // It belongs to a project; Keystone refuses a scope beside it.
            Credential::Application { id, secret } => {
                ("application_credential", Proof::ApplicationCredential { id, secret: secret.expose_secret() }, None)
            }
            Credential::Password { user, secret, domain, project } => {
                let user = User { name: user, domain: Named { name: domain }, password: secret.expose_secret() };
                let project = Project { name: project, domain: Named { name: domain } };
                ("password", Proof::Password { user }, Some(Scope { project }))
            }
        };
        Self { auth: Auth { identity: Method { methods: [method], proof }, scope } }
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct AuthAnswer {
    pub(crate) token: Token,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Token {
    pub(crate) issued_at: String,
    pub(crate) expires_at: String,
    pub(crate) project: Option<TokenProject>,
    #[serde(default)]
    pub(crate) catalog: Vec<Service>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct TokenProject {
    pub(crate) id: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Service {
    #[serde(rename = "type")]
    pub(crate) sort: String,
    #[serde(default)]
    pub(crate) endpoints: Vec<Endpoint>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Endpoint {
    pub(crate) interface: String,
    pub(crate) region_id: Option<String>,
    pub(crate) url: String,
}
