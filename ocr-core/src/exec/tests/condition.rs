use futures::{FutureExt, StreamExt};

use super::{log::Log, *};
use crate::{ErrorKind, error::reason};

/// The next item of a stream, which must come within an hour.
async fn next(stream: &mut ConditionStream) -> Option<Result<ConditionValue>> {
    tokio::time::timeout(seconds(3600), stream.next()).await.expect("the stream is silent")
}

async fn value(stream: &mut ConditionStream) -> f32 {
    next(stream).await.expect("the stream ended").expect("the stream failed").value
}

/// What a condition shows that prints this file.
const FLAG: &str = "cat /root/flag";

impl Rig {
    fn flag(&self, text: &str) {
        self.cloud.write_guest_file(self.vm, "/root/flag", text.as_bytes()).unwrap();
    }

    fn status(&self) -> ConditionStatus {
        self.executor.conditions().pop().expect("nothing is watched")
    }
}

#[tokio::test(start_paused = true)]
async fn a_condition_runs_while_it_is_watched_and_not_before() {
    let rig = Rig::new().await;
    rig.flag("0");
    let id = rig.command(FLAG, seconds(10)).await;
    tokio::time::sleep(seconds(100)).await;
    assert_eq!(rig.cloud.commands(rig.vm), Some(0));
    let record = rig.executor.list(None).await.unwrap().remove(0);
    assert_eq!((record.id, record.kind, record.interval), (id, InstallKind::Condition, Some(seconds(10))));

    let mut stream = rig.executor.watch(id).await.unwrap();
    let first = next(&mut stream).await.unwrap().unwrap();
    assert_eq!((first.condition, first.value, first.lateness), (id, 0.0, Duration::ZERO));
    rig.flag("1");
    assert_eq!(value(&mut stream).await, 1.0);
    let before = tokio::time::Instant::now();
    assert_eq!(value(&mut stream).await, 1.0);
    assert_eq!(before.elapsed(), seconds(10), "on the grid");
    drop(stream);
    let commands = rig.cloud.commands(rig.vm);
    tokio::time::sleep(seconds(100)).await;
    assert_eq!((rig.cloud.commands(rig.vm), rig.executor.conditions()), (commands, vec![]));
}

#[tokio::test(start_paused = true)]
async fn a_condition_package_brings_its_assets_its_action_and_its_interval() {
    let rig = Rig::new().await;
    rig.shelf.put(condition("check", "/opt/check/run", seconds(20)).asset(
        "/opt/check/run",
        0o755,
        "#!/bin/sh\necho $RESULT\nwhoami >&2\n",
    ));
    let request = ConditionRequest {
        account: account("user"),
        probe: Probe::Package(PackageRef { name: "check".to_owned(), version: String::new() }),
        environment: BTreeMap::from([("RESULT".to_owned(), "0.5".to_owned())]),
        ..command(rig.vm, "", Duration::ZERO)
    };
    let installed = rig.executor.create_condition(request).await.unwrap();
    assert_eq!((installed.stdout.as_str(), installed.stderr.as_str()), ("", ""));
    assert_eq!(rig.cloud.commands(rig.vm), Some(0), "not run at its creation");
    let mut stream = rig.executor.watch(installed.id).await.unwrap();
    assert_eq!((value(&mut stream).await, rig.status().interval), (0.5, seconds(20)));
    assert_eq!(rig.executor.list(None).await.unwrap()[0].package, Some(("check".to_owned(), "1.0.0".to_owned())));
}

#[tokio::test(start_paused = true)]
async fn many_streams_share_one_run() {
    let rig = Rig::new().await;
    rig.flag("1");
    let id = rig.command(FLAG, seconds(10)).await;
    let mut streams = Vec::new();
    for _ in 0..100 {
        streams.push(rig.executor.watch(id).await.unwrap());
    }
    for run in 1..=5 {
        for stream in &mut streams {
            assert_eq!(value(stream).await, 1.0);
        }
        assert_eq!(rig.cloud.commands(rig.vm), Some(run));
    }
    assert_eq!((rig.status().watchers, rig.queued()), (100, 1));
}

