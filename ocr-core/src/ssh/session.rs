//! One connection: reached, its host key checked, logged in.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use russh::{
    Disconnect, MethodKind, Preferred,
    client::{self, AuthResult, Handle, KeyboardInteractiveAuthResponse, Msg},
    keys::{Algorithm, HashAlg, PrivateKeyWithHashAlg, PublicKeyOrCertificate},
};
use secrecy::ExposeSecret;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{OnceCell, OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use super::{
    address::{Endpoint, not_ready},
    key,
    pin::{Host, HostKeys},
};
use crate::{Error, ErrorKind, Result, Retry, credentials::Credentials, id::shown};

/// Commands at once on one connection. OpenSSH refuses more than ten (`MaxSessions`).
const MAX_CHANNELS: usize = 8;

/// Rounds of questions that are answered with the password: usual servers ask once.
const MAX_ROUNDS: usize = 4;

/// Messages of one channel that wait for its reader. Those of all channels of a connection wait behind them.
const CHANNEL_BUFFER: usize = 256;

/// A connection that is logged in.
#[derive(Debug)]
pub(super) struct Session {
    handle: Closing,
    /// For people: `root@10.0.0.5:22`.
    pub(super) name: String,
    /// What the server calls itself, such as `SSH-2.0-OpenSSH_9.2p1`.
    pub(super) version: String,
    /// Places for commands.
    pub(super) channels: Arc<Semaphore>,
    /// What was learnt of the account there, once.
    pub(super) account: OnceCell<super::login::Login>,
    /// Whether something went wrong on it, so that it serves nobody new.
    tainted: AtomicBool,
    used: Mutex<Instant>,
    /// The jump host's connection that this one goes through; it lives as long.
    _through: Option<Arc<Session>>,
    _permit: Option<OwnedSemaphorePermit>,
}

/// How connections are made.
#[derive(Clone, Debug)]
pub(super) struct Dial {
    pub(super) keys: HostKeys,
    pub(super) keepalive: Duration,
    pub(super) keepalive_max: usize,
}

/// Why there is no connection.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The account was not let in.
    Login(String),
    /// Something else.
    Other(Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// What a connection's task fails with.
#[derive(Debug)]
enum Fault {
    Ssh(russh::Error),
    /// The host key was not accepted.
    HostKey(Error),
}

impl From<russh::Error> for Fault {
    fn from(error: russh::Error) -> Self {
        Self::Ssh(error)
    }
}

/// Answers the server while the connection lives.
struct Client {
    host: Host,
    keys: HostKeys,
    version: Arc<Mutex<String>>,
}

impl client::Handler for Client {
    type Error = Fault;

    async fn check_server_key(&mut self, presented: &PublicKeyOrCertificate) -> Result<bool, Fault> {
        self.keys.check(&self.host, &presented.public_key()).await.map(|()| true).map_err(Fault::HostKey)
    }

    async fn kex_done(
        &mut self,
        _secret: Option<&[u8]>,
        _names: &russh::Names,
        session: &mut client::Session,
    ) -> Result<(), Fault> {
        let version = String::from_utf8_lossy(session.remote_sshid()).trim().to_owned();
        *self.version.lock().unwrap_or_else(PoisonError::into_inner) = version;
        Ok(())
    }

    // We ask for no forwarding, so whoever opens a channel to us is refused: what is dropped is.

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        _channel: russh::Channel<Msg>,
        _connected_address: &str,
        _connected_port: u32,
        _originator_address: &str,
        _originator_port: u32,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), Fault> {
        Ok(())
    }

    async fn server_channel_open_forwarded_streamlocal(
        &mut self,
        _channel: russh::Channel<Msg>,
        _socket_path: &str,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), Fault> {
        Ok(())
    }

    async fn server_channel_open_agent_forward(
        &mut self,
        _channel: russh::Channel<Msg>,
        _reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), Fault> {
        Ok(())
    }
}

/// Says good-bye when it is dropped, where that costs no waiting. The socket is closed in any case.
struct Closing(Handle<Client>);

impl std::fmt::Debug for Closing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").field("closed", &self.0.is_closed()).finish()
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        use futures::FutureExt;

        let _ = self.0.disconnect(Disconnect::ByApplication, "", "").now_or_never();
    }
}

