use super::{odd::Odd, *};
use crate::{ErrorKind, PowerAction, error::reason};

fn web() -> Draft {
    feature("web")
        .asset("/srv/web/index.html", 0o644, "hello")
        .asset("/srv/web/run.sh", 0o755, "#!/bin/sh\necho $GREETING from $(whoami)\necho trouble >&2\n")
        .action("/srv/web/run.sh")
}

#[tokio::test(start_paused = true)]
async fn an_install_copies_assets_runs_the_action_as_the_user_and_is_listed() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    let installed = rig
        .executor
        .install(InstallRequest {
            account: account("user"),
            environment: BTreeMap::from([("GREETING".to_owned(), "good morning".to_owned())]),
            ..request(InstallKind::Feature, rig.vm, "web")
        })
        .await
        .unwrap();
    assert_eq!((installed.stdout.as_str(), installed.stderr.as_str()), ("good morning from user", "trouble"));
    assert_eq!(rig.file("/srv/web/index.html").as_deref(), Some("hello"));
    let seen = rig.cloud.shell(rig.vm, "stat -c '%a %U' /srv/web/index.html /srv/web/run.sh").await.unwrap();
    assert_eq!(seen.stdout, "644 user\n755 user\n");
    assert_eq!(
        rig.executor.list(Some(rig.vm)).await.unwrap(),
        [InstallRecord {
            id: installed.id,
            kind: InstallKind::Feature,
            name: "thing".to_owned(),
            vm: rig.vm,
            package: Some(("web".to_owned(), "1.0.0".to_owned())),
            interval: None,
        }]
    );
    assert_eq!(rig.executor.list(None).await.unwrap().len(), 1);
    assert_eq!(rig.executor.list(Some(VmId::random())).await.unwrap(), []);
    assert_eq!(rig.queued(), 0);
}

#[tokio::test(start_paused = true)]
async fn assets_without_an_action_are_an_install_too() {
    let rig = Rig::new().await;
    rig.shelf.put(inject("note").asset("/root/note", 0o600, "x"));
    let installed = rig.install(InstallKind::Inject, "note").await.unwrap();
    assert_eq!((installed.stdout.as_str(), installed.stderr.as_str()), ("", ""));
    assert_eq!(rig.cloud.shell(rig.vm, "stat -c '%a %U' /root/note").await.unwrap().stdout, "600 root\n");
}

#[tokio::test(start_paused = true)]
async fn a_package_of_another_type_is_refused_and_both_are_named() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    let error = rig.install(InstallKind::Inject, "web").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("inject") && error.to_string().contains("feature"), "{error}");
    assert_eq!((rig.stored().await, rig.file("/srv/web/index.html")), (vec![], None));
}

#[tokio::test(start_paused = true)]
async fn a_failed_action_shows_its_output_and_leaves_nothing() {
    let rig = Rig::new().await;
    rig.shelf.put(web().action("echo some words; echo the reason >&2; exit 3"));
    let error = rig.install(InstallKind::Feature, "web").await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Conflict, Some(reason::COMMAND_FAILED)));
    for part in ["web 1.0.0", "exit code 3", "some words", "the reason"] {
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
    assert_eq!(rig.file("/srv/web/index.html"), None);
    assert_eq!(rig.file("/srv/web/run.sh"), None);
    assert_eq!(rig.stored().await, []);
    assert_eq!(rig.executor.list(None).await.unwrap(), []);
}

