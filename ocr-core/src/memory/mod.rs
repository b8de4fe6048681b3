//! All five traits in memory: for tests, for the demo, and as the model that other backends are compared with.
//!
//! [`MemoryCloud`] makes machines, networks and images and acts in guests; [`MemoryState`] keeps records. Guests have
//! files with modes and owners, and a small shell of their own (`sh`, some forty programs, scripts); nothing in them
//! ever touches the host.
//!
//! Everything that takes time takes it by tokio's clock, so tests with a paused clock are quick and always go the same way.
//! With [`MemoryOptions::single_steps`] time changes nothing: each [`MemoryCloud::step`] completes one piece of long work.
//! [`Faults`] refuse calls, lose answers or hang calls where a test wants it.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> ocr_core::Result<()> {
//! use std::time::Duration;
//! use ocr_core::{ComputeBackend, GuestExecExt, memory::MemoryCloud};
//!
//! let cloud = MemoryCloud::new();
//! let vm = cloud.create_vm(&MemoryCloud::tiny_spec("web-0")).await?;
//! cloud.wait_ready(vm.id, Duration::from_secs(5), Duration::from_millis(50)).await?;
//! let output = cloud.shell(vm.id, "if [ -f /etc/passwd ]; then echo 1; else echo 0; fi").await?;
//! assert_eq!(output.stdout, "1\n");
//! # Ok(()) }
//! ```

mod compute;
mod faults;
mod guest;
mod image;
mod network;
mod shell;
mod state;
mod tree;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use uuid::Uuid;

use self::{compute::Machine, guest::Operations, image::StoredImage, network::StoredNetwork};
pub use self::{
    faults::{Fault, Faults},
    guest::AgentMode,
    state::MemoryState,
};
use crate::{
    Access, Error, ErrorKind, ImageId, Name, NetworkId, Owner, RequestId, Result, Scope, Tags, Vm, VmId, VmSpec,
    VmState,
};

/// How a [`MemoryCloud`] behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryOptions {
    /// From accepted to running.
    pub boot_time: Duration,
    /// From running, or from a guest's reboot, to an agent that answers.
    pub agent_time: Duration,
    /// From a delete to gone.
    pub delete_time: Duration,
    /// Whether long work waits for [`MemoryCloud::step`] instead of the clock.
    pub single_steps: bool,
    /// Whether new machines have a guest agent.
    pub agent: bool,
    /// Whether machines can be switched on and off.
    pub power: bool,
    /// Whether machines can have NICs.
    pub nics: bool,
    /// Whether networks can be made.
    pub make_networks: bool,
    /// Whether [`set_access`](crate::NetworkBackend::set_access) works.
    pub access: bool,
    /// Whether images can be taken in.
    pub import: bool,
    /// Whether machines can be captured.
    pub capture: bool,
    /// Whether images can be exported.
    pub export: bool,
    /// Whether commands can be run as another user.
    pub users: bool,
    /// Whether commands' output is sent while they run.
    pub streaming: bool,
    /// The most virtual cpus of one machine.
    pub max_cpus: u32,
    /// The most memory of one machine, in bytes.
    pub max_ram_bytes: u64,
    /// The most machines; one more is `Exhausted`.
    pub max_vms: usize,
    /// The most networks.
    pub max_networks: usize,
    /// The most images.
    pub max_images: usize,
    /// The largest image that is taken in, in bytes.
    pub max_image_bytes: u64,
    /// What one guest's files may hold, in bytes.
    pub disk_bytes: u64,
    /// The largest file that is copied into a guest, in bytes.
    pub max_file_bytes: u64,
    /// The most output of one command, in bytes, stdout and stderr each.
    pub max_output_bytes: u64,
    /// Makes the ids the same in every run; without one they are random.
    pub seed: Option<u64>,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        Self {
            boot_time: Duration::ZERO,
            agent_time: Duration::ZERO,
            delete_time: Duration::ZERO,
            single_steps: false,
            agent: true,
            power: true,
            nics: true,
            make_networks: true,
            access: true,
            import: true,
            capture: true,
            export: true,
            users: true,
            streaming: true,
            max_cpus: 64,
            max_ram_bytes: 1 << 40,
            max_vms: 100_000,
            max_networks: 10_000,
            max_images: 1_000,
            max_image_bytes: 64 << 20,
            disk_bytes: 256 << 20,
            max_file_bytes: 64 << 20,
            max_output_bytes: 16 << 20,
            seed: None,
        }
    }
}

