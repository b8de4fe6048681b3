//! [`ComputeBackend`] in memory.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::time::Instant;

use super::{
    AgentMode, Due, Inner, MemoryCloud, Step, World, full, gone,
    guest::{Operations, Power},
    mac,
    tree::Tree,
};
use crate::{
    Access, ComputeBackend, ComputeCapabilities, Deletion, Error, ErrorKind, FencingToken, Nic, OsFamily, PowerAction,
    Result, Vm, VmFilter, VmId, VmSpec, VmState,
};

pub(super) struct Machine {
    pub(super) vm: Vm,
    /// What it was made by; `None` for machines of somebody else.
    pub(super) spec: Option<VmSpec>,
    pub(super) next: Option<(Due, Next)>,
    pub(super) agent: AgentMode,
    /// Whether the guest has booted far enough for its agent.
    pub(super) agent_up: bool,
    pub(super) boots: u64,
    pub(super) files: Arc<Tree>,
    /// The guest's users in the order of their numbers, root first.
    pub(super) users: Vec<String>,
    pub(super) operations: Operations,
    pub(super) commands: u64,
    /// The newest token seen; it is on the guest's disk.
    pub(super) fence: Option<FencingToken>,
    /// What was last said by `set_access`.
    pub(super) access: Access,
}

/// The next thing that a machine turns into by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Running,
    AgentUp,
    Gone,
}

impl Machine {
    /// Ends everything in the guest.
    pub(super) fn stop_guest(&mut self, why: &'static str) {
        self.agent_up = false;
        self.operations.lose_all(why);
    }
}

impl Inner {
    /// Completes the next thing that waits on a machine. The machine must have one.
    pub(super) fn advance(&self, world: &mut World, id: VmId) -> Step {
        let serial = world.next_serial();
        let Some(machine) = world.vms.get_mut(&id) else { return Step::Gone(id) };
        match machine.next.take() {
            Some((due, Next::Running)) => {
                machine.vm.state = VmState::Running;
                let from = match due {
                    Due::At(when) => when,
                    Due::Step(_) => Instant::now(),
                };
                self.boot_guest(machine, serial, from);
                Step::Running(id)
            }
            Some((_, Next::AgentUp)) => {
                machine.agent_up = true;
                Step::AgentReady(id)
            }
            Some((_, Next::Gone)) | None => {
                world.remove_vm(id);
                Step::Gone(id)
            }
        }
    }

    pub(super) fn boot_guest(&self, machine: &mut Machine, serial: u64, from: Instant) {
        machine.stop_guest("the guest was restarted");
        machine.boots += 1;
        machine.next = Some((self.due(serial, from, self.options.agent_time), Next::AgentUp));
    }

    pub(super) fn power_guest(&self, world: &mut World, id: VmId, power: Power) {
        let serial = world.next_serial();
        let Some(machine) = world.vms.get_mut(&id).filter(|machine| machine.vm.state == VmState::Running) else {
            return;
        };
        match power {
            Power::Reboot => self.boot_guest(machine, serial, Instant::now()),
            Power::Off => {
                machine.vm.state = VmState::Stopped;
                machine.next = None;
                machine.stop_guest("the guest was switched off");
            }
        }
    }