#[tokio::test(start_paused = true)]
async fn long_output_is_cut_in_replies_and_in_errors() {
    let rig = Rig::new().await;
    rig.shelf.put(feature("chatty").action("echo first; seq 1 100000; echo last"));
    let installed = rig.install(InstallKind::Feature, "chatty").await.unwrap();
    assert!(installed.stdout.len() <= config().reply_output_bytes, "{}", installed.stdout.len());
    assert!(installed.stdout.starts_with("first\n1\n") && installed.stdout.ends_with("100000\nlast"));
    assert!(installed.stdout.contains("\n[cut: "));

    rig.shelf.put(feature("chatty").action("seq 1 100000; seq 1 100000 >&2; echo last words >&2; false"));
    let error = rig.install(InstallKind::Feature, "chatty").await.unwrap_err();
    assert!(error.to_string().len() < 4000, "{}", error.to_string().len());
    assert!(error.to_string().contains("last words"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_action_past_its_deadline_is_ended_and_leaves_nothing() {
    let rig = Rig::new().await;
    rig.shelf.put(web().action("sleep 100000"));
    let began = tokio::time::Instant::now();
    let error = rig.install(InstallKind::Feature, "web").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(began.elapsed() < seconds(302), "{:?}", began.elapsed());
    assert_eq!((rig.stored().await, rig.file("/srv/web/index.html")), (vec![], None));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_boots_is_waited_for_without_a_permit() {
    let rig = Rig::with(slow()).await;
    rig.shelf.put(web());
    let (_scheduler, executor) = start(&rig.cloud, &rig.cloud, &rig.store, &rig.shelf, 1);
    let other = rig.another_vm("late").await;
    tokio::time::sleep(seconds(5)).await;
    rig.cloud.set_agent(other, AgentMode::Stopped);
    let late = tokio::spawn({
        let executor = executor.clone();
        async move { executor.install(request(InstallKind::Feature, other, "web")).await }
    });
    // There is one permit, and the other machine's install does not keep it.
    executor.install(request(InstallKind::Feature, rig.vm, "web")).await.unwrap();
    assert!(!late.is_finished());
    rig.cloud.set_agent(other, AgentMode::Answers);
    late.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_never_answers_is_given_up_and_nothing_is_recorded() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    rig.cloud.set_agent(rig.vm, AgentMode::Stopped);
    let began = tokio::time::Instant::now();
    let error = rig.install(InstallKind::Feature, "web").await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::TimedOut, Some(reason::AGENT_NOT_READY)));
    assert!(error.to_string().contains("120 s") && error.to_string().contains("does not answer"), "{error}");
    assert!(began.elapsed() <= seconds(121), "{:?}", began.elapsed());
    assert_eq!(rig.stored().await, []);
}

#[tokio::test(start_paused = true)]
async fn what_can_never_work_fails_at_once() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    let began = tokio::time::Instant::now();
    rig.cloud.set_agent(rig.vm, AgentMode::Absent);
    let error = rig.install(InstallKind::Feature, "web").await.unwrap_err();
    assert_eq!(error.reason(), Some(reason::AGENT_ABSENT));
    for (exec, files) in [(true, false), (false, true)] {
        rig.cloud.set_agent(rig.vm, AgentMode::Disabled { exec, files });
        let error = rig.install(InstallKind::Feature, "web").await.unwrap_err();
        assert_eq!(error.reason(), Some(reason::AGENT_COMMAND_DISABLED));
    }
    rig.cloud.set_agent(rig.vm, AgentMode::Answers);
    rig.cloud.set_power(rig.vm, PowerAction::Stop { grace: None }).await.unwrap();
    let error = rig.install(InstallKind::Feature, "web").await.unwrap_err();
    assert_eq!(error.reason(), Some(reason::GUEST_NOT_RUNNING));
    let error = rig.executor.install(request(InstallKind::Feature, VmId::random(), "web")).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::NotFound, Some(reason::GUEST_GONE)));
    let error = rig.install(InstallKind::Feature, "nothing").await.unwrap_err();
    assert_eq!(error.reason(), Some(reason::PACKAGE_NOT_FOUND));
    assert_eq!(began.elapsed(), Duration::ZERO);
    assert_eq!(rig.stored().await, []);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_user_is_refused_and_nothing_is_left() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    let error = rig
        .executor
        .install(InstallRequest { account: account("nobody-here"), ..request(InstallKind::Feature, rig.vm, "web") })
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!((rig.stored().await, rig.file("/srv/web/index.html")), (vec![], None));
}