/// Machines, networks, images and guests in memory. Cloning is cheap; all clones are one cloud.
///
/// It begins with the image `tiny` (Linux, users `root` and `user`), the image `mute` (the same without an agent) and
/// the networks `default` and `lab`, all made by "somebody else": they carry no tags.
///
/// It implements [`ComputeBackend`](crate::ComputeBackend), [`NetworkBackend`](crate::NetworkBackend),
/// [`ImageBackend`](crate::ImageBackend) and [`GuestExec`](crate::GuestExec). Commands that run in guests are tasks
/// of the cloud; they end with their machine, at their deadline, or when the last clone is dropped.
#[derive(Clone)]
pub struct MemoryCloud {
    inner: Arc<Inner>,
}

struct Inner {
    options: MemoryOptions,
    faults: Faults,
    ids: Uuid,
    world: Mutex<World>,
}

#[derive(Default)]
struct World {
    vms: BTreeMap<VmId, Machine>,
    vms_by_name: HashMap<(Owner, Scope, Name), VmId>,
    vms_by_request: HashMap<(Owner, RequestId), VmId>,
    networks: BTreeMap<NetworkId, StoredNetwork>,
    images: BTreeMap<ImageId, StoredImage>,
    /// Counts everything that is made or put off, so that order and ids never depend on chance.
    serial: u64,
}

/// When a piece of long work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    At(Instant),
    /// At the step that finds it the oldest.
    Step(u64),
}

/// What [`MemoryCloud::step`] completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The machine runs now.
    Running(VmId),
    /// The machine's agent answers now.
    AgentReady(VmId),
    /// The machine is gone now.
    Gone(VmId),
}

impl MemoryCloud {
    /// A cloud of the usual kind: nothing takes time and everything can be done.
    pub fn new() -> Self {
        Self::with(MemoryOptions::default())
    }

    /// A cloud with options.
    pub fn with(options: MemoryOptions) -> Self {
        Self::with_faults(options, Faults::default())
    }

    /// A cloud whose calls follow this plan of faults.
    pub fn with_faults(options: MemoryOptions, faults: Faults) -> Self {
        let ids = match options.seed {
            Some(seed) => Uuid::new_v5(&Uuid::NAMESPACE_OID, &seed.to_be_bytes()),
            None => Uuid::new_v4(),
        };
        let mut world = World::default();
        image::furnish(&mut world, &options);
        network::furnish(&mut world);
        Self { inner: Arc::new(Inner { options, faults, ids, world: Mutex::new(world) }) }
    }

    /// The image `tiny`: Linux with an agent, users `root` and `user`.
    pub fn tiny() -> ImageId {
        ImageId::from_uuid(fixed("image tiny"))
    }

    /// The image `mute`: as `tiny`, without an agent.
    pub fn mute() -> ImageId {
        ImageId::from_uuid(fixed("image mute"))
    }

    /// The network `default`, `192.0.2.0/24`.
    pub fn default_network() -> NetworkId {
        NetworkId::from_uuid(fixed("network default"))
    }

    /// The network `lab`, isolated.
    pub fn lab_network() -> NetworkId {
        NetworkId::from_uuid(fixed("network lab"))
    }

    /// A small machine of the image `tiny` on the network `default`, under a fresh request of the owner `test`.
    ///
    /// # Panics
    /// When the name is none.
    pub fn tiny_spec(name: &str) -> VmSpec {
        #[expect(clippy::unwrap_used, reason = "documented; for tests and examples")]
        let (name, owner) = (Name::new(name).unwrap(), Owner::new("test").unwrap());
        VmSpec {
            tags: Tags { owner, request: RequestId::random(), scope: Scope::default() },
            name,
            cpus: 1,
            ram_bytes: 128 << 20,
            image: Self::tiny(),
            links: vec![Self::default_network()],
            labels: BTreeMap::new(),
        }
    }

    /// The options it was made with.
    pub fn options(&self) -> &MemoryOptions {
        &self.inner.options
    }

    /// The plan of faults.
    pub fn faults(&self) -> &Faults {
        &self.inner.faults
    }

    /// [`Faults::inject`] on this cloud's plan.
    ///
    /// # Panics
    /// As [`Faults::inject`].
    pub fn fault(&self, operation: &str, nth: u64, fault: Fault) {
        self.inner.faults.inject(operation, nth, fault);
    }

