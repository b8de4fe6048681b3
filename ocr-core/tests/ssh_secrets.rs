//! No secret of SSH reaches a log of ours at any level, an error, the guest's list of processes, or the store.
#![cfg(feature = "ssh")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests: a fault ends them, and what is ignored is told")]

mod ssh_rig;

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex},
};

use ocr_core::{
    ExecRequest, GuestExec, GuestExecExt, PutFile, StateStore,
    credentials::{CredentialSink, Credentials, MemoryCredentials},
    memory::MemoryState,
    ssh::{ComputeAddresses, HostKeys, SshConfig, SshGuest},
};
use ssh_rig::{BOOT, Cloud, Keys, PASSWORD, Setup, ignored};

/// Everything that is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_secret_is_logged_shown_stored_or_on_a_command_line() {
    if ignored() {
        return;
    }
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).init();

    let keys = Keys::new();
    let (key, public) = keys.ed25519("good");
    let (wrong, _) = keys.ed25519("wrong");
    let setup = Setup::with_key(&public).config("PasswordAuthentication yes");
    let cloud = Cloud::new(setup);
    let vm = cloud.machine("a").await;
    cloud.with(vm, |guest| guest.wait()).await;
    let store = Arc::new(MemoryState::new());
    let book = Arc::new(MemoryCredentials::new(None));
    let addresses = Arc::new(ComputeAddresses::new(Arc::new(cloud.clone())).with_port(cloud.port));
    let config = SshConfig { connect_limit: BOOT, ..SshConfig::default() };
    let guest = SshGuest::new(addresses, book.clone(), HostKeys::new(store.clone()), &config);

    let mut shown = String::new();
    // Refused, and then let in by the password, and by the key.
    for credentials in [
        Credentials::of("root").with_private_key(wrong.clone()),
        Credentials::of("root").with_password("canary-wrong-password".to_owned()),
        Credentials::of("root").with_password(PASSWORD.to_owned()),
        Credentials::of("root").with_private_key(key.clone()),
    ] {
        shown += &format!("{credentials:?}");
        book.remember(vm, credentials).await.unwrap();
        let request = ExecRequest {
            environment: BTreeMap::from([("SECRET".to_owned(), "canary-environment".to_owned())]),
            stdin: "canary-stdin".into(),
            // It looks at itself, and at all that is beside it.
            ..ExecRequest::shell("cat >/dev/null; : canary-command; cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        };
        match guest.exec(vm, &request).await {
            Ok(output) => {
                assert!(String::from_utf8_lossy(&output.stdout).contains("sshd"), "{output:?}");
                shown += &String::from_utf8_lossy(&output.stdout);
            }
            Err(error) => shown += &format!("{error} {error:?}"),
        }
    }
    guest.put_file(vm, &PutFile::new("/tmp/f", "canary-content")).await.unwrap();
    assert_eq!(guest.get_file(vm, "/tmp/f", 100).await.unwrap(), "canary-content");
    shown += &format!("{guest:?}");
    for (key, record) in store.list("ssh", None, 100).await.unwrap() {
        shown += &format!("{key} {}", String::from_utf8_lossy(&record.value));
    }
    let logged = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(logged.contains("russh"), "the log of the library itself is not seen: {logged}");
    // A key's middle lines are what is secret of it.
    let lines = [&key, &wrong].map(|key| key.lines().nth(3).unwrap().to_owned());
    for secret in ["canary", PASSWORD, &lines[0], &lines[1]] {
        for (what, text) in [("log", &logged), ("shown", &shown)] {
            if let Some(at) = text.find(secret) {
                panic!("{secret} is in the {what}: {}", &text[at.saturating_sub(300)..at + 40]);
            }
        }
    }
    // What the runner was given as its command is gone from the disk once it ended.
    let left = guest.shell(vm, "cat /var/lib/ocr/ops/*.cmd /var/lib/ocr/ops/*.stdin 2>/dev/null; true").await.unwrap();
    assert!(!String::from_utf8_lossy(&left.stdout).contains("canary"), "{left:?}");
}