    fn create_vm(&self, spec: &VmSpec) -> Result<Vm> {
        spec.check(&self.compute_capabilities())?;
        let mut world = self.world();
        let request = (spec.tags.owner.clone(), spec.tags.request.clone());
        let name = (spec.tags.owner.clone(), spec.tags.scope.clone(), spec.name.clone());
        let taken = [world.vms_by_request.get(&request).copied(), world.vms_by_name.get(&name).copied()];
        // What was deleted is gone on time, not when somebody looks.
        taken.into_iter().flatten().for_each(|id| self.settle(&mut world, id));
        if let Some(machine) = world.vms_by_request.get(&request).and_then(|id| world.vms.get(id)) {
            return match machine.spec.as_ref() == Some(spec) {
                true => Ok(machine.vm.clone()),
                false => Err(Error::new(
                    ErrorKind::AlreadyExists,
                    format!("the request {} already made another machine", spec.tags.request),
                )
                .on(format!("vm {}", machine.vm.id))),
            };
        }
        if let Some(id) = world.vms_by_name.get(&name) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("another request already made a machine named {}", spec.name),
            )
            .on(format!("vm {id}")));
        }
        let image = world
            .images
            .get(&spec.image)
            .ok_or_else(|| Error::not_found(format!("image: there is no image {}", spec.image)))?;
        let (files, users) = (image.files(&self.options), super::image::users(&image.seen.users));
        let agent = match image.agent && self.options.agent && image.seen.os_family != Some(OsFamily::Windows) {
            true => AgentMode::Answers,
            false => AgentMode::Absent,
        };
        if let Some(missing) = spec.links.iter().find(|id| !world.networks.contains_key(id)) {
            return Err(Error::not_found(format!("links: there is no network {missing}")));
        }
        if world.vms.len() >= self.options.max_vms {
            return Err(full("machines", self.options.max_vms));
        }
        let id = VmId::from_uuid(self.id(&mut world, "vm"));
        let mut nics = Vec::new();
        for (index, link) in spec.links.iter().enumerate() {
            let addresses = world.networks.get_mut(link).and_then(super::network::StoredNetwork::next_address);
            nics.push(Nic {
                network: Some(*link),
                mac: Some(mac(id.as_uuid(), index)),
                addresses: addresses.into_iter().collect(),
            });
        }
        let vm = Vm {
            id,
            name: spec.name.clone(),
            tags: Some(spec.tags.clone()),
            state: VmState::Building,
            cpus: spec.cpus,
            ram_bytes: spec.ram_bytes,
            image: Some(spec.image),
            nics,
            has_agent_channel: agent != AgentMode::Absent,
        };
        let serial = world.next_serial();
        let machine = Machine {
            vm: vm.clone(),
            spec: Some(spec.clone()),
            next: Some((self.due(serial, Instant::now(), self.options.boot_time), Next::Running)),
            agent,
            agent_up: false,
            boots: 0,
            files,
            users,
            operations: Operations::default(),
            commands: 0,
            fence: None,
            access: Access::Open,
        };
        world.vms.insert(id, machine);
        world.vms_by_request.insert(request, id);
        world.vms_by_name.insert(name, id);
        Ok(vm)
    }

    fn set_power(&self, id: VmId, action: PowerAction) -> Result<()> {
        if !self.options.power {
            return Err(Error::unsupported("this backend cannot switch machines on and off"));
        }
        let mut world = self.world();
        self.settle(&mut world, id);
        let serial = world.next_serial();
        let machine = world.vms.get_mut(&id).ok_or_else(|| gone(id))?;
        let conflict = |machine: &Machine| {
            Err(Error::new(ErrorKind::Conflict, format!("the machine is {}", machine.vm.state)).on(format!("vm {id}")))
        };
        match (action, &machine.vm.state) {
            (_, VmState::Deleting | VmState::Failed(_)) => conflict(machine),
            (PowerAction::Start, VmState::Building | VmState::Running) => Ok(()),
            (PowerAction::Start, VmState::Paused) => {
                machine.vm.state = VmState::Running;
                Ok(())
            }
            (PowerAction::Start, VmState::Stopped) => {
                machine.vm.state = VmState::Building;
                machine.next = Some((self.due(serial, Instant::now(), self.options.boot_time), Next::Running));
                Ok(())
            }
            (PowerAction::Stop { .. }, VmState::Stopped) => Ok(()),
            (PowerAction::Stop { .. }, _) => {
                machine.vm.state = VmState::Stopped;
                machine.next = None;
                machine.stop_guest("the machine was switched off");
                Ok(())
            }
            (PowerAction::Reboot { .. }, VmState::Running) => {
                self.boot_guest(machine, serial, Instant::now());
                Ok(())
            }
            (PowerAction::Reboot { .. }, _) => conflict(machine),
        }
    }

    fn delete_vm(&self, id: VmId) -> Result<Deletion> {
        let mut world = self.world();
        self.settle(&mut world, id);
        let serial = world.next_serial();
        let Some(machine) = world.vms.get_mut(&id) else { return Ok(Deletion::AlreadyGone) };
        if machine.vm.state != VmState::Deleting {
            machine.vm.state = VmState::Deleting;
            machine.stop_guest("the machine is being deleted");
            machine.next = Some((self.due(serial, Instant::now(), self.options.delete_time), Next::Gone));
        }
        Ok(Deletion::Deleted)
    }

    fn compute_capabilities(&self) -> ComputeCapabilities {
        ComputeCapabilities {
            max_cpus: self.options.max_cpus,
            max_ram_bytes: self.options.max_ram_bytes,
            power: self.options.power,
            nics: self.options.nics,
        }
    }
}

#[async_trait]
impl ComputeBackend for MemoryCloud {
    fn capabilities(&self) -> ComputeCapabilities {
        self.inner.compute_capabilities()
    }

    async fn create_vm(&self, spec: &VmSpec) -> Result<Vm> {
        self.inner.faults.around("compute.create_vm", async { self.inner.create_vm(spec) }).await
    }

    async fn get_vm(&self, id: VmId) -> Result<Vm> {
        let effect = async { self.read_vm(id, |machine| machine.vm.clone()).ok_or_else(|| gone(id)) };
        self.inner.faults.around("compute.get_vm", effect).await
    }

    async fn list_vms(&self, filter: &VmFilter) -> Result<Vec<Vm>> {
        let effect = async {
            let mut world = self.world();
            self.inner.settle_all(&mut world);
            Ok(world.vms.values().map(|machine| &machine.vm).filter(|vm| filter.matches(vm)).cloned().collect())
        };
        self.inner.faults.around("compute.list_vms", effect).await
    }

    async fn set_power(&self, id: VmId, action: PowerAction) -> Result<()> {
        self.inner.faults.around("compute.set_power", async { self.inner.set_power(id, action) }).await
    }

    async fn delete_vm(&self, id: VmId) -> Result<Deletion> {
        self.inner.faults.around("compute.delete_vm", async { self.inner.delete_vm(id) }).await
    }
}
