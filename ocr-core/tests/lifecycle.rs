//! Deploying: what holds whatever fails, whoever goes away, and whenever the process is killed.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use ocr_core::{
    ComputeBackend, Deletion, Error, ErrorKind, Name, Owner, Result, Scope, StateStore, Vm, VmFilter, VmId, VmState,
    lifecycle::{CreateRequest, DeployConfig, DeployParts, Deployer, Phase},
    memory::{AgentMode, Fault, Faults, MemoryCloud, MemoryOptions, MemoryState},
};
use proptest::prelude::*;

/// A cloud, a store, and as many deployers over them as a test wants processes.
struct World {
    cloud: MemoryCloud,
    store: MemoryState,
    faults: Faults,
}

impl World {
    fn new() -> Self {
        Self::with(MemoryOptions { boot_time: Duration::from_secs(2), agent_time: Duration::from_secs(3), ..quick() })
    }

    fn with(options: MemoryOptions) -> Self {
        let faults = Faults::default();
        let cloud = MemoryCloud::with_faults(options, faults.clone());
        Self { cloud, store: MemoryState::with_faults(faults.clone()), faults }
    }

    fn deployer(&self) -> Deployer {
        let parts = DeployParts {
            compute: Arc::new(self.cloud.clone()),
            network: Arc::new(self.cloud.clone()),
            image: Arc::new(self.cloud.clone()),
            guest: Some(Arc::new(self.cloud.clone())),
            store: Arc::new(self.store.clone()),
        };
        let mut config = DeployConfig::new(Owner::new("ours").unwrap());
        config.ready_deadline = Duration::from_secs(60);
        config.max_creates = 8;
        Deployer::new(parts, config)
    }

    async fn machines(&self) -> Vec<Vm> {
        self.cloud.list_vms(&VmFilter::owned_by(&Owner::new("ours").unwrap())).await.unwrap()
    }

    async fn records(&self) -> usize {
        self.store.list("", None, 1000).await.unwrap().len()
    }

    /// The invariant: what is there is recorded as somebody's, and what is recorded is there.
    async fn assert_nothing_is_unowned(&self, deployer: &Deployer, what: &str) {
        let records = deployer.records().await.unwrap();
        assert!(records.iter().all(|record| record.phase == Phase::Ready), "{what}: {records:?}");
        let mut recorded: Vec<_> = records.iter().filter_map(|record| record.id).collect();
        let mut there: Vec<_> = self.machines().await.iter().map(|vm| vm.id).collect();
        recorded.sort();
        there.sort();
        assert_eq!(recorded, there, "{what}");
        assert_eq!(self.records().await, there.len(), "{what}: one record for each machine, and nothing else");
    }
}

fn quick() -> MemoryOptions {
    MemoryOptions { seed: Some(1), ..MemoryOptions::default() }
}

fn web() -> CreateRequest {
    CreateRequest {
        scope: Scope::new("exercise", "blue").unwrap(),
        name: Name::new("web").unwrap(),
        cpus: 1,
        ram_bytes: 128 << 20,
        template: "tiny".to_owned(),
        links: vec!["default".to_owned()],
        labels: BTreeMap::new(),
    }
}

/// A create by a client of its own.
fn in_background(deployer: &Deployer) -> tokio::task::JoinHandle<Result<Vm>> {
    let deployer = deployer.clone();
    tokio::spawn(async move { deployer.create(web()).await })
}

fn paused<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap().block_on(test)
}

#[test]
fn a_create_answers_when_the_agent_does() {
    paused(async {
        let world = World::new();
        let started = tokio::time::Instant::now();
        let vm = world.deployer().create(web()).await.unwrap();
        assert_eq!(vm.state, VmState::Running);
        assert!(started.elapsed() >= Duration::from_secs(5), "{:?}", started.elapsed());
        assert!(started.elapsed() < Duration::from_secs(16), "{:?}", started.elapsed());
        world.assert_nothing_is_unowned(&world.deployer(), "after a create").await;
    });
}

