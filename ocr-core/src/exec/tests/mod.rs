//! The executor on guests in memory, with tokio's clock paused: hours pass in milliseconds, and always in the same way.

mod condition;
mod elsewhere;
mod faults;
mod install;
mod log;
mod odd;
mod package;
mod recover;
mod remove;
mod requests;
mod secrets;

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
    time::Duration,
};

use secrecy::SecretString;

use self::package::{Draft, Shelf, condition, feature, inject};
use super::*;
use crate::{
    ComputeBackend, GuestExecExt, Key, StateStore,
    memory::{AgentMode, Fault, Faults, MemoryCloud, MemoryOptions, MemoryState},
    queue::scheduler::SchedulerConfig,
    seal::{SealKey, Sealer},
};

/// An executor with all it needs, and one machine.
struct Rig {
    cloud: MemoryCloud,
    store: MemoryState,
    shelf: Arc<Shelf>,
    scheduler: Scheduler,
    executor: Executor,
    vm: VmId,
}

fn config() -> Config {
    Config {
        action_deadline: Duration::from_secs(300),
        ready_deadline: Duration::from_secs(120),
        ready_interval: Duration::from_secs(5),
        reply_output_bytes: 64 << 10,
    }
}

/// Guests that take some time to boot.
fn slow() -> MemoryOptions {
    MemoryOptions {
        boot_time: Duration::from_secs(2),
        agent_time: Duration::from_secs(9),
        delete_time: Duration::from_secs(1),
        ..MemoryOptions::default()
    }
}

impl Rig {
    async fn new() -> Self {
        Self::with(MemoryOptions::default()).await
    }

    async fn with(options: MemoryOptions) -> Self {
        let faults = Faults::default();
        let cloud = MemoryCloud::with_faults(options, faults.clone());
        let vm = cloud.create_vm(&MemoryCloud::tiny_spec("web-0")).await.unwrap().id;
        let store = MemoryState::with_faults(faults);
        let shelf = Arc::new(Shelf::new());
        let (scheduler, executor) = start(&cloud, &cloud, &store, &shelf, 8);
        Self { cloud, store, shelf, scheduler, executor, vm }
    }

    /// The executor as it would be after a restart: it knows what is in the store, and nothing else.
    fn restart(&mut self) {
        self.restart_with(sealed());
    }

    /// Likewise, with other settings for secrets.
    fn restart_with(&mut self, secrets: SecretStorage) {
        (self.scheduler, self.executor) = start_with(&self.cloud, &self.cloud, &self.store, &self.shelf, 8, secrets);
    }

    fn faults(&self) -> &Faults {
        self.cloud.faults()
    }

    async fn another_vm(&self, name: &str) -> VmId {
        self.cloud.create_vm(&MemoryCloud::tiny_spec(name)).await.unwrap().id
    }

    async fn install(&self, kind: InstallKind, package: &str) -> Result<Installed> {
        self.executor.install(request(kind, self.vm, package)).await
    }

    async fn command(&self, line: &str, interval: Duration) -> InstallId {
        self.executor.create_condition(command(self.vm, line, interval)).await.unwrap().id
    }

    fn file(&self, path: &str) -> Option<String> {
        self.cloud.guest_file(self.vm, path).map(|content| String::from_utf8(content).unwrap())
    }

    /// All records of the executor, as their bytes.
    async fn stored(&self) -> Vec<(Key, String)> {
        let mut all = Vec::new();
        let mut after: Option<Key> = None;
        loop {
            let page = self.store.list("", after.as_ref(), 1000).await.unwrap();
            let Some((last, _)) = page.last() else { return all };
            after = Some(last.clone());
            all.extend(page.into_iter().map(|(key, record)| (key, String::from_utf8(record.value.to_vec()).unwrap())));
        }
    }

    /// How many operations the scheduler has.
    fn queued(&self) -> usize {
        self.scheduler.snapshot().vms.iter().map(|vm| vm.operations).sum()
    }
}

fn start(
    guest: &(impl GuestExec + Clone),
    compute: &(impl ComputeBackend + Clone),
    store: &MemoryState,
    shelf: &Arc<Shelf>,
    max_connections: usize,
) -> (Scheduler, Executor) {
    start_with(guest, compute, store, shelf, max_connections, sealed())
}

/// Sealed with the one key of all tests.
fn sealed() -> SecretStorage {
    static KEY: LazyLock<Arc<Sealer>> = LazyLock::new(|| Arc::new(Sealer::new(vec![SealKey::generate()]).unwrap()));
    SecretStorage::Sealed(KEY.clone())
}

fn start_with(
    guest: &(impl GuestExec + Clone),
    compute: &(impl ComputeBackend + Clone),
    store: &MemoryState,
    shelf: &Arc<Shelf>,
    max_connections: usize,
    secrets: SecretStorage,
) -> (Scheduler, Executor) {
    let scheduler = Scheduler::start(SchedulerConfig { max_connections, ..SchedulerConfig::default() });
    let parts = Parts {
        guest: Arc::new(guest.clone()),
        compute: Arc::new(compute.clone()),
        store: Arc::new(store.clone()),
        packages: shelf.clone(),
        scheduler: scheduler.clone(),
        fleet: None,
        secrets,
    };
    (scheduler.clone(), Executor::new(parts, config()))
}

fn account(username: &str) -> Account {
    Account {
        username: username.to_owned(),
        password: SecretString::from("canary-password"),
        private_key: SecretString::from("canary-private-key"),
    }
}

fn request(kind: InstallKind, vm: VmId, package: &str) -> InstallRequest {
    InstallRequest {
        kind,
        name: "thing".to_owned(),
        vm,
        package: PackageRef { name: package.to_owned(), version: "*".to_owned() },
        account: account(""),
        environment: BTreeMap::new(),
    }
}

fn command(vm: VmId, line: &str, interval: Duration) -> ConditionRequest {
    ConditionRequest {
        name: "is it up".to_owned(),
        vm,
        account: account(""),
        probe: Probe::Command { line: line.to_owned(), interval },
        environment: BTreeMap::new(),
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Lets time pass until `done`, which must be within an hour.
async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let passed = tokio::time::timeout(seconds(3600), async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(passed.await.is_ok(), "never: {what}");
}
