//! [`GuestExec`] in memory.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::{sync::watch, task::AbortHandle};
use uuid::Uuid;

use super::{
    Inner, MemoryCloud,
    compute::Machine,
    shell::{Output, Shell},
    tree::{Fail, ROOT, Tree, parent},
};
use crate::{
    Command, Deletion, Error, ErrorKind, ExecOutput, ExecRequest, FencingToken, GuestCapabilities, GuestExec,
    GuestInfo, OperationId, OsFamily, PutFile, PutFiles, RemoveFiles, Result, Retry, VmId, VmState,
    error::{reason, seconds},
    guest::{check_guest_path, fence_wait_ended, fenced},
};

/// The most results kept for repeats, per machine.
const MAX_RESULTS: usize = 1_000;
/// The most output kept in those results, per machine, in bytes. The newest result is always kept.
const MAX_RESULT_BYTES: usize = 64 << 20;

/// How long work on files waits for what runs under an older fencing token.
const FILES_WAIT: Duration = Duration::from_secs(60);

/// How a guest's agent behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentMode {
    /// It answers once the guest has booted.
    Answers,
    /// It does not answer now.
    Stopped,
    /// The machine has no channel for one.
    Absent,
    /// It answers, but its configuration forbids commands, files, or both.
    Disabled {
        /// Whether commands are forbidden.
        exec: bool,
        /// Whether files are forbidden.
        files: bool,
    },
}

/// What a guest does to its own machine's power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Power {
    Reboot,
    Off,
}

/// The commands that run in a guest and the results of those that ran.
#[derive(Default)]
pub(super) struct Operations {
    by_id: HashMap<OperationId, Operation>,
    /// Those that have ended, oldest first.
    ended: VecDeque<OperationId>,
    bytes: usize,
}

struct Operation {
    outcome: watch::Sender<Option<Outcome>>,
    task: Option<AbortHandle>,
    fence: Option<FencingToken>,
}

/// An operation's end, for those who wait.
type Seen = watch::Receiver<Option<Outcome>>;

/// What became of a request under a fence.
enum Entered<T> {
    In(T),
    /// This works still, under an older token.
    Wait(Seen),
}

#[derive(Clone, Debug)]
enum Outcome {
    Ended(ExecOutput),
    TimedOut(Duration),
    /// It ran when the guest was stopped or restarted. Only the first who asks may hope for better.
    Lost(&'static str),
}

impl Operations {
    fn end(&mut self, id: OperationId, outcome: Outcome) {
        let running = |operation: &&mut Operation| operation.outcome.borrow().is_none();
        let Some(operation) = self.by_id.get_mut(&id).filter(running) else { return };
        operation.task = None;
        self.bytes += size(Some(&outcome));
        operation.outcome.send_replace(Some(outcome));
        self.ended.push_back(id);
        while self.ended.len() > MAX_RESULTS || (self.bytes > MAX_RESULT_BYTES && self.ended.len() > 1) {
            let oldest = self.ended.pop_front().and_then(|id| self.by_id.remove(&id));
            if let Some(oldest) = oldest {
                self.bytes -= size(oldest.outcome.borrow().as_ref());
            }
        }
    }

    /// One that runs still under an older token.
    fn older(&self, fence: Option<FencingToken>) -> Option<Seen> {
        let runs = |operation: &&Operation| operation.outcome.borrow().is_none();
        let older = |operation: &&Operation| operation.fence.is_some_and(|token| Some(token) < fence);
        self.by_id.values().filter(runs).find(older).map(|operation| operation.outcome.subscribe())
    }

    /// Ends all that run. What they did so far stays done.
    pub(super) fn lose_all(&mut self, why: &'static str) {
        let mut running: Vec<_> = Vec::new();
        for (id, operation) in &mut self.by_id {
            if let Some(task) = operation.task.take() {
                task.abort();
                running.push(*id);
            } else if operation.outcome.borrow().is_none() {
                running.push(*id);
            }
        }
        running.sort_unstable();
        running.into_iter().for_each(|id| self.end(id, Outcome::Lost(why)));
    }
}

fn size(outcome: Option<&Outcome>) -> usize {
    match outcome {
        Some(Outcome::Ended(output)) => output.stdout.len() + output.stderr.len(),
        _ => 0,
    }
}

/// Enters a command's end in the results, whatever ends it: callers wait for that entry.
struct End {
    process: Process,
    operation: OperationId,
    outcome: Outcome,
}

impl Drop for End {
    fn drop(&mut self) {
        self.process.machine(|machine| machine.operations.end(self.operation, self.outcome.clone()));
    }
}

/// What a command in a guest holds of its machine. It keeps neither the cloud nor the machine alive.
#[derive(Clone, Debug)]
pub(super) struct Process {
    cloud: Weak<Inner>,
    vm: VmId,
    power: Arc<Mutex<Option<Power>>>,
}

impl Process {
    fn machine<R>(&self, f: impl FnOnce(&mut Machine) -> R) -> Option<R> {
        let cloud = self.cloud.upgrade()?;
        let mut world = cloud.world();
        world.vms.get_mut(&self.vm).map(f)
    }