    /// Completes the oldest piece of long work, with [`MemoryOptions::single_steps`]; `None` when there is none.
    pub fn step(&self) -> Option<Step> {
        let mut world = self.world();
        let pending = |(id, machine): (&VmId, &Machine)| match machine.next {
            Some((Due::Step(serial), _)) => Some((serial, *id)),
            _ => None,
        };
        let (_, id) = world.vms.iter().filter_map(pending).min()?;
        Some(self.inner.advance(&mut world, id))
    }

    /// [`step`](Self::step) until nothing is left; gives how many steps that were.
    pub fn step_all(&self) -> usize {
        std::iter::from_fn(|| self.step()).count()
    }

    /// Puts a machine there that "somebody else" made: running, from the image `tiny`, without tags.
    pub fn add_foreign_vm(&self, name: &Name) -> VmId {
        let mut world = self.world();
        let id = VmId::from_uuid(self.inner.id(&mut world, "vm"));
        let machine = Machine {
            vm: Vm {
                id,
                name: name.clone(),
                tags: None,
                state: VmState::Running,
                cpus: 1,
                ram_bytes: 128 << 20,
                image: None,
                nics: Vec::new(),
                has_agent_channel: true,
            },
            spec: None,
            next: None,
            agent: AgentMode::Answers,
            agent_up: true,
            boots: 1,
            files: image::base_files(&self.inner.options, "user"),
            users: image::users(&["user".to_owned()]),
            operations: Operations::default(),
            commands: 0,
            fence: None,
            access: Access::Open,
        };
        world.vms.insert(id, machine);
        id
    }

    /// Takes a machine away as if somebody else had deleted it. Whether there was one.
    pub fn vanish_vm(&self, id: VmId) -> bool {
        self.world().remove_vm(id)
    }

    /// Makes a machine fail as if its hypervisor had given up. Whether there was one.
    pub fn fail_vm(&self, id: VmId, why: &str) -> bool {
        self.change_vm(id, |machine| {
            machine.vm.state = VmState::Failed(why.to_owned());
            machine.next = None;
            machine.stop_guest("the machine failed");
        })
    }

    /// Pauses a running machine, or lets a paused one go on, as somebody else would. Whether it was in the other state.
    pub fn pause_vm(&self, id: VmId, paused: bool) -> bool {
        let (from, to) = match paused {
            true => (VmState::Running, VmState::Paused),
            false => (VmState::Paused, VmState::Running),
        };
        let mut changed = false;
        self.change_vm(id, |machine| {
            changed = machine.vm.state == from;
            if changed {
                machine.vm.state = to;
            }
        });
        changed
    }

    /// Says how a guest's agent behaves from now on. Whether there is such a machine.
    pub fn set_agent(&self, id: VmId, mode: AgentMode) -> bool {
        self.change_vm(id, |machine| {
            machine.agent = mode;
            machine.vm.has_agent_channel = mode != AgentMode::Absent;
        })
    }

    /// Reboots a guest from inside, without a word to the backend: what runs in it is lost, and its agent answers only
    /// after [`MemoryOptions::agent_time`]. Whether there is such a machine and it runs.
    pub fn reboot_guest(&self, id: VmId) -> bool {
        let mut rebooted = false;
        let mut world = self.world();
        self.inner.settle(&mut world, id);
        let serial = world.next_serial();
        if let Some(machine) = world.vms.get_mut(&id).filter(|machine| machine.vm.state == VmState::Running) {
            self.inner.boot_guest(machine, serial, Instant::now());
            rebooted = true;
        }
        rebooted
    }

    /// How often a guest has booted.
    pub fn boots(&self, id: VmId) -> Option<u64> {
        self.read_vm(id, |machine| machine.boots)
    }

    /// How many commands were really started in a guest; a repeat that was answered does not count.
    pub fn commands(&self, id: VmId) -> Option<u64> {
        self.read_vm(id, |machine| machine.commands)
    }

    /// Who may reach a machine, as [`set_access`](crate::NetworkBackend::set_access) said last; `Open` at first.
    pub fn access(&self, id: VmId) -> Option<Access> {
        self.read_vm(id, |machine| machine.access.clone())
    }