#[test]
fn a_template_without_an_agent_is_ready_when_it_runs() {
    paused(async {
        let world = World::new();
        let vm = world.deployer().create(CreateRequest { template: "mute".to_owned(), ..web() }).await.unwrap();
        assert!(!vm.has_agent_channel);
    });
}

#[test]
fn a_repeat_returns_the_same_machine() {
    paused(async {
        let world = World::new();
        let deployer = world.deployer();
        let first = deployer.create(web()).await.unwrap();
        let again = deployer.create(web()).await.unwrap();
        // A process that starts later knows it too.
        let later = world.deployer().create(web()).await.unwrap();
        assert_eq!((again.id, later.id), (first.id, first.id));
        assert_eq!(world.machines().await.len(), 1);
    });
}

#[test]
fn many_at_once_make_one_machine() {
    paused(async {
        let world = World::new();
        let deployer = world.deployer();
        let all = futures::future::join_all((0..50).map(|_| deployer.create(web()))).await;
        let ids: std::collections::HashSet<_> = all.into_iter().map(|vm| vm.unwrap().id).collect();
        assert_eq!(ids.len(), 1);
        assert_eq!(world.machines().await.len(), 1);
    });
}

#[test]
fn the_same_name_in_another_shape_is_refused() {
    paused(async {
        let world = World::new();
        let deployer = world.deployer();
        let other = CreateRequest { cpus: 2, ..web() };
        let (first, at_once) = tokio::join!(deployer.create(web()), deployer.create(other.clone()));
        first.unwrap();
        for refused in [at_once, deployer.create(other).await] {
            let error = refused.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::AlreadyExists);
            assert!(error.to_string().contains("name: web of exercise/blue is taken"), "{error}");
        }
        let elsewhere = CreateRequest { scope: Scope::new("exercise", "red").unwrap(), cpus: 2, ..web() };
        deployer.create(elsewhere).await.unwrap();
        assert_eq!(world.machines().await.len(), 2);
    });
}

#[test]
fn bad_requests_name_the_field_and_change_nothing() {
    paused(async {
        let world = World::new();
        let deployer = world.deployer();
        let table = [
            (CreateRequest { cpus: 0, ..web() }, ErrorKind::Invalid, "cpu"),
            (CreateRequest { cpus: 1_000_000, ..web() }, ErrorKind::Invalid, "cpu"),
            (CreateRequest { ram_bytes: 0, ..web() }, ErrorKind::Invalid, "ram"),
            (CreateRequest { ram_bytes: u64::MAX, ..web() }, ErrorKind::Invalid, "ram"),
            (CreateRequest { template: "unheard-of".to_owned(), ..web() }, ErrorKind::NotFound, "templateId"),
            (CreateRequest { template: String::new(), ..web() }, ErrorKind::Invalid, "templateId"),
            (CreateRequest { template: uuid::Uuid::new_v4().to_string(), ..web() }, ErrorKind::NotFound, "templateId"),
            (CreateRequest { links: vec!["nowhere".to_owned()], ..web() }, ErrorKind::NotFound, "links"),
            (CreateRequest { links: vec!["../x".to_owned()], ..web() }, ErrorKind::Invalid, "links"),
            (CreateRequest { links: vec!["default".to_owned(); 100], ..web() }, ErrorKind::Invalid, "links"),
        ];
        for (request, kind, field) in table {
            let error = deployer.create(request).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(field), "{field}: {error}");
        }
        assert_eq!((world.machines().await.len(), world.records().await), (0, 0));
    });
}

#[test]
fn a_create_that_never_gets_ready_says_what_it_saw_and_is_undone() {
    paused(async {
        let world = World::with(MemoryOptions { boot_time: Duration::from_secs(3600), ..quick() });
        let error = world.deployer().create(web()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().contains("seen last: building"), "{error}");
        assert_eq!((world.machines().await.len(), world.records().await), (0, 0));

        let world = World::with(MemoryOptions { agent_time: Duration::from_secs(3600), ..quick() });
        let error = world.deployer().create(web()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().contains("the machine runs, but"), "{error}");
        assert_eq!((world.machines().await.len(), world.records().await), (0, 0));
    });
}