impl Dial {
    /// Reaches a server, over another one where given, and logs in.
    pub(super) async fn connect(
        &self,
        host: Host,
        at: &Endpoint,
        credentials: &Credentials,
        through: Option<Arc<Session>>,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<Session, Refusal> {
        let pinned = self.keys.known(&host).await?;
        let mut preferred = Preferred::DEFAULT;
        if let Some(pinned) = &pinned {
            // Another kind of key that the server has as well must not look like a changed one.
            let same = |algorithm: &&Algorithm| match algorithm {
                Algorithm::Rsa { .. } => pinned.algorithm().is_rsa(),
                algorithm => pinned.algorithm() == **algorithm,
            };
            preferred.key = preferred.key.iter().filter(same).cloned().collect();
        }
        let config = Arc::new(client::Config {
            preferred,
            keepalive_interval: Some(self.keepalive),
            keepalive_max: self.keepalive_max,
            channel_buffer_size: CHANNEL_BUFFER,
            nodelay: true,
            ..client::Config::default()
        });
        let version = Arc::new(Mutex::new(String::new()));
        let client = Client { host: host.clone(), keys: self.keys.clone(), version: Arc::clone(&version) };
        let handle = match &through {
            None => {
                let socket = TcpStream::connect((at.host.as_str(), at.port)).await.map_err(|cause| {
                    not_ready(format!("there is no connection to {at}: {}", plain(&cause))).with_source(cause)
                })?;
                let _ = socket.set_nodelay(true);
                shake(config, socket, client).await
            }
            Some(jump) => {
                let stream = jump.tunnel(at).await?.into_stream();
                shake(config, stream, client).await
            }
        };
        let mut handle = handle.map_err(|fault| match fault {
            Fault::HostKey(error) => error,
            Fault::Ssh(russh::Error::NoCommonAlgo { kind: russh::AlgorithmKind::Key, .. }) if pinned.is_some() => {
                pinned
                    .as_ref()
                    .map_or_else(|| Error::internal("no pin"), |pinned| HostKeys::kind_is_gone(&host, pinned))
            }
            Fault::Ssh(cause @ russh::Error::NoCommonAlgo { .. }) => {
                Error::unsupported(format!("the SSH server at {at} knows none of our algorithms")).with_source(cause)
            }
            Fault::Ssh(cause) => {
                not_ready(format!("the SSH server at {at} did not get through its greeting")).with_source(cause)
            }
        })?;
        login(&mut handle, at, credentials).await?;
        let version = version.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let handle = Closing(handle);
        Ok(Session {
            handle,
            name: format!("{}@{at}", credentials.user),
            version,
            channels: Arc::new(Semaphore::new(MAX_CHANNELS)),
            account: OnceCell::new(),
            tainted: AtomicBool::new(false),
            used: Mutex::new(Instant::now()),
            _through: through,
            _permit: permit,
        })
    }
}

async fn shake<R: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    config: Arc<client::Config>,
    stream: R,
    client: Client,
) -> Result<Handle<Client>, Fault> {
    client::connect_stream(config, stream, client).await
}

/// The cause without the system's number.
fn plain(cause: &std::io::Error) -> String {
    match cause.kind() {
        std::io::ErrorKind::ConnectionRefused => "refused".to_owned(),
        std::io::ErrorKind::TimedOut => "no answer".to_owned(),
        std::io::ErrorKind::HostUnreachable | std::io::ErrorKind::NetworkUnreachable => "no route".to_owned(),
        kind => kind.to_string(),
    }
}

