//! Tokens and catalogue, against Keystone's recorded answers.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail it")]

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{FutureExt, future::join_all};
use ocr_core::{Error, ErrorKind, Retry};
use ocr_openstack::{Config, Identity, Interface};
use secrecy::ExposeSecret;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinSet,
    time,
};

const APPLICATION: &str = include_str!("samples/auth_appcred_id_201.json");
const PASSWORD: &str = include_str!("samples/auth_password_domain_name_201.json");
const WRONG_PASSWORD: &str = include_str!("samples/auth_wrong_password_401.json");
const UNKNOWN_APPLICATION: &str = include_str!("samples/auth_appcred_unknown_404.json");
const TOO_LARGE: &str = include_str!("samples/auth_too_large_413.json");
const DATABASE_DOWN: &str = include_str!("samples/mysql_down_auth_500.json");

/// Answers every request with the sample set last, and keeps the requests. Ends when dropped.
struct Keystone {
    url: String,
    state: Arc<State>,
    _server: JoinSet<()>,
}

struct State {
    sample: Mutex<&'static str>,
    requests: Mutex<Vec<Value>>,
}

impl Keystone {
    async fn start(sample: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State { sample: Mutex::new(sample), requests: Mutex::default() });
        let mut server = JoinSet::new();
        let shared = state.clone();
        server.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((connection, _)) = listener.accept().await {
                connections.spawn(serve(connection, shared.clone()));
            }
        });
        Self { url, state, _server: server }
    }

    fn answer(&self, sample: &'static str) {
        *self.state.sample.lock().unwrap() = sample;
    }

    fn requests(&self) -> Vec<Value> {
        self.state.requests.lock().unwrap().clone()
    }

    fn identity(&self, changes: &[(&'static str, &str)]) -> Identity {
        let mut settings = HashMap::from([
            ("AUTH_URL", self.url.as_str()),
            ("CREDENTIAL_ID", "ca20d06770314c518f00b33f2d003834"),
            ("CREDENTIAL_SECRET", "REDACTED"),
            ("REGION", "RegionOne"),
            ("GATEWAY_NETWORK", "public"),
        ]);
        settings.extend(changes.iter().copied());
        let config = Config::from_lookup(|name| settings.get(name).map(ToString::to_string)).unwrap();
        Identity::new(&config).unwrap()
    }
}

async fn serve(connection: TcpStream, state: Arc<State>) {
    let mut connection = BufReader::new(connection);
    loop {
        let mut length = 0;
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if connection.read_line(&mut line).await.unwrap_or(0) == 0 {
                return;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().unwrap();
            }
            if line.trim().is_empty() {
                break;
            }
            lines.push(line);
        }
        assert!(lines[0].starts_with("POST /v3/auth/tokens HTTP/1.1"), "{}", lines[0]);
        let mut body = vec![0; length];
        connection.read_exact(&mut body).await.unwrap();
        let nth = {
            let mut requests = state.requests.lock().unwrap();
            requests.push(serde_json::from_slice(&body).unwrap());
            requests.len()
        };
        let sample = *state.sample.lock().unwrap();
        answer(&mut connection, sample, nth).await;
    }
}

/// Sends a recorded answer; the token, which is not in the record, is `token-` and the number of the request.
async fn answer(to: &mut (impl AsyncWrite + Unpin), sample: &str, nth: usize) {
    let sample: Value = serde_json::from_str(sample).unwrap();
    let response = &sample["response"];
    let body = match &response["body"] {
        Value::String(text) => text.clone(),
        json => json.to_string(),
    };
    let mut text = format!("HTTP/1.1 {} -\r\ncontent-length: {}\r\n", response["status"], body.len());
    for (name, value) in response["headers"].as_object().unwrap() {
        let token = format!("token-{nth}");
        let value = if name == "x-subject-token" { &token } else { value.as_str().unwrap() };
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    to.write_all(format!("{text}\r\n{body}").as_bytes()).await.unwrap();
}

fn recorded_request(sample: &str) -> Value {
    serde_json::from_str::<Value>(sample).unwrap()["request"].clone()
}

/// Lets time pass for the library and not for the sockets.
async fn pass(duration: Duration) {
    time::pause();
    time::advance(duration).await;
    time::resume();
}

async fn refusal(sample: &'static str) -> Error {
    let keystone = Keystone::start(sample).await;
    keystone.identity(&[]).session().await.unwrap_err()
}

#[tokio::test]
async fn an_application_credential_gets_a_token_and_the_catalogue() {
    let keystone = Keystone::start(APPLICATION).await;
    let session = keystone.identity(&[]).session().await.unwrap();
    assert_eq!(keystone.requests(), [recorded_request(APPLICATION)]);
    assert_eq!(session.token().expose_secret(), "token-1");
    assert_eq!(session.project_id(), Some("87ae7bf77d2a40e1b9a0bd4a3854b14e"));
    for (service, url) in [
        ("compute", "http://127.0.0.1:8774/v2.1"),
        ("network", "http://127.0.0.1:9696/"),
        ("image", "http://127.0.0.1:9292/"),
    ] {
        assert_eq!(session.endpoint(service, Interface::Public).unwrap().as_str(), url);
    }
}

#[tokio::test]
async fn a_password_gets_a_token_for_its_project() {
    let keystone = Keystone::start(PASSWORD).await;
    let identity = keystone.identity(&[("CREDENTIAL_ID", "demo"), ("DOMAIN", "Default"), ("PROJECT", "demo")]);
    identity.session().await.unwrap();
    assert_eq!(keystone.requests(), [recorded_request(PASSWORD)]);
}

#[tokio::test]
async fn a_wrong_region_names_the_right_ones_and_a_missing_service_is_said() {
    let keystone = Keystone::start(APPLICATION).await;
    let session = keystone.identity(&[("REGION", "Mars")]).session().await.unwrap();
    let error = session.endpoint("compute", Interface::Internal).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(error.message(), "REGION: \"Mars\" has no internal endpoint of compute; regions with one: RegionOne");
    let error = session.endpoint("volumev3", Interface::Public).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[tokio::test]
async fn keystones_refusals_are_denied_and_name_the_settings() {
    for sample in [WRONG_PASSWORD, UNKNOWN_APPLICATION] {
        let error = refusal(sample).await;
        assert_eq!((error.kind(), error.retry()), (ErrorKind::Denied, Retry::Never), "{error}");
        assert_eq!(error.operation(), Some("identity.authenticate"));
        assert!(error.message().contains("CREDENTIAL_ID"), "{error}");
        assert!(!format!("{error:?}").contains("REDACTED"), "{error:?}");
    }
}

#[tokio::test]
async fn other_answers_of_keystone_keep_their_kind() {
    let error = refusal(TOO_LARGE).await;
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Invalid, Retry::Never), "{error}");
    let error = refusal(DATABASE_DOWN).await;
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Unavailable, Retry::Safe), "{error}");
    assert!(error.to_string().contains("HTTP 500"), "{error}");
}

