//! The backend against a real libvirtd with real guests.
#![cfg(feature = "libvirt")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests: a fault ends them, and figures are for people")]

mod rig;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ocr_core::{
    ComputeBackend, ComputeBackendExt, Deletion, DiskFormat, Error, ErrorKind, ExecRequest, GuestExec, GuestExecExt,
    ImageBackend, ImageFilter, ImageSource, ImageSpec, Name, OperationId, OsFamily, Owner, PowerAction, PutFile,
    RequestId, Retry, Scope, Tags, VmFilter, VmId, VmState, error::reason,
};
use ocr_libvirt::Libvirt;

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
    println!("created in {created:?}, agent ready after {:?}", start.elapsed());
    assert!(info.can_exec && info.can_files && info.os_name.contains("Tiny"), "{info:?}");

    let output = libvirt.shell(vm.id, "echo out; echo err >&2; exit 4").await.unwrap();
    assert_eq!((output.exit_code, &output.stdout[..], &output.stderr[..]), (4, &b"out\n"[..], &b"err\n"[..]));

    // The guest sees its NICs in the order of the links.
    let line = "for f in /sys/bus/pci/devices/*/virtio*/net/*/address; do cat $f; done";
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
        println!("{size} bytes: put in {put:?} ({:.2} MiB/s), get {:.2} MiB/s", rate(put), rate(start.elapsed()));
    }

    let owned = VmFilter::owned_by(&spec.tags.owner);
    assert_eq!(libvirt.list_vms(&owned).await.unwrap().len(), 1);
    let start = Instant::now();
    assert_eq!(libvirt.delete_vm(vm.id).await.unwrap(), Deletion::Deleted);
    println!("deleted in {:?}", start.elapsed());
    assert_eq!(libvirt.delete_vm(vm.id).await.unwrap(), Deletion::AlreadyGone);
    assert_eq!(libvirt.get_vm(vm.id).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert!(!has_disk(&rig, vm.id), "{:?}", rig.pool());
}

fn has_disk(rig: &rig::Rig, vm: VmId) -> bool {
    rig.pool().iter().any(|file| file.contains(&vm.to_string()))
}

/// A machine cut off at any step of its making is listed, and repeating the request finishes it.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_half_made_is_finished_or_deleted() {
    let Some(rig) = rig::rig() else { return };
    let libvirt = rig.open().await;
    let spec = rig::spec(&libvirt, "half").await;
    let id = Libvirt::planned_id(&spec.tags.owner, &spec.tags.request);
    let owned = VmFilter::owned_by(&spec.tags.owner);
    let disk = |rig: &rig::Rig| rig.pool().into_iter().find(|file| file.contains(&id.to_string())).unwrap();
    let uuid = id.to_string();
    // Takes the machine back to an earlier step, as a process killed there leaves it.
    let phase = ocr_libvirt::xml::domain::PHASE_NAMESPACE;
    let delete_disk = || rig.libvirtd("sh", &["virsh", "vol-delete", "--pool", "default", &disk(&rig)]);
    let undo = |with_disk: bool| {
        rig.libvirtd("sh", &["virsh", "destroy", &uuid]);
        rig.libvirtd("sh", &["virsh", "metadata", &uuid, "--config", "--uri", phase, "--remove"]);
        if !with_disk {
            delete_disk();
        }
    };
    assert_eq!(libvirt.create_vm(&spec).await.unwrap().id, id);

    // Defined and disk made; then defined only.
    for with_disk in [true, false] {
        undo(with_disk);
        assert_eq!(libvirt.list_vms(&owned).await.unwrap()[0].state, VmState::Building);
        let vm = libvirt.create_vm(&spec).await.unwrap();
        assert_eq!((vm.id, vm.state), (id, VmState::Running));
        assert!(has_disk(&rig, id));
    }
    // Started, and killed before that was noted.
    rig.libvirtd("sh", &["virsh", "metadata", &uuid, "--live", "--config", "--uri", phase, "--remove"]);
    assert_eq!(libvirt.get_vm(id).await.unwrap().state, VmState::Running);
    assert_eq!(libvirt.create_vm(&spec).await.unwrap().state, VmState::Running);
    libvirt.set_power(id, PowerAction::Stop { grace: None }).await.unwrap();
    assert_eq!(libvirt.get_vm(id).await.unwrap().state, VmState::Stopped);

    // A deletion that was cut off is finished by a deletion, and by a create.
    let deleting = ["<phase>deleting</phase>", "ocrp"];
    let begin_deletion = || {
        let [element, key] = deleting;
        rig.libvirtd("sh", &["virsh", "metadata", &uuid, "--config", "--uri", phase, "--key", key, "--set", element]);
    };
    begin_deletion();
    assert_eq!(libvirt.get_vm(id).await.unwrap().state, VmState::Deleting);
    assert_eq!(libvirt.create_vm(&spec).await.unwrap().state, VmState::Running);
    libvirt.set_power(id, PowerAction::Stop { grace: None }).await.unwrap();
    begin_deletion();
    delete_disk();
    assert_eq!(libvirt.delete_vm(id).await.unwrap(), Deletion::Deleted);
    assert!(!has_disk(&rig, id) && libvirt.list_vms(&owned).await.unwrap().is_empty());

    // Somebody undefined the domain and left its disk: the sweep takes it, and nobody else's.
    libvirt.create_vm(&spec).await.unwrap();
    let other = rig::spec(&libvirt, "other").await;
    let other_id = libvirt.create_vm(&other).await.unwrap().id;
    rig.libvirtd("sh", &["virsh", "destroy", &uuid]);
    rig.libvirtd("sh", &["virsh", "undefine", &uuid]);
    assert!(libvirt.sweep_volumes(&other.tags.owner).await.unwrap().is_empty());
    assert_eq!(libvirt.sweep_volumes(&spec.tags.owner).await.unwrap(), [disk_name(&spec.tags.owner, id)]);
    assert!(!has_disk(&rig, id) && has_disk(&rig, other_id));
    libvirt.delete_vm(other_id).await.unwrap();
}

