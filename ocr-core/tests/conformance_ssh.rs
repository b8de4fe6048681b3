//! The public conformance suite over real OpenSSH servers: as root, and as an account that may do less.
#![cfg(all(feature = "ssh", feature = "conformance"))]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests: a fault ends them, and what is ignored is told")]

mod ssh_rig;

use std::{sync::Arc, time::Duration};

use ocr_core::{
    conformance::{Outcome, SWEEP, Subject, Trait, run},
    credentials::{Credentials, MemoryCredentials},
    memory::{MemoryCloud, MemoryState},
    ssh::{ComputeAddresses, HostKeys, SshConfig, SshGuest},
};
use ssh_rig::{Cloud, Keys, Setup, ignored};

async fn conforms(user: &str, users: bool) {
    if ignored() {
        return;
    }
    let (key, public) = Keys::new().ed25519("key");
    let cloud = Cloud::new(Setup::with_key(&public));
    let addresses = ComputeAddresses::new(Arc::new(cloud.clone())).with_port(cloud.port);
    let account = Credentials::of(user).with_private_key(key);
    let config = SshConfig { users, keepalive: Duration::from_secs(2), ..SshConfig::default() };
    let guest = SshGuest::new(
        Arc::new(addresses),
        Arc::new(MemoryCredentials::new(Some(account))),
        HostKeys::new(Arc::new(MemoryState::new())),
        &config,
    );
    let subject = Subject {
        compute: Some(Arc::new(cloud.clone())),
        guest: Some(Arc::new(guest)),
        template: Some(MemoryCloud::tiny()),
        mute_template: Some(MemoryCloud::mute()),
        guest_user: Some("user".to_owned()),
        ..Subject::new()
    };
    let report = run(&subject, |case| case.subject == Trait::Guest).await;
    assert!(report.failed() == 0, "{report}");
    // Nothing is left out but what this account cannot do, or can.
    for case in report.cases.iter().filter(|case| case.name != SWEEP) {
        let Outcome::Ignored(why) = &case.outcome else { continue };
        assert!(why.contains("capability users"), "{}: {why}", case.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ssh_as_root_conforms() {
    conforms("root", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ssh_as_another_account_conforms() {
    conforms("user", false).await;
}
