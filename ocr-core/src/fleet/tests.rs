//! Several members in one process, on a store and signals in memory, with tokio's clock paused.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, Ordering},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt;

use super::*;
use crate::{
    Key, NoticeStream,
    memory::{Fault, Faults, MemoryState},
    signal::LocalSignals,
};

const TTL: Duration = Duration::from_secs(30);

/// Gates that operations pass by hand.
#[derive(Debug, Default)]
struct TestGates {
    open: Mutex<HashMap<VmId, watch::Sender<u32>>>,
    all: Mutex<BTreeSet<VmId>>,
    slots: watch::Sender<usize>,
    running: watch::Sender<usize>,
    demand: Mutex<usize>,
}

impl TestGates {
    fn counter(&self, vm: VmId) -> watch::Receiver<u32> {
        lock(&self.open).entry(vm).or_insert_with(|| watch::Sender::new(0)).subscribe()
    }

    /// An operation begins, if it may.
    fn begin(self: &Arc<Self>, vm: VmId) -> Option<Running> {
        if !lock(&self.all).contains(&vm) || *self.running.borrow() >= *self.slots.borrow() {
            return None;
        }
        let busy = *self.counter(vm).borrow() > 0;
        (!busy).then(|| {
            lock(&self.open)[&vm].send_modify(|running| *running += 1);
            self.running.send_modify(|running| *running += 1);
            Running { gates: Arc::clone(self), vm }
        })
    }

    fn is_open(&self, vm: VmId) -> bool {
        lock(&self.all).contains(&vm)
    }
}

struct Running {
    gates: Arc<TestGates>,
    vm: VmId,
}

impl Drop for Running {
    fn drop(&mut self) {
        lock(&self.gates.open)[&self.vm].send_modify(|running| *running -= 1);
        self.gates.running.send_modify(|running| *running -= 1);
    }
}

impl Gates for TestGates {
    fn open(&self, vm: VmId) {
        lock(&self.all).insert(vm);
    }

    fn close(&self, vm: VmId) -> BoxFuture<'static, ()> {
        lock(&self.all).remove(&vm);
        let mut running = self.counter(vm);
        async move { drop(running.wait_for(|running| *running == 0).await) }.boxed()
    }

    fn close_all(&self) {
        lock(&self.all).clear();
    }

    fn resize(&self, slots: usize) -> BoxFuture<'static, ()> {
        self.slots.send_replace(slots);
        let mut running = self.running.subscribe();
        async move { drop(running.wait_for(|running| *running <= slots).await) }.boxed()
    }

    fn demand(&self) -> usize {
        *lock(&self.demand)
    }
}

/// Signals that lose everything while told to.
#[derive(Clone, Debug, Default)]
struct Lossy {
    inner: LocalSignals,
    deaf: Arc<AtomicBool>,
}

#[async_trait]
impl Signals for Lossy {
    async fn send(&self, topic: &Key, payload: Bytes) -> Result<()> {
        if self.deaf.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.inner.send(topic, payload).await
    }

    async fn listen(&self, topic: &Key) -> Result<NoticeStream> {
        self.inner.listen(topic).await
    }
}

#[derive(Default)]
struct Heard {
    runs: Mutex<Vec<RunReport>>,
    followed: Mutex<HashMap<VmId, Vec<InstallId>>>,
    gone: Mutex<Vec<Gone>>,
}

impl Listener for Heard {
    fn machine_changed(&self, _vm: VmId) {}

    fn followed(self: Arc<Self>, vm: VmId, conditions: Vec<InstallId>) {
        lock(&self.followed).insert(vm, conditions);
    }

    fn ran_elsewhere(&self, run: RunReport) {
        lock(&self.runs).push(run);
    }

    fn look_again(self: Arc<Self>, what: Gone) {
        lock(&self.gone).push(what);
    }
}

struct Process {
    fleet: Fleet,
    gates: Arc<TestGates>,
    heard: Arc<Heard>,
    /// The process's own way to the store.
    faults: Faults,
    path: Arc<Path>,
}

/// A way to the store that can be cut.
#[derive(Debug)]
struct Path {
    store: MemoryState,
    cut: watch::Sender<bool>,
}

impl Path {
    async fn pass(&self) {
        let mut cut = self.cut.subscribe();
        drop(cut.wait_for(|cut| !cut).await);
    }
}

#[async_trait]
impl StateStore for Path {
    async fn get(&self, key: &Key) -> Result<Option<crate::Versioned>> {
        self.pass().await;
        self.store.get(key).await
    }

    async fn put(
        &self,
        key: &Key,
        value: Bytes,
        only: crate::Precondition,
        ttl: Option<Duration>,
    ) -> Result<crate::Version> {
        self.pass().await;
        self.store.put(key, value, only, ttl).await
    }