#[tokio::test]
async fn a_keystone_that_is_not_there_is_unavailable() {
    // Bound but not listening: nobody else can take the port.
    let nobody = TcpSocket::new_v4().unwrap();
    nobody.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("http://{}", nobody.local_addr().unwrap());
    let keystone = Keystone::start(APPLICATION).await;
    let error = keystone.identity(&[("AUTH_URL", &url)]).session().await.unwrap_err();
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Unavailable, Retry::Safe), "{error}");
    assert_eq!(error.resource(), Some(&*format!("{url}/v3")));
}

#[tokio::test]
async fn many_callers_ask_once() {
    let keystone = Keystone::start(APPLICATION).await;
    let identity = keystone.identity(&[]);
    for session in join_all((0..50).map(|_| identity.session())).await {
        assert_eq!(session.unwrap().token().expose_secret(), "token-1");
    }
    assert_eq!(keystone.requests().len(), 1);
}

#[tokio::test]
async fn many_callers_with_a_wrong_secret_ask_once_and_later_ones_again() {
    let keystone = Keystone::start(WRONG_PASSWORD).await;
    let identity = keystone.identity(&[]);
    let errors = join_all((0..50).map(|_| identity.session())).await;
    let texts: Vec<_> = errors.into_iter().map(|result| result.unwrap_err().to_string()).collect();
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
    assert_eq!(keystone.requests().len(), 1);
    keystone.answer(APPLICATION);
    identity.session().await.unwrap();
    assert_eq!(keystone.requests().len(), 2);
}

#[tokio::test]
async fn a_token_is_renewed_before_its_end() {
    // The recorded tokens last an hour.
    let keystone = Keystone::start(APPLICATION).await;
    let identity = keystone.identity(&[]);
    identity.session().await.unwrap();
    pass(Duration::from_secs(3290)).await;
    assert_eq!(identity.session().await.unwrap().token().expose_secret(), "token-1");
    pass(Duration::from_secs(20)).await;
    assert_eq!(identity.session().await.unwrap().token().expose_secret(), "token-2");
    assert_eq!(keystone.requests().len(), 2);
}

#[tokio::test]
async fn while_one_caller_renews_the_others_go_on_with_the_old_token() {
    let keystone = Keystone::start(APPLICATION).await;
    let identity = keystone.identity(&[]);
    identity.session().await.unwrap();
    pass(Duration::from_secs(3310)).await;
    let sessions = join_all((0..10).map(|_| identity.session())).await;
    let new = sessions.into_iter().filter(|session| session.as_ref().unwrap().token().expose_secret() == "token-2");
    assert_eq!((new.count(), keystone.requests().len()), (1, 2));
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_the_turn_to_the_next() {
    let keystone = Keystone::start(APPLICATION).await;
    let identity = keystone.identity(&[]);
    assert!(identity.session().now_or_never().is_none());
    time::timeout(Duration::from_secs(30), identity.session()).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_token_that_cannot_be_renewed_serves_until_its_end() {
    let keystone = Keystone::start(APPLICATION).await;
    let identity = keystone.identity(&[]);
    identity.session().await.unwrap();
    keystone.answer(DATABASE_DOWN);
    pass(Duration::from_secs(3310)).await;
    for _ in 0..5 {
        assert_eq!(identity.session().await.unwrap().token().expose_secret(), "token-1");
    }
    assert_eq!(keystone.requests().len(), 2, "after a failure there is a pause");
    pass(Duration::from_secs(300)).await;
    assert_eq!(identity.session().await.unwrap_err().kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn a_refused_token_is_replaced_once() {
    let keystone = Keystone::start(APPLICATION).await;
    let identity = keystone.identity(&[]);
    let first = identity.session().await.unwrap();
    identity.refused(&first);
    let second = identity.session().await.unwrap();
    assert_eq!(second.token().expose_secret(), "token-2");
    // A caller that comes late with the old one changes nothing.
    identity.refused(&first);
    assert!(Arc::ptr_eq(&second, &identity.session().await.unwrap()));
}

#[tokio::test]
async fn the_token_and_the_secret_are_in_no_debug_text() {
    let keystone = Keystone::start(APPLICATION).await;
    let identity = keystone.identity(&[("CREDENTIAL_SECRET", "canary")]);
    let session = identity.session().await.unwrap();
    let shown = format!("{identity:?} {session:?}");
    assert!(!shown.contains("canary") && !shown.contains("token-1"), "{shown}");
}
