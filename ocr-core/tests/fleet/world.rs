//! Executors in one process, work for them, and what must hold of it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::StreamExt;
use ocr_core::{
    Deletion, InstallId, Result, Signals, StateStore, VmId,
    exec::{
        Account, ConditionRequest, Config, Executor, InstallKind, InstallRequest, PackageRef, Parts, Probe,
        SecretStorage,
    },
    fleet::{Fleet, FleetConfig, FleetParts, Membership},
    package::LocalFolder,
    queue::{Scheduler, SchedulerConfig},
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::sim::{Machines, Operation, Random, Way};

pub(crate) const EXECUTORS: usize = 3;
pub(crate) const MACHINES: usize = 50;
pub(crate) const LIMIT: usize = 8;

/// How a run is laid out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) lease_ttl: Duration,
    /// For how long new work comes, and trouble with it.
    pub(crate) length: Duration,
    pub(crate) interval: Duration,
    pub(crate) installs: usize,
    pub(crate) conditions: usize,
    /// The longest that one operation takes.
    pub(crate) longest_ms: u64,
}

pub(crate) struct Process {
    pub(crate) fleet: Fleet,
    pub(crate) executor: Executor,
    pub(crate) scheduler: Scheduler,
}

/// Packages that all executors find.
pub(crate) struct Shelf(tempfile::TempDir);

impl Shelf {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for index in 0..6 {
            let action = if index == 4 { "it fails" } else { "set up" };
            let manifest = format!(
                "[package]\nname = \"package-{index}\"\nversion = \"1.0.0\"\nlicense = \"MIT\"\n\
                 assets = [[\"a\", \"/srv/{index}/a\", \"644\"], [\"b\", \"/srv/{index}/b\", \"644\"]]\n\
                 [content]\ntype = \"feature\"\n[feature]\ntype = \"service\"\nrestarts = {restarts}\n\
                 action = \"{action}\"\ndelete = \"take down\"\n",
                restarts = index == 5,
            );
            let package = folder.path().join(format!("{index}"));
            fs::create_dir(&package).unwrap();
            fs::write(package.join("package.toml"), manifest).unwrap();
            for asset in ["a", "b"] {
                fs::write(package.join(asset), format!("{asset} of {index}")).unwrap();
            }
        }
        Self(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

pub(crate) fn process(
    index: usize,
    machines: &Arc<Machines>,
    shelf: &Shelf,
    plan: &Plan,
    store: Arc<dyn StateStore>,
    signals: Arc<dyn Signals>,
) -> Process {
    let queue = SchedulerConfig { gated: true, max_connections: 0, ..SchedulerConfig::default() };
    let scheduler = Scheduler::start(queue);
    let parts = FleetParts { store: store.clone(), signals, gates: Arc::new(scheduler.clone()) };
    let config = FleetConfig { lease_ttl: plan.lease_ttl, max_connections: LIMIT };
    let fleet = Fleet::start(parts, &config).unwrap();
    let way = Arc::new(Way { machines: machines.clone(), executor: index });
    let parts = Parts {
        guest: way.clone(),
        compute: way,
        store,
        packages: Arc::new(LocalFolder::new(shelf.path())),
        scheduler: scheduler.clone(),
        secrets: SecretStorage::Memory,
        fleet: Some(fleet.clone()),
    };
    let config = Config {
        action_deadline: Duration::from_secs(30),
        ready_deadline: Duration::from_secs(60),
        ready_interval: Duration::from_millis(100),
        reply_output_bytes: 1024,
    };
    Process { fleet, executor: Executor::new(parts, config), scheduler }
}

/// What became of the work, as its callers were told.
#[derive(Default)]
struct Told {
    installed: BTreeMap<InstallId, (VmId, usize)>,
    /// Removed, as far as the caller knows.
    removed: BTreeSet<InstallId>,
    /// Whose removal failed: it may be there or not.
    unsure: BTreeSet<InstallId>,
    refused: usize,
}

/// What a run came to.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) faults: Vec<String>,
    pub(crate) operations: usize,
    pub(crate) cut: usize,
    pub(crate) fenced: usize,
    pub(crate) installed: usize,
    pub(crate) removed: usize,
    pub(crate) refused: usize,
    pub(crate) handovers: usize,
    pub(crate) sessions_lost: usize,
}

pub(crate) struct World {
    pub(crate) processes: Vec<Process>,
    pub(crate) machines: Arc<Machines>,
    pub(crate) plan: Plan,
    random: Random,
    told: Mutex<Told>,
}

impl World {
    pub(crate) fn new(processes: Vec<Process>, machines: Arc<Machines>, plan: Plan, seed: u64) -> Arc<Self> {
        Arc::new(Self { processes, machines, plan, random: Random::new(seed), told: Mutex::default() })
    }