    /// Reads the guest's files; `None` when the machine is gone.
    pub(super) fn look<R>(&self, f: impl FnOnce(&Tree) -> R) -> Option<R> {
        self.machine(|machine| f(&machine.files))
    }

    /// Changes the guest's files; `None` when the machine is gone.
    pub(super) fn change<R>(&self, f: impl FnOnce(&mut Tree) -> R) -> Option<R> {
        self.machine(|machine| f(Arc::make_mut(&mut machine.files)))
    }

    pub(super) fn machine_name(&self) -> String {
        self.machine(|machine| machine.vm.name.to_string()).unwrap_or_default()
    }

    /// Another one after each boot.
    pub(super) fn boot_id(&self) -> Uuid {
        let boots = self.machine(|machine| machine.boots).unwrap_or_default();
        Uuid::new_v5(self.vm.as_uuid(), format!("boot {boots}").as_bytes())
    }

    pub(super) fn user_number(&self, user: &str) -> Option<usize> {
        self.machine(|machine| user_number(&machine.users, user))?
    }

    /// The machine is rebooted or switched off as soon as the whole command has ended, so that its result is known.
    pub(super) fn ask_power(&self, power: Power) {
        *self.power.lock().unwrap_or_else(PoisonError::into_inner) = Some(power);
    }
}

fn user_number(users: &[String], user: &str) -> Option<usize> {
    users.iter().position(|known| known == user).map(|index| if index == 0 { 0 } else { 999 + index })
}

/// Takes note of a request's token.
fn see(machine: &mut Machine, fence: Option<FencingToken>) -> Result<()> {
    match fence {
        Some(token) if Some(token) < machine.fence => Err(fenced(token)),
        Some(_) => {
            machine.fence = fence;
            Ok(())
        }
        None => Ok(()),
    }
}

/// Repeats an attempt until nothing older works any more.
async fn entered<T>(limit: Duration, attempt: impl Fn() -> Result<Entered<T>>) -> Result<T> {
    let end = tokio::time::Instant::now().checked_add(limit);
    loop {
        let mut older = match attempt()? {
            Entered::In(done) => return Ok(done),
            Entered::Wait(older) => older,
        };
        let ended = older.wait_for(Option::is_some);
        match end {
            // A sender that is gone is an operation that is.
            Some(end) => drop(tokio::time::timeout_at(end, ended).await.map_err(|_| fence_wait_ended(limit))?),
            None => drop(ended.await),
        }
    }
}

fn agent_error(kind: ErrorKind, reason: &'static str, message: &str, vm: VmId) -> Error {
    Error::new(kind, message).with_reason(reason).on(format!("vm {vm}"))
}

impl Inner {
    /// The machine, when its agent answers.
    fn with_guest<R>(&self, vm: VmId, act: impl FnOnce(&mut Machine) -> Result<R>) -> Result<R> {
        let mut world = self.world();
        self.settle(&mut world, vm);
        let machine = world.vms.get_mut(&vm).filter(|machine| machine.vm.state != VmState::Deleting);
        let machine =
            machine.ok_or_else(|| agent_error(ErrorKind::NotFound, reason::GUEST_GONE, "the machine is gone", vm))?;
        let fail = |kind, reason, message| Err(agent_error(kind, reason, message, vm));
        match (machine.agent, &machine.vm.state) {
            (AgentMode::Absent, _) => {
                fail(ErrorKind::Unsupported, reason::AGENT_ABSENT, "the machine has no guest agent")
            }
            (_, VmState::Stopped | VmState::Paused | VmState::Failed(_)) => {
                fail(ErrorKind::Conflict, reason::GUEST_NOT_RUNNING, "the machine is not running")
            }
            (AgentMode::Stopped, _) => {
                fail(ErrorKind::Unavailable, reason::AGENT_NOT_READY, "the guest agent does not answer")
            }
            _ if !machine.agent_up => {
                fail(ErrorKind::Unavailable, reason::AGENT_NOT_READY, "the guest has not booted yet")
            }
            _ => act(machine),
        }
    }

    fn with_files<R>(&self, vm: VmId, act: impl FnOnce(&mut Machine) -> Result<R>) -> Result<R> {
        self.with_guest(vm, |machine| match machine.agent {
            AgentMode::Disabled { files: true, .. } => Err(agent_error(
                ErrorKind::Unsupported,
                reason::AGENT_COMMAND_DISABLED,
                "the guest agent forbids files",
                vm,
            )),
            _ => act(machine),
        })
    }

