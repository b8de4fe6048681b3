//! Fifty simulated machines, which write down every operation and keep what is done to them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use ocr_core::{
    Command, ComputeBackend, ComputeCapabilities, Deletion, Error, ErrorKind, ExecOutput, ExecRequest, FencingToken,
    GuestCapabilities, GuestExec, GuestInfo, Name, OperationId, OsFamily, PowerAction, PutFiles, RemoveFiles, Result,
    Vm, VmFilter, VmId, VmSpec, VmState, error::reason,
};
use tokio::time::{Instant, sleep};

/// Random numbers from a seed.
#[derive(Debug)]
pub(crate) struct Random(AtomicU64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    pub(crate) fn next(&self) -> u64 {
        // SplitMix64.
        let mut x = self.0.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    pub(crate) fn below(&self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Once in so many times.
    pub(crate) fn once_in(&self, times: u64) -> bool {
        self.below(times) == 0
    }

    pub(crate) fn millis(&self, from: u64, to: u64) -> Duration {
        Duration::from_micros(1000 * from + self.below(1000 * (to - from) + 1))
    }

    pub(crate) fn pick<'a, T>(&self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
}

/// One operation in a guest, as it was.
#[derive(Clone, Debug)]
pub(crate) struct Operation {
    pub(crate) vm: VmId,
    pub(crate) executor: usize,
    pub(crate) token: Option<FencingToken>,
    pub(crate) what: String,
    pub(crate) began: Instant,
    pub(crate) ended: Option<Instant>,
    /// Its call was given up before its end.
    pub(crate) cut: bool,
}

/// All machines, as they are.
#[derive(Debug)]
pub(crate) struct Machines {
    pub(crate) vms: Vec<VmId>,
    pub(crate) random: Random,
    state: Mutex<State>,
    longest_ms: u64,
}

#[derive(Debug, Default)]
struct State {
    machines: HashMap<VmId, Machine>,
    history: Vec<Operation>,
    fenced: usize,
}

#[derive(Debug, Default)]
struct Machine {
    files: BTreeMap<String, Bytes>,
    ran: HashMap<OperationId, i32>,
    newest: Option<FencingToken>,
    boots: u64,
    boots_until: Option<Instant>,
}

impl Machines {
    pub(crate) fn new(count: usize, random: Random, longest_ms: u64) -> Arc<Self> {
        let vms: Vec<VmId> = (0..count).map(|_| VmId::random()).collect();
        let machines = vms.iter().map(|vm| (*vm, Machine::default())).collect();
        let state = Mutex::new(State { machines, ..State::default() });
        Arc::new(Self { vms, random, state, longest_ms })
    }

    pub(crate) fn history(&self) -> Vec<Operation> {
        self.lock().history.clone()
    }

    /// Operations that were refused for an old token.
    pub(crate) fn fenced(&self) -> usize {
        self.lock().fenced
    }

    /// All files of a machine.
    pub(crate) fn files(&self, vm: VmId) -> BTreeSet<String> {
        self.lock().machines[&vm].files.keys().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One executor's way to the machines.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    pub(crate) machines: Arc<Machines>,
    pub(crate) executor: usize,
}

/// Writes down the end, also of a call that is given up.
struct Begun<'a> {
    machines: &'a Machines,
    index: usize,
    done: bool,
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        let mut state = self.machines.lock();
        let operation = &mut state.history[self.index];
        operation.ended = Some(Instant::now());
        operation.cut = !self.done;
    }
}

impl Way {
    /// One operation: takes some time, and has its effect at some point of it, so that one that is given up may have had
    /// it or not.
    async fn operate<T>(
        &self,
        vm: VmId,
        token: Option<FencingToken>,
        what: String,
        effect: impl FnOnce(&mut Machine) -> Result<T>,
    ) -> Result<T> {
        let machines = &*self.machines;
        // Some take longer than what is left of a lease when its owner stops: those must be cut off.
        let longest_ms = machines.longest_ms * if machines.random.once_in(40) { 80 } else { 1 };
        let (early, time) = (machines.random.once_in(2), machines.random.millis(0, longest_ms));
        let mut begun = {
            let state = &mut *machines.lock();
            let machine = state.machines.get_mut(&vm).ok_or_else(|| gone(vm))?;
            // What reads only, and what the cloud does, has no token.
            if token.is_some() && token < machine.newest {
                state.fenced += 1;
                return Err(Error::new(ErrorKind::Conflict, "a newer token was seen").with_reason(reason::FENCED));
            }
            machine.newest = machine.newest.max(token);
            if machine.boots_until.is_some_and(|end| Instant::now() < end) {
                return Err(Error::unavailable("the guest boots").with_reason(reason::AGENT_NOT_READY));
            }
            let operation =
                Operation { vm, executor: self.executor, token, what, began: Instant::now(), ended: None, cut: false };
            state.history.push(operation);
            Begun { machines, index: state.history.len() - 1, done: false }
        };
        let act = || machines.lock().machines.get_mut(&vm).map_or_else(|| Err(gone(vm)), effect);
        let result = if early {
            let result = act();
            sleep(time).await;
            result
        } else {
            sleep(time).await;
            act()
        };
        begun.done = true;
        result
    }
}

fn gone(vm: VmId) -> Error {
    Error::not_found("no such machine").with_reason(reason::GUEST_GONE).on(format!("vm {vm}"))
}

fn output(exit_code: i32, stdout: String) -> ExecOutput {
    ExecOutput {
        exit_code,
        stdout: Bytes::from(stdout),
        stderr: Bytes::new(),
        stdout_truncated: false,
        stderr_truncated: false,
    }
}

#[async_trait]
impl GuestExec for Way {
    fn capabilities(&self) -> GuestCapabilities {
        GuestCapabilities { max_file_bytes: 1 << 20, max_output_bytes: 1 << 20, users: true, streaming: false }
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        let info = GuestInfo {
            agent_version: "1".to_owned(),
            can_exec: true,
            can_files: true,
            os_family: OsFamily::Linux,
            os_name: String::new(),
        };
        self.operate(vm, None, "info".to_owned(), |_| Ok(info)).await
    }

    async fn put_files(&self, vm: VmId, request: &PutFiles) -> Result<()> {
        let files = request.files.clone();
        let what = format!("put {:?}", files.iter().map(|file| &file.path).collect::<Vec<_>>());
        self.operate(vm, request.fence, what, |machine| {
            machine.files.extend(files.into_iter().map(|file| (file.path, file.content)));
            Ok(())
        })
        .await
    }

    async fn get_file(&self, vm: VmId, path: &str, _limit_bytes: u64) -> Result<Bytes> {
        self.operate(vm, None, format!("get {path}"), |machine| {
            machine.files.get(path).cloned().ok_or_else(|| Error::not_found("no such file"))
        })
        .await
    }

    async fn remove_files(&self, vm: VmId, request: &RemoveFiles) -> Result<Vec<Result<Deletion>>> {
        let paths = request.paths.clone();
        self.operate(vm, request.fence, format!("remove {paths:?}"), |machine| {
            let remove = |path: &String| match machine.files.remove(path) {
                Some(_) => Ok(Deletion::Deleted),
                None => Ok(Deletion::AlreadyGone),
            };
            Ok(paths.iter().map(remove).collect())
        })
        .await
    }

    async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        let line = match &request.command {
            Command::Shell(line) => line.clone(),
            Command::Argv(argv) => argv.join(" "),
        };
        let operation = request.operation;
        self.operate(vm, request.fence, line.clone(), |machine| {
            // What ran under this id is not run again.
            let fails = line.contains("fails");
            let code = *machine.ran.entry(operation).or_insert(i32::from(fails));
            let text = if line.contains("boot_id") { format!("boot {}", machine.boots) } else { "1".to_owned() };
            Ok(output(code, text))
        })
        .await
    }
}