#[tokio::test(start_paused = true)]
async fn a_file_too_large_for_the_guest_is_refused_before_anything_is_done() {
    let rig = Rig::with(MemoryOptions { max_file_bytes: 10, ..MemoryOptions::default() }).await;
    rig.shelf.put(feature("big").asset("/a", 0o644, "1").asset("/b", 0o644, "12345678901"));
    let error = rig.install(InstallKind::Feature, "big").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("\"/b\"") && error.to_string().contains("10 bytes"), "{error}");
    assert_eq!((rig.stored().await, rig.file("/a")), (vec![], None));
}

#[tokio::test(start_paused = true)]
async fn an_asset_onto_a_folder_fails_and_the_folder_stays() {
    let rig = Rig::new().await;
    rig.cloud.write_guest_file(rig.vm, "/srv/web/index.html/inside", b"theirs").unwrap();
    rig.shelf.put(web());
    rig.install(InstallKind::Feature, "web").await.unwrap_err();
    assert_eq!(rig.file("/srv/web/index.html/inside").as_deref(), Some("theirs"));
    assert_eq!(rig.stored().await, []);
}

#[tokio::test(start_paused = true)]
async fn restarts_reboots_once_and_answers_when_the_guest_is_back() {
    let rig = Rig::with(slow()).await;
    rig.shelf.put(web().restarts());
    let installed = rig.install(InstallKind::Feature, "web").await.unwrap();
    assert_eq!(rig.cloud.boots(rig.vm), Some(2));
    assert!(rig.cloud.guest_info(rig.vm).await.is_ok(), "it answers when the install is answered");
    assert_eq!(rig.executor.list(None).await.unwrap()[0].id, installed.id);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_answers_just_before_it_goes_down_is_not_taken_for_back() {
    for no_boot_id in [false, true] {
        let rig = Rig::with(slow()).await;
        rig.shelf.put(web().restarts());
        let odd = Odd { reboots_after: seconds(7), no_boot_id, ..Odd::new(&rig.cloud) };
        let (_scheduler, executor) = start(&odd, &odd, &rig.store, &rig.shelf, 4);
        let began = tokio::time::Instant::now();
        executor.install(request(InstallKind::Feature, rig.vm, "web")).await.unwrap();
        assert!(began.elapsed() < seconds(45), "{:?}", began.elapsed());
        assert_eq!(rig.cloud.boots(rig.vm), Some(2), "no boot id: {no_boot_id}");
        assert!(rig.cloud.guest_info(rig.vm).await.is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_come_back_fails_the_install_and_is_undone_later() {
    let rig = Rig::with(slow()).await;
    rig.shelf.put(web().restarts());
    let installing = tokio::spawn({
        let (executor, vm) = (rig.executor.clone(), rig.vm);
        async move { executor.install(request(InstallKind::Feature, vm, "web")).await }
    });
    until("the reboot", || rig.cloud.boots(rig.vm) == Some(2)).await;
    rig.cloud.set_agent(rig.vm, AgentMode::Stopped);
    let error = installing.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("reboot") && error.to_string().contains("recovery"), "{error}");
    assert_eq!(rig.executor.list(None).await.unwrap(), [], "it is not installed");
    rig.cloud.set_agent(rig.vm, AgentMode::Answers);
    assert_eq!(rig.executor.recover().await.unwrap().undone.len(), 1);
    assert_eq!((rig.stored().await, rig.file("/srv/web/index.html")), (vec![], None));
}

#[tokio::test(start_paused = true)]
async fn nobody_acts_on_a_machine_while_it_reboots_and_no_permit_is_kept() {
    let rig = Rig::with(slow()).await;
    rig.shelf.put(web().restarts());
    rig.shelf.put(inject("second").action("cat /proc/sys/kernel/random/boot_id"));
    let (scheduler, executor) = start(&rig.cloud, &rig.cloud, &rig.store, &rig.shelf, 1);
    let other = rig.another_vm("other").await;
    let spawn = |kind, vm, package: &'static str| {
        let executor = executor.clone();
        tokio::spawn(async move { executor.install(request(kind, vm, package)).await })
    };
    let first = spawn(InstallKind::Feature, rig.vm, "web");
    until("the reboot", || rig.cloud.boots(rig.vm) == Some(2)).await;
    let second = spawn(InstallKind::Inject, rig.vm, "second");
    let commands = rig.cloud.commands(rig.vm).unwrap();
    spawn(InstallKind::Inject, other, "second").await.unwrap().unwrap();
    assert!(!first.is_finished(), "the other machine was served while this one reboots");
    first.await.unwrap().unwrap();
    let boot_id = second.await.unwrap().unwrap().stdout;
    assert_eq!(
        rig.cloud.shell(rig.vm, "cat /proc/sys/kernel/random/boot_id").await.unwrap().stdout.trim_ascii(),
        boot_id.as_bytes()
    );
    assert!(rig.cloud.commands(rig.vm).unwrap() > commands);
    assert_eq!(scheduler.snapshot().running, []);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_away_in_the_middle_delays_the_install_and_nothing_runs_twice() {
    let rig = Rig::new().await;
    rig.shelf.put(web().action("echo x >> /root/runs"));
    let away = || Error::unavailable("away").with_reason(reason::AGENT_NOT_READY);
    rig.faults().inject("guest.put_files", 1, Fault::Before(away()));
    rig.faults().inject("guest.exec", 1, Fault::After(away().with_retry(Retry::Ambiguous)));
    rig.install(InstallKind::Feature, "web").await.unwrap();
    assert_eq!(rig.faults().waiting(), 0);
    assert_eq!(rig.file("/root/runs").as_deref(), Some("x\n"));
    assert_eq!(rig.file("/srv/web/run.sh").map(|text| text.len() > 10), Some(true));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_reboots_under_an_action_fails_the_install_and_leaves_nothing() {
    let rig = Rig::with(slow()).await;
    rig.shelf.put(web().action("sleep 60; echo done > /root/done"));
    let installing = tokio::spawn({
        let (executor, vm) = (rig.executor.clone(), rig.vm);
        async move { executor.install(request(InstallKind::Feature, vm, "web")).await }
    });
    until("the action", || rig.cloud.commands(rig.vm) == Some(1)).await;
    tokio::time::sleep(seconds(10)).await;
    assert!(rig.cloud.reboot_guest(rig.vm));
    installing.await.unwrap().unwrap_err();
    assert_eq!(rig.cloud.commands(rig.vm), Some(1), "it is not run again");
    assert_eq!((rig.stored().await, rig.file("/srv/web/index.html")), (vec![], None));
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_is_deleted_under_an_install_leaves_no_record() {
    let rig = Rig::with(slow()).await;
    rig.shelf.put(web().action("sleep 60"));
    let installing = tokio::spawn({
        let (executor, vm) = (rig.executor.clone(), rig.vm);
        async move { executor.install(request(InstallKind::Feature, vm, "web")).await }
    });
    until("the action", || rig.cloud.commands(rig.vm) == Some(1)).await;
    rig.cloud.delete_vm(rig.vm).await.unwrap();
    let error = installing.await.unwrap().unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::NotFound, Some(reason::GUEST_GONE)), "{error}");
    assert_eq!(rig.stored().await, []);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_before_its_install_began_takes_it_out() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    rig.shelf.put(inject("long").action("sleep 100"));
    // One waits for its guest, the other one in the queue behind a long action.
    let other = rig.another_vm("other").await;
    rig.cloud.set_agent(other, AgentMode::Stopped);
    let long = tokio::spawn({
        let (executor, vm) = (rig.executor.clone(), rig.vm);
        async move { executor.install(request(InstallKind::Inject, vm, "long")).await }
    });
    until("the long action", || rig.cloud.commands(rig.vm) == Some(1)).await;
    let waiting = [rig.vm, other].map(|vm| {
        let executor = rig.executor.clone();
        tokio::spawn(async move { executor.install(request(InstallKind::Feature, vm, "web")).await })
    });
    tokio::time::sleep(seconds(2)).await;
    for waiting in &waiting {
        waiting.abort();
    }
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(rig.queued(), 1, "only the long one is there");
    rig.cloud.set_agent(other, AgentMode::Answers);
    long.await.unwrap().unwrap();
    assert_eq!(rig.executor.list(None).await.unwrap().len(), 1);
    assert_eq!(rig.executor.shutdown(Duration::ZERO).await, 0, "no task is left");
    assert_eq!(rig.file("/srv/web/index.html"), None);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_in_the_middle_leaves_a_complete_install() {
    let rig = Rig::with(slow()).await;
    rig.shelf.put(web().action("sleep 50; echo done > /root/done").restarts());
    let installing = tokio::spawn({
        let (executor, vm) = (rig.executor.clone(), rig.vm);
        async move { executor.install(request(InstallKind::Feature, vm, "web")).await }
    });
    until("the action", || rig.cloud.commands(rig.vm) == Some(1)).await;
    installing.abort();
    until("the record", || {
        let list = futures::FutureExt::now_or_never(rig.executor.list(None));
        list.is_some_and(|list| list.unwrap().len() == 1)
    })
    .await;
    assert_eq!(rig.file("/root/done").as_deref(), Some("done\n"));
    assert_eq!(rig.cloud.boots(rig.vm), Some(2));
}

#[tokio::test(start_paused = true)]
async fn shutdown_refuses_new_work_lets_begun_work_end_and_counts_what_does_not() {
    let rig = Rig::new().await;
    rig.shelf.put(web().action("sleep 50"));
    let spawn = |vm| {
        let executor = rig.executor.clone();
        tokio::spawn(async move { executor.install(request(InstallKind::Feature, vm, "web")).await })
    };
    let running = spawn(rig.vm);
    until("the action", || rig.cloud.commands(rig.vm) == Some(1)).await;
    let queued = spawn(rig.vm);
    tokio::time::sleep(seconds(1)).await;
    assert_eq!(rig.executor.shutdown(seconds(3)).await, 1);
    assert_eq!(queued.await.unwrap().unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(rig.install(InstallKind::Feature, "web").await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(rig.executor.shutdown(seconds(300)).await, 0);
    running.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_is_out_of_sight_for_a_while_is_not_gone() {
    // As a machine is whose hypervisor makes it anew.
    let rig = Rig::new().await;
    rig.shelf.put(web());
    rig.faults().inject(
        "guest.guest_info",
        1,
        Fault::Before(Error::not_found("no domain").with_reason(reason::GUEST_GONE)),
    );
    let off = Error::new(ErrorKind::Conflict, "shut off").with_reason(reason::GUEST_NOT_RUNNING);
    rig.faults().inject("guest.guest_info", 2, Fault::Before(off));
    rig.install(InstallKind::Feature, "web").await.unwrap();
    assert_eq!(rig.faults().waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_asset_that_the_action_changed_goes_with_the_failed_install() {
    let rig = Rig::new().await;
    rig.shelf.put(web().action("echo more >> /srv/web/index.html; false"));
    rig.install(InstallKind::Feature, "web").await.unwrap_err();
    assert_eq!((rig.stored().await, rig.file("/srv/web/index.html")), (vec![], None));
}

#[tokio::test(start_paused = true)]
async fn a_hiccup_of_the_store_in_the_middle_costs_no_install() {
    for fault in [Fault::Before(Error::unavailable("away")), Fault::After(Error::timed_out("no answer"))] {
        let rig = Rig::new().await;
        rig.shelf.put(web());
        // After the record and its machine's key.
        rig.faults().inject("state.put", 3, fault);
        rig.install(InstallKind::Feature, "web").await.unwrap();
        assert_eq!(rig.faults().waiting(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn an_install_whose_last_record_was_written_is_installed_whatever_was_heard() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    rig.faults().inject("state.put", 4, Fault::HangAfter);
    rig.faults().inject("state.get", 1, Fault::Before(Error::unavailable("away")));
    let id = rig.install(InstallKind::Feature, "web").await.unwrap().id;
    assert_eq!(rig.faults().waiting(), 0);
    assert_eq!(rig.executor.list(None).await.unwrap()[0].id, id);
    assert!(rig.file("/srv/web/index.html").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_in_its_turn_before_the_record_leaves_nothing() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    rig.faults().inject("guest.guest_info", 1, Fault::Delay(seconds(10)));
    let installing = tokio::spawn({
        let (executor, vm) = (rig.executor.clone(), rig.vm);
        async move { executor.install(request(InstallKind::Feature, vm, "web")).await }
    });
    tokio::time::sleep(seconds(5)).await;
    assert_eq!(rig.faults().waiting(), 0);
    installing.abort();
    tokio::time::sleep(seconds(60)).await;
    assert_eq!((rig.stored().await, rig.cloud.commands(rig.vm)), (vec![], Some(0)));
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_while_a_begun_install_waits_for_a_permit_leaves_it_complete() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    rig.shelf.put(inject("long").action("sleep 100"));
    let (scheduler, executor) = start(&rig.cloud, &rig.cloud, &rig.store, &rig.shelf, 1);
    let other = rig.another_vm("other").await;
    rig.faults().inject("guest.put_files", 1, Fault::Before(Error::unavailable("away")));
    let spawn = |vm, package: &'static str| {
        let executor = executor.clone();
        tokio::spawn(async move { executor.install(request(InstallKind::Feature, vm, package)).await })
    };
    let interrupted = spawn(rig.vm, "web");
    until("the interruption", || rig.faults().waiting() == 0).await;
    let long = {
        let executor = executor.clone();
        tokio::spawn(async move { executor.install(request(InstallKind::Inject, other, "long")).await })
    };
    until("the long action", || rig.cloud.commands(other) == Some(1)).await;
    until("the queue", || scheduler.snapshot().depth == 1).await;
    interrupted.abort();
    long.await.unwrap().unwrap();
    tokio::time::sleep(seconds(10)).await;
    assert_eq!(executor.list(Some(rig.vm)).await.unwrap().len(), 1);
    assert!(rig.file("/srv/web/run.sh").is_some());
}

#[tokio::test(start_paused = true)]
async fn the_wait_for_a_boot_is_not_taken_from_what_an_interruption_may_take() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    rig.cloud.set_agent(rig.vm, AgentMode::Stopped);
    rig.faults().inject("guest.put_files", 1, Fault::Before(Error::unavailable("away")));
    let installing = tokio::spawn({
        let (executor, vm) = (rig.executor.clone(), rig.vm);
        async move { executor.install(request(InstallKind::Feature, vm, "web")).await }
    });
    tokio::time::sleep(seconds(100)).await;
    rig.cloud.set_agent(rig.vm, AgentMode::Answers);
    until("the interruption", || rig.faults().waiting() == 0).await;
    rig.cloud.set_agent(rig.vm, AgentMode::Stopped);
    tokio::time::sleep(seconds(100)).await;
    rig.cloud.set_agent(rig.vm, AgentMode::Answers);
    installing.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_install_that_waits_for_its_guest_does_not_keep_the_machine() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    rig.cloud.set_agent(rig.vm, AgentMode::Stopped);
    let _waiting = tokio::spawn({
        let (executor, vm) = (rig.executor.clone(), rig.vm);
        async move { executor.install(request(InstallKind::Feature, vm, "web")).await }
    });
    tokio::time::sleep(seconds(10)).await;
    assert!(!rig.executor.inner.holds.is_held(rig.vm));
}

#[tokio::test(start_paused = true)]
async fn a_package_that_changes_while_its_guest_boots_is_not_installed() {
    let rig = Rig::new().await;
    rig.shelf.put(web());
    rig.cloud.set_agent(rig.vm, AgentMode::Stopped);
    let installing = tokio::spawn({
        let (executor, vm) = (rig.executor.clone(), rig.vm);
        async move { executor.install(request(InstallKind::Feature, vm, "web")).await }
    });
    tokio::time::sleep(seconds(10)).await;
    // The second file, when the record's digests are known.
    std::fs::write(rig.shelf.path("web").join("asset1"), "#!/bin/sh\necho evil\n").unwrap();
    rig.cloud.set_agent(rig.vm, AgentMode::Answers);
    let error = installing.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.to_string().contains("asset1 changed"), "{error}");
    assert_eq!((rig.stored().await, rig.file("/srv/web/index.html")), (vec![], None));
}
