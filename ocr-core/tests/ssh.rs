//! SSH against real OpenSSH servers: logins, host keys, jump hosts, cut connections.
#![cfg(feature = "ssh")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests: a fault ends them, and what is ignored is told")]

mod ssh_rig;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt;
use ocr_core::{
    ErrorKind, ExecRequest, GuestExec, GuestExecExt, PutFile, Retry, StateStore, VmId,
    credentials::{CredentialSink, Credentials, MemoryCredentials},
    error::reason,
    exec,
    memory::MemoryState,
    package::LocalFolder,
    queue::scheduler::{Scheduler, SchedulerConfig},
    ssh::{Addresses, ComputeAddresses, Endpoint, HostKeys, Jump, SshConfig, SshGuest},
};
use ssh_rig::{BOOT, Cloud, Keys, PASSWORD, Setup, Wire, WireState, ignored};

/// A cloud of guests, and what acts in them.
struct Rig {
    cloud: Cloud,
    store: Arc<MemoryState>,
    book: Arc<MemoryCredentials>,
}

impl Rig {
    fn new(setup: Setup, root: Option<Credentials>) -> Self {
        Self { cloud: Cloud::new(setup), store: Arc::default(), book: Arc::new(MemoryCredentials::new(root)) }
    }

    fn guest(&self, config: &SshConfig) -> SshGuest {
        let addresses = ComputeAddresses::new(Arc::new(self.cloud.clone())).with_port(self.cloud.port);
        SshGuest::new(Arc::new(addresses), self.book.clone(), HostKeys::new(self.store.clone()), config)
    }

    /// A machine whose SSH server answers.
    async fn machine(&self, name: &str) -> VmId {
        let vm = self.cloud.machine(name).await;
        self.cloud.with(vm, |guest| guest.wait()).await;
        vm
    }
}

fn config() -> SshConfig {
    SshConfig { connect_limit: BOOT, login_grace: Duration::ZERO, ..SshConfig::default() }
}

