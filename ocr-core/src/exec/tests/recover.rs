use super::{
    odd::Odd,
    record::{Record, Records, StoredAsset},
    *,
};
use crate::{Precondition, StateStore};

fn web() -> Draft {
    feature("web").asset("/srv/web/a", 0o644, "ours").asset("/etc/hosts", 0o644, "ours too").action("sleep 50")
}

/// Ends the executor as SIGKILL would: its tasks stop where they are.
async fn killed_at(rig: &Rig, reached: impl FnMut() -> bool) {
    // Its tasks live in a runtime of their own, which is dropped with all that runs in it.
    let (cloud, store, shelf, vm) = (rig.cloud.clone(), rig.store.clone(), rig.shelf.clone(), rig.vm);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (_scheduler, executor) = start(&cloud, &cloud, &store, &shelf, 8);
            tokio::select! {
                _ = executor.install(request(InstallKind::Feature, vm, "web")) => {}
                _ = stopped => {}
            }
        });
        drop(runtime);
    });
    until("the point of the kill", reached).await;
    stop.send(()).unwrap();
    thread.join().unwrap();
}

#[tokio::test]
async fn what_a_killed_server_left_is_undone() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    killed_at(&rig, || rig.cloud.commands(rig.vm) == Some(1)).await;
    assert!(rig.file("/srv/web/a").is_some());
    let report = rig.executor.recover().await.unwrap();
    assert_eq!((report.undone.len(), report.forgotten.len(), report.failed.len()), (1, 0, 0));
    assert_eq!((rig.file("/srv/web/a"), rig.file("/etc/hosts"), rig.stored().await), (None, None, vec![]));
    assert_eq!(rig.executor.recover().await.unwrap(), RecoverReport::default());
}

#[tokio::test]
async fn a_file_of_the_guests_own_that_was_not_reached_yet_stays() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    rig.cloud.write_guest_file(rig.vm, "/etc/hosts", b"theirs").unwrap();
    rig.faults().inject("guest.put_files", 1, Fault::Hang);
    killed_at(&rig, || rig.faults().waiting() == 0).await;
    // The guest got as far as to give the first of its files its name.
    rig.cloud.write_guest_file(rig.vm, "/srv/web/a", b"ours").unwrap();
    assert_eq!(rig.executor.recover().await.unwrap().undone.len(), 1);
    assert_eq!((rig.file("/srv/web/a"), rig.file("/etc/hosts").as_deref()), (None, Some("theirs")));
    assert_eq!(rig.stored().await, []);
}

#[tokio::test]
async fn a_guest_that_does_not_answer_is_kept_for_the_next_recovery() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    killed_at(&rig, || rig.cloud.commands(rig.vm) == Some(1)).await;
    rig.cloud.set_agent(rig.vm, AgentMode::Stopped);
    let began = tokio::time::Instant::now();
    let report = rig.executor.recover().await.unwrap();
    assert!(began.elapsed() < seconds(10), "it does not wait for guests");
    assert_eq!((report.undone.len(), report.failed.len()), (0, 1));
    assert!(report.failed[0].contains("does not answer"), "{report:?}");
    rig.cloud.set_agent(rig.vm, AgentMode::Answers);
    assert_eq!(rig.executor.recover().await.unwrap().undone.len(), 1);
    assert_eq!((rig.file("/srv/web/a"), rig.stored().await), (None, vec![]));
}

