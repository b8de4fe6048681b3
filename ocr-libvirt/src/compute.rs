//! [`ComputeBackend`] for libvirt: domains, and their disks.

use std::time::Duration;

use async_trait::async_trait;
use ocr_core::{
    ComputeBackend, ComputeCapabilities, Deletion, Error, ErrorKind, Nic, PowerAction, Result, Vm, VmFilter, VmId,
    VmSpec, VmState,
};
use virt::{
    connect::Connect,
    domain::{Domain, DomainState},
    network::Network,
    sys,
};

use crate::{
    domain::{Definition, View, disk_name, id_of, machine_of_disk, overlay_xml},
    door::Raw,
    error::{NO_DOMAIN, NO_VOLUME, OPERATION_INVALID, VOLUME_EXISTS},
    image::image_id,
    link::{Libvirt, if_there, pool_of, unless},
};

/// The longest pause between two looks while a guest shuts down.
const MAX_PAUSE: Duration = Duration::from_millis(500);

#[async_trait]
impl ComputeBackend for Libvirt {
    fn capabilities(&self) -> ComputeCapabilities {
        self.inner.capabilities
    }

    async fn create_vm(&self, spec: &VmSpec) -> Result<Vm> {
        spec.check(&self.inner.capabilities)?;
        let id = id_of(&spec.tags);
        let _turn = self.turn(id).await;
        if let Some(found) = self.look(id).await? {
            match found.view.ours.as_ref().and_then(|ours| ours.spec.as_ref()) {
                Some(earlier) if earlier == spec => {}
                _ => {
                    return Err(Error::new(
                        ErrorKind::AlreadyExists,
                        "the request was used for a machine of another shape",
                    )
                    .during("compute.create_vm")
                    .on(format!("vm {id}")));
                }
            }
            // Made before, or half made by a process that was killed: the steps below find what is there.
        }
        let template = self.template(spec).await?;
        let networks = self.network_names(spec).await?;
        let definition = Definition {
            id,
            spec,
            domain_type: self.inner.domain_type,
            machine: self.inner.config.machine,
            tcg_cache_mib: self.inner.config.tcg_cache_mib,
            pool: &self.inner.config.pool,
            networks: &networks,
        };
        let xml = definition.to_xml()?;
        let disk = overlay_xml(&disk_name(id), template.capacity_bytes, &template.path, &template.format)?;
        let pool = self.inner.config.pool.clone();
        let made = self
            .inner
            .door
            .call("compute.create_vm", move |connect| {
                let domain = match if_there(connect.lookup_domain_by_uuid(*id.as_uuid()), NO_DOMAIN)? {
                    Some(domain) => domain,
                    None => connect.define_domain_xml(&xml)?,
                };
                unless(pool_of(connect, &pool)?.create_xml_volume(&disk), &[VOLUME_EXISTS])?;
                unless(domain.create().map(drop), &[OPERATION_INVALID])
            })
            .await;
        if let Err(error) = made {
            // A name that is taken has made nothing, and what has the name is not ours to remove. Where it is not known
            // what was done, a repeat or a delete will see.
            let untouched = error.kind() == ErrorKind::AlreadyExists;
            if !untouched
                && error.retry() == ocr_core::Retry::Never
                && let Err(left) = self.unmake(id).await
            {
                tracing::warn!(vm = %id, error = %left, "a machine that could not be made could not be removed either");
            }
            return Err(error.on(format!("vm {}", spec.name)));
        }
        match self.look(id).await? {
            Some(found) => self.vm(found),
            None => Err(Error::new(ErrorKind::Conflict, "the machine was deleted while it was made")
                .during("compute.create_vm")
                .on(format!("vm {id}"))),
        }
    }

    async fn get_vm(&self, id: VmId) -> Result<Vm> {
        match self.look(id).await? {
            Some(found) => self.vm(found),
            None => Err(no_machine(id).during("compute.get_vm")),
        }
    }

    /// Costs two calls a domain (its XML and its state) in one trip to the blocking thread, about 0.3 ms each.
    async fn list_vms(&self, filter: &VmFilter) -> Result<Vec<Vm>> {
        let found = self
            .inner
            .door
            .call("compute.list_vms", |connect| {
                let mut found = Vec::new();
                for domain in connect.list_all_domains(0)? {
                    // One that has just gone is no fault.
                    found.extend(if_there(Seen::read(&domain, false), NO_DOMAIN)?);
                }
                Ok(found)
            })
            .await?;
        let mut machines = Vec::new();
        for seen in found {
            let vm = self.vm(seen.parsed()?)?;
            if filter.matches(&vm) {
                machines.push(vm);
            }
        }
        Ok(machines)
    }