    fn executor(&self) -> &Executor {
        &self.random.pick(&self.processes).executor
    }

    /// Installs something somewhere, and perhaps removes it through whom ever.
    async fn work(self: Arc<Self>) {
        sleep(self.random.millis(0, self.plan.length.as_millis() as u64)).await;
        let package = self.random.below(6) as usize;
        let vm = *self.random.pick(&self.machines.vms[..MACHINES / 2]);
        let request = InstallRequest {
            kind: InstallKind::Feature,
            name: "thing".to_owned(),
            vm,
            package: PackageRef { name: format!("package-{package}"), version: "*".to_owned() },
            account: Account::default(),
            environment: BTreeMap::new(),
        };
        let installed = match self.executor().install(request).await {
            Ok(installed) => installed,
            Err(_) => {
                self.told.lock().unwrap().refused += 1;
                return;
            }
        };
        self.told.lock().unwrap().installed.insert(installed.id, (vm, package));
        if self.random.once_in(2) {
            return;
        }
        sleep(self.random.millis(0, 300)).await;
        for _ in 0..5 {
            let removed = self.executor().remove(InstallKind::Feature, installed.id).await;
            let told = &mut *self.told.lock().unwrap();
            match removed {
                Ok(Deletion::Deleted | Deletion::AlreadyGone) => {
                    told.removed.insert(installed.id);
                    told.unsure.remove(&installed.id);
                    return;
                }
                Err(_) => {
                    told.unsure.insert(installed.id);
                }
            }
        }
    }

    /// Makes a condition and watches it through some executors; says how often each stream got a value.
    async fn watch(self: Arc<Self>, index: usize, until: Instant) -> Vec<String> {
        let request = || ConditionRequest {
            name: "condition".to_owned(),
            vm: self.machines.vms[index % MACHINES],
            account: Account::default(),
            probe: Probe::Command { line: format!("condition {index};"), interval: self.plan.interval },
            environment: BTreeMap::new(),
        };
        let id = loop {
            match self.executor().create_condition(request()).await {
                Ok(installed) => break installed.id,
                Err(_) => sleep(Duration::from_millis(50)).await,
            }
        };
        let first = self.random.below(EXECUTORS as u64) as usize;
        let count = 1 + self.random.below(EXECUTORS as u64) as usize;
        let mut streams = JoinSet::new();
        for offset in 0..count {
            let (world, through) = (self.clone(), (first + offset) % EXECUTORS);
            streams.spawn(async move {
                let executor = &world.processes[through].executor;
                let mut values = loop {
                    match executor.watch(id).await {
                        Ok(values) => break values,
                        Err(_) => sleep(Duration::from_millis(50)).await,
                    }
                };
                let (mut latest, mut ended) = (None, None);
                // It stays until the end, and hears something then too.
                while let Ok(next) = timeout(until.saturating_duration_since(Instant::now()), values.next()).await {
                    match next {
                        Some(Ok(_)) => latest = Some(Instant::now()),
                        Some(Err(error)) => ended = Some(error.to_string()),
                        None => break,
                    }
                }
                let fresh = Instant::now().checked_sub(world.plan.interval * 4 + world.plan.lease_ttl);
                match (ended, latest) {
                    (Some(error), _) => Some(format!("a stream through {through} ended: {error}")),
                    (None, None) => Some(format!("condition {index} through {through} gave nothing at all")),
                    (None, Some(latest)) if fresh.is_some_and(|fresh| latest < fresh) => {
                        Some(format!("condition {index} through {through} fell silent {:?} ago", latest.elapsed()))
                    }
                    _ => None,
                }
            });
        }
        streams.join_all().await.into_iter().flatten().collect()
    }

