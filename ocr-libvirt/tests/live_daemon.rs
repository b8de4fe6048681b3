//! A libvirtd that is killed, restarted and frozen under the backend; it has one of its own for that.
#![cfg(feature = "libvirt")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests: a fault ends them, and figures are for people")]

mod rig;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ocr_core::{ComputeBackend, ErrorKind, ExecRequest, GuestExec, GuestExecExt, Retry, VmFilter, VmState};
use ocr_libvirt::{Config, Libvirt};

#[tokio::test(flavor = "multi_thread")]
async fn a_libvirtd_may_die_and_hang() {
    let Some(rig) = rig::rig() else { return };
    let config =
        Config { call_deadline: Duration::from_secs(3), agent_deadline: Duration::from_secs(3), ..rig.config() };
    let libvirt = Arc::new(Libvirt::open(config).await.unwrap());
    let vm = rig::guest(&libvirt, "daemon").await.id;

    // Killed and started anew while a command runs: the guest goes on, and the command's result is found.
    let line = "echo x >>/root/runs; echo >/root/began; until [ -e /root/go ]; do sleep 0.1; done; cat /root/runs";
    let request = ExecRequest::shell(line);
    let running = tokio::spawn({
        let (libvirt, request) = (libvirt.clone(), request.clone());
        async move { libvirt.exec(vm, &request).await }
    });
    let end = Instant::now() + rig::BOOT;
    while libvirt.get_file(vm, "/root/began", 10).await.is_err() {
        assert!(Instant::now() < end);
    }
    rig.libvirtd("kill9", &[]);
    let error = libvirt.get_vm(vm).await.unwrap_err();
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Unavailable, Retry::Safe), "{error}");
    rig.libvirtd("restart", &[]);
    assert_eq!(libvirt.get_vm(vm).await.unwrap().state, VmState::Running);
    libvirt.wait_ready(vm, rig::BOOT, Duration::from_millis(200)).await.unwrap();
    libvirt.put_file(vm, &ocr_core::PutFile::new("/root/go", "")).await.unwrap();
    assert_eq!(&running.await.unwrap().unwrap().stdout[..], b"x\n");
    assert_eq!(&libvirt.exec(vm, &request).await.unwrap().stdout[..], b"x\n");

    // Frozen: every call comes back in time, from a fresh connection too.
    rig.libvirtd("stop", &[]);
    let start = Instant::now();
    let all = VmFilter::default();
    let (get, list, info) = tokio::join!(libvirt.get_vm(vm), libvirt.list_vms(&all), libvirt.guest_info(vm));
    for error in [get.unwrap_err(), list.unwrap_err(), info.unwrap_err()] {
        assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Unavailable), "{error:?}");
        assert_ne!(error.retry(), Retry::Never, "{error:?}");
    }
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    let late = Libvirt::open(Config { call_deadline: Duration::from_secs(1), ..rig.config() }).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Unavailable, "{late}");
    println!("with a frozen libvirtd: {:?}", libvirt.load());
    rig.libvirtd("cont", &[]);
    libvirt.wait_ready(vm, rig::BOOT, Duration::from_millis(200)).await.unwrap();
    assert!(libvirt.shell(vm, "true").await.unwrap().success());
    // Whatever hung has come back.
    let end = Instant::now() + Duration::from_secs(60);
    while libvirt.load().calls > 0 {
        assert!(Instant::now() < end, "{:?}", libvirt.load());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    libvirt.delete_vm(vm).await.unwrap();
}