    async fn set_power(&self, id: VmId, action: PowerAction) -> Result<()> {
        let domain = move |connect: &Connect| connect.lookup_domain_by_uuid(*id.as_uuid());
        let power = |operation, call: fn(&Domain) -> Raw<()>| async move {
            self.inner.door.call(operation, move |connect| call(&domain(connect)?)).await
        };
        let outcome = match action {
            PowerAction::Start => {
                power("compute.start", |domain| {
                    if domain.is_active()? { Ok(()) } else { unless(domain.create().map(drop), &[OPERATION_INVALID]) }
                })
                .await
            }
            PowerAction::Stop { grace } => {
                if let Some(grace) = grace
                    && self.shut_down_within(id, grace).await?
                {
                    return Ok(());
                }
                power("compute.stop", destroy).await
            }
            // Whether a guest has rebooted by itself cannot be seen from here, so its agent is asked, which answers
            // whether it began; a guest that cannot be asked is reset.
            PowerAction::Reboot { grace: Some(grace) } => {
                let asked = self
                    .inner
                    .door
                    .call_within("compute.reboot", grace.max(Duration::from_secs(1)), move |connect| {
                        domain(connect)?.reboot(sys::VIR_DOMAIN_REBOOT_GUEST_AGENT)
                    })
                    .await;
                match asked {
                    Ok(Ok(())) => Ok(()),
                    _ => power("compute.reset", reset).await,
                }
            }
            PowerAction::Reboot { grace: None } => power("compute.reset", reset).await,
        };
        outcome.map_err(|error| error.on(format!("vm {id}")))
    }

    async fn delete_vm(&self, id: VmId) -> Result<Deletion> {
        let _turn = self.turn(id).await;
        if let Some(found) = self.look(id).await?
            && found.view.ours.is_none()
        {
            return Err(Error::new(ErrorKind::Denied, "this machine was not made here and is not touched")
                .during("compute.delete_vm")
                .on(format!("vm {id}")));
        }
        self.unmake(id).await
    }
}

/// What one look at a domain gave, as text.
struct Seen {
    xml: String,
    state: VmState,
    /// MAC and address, as libvirt's DHCP server gave them.
    leases: Vec<(String, String)>,
}

/// What one look at a domain gave.
pub(crate) struct Found {
    pub(crate) view: View,
    state: VmState,
    leases: Vec<(String, String)>,
}

impl Seen {
    fn read(domain: &Domain, with_leases: bool) -> Raw<Self> {
        let (state, _) = domain.state()?;
        let state = match state.known() {
            // Going down too: it is there until it is off.
            Some(DomainState::Running | DomainState::Blocked | DomainState::Shutdown) => VmState::Running,
            Some(DomainState::Paused | DomainState::PMSuspended) => VmState::Paused,
            Some(DomainState::Crashed) => VmState::Failed("the domain crashed".to_owned()),
            _ => VmState::Stopped,
        };
        let xml = domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?;
        let mut leases = Vec::new();
        if with_leases && state == VmState::Running {
            // Not every network has a DHCP server of libvirt's; then there is nothing to tell.
            for interface in domain.interface_addresses(sys::VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE, 0).unwrap_or_default() {
                let mac = interface.hwaddr.unwrap_or_default().to_lowercase();
                leases.extend(interface.addrs.into_iter().map(|address| (mac.clone(), address.addr)));
            }
        }
        Ok(Self { xml, state, leases })
    }

    fn parsed(self) -> Result<Found> {
        Ok(Found { view: View::read(&self.xml)?, state: self.state, leases: self.leases })
    }
}

struct Template {
    path: String,
    format: String,
    capacity_bytes: u64,
}

impl Libvirt {
    pub(crate) async fn look(&self, id: VmId) -> Result<Option<Found>> {
        let seen = self
            .inner
            .door
            .call("compute.get_vm", move |connect| {
                match if_there(connect.lookup_domain_by_uuid(*id.as_uuid()), NO_DOMAIN)? {
                    None => Ok(None),
                    Some(domain) => if_there(Seen::read(&domain, true), NO_DOMAIN),
                }
            })
            .await?;
        seen.map(Seen::parsed).transpose()
    }

    fn vm(&self, found: Found) -> Result<Vm> {
        let Found { view, state, leases } = found;
        let links = view.links();
        let nics = view
            .nics
            .iter()
            .enumerate()
            .map(|(at, (_, mac))| Nic {
                network: links.get(at).copied(),
                mac: mac.clone(),
                addresses: leases
                    .iter()
                    .filter(|(owner, _)| Some(owner) == mac.as_ref())
                    .filter_map(|(_, address)| address.parse().ok())
                    .collect(),
            })
            .collect();
        Ok(Vm {
            id: view.id,
            name: view.name()?,
            image: view.image(),
            state,
            cpus: view.cpus,
            ram_bytes: view.ram_bytes,
            nics,
            has_agent_channel: view.has_agent_channel,
            tags: view.ours.map(|ours| ours.tags),
        })
    }

