use super::{record::Records, *};
use crate::{ErrorKind, error::reason};

fn web() -> Draft {
    feature("web").asset("/srv/web/a", 0o644, "a").asset("/srv/shared", 0o644, "s").action("echo up > /srv/web/state")
}

#[tokio::test(start_paused = true)]
async fn a_removal_runs_the_delete_action_as_the_user_then_removes_assets_and_record() {
    let rig = Rig::new().await;
    // The delete action is one of the assets, so it must come first.
    rig.shelf.put(feature("web").asset("/srv/web/off", 0o755, "#!/bin/sh\nwhoami > /tmp/off\n").delete("/srv/web/off"));
    let request = InstallRequest { account: account("user"), ..request(InstallKind::Feature, rig.vm, "web") };
    let id = rig.executor.install(request).await.unwrap().id;
    assert_eq!(rig.executor.remove(InstallKind::Feature, id).await.unwrap(), Deletion::Deleted);
    assert_eq!(rig.file("/tmp/off").as_deref(), Some("user\n"));
    assert_eq!((rig.file("/srv/web/off"), rig.stored().await), (None, vec![]));
    assert_eq!(rig.executor.remove(InstallKind::Feature, id).await.unwrap(), Deletion::AlreadyGone);
}

#[tokio::test(start_paused = true)]
async fn an_asset_that_is_gone_already_does_not_stop_a_removal() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    let id = rig.install(InstallKind::Feature, "web").await.unwrap().id;
    rig.cloud.shell(rig.vm, "rm /srv/shared; rm /srv/web/a; mkdir /srv/web/a").await.unwrap();
    assert_eq!(rig.executor.remove(InstallKind::Feature, id).await.unwrap(), Deletion::Deleted);
    assert_eq!(rig.stored().await, []);
    assert_eq!(rig.cloud.shell(rig.vm, "ls -d /srv/web/a").await.unwrap().exit_code, 0, "a folder is not ours");
}

#[tokio::test(start_paused = true)]
async fn a_file_that_another_install_has_too_stays_until_that_one_goes() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    rig.shelf.put(inject("more").asset("/srv/shared", 0o644, "t"));
    let (first, second) = (
        rig.install(InstallKind::Feature, "web").await.unwrap().id,
        rig.install(InstallKind::Inject, "more").await.unwrap().id,
    );
    rig.executor.remove(InstallKind::Feature, first).await.unwrap();
    assert_eq!((rig.file("/srv/web/a"), rig.file("/srv/shared").as_deref()), (None, Some("t")));
    rig.executor.remove(InstallKind::Inject, second).await.unwrap();
    assert_eq!((rig.file("/srv/shared"), rig.stored().await), (None, vec![]));
}

#[tokio::test(start_paused = true)]
async fn a_failed_install_takes_no_file_of_another_install_away() {
    let rig = Rig::new().await;
    rig.shelf.put(inject("more").asset("/srv/shared", 0o644, "t"));
    rig.shelf.put(web().action("false"));
    rig.install(InstallKind::Inject, "more").await.unwrap();
    rig.install(InstallKind::Feature, "web").await.unwrap_err();
    assert!(rig.file("/srv/shared").is_some());
    assert_eq!(rig.executor.list(None).await.unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_delete_action_that_fails_removes_nothing_and_can_be_repeated() {
    let rig = Rig::new().await;
    rig.shelf.put(web().delete("echo why >&2; test -f /root/allowed"));
    let id = rig.install(InstallKind::Feature, "web").await.unwrap().id;
    let error = rig.executor.remove(InstallKind::Feature, id).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Conflict, Some(reason::COMMAND_FAILED)));
    assert!(error.to_string().contains("delete action") && error.to_string().contains("why"), "{error}");
    assert!(rig.file("/srv/web/a").is_some());
    assert_eq!(rig.executor.list(None).await.unwrap().len(), 1);
    assert_eq!(rig.executor.recover().await.unwrap(), RecoverReport::default(), "it is as installed as before");
    rig.cloud.write_guest_file(rig.vm, "/root/allowed", b"").unwrap();
    assert_eq!(rig.executor.remove(InstallKind::Feature, id).await.unwrap(), Deletion::Deleted);
    assert_eq!((rig.file("/srv/web/a"), rig.stored().await), (None, vec![]));
}

