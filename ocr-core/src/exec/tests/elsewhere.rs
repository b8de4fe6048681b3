//! Two executors of one fleet, each as in a process of its own, on the same guests and the same store.

use futures::StreamExt;

use super::*;
use crate::{
    ExecRequest, VmFilter,
    fleet::{FleetConfig, FleetParts, Membership},
    signal::LocalSignals,
};

const TTL: Duration = Duration::from_secs(30);

struct Two {
    cloud: MemoryCloud,
    store: MemoryState,
    shelf: Arc<Shelf>,
    a: Process,
    b: Process,
    vm: VmId,
}

struct Process {
    fleet: Fleet,
    executor: Executor,
}

impl Two {
    async fn new() -> Self {
        let cloud = MemoryCloud::new();
        let vm = cloud.create_vm(&MemoryCloud::tiny_spec("web-0")).await.unwrap().id;
        let (store, shelf, signals) = (MemoryState::new(), Arc::new(Shelf::new()), LocalSignals::new());
        let a = join(&cloud, &store, &shelf, &signals).await;
        let b = join(&cloud, &store, &shelf, &signals).await;
        Self { cloud, store, shelf, a, b, vm }
    }

    fn runs(&self) -> u64 {
        self.cloud.faults().calls("guest.exec")
    }
}

async fn join(cloud: &MemoryCloud, store: &MemoryState, shelf: &Arc<Shelf>, signals: &LocalSignals) -> Process {
    let queue = SchedulerConfig { gated: true, max_connections: 0, ..SchedulerConfig::default() };
    let scheduler = Scheduler::start(queue);
    let gates = Arc::new(scheduler.clone());
    let parts = FleetParts { store: Arc::new(store.clone()), signals: Arc::new(signals.clone()), gates };
    let fleet = Fleet::start(parts, &FleetConfig { lease_ttl: TTL, max_connections: 8 }).unwrap();
    let parts = Parts {
        guest: Arc::new(cloud.clone()),
        compute: Arc::new(cloud.clone()),
        store: Arc::new(store.clone()),
        packages: shelf.clone(),
        scheduler,
        secrets: SecretStorage::Memory,
        fleet: Some(fleet.clone()),
    };
    let mut membership = fleet.membership();
    membership.wait_for(|now| matches!(now, Membership::Member(_))).await.unwrap();
    Process { fleet, executor: Executor::new(parts, config()) }
}

#[tokio::test(start_paused = true)]
async fn what_one_process_installed_another_one_removes() {
    let two = Two::new().await;
    two.shelf.put(feature("web").asset("/srv/web", 0o644, "hello").delete("rm -f /srv/extra"));
    let installed = two.a.executor.install(request(InstallKind::Feature, two.vm, "web")).await.unwrap();
    assert!(two.cloud.guest_file(two.vm, "/srv/web").is_some());
    assert!(two.a.fleet.is_ours(two.vm));
    let removed = two.b.executor.remove(InstallKind::Feature, installed.id).await.unwrap();
    assert_eq!(removed, Deletion::Deleted);
    assert!(two.cloud.guest_file(two.vm, "/srv/web").is_none());
    assert!(two.b.fleet.is_ours(two.vm) && !two.a.fleet.is_ours(two.vm));
    assert_eq!(two.a.executor.list(None).await.unwrap(), []);
}