    /// A file in a guest, without asking its agent.
    pub fn guest_file(&self, id: VmId, path: &str) -> Option<Vec<u8>> {
        self.read_vm(id, |machine| machine.files.read(tree::ROOT, path).ok().map(|content| content.to_vec()))?
    }

    /// Writes a file in a guest as root, without asking its agent; folders are made.
    ///
    /// # Errors
    /// `NotFound` when there is no such machine; `Invalid` when the guest's files forbid it.
    pub fn write_guest_file(&self, id: VmId, path: &str, content: &[u8]) -> Result<()> {
        let mut written = None;
        self.change_vm(id, |machine| {
            let files = Arc::make_mut(&mut machine.files);
            written = Some(
                files
                    .make_folders(tree::ROOT, tree::parent(path))
                    .and_then(|()| files.write(tree::ROOT, path, content, false)),
            );
        });
        written
            .ok_or_else(|| gone(id))?
            .map_err(|fail| Error::invalid("path", format_args!("{}: {fail}", crate::id::shown(path))))
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.inner.world()
    }

    fn change_vm(&self, id: VmId, change: impl FnOnce(&mut Machine)) -> bool {
        let mut world = self.world();
        self.inner.settle(&mut world, id);
        world.vms.get_mut(&id).map(change).is_some()
    }

    fn read_vm<R>(&self, id: VmId, read: impl FnOnce(&Machine) -> R) -> Option<R> {
        let mut world = self.world();
        self.inner.settle(&mut world, id);
        world.vms.get(&id).map(read)
    }
}

impl Default for MemoryCloud {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryCloud {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let world = self.world();
        f.debug_struct("MemoryCloud")
            .field("vms", &world.vms.len())
            .field("networks", &world.networks.len())
            .field("images", &world.images.len())
            .finish_non_exhaustive()
    }
}

impl Inner {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn id(&self, world: &mut World, kind: &str) -> Uuid {
        Uuid::new_v5(&self.ids, format!("{kind} {}", world.next_serial()).as_bytes())
    }

    /// When work that takes `time` from `from` on is done.
    fn due(&self, serial: u64, from: Instant, time: Duration) -> Due {
        if self.options.single_steps {
            return Due::Step(serial);
        }
        // A time that the clock cannot reach is waited for for ever, and no test lives that long.
        Due::At(from.checked_add(time).unwrap_or(from + Duration::from_secs(u32::MAX.into())))
    }

    /// Completes what is due on one machine by now.
    fn settle(&self, world: &mut World, id: VmId) {
        while let Some((Due::At(when), _)) = world.vms.get(&id).and_then(|machine| machine.next)
            && when <= Instant::now()
        {
            self.advance(world, id);
        }
    }

    fn settle_all(&self, world: &mut World) {
        let now = Instant::now();
        let due: Vec<_> = world
            .vms
            .iter()
            .filter(|(_, machine)| matches!(machine.next, Some((Due::At(when), _)) if when <= now))
            .map(|(id, _)| *id)
            .collect();
        due.into_iter().for_each(|id| self.settle(world, id));
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let world = self.world.get_mut().unwrap_or_else(PoisonError::into_inner);
        for machine in world.vms.values_mut() {
            machine.stop_guest("the cloud is gone");
        }
    }
}

impl World {
    fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    fn remove_vm(&mut self, id: VmId) -> bool {
        let Some(mut machine) = self.vms.remove(&id) else { return false };
        machine.stop_guest("the machine is gone");
        if let Some(tags) = machine.vm.tags {
            self.vms_by_request.remove(&(tags.owner.clone(), tags.request));
            self.vms_by_name.remove(&(tags.owner, tags.scope, machine.vm.name));
        }
        true
    }
}

fn fixed(what: &str) -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("open cyber range memory {what}").as_bytes())
}

fn gone(id: VmId) -> Error {
    Error::not_found("there is no such machine").on(format!("vm {id}"))
}

fn full(what: &str, most: usize) -> Error {
    Error::new(ErrorKind::Exhausted, format!("there are {most} {what} already, and no more are allowed"))
}

/// A MAC address of the range for local use, made of an id.
fn mac(id: &Uuid, index: usize) -> String {
    let bytes = id.as_bytes();
    format!("02:{:02x}:{:02x}:{:02x}:{:02x}:{index:02x}", bytes[0], bytes[1], bytes[2], bytes[3])
}

#[cfg(test)]
mod tests;