fn disk_name(owner: &Owner, id: VmId) -> String {
    ocr_libvirt::xml::volume::disk_name(owner, id)
}

/// A create that fails at its last step takes everything back.
#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_fails_leaves_nothing() {
    let Some(rig) = rig::rig() else { return };
    let libvirt = rig.open().await;
    let network = "<network><name>off</name><uuid>6a5d3d1e-0000-4000-8000-000000000001</uuid></network>";
    let file = rig.pool_folder().join("../off.xml");
    std::fs::write(&file, network).unwrap();
    rig.libvirtd("sh", &["virsh", "net-define", file.to_str().unwrap()]);
    let mut spec = rig::spec(&libvirt, "fails").await;
    spec.links = vec![rig::network(&libvirt, "off").await];
    let error = libvirt.create_vm(&spec).await.unwrap_err();
    assert!(error.to_string().contains("network 'off' is not active"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Conflict);
    let id = Libvirt::planned_id(&spec.tags.owner, &spec.tags.request);
    assert!(libvirt.find_vm(id).await.unwrap().is_none() && !has_disk(&rig, id));
    rig.libvirtd("sh", &["virsh", "net-undefine", "off"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_machine_is_seen_and_not_touched() {
    let Some(rig) = rig::rig() else { return };
    let libvirt = rig.open().await;
    let id: VmId = "6a5d3d1e-0000-4000-8000-000000000002".parse().unwrap();
    let domain = format!(
        "<domain type='qemu'><name>foreign one</name><uuid>{id}</uuid><memory unit='MiB'>32</memory>
         <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>
         <devices><controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
    );
    let file = rig.pool_folder().join("../foreign.xml");
    std::fs::write(&file, domain).unwrap();
    rig.libvirtd("sh", &["virsh", "define", file.to_str().unwrap()]);
    let vm = libvirt.get_vm(id).await.unwrap();
    assert_eq!((vm.tags, vm.state, vm.has_agent_channel), (None, VmState::Stopped, false));
    assert_eq!(vm.name.as_str(), "foreign_one");
    for action in [PowerAction::Start, PowerAction::Stop { grace: None }, PowerAction::Reboot { grace: None }] {
        assert_eq!(libvirt.set_power(id, action).await.unwrap_err().kind(), ErrorKind::Denied);
    }
    assert_eq!(libvirt.delete_vm(id).await.unwrap_err().kind(), ErrorKind::Denied);
    // Acting in it would be allowed, had it an agent's channel.
    rig.libvirtd("sh", &["virsh", "start", &id.to_string()]);
    let error = libvirt.wait_ready(id, rig::BOOT, Duration::from_secs(1)).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Unsupported, Some(reason::AGENT_ABSENT)), "{error}");
    rig.libvirtd("sh", &["virsh", "destroy", &id.to_string()]);
    rig.libvirtd("sh", &["virsh", "undefine", &id.to_string()]);
}

fn tell(error: &Error) -> (ErrorKind, Option<&'static str>, Retry) {
    (error.kind(), error.reason(), error.retry())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agents_states_are_told_apart() {
    let Some(rig) = rig::rig() else { return };
    let libvirt = rig.open().await;
    let vm = libvirt.create_vm(&rig::spec(&libvirt, "states").await).await.unwrap().id;
    let error = libvirt.shell(vm, "true").await.unwrap_err();
    assert_eq!(tell(&error), (ErrorKind::Unavailable, Some(reason::AGENT_NOT_READY), Retry::Safe), "{error}");

    libvirt.wait_ready(vm, rig::BOOT, Duration::from_millis(500)).await.unwrap();
    let block = PutFile::new("/etc/qemu-ga.blocked", "guest-exec,guest-exec-status");
    libvirt.put_file(vm, &block).await.unwrap();
    libvirt.shell(vm, "(sleep 0.5; kill $(pidof qemu-ga)) >/dev/null 2>&1 &").await.unwrap();
    let end = Instant::now() + rig::BOOT;
    let error = loop {
        match libvirt.shell(vm, "true").await {
            Err(error) if error.kind() == ErrorKind::Unsupported => break error,
            other => assert!(Instant::now() < end, "{other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(tell(&error), (ErrorKind::Unsupported, Some(reason::AGENT_COMMAND_DISABLED), Retry::Never), "{error}");
    let info = libvirt.guest_info(vm).await.unwrap();
    assert!(!info.can_exec && info.can_files, "{info:?}");

    libvirt.set_power(vm, PowerAction::Stop { grace: None }).await.unwrap();
    let error = libvirt.shell(vm, "true").await.unwrap_err();
    assert_eq!(tell(&error), (ErrorKind::Conflict, Some(reason::GUEST_NOT_RUNNING), Retry::Never), "{error}");
    libvirt.delete_vm(vm).await.unwrap();
    let error = libvirt.shell(vm, "true").await.unwrap_err();
    assert_eq!(tell(&error), (ErrorKind::NotFound, Some(reason::GUEST_GONE), Retry::Never), "{error}");
}

/// Waits until a file is in the guest.
async fn until_file(libvirt: &Libvirt, vm: VmId, path: &str) {
    let end = Instant::now() + rig::BOOT;
    while libvirt.get_file(vm, path, 100).await.is_err() {
        assert!(Instant::now() < end, "{path} is still not there");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_survive_their_agent_and_are_never_run_twice() {
    let Some(rig) = rig::rig() else { return };
    let libvirt = Arc::new(rig.open().await);
    let vm = rig::guest(&libvirt, "survivor").await.id;
    let spawn = |request: ExecRequest| {
        let libvirt = libvirt.clone();
        tokio::spawn(async move { libvirt.exec(vm, &request).await })
    };

    // The agent dies while a command runs, and with it its memory of the command.
    let line = "echo x >>/root/runs; echo >/root/began; until [ -e /root/go ]; do sleep 0.1; done; echo survived";
    let running = spawn(ExecRequest::shell(line));
    until_file(&libvirt, vm, "/root/began").await;
    let killed = libvirt.shell(vm, "kill -9 $(pidof qemu-ga); echo killed").await.unwrap();
    assert_eq!(&killed.stdout[..], b"killed\n");
    libvirt.put_file(vm, &PutFile::new("/root/go", "")).await.unwrap();
    assert_eq!(&running.await.unwrap().unwrap().stdout[..], b"survived\n");
    assert_eq!(&libvirt.get_file(vm, "/root/runs", 100).await.unwrap()[..], b"x\n");

    // As much output as there may be, on both sides.
    let start = Instant::now();
    let line = "yes 0123456789abcde | head -c 16777216; head -c 300000 /dev/zero >&2";
    let request = ExecRequest::shell(line);
    let output = libvirt.exec(vm, &request).await.unwrap();
    println!("16 MiB of output in {:?}", start.elapsed());
    assert_eq!((output.stdout.len(), output.stderr.len()), (16 << 20, 300_000));
    assert!(output.stdout.chunks(16).all(|chunk| chunk == b"0123456789abcde\n"));
    assert!(!output.stdout_truncated && !output.stderr_truncated && output.stderr.iter().all(|&byte| byte == 0));
    // And all of it again for whoever asks again.
    assert_eq!(libvirt.exec(vm, &request).await.unwrap(), output);
    // One byte more is one too many.
    let over = ExecRequest::shell("yes 0123456789abcde | head -c 16777217");
    let output = libvirt.exec(vm, &over).await.unwrap();
    assert_eq!((output.stdout.len(), output.stdout_truncated), (16 << 20, true));

    // Input beyond what one message carries.
    let mut large = ExecRequest::shell("wc -c; printf %s \"$LARGE\" | wc -c");
    large.stdin = vec![b'i'; 400_000].into();
    large.environment.insert("LARGE".to_owned(), "e".repeat(60_000));
    let output = libvirt.exec(vm, &large).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "400000\n60000\n");

    // The guest reboots while a command runs: nobody knows how far it came, so it is not run again.
    let line = "echo x >>/root/reboots; sync; echo >/root/began2; sync; sleep 100";
    let lost = ExecRequest { operation: OperationId::random(), ..ExecRequest::shell(line) };
    let running = spawn(lost.clone());
    until_file(&libvirt, vm, "/root/began2").await;
    libvirt.set_power(vm, PowerAction::Reboot { grace: None }).await.unwrap();
    for error in [running.await.unwrap().unwrap_err(), libvirt.exec(vm, &lost).await.unwrap_err()] {
        assert_eq!((error.kind(), error.retry()), (ErrorKind::Unavailable, Retry::Ambiguous), "{error}");
        assert!(error.to_string().contains("rebooted"), "{error}");
    }
    assert_eq!(&libvirt.get_file(vm, "/root/reboots", 100).await.unwrap()[..], b"x\n");

    // An orderly reboot, and an orderly stop.
    let boot = || async { libvirt.shell(vm, "cat /proc/sys/kernel/random/boot_id").await.unwrap().stdout };
    let before = boot().await;
    let start = Instant::now();
    libvirt.set_power(vm, PowerAction::Reboot { grace: Some(rig::BOOT) }).await.unwrap();
    assert!(start.elapsed() < rig::BOOT, "the reboot was forced");
    libvirt.wait_ready(vm, rig::BOOT, Duration::from_millis(500)).await.unwrap();
    assert_ne!(boot().await, before);
    let start = Instant::now();
    libvirt.set_power(vm, PowerAction::Stop { grace: Some(rig::BOOT) }).await.unwrap();
    println!("orderly stop in {:?}", start.elapsed());
    assert!(start.elapsed() < rig::BOOT, "the stop was forced");
    assert_eq!(libvirt.get_vm(vm).await.unwrap().state, VmState::Stopped);
    libvirt.delete_vm(vm).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_guest_holds_up_no_other() {
    let Some(rig) = rig::rig() else { return };
    let libvirt = Arc::new(rig.open().await);
    let mut booting = tokio::task::JoinSet::new();
    for index in 0..4 {
        let libvirt = libvirt.clone();
        booting.spawn(async move { rig::guest(&libvirt, &format!("frost-{index}")).await.id });
    }
    let guests = booting.join_all().await;
    let (&frozen, lively) = guests.split_first().unwrap();

    let agent = libvirt.shell(frozen, "pidof qemu-ga").await.unwrap().stdout;
    let agent = String::from_utf8_lossy(&agent).trim().to_owned();
    // Frozen from inside: the agent alone. Then from outside: the whole machine.
    libvirt.shell(frozen, &format!("(sleep 0.3; kill -STOP {agent}) >/dev/null 2>&1 &")).await.unwrap();
    let end = Instant::now() + rig::BOOT;
    while libvirt.guest_info(frozen).await.is_ok() {
        assert!(Instant::now() < end);
    }
    measure(&libvirt, frozen, lively, "agent").await;

    let qemu = rig.libvirtd("sh", &["pgrep", "-f", &format!("uuid {frozen}")]);
    let qemu = qemu.lines().next().unwrap().to_owned();
    rig.libvirtd("sh", &["kill", "-STOP", &qemu]);
    measure(&libvirt, frozen, lively, "machine").await;
    // Its plug can be pulled, though it cannot be asked.
    let start = Instant::now();
    libvirt.set_power(frozen, PowerAction::Stop { grace: Some(Duration::from_secs(2)) }).await.unwrap();
    println!("a frozen machine is switched off in {:?}", start.elapsed());
    assert_eq!(libvirt.get_vm(frozen).await.unwrap().state, VmState::Stopped);
    for guest in guests {
        libvirt.delete_vm(guest).await.unwrap();
    }
}

/// Asks a frozen guest from many sides, and meanwhile works with the lively ones.
async fn measure(libvirt: &Arc<Libvirt>, frozen: VmId, lively: &[VmId], what: &str) {
    let mut asking = tokio::task::JoinSet::new();
    for _ in 0..12 {
        let libvirt = libvirt.clone();
        asking.spawn(async move { libvirt.guest_info(frozen).await.unwrap_err() });
    }
    let mut slowest = Duration::ZERO;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(6) {
        let mut working = tokio::task::JoinSet::new();
        for &vm in lively {
            let libvirt = libvirt.clone();
            working.spawn(async move {
                let start = Instant::now();
                assert!(libvirt.shell(vm, "true").await.unwrap().success());
                libvirt.get_vm(vm).await.unwrap();
                start.elapsed()
            });
        }
        libvirt.get_vm(frozen).await.unwrap();
        assert!(libvirt.list_vms(&VmFilter::default()).await.unwrap().iter().any(|vm| vm.id == frozen));
        slowest = working.join_all().await.into_iter().chain([slowest]).max().unwrap();
    }
    println!("frozen {what}: the slowest call of the others took {slowest:?}");
    assert!(slowest < Duration::from_secs(4), "{slowest:?}");
    for error in asking.join_all().await {
        assert_eq!((error.kind(), error.reason()), (ErrorKind::Unavailable, Some(reason::AGENT_NOT_READY)), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_taken_in_while_others_are_listed() {
    let Some(rig) = rig::rig() else { return };
    let libvirt = rig.open().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.raw");
    std::fs::write(&path, vec![7; 64 << 10]).unwrap();
    let spec = |n: usize| {
        let tags = Tags {
            owner: Owner::new(format!("images-{}", std::process::id())).unwrap(),
            request: RequestId::random(),
            scope: Scope::default(),
        };
        ImageSpec {
            tags,
            name: Name::new(format!("image-{n}")).unwrap(),
            source: ImageSource::File(path.clone()),
            format: DiskFormat::Raw,
            sha256: None,
            os_family: OsFamily::Linux,
            users: Vec::new(),
        }
    };
    let listers: Vec<_> = (0..4)
        .map(|_| {
            let libvirt = libvirt.clone();
            tokio::spawn(async move {
                loop {
                    libvirt.find_images(&ImageFilter::default()).await.unwrap();
                }
            })
        })
        .collect();
    for n in 0..40 {
        let image = libvirt.import_image(&spec(n)).await.unwrap();
        assert_eq!(libvirt.delete_image(image.id).await.unwrap(), Deletion::Deleted);
    }
    for lister in listers {
        lister.abort();
        // It ends by the abort; a panic of its own is a failure.
        assert!(lister.await.unwrap_err().is_cancelled());
    }
}