    /// Runs the plan, with `trouble` beside it, and checks what came of it. `outages` is what trouble there was.
    pub(crate) async fn run(self: Arc<Self>, trouble: impl Future<Output = usize> + Send + 'static) -> Outcome {
        let began = Instant::now();
        let lost = self.count_losses();
        let mut outcome = Outcome::default();
        for process in &self.processes {
            let mut membership = process.fleet.membership();
            drop(membership.wait_for(|now| matches!(now, Membership::Member(_))).await);
        }
        // Values must come again after the trouble: within so long everybody has joined and found its machines.
        let quiet = self.plan.lease_ttl * 4 + self.plan.interval * 4;
        let until = Instant::now() + self.plan.length + quiet;
        let mut watches = JoinSet::new();
        for index in 0..self.plan.conditions {
            watches.spawn(self.clone().watch(index, until));
        }
        let mut work = JoinSet::new();
        for _ in 0..self.plan.installs {
            work.spawn(self.clone().work());
        }
        let outages = trouble.await;
        if timeout(Duration::from_secs(90), work.join_all()).await.is_err() {
            outcome.faults.push("an install or a removal never came to an end".to_owned());
        }
        outcome.faults.extend(watches.join_all().await.into_iter().flatten());
        let ended = Instant::now();

        // What trouble left over is put in order by any of them.
        let recovered = timeout(Duration::from_secs(60), self.recover()).await;
        outcome.faults.extend(recovered.unwrap_or_else(|_| Err("recovery never came to an end".to_owned())).err());
        self.check_store(&mut outcome).await;
        outcome.sessions_lost = lost.load(Ordering::Relaxed) as usize;
        for process in &self.processes {
            process.executor.shutdown(Duration::from_secs(5)).await;
            process.fleet.leave(Duration::from_secs(5)).await;
            process.scheduler.shutdown(Duration::from_secs(5)).await;
        }
        self.check_history(&mut outcome, began, ended, outages);
        outcome
    }