fn root(key: &str) -> Credentials {
    Credentials::of("root").with_private_key(key.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_any_usual_form_opens_the_guest() {
    if ignored() {
        return;
    }
    let keys = Keys::new();
    let made = [
        keys.ed25519("ed25519"),
        keys.make("ecdsa", &["-t", "ecdsa", "-N", ""]),
        keys.make("rsa", &["-t", "rsa", "-b", "2048", "-N", ""]),
        keys.make("rsa-pem", &["-t", "rsa", "-b", "2048", "-m", "PEM", "-N", ""]),
        keys.make("rsa-pkcs8", &["-t", "rsa", "-b", "2048", "-m", "PKCS8", "-N", ""]),
        keys.make("ecdsa-pem", &["-t", "ecdsa", "-m", "PEM", "-N", ""]),
        keys.make("ecdsa-pkcs8", &["-t", "ecdsa", "-m", "PKCS8", "-N", ""]),
    ];
    let setup = Setup { authorized: made.iter().map(|(_, public)| public.clone()).collect(), ..Setup::default() };
    let rig = Rig::new(setup, None);
    let vm = rig.machine("a").await;
    for (text, public) in &made {
        rig.book.remember(vm, root(text)).await.unwrap();
        let info = rig.guest(&config()).guest_info(vm).await;
        let info = info.unwrap_or_else(|error| panic!("{public}: {error}\n{text}"));
        assert!(info.agent_version.starts_with("SSH-2.0-OpenSSH"), "{info:?}");
        assert_eq!(info.os_name, "Debian for tests");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_with_a_passphrase_or_no_key_at_all_is_refused_before_anything_is_sent() {
    if ignored() {
        return;
    }
    let keys = Keys::new();
    let (_, public) = keys.ed25519("good");
    let rig = Rig::new(Setup::with_key(&public), None);
    let vm = rig.machine("a").await;
    let guarded = [
        keys.make("openssh", &["-t", "ed25519", "-N", "secret"]).0,
        keys.make("pem", &["-t", "rsa", "-m", "PEM", "-N", "secret"]).0,
        keys.make("pkcs8", &["-t", "ecdsa", "-m", "PKCS8", "-N", "secret"]).0,
    ];
    for text in &guarded {
        rig.book.remember(vm, root(text)).await.unwrap();
        let error = rig.guest(&config()).guest_info(vm).await.unwrap_err();
        assert_eq!((error.kind(), error.retry()), (ErrorKind::Invalid, Retry::Never), "{error}");
        assert!(error.message().contains("passphrase"), "{error}\n{text}");
    }
    for (text, word) in [(public.as_str(), "public key"), ("canary", "no private key")] {
        rig.book.remember(vm, root(text)).await.unwrap();
        let error = rig.guest(&config()).guest_info(vm).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.message().contains(word) && !format!("{error:?}").contains("canary"), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_is_denied_and_the_error_says_what_the_server_takes() {
    if ignored() {
        return;
    }
    let keys = Keys::new();
    let rig = Rig::new(Setup::with_key(&keys.ed25519("good").1), Some(root(&keys.ed25519("wrong").0)));
    let vm = rig.machine("a").await;
    let error = rig.guest(&config()).guest_info(vm).await.unwrap_err();
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Denied, Retry::Never), "{error}");
    for word in ["root", "refused the private key", "takes publickey"] {
        assert!(error.message().contains(word), "{word} in {error}");
    }
    // A guest that still boots may learn the account in a moment.
    let grace = SshConfig { login_grace: BOOT, ..config() };
    let error = rig.guest(&grace).guest_info(vm).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Unavailable, Some(reason::AGENT_NOT_READY)), "{error}");
    assert_eq!(error.retry(), Retry::Safe, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_opens_the_guest_by_either_method() {
    if ignored() {
        return;
    }
    let keys = Keys::new();
    let (wrong, _) = keys.ed25519("wrong");
    for (line, also) in
        [("PasswordAuthentication yes", "UsePAM no"), ("KbdInteractiveAuthentication yes", "UsePAM yes")]
    {
        let setup = Setup::default().config(line).config(also);
        let rig = Rig::new(setup, Some(Credentials::of("root").with_password(PASSWORD.to_owned())));
        let vm = rig.machine("a").await;
        let log = |rig: &Rig| rig.cloud.guest(vm).lock().unwrap().log();
        rig.guest(&config()).guest_info(vm).await.unwrap_or_else(|error| panic!("{line}: {error}\n{}", log(&rig)));
        // After a key that is refused, on the same connection.
        let both = rig_of(&rig, root(&wrong).with_password(PASSWORD.to_owned()));
        both.guest(&config()).guest_info(vm).await.unwrap_or_else(|error| panic!("{line}: {error}"));
        let bad = rig_of(&rig, Credentials::of("root").with_password("canary-wrong".to_owned()));
        let error = bad.guest(&config()).guest_info(vm).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{line}: {error}");
        assert!(error.message().contains("refused the password"), "{line}: {error}");
        assert!(!format!("{error:?}").contains("canary"), "{error:?}");
    }
}

/// The same guests with other credentials.
fn rig_of(rig: &Rig, root: Credentials) -> Rig {
    Rig { cloud: rig.cloud.clone(), store: Arc::clone(&rig.store), book: Arc::new(MemoryCredentials::new(Some(root))) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_and_then_a_password_are_given_to_a_server_that_wants_both() {
    if ignored() {
        return;
    }
    let keys = Keys::new();
    let (key, public) = keys.ed25519("good");
    let setup = Setup::with_key(&public)
        .config("PasswordAuthentication yes")
        .config("AuthenticationMethods publickey,password");
    let rig = Rig::new(setup, Some(root(&key).with_password(PASSWORD.to_owned())));
    let vm = rig.machine("a").await;
    rig.guest(&config()).guest_info(vm).await.unwrap();
    let error = rig_of(&rig, root(&key)).guest(&config()).guest_info(vm).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    assert!(error.message().contains("takes password"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_key_is_pinned_at_first_contact_and_another_one_is_refused() {
    if ignored() {
        return;
    }
    let keys = Keys::new();
    let (key, public) = keys.ed25519("good");
    let rig = Rig::new(Setup::with_key(&public), Some(root(&key)));
    let vm = rig.machine("a").await;
    // Several first contacts at once agree on one key.
    let contacts = (0..4).map(|_| {
        let guest = rig.guest(&config());
        tokio::spawn(async move { guest.guest_info(vm).await })
    });
    for contact in contacts.collect::<Vec<_>>() {
        contact.await.unwrap().unwrap();
    }
    let pins = rig.store.list("ssh_pin/", None, 10).await.unwrap();
    assert_eq!(pins.len(), 1, "{pins:?}");
    let stored = String::from_utf8(pins[0].1.value.to_vec()).unwrap();
    assert!(stored.contains("ssh-ed25519 AAAA"), "{stored}");
    // The same machine after a reboot, with the same disk.
    rig.cloud.with(vm, |guest| (guest.power_off(), guest.power_on(), guest.wait())).await;
    rig.guest(&config()).guest_info(vm).await.unwrap();
    // Another machine in its place.
    rig.cloud.with(vm, |guest| (guest.power_off(), guest.renew_host_keys(), guest.power_on(), guest.wait())).await;
    let error = rig.guest(&config()).guest_info(vm).await.unwrap_err();
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Denied, Retry::Never), "{error}");
    for word in ["pinned SHA256:", "shown SHA256:", "remove the record", pins[0].0.as_str()] {
        assert!(error.message().contains(word), "{word} in {error}");
    }
    // It was let in by nobody: the server never saw an account.
    let log = rig.cloud.guest(vm).lock().unwrap().log();
    let after = log.rsplit("Server listening").next().unwrap();
    assert!(!after.contains("Accepted"), "{after}");
    HostKeys::new(rig.store.clone()).forget(vm).await.unwrap();
    rig.guest(&config()).guest_info(vm).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_shows_a_key_of_another_kind_must_have_the_pinned_one_too() {
    if ignored() {
        return;
    }
    let keys = Keys::new();
    let (key, public) = keys.ed25519("good");
    let rig = Rig::new(Setup::with_key(&public).config("HostKeyAlgorithms ecdsa-sha2-nistp256"), Some(root(&key)));
    let vm = rig.machine("a").await;
    rig.guest(&config()).guest_info(vm).await.unwrap();
    let restart = |line: &'static str| {
        rig.cloud.with(vm, move |guest| {
            guest.power_off();
            let file = guest.root().join("etc/ssh/sshd_config");
            let text = std::fs::read_to_string(&file).unwrap();
            let rest: Vec<_> = text.lines().filter(|line| !line.starts_with("HostKeyAlgorithms")).collect();
            std::fs::write(&file, format!("{line}\n{}\n", rest.join("\n"))).unwrap();
            guest.power_on();
            guest.wait();
        })
    };
    // Of two kinds, where we like the other one better.
    restart("HostKeyAlgorithms ssh-ed25519,ecdsa-sha2-nistp256").await;
    rig.guest(&config()).guest_info(vm).await.unwrap();
    restart("HostKeyAlgorithms ssh-ed25519").await;
    let error = rig.guest(&config()).guest_info(vm).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    assert!(error.message().contains("another kind"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jump_host_is_gone_through_and_its_key_is_pinned_too() {
    if ignored() {
        return;
    }
    let keys = Keys::new();
    let ((key, public), (jump_key, jump_public)) = (keys.ed25519("guest"), keys.ed25519("jump"));
    let rig = Rig::new(Setup::with_key(&public), Some(root(&key)));
    let vm = rig.machine("a").await;
    let jumps = Cloud::new(Setup::with_key(&jump_public));
    let jump = jumps.machine("jump").await;
    jumps.with(jump, |guest| guest.wait()).await;
    let at = jumps.guest(jump).lock().unwrap().at;
    let user = Credentials::of("user").with_private_key(jump_key);
    let through = |credentials: &Credentials| SshConfig {
        jump: Some(Jump { at: Endpoint::new(at.ip().to_string(), at.port()), credentials: credentials.clone() }),
        ..config()
    };
    rig.guest(&through(&user)).guest_info(vm).await.unwrap();
    let pins = rig.store.list("ssh_pin/jump/", None, 10).await.unwrap();
    assert_eq!(pins.len(), 1, "{pins:?}");
    // The guest saw the jump host's connection: both are on this machine, but the log of the jump host has it.
    let log = jumps.guest(jump).lock().unwrap().log();
    assert!(log.contains("Accepted publickey for user"), "{log}");

    let error = rig.guest(&through(&Credentials::of("user"))).guest_info(vm).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    assert!(error.message().contains("jump host"), "{error}");
    // The jump host is there and the guest is not.
    rig.cloud.with(vm, |guest| guest.power_off()).await;
    let error = rig.guest(&through(&user)).guest_info(vm).await.unwrap_err();
    assert_eq!(error.reason(), Some(reason::AGENT_NOT_READY), "{error}");
    assert!(error.message().contains("jump host"), "{error}");
    // A jump host that may not forward.
    rig.cloud.with(vm, |guest| (guest.power_on(), guest.wait())).await;
    let closed = Cloud::new(Setup::with_key(&jump_public).config("AllowTcpForwarding no"));
    let jump = closed.machine("closed").await;
    closed.with(jump, |guest| guest.wait()).await;
    let at = closed.guest(jump).lock().unwrap().at;
    let jump = Jump { at: Endpoint::new(at.ip().to_string(), at.port()), credentials: user };
    let error = rig.guest(&SshConfig { jump: Some(jump), ..config() }).guest_info(vm).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    assert!(error.message().contains("AllowTcpForwarding"), "{error}");
}

/// A machine behind a wire, and what acts in it.
struct Wired {
    rig: Rig,
    vm: VmId,
    wire: Wire,
}

#[derive(Debug)]
struct Fixed(Endpoint);

#[async_trait::async_trait]
impl Addresses for Fixed {
    async fn locate(&self, _vm: VmId) -> ocr_core::Result<Endpoint> {
        Ok(self.0.clone())
    }
}

impl Wired {
    async fn new() -> Self {
        let (key, public) = Keys::new().ed25519("good");
        let rig = Rig::new(Setup::with_key(&public), Some(root(&key)));
        let vm = rig.machine("a").await;
        let at = rig.cloud.guest(vm).lock().unwrap().at;
        Self { rig, vm, wire: Wire::to(at).await }
    }

    fn guest(&self, config: &SshConfig) -> SshGuest {
        let at = Endpoint::new(self.wire.at.ip().to_string(), self.wire.at.port());
        SshGuest::new(Arc::new(Fixed(at)), self.rig.book.clone(), HostKeys::new(self.rig.store.clone()), config)
    }

    /// Waits until a file is in the guest, seen from outside.
    async fn appears(&self, path: &str) {
        let file = self.rig.cloud.guest(self.vm).lock().unwrap().root().join(path);
        let end = Instant::now() + BOOT;
        while !file.exists() {
            assert!(Instant::now() < end, "{path} does not appear");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.rig.cloud.guest(self.vm).lock().unwrap().root().join(path)).unwrap()
    }
}

/// Runs once, says so in a file, and ends when it is told to.
const LONG: &str = "echo run >> /tmp/runs; until [ -e /tmp/go ]; do sleep 0.05; done; echo done";

#[tokio::test(flavor = "multi_thread")]
async fn a_command_whose_connection_is_cut_is_not_run_again_and_its_result_is_fetched() {
    if ignored() {
        return;
    }
    let wired = Wired::new().await;
    // A connection that is closed, and one that only falls silent.
    for state in [WireState::Cut, WireState::Silent] {
        let guest = wired.guest(&SshConfig { keepalive: Duration::from_millis(200), keepalive_max: 2, ..config() });
        let request = ExecRequest::shell(LONG);
        let vm = wired.vm;
        let run = tokio::spawn(async move { guest.exec(vm, &request).await });
        wired.appears("tmp/runs").await;
        wired.wire.set(state);
        // It ends while nobody is connected.
        let root = wired.rig.cloud.guest(vm).lock().unwrap().root().to_owned();
        std::fs::write(root.join("tmp/go"), "").unwrap();
        let ended = |root: &std::path::Path| {
            let results = std::fs::read_dir(root.join("var/lib/ocr/ops")).unwrap().flatten();
            let mut results = results.filter(|file| file.path().extension().is_some_and(|name| name == "result"));
            results.any(|file| std::fs::read_to_string(file.path()).unwrap().starts_with("done"))
        };
        let end = Instant::now() + BOOT;
        while !ended(&root) {
            assert!(Instant::now() < end, "the command does not end");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(!run.is_finished(), "{state:?}: a result came over a wire that carries nothing");
        wired.wire.set(WireState::Fine);
        let output = run.await.unwrap().unwrap();
        assert_eq!((output.exit_code, output.stdout.as_ref()), (0, b"done\n".as_ref()), "{state:?}");
        assert_eq!(wired.read("tmp/runs"), "run\n", "{state:?}");
        std::fs::remove_file(root.join("tmp/runs")).unwrap();
        std::fs::remove_file(root.join("tmp/go")).unwrap();
        std::fs::remove_dir_all(root.join("var/lib/ocr/ops")).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_went_stale_costs_one_more_and_no_error() {
    if ignored() {
        return;
    }
    let wired = Wired::new().await;
    let guest = wired.guest(&config());
    guest.shell(wired.vm, "true").await.unwrap();
    wired.wire.cut_once().await;
    assert_eq!(guest.shell(wired.vm, "echo here").await.unwrap().stdout, "here\n");
    assert_eq!(guest.connections(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_answers_is_not_ready_within_the_connect_limit() {
    if ignored() {
        return;
    }
    let wired = Wired::new().await;
    let guest = wired.guest(&SshConfig { connect_limit: Duration::from_millis(500), ..config() });
    wired.wire.set(WireState::Silent);
    let begin = Instant::now();
    let error = guest.shell(wired.vm, "true").await.unwrap_err();
    assert_eq!((error.reason(), error.retry()), (Some(reason::AGENT_NOT_READY), Retry::Safe), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    wired.wire.set(WireState::Fine);
    guest.guest_info(wired.vm).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_past_its_deadline_is_ended_also_while_the_connection_is_away() {
    if ignored() {
        return;
    }
    let wired = Wired::new().await;
    let guest = wired.guest(&config());
    let line = "echo $$ > /tmp/pid; sleep 600; sleep 601";
    let request = ExecRequest { deadline: Duration::from_secs(2), ..ExecRequest::shell(line) };
    let run = guest.exec(wired.vm, &request);
    let cut = async {
        wired.appears("tmp/pid").await;
        wired.wire.set(WireState::Cut);
        tokio::time::sleep(Duration::from_secs(3)).await;
        wired.wire.set(WireState::Fine);
    };
    let (error, ()) = tokio::join!(run, cut);
    let error = error.unwrap_err();
    assert_eq!((error.kind(), error.retry()), (ErrorKind::TimedOut, Retry::Never), "{error}");
    let left = guest.shell(wired.vm, "kill -0 $(cat /tmp/pid) 2>/dev/null && echo alive; true").await.unwrap();
    assert_eq!(left.stdout, "", "the command still runs");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_bounded_shared_and_closed_when_idle() {
    if ignored() {
        return;
    }
    let (key, public) = Keys::new().ed25519("good");
    let rig = Rig::new(Setup::with_key(&public), Some(root(&key)));
    let mut machines = Vec::new();
    for number in 0..6 {
        machines.push(rig.machine(&format!("m{number}")).await);
    }
    let guest = rig.guest(&SshConfig { max_connections: 2, idle_limit: Duration::from_millis(400), ..config() });
    // Far more than there are places, and several on each machine.
    let runs: Vec<_> = (0..24)
        .map(|number| {
            let (guest, vm) = (guest.clone(), machines[number % machines.len()]);
            tokio::spawn(async move {
                let output = guest.shell(vm, &format!("sleep 0.1; echo {number}")).await?;
                assert!(guest.connections() <= 2, "{} connections", guest.connections());
                assert_eq!(output.stdout, format!("{number}\n"));
                ocr_core::Result::<()>::Ok(())
            })
        })
        .collect();
    for run in runs {
        run.await.unwrap().unwrap();
    }
    let end = Instant::now() + BOOT;
    while guest.connections() > 0 {
        assert!(Instant::now() < end, "idle connections stay");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // All that is used at once, and nothing becomes free in time.
    let busy = rig.guest(&SshConfig { max_connections: 1, connect_limit: Duration::from_secs(2), ..config() });
    let (holder, vm) = (busy.clone(), machines[0]);
    let hold = tokio::spawn(async move { holder.shell(vm, "touch /tmp/held; sleep 6").await });
    let held = rig.cloud.guest(vm).lock().unwrap().root().join("tmp/held");
    while !held.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let error = busy.shell(machines[1], "true").await.unwrap_err();
    assert_eq!((error.reason(), error.retry()), (Some(reason::AGENT_NOT_READY), Retry::Safe), "{error}");
    assert!(error.message().contains("SSH connection"), "{error}");
    // The same machine is served over the connection that there is.
    busy.shell(machines[0], "true").await.unwrap();
    hold.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_go_away_cost_one_more_connection_at_most() {
    if ignored() {
        return;
    }
    let (key, public) = Keys::new().ed25519("good");
    let rig = Rig::new(Setup::with_key(&public), Some(root(&key)));
    let vm = rig.machine("a").await;
    let guest = rig.guest(&config());
    guest.guest_info(vm).await.unwrap();
    let root = rig.cloud.guest(vm).lock().unwrap().root().to_owned();
    // More than a server lets a connection have.
    for number in 0..12 {
        let (guest, line) = (guest.clone(), format!("touch /tmp/{number}; sleep 30"));
        let call = tokio::spawn(async move { guest.shell(vm, &line).await });
        let end = Instant::now() + BOOT;
        while !root.join(format!("tmp/{number}")).exists() {
            assert!(Instant::now() < end, "command {number} does not begin");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        call.abort();
    }
    assert_eq!(guest.shell(vm, "echo fine").await.unwrap().stdout, "fine\n");
    // The server counts a channel until its command ends, so a second connection was made, and no third.
    let log = rig.cloud.guest(vm).lock().unwrap().log();
    assert_eq!(log.matches("Accepted publickey").count(), 2, "{log}");
    assert_eq!(guest.connections(), 1, "the full one was not let go");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_with_credentials_of_its_own_logs_in_where_nobody_is_root() {
    if ignored() {
        return;
    }
    let (key, public) = Keys::new().ed25519("good");
    let setup = Setup::with_key(&public).config("PermitRootLogin no");
    let rig = Rig::new(setup, None);
    let vm = rig.machine("a").await;
    let guest = rig.guest(&config());
    let as_user = |user: &str| ExecRequest { user: Some(user.to_owned()), ..ExecRequest::shell("id -un; pwd") };
    let error = guest.exec(vm, &as_user("user")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    let error = guest.guest_info(vm).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    rig.book.remember(vm, Credentials::of("user").with_private_key(key)).await.unwrap();
    let output = guest.exec(vm, &as_user("user")).await.unwrap();
    assert_eq!(output.stdout, "user\n/\n", "{output:?}");
    // It is the only account, so it manages the machine too.
    let file = PutFile { owner: Some("user".to_owned()), mode: Some(0o600), ..PutFile::new("/tmp/f", "content") };
    guest.put_file(vm, &file).await.unwrap();
    assert_eq!(guest.get_file(vm, "/tmp/f", 100).await.unwrap(), "content");
    assert_eq!(guest.exec(vm, &as_user("root")).await.unwrap_err().kind(), ErrorKind::Invalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn sudo_makes_root_of_an_account_that_may_and_says_when_it_may_not() {
    if ignored() {
        return;
    }
    let (key, public) = Keys::new().ed25519("good");
    let account = Credentials::of("user").with_private_key(key);
    let setup =
        |rule: &str| Setup { sudoers: format!("{rule}\n"), ..Setup::with_key(&public).config("PermitRootLogin no") };
    let sudo = SshConfig { sudo: true, ..config() };
    let rig = Rig::new(setup("user ALL=(ALL) NOPASSWD: ALL"), Some(account.clone()));
    let vm = rig.machine("a").await;
    let guest = rig.guest(&sudo);
    let as_user = |user: Option<&str>| ExecRequest {
        user: user.map(str::to_owned),
        stdin: "from stdin".into(),
        ..ExecRequest::shell("id -un; echo $HOME; cat")
    };
    assert_eq!(guest.exec(vm, &as_user(None)).await.unwrap().stdout, "root\n/root\nfrom stdin");
    assert_eq!(guest.exec(vm, &as_user(Some("user"))).await.unwrap().stdout, "user\n/home/user\nfrom stdin");
    let file = PutFile { owner: Some("user".to_owned()), ..PutFile::new("/root/f", "content") };
    guest.put_file(vm, &file).await.unwrap();
    assert_eq!(guest.shell(vm, "stat -c %U /root/f").await.unwrap().stdout, "user\n");
    let rig = Rig::new(setup("user ALL=(ALL) ALL"), Some(account));
    let vm = rig.machine("a").await;
    let error = rig.guest(&sudo).guest_info(vm).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    assert!(error.message().contains("sudo without a password"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_whose_shell_greets_is_understood() {
    if ignored() {
        return;
    }
    let (key, public) = Keys::new().ed25519("good");
    let rig = Rig::new(Setup::with_key(&public), Some(root(&key)));
    let vm = rig.machine("a").await;
    // bash reads this for commands over SSH too.
    rig.cloud
        .with(vm, |guest| {
            std::fs::write(guest.root().join("root/.bashrc"), "echo 'Welcome!'\necho again\n").unwrap();
            let passwd = guest.root().join("etc/passwd");
            let text = std::fs::read_to_string(&passwd).unwrap().replace("/root:/bin/sh", "/root:/bin/bash");
            std::fs::write(passwd, text).unwrap();
        })
        .await;
    let guest = rig.guest(&config());
    assert_eq!(guest.guest_info(vm).await.unwrap().os_name, "Debian for tests");
    let output = guest.shell(vm, "echo one; seq 1 200000 >&2").await.unwrap();
    assert_eq!((output.stdout.as_ref(), output.stderr.len()), (b"one\n".as_ref(), 1_288_895));
    guest.put_file(vm, &PutFile::new("/tmp/f", vec![7_u8; 3_000_000])).await.unwrap();
    assert_eq!(guest.get_file(vm, "/tmp/f", 3_000_000).await.unwrap(), vec![7_u8; 3_000_000]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_executor_logs_in_with_the_account_of_the_request() {
    if ignored() {
        return;
    }
    let (key, public) = Keys::new().ed25519("good");
    let rig = Rig::new(Setup::with_key(&public).config("PermitRootLogin no"), None);
    let vm = rig.machine("a").await;
    let packages = tempfile::tempdir().unwrap();
    let parts = exec::Parts {
        guest: Arc::new(rig.guest(&config())),
        compute: Arc::new(rig.cloud.clone()),
        store: rig.store.clone(),
        packages: Arc::new(LocalFolder::new(packages.path())),
        scheduler: Scheduler::start(SchedulerConfig::default()),
        secrets: exec::SecretStorage::Memory,
        fleet: None,
    };
    let executor = exec::Executor::with_credentials(parts, exec::Config::default(), rig.book.clone());
    let condition = |private_key: &str| exec::ConditionRequest {
        name: "c".to_owned(),
        vm,
        account: exec::Account {
            username: "user".to_owned(),
            private_key: private_key.to_owned().into(),
            ..exec::Account::default()
        },
        probe: exec::Probe::Command { line: "id -u".to_owned(), interval: Duration::from_secs(1) },
        environment: Default::default(),
    };
    let id = executor.create_condition(condition(&key)).await.unwrap().id;
    let mut values = executor.watch(id).await.unwrap();
    let value = tokio::time::timeout(BOOT, values.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(value.value, 1000.0);
    // A key is nowhere in the store.
    let line = key.lines().nth(3).unwrap();
    for (key, record) in rig.store.list("", None, 100).await.unwrap() {
        assert!(!String::from_utf8_lossy(&record.value).contains(line), "{key} holds the key");
    }
}