#[test]
fn a_machine_that_fails_ends_the_wait_at_once_with_the_backends_words() {
    paused(async {
        let world = World::with(MemoryOptions { boot_time: Duration::from_secs(30), ..quick() });
        let deployer = world.deployer();
        let create = in_background(&deployer);
        let vm = loop {
            tokio::time::sleep(Duration::from_millis(10)).await;
            if let Some(vm) = world.machines().await.first() {
                break vm.id;
            }
        };
        assert!(world.cloud.fail_vm(vm, "no valid host was found"));
        let started = tokio::time::Instant::now();
        let error = create.await.unwrap().unwrap_err();
        assert!(error.to_string().contains("no valid host was found"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(10));
        assert_eq!((world.machines().await.len(), world.records().await), (0, 0));
    });
}

#[test]
fn a_client_that_goes_away_leaves_a_machine_that_is_recorded() {
    paused(async {
        let world = World::new();
        let deployer = world.deployer();
        assert!(tokio::time::timeout(Duration::from_millis(1), deployer.create(web())).await.is_err());
        assert!(deployer.shutdown(Duration::from_secs(60)).await);
        assert_eq!(world.machines().await.len(), 1);
        world.assert_nothing_is_unowned(&world.deployer(), "after the client left").await;
    });
}

#[test]
fn deleting_is_repeatable_and_leaves_no_record() {
    paused(async {
        let world = World::new();
        let deployer = world.deployer();
        let vm = deployer.create(web()).await.unwrap();
        let (one, two) = tokio::join!(deployer.delete(vm.id), deployer.delete(vm.id));
        assert!(one.is_ok() && two.is_ok());
        assert_eq!(deployer.delete(vm.id).await.unwrap(), Deletion::AlreadyGone);
        assert_eq!(deployer.delete(VmId::random()).await.unwrap(), Deletion::AlreadyGone);
        assert_eq!((world.machines().await.len(), world.records().await), (0, 0));
        assert_ne!(deployer.create(web()).await.unwrap().id, vm.id, "a new machine is a new machine");
    });
}

#[test]
fn a_strangers_machine_is_never_touched() {
    paused(async {
        let world = World::new();
        let deployer = world.deployer();
        let foreign = world.cloud.add_foreign_vm(&Name::new("theirs").unwrap());
        let theirs = world.cloud.create_vm(&MemoryCloud::tiny_spec("other-owner")).await.unwrap().id;
        for id in [foreign, theirs] {
            assert_eq!(deployer.delete(id).await.unwrap_err().kind(), ErrorKind::Denied);
            assert_eq!(deployer.get(id).await.unwrap_err().kind(), ErrorKind::NotFound);
        }
        assert!(deployer.reconcile().await.unwrap().is_clean());
        assert!(world.cloud.get_vm(foreign).await.is_ok() && world.cloud.get_vm(theirs).await.is_ok());
    });
}

#[test]
fn a_delete_during_a_create_wins() {
    paused(async {
        let world = World::new();
        let deployer = world.deployer();
        let create = in_background(&deployer);
        let id = loop {
            tokio::time::sleep(Duration::from_millis(10)).await;
            if let Some(id) = deployer.records().await.unwrap().first().and_then(|record| record.id) {
                break id;
            }
        };
        deployer.delete(id).await.unwrap();
        assert_eq!(create.await.unwrap().unwrap_err().kind(), ErrorKind::Conflict);
        assert!(deployer.shutdown(Duration::from_secs(60)).await);
        assert_eq!((world.machines().await.len(), world.records().await), (0, 0));
    });
}

#[test]
fn waiting_for_many_costs_one_list_a_round() {
    paused(async {
        let calls = |machines: usize| async move {
            let world = World::with(MemoryOptions { boot_time: Duration::from_secs(20), ..quick() });
            let deployer = world.deployer();
            let creates = (0..machines)
                .map(|n| deployer.create(CreateRequest { name: Name::new(format!("web-{n}")).unwrap(), ..web() }));
            for vm in futures::future::join_all(creates).await {
                vm.unwrap();
            }
            world.faults.calls("compute.list_vms")
        };
        let (one, eight) = (calls(1).await, calls(8).await);
        assert!(eight <= one + 2, "{one} list calls for one machine, {eight} for eight");
    });
}

#[test]
fn too_many_creates_are_refused_and_not_queued_for_ever() {
    paused(async {
        let world = World::new();
        let deployer = world.deployer();
        let creates =
            (0..9).map(|n| deployer.create(CreateRequest { name: Name::new(format!("web-{n}")).unwrap(), ..web() }));
        let outcomes = futures::future::join_all(creates).await;
        let refused: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
        assert_eq!(refused.len(), 1);
        assert_eq!(refused[0].kind(), ErrorKind::Exhausted);
    });
}

#[test]
fn what_somebody_deleted_behind_our_back_is_forgotten() {
    paused(async {
        let world = World::new();
        let deployer = world.deployer();
        let vm = deployer.create(web()).await.unwrap();
        world.cloud.vanish_vm(vm.id);
        let report = deployer.reconcile().await.unwrap();
        assert_eq!(report.forgotten, ["exercise/blue/web"]);
        assert_eq!(world.records().await, 0);
        assert!(deployer.reconcile().await.unwrap().is_clean());
    });
}

#[test]
fn reconcile_leaves_work_under_way_alone() {
    paused(async {
        let world = World::new();
        let deployer = world.deployer();
        let create = in_background(&deployer);
        while !create.is_finished() {
            assert!(deployer.reconcile().await.unwrap().is_clean());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        create.await.unwrap().unwrap();
        world.assert_nothing_is_unowned(&deployer, "after reconciles during a create").await;
    });
}

/// One create, then one delete, as a client would.
async fn create_and_delete(deployer: &Deployer) -> Result<()> {
    let vm = deployer.create(web()).await?;
    deployer.delete(vm.id).await?;
    Ok(())
}

/// How many calls of store and backend a create and a delete make.
fn calls_in_all() -> u64 {
    paused(async {
        let world = World::with(quick());
        create_and_delete(&world.deployer()).await.unwrap();
        world.faults.calls("*")
    })
}

fn lost(kind: ErrorKind) -> Error {
    Error::new(kind, "injected")
}

#[test]
fn every_call_failed_in_turn_leaves_nothing_unowned() {
    let calls = calls_in_all();
    assert!(calls > 10);
    let sorts: [fn() -> Fault; 5] = [
        || Fault::Before(lost(ErrorKind::Unavailable)),
        || Fault::Before(lost(ErrorKind::Exhausted)),
        || Fault::After(lost(ErrorKind::TimedOut)),
        || Fault::After(lost(ErrorKind::Internal)),
        || Fault::Delay(Duration::from_secs(20)),
    ];
    for nth in 1..=calls + 10 {
        for (sort, fault) in sorts.iter().enumerate() {
            paused(async {
                let what = format!("call {nth}, fault {sort}");
                let world = World::with(quick());
                world.faults.inject("*", nth, fault());
                let deployer = world.deployer();
                let _ = create_and_delete(&deployer).await;
                world.faults.clear();
                deployer.shutdown(Duration::from_secs(600)).await;
                // The reconcile of the same process, and that of the next one.
                deployer.reconcile().await.unwrap();
                world.assert_nothing_is_unowned(&deployer, &what).await;
                let next = world.deployer();
                assert!(next.reconcile().await.unwrap().is_clean(), "{what}: the second reconcile found work");
                // The name is usable again.
                create_and_delete(&next).await.unwrap();
                assert_eq!((world.machines().await.len(), world.records().await), (0, 0), "{what}");
            });
        }
    }
}

#[test]
fn a_kill_at_every_call_leaves_nothing_unowned_after_a_reconcile() {
    let calls = calls_in_all();
    for nth in 1..=calls {
        for after in [false, true] {
            let what = format!("killed {} call {nth}", if after { "after" } else { "before" });
            let world = World::with(quick());
            world.faults.inject("*", nth, if after { Fault::HangAfter } else { Fault::Hang });
            // The process hangs at the call; dropping its runtime is the kill.
            let process =
                tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
            process.block_on(async {
                let deployer = world.deployer();
                let work = create_and_delete(&deployer);
                assert!(tokio::time::timeout(Duration::from_secs(30), work).await.is_err(), "{what}: did not hang");
            });
            drop(process);
            world.faults.clear();
            paused(async {
                let next = world.deployer();
                next.reconcile().await.unwrap();
                world.assert_nothing_is_unowned(&next, &what).await;
                assert!(next.reconcile().await.unwrap().is_clean(), "{what}");
            });
        }
    }
}

#[test]
fn an_agent_that_is_disabled_is_said_at_once() {
    paused(async {
        let world = World::with(MemoryOptions { agent_time: Duration::from_secs(30), ..quick() });
        let deployer = world.deployer();
        let create = in_background(&deployer);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let vm = world.machines().await[0].id;
        assert!(world.cloud.set_agent(vm, AgentMode::Absent));
        let error = create.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert_eq!((world.machines().await.len(), world.records().await), (0, 0));
    });
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Create(u8),
    Delete(u8),
    Vanish,
    Reconcile,
    Restart,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        (0..3u8).prop_map(Act::Create),
        (0..3u8).prop_map(Act::Delete),
        Just(Act::Vanish),
        Just(Act::Reconcile),
        Just(Act::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_history_with_faults_ends_with_nothing_unowned(
        acts in prop::collection::vec((act(), any::<bool>()), 1..24),
        faults in prop::collection::vec((1..120u64, 0..3u8), 0..6),
    ) {
        paused(async {
            let world = World::with(MemoryOptions { boot_time: Duration::from_secs(1), ..quick() });
            for (nth, sort) in faults {
                world.faults.inject("*", nth, match sort {
                    0 => Fault::Before(lost(ErrorKind::Unavailable)),
                    1 => Fault::After(lost(ErrorKind::TimedOut)),
                    _ => Fault::After(lost(ErrorKind::Internal)),
                });
            }
            let mut deployer = world.deployer();
            for (act, patient) in acts {
                let request = |n: u8| CreateRequest { name: Name::new(format!("vm-{n}")).unwrap(), ..web() };
                let wait = if patient { Duration::from_secs(300) } else { Duration::from_millis(300) };
                match act {
                    Act::Create(n) => { let _ = tokio::time::timeout(wait, deployer.create(request(n))).await; }
                    Act::Delete(n) => {
                        let found = world.cloud.list_vms(&VmFilter { name: Some(request(n).name), ..VmFilter::default() }).await;
                        if let Some(vm) = found.unwrap_or_default().first() {
                            let _ = tokio::time::timeout(wait, deployer.delete(vm.id)).await;
                        }
                    }
                    Act::Vanish => { if let Some(vm) = world.cloud.list_vms(&VmFilter::default()).await.unwrap_or_default().first() { world.cloud.vanish_vm(vm.id); } }
                    Act::Reconcile => { let _ = deployer.reconcile().await; }
                    Act::Restart => {
                        // A drain in order; kills have a test of their own.
                        deployer.shutdown(Duration::from_secs(3600)).await;
                        deployer = world.deployer();
                    }
                }
            }
            deployer.shutdown(Duration::from_secs(3600)).await;
            world.faults.clear();
            deployer.reconcile().await.unwrap();
            world.assert_nothing_is_unowned(&deployer, "at the end").await;
        });
    }
}