#[tokio::test(start_paused = true)]
async fn another_kind_is_refused_and_both_are_named() {
    let rig = Rig::new().await;
    let id = rig.command("echo 1", seconds(1)).await;
    let error = rig.executor.remove(InstallKind::Feature, id).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.message().contains("feature") && error.message().contains("condition"), "{error}");
    assert_eq!(rig.executor.list(None).await.unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_install_of_a_machine_that_is_gone_is_just_forgotten() {
    for agent_first in [false, true] {
        let rig = Rig::new().await;
        rig.shelf.put(web().delete("true"));
        let id = rig.install(InstallKind::Feature, "web").await.unwrap().id;
        let other = rig.install(InstallKind::Feature, "web").await.unwrap().id;
        rig.cloud.vanish_vm(rig.vm);
        if agent_first {
            // The hypervisor says nothing of use; the compute backend knows.
            rig.faults().inject("guest.guest_info", 1, Fault::Before(Error::unavailable("no answer")));
        }
        assert_eq!(rig.executor.remove(InstallKind::Feature, id).await.unwrap(), Deletion::Deleted);
        assert_eq!(rig.executor.forget_vm(rig.vm).await.unwrap(), [other]);
        assert_eq!(rig.executor.forget_vm(rig.vm).await.unwrap(), []);
        assert_eq!(rig.stored().await, []);
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_answer_keeps_its_record_and_the_removal_can_be_repeated() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    let id = rig.install(InstallKind::Feature, "web").await.unwrap().id;
    rig.cloud.set_agent(rig.vm, AgentMode::Stopped);
    let error = rig.executor.remove(InstallKind::Feature, id).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert_eq!(rig.executor.list(None).await.unwrap().len(), 1);
    rig.cloud.set_agent(rig.vm, AgentMode::Answers);
    assert_eq!(rig.executor.remove(InstallKind::Feature, id).await.unwrap(), Deletion::Deleted);
    assert_eq!((rig.file("/srv/web/a"), rig.stored().await), (None, vec![]));
}

#[tokio::test(start_paused = true)]
async fn two_removals_at_once_both_succeed_and_the_delete_action_runs_once() {
    let rig = Rig::new().await;
    rig.shelf.put(web().delete("sleep 5; echo x >> /root/deletes"));
    let id = rig.install(InstallKind::Feature, "web").await.unwrap().id;
    let (one, other) =
        tokio::join!(rig.executor.remove(InstallKind::Feature, id), rig.executor.remove(InstallKind::Feature, id));
    let mut both = [one.unwrap(), other.unwrap()];
    both.sort_by_key(|deletion| *deletion == Deletion::AlreadyGone);
    assert_eq!(both, [Deletion::Deleted, Deletion::AlreadyGone]);
    assert_eq!(rig.file("/root/deletes").as_deref(), Some("x\n"));
}

#[tokio::test(start_paused = true)]
async fn an_install_under_way_cannot_be_removed() {
    let rig = Rig::new().await;
    rig.shelf.put(web().action("sleep 50"));
    let installing = tokio::spawn({
        let (executor, vm) = (rig.executor.clone(), rig.vm);
        async move { executor.install(request(InstallKind::Feature, vm, "web")).await }
    });
    until("the action", || rig.cloud.commands(rig.vm) == Some(1)).await;
    let id = Records::new(Arc::new(rig.store.clone()), sealed(), None).ids_of(rig.vm).await.unwrap()[0];
    let error = rig.executor.remove(InstallKind::Feature, id).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert_eq!(rig.executor.recover().await.unwrap(), RecoverReport::default(), "recovery leaves it alone");
    installing.await.unwrap().unwrap();
    assert!(rig.file("/srv/web/a").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_delete_action_whose_answer_was_lost_is_not_run_again() {
    let rig = Rig::new().await;
    rig.shelf.put(web().delete("echo x >> /root/deletes"));
    let id = rig.install(InstallKind::Feature, "web").await.unwrap().id;
    rig.faults().inject("guest.exec", 1, Fault::After(Error::unavailable("away").with_retry(Retry::Ambiguous)));
    rig.executor.remove(InstallKind::Feature, id).await.unwrap();
    assert_eq!(rig.file("/root/deletes").as_deref(), Some("x\n"));
}