#[tokio::test(start_paused = true)]
async fn a_condition_that_is_watched_through_two_processes_runs_once_per_tick() {
    let two = Two::new().await;
    let id = two.a.executor.create_condition(command(two.vm, "echo 0.5", seconds(10))).await.unwrap().id;
    let mut through_a = two.a.executor.watch(id).await.unwrap();
    let mut through_b = two.b.executor.watch(id).await.unwrap();
    assert_eq!(through_a.next().await.unwrap().unwrap().value, 0.5);
    assert_eq!(through_b.next().await.unwrap().unwrap().value, 0.5);
    let (before, began) = (two.runs(), tokio::time::Instant::now());
    for _ in 0..60 {
        through_a.next().await.unwrap().unwrap();
        through_b.next().await.unwrap().unwrap();
    }
    let ticks = began.elapsed().as_secs() / 10;
    let runs = two.runs() - before;
    assert!((58..=61).contains(&ticks) && runs <= ticks + 2, "{runs} runs in {ticks} ticks");
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_changes_hands_does_not_run_its_condition_twice_in_one_interval() {
    let two = Two::new().await;
    two.shelf.put(feature("web").asset("/srv/web", 0o644, "hello"));
    let id = two.a.executor.create_condition(command(two.vm, "echo 1", seconds(60))).await.unwrap().id;
    let mut values = two.a.executor.watch(id).await.unwrap();
    values.next().await.unwrap().unwrap();
    // Past the first interval, which is shorter: it spreads what was deployed together.
    values.next().await.unwrap().unwrap();
    let (before, began) = (two.runs(), tokio::time::Instant::now());
    for executor in [&two.b, &two.a].map(|process| &process.executor).into_iter().cycle().take(10) {
        executor.install(request(InstallKind::Feature, two.vm, "web")).await.unwrap();
        tokio::time::sleep(seconds(50)).await;
    }
    let (runs, ticks) = (two.runs() - before, began.elapsed().as_secs() / 60);
    assert!((ticks - 1..=ticks + 1).contains(&runs), "{runs} runs in {ticks} ticks");
}

#[tokio::test(start_paused = true)]
async fn a_condition_that_is_removed_through_one_process_ends_its_streams_in_the_other_at_once() {
    let two = Two::new().await;
    let id = two.a.executor.create_condition(command(two.vm, "echo 1", seconds(3600))).await.unwrap().id;
    let mut values = two.a.executor.watch(id).await.unwrap();
    values.next().await.unwrap().unwrap();
    let began = tokio::time::Instant::now();
    two.b.executor.remove(InstallKind::Condition, id).await.unwrap();
    assert_eq!(values.next().await.unwrap().unwrap_err().kind(), ErrorKind::NotFound);
    assert!(values.next().await.is_none() && began.elapsed() < seconds(1));
}

#[tokio::test(start_paused = true)]
async fn streams_through_both_processes_end_when_the_machine_is_deleted() {
    let two = Two::new().await;
    let id = two.a.executor.create_condition(command(two.vm, "echo 1", seconds(10))).await.unwrap().id;
    let mut through_a = two.a.executor.watch(id).await.unwrap();
    let mut through_b = two.b.executor.watch(id).await.unwrap();
    through_a.next().await.unwrap().unwrap();
    through_b.next().await.unwrap().unwrap();
    two.cloud.delete_vm(two.vm).await.unwrap();
    for values in [&mut through_a, &mut through_b] {
        while let Some(Ok(_)) = values.next().await {}
    }
    assert!(two.cloud.list_vms(&VmFilter::default()).await.unwrap().is_empty());
    assert_eq!(two.b.executor.list(None).await.unwrap(), []);
}

#[tokio::test(start_paused = true)]
async fn a_recovery_leaves_alone_what_another_process_works_on() {
    let two = Two::new().await;
    two.shelf.put(feature("slow").asset("/srv/slow", 0o644, "x").action("sleep 100"));
    let installing = {
        let executor = two.a.executor.clone();
        let request = request(InstallKind::Feature, two.vm, "slow");
        tokio::spawn(async move { executor.install(request).await })
    };
    until("it acts", || two.cloud.guest_file(two.vm, "/srv/slow").is_some()).await;
    let report = two.b.executor.recover().await.unwrap();
    assert_eq!(report, RecoverReport::default());
    assert!(installing.await.unwrap().is_ok());
    assert!(two.cloud.guest_file(two.vm, "/srv/slow").is_some());
}

#[tokio::test(start_paused = true)]
async fn what_a_killed_process_left_is_undone_by_another_when_its_session_has_run_out() {
    let two = Two::new().await;
    // As a process leaves it that was killed in the middle, some minutes ago.
    let mut record = Record::new(InstallKind::Feature, "web".to_owned(), two.vm);
    record.member = Some(crate::MemberId::random());
    record.delete_action = Some("true".to_owned());
    let lease = Key::new(format!("lease/member_{}", record.member.unwrap())).unwrap();
    two.store.put(&lease, "{}".into(), crate::Precondition::Any, Some(TTL)).await.unwrap();
    let key = Key::new(format!("exec/install/{}", record.id)).unwrap();
    let mut json = serde_json::to_value(&record).unwrap();
    json["stage"] = "acting".into();
    two.store.put(&key, json.to_string().into(), crate::Precondition::Any, None).await.unwrap();
    assert_eq!(two.a.executor.recover().await.unwrap(), RecoverReport::default());
    tokio::time::sleep(TTL).await;
    assert_eq!(two.a.executor.recover().await.unwrap().undone, [record.id]);
}

#[tokio::test(start_paused = true)]
async fn an_install_that_lost_its_session_is_finished_under_the_next_one() {
    let two = Two::new().await;
    two.shelf.put(feature("slow").asset("/srv/slow", 0o644, "x").action("sleep 100"));
    let installing = {
        let executor = two.a.executor.clone();
        let request = request(InstallKind::Feature, two.vm, "slow");
        tokio::spawn(async move { executor.install(request).await })
    };
    until("it acts", || two.runs() > 0).await;
    let before = two.a.fleet.member();
    // Its lease goes, as when the store was away for too long.
    let lease = Key::new(format!("lease/member_{}", before.unwrap())).unwrap();
    two.store.delete(&lease, crate::Precondition::Any).await.unwrap();
    until("another session", || two.a.fleet.member().is_some_and(|member| Some(member) != before)).await;
    installing.await.unwrap().unwrap();
    assert_eq!(two.b.executor.list(Some(two.vm)).await.unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_has_seen_a_newer_token_than_its_owners_is_caught_up_with() {
    let two = Two::new().await;
    two.shelf.put(feature("web").asset("/srv/web", 0o644, "hello").action("true"));
    // Of an executor whose clock was three hours ahead, and whose record is lost.
    let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let ahead = since_1970 + seconds(3 * 3600);
    let fence = crate::FencingToken(ahead.as_micros() as u64);
    two.cloud.exec(two.vm, &ExecRequest { fence: Some(fence), ..ExecRequest::shell("true") }).await.unwrap();
    two.a.executor.install(request(InstallKind::Feature, two.vm, "web")).await.unwrap();
    assert!(two.a.fleet.permit(two.vm).unwrap().token() > fence);
    two.b.executor.install(request(InstallKind::Feature, two.vm, "web")).await.unwrap();
}