    async fn template(&self, spec: &VmSpec) -> Result<Template> {
        let wanted = spec.image;
        let volumes = self.volumes("compute.create_vm").await?;
        volumes
            .into_iter()
            .find(|volume| {
                machine_of_disk(&volume.name).is_none() && image_id(&self.inner.pool_id, &volume.name) == wanted
            })
            .map(|volume| Template {
                path: volume.path,
                format: volume.format,
                capacity_bytes: volume.capacity_bytes,
            })
            .ok_or_else(|| Error::not_found(format!("there is no template {wanted}")).during("compute.create_vm"))
    }

    /// libvirt's names of the networks to link to.
    async fn network_names(&self, spec: &VmSpec) -> Result<Vec<String>> {
        let links = spec.links.clone();
        let names = self
            .inner
            .door
            .call("compute.create_vm", move |connect| {
                let find = |link: &ocr_core::NetworkId| -> Raw<Option<String>> {
                    let found = if_there(connect.lookup_network_by_uuid(*link.as_uuid()), 43)?;
                    found.as_ref().map(Network::name).transpose()
                };
                links.iter().map(|link| Ok((*link, find(link)?))).collect::<Raw<Vec<_>>>()
            })
            .await?;
        names
            .into_iter()
            .map(|(link, name)| {
                name.ok_or_else(|| Error::not_found(format!("there is no network {link}")).during("compute.create_vm"))
            })
            .collect()
    }

    /// Stops, deletes the disk, undefines: the domain goes last, so that what is left is always seen.
    async fn unmake(&self, id: VmId) -> Result<Deletion> {
        let pool = self.inner.config.pool.clone();
        let gone = self
            .inner
            .door
            .call("compute.delete_vm", move |connect| {
                let domain = if_there(connect.lookup_domain_by_uuid(*id.as_uuid()), NO_DOMAIN)?;
                if let Some(domain) = &domain {
                    unless(destroy(domain), &[NO_DOMAIN])?;
                }
                // Without a domain too: its disk has no other owner.
                let disk = if_there(pool_of(connect, &pool)?.lookup_storage_vol_by_name(&disk_name(id)), NO_VOLUME)?;
                if let Some(disk) = &disk {
                    unless(disk.delete(0), &[NO_VOLUME])?;
                }
                if let Some(domain) = &domain {
                    let flags = sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                        | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                        | sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
                        | sys::VIR_DOMAIN_UNDEFINE_NVRAM;
                    unless(domain.undefine_flags(flags), &[NO_DOMAIN])?;
                }
                Ok(domain.is_some() || disk.is_some())
            })
            .await
            .map_err(|error| error.on(format!("vm {id}")))?;
        Ok(if gone { Deletion::Deleted } else { Deletion::AlreadyGone })
    }

    /// Asks the guest to shut down; whether it did within the grace.
    async fn shut_down_within(&self, id: VmId, grace: Duration) -> Result<bool> {
        let end = tokio::time::Instant::now() + grace;
        self.inner
            .door
            .call("compute.stop", move |connect| {
                let domain = connect.lookup_domain_by_uuid(*id.as_uuid())?;
                // A guest that cannot be asked is told to by force when the grace is over.
                if domain.is_active()? { domain.shutdown().map(drop).or(Ok(())) } else { Ok(()) }
            })
            .await
            .map_err(|error| error.on(format!("vm {id}")))?;
        let mut pause = Duration::from_millis(50);
        loop {
            match self.look(id).await? {
                None => return Err(no_machine(id).during("compute.stop")),
                Some(found) if found.state == VmState::Stopped => return Ok(true),
                Some(_) if tokio::time::Instant::now() + pause > end => return Ok(false),
                Some(_) => tokio::time::sleep(pause).await,
            }
            pause = (pause * 3 / 2).min(MAX_PAUSE);
        }
    }
}

fn destroy(domain: &Domain) -> Raw<()> {
    unless(domain.destroy().map(drop), &[OPERATION_INVALID])
}

fn reset(domain: &Domain) -> Raw<()> {
    domain.reset().map(drop)
}

fn no_machine(id: VmId) -> Error {
    Error::not_found("there is no such machine").on(format!("vm {id}"))
}

/// Making volumes, where the wrapper has it on the volume.
trait CreateVolume {
    fn create_xml_volume(&self, xml: &str) -> Raw<()>;
}

impl CreateVolume for virt::storage_pool::StoragePool {
    fn create_xml_volume(&self, xml: &str) -> Raw<()> {
        virt::storage_vol::StorageVol::create_xml(self, xml, 0).map(drop)
    }
}