    fn count_losses(&self) -> Arc<AtomicU64> {
        let lost = Arc::new(AtomicU64::new(0));
        for process in &self.processes {
            let (mut membership, lost) = (process.fleet.membership(), lost.clone());
            tokio::spawn(async move {
                while membership.changed().await.is_ok() {
                    if *membership.borrow_and_update() == Membership::Lost {
                        lost.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        lost
    }

    /// As each server does every now and then: what a living executor left, nobody else touches.
    async fn recover(&self) -> Result<(), String> {
        for process in &self.processes {
            let mut last = String::new();
            for _ in 0..20 {
                match process.executor.recover().await {
                    Ok(report) if report.failed.is_empty() => {
                        last.clear();
                        break;
                    }
                    Ok(report) => last = format!("{report:?}"),
                    Err(error) => last = error.to_string(),
                }
                sleep(Duration::from_millis(100)).await;
            }
            if !last.is_empty() {
                return Err(format!("recovery finds no end: {last}"));
            }
        }
        Ok(())
    }

    /// What the callers were told, what the store has, and what is in the guests must be the same.
    async fn check_store(&self, outcome: &mut Outcome) {
        let listed = match self.executor().list(None).await {
            Ok(listed) => listed,
            Err(error) => return outcome.faults.push(format!("the store cannot be read: {error}")),
        };
        let told = &*self.told.lock().unwrap();
        let stored: BTreeMap<InstallId, VmId> =
            listed.iter().filter(|record| record.kind == InstallKind::Feature).map(|r| (r.id, r.vm)).collect();
        for (id, (vm, package)) in &told.installed {
            let gone = told.removed.contains(id);
            if !told.unsure.contains(id) && gone == stored.contains_key(id) {
                outcome.faults.push(format!("{id} (package-{package} on {vm}): removed {gone}, and the store differs"));
            }
        }
        for id in stored.keys().filter(|id| !told.installed.contains_key(id)) {
            outcome.faults.push(format!("{id} is installed, and its caller was told that it is not"));
        }
        for vm in &self.machines.vms {
            let wanted: BTreeSet<String> = told
                .installed
                .iter()
                .filter(|(id, (on, _))| on == vm && stored.contains_key(id))
                .flat_map(|(_, (_, package))| ["a", "b"].map(|asset| format!("/srv/{package}/{asset}")))
                .collect();
            let there = self.machines.files(*vm);
            if there != wanted {
                let history = self.machines.history();
                let here = history.iter().filter(|o| o.vm == *vm && !o.what.starts_with("condition"));
                let here: Vec<_> = here.map(|o| (o.executor, &o.what, o.began.elapsed(), o.cut)).collect();
                outcome.faults.push(format!("on {vm} there are {there:?}; wanted {wanted:?}; history: {here:#?}"));
            }
        }
        outcome.installed = told.installed.len();
        outcome.removed = told.removed.len();
        outcome.refused = told.refused;
    }

    fn check_history(&self, outcome: &mut Outcome, began: Instant, ended: Instant, outages: usize) {
        let history = self.machines.history();
        let faults = &mut outcome.faults;
        let mut by_vm: HashMap<VmId, Vec<&Operation>> = HashMap::new();
        let mut edges = Vec::new();
        for operation in &history {
            by_vm.entry(operation.vm).or_default().push(operation);
            let Some(end) = operation.ended else {
                faults.push(format!("never ended: {operation:?}"));
                continue;
            };
            // The cloud's work, and not the guest's: it has no slot.
            if operation.what != "reboot" {
                edges.push((operation.began, 1));
                edges.push((end, -1));
            }
        }
        for operations in by_vm.values() {
            for pair in operations.windows(2) {
                if pair[0].ended.is_some_and(|end| end > pair[1].began) {
                    faults.push(format!("at once on one machine: {:?} and {:?}", pair[0], pair[1]));
                }
                // By themselves all executors' tokens rise: the guest has nothing to refuse.
                let tokens = [pair[0].token, pair[1].token];
                if let [Some(before), Some(after)] = tokens
                    && (before > after || before == after && pair[0].executor != pair[1].executor)
                {
                    faults.push(format!("a token that is not newer: {:?} and {:?}", pair[0], pair[1]));
                }
                outcome.handovers += usize::from(pair[0].executor != pair[1].executor);
            }
        }
        // Of an end and a beginning at one time the end comes first.
        edges.sort();
        let mut running = 0;
        for (at, change) in edges {
            running += change;
            if running > LIMIT as i32 {
                let at_once = history.iter().filter(|o| o.began <= at && o.ended.is_some_and(|ended| ended > at));
                let at_once: Vec<_> = at_once.map(|o| (o.executor, &o.what, at - o.began)).collect();
                faults.push(format!("{running} operations at once, of {LIMIT}: {at_once:?}"));
                break;
            }
        }
        for index in 0..self.plan.conditions {
            let line = format!("condition {index};");
            let runs = history.iter().filter(|operation| operation.what == line && operation.began < ended).count();
            // The first run sets the grid, and the second may come early. An outage cuts runs off, and what ran last
            // under the session that was lost may be known to nobody.
            let ticks = ((ended - began).as_secs_f64() / self.plan.interval.as_secs_f64()).ceil() as usize;
            let most = ticks + 2 + 2 * EXECUTORS * outages;
            if runs > most {
                faults.push(format!("condition {index} ran {runs} times in {ticks} ticks and {outages} outages"));
            }
        }
        outcome.operations = history.len();
        outcome.cut = history.iter().filter(|operation| operation.cut).count();
        outcome.fenced = self.machines.fenced();
    }
}