/// Tries what there is, the key first.
async fn login(handle: &mut Handle<Client>, at: &Endpoint, credentials: &Credentials) -> Result<(), Refusal> {
    let lost = |cause: russh::Error| -> Refusal {
        not_ready(format!("the SSH server at {at} closed the connection during login")).with_source(cause).into()
    };
    let user = credentials.user.as_str();
    let mut refused = Vec::new();
    // What the server still takes; it says so with each refusal.
    let mut takes: Option<Vec<MethodKind>> = None;
    if let Some(text) = &credentials.private_key {
        let key = key::parse(text)?;
        let hash = match key.algorithm().is_rsa() {
            // A server that does not say knows SHA-2, or is older than anything that is looked after.
            true => handle.best_supported_rsa_hash().await.map_err(lost)?.unwrap_or(Some(HashAlg::Sha512)),
            false => None,
        };
        match handle.authenticate_publickey(user, PrivateKeyWithHashAlg::new(key, hash)).await.map_err(lost)? {
            AuthResult::Success => return Ok(()),
            AuthResult::Failure { remaining_methods, partial_success } => {
                if !partial_success {
                    refused.push("the private key");
                }
                takes = Some(remaining_methods.to_vec());
            }
        }
    }
    let may = |takes: &Option<Vec<MethodKind>>, method| takes.as_ref().is_none_or(|takes| takes.contains(&method));
    if let Some(password) = &credentials.password {
        let password = password.expose_secret();
        if !handle.is_closed() && may(&takes, MethodKind::Password) {
            match handle.authenticate_password(user, password).await.map_err(lost)? {
                AuthResult::Success => return Ok(()),
                AuthResult::Failure { remaining_methods, partial_success } => {
                    // A server that takes none says so in the same words; it did not look at ours then.
                    if !partial_success && (takes.is_some() || remaining_methods.contains(&MethodKind::Password)) {
                        refused.push("the password");
                    }
                    takes = Some(remaining_methods.to_vec());
                }
            }
        }
        if !handle.is_closed() && may(&takes, MethodKind::KeyboardInteractive) && !refused.contains(&"the password") {
            let asked = Box::pin(answer(handle, user, password)).await.map_err(lost)?;
            if asked {
                return Ok(());
            }
            refused.push("the password");
        }
    }
    if handle.is_closed() {
        return Err(lost(russh::Error::Disconnect));
    }
    let takes: Vec<&'static str> = takes.iter().flatten().map(Into::into).collect();
    let refused = match refused.as_slice() {
        [] if credentials.has_secret() => "it takes nothing that there is for this account".to_owned(),
        [] => "there is neither a password nor a private key for this account".to_owned(),
        refused => format!("it refused {}", refused.join(" and ")),
    };
    let takes = if takes.is_empty() { String::new() } else { format!("; it takes {}", takes.join(", ")) };
    Err(Refusal::Login(format!("the SSH server at {at} does not let {} in: {refused}{takes}", shown(user))))
}

/// Answers questions with the password. Whether that was enough.
async fn answer(handle: &mut Handle<Client>, user: &str, password: &str) -> Result<bool, russh::Error> {
    let mut reply = handle.authenticate_keyboard_interactive_start(user, None).await?;
    for _ in 0..MAX_ROUNDS {
        let prompts = match reply {
            KeyboardInteractiveAuthResponse::Success => return Ok(true),
            KeyboardInteractiveAuthResponse::Failure { .. } => return Ok(false),
            KeyboardInteractiveAuthResponse::InfoRequest { prompts, .. } => prompts,
        };
        // A question whose answer may be seen is not for a password.
        let answers = prompts.iter().map(|prompt| if prompt.echo { String::new() } else { password.to_owned() });
        reply = handle.authenticate_keyboard_interactive_respond(answers.collect()).await?;
    }
    Ok(matches!(reply, KeyboardInteractiveAuthResponse::Success))
}

impl Session {
    /// Whether it can serve somebody new.
    pub(super) fn is_usable(&self) -> bool {
        !self.handle.0.is_closed() && !self.tainted.load(Ordering::Relaxed)
    }

    /// Keeps it from serving anybody new.
    pub(super) fn taint(&self) {
        self.tainted.store(true, Ordering::Relaxed);
    }

    pub(super) fn touch(&self) {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    pub(super) fn used(&self) -> Instant {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn open(&self) -> Result<russh::Channel<Msg>, russh::Error> {
        self.handle.0.channel_open_session().await
    }

    /// A connection from here to a server beyond.
    async fn tunnel(&self, at: &Endpoint) -> Result<russh::Channel<Msg>> {
        use russh::ChannelOpenFailure::AdministrativelyProhibited;

        let opened = self.handle.0.channel_open_direct_tcpip(at.host.clone(), at.port.into(), "127.0.0.1", 0).await;
        opened.map_err(|cause| match cause {
            russh::Error::ChannelOpenFailure(AdministrativelyProhibited) => Error::new(
                ErrorKind::Denied,
                format!("the jump host {} does not let us go on to {at} (AllowTcpForwarding, PermitOpen)", self.name),
            ),
            russh::Error::ChannelOpenFailure(_) => {
                not_ready(format!("the jump host {} has no connection to {at}", self.name))
            }
            cause => {
                self.taint();
                not_ready(format!("the connection to the jump host {} was lost", self.name)).with_source(cause)
            }
        })
    }
}

/// The error for an account that was not let in.
pub(super) fn denied(why: String) -> Error {
    Error::new(ErrorKind::Denied, why).with_retry(Retry::Never)
}