#[tokio::test(start_paused = true)]
async fn a_slow_stream_gets_the_latest_value_and_holds_nobody_up() {
    let rig = Rig::new().await;
    let id = rig.command("echo x >> /root/n; wc -l < /root/n", seconds(1)).await;
    let (mut slow, mut quick) = (rig.executor.watch(id).await.unwrap(), rig.executor.watch(id).await.unwrap());
    for run in 1..=50 {
        assert_eq!(value(&mut quick).await, run as f32);
    }
    assert_eq!(value(&mut slow).await, 50.0);
}

#[tokio::test(start_paused = true)]
async fn the_last_stream_that_is_dropped_frees_the_place_at_once_also_in_the_queue() {
    let rig = Rig::new().await;
    rig.flag("1");
    rig.shelf.put(inject("long").action("sleep 100"));
    let id = rig.command(FLAG, seconds(1)).await;
    let streams = [rig.executor.watch(id).await.unwrap(), rig.executor.watch(id).await.unwrap()];
    let long = tokio::spawn({
        let (executor, vm) = (rig.executor.clone(), rig.vm);
        async move { executor.install(request(InstallKind::Inject, vm, "long")).await }
    });
    // Its next run waits behind the long action.
    tokio::time::sleep(seconds(30)).await;
    let commands = rig.cloud.commands(rig.vm);
    assert_eq!(rig.queued(), 2);
    let [one, other] = streams;
    drop(one);
    assert_eq!((rig.queued(), rig.executor.conditions().len()), (2, 1));
    drop(other);
    assert_eq!((rig.queued(), rig.executor.conditions().len()), (1, 0));
    assert_eq!(rig.executor.inner.runners.lock().unwrap().len(), 0, "nothing piles up");
    long.await.unwrap().unwrap();
    tokio::time::sleep(seconds(30)).await;
    assert_eq!(rig.cloud.commands(rig.vm), commands);
}

#[tokio::test(start_paused = true)]
async fn no_transient_fault_ends_a_stream() {
    let rig = Rig::with(slow()).await;
    tokio::time::sleep(seconds(60)).await;
    rig.flag("1");
    let id = rig.command(&format!("{FLAG} || exit 4"), seconds(10)).await;
    let mut stream = rig.executor.watch(id).await.unwrap();
    assert_eq!(value(&mut stream).await, 1.0);

    // The guest reboots.
    assert!(rig.cloud.reboot_guest(rig.vm));
    assert_eq!(value(&mut stream).await, 1.0);
    // Its agent is away for an hour.
    rig.cloud.set_agent(rig.vm, AgentMode::Stopped);
    tokio::time::sleep(seconds(3600)).await;
    let status = rig.status();
    assert!(status.consecutive_faults > 300, "{status:?}");
    assert!(status.fault.unwrap().contains("does not answer"));
    assert!(status.last_value_age.unwrap() > seconds(3500));
    rig.cloud.set_agent(rig.vm, AgentMode::Answers);
    assert_eq!(value(&mut stream).await, 1.0);
    assert_eq!((rig.status().fault, rig.status().consecutive_faults), (None, 0));
    // It is switched off, and on again.
    rig.cloud.set_power(rig.vm, crate::PowerAction::Stop { grace: None }).await.unwrap();
    tokio::time::sleep(seconds(100)).await;
    assert!(rig.status().fault.unwrap().contains("not running"));
    rig.cloud.set_power(rig.vm, crate::PowerAction::Start).await.unwrap();
    assert_eq!(value(&mut stream).await, 1.0);
    // What it writes is no number, or it fails.
    for (text, fault) in [
        ("0,5", "\"0,5\""),
        ("NaN", "\"NaN\""),
        ("-inf", "\"-inf\""),
        ("", "wrote nothing"),
        ("1 2", "\"1 2\""),
        ("1e99", "\"1e99\""),
    ] {
        rig.flag(text);
        until("the fault", || rig.status().fault.is_some_and(|seen| seen.contains(fault))).await;
        assert!(stream.next().now_or_never().is_none(), "{text}");
    }
    rig.cloud.shell(rig.vm, "rm /root/flag").await.unwrap();
    until("the exit code", || rig.status().fault.is_some_and(|seen| seen.contains("exit code 4"))).await;
    assert!(rig.status().fault.unwrap().contains("stderr: cat: "));
    rig.flag("0.25\n");
    assert_eq!(value(&mut stream).await, 0.25);
    // A run hangs.
    rig.faults().inject("guest.exec", 1, Fault::Hang);
    until("the time-out", || rig.status().consecutive_faults > 0 || rig.faults().waiting() > 0).await;
    assert_eq!(value(&mut stream).await, 0.25);
    // The compute backend is away while the guest is, and so is the store.
    rig.cloud.set_agent(rig.vm, AgentMode::Stopped);
    for _ in 0..30 {
        rig.faults().inject("compute.get_vm", 1, Fault::Before(Error::unavailable("away")));
        rig.faults().inject("state.get", 1, Fault::Before(Error::unavailable("away")));
    }
    tokio::time::sleep(seconds(600)).await;
    rig.cloud.set_agent(rig.vm, AgentMode::Answers);
    rig.faults().clear();
    assert_eq!(value(&mut stream).await, 0.25);
}

