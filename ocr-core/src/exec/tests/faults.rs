//! A fault at every call, before and after its effect, and a kill at every call: nothing is left but what is recorded.

use proptest::prelude::*;

use super::*;
use crate::error::reason;

const FILES: [&str; 2] = ["/srv/web/a", "/srv/web/b"];

fn shapes() -> [Draft; 3] {
    let web = || feature("web").asset(FILES[0], 0o644, "a").asset(FILES[1], 0o644, "b");
    [web(), web().action("cat /srv/web/a /srv/web/b > /root/did"), web().action("true").restarts().delete("true")]
}

impl Rig {
    /// Either one complete install and its record, or nothing at all.
    async fn check(&self, what: &str) -> bool {
        let installed = self.executor.list(None).await.unwrap().len();
        let files: Vec<_> = FILES.iter().filter(|path| self.file(path).is_some()).collect();
        let stored = self.stored().await;
        match installed {
            0 => assert_eq!((files, stored), (vec![], vec![]), "{what}"),
            1 => assert_eq!((files.len(), stored.len()), (FILES.len(), 2), "{what}: {stored:?}"),
            _ => panic!("{what}: {stored:?}"),
        }
        assert_eq!(self.queued(), 0, "{what}");
        installed == 1
    }
}

type NamedFault = (&'static str, fn() -> Fault);

const FAULTS: [NamedFault; 6] = [
    ("refused for now", || Fault::Before(Error::unavailable("away").with_reason(reason::AGENT_NOT_READY))),
    ("refused for good", || Fault::Before(Error::internal("broken"))),
    ("answer lost", || Fault::After(Error::timed_out("no answer"))),
    ("answer lost, said to be refused for good", || Fault::After(Error::internal("broken"))),
    ("hangs", || Fault::Hang),
    ("hangs after its effect", || Fault::HangAfter),
];

#[tokio::test(start_paused = true)]
async fn a_fault_at_any_call_of_an_install_leaves_all_or_nothing() {
    let mut tried = 0;
    for (shape, package) in (0..).zip(shapes()) {
        for (name, fault) in FAULTS {
            for nth in 1.. {
                let what = format!("package {shape}, call {nth} {name}");
                let mut rig = Rig::with(slow()).await;
                tokio::time::sleep(seconds(60)).await;
                rig.shelf.put(package.clone());
                rig.faults().inject("*", nth, fault());
                let result = tokio::time::timeout(seconds(36_000), rig.install(InstallKind::Feature, "web")).await;
                let result = result.unwrap_or_else(|_| panic!("{what}: it never ends"));
                if rig.faults().waiting() > 0 {
                    assert!(result.is_ok(), "{what}");
                    break;
                }
                tried += 1;
                // What could not be undone at once is undone by the next server.
                rig.restart();
                rig.executor.recover().await.unwrap();
                let installed = rig.check(&what).await;
                assert!(installed || result.is_err(), "{what}: said to be installed, and is not");
            }
        }
    }
    assert!(tried > 100, "only {tried} faults fired");
}

#[tokio::test(start_paused = true)]
async fn a_fault_at_any_call_of_a_removal_leaves_all_or_nothing_and_it_can_be_repeated() {
    let mut tried = 0;
    for (name, fault) in FAULTS {
        for nth in 1.. {
            let what = format!("call {nth} {name}");
            let rig = Rig::with(slow()).await;
            tokio::time::sleep(seconds(60)).await;
            rig.shelf.put(shapes()[2].clone().delete("rm -f /srv/web/a"));
            let id = rig.install(InstallKind::Feature, "web").await.unwrap().id;
            rig.faults().inject("*", nth, fault());
            let removal = rig.executor.remove(InstallKind::Feature, id);
            let result = tokio::time::timeout(seconds(36_000), removal).await;
            let result = result.unwrap_or_else(|_| panic!("{what}: it never ends"));
            if rig.faults().waiting() > 0 {
                assert!(result.is_ok(), "{what}");
                break;
            }
            tried += 1;
            let gone = rig.executor.list(None).await.unwrap().is_empty();
            assert!(gone || result.is_err(), "{what}: said to be gone, and is not");
            rig.executor.remove(InstallKind::Feature, id).await.unwrap();
            rig.executor.recover().await.unwrap();
            assert!(!rig.check(&what).await, "{what}");
        }
    }
    assert!(tried > 30, "only {tried} faults fired");
}

/// Ends an executor where it is: its tasks are dropped with their runtime, as by SIGKILL.
fn killed_at_call(rig: &Rig, nth: u64, after: bool, act: impl AsyncFnOnce(Executor)) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    rig.faults().inject("*", nth, if after { Fault::HangAfter } else { Fault::Hang });
    runtime.block_on(async {
        let (_scheduler, executor) = start(&rig.cloud, &rig.cloud, &rig.store, &rig.shelf, 8);
        let killed = async {
            while rig.faults().waiting() > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            // The call's effect comes first.
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        tokio::select! {
            biased;
            () = killed => true,
            () = act(executor) => {
                let killed = rig.faults().waiting() == 0;
                rig.faults().clear();
                killed
            }
        }
    })
}

#[test]
fn a_kill_at_any_call_of_an_install_leaves_all_or_nothing_after_recovery() {
    let mut tried = 0;
    for (shape, package) in (0..).zip(shapes()) {
        for after in [false, true] {
            for nth in 1.. {
                let what = format!("package {shape}, killed at call {nth}, after its effect: {after}");
                let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
                let runtime = runtime.unwrap();
                let mut rig = runtime.block_on(Rig::new());
                rig.shelf.put(package.clone());
                let killed = killed_at_call(&rig, nth, after, async |executor| {
                    executor.install(request(InstallKind::Feature, rig.vm, "web")).await.unwrap();
                });
                if !killed {
                    break;
                }
                tried += 1;
                runtime.block_on(async {
                    // Each runtime has a paused clock of its own; the guest is up again by any of them.
                    tokio::time::sleep(seconds(3600)).await;
                    rig.restart();
                    let report = rig.executor.recover().await.unwrap();
                    assert_eq!(report.failed, Vec::<String>::new(), "{what}");
                    rig.check(&what).await;
                    assert_eq!(rig.executor.recover().await.unwrap(), RecoverReport::default(), "{what}");
                });
            }
        }
    }
    assert!(tried > 40, "only {tried} kills");
}

#[test]
fn a_kill_at_any_call_of_a_removal_is_finished_or_never_began() {
    let mut tried = 0;
    for after in [false, true] {
        for nth in 1.. {
            let what = format!("killed at call {nth}, after its effect: {after}");
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            let mut rig = runtime.block_on(Rig::new());
            rig.shelf.put(shapes()[2].clone().delete("rm -f /srv/web/a"));
            let id = runtime.block_on(rig.install(InstallKind::Feature, "web")).unwrap().id;
            let killed = killed_at_call(&rig, nth, after, async |executor| {
                executor.remove(InstallKind::Feature, id).await.unwrap();
            });
            if !killed {
                break;
            }
            tried += 1;
            runtime.block_on(async {
                tokio::time::sleep(seconds(3600)).await;
                rig.restart();
                let report = rig.executor.recover().await.unwrap();
                assert_eq!(report.failed, Vec::<String>::new(), "{what}");
                rig.check(&what).await;
            });
        }
    }
    assert!(tried > 10, "only {tried} kills");
}

#[test]
fn a_kill_at_any_call_of_a_recovery_is_made_good_by_the_next() {
    let mut tried = 0;
    for after in [false, true] {
        for nth in 1.. {
            let what = format!("killed at call {nth}, after its effect: {after}");
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            let mut rig = runtime.block_on(Rig::new());
            rig.shelf.put(shapes()[1].clone());
            // Leftovers: an install whose action ran, and one on a machine that is gone.
            for vm in [rig.vm, runtime.block_on(rig.another_vm("gone"))] {
                rig.faults().inject("guest.exec", 1, Fault::HangAfter);
                killed_at_call(&rig, u64::MAX, true, async |executor| {
                    let install = executor.install(request(InstallKind::Feature, vm, "web"));
                    let _killed = tokio::time::timeout(seconds(1), install).await;
                });
                if vm != rig.vm {
                    rig.cloud.vanish_vm(vm);
                }
            }
            assert_eq!(runtime.block_on(rig.stored()).len(), 4);
            let killed = killed_at_call(&rig, nth, after, async |executor| {
                executor.recover().await.unwrap();
            });
            if !killed {
                break;
            }
            tried += 1;
            runtime.block_on(async {
                rig.restart();
                assert_eq!(rig.executor.recover().await.unwrap().failed, Vec::<String>::new(), "{what}");
                assert!(!rig.check(&what).await, "{what}");
            });
        }
    }
    assert!(tried > 20, "only {tried} kills");
}

#[tokio::test(start_paused = true)]
async fn a_stream_lives_through_a_fault_at_any_call() {
    use futures::StreamExt;
    let rig = Rig::new().await;
    let id = rig.command("echo 1", seconds(10)).await;
    let mut stream = rig.executor.watch(id).await.unwrap();
    for (name, fault) in FAULTS {
        for nth in 1..=6 {
            rig.faults().inject("*", nth, fault());
            let mut values = 0;
            while rig.faults().waiting() > 0 || values < 3 {
                let next = tokio::time::timeout(seconds(3600), stream.next()).await;
                let next = next.unwrap_or_else(|_| panic!("{name}, call {nth}: silence"));
                assert_eq!(next.map(|item| item.map(|item| item.value).ok()), Some(Some(1.0)), "{name}, call {nth}");
                values += 1;
            }
        }
    }
}

/// What an operator, a user and chance do to two machines.
#[derive(Clone, Debug)]
enum Move {
    Install { vm: usize, package: usize },
    Remove { nth: usize },
    Fault { nth: u64, kind: usize },
    Agent { vm: usize, answers: bool },
    Reboot { vm: usize },
    Delete { vm: usize },
    Restart,
    Pause,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        5 => (0..2_usize, 0..4_usize).prop_map(|(vm, package)| Move::Install { vm, package }),
        3 => (0..8_usize).prop_map(|nth| Move::Remove { nth }),
        4 => (1..12_u64, 0..6_usize).prop_map(|(nth, kind)| Move::Fault { nth, kind }),
        1 => (0..2_usize, any::<bool>()).prop_map(|(vm, answers)| Move::Agent { vm, answers }),
        1 => (0..2_usize).prop_map(|vm| Move::Reboot { vm }),
        1 => (0..2_usize).prop_map(|vm| Move::Delete { vm }),
        1 => Just(Move::Restart),
        1 => Just(Move::Pause),
    ];
    prop::collection::vec(one, 1..14)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Packages share files, so removals must count. In the end each machine has exactly the files of what is recorded.
    #[test]
    fn whatever_happens_guests_hold_what_the_records_say(moves in moves()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut rig = Rig::with(slow()).await;
            let vms = [rig.vm, rig.another_vm("other").await];
            let assets: [&[&str]; 4] = [&["/x/a", "/x/b"], &["/x/b", "/x/c"], &["/x/c"], &["/x/a", "/x/d"]];
            for (index, paths) in assets.iter().enumerate() {
                let package = paths.iter().fold(feature(&format!("p{index}")), |package, path| package.asset(path, 0o644, path));
                rig.shelf.put(match index {
                    0 => package,
                    1 => package.action("sleep 3").delete("true"),
                    2 => package.action("true").restarts(),
                    _ => package.action("exit 1"),
                });
            }
            let mut background = Vec::new();
            for step in moves {
                match step {
                    Move::Install { vm, package } => {
                        let (executor, request) =
                            (rig.executor.clone(), request(InstallKind::Feature, vms[vm], &format!("p{package}")));
                        background.push(tokio::spawn(async move { executor.install(request).await.map(drop) }));
                    }
                    Move::Remove { nth } => {
                        if let Ok(Some(record)) = rig.executor.list(None).await.map(|list| list.get(nth).cloned()) {
                            let executor = rig.executor.clone();
                            background.push(tokio::spawn(async move {
                                executor.remove(record.kind, record.id).await.map(drop)
                            }));
                        }
                    }
                    Move::Fault { nth, kind } => rig.faults().inject("*", nth, FAULTS[kind].1()),
                    Move::Agent { vm, answers } => {
                        rig.cloud.set_agent(vms[vm], if answers { AgentMode::Answers } else { AgentMode::Stopped });
                    }
                    Move::Reboot { vm } => {
                        rig.cloud.reboot_guest(vms[vm]);
                    }
                    Move::Delete { vm } => {
                        rig.cloud.vanish_vm(vms[vm]);
                    }
                    Move::Restart => {
                        rig.executor.shutdown(seconds(36_000)).await;
                        rig.restart();
                    }
                    Move::Pause => tokio::time::sleep(seconds(7)).await,
                }
                tokio::task::yield_now().await;
            }
            for done in background {
                let _either_way = tokio::time::timeout(seconds(360_000), done).await.expect("it never ends").unwrap();
            }
            // All trouble is over.
            rig.faults().clear();
            for vm in vms {
                rig.cloud.set_agent(vm, AgentMode::Answers);
            }
            tokio::time::sleep(seconds(60)).await;
            rig.restart();
            let report = rig.executor.recover().await.unwrap();
            assert_eq!(report.failed, Vec::<String>::new());
            assert_eq!(rig.executor.recover().await.unwrap(), RecoverReport::default());
            let records = rig.executor.list(None).await.unwrap();
            assert_eq!(rig.stored().await.len(), records.len() * 2);
            for vm in vms {
                let mut wanted: Vec<&str> = records
                    .iter()
                    .filter(|record| record.vm == vm)
                    .flat_map(|record| {
                        let name = &record.package.as_ref().unwrap().0;
                        assets[name[1..].parse::<usize>().unwrap()]
                    })
                    .copied()
                    .collect();
                wanted.sort_unstable();
                wanted.dedup();
                let found: Vec<&str> = ["/x/a", "/x/b", "/x/c", "/x/d"]
                    .into_iter()
                    .filter(|path| rig.cloud.guest_file(vm, path).is_some())
                    .collect();
                assert_eq!(found, wanted);
            }
        });
    }
}
