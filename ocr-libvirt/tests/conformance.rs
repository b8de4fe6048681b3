//! The public conformance suite over a real libvirtd.
#![cfg(feature = "libvirt")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests: a fault ends them, and figures are for people")]

mod rig;

use std::sync::Arc;

use ocr_core::conformance::{Subject, assert_all};

#[tokio::test(flavor = "multi_thread")]
async fn libvirt_conforms() {
    let Some(rig) = rig::rig() else { return };
    let libvirt = Arc::new(rig.open().await);
    let subject = Subject {
        compute: Some(libvirt.clone()),
        network: Some(libvirt.clone()),
        image: Some(libvirt.clone()),
        guest: Some(libvirt.clone()),
        template: Some(rig::template(&libvirt).await),
        links: vec![rig::network(&libvirt, "default").await, rig::network(&libvirt, "lab").await],
        guest_user: Some("user".to_owned()),
        ram_bytes: 96 << 20,
        deadline: rig::BOOT,
        parallel: 3,
        ..Subject::new()
    };
    assert_all(&subject).await;
    assert!(rig.pool().iter().all(|file| file == "guest.qcow2"), "left in the pool: {:?}", rig.pool());
}