#[tokio::test(start_paused = true)]
async fn a_stream_ends_with_not_found_when_its_machine_is_deleted_and_the_records_go_too() {
    for vanish in [false, true] {
        let rig = Rig::with(slow()).await;
        tokio::time::sleep(seconds(60)).await;
        rig.flag("1");
        rig.shelf.put(feature("web").asset("/srv/x", 0o644, "x"));
        rig.install(InstallKind::Feature, "web").await.unwrap();
        let id = rig.command(FLAG, seconds(10)).await;
        let mut streams = [rig.executor.watch(id).await.unwrap(), rig.executor.watch(id).await.unwrap()];
        assert_eq!(value(&mut streams[0]).await, 1.0);
        if vanish {
            assert!(rig.cloud.vanish_vm(rig.vm));
        } else {
            rig.cloud.delete_vm(rig.vm).await.unwrap();
        }
        let began = tokio::time::Instant::now();
        for stream in &mut streams {
            let error = loop {
                match next(stream).await.unwrap() {
                    Ok(_) => {}
                    Err(error) => break error,
                }
            };
            assert_eq!((error.kind(), error.reason()), (ErrorKind::NotFound, Some(reason::GUEST_GONE)));
            assert!(next(stream).await.is_none());
        }
        assert!(began.elapsed() <= seconds(12), "{:?}", began.elapsed());
        tokio::time::sleep(seconds(1)).await;
        assert_eq!(rig.stored().await, []);
        assert_eq!((rig.queued(), rig.executor.conditions()), (0, vec![]));
        assert_eq!(rig.executor.watch(id).await.err().unwrap().kind(), ErrorKind::NotFound);
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_ends_with_not_found_when_its_condition_is_removed() {
    let rig = Rig::new().await;
    rig.flag("1");
    let id = rig.command(FLAG, seconds(10)).await;
    let mut stream = rig.executor.watch(id).await.unwrap();
    assert_eq!(value(&mut stream).await, 1.0);
    assert_eq!(rig.executor.remove(InstallKind::Condition, id).await.unwrap(), Deletion::Deleted);
    assert_eq!(rig.queued(), 0, "also while nobody reads the stream");
    assert_eq!(next(&mut stream).await.unwrap().unwrap_err().kind(), ErrorKind::NotFound);
    assert!(next(&mut stream).await.is_none());
    assert_eq!(rig.executor.watch(id).await.err().unwrap().kind(), ErrorKind::NotFound);
    assert_eq!((rig.queued(), rig.stored().await), (0, vec![]));
}

#[tokio::test(start_paused = true)]
async fn the_removal_of_a_command_waits_for_nobody() {
    let rig = Rig::new().await;
    rig.flag("1");
    let id = rig.command(FLAG, seconds(10)).await;
    rig.cloud.set_agent(rig.vm, AgentMode::Stopped);
    let began = tokio::time::Instant::now();
    rig.executor.remove(InstallKind::Condition, id).await.unwrap();
    assert_eq!((began.elapsed(), rig.stored().await), (Duration::ZERO, vec![]));
}

#[tokio::test(start_paused = true)]
async fn a_condition_that_another_process_removed_ends_when_its_files_are_missed() {
    let mut rig = Rig::new().await;
    rig.shelf.put(condition("check", "/opt/run", seconds(10)).asset("/opt/run", 0o755, "#!/bin/sh\necho 1\n"));
    let request = ConditionRequest {
        probe: Probe::Package(PackageRef { name: "check".to_owned(), version: String::new() }),
        ..command(rig.vm, "", Duration::ZERO)
    };
    let id = rig.executor.create_condition(request).await.unwrap().id;
    let mut stream = rig.executor.watch(id).await.unwrap();
    assert_eq!(value(&mut stream).await, 1.0);
    let here = rig.executor.clone();
    rig.restart();
    rig.executor.remove(InstallKind::Condition, id).await.unwrap();
    assert_eq!(next(&mut stream).await.unwrap().unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(here.conditions(), []);
}

#[tokio::test(start_paused = true)]
async fn a_condition_shows_the_interval_it_wants_and_the_one_it_gets() {
    let rig = Rig::new().await;
    rig.flag("1");
    let id = rig.command(FLAG, seconds(10)).await;
    let mut stream = rig.executor.watch(id).await.unwrap();
    assert_eq!(value(&mut stream).await, 1.0);
    let status = rig.status();
    assert_eq!((status.interval, status.interval_got, status.lateness_quantiles), (seconds(10), None, None));
    for _ in 0..20 {
        value(&mut stream).await;
    }
    let status = rig.status();
    assert_eq!((status.interval_got, status.skipped, status.runs), (Some(seconds(10)), 0, 21));
    assert!(status.lateness_quantiles.unwrap().p99 <= Duration::from_millis(2), "{status:?}");
    assert!(status.late_now() <= Duration::from_millis(2));

    // Another operation keeps the machine: no run says that it is late, but it is.
    let busy = tokio::spawn({
        let (scheduler, vm) = (rig.scheduler.clone(), rig.vm);
        async move {
            let work = async {
                tokio::time::sleep(seconds(95)).await;
                Ok(())
            };
            scheduler.run_once(vm, "long work", seconds(1000), work).await
        }
    });
    tokio::time::sleep(seconds(90)).await;
    let late = rig.status().late_now();
    assert!((seconds(69)..=seconds(81)).contains(&late), "{late:?}");
    let holder = rig.executor.holder(rig.vm).unwrap();
    assert_eq!(holder.what, "long work");
    assert!((seconds(80)..=seconds(90)).contains(&holder.held_for), "{holder:?}");
    busy.await.unwrap().unwrap();
    value(&mut stream).await;
    assert!(rig.status().skipped >= 7, "{:?}", rig.status());
    assert_eq!(rig.executor.holder(VmId::random()), None);
}

#[tokio::test(start_paused = true)]
async fn many_streams_of_one_condition_get_every_value_and_each_frees_its_own_seat() {
    let rig = Rig::new().await;
    rig.flag("1");
    let id = rig.command(FLAG, seconds(10)).await;
    let mut streams = Vec::new();
    for _ in 0..200 {
        streams.push(rig.executor.watch(id).await.unwrap());
    }
    for round in 0..3 {
        // All wait for the same value, more than are woken at once.
        let values = futures::future::join_all(streams.iter_mut().map(value)).await;
        assert_eq!(values, vec![1.0; streams.len()], "round {round}");
        let left = streams.len() / 2;
        streams.truncate(left);
        assert_eq!(rig.status().watchers, left);
    }
    rig.executor.remove(InstallKind::Condition, id).await.unwrap();
    for mut stream in streams {
        assert_eq!(next(&mut stream).await.unwrap().unwrap_err().kind(), ErrorKind::NotFound);
        assert!(next(&mut stream).await.is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_moves_to_another_task_is_woken_there() {
    let rig = Rig::new().await;
    rig.flag("1");
    let id = rig.command(FLAG, seconds(10)).await;
    let mut stream = rig.executor.watch(id).await.unwrap();
    assert_eq!(value(&mut stream).await, 1.0);
    assert!(stream.next().now_or_never().is_none());
    let elsewhere = tokio::spawn(async move { value(&mut stream).await });
    assert_eq!(elsewhere.await.unwrap(), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_joins_gets_values_from_then_on() {
    let rig = Rig::new().await;
    rig.flag("1");
    let id = rig.command(FLAG, seconds(10)).await;
    let mut first = rig.executor.watch(id).await.unwrap();
    assert_eq!(value(&mut first).await, 1.0);
    rig.flag("0");
    let mut second = rig.executor.watch(id).await.unwrap();
    assert!(second.next().now_or_never().is_none(), "the value from before is not for it");
    assert_eq!((value(&mut second).await, value(&mut first).await), (0.0, 0.0));
}

#[tokio::test(start_paused = true)]
async fn a_condition_survives_a_restart_of_the_executor_environment_and_all() {
    let mut rig = Rig::new().await;
    let request = ConditionRequest {
        environment: BTreeMap::from([("LEVEL".to_owned(), "0.75".to_owned())]),
        ..command(rig.vm, "echo $LEVEL", seconds(10))
    };
    let id = rig.executor.create_condition(request).await.unwrap().id;
    rig.restart();
    assert_eq!(rig.executor.recover().await.unwrap(), RecoverReport::default());
    assert_eq!(value(&mut rig.executor.watch(id).await.unwrap()).await, 0.75);
}

#[tokio::test(start_paused = true)]
async fn a_stream_works_on_when_the_executor_was_dropped() {
    let rig = Rig::new().await;
    rig.flag("1");
    let id = rig.command(FLAG, seconds(10)).await;
    let mut stream = rig.executor.watch(id).await.unwrap();
    drop((rig.executor, rig.scheduler));
    for _ in 0..3 {
        assert_eq!(value(&mut stream).await, 1.0);
    }
}

#[tokio::test(start_paused = true)]
async fn shutdown_ends_streams_and_says_why() {
    let rig = Rig::new().await;
    rig.flag("1");
    let id = rig.command(FLAG, seconds(10)).await;
    let mut stream = rig.executor.watch(id).await.unwrap();
    assert_eq!(value(&mut stream).await, 1.0);
    rig.executor.shutdown(seconds(1)).await;
    assert_eq!(next(&mut stream).await.unwrap().unwrap_err().kind(), ErrorKind::Unavailable);
    assert!(next(&mut stream).await.is_none());
    assert_eq!(rig.executor.watch(id).await.err().unwrap().kind(), ErrorKind::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn an_install_that_waits_for_its_reboot_holds_conditions_and_they_say_so() {
    let rig = Rig::with(slow()).await;
    tokio::time::sleep(seconds(60)).await;
    rig.flag("1");
    rig.shelf.put(feature("web").action("true").restarts());
    let id = rig.command(FLAG, seconds(1)).await;
    let mut stream = rig.executor.watch(id).await.unwrap();
    assert_eq!(value(&mut stream).await, 1.0);
    let installing = tokio::spawn({
        let (executor, vm) = (rig.executor.clone(), rig.vm);
        async move { executor.install(request(InstallKind::Feature, vm, "web")).await }
    });
    until("the fault", || rig.status().fault.is_some_and(|fault| fault.contains("reboot"))).await;
    assert!(!installing.is_finished());
    assert_eq!(value(&mut stream).await, 1.0);
    installing.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn only_a_condition_can_be_watched() {
    let rig = Rig::new().await;
    rig.shelf.put(feature("web").asset("/srv/x", 0o644, "x"));
    let id = rig.install(InstallKind::Feature, "web").await.unwrap().id;
    let error = rig.executor.watch(id).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("feature"), "{error}");
    assert_eq!(rig.executor.watch(InstallId::random()).await.err().unwrap().kind(), ErrorKind::NotFound);
}

#[tokio::test(start_paused = true)]
async fn a_fault_is_logged_once_and_so_is_its_end() {
    let (log, _guard) = Log::start();
    let rig = Rig::new().await;
    rig.flag("1");
    let id = rig.command(FLAG, seconds(1)).await;
    let mut stream = rig.executor.watch(id).await.unwrap();
    assert_eq!(value(&mut stream).await, 1.0);
    let count = |level: &str| {
        let id = id.to_string();
        log.lines()
            .iter()
            .filter(|line| line.starts_with(level) && line.contains("condition") && line.contains(&id))
            .count()
    };
    let warned = count("WARN");
    rig.cloud.set_agent(rig.vm, AgentMode::Stopped);
    tokio::time::sleep(seconds(100)).await;
    assert_eq!(count("WARN"), warned + 1, "{:#?}", log.lines());
    rig.cloud.set_agent(rig.vm, AgentMode::Answers);
    rig.flag("nonsense 7");
    tokio::time::sleep(seconds(100)).await;
    assert_eq!(count("WARN"), warned + 2);
    let informed = count("INFO");
    rig.flag("1");
    while value(&mut stream).await != 1.0 {}
    assert_eq!(count("INFO"), informed + 1);
    assert!(!log.lines().iter().any(|line| line.contains("nonsense")), "what guests write is not logged");
}

#[tokio::test(start_paused = true)]
async fn a_condition_on_no_machine_is_refused() {
    let rig = Rig::new().await;
    let error = rig.executor.create_condition(command(VmId::random(), "echo 1", seconds(1))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(rig.stored().await, []);
}

/// How many of three conditions are taken away under their streams.
const REMOVED: usize = 2;

/// Many tasks on several threads watch, drop and remove the same few conditions, in real time.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn streams_that_come_and_go_on_many_threads_leave_nothing() {
    let rig = Arc::new(Rig::new().await);
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(rig.command("echo 1", Duration::from_millis(2)).await);
    }
    let tasks: Vec<_> = (0..24_usize)
        .map(|task| {
            let (rig, id) = (rig.clone(), ids[task % ids.len()]);
            tokio::spawn(async move {
                for round in 0..60 {
                    let Ok(mut stream) = rig.executor.watch(id).await else { return };
                    for _ in 0..(task + round) % 3 {
                        match tokio::time::timeout(seconds(60), stream.next()).await.expect("the stream is silent") {
                            Some(Ok(seen)) => assert_eq!(seen.value, 1.0),
                            Some(Err(error)) => assert_eq!(error.kind(), ErrorKind::NotFound),
                            None => break,
                        }
                    }
                    // One task takes the condition away under the others.
                    if task < REMOVED && round == 40 {
                        rig.executor.remove(InstallKind::Condition, id).await.unwrap();
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(rig.executor.inner.runners.lock().unwrap().len(), 0);
    let free = async {
        while rig.queued() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(seconds(60), free).await.expect("an operation stays in the queue");
    assert_eq!(rig.executor.list(None).await.unwrap().len(), ids.len() - REMOVED);
}