#[tokio::test(start_paused = true)]
async fn machines_that_are_gone_are_forgotten_and_others_are_not() {
    let mut rig = Rig::new().await;
    rig.shelf.put(feature("web").asset("/srv/web/a", 0o644, "a"));
    let there = rig.another_vm("there").await;
    let kept = rig.executor.install(request(InstallKind::Feature, there, "web")).await.unwrap().id;
    let mut gone =
        vec![rig.install(InstallKind::Feature, "web").await.unwrap().id, rig.command("echo 1", seconds(1)).await];
    rig.cloud.vanish_vm(rig.vm);
    rig.restart();
    let mut report = rig.executor.recover().await.unwrap();
    gone.sort();
    report.forgotten.sort();
    assert_eq!((report.forgotten, report.failed), (gone, vec![]));
    let left: Vec<_> = rig.executor.list(None).await.unwrap().iter().map(|record| record.id).collect();
    assert_eq!(left, [kept]);
    assert_eq!(rig.stored().await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn machines_that_cannot_be_listed_are_not_forgotten() {
    let rig = Rig::new().await;
    rig.command("echo 1", seconds(1)).await;
    rig.faults().inject("compute.list_vms", 1, Fault::Before(Error::unavailable("the cloud is away")));
    let report = rig.executor.recover().await.unwrap();
    assert!(report.failed[0].contains("the cloud is away"), "{report:?}");
    assert_eq!(rig.executor.list(None).await.unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_answers_is_not_gone_whatever_the_compute_backend_says() {
    // As after a change of credentials: another project's list, and the same hypervisor.
    let rig = Rig::new().await;
    rig.shelf.put(feature("web").asset("/srv/web/a", 0o644, "a"));
    rig.install(InstallKind::Feature, "web").await.unwrap();
    let (_scheduler, executor) = start(&rig.cloud, &MemoryCloud::new(), &rig.store, &rig.shelf, 4);
    let report = executor.recover().await.unwrap();
    assert_eq!(report.forgotten, []);
    assert!(report.failed[0].contains("its guest agent answers"), "{report:?}");
    assert_eq!(executor.list(None).await.unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_removal_that_was_killed_is_finished() {
    let rig = Rig::new().await;
    rig.shelf
        .put(feature("web").asset("/srv/a", 0o644, "a").asset("/srv/b", 0o644, "b").delete("echo x >> /root/deletes"));
    let id = rig.install(InstallKind::Feature, "web").await.unwrap().id;
    // The record says that a removal began, and one asset is gone.
    let records = Records::new(Arc::new(rig.store.clone()), sealed(), None);
    let mut stored = records.get(id).await.unwrap().unwrap();
    records.advance(&mut stored, Stage::Removing, seconds(1)).await.unwrap();
    rig.cloud.shell(rig.vm, "rm /srv/b").await.unwrap();
    assert_eq!(rig.executor.recover().await.unwrap().undone, [id]);
    assert_eq!(rig.file("/root/deletes").as_deref(), Some("x\n"));
    assert_eq!((rig.file("/srv/a"), rig.stored().await), (None, vec![]));
}

#[tokio::test(start_paused = true)]
async fn records_that_cannot_be_read_are_reported_and_left_alone() {
    let rig = Rig::new().await;
    let keys = ["exec/install/aaaa", "exec/install/bbbb"].map(|key| Key::new(key).unwrap());
    rig.store.put(&keys[0], r#"{"schema":7,"future":1}"#.into(), Precondition::Any, None).await.unwrap();
    rig.store.put(&keys[1], "broken".into(), Precondition::Any, None).await.unwrap();
    let report = rig.executor.recover().await.unwrap();
    assert_eq!(report.failed.len(), 2, "{report:?}");
    assert!(report.failed[0].contains("newer version"), "{report:?}");
    assert_eq!(rig.stored().await.len(), 2);
    let id = rig.command("echo 1", seconds(1)).await;
    assert_eq!(rig.executor.list(None).await.unwrap()[0].id, id, "they do not hide the others");
}

#[tokio::test(start_paused = true)]
async fn a_machines_key_without_a_record_is_swept() {
    let rig = Rig::new().await;
    let key = Key::new(format!("exec/vm/{}/{}", rig.vm, InstallId::random())).unwrap();
    rig.store.put(&key, "".into(), Precondition::Any, None).await.unwrap();
    rig.command("echo 1", seconds(1)).await;
    rig.executor.recover().await.unwrap();
    assert_eq!((rig.store.get(&key).await.unwrap(), rig.stored().await.len()), (None, 2));
}

#[tokio::test(start_paused = true)]
async fn a_recovery_of_many_records_reads_them_all() {
    let rig = Rig::new().await;
    let gone = rig.another_vm("gone").await;
    for index in 0..2500 {
        let vm = if index % 5 == 0 { gone } else { rig.vm };
        rig.executor.create_condition(command(vm, "echo 1", seconds(1))).await.unwrap();
    }
    rig.cloud.vanish_vm(gone);
    assert_eq!(rig.executor.recover().await.unwrap().forgotten.len(), 500);
    assert_eq!(rig.executor.list(None).await.unwrap().len(), 2000);
}

/// Writes a leftover: a record in some stage, with one asset.
async fn leftover(rig: &Rig, stage: Stage, path: &str, content: &str) -> InstallId {
    use sha2::{Digest, Sha256};
    let mut record = Record::new(InstallKind::Feature, "left".to_owned(), rig.vm);
    record.stage = stage;
    record.assets = vec![StoredAsset {
        path: path.to_owned(),
        bytes: content.len() as u64,
        sha256: crate::exec::remove::hex(&Sha256::digest(content)),
    }];
    Records::new(Arc::new(rig.store.clone()), sealed(), None).create(&record).await.unwrap();
    record.id
}

#[tokio::test(start_paused = true)]
async fn two_leftovers_with_the_same_file_do_not_protect_each_other() {
    for flip in [false, true] {
        let rig = Rig::new().await;
        let contents = if flip { ["one", "other"] } else { ["other", "one"] };
        leftover(&rig, Stage::Acting, "/srv/f", contents[0]).await;
        leftover(&rig, Stage::Copying, "/srv/f", contents[1]).await;
        rig.cloud.write_guest_file(rig.vm, "/srv/f", b"one").unwrap();
        assert_eq!(rig.executor.recover().await.unwrap().undone.len(), 2);
        assert_eq!((rig.file("/srv/f"), rig.stored().await), (None, vec![]));
    }
}

#[tokio::test(start_paused = true)]
async fn a_recovery_does_not_wait_for_an_install_that_keeps_the_machine() {
    let rig = Rig::with(slow()).await;
    rig.shelf.put(feature("web").action("true").restarts());
    let installing = tokio::spawn({
        let (executor, vm) = (rig.executor.clone(), rig.vm);
        async move { executor.install(request(InstallKind::Feature, vm, "web")).await }
    });
    until("the reboot", || rig.cloud.boots(rig.vm) == Some(2)).await;
    leftover(&rig, Stage::Acting, "/srv/f", "x").await;
    let report = rig.executor.recover().await.unwrap();
    assert!(report.failed[0].contains("another install"), "{report:?}");
    assert!(!installing.is_finished());
    installing.await.unwrap().unwrap();
    assert_eq!(rig.executor.recover().await.unwrap().undone.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_only_the_list_lacks_is_not_forgotten() {
    let rig = Rig::new().await;
    rig.command("echo 1", seconds(1)).await;
    rig.cloud.set_agent(rig.vm, AgentMode::Stopped);
    let odd = Odd { lists_nothing: true, ..Odd::new(&rig.cloud) };
    let (_scheduler, executor) = start(&odd, &odd, &rig.store, &rig.shelf, 4);
    assert_eq!(executor.recover().await.unwrap(), RecoverReport::default());
    assert_eq!(executor.list(None).await.unwrap().len(), 1);
}