    async fn delete(&self, key: &Key, only: crate::Precondition) -> Result<crate::Deletion> {
        self.pass().await;
        self.store.delete(key, only).await
    }

    async fn list(&self, prefix: &str, after: Option<&Key>, limit: usize) -> Result<Vec<(Key, crate::Versioned)>> {
        self.pass().await;
        self.store.list(prefix, after, limit).await
    }
}

struct Rig {
    store: MemoryState,
    signals: Lossy,
}

impl Rig {
    fn new() -> Self {
        Self { store: MemoryState::new(), signals: Lossy::default() }
    }

    fn join(&self, limit: usize) -> Process {
        let gates = Arc::new(TestGates::default());
        let path = Arc::new(Path { store: self.store.clone(), cut: watch::Sender::new(false) });
        let parts = FleetParts { store: path.clone(), signals: Arc::new(self.signals.clone()), gates: gates.clone() };
        let fleet = Fleet::start(parts, &FleetConfig { lease_ttl: TTL, max_connections: limit }).unwrap();
        let heard = Arc::new(Heard::default());
        fleet.attach(Arc::downgrade(&heard) as Weak<dyn Listener>);
        Process { fleet, gates, heard, faults: self.store.faults().clone(), path }
    }

    async fn joined(&self, limit: usize) -> Process {
        let process = self.join(limit);
        until("joined", || process.fleet.member().is_some()).await;
        process
    }
}

impl Process {
    async fn has(&self, vm: VmId) {
        until("the machine is ours", || self.fleet.is_ours(vm) && self.gates.is_open(vm)).await;
    }
}

/// Lets time pass until `done`, and says how much.
async fn until(what: &str, mut done: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(600), "never: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    began.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_machine_goes_to_who_has_work_for_it() {
    let rig = Rig::new();
    let (a, b) = (rig.joined(4).await, rig.joined(4).await);
    let vm = VmId::random();
    let need = a.fleet.need(vm);
    a.has(vm).await;
    let first = a.fleet.permit(vm).unwrap().token();
    assert!(b.fleet.permit(vm).unwrap_err().reason() == Some(reason::LEASE_LOST));
    drop(need);
    let _need = b.fleet.need(vm);
    let took = until("b has it", || b.fleet.is_ours(vm)).await;
    assert!(took < Duration::from_millis(100), "{took:?}");
    assert!(!a.fleet.is_ours(vm) && !a.gates.is_open(vm));
    assert!(b.fleet.permit(vm).unwrap().token() > first);
}

#[tokio::test(start_paused = true)]
async fn a_machine_is_handed_over_between_two_operations_and_not_in_one() {
    let rig = Rig::new();
    let (a, b) = (rig.joined(4).await, rig.joined(4).await);
    let vm = VmId::random();
    let need = a.fleet.need(vm);
    a.has(vm).await;
    until("a slot", || *a.gates.slots.borrow() > 0).await;
    let running = a.gates.begin(vm).unwrap();
    let _need = b.fleet.need(vm);
    tokio::time::sleep(TTL * 4).await;
    assert!(!b.fleet.is_ours(vm), "it runs");
    need.had_its_turn();
    drop(running);
    b.has(vm).await;
    // And back again: both have work, and they take turns.
    assert!(!a.fleet.is_ours(vm));
    b.fleet.need(vm).had_its_turn();
    a.has(vm).await;
}

#[tokio::test(start_paused = true)]
async fn a_held_machine_stays_until_it_is_let_go() {
    let rig = Rig::new();
    let (a, b) = (rig.joined(4).await, rig.joined(4).await);
    let vm = VmId::random();
    let need = a.fleet.need(vm);
    a.has(vm).await;
    let pin = a.fleet.pin(vm);
    need.had_its_turn();
    let _need = b.fleet.need(vm);
    tokio::time::sleep(TTL * 4).await;
    assert!(a.fleet.is_ours(vm) && a.gates.is_open(vm));
    drop(pin);
    b.has(vm).await;
}