#[async_trait]
impl ComputeBackend for Way {
    fn capabilities(&self) -> ComputeCapabilities {
        ComputeCapabilities { max_cpus: 1, max_ram_bytes: 1, power: true, nics: false }
    }

    async fn create_vm(&self, _spec: &VmSpec) -> Result<Vm> {
        Err(Error::unsupported("these machines are there"))
    }

    async fn get_vm(&self, id: VmId) -> Result<Vm> {
        if self.machines.lock().machines.contains_key(&id) { Ok(machine(id)) } else { Err(gone(id)) }
    }

    async fn list_vms(&self, _filter: &VmFilter) -> Result<Vec<Vm>> {
        Ok(self.machines.vms.iter().map(|vm| machine(*vm)).collect())
    }

    async fn set_power(&self, id: VmId, _action: PowerAction) -> Result<()> {
        let down = self.machines.random.millis(5, 60);
        self.operate(id, None, "reboot".to_owned(), |machine| {
            machine.boots += 1;
            machine.boots_until = Some(Instant::now() + down);
            Ok(())
        })
        .await
    }

    async fn delete_vm(&self, _id: VmId) -> Result<Deletion> {
        Err(Error::unsupported("these machines stay"))
    }
}

fn machine(id: VmId) -> Vm {
    Vm {
        id,
        name: Name::new("machine").unwrap(),
        tags: None,
        state: VmState::Running,
        cpus: 1,
        ram_bytes: 1,
        image: None,
        nics: Vec::new(),
        has_agent_channel: true,
    }
}
