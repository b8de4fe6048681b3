//! The backend against a real libvirtd with real guests.
#![cfg(feature = "libvirt")]

mod rig;

use std::time::{Duration, Instant};

use ocr_core::{ComputeBackend, Deletion, ErrorKind, ExecRequest, GuestExec, GuestExecExt, PutFile, VmFilter, VmState};

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_made_used_and_deleted() {
    let Some(rig) = rig::rig() else { return };
    let libvirt = rig.open().await;
    let mut spec = rig::spec(&libvirt, "web: one").await;
    spec.links = vec![rig::network(&libvirt, "default").await, rig::network(&libvirt, "lab").await];
    let start = Instant::now();
    let vm = libvirt.create_vm(&spec).await.unwrap();
    let created = start.elapsed();
    assert_eq!((vm.state.clone(), vm.tags.as_ref(), &vm.name), (VmState::Running, Some(&spec.tags), &spec.name));
    let info = libvirt.wait_ready(vm.id, rig::BOOT, Duration::from_millis(250)).await.unwrap();
    println!("create {created:?}, agent ready after {:?}: {info:?}", start.elapsed());
    assert!(info.can_exec && info.can_files && info.os_name.contains("Tiny"));

    let output = libvirt.shell(vm.id, "echo out; echo err >&2; exit 4").await.unwrap();
    assert_eq!((output.exit_code, &output.stdout[..], &output.stderr[..]), (4, &b"out\n"[..], &b"err\n"[..]));

    // The guest sees its NICs in the order of the links.
    let line =
        "for p in /sys/bus/pci/devices/*; do for n in $p/virtio*/net/*/address; do [ -e $n ] && cat $n; done; done; :";
    let macs = String::from_utf8(libvirt.shell(vm.id, line).await.unwrap().stdout.to_vec()).unwrap();
    let wanted: Vec<_> = vm.nics.iter().map(|nic| nic.mac.clone().unwrap()).collect();
    assert_eq!(macs.lines().collect::<Vec<_>>(), wanted);
    assert_eq!(vm.nics.iter().map(|nic| nic.network.unwrap()).collect::<Vec<_>>(), spec.links);

    // Figures.
    let mut times = Vec::new();
    for _ in 0..20 {
        let start = Instant::now();
        assert!(libvirt.exec(vm.id, &ExecRequest::shell("true")).await.unwrap().success());
        times.push(start.elapsed());
    }
    times.sort();
    println!("exec p50 {:?}, best {:?}, worst {:?}", times[10], times[0], times[19]);
    for size in [1 << 10, 1 << 20, 4 << 20] {
        let start = Instant::now();
        libvirt.put_file(vm.id, &PutFile::new("/tmp/file", vec![b'x'; size])).await.unwrap();
        let put = start.elapsed();
        let start = Instant::now();
        assert_eq!(libvirt.get_file(vm.id, "/tmp/file", 8 << 20).await.unwrap().len(), size);
        let rate = |time: Duration| size as f64 / time.as_secs_f64() / f64::from(1 << 20);
        println!("{size} bytes: put {put:?} ({:.2} MiB/s), get {:.2} MiB/s", rate(put), rate(start.elapsed()));
    }

    let owned = VmFilter::owned_by(&spec.tags.owner);
    assert_eq!(libvirt.list_vms(&owned).await.unwrap().len(), 1);
    let start = Instant::now();
    assert_eq!(libvirt.delete_vm(vm.id).await.unwrap(), Deletion::Deleted);
    println!("delete {:?}", start.elapsed());
    assert_eq!(libvirt.delete_vm(vm.id).await.unwrap(), Deletion::AlreadyGone);
    assert_eq!(libvirt.get_vm(vm.id).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert!(!rig.pool().iter().any(|file| file.contains(&vm.id.to_string())), "{:?}", rig.pool());
}