#[tokio::test(start_paused = true)]
async fn a_lost_notice_costs_no_more_than_a_renewal() {
    let rig = Rig::new();
    let (a, b) = (rig.joined(4).await, rig.joined(4).await);
    let vm = VmId::random();
    drop(a.fleet.need(vm));
    let need = a.fleet.need(vm);
    a.has(vm).await;
    drop(need);
    rig.signals.deaf.store(true, Ordering::Relaxed);
    let _need = b.fleet.need(vm);
    tokio::time::sleep(TTL / 10).await;
    assert!(!b.fleet.is_ours(vm));
    rig.signals.deaf.store(false, Ordering::Relaxed);
    let took = until("b has it", || b.fleet.is_ours(vm)).await;
    assert!(took < TTL / 2, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn the_machines_of_a_killed_process_are_free_when_its_lease_has_run_out() {
    let rig = Rig::new();
    let (a, b) = (rig.joined(4).await, rig.joined(4).await);
    let vm = VmId::random();
    let _a = a.fleet.need(vm);
    a.has(vm).await;
    // As if killed: it reaches nobody any more.
    a.path.cut.send_replace(true);
    rig.signals.deaf.store(true, Ordering::Relaxed);
    let permit = a.fleet.permit(vm).unwrap();
    let call = tokio::spawn(async move { permit.during(vm, std::future::pending::<Result<()>>()).await });
    let _need = b.fleet.need(vm);
    let mut ended = None;
    let took = until("b has it", || {
        if call.is_finished() && ended.is_none() {
            ended = Some(Instant::now());
        }
        b.fleet.is_ours(vm)
    })
    .await;
    assert!(took < TTL * 2, "{took:?}");
    assert!(ended.is_some_and(|ended| ended < Instant::now() - TTL / 10), "the call was dropped long before");
    assert_eq!(call.await.unwrap().unwrap_err().reason(), Some(reason::LEASE_LOST));
}

#[tokio::test(start_paused = true)]
async fn who_was_cut_off_stops_and_joins_again_as_somebody_else() {
    let rig = Rig::new();
    let a = rig.joined(4).await;
    let vm = VmId::random();
    let _need = a.fleet.need(vm);
    a.has(vm).await;
    let (before, token) = (a.fleet.member(), a.fleet.permit(vm).unwrap().token());
    a.path.cut.send_replace(true);
    let took = until("lost", || *a.fleet.membership().borrow() == Membership::Lost).await;
    assert!(took < TTL, "{took:?}");
    assert!(a.fleet.permit(vm).is_err() && !a.gates.is_open(vm) && *a.gates.slots.borrow() == 0);
    tokio::time::sleep(TTL * 3).await;
    a.path.cut.send_replace(false);
    a.has(vm).await;
    assert!(a.fleet.member().is_some() && a.fleet.member() != before);
    assert!(a.fleet.permit(vm).unwrap().token() > token);
}

#[tokio::test(start_paused = true)]
async fn who_leaves_gives_everything_back_at_once() {
    let rig = Rig::new();
    let (a, b) = (rig.joined(4).await, rig.joined(4).await);
    let vm = VmId::random();
    let _a = a.fleet.need(vm);
    a.has(vm).await;
    let _b = b.fleet.need(vm);
    let began = Instant::now();
    a.fleet.leave(TTL).await;
    b.has(vm).await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert_eq!(*a.fleet.membership().borrow(), Membership::Left);
}

#[tokio::test(start_paused = true)]
async fn together_they_have_as_many_slots_as_the_limit_and_they_go_where_the_work_is() {
    let rig = Rig::new();
    let (a, b, c) = (rig.joined(10).await, rig.joined(10).await, rig.joined(10).await);
    let all = [&a, &b, &c];
    let slots = || all.map(|process| *process.gates.slots.borrow());
    *lock(&a.gates.demand) = 10;
    until("a has most", || slots()[0] >= 7).await;
    assert!(slots().iter().sum::<usize>() <= 10);
    *lock(&b.gates.demand) = 10;
    *lock(&c.gates.demand) = 10;
    until("all have their part", || slots().iter().all(|slots| (3..=4).contains(slots))).await;
    *lock(&a.gates.demand) = 0;
    a.fleet.leave(TTL).await;
    until("the others share", || slots() == [0, 5, 5]).await;
}

#[tokio::test(start_paused = true)]
async fn who_is_short_and_was_not_heard_asks_again() {
    let rig = Rig::new();
    let one = rig.joined(8).await;
    *lock(&one.gates.demand) = 8;
    until("it has all", || *one.gates.slots.borrow() == 8).await;
    *lock(&one.gates.demand) = 0;
    rig.signals.deaf.store(true, Ordering::Relaxed);
    let two = rig.joined(8).await;
    *lock(&two.gates.demand) = 4;
    // It has said that it is short, and nobody heard.
    tokio::time::sleep(TTL / 2).await;
    assert_eq!(*two.gates.slots.borrow(), 0);
    rig.signals.deaf.store(false, Ordering::Relaxed);
    let took = until("it gets what the other one does not need", || *two.gates.slots.borrow() >= 4).await;
    assert!(took <= TTL, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_asked_of_the_store_while_nothing_changes_but_the_renewals() {
    let rig = Rig::new();
    let (a, b) = (rig.joined(10).await, rig.joined(10).await);
    let machines: Vec<VmId> = (0..50).map(|_| VmId::random()).collect();
    let mut watches = Vec::new();
    for (index, vm) in machines.iter().enumerate() {
        let (owner, other) = if index % 2 == 0 { (&a, &b) } else { (&b, &a) };
        let condition = InstallId::random();
        watches.push(owner.fleet.watch(*vm, condition));
        owner.has(*vm).await;
        watches.push(other.fleet.watch(*vm, condition));
    }
    tokio::time::sleep(TTL).await;
    let before = a.faults.calls("*");
    tokio::time::sleep(TTL * 10).await;
    let calls = a.faults.calls("*") - before;
    assert!((58..=62).contains(&calls), "{calls} calls in 30 renewals of two members");
}

#[tokio::test(start_paused = true)]
async fn a_condition_is_run_by_its_machines_owner_and_heard_elsewhere() {
    let rig = Rig::new();
    let (a, b) = (rig.joined(4).await, rig.joined(4).await);
    let (vm, condition) = (VmId::random(), InstallId::random());
    let _a = a.fleet.watch(vm, condition);
    a.has(vm).await;
    let watch = b.fleet.watch(vm, condition);
    until("a runs it for b", || lock(&a.heard.followed).get(&vm) == Some(&vec![condition])).await;
    a.fleet.began(condition);
    tokio::time::sleep(Duration::from_secs(1)).await;
    a.fleet.report(RunReport { vm, condition, value: Some(0.5), lateness: Duration::ZERO });
    until("b hears it", || lock(&b.heard.runs).first().is_some_and(|run| run.value == Some(0.5))).await;
    let ago = b.fleet.last_run(condition).unwrap().elapsed();
    assert!((1.0..1.1).contains(&ago.as_secs_f64()), "{ago:?}");
    assert!(!b.fleet.is_ours(vm));
    drop(watch);
    let took = until("a runs it no more for b", || lock(&a.heard.followed)[&vm].is_empty()).await;
    assert!(took < TTL * 2, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn the_new_owner_knows_when_conditions_ran_last() {
    let rig = Rig::new();
    let (a, b) = (rig.joined(4).await, rig.joined(4).await);
    let (vm, condition) = (VmId::random(), InstallId::random());
    let _a = a.fleet.watch(vm, condition);
    a.has(vm).await;
    a.fleet.began(condition);
    tokio::time::sleep(Duration::from_secs(2)).await;
    // It only has a one-shot, and would not know of the condition otherwise.
    let _b = b.fleet.need(vm);
    b.has(vm).await;
    let ago = b.fleet.last_run(condition).unwrap().elapsed();
    assert!((2.0..2.2).contains(&ago.as_secs_f64()), "{ago:?}");
    until("b runs it for a", || lock(&b.heard.followed).get(&vm) == Some(&vec![condition])).await;
}

#[tokio::test(start_paused = true)]
async fn a_watcher_takes_the_machine_of_an_owner_that_is_gone() {
    let rig = Rig::new();
    let (a, b) = (rig.joined(4).await, rig.joined(4).await);
    let (vm, condition) = (VmId::random(), InstallId::random());
    let _a = a.fleet.watch(vm, condition);
    a.has(vm).await;
    let _b = b.fleet.watch(vm, condition);
    tokio::time::sleep(TTL).await;
    assert!(!b.fleet.is_ours(vm));
    a.path.cut.send_replace(true);
    let took = until("b has it", || b.fleet.is_ours(vm)).await;
    assert!(took < TTL * 3, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_at_the_start_is_waited_for() {
    let rig = Rig::new();
    for nth in 1..20 {
        rig.store.faults().inject("state.put", nth, Fault::Before(Error::unavailable("away")));
    }
    let a = rig.join(4);
    assert_eq!(*a.fleet.membership().borrow(), Membership::Joining);
    until("joined", || a.fleet.member().is_some()).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_gone_is_told_to_all() {
    let rig = Rig::new();
    let (a, b) = (rig.joined(4).await, rig.joined(4).await);
    let id = InstallId::random();
    a.fleet.announce(Gone::Install(id));
    until("b hears", || lock(&b.heard.gone).contains(&Gone::Install(id))).await;
}

#[tokio::test(start_paused = true)]
async fn records_of_dead_owners_are_swept_when_they_are_old() {
    let rig = Rig::new();
    let (a, b) = (rig.joined(4).await, rig.joined(4).await);
    let (vm, mine) = (VmId::random(), VmId::random());
    let _need = a.fleet.need(vm);
    a.has(vm).await;
    let _mine = b.fleet.need(mine);
    b.has(mine).await;
    a.fleet.leave(TTL).await;
    assert_eq!(b.fleet.sweep().await.unwrap(), 0, "too young");
    let key = Key::new(format!("owner/{vm}")).unwrap();
    let old = format!(r#"{{"member":"{}","token":1}}"#, MemberId::random());
    rig.store.put(&key, old.into(), crate::Precondition::Any, None).await.unwrap();
    assert_eq!(b.fleet.sweep().await.unwrap(), 1);
    assert!(b.fleet.is_ours(mine) && rig.store.get(&key).await.unwrap().is_none());
}