    async fn put_files(&self, vm: VmId, request: &PutFiles) -> Result<()> {
        for file in &request.files {
            check_guest_path(&file.path)?;
        }
        request.check(self.options.max_file_bytes)?;
        let attempt = || {
            self.with_files(vm, |machine| {
                see(machine, request.fence)?;
                if let Some(older) = machine.operations.older(request.fence) {
                    return Ok(Entered::Wait(older));
                }
                // All of it or nothing: the changes are made on a copy.
                let mut files = Tree::clone(&machine.files);
                for file in &request.files {
                    put_one(&machine.users, &mut files, file)?;
                }
                machine.files = Arc::new(files);
                Ok(Entered::In(()))
            })
        };
        entered(FILES_WAIT, attempt).await
    }

    fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        check_guest_path(path)?;
        self.with_files(vm, |machine| {
            let content = machine.files.read(ROOT, path).map_err(|fail| file_error(fail, path))?;
            if content.len() as u64 > limit_bytes {
                let why = format!("the file has {} bytes, over the limit of {limit_bytes}", content.len());
                return Err(Error::new(ErrorKind::Exhausted, why).on(path));
            }
            Ok(Bytes::copy_from_slice(&content))
        })
    }

    async fn remove_files(&self, vm: VmId, request: &RemoveFiles) -> Result<Vec<Result<Deletion>>> {
        request.paths.iter().try_for_each(|path| check_guest_path(path))?;
        let attempt = || {
            self.with_files(vm, |machine| {
                see(machine, request.fence)?;
                if let Some(older) = machine.operations.older(request.fence) {
                    return Ok(Entered::Wait(older));
                }
                let files = Arc::make_mut(&mut machine.files);
                Ok(Entered::In(request.paths.iter().map(|path| remove_one(files, path)).collect()))
            })
        };
        entered(FILES_WAIT, attempt).await
    }

    /// The running or ended command of this operation, started now if there is none.
    fn begin(self: &Arc<Self>, vm: VmId, request: &ExecRequest) -> Result<Entered<Seen>> {
        self.with_guest(vm, |machine| {
            if let AgentMode::Disabled { exec: true, .. } = machine.agent {
                let why = "the guest agent forbids commands";
                return Err(agent_error(ErrorKind::Unsupported, reason::AGENT_COMMAND_DISABLED, why, vm));
            }
            see(machine, request.fence)?;
            if let Some(operation) = machine.operations.by_id.get(&request.operation) {
                return match &*operation.outcome.borrow() {
                    Some(Outcome::Lost(why)) => Err(Error::new(
                        ErrorKind::Conflict,
                        format!("{why} while the command ran; how far it came is not known, and it is not run again"),
                    )
                    .on(format!("vm {vm}"))),
                    _ => Ok(Entered::In(operation.outcome.subscribe())),
                };
            }
            let user = request.user.as_deref().unwrap_or(ROOT);
            if user_number(&machine.users, user).is_none() {
                let why = format_args!("the guest has no user {}", crate::id::shown(user));
                return Err(Error::invalid("user", why));
            }
            if let Some(older) = machine.operations.older(request.fence) {
                return Ok(Entered::Wait(older));
            }
            let (outcome, seen) = watch::channel(None);
            let task = tokio::spawn(self.command(vm, user, request)).abort_handle();
            let operation = Operation { outcome, task: Some(task), fence: request.fence };
            machine.operations.by_id.insert(request.operation, operation);
            machine.commands += 1;
            Ok(Entered::In(seen))
        })
    }

    /// A command in a guest, from its start to its entry in the results.
    fn command(
        self: &Arc<Self>,
        vm: VmId,
        user: &str,
        request: &ExecRequest,
    ) -> impl Future<Output = ()> + Send + use<> {
        let process = Process { cloud: Arc::downgrade(self), vm, power: Arc::default() };
        let limit_bytes = request.output_limit_bytes.min(self.options.max_output_bytes);
        let progress = request.progress.clone().filter(|_| self.options.streaming);
        let output = Arc::new(Output::new(usize::try_from(limit_bytes).unwrap_or(usize::MAX), progress));
        let shell = Shell::new(process.clone(), output.clone(), user, &request.environment, request.stdin.clone());
        let (operation, command, deadline) = (request.operation, request.command.clone(), request.deadline);
        let lost = Outcome::Lost("the command was ended from outside");
        let mut end = End { process: process.clone(), operation, outcome: lost };
        async move {
            let run = async {
                match &command {
                    Command::Shell(line) => shell.line(line).await,
                    Command::Argv(argv) => shell.argv(argv).await,
                }
            };
            end.outcome = match tokio::time::timeout(deadline, Box::pin(run)).await {
                Err(_) => Outcome::TimedOut(deadline),
                Ok(exit_code) => {
                    let [(stdout, stdout_truncated), (stderr, stderr_truncated)] = output.take();
                    Outcome::Ended(ExecOutput { exit_code, stdout, stderr, stdout_truncated, stderr_truncated })
                }
            };
            drop(end);
            let power = *process.power.lock().unwrap_or_else(PoisonError::into_inner);
            if let (Some(power), Some(cloud)) = (power, process.cloud.upgrade()) {
                cloud.power_guest(&mut cloud.world(), vm, power);
            }
        }
    }

    async fn exec(self: &Arc<Self>, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        request.check()?;
        if request.user.is_some() && !self.options.users {
            return Err(Error::unsupported("user: this backend runs commands as the agent's own user only"));
        }
        let mut seen = entered(request.deadline, || self.begin(vm, request)).await?;
        let outcome = match seen.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone(),
            Err(_) => None,
        };
        match outcome {
            Some(Outcome::Ended(output)) => Ok(output),
            // It was ended for good: the same operation gives the same answer.
            Some(Outcome::TimedOut(deadline)) => {
                Err(Error::timed_out(format!("the command did not end in {} and was killed", seconds(deadline)))
                    .with_retry(Retry::Never)
                    .on(format!("vm {vm}")))
            }
            lost => {
                let why = match lost {
                    Some(Outcome::Lost(why)) => why,
                    _ => "the machine is gone",
                };
                let message = format!("{why} while the command ran; how far it came is not known");
                Err(agent_error(ErrorKind::Unavailable, reason::AGENT_NOT_READY, &message, vm)
                    .with_retry(Retry::Ambiguous))
            }
        }
    }
}

fn put_one(users: &[String], files: &mut Tree, file: &PutFile) -> Result<()> {
    let owner = file.owner.as_deref().unwrap_or(ROOT);
    if user_number(users, owner).is_none() {
        let why = format_args!("the guest has no user {}", crate::id::shown(owner));
        return Err(Error::invalid("owner", why).on(&file.path));
    }
    let mut put = || {
        if file.make_parents {
            files.make_folders(ROOT, parent(&file.path))?;
        }
        files.write(ROOT, &file.path, &file.content, false)?;
        files.set_mode(ROOT, &file.path, file.mode.unwrap_or(0o644))?;
        files.set_owner(ROOT, &file.path, owner)
    };
    put().map_err(|fail| file_error(fail, &file.path))
}

fn remove_one(files: &mut Tree, path: &str) -> Result<Deletion> {
    if files.look(path).is_some_and(super::tree::Node::is_folder) {
        return Err(file_error(Fail::Folder, path));
    }
    match files.remove(ROOT, path) {
        Ok(()) => Ok(Deletion::Deleted),
        Err(Fail::Missing | Fail::NoFolder) => Ok(Deletion::AlreadyGone),
        Err(fail) => Err(file_error(fail, path)),
    }
}

fn file_error(fail: Fail, path: &str) -> Error {
    let kind = match fail {
        Fail::Missing | Fail::NoFolder => ErrorKind::NotFound,
        Fail::Full => ErrorKind::Exhausted,
        Fail::Folder => ErrorKind::Conflict,
        Fail::Exists | Fail::NotEmpty | Fail::Denied => ErrorKind::Conflict,
    };
    Error::new(kind, fail.to_string()).on(path)
}

#[async_trait]
impl GuestExec for MemoryCloud {
    fn capabilities(&self) -> GuestCapabilities {
        let options = &self.inner.options;
        GuestCapabilities {
            max_file_bytes: options.max_file_bytes,
            max_output_bytes: options.max_output_bytes,
            users: options.users,
            streaming: options.streaming,
        }
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        let effect = async {
            self.inner.with_guest(vm, |machine| {
                let (no_exec, no_files) = match machine.agent {
                    AgentMode::Disabled { exec, files } => (exec, files),
                    _ => (false, false),
                };
                Ok(GuestInfo {
                    agent_version: "1.0-memory".to_owned(),
                    can_exec: !no_exec,
                    can_files: !no_files,
                    os_family: OsFamily::Linux,
                    os_name: "Memory Linux 1".to_owned(),
                })
            })
        };
        self.inner.faults.around("guest.guest_info", effect).await
    }

    async fn put_files(&self, vm: VmId, request: &PutFiles) -> Result<()> {
        self.inner.faults.around("guest.put_files", self.inner.put_files(vm, request)).await
    }

    async fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        self.inner.faults.around("guest.get_file", async { self.inner.get_file(vm, path, limit_bytes) }).await
    }

    async fn remove_files(&self, vm: VmId, request: &RemoveFiles) -> Result<Vec<Result<Deletion>>> {
        self.inner.faults.around("guest.remove_files", self.inner.remove_files(vm, request)).await
    }

    async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        self.inner.faults.around("guest.exec", self.inner.exec(vm, request)).await
    }
}
