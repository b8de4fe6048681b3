//! Machines: [`ComputeBackend`] over domains.
//!
//! The order of making is define, disk, start: from its first step on the machine is seen, by its metadata, so
//! whatever is half-made after a crash is found and finished by the same request, or deleted. Deleting goes the
//! other way round and undefines last. Both are one call to the [door](crate::door), which goes on to its end even
//! when its caller leaves.

use std::time::Duration;

use async_trait::async_trait;
use ocr_core::{
    ComputeBackend, ComputeCapabilities, Deletion, DiskFormat, Error, ErrorKind, Name, Nic, Owner, PowerAction, Result,
    Vm, VmFilter, VmId, VmSpec, VmState,
};
use tokio::time::Instant;
use virt::{
    connect::Connect,
    domain::{Domain, DomainState},
    storage_vol::StorageVol,
    sys,
};

use crate::{
    backend::{Libvirt, delete_volume, found, network_resource, pool, vm_resource},
    door::{Call, Effect, Lane, Trouble},
    error::{Failure, Meaning},
    image,
    xml::{
        domain::{self, Ours, PHASE_NAMESPACE, PHASE_PREFIX, Phase, Plan, Seen, planned_id},
        volume::{self, Role, Volume},
    },
};

/// How often a guest that was asked to shut down is asked again: one that still boots misses the first time.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// Less than this is not waited for a call that asks a guest.
const MIN_PATIENCE: Duration = Duration::from_secs(2);
/// The longest pause between two looks at a guest that shuts down.
const MAX_PAUSE: Duration = Duration::from_millis(250);

#[async_trait]
impl ComputeBackend for Libvirt {
    fn capabilities(&self) -> ComputeCapabilities {
        self.inner.capabilities
    }

    async fn create_vm(&self, spec: &VmSpec) -> Result<Vm> {
        spec.check(&self.inner.capabilities)?;
        let id = planned_id(&spec.tags.owner, &spec.tags.request);
        let config = &self.inner.config;
        let life = self.inner.machine(id).life(config.create_deadline).await?;
        let making = Making {
            spec: spec.clone(),
            id,
            digest: domain::spec_digest(spec)?,
            disk: volume::disk_name(&spec.tags.owner, id),
            this: self.clone(),
        };
        let call = Call {
            operation: "compute.create_vm",
            lane: Lane::Control,
            effect: Effect::Some,
            deadline: config.create_deadline,
        };
        let made = self.inner.door.call(call, move |connect| {
            let _life = &life;
            making.make(connect)
        });
        made.await.map_err(|trouble| trouble.into_error().during("compute.create_vm").on(format!("vm {}", spec.name)))
    }

    async fn get_vm(&self, id: VmId) -> Result<Vm> {
        let seen = self.inner.control("compute.get_vm", Effect::None, move |connect| {
            let Some(domain) = domain_of(connect, id)? else { return Ok(None) };
            look(&domain).map(Some)
        });
        let seen = seen.await.map_err(|error| error.on(vm_resource(id)))?;
        seen.ok_or_else(|| no_machine(id).during("compute.get_vm"))
    }

    /// Costs two calls to libvirt and one for each domain on the hypervisor (0.13 ms each on a local socket), all
    /// in one visit to the door.
    async fn list_vms(&self, filter: &VmFilter) -> Result<Vec<Vm>> {
        let filter = filter.clone();
        let list = move |connect: &Connect| {
            let paused = connect.list_all_domains(sys::VIR_CONNECT_LIST_DOMAINS_PAUSED)?;
            let paused: Vec<_> = paused.iter().filter_map(|domain| domain.uuid().ok()).collect();
            let mut vms = Vec::new();
            for domain in connect.list_all_domains(0)? {
                // Gone since the list was made.
                let Some(xml) = found(domain.xml_desc(0))? else { continue };
                let seen = match Seen::parse(&xml) {
                    Ok(seen) => seen,
                    Err(error) => {
                        tracing::warn!(domain = domain.name().unwrap_or_default(), %error, "a domain is left out");
                        continue;
                    }
                };
                let is_paused = paused.contains(seen.id.as_uuid());
                let vm = vm(seen, is_paused);
                if filter.matches(&vm) {
                    vms.push(vm);
                }
            }
            Ok(vms)
        };
        self.inner.control("compute.list_vms", Effect::None, list).await
    }

    async fn set_power(&self, id: VmId, action: PowerAction) -> Result<()> {
        let grace = match action {
            PowerAction::Start => Duration::ZERO,
            PowerAction::Stop { grace } | PowerAction::Reboot { grace } => grace.unwrap_or_default(),
        };
        let life = self.inner.machine(id).life(self.inner.config.call_deadline + grace).await?;
        let result = match action {
            PowerAction::Start => self.start(id).await,
            PowerAction::Stop { grace } => self.stop(id, grace).await,
            PowerAction::Reboot { grace } => self.reboot(id, grace).await,
        };
        drop(life);
        result.map_err(|error| error.during("compute.set_power").on(vm_resource(id)))
    }

    async fn delete_vm(&self, id: VmId) -> Result<Deletion> {
        let config = &self.inner.config;
        let life = self.inner.machine(id).life(config.create_deadline).await?;
        let call = Call {
            operation: "compute.delete_vm",
            lane: Lane::Control,
            effect: Effect::Some,
            deadline: config.create_deadline,
        };
        let pool = config.pool.clone();
        let deleted = self.inner.door.call(call, move |connect| {
            let _life = &life;
            match domain_of(connect, id)? {
                Some(domain) => {
                    owned(&domain)?;
                    delete(connect, &pool, &domain, id)
                }
                // The domain may have been undefined by hand.
                None => Ok(if delete_disks(connect, &pool, |_, vm| vm == id)?.is_empty() {
                    Deletion::AlreadyGone
                } else {
                    Deletion::Deleted
                }),
            }
        });
        deleted.await.map_err(|trouble| trouble.into_error().during("compute.delete_vm").on(vm_resource(id)))
    }
}

impl Libvirt {
    /// Deletes disks of this owner whose machine is gone: what is left when somebody undefined a domain by hand.
    /// (A create cut off at any point leaves a machine that [`ComputeBackend::list_vms`] shows, never a lone disk.)
    /// Returns the names of the deleted volumes.
    ///
    /// # Errors
    /// Those of any call to libvirt.
    pub async fn sweep_volumes(&self, owner: &Owner) -> Result<Vec<String>> {
        let (pool, mark) = (self.inner.config.pool.clone(), volume::owner_mark(owner));
        // A disk is made after its domain and deleted before it. So a disk without a domain, in this order of
        // looking, belongs to nobody.
        let sweep = move |connect: &Connect| delete_disks(connect, &pool, |owner, _| owner == mark);
        self.inner.control("libvirt.sweep_volumes", Effect::Some, sweep).await
    }

    async fn power<T, F>(&self, effect: Effect, id: VmId, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: Fn(&Domain) -> Result<T, Trouble> + Send + 'static,
    {
        self.power_within(self.inner.config.call_deadline, effect, id, work).await
    }

    async fn power_within<T, F>(&self, deadline: Duration, effect: Effect, id: VmId, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: Fn(&Domain) -> Result<T, Trouble> + Send + 'static,
    {
        let work = move |connect: &Connect| {
            let domain = domain_of(connect, id)?.ok_or_else(|| no_machine(id))?;
            owned(&domain)?;
            work(&domain)
        };
        let call = Call { operation: "compute.set_power", lane: Lane::Control, effect, deadline };
        self.inner.door.call(call, work).await.map_err(Trouble::into_error)
    }

    async fn start(&self, id: VmId) -> Result<()> {
        self.power(Effect::Some, id, |domain| match domain.info()?.state.known() {
            Some(DomainState::Paused | DomainState::PMSuspended) => Ok(domain.resume()?),
            Some(DomainState::Running | DomainState::Blocked) => Ok(()),
            _ => {
                switch_on(domain)?;
                mark(domain, Phase::Made)
            }
        })
        .await
    }

    async fn stop(&self, id: VmId, grace: Option<Duration>) -> Result<()> {
        if let Some(grace) = grace {
            let end = Instant::now() + grace;
            let mut asked: Option<Instant> = None;
            let mut pause = Duration::from_millis(20);
            loop {
                let ask = asked.is_none_or(|asked| asked.elapsed() >= ASK_AGAIN);
                // The machine may hang, and with it the call: that must not cost more than the grace.
                let patience = grace.clamp(MIN_PATIENCE, self.inner.config.call_deadline.max(MIN_PATIENCE));
                let is_off = self.power_within(patience, Effect::Some, id, move |domain| {
                    if !domain.is_active()? {
                        return Ok(true);
                    }
                    // A guest that cannot be asked (paused, no ACPI) is forced in the end.
                    if ask && let Err(error) = domain.shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN) {
                        tracing::debug!(vm = %id, error = error.message(), "the guest cannot be asked to shut down");
                    }
                    Ok(false)
                });
                match is_off.await {
                    Ok(true) => return Ok(()),
                    Ok(false) => {}
                    // A machine that hangs cannot be asked; its plug can be pulled all the same.
                    Err(error) if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Unavailable) => {
                        tracing::debug!(vm = %id, %error, "the machine does not listen");
                        break;
                    }
                    Err(error) => return Err(error),
                }
                if ask {
                    asked = Some(Instant::now());
                }
                if Instant::now() + pause > end {
                    break;
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 3 / 2).min(MAX_PAUSE);
            }
        }
        self.power(Effect::Some, id, switch_off).await
    }

    async fn reboot(&self, id: VmId, grace: Option<Duration>) -> Result<()> {
        let is_connected = self
            .power(Effect::Some, id, move |domain| {
                if !domain.is_active()? {
                    return Err(Error::new(ErrorKind::Conflict, "the machine is not running").into());
                }
                if grace.is_none() {
                    domain.reset()?;
                    return Ok(None);
                }
                let agent = Seen::parse(&domain.xml_desc(0)?)?.agent;
                // The machine stays on: libvirt turns the guest's power-off into a reset.
                domain.reboot(sys::VIR_DOMAIN_REBOOT_ACPI_POWER_BTN)?;
                Ok(Some(agent == Some(true)))
            })
            .await?;
        let (Some(is_connected), Some(grace)) = (is_connected, grace) else { return Ok(()) };
        // The agent lets go of its channel when its guest goes down. Where it does not hold it, nothing tells a
        // guest that rebooted from one that did not listen, and the grace is waited out.
        let end = Instant::now() + grace;
        let mut pause = Duration::from_millis(20);
        while Instant::now() + pause < end {
            tokio::time::sleep(pause).await;
            pause = (pause * 3 / 2).min(MAX_PAUSE);
            let agent = self.power(Effect::None, id, |domain| Ok(Seen::parse(&domain.xml_desc(0)?)?.agent)).await?;
            if is_connected && agent == Some(false) {
                return Ok(());
            }
        }
        self.power(Effect::Some, id, |domain| if domain.is_active()? { Ok(domain.reset()?) } else { switch_on(domain) })
            .await
    }
}

// --- on a thread of the door's ------------------------------------------------------------------------------

/// A machine to make.
struct Making {
    spec: VmSpec,
    id: VmId,
    digest: String,
    disk: String,
    this: Libvirt,
}

impl Making {
    fn make(&self, connect: &Connect) -> Result<Vm, Trouble> {
        let pool_name = &self.this.inner.config.pool;
        let mut defined = domain_of(connect, self.id)?;
        if let Some(domain) = &defined {
            let ours = owned(domain)?;
            if ours.phase == Phase::Deleting {
                delete(connect, pool_name, domain, self.id)?;
                defined = None;
            } else if ours.spec != self.digest {
                return Err(Error::new(
                    ErrorKind::AlreadyExists,
                    format!("request {} has already made another machine, {}", self.spec.tags.request, ours.name),
                )
                .into());
            } else if ours.phase == Phase::Made {
                return look(domain);
            }
        }
        let template = image::template(connect, &self.this.inner, self.spec.image)?
            .ok_or_else(|| Error::not_found(format!("there is no image {}", self.spec.image)))?;
        let domain = match defined {
            Some(domain) => domain,
            None => self.define(connect)?,
        };
        let made = self.fill(connect, &domain, &template);
        made.inspect_err(|trouble| self.undo(connect, &domain, trouble))?;
        look(&domain)
    }

    fn define(&self, connect: &Connect) -> Result<Domain, Trouble> {
        let mut networks = Vec::with_capacity(self.spec.links.len());
        for link in &self.spec.links {
            let network = found(connect.lookup_network_by_uuid(*link.as_uuid()))?
                .ok_or_else(|| Error::not_found(format!("there is no network {link}")).on(network_resource(*link)))?;
            networks.push(network.name()?);
        }
        let config = &self.this.inner.config;
        let plan = Plan {
            spec: &self.spec,
            id: self.id,
            kvm: self.this.inner.is_kvm,
            machine: config.machine,
            cpu: config.cpu,
            tcg_cache_mib: config.tcg_cache_mib,
            pool: &config.pool,
            volume: &self.disk,
            networks: &networks,
        };
        connect.define_domain_xml(&plan.xml()?).map_err(|error| {
            let failure = Failure::from(error);
            if failure.meaning() == Meaning::Exists {
                // The domain's name follows from owner, scope and name, its id from owner and request.
                let taken = format!("{} has a machine named {}", self.spec.tags.scope, self.spec.name);
                return Error::new(ErrorKind::AlreadyExists, taken).with_source(failure).into();
            }
            Trouble::Libvirt(failure)
        })
    }

    /// From defined to running.
    fn fill(&self, connect: &Connect, domain: &Domain, template: &volume::Seen) -> Result<(), Trouble> {
        let pool = pool(connect, &self.this.inner.config.pool)?;
        let format = template.format.unwrap_or(DiskFormat::Raw);
        let disk = Volume {
            name: &self.disk,
            capacity_bytes: template.capacity_bytes,
            format: DiskFormat::Qcow2,
            backing: Some((&template.path, format)),
        };
        match StorageVol::create_xml(&pool, &disk.xml()?, 0).map_err(Failure::from) {
            Ok(_) => {}
            // Left by an earlier attempt that was cut off. It has never run, so its disk may be made anew; and must
            // be, because nobody knows how far it came.
            Err(failure) if failure.meaning() == Meaning::Exists => {
                if !domain.is_active()? {
                    if let Some(stale) = found(pool.lookup_storage_vol_by_name(&self.disk))? {
                        delete_volume(&stale)?;
                    }
                    StorageVol::create_xml(&pool, &disk.xml()?, 0)?;
                }
            }
            Err(failure) => return Err(Trouble::Libvirt(failure)),
        }
        switch_on(domain)?;
        mark(domain, Phase::Made)
    }

    /// Takes back what was made. What cannot be taken back stays visible by its metadata.
    fn undo(&self, connect: &Connect, domain: &Domain, why: &Trouble) {
        if let Err(trouble) = delete(connect, &self.this.inner.config.pool, domain, self.id) {
            tracing::warn!(vm = %self.id, ?why, ?trouble, "a failed create could not be undone; the machine stays listed");
        }
    }
}

/// The domain, or `None`.
pub(crate) fn domain_of(connect: &Connect, id: VmId) -> Result<Option<Domain>, Trouble> {
    found(connect.lookup_domain_by_uuid(*id.as_uuid()))
}

fn no_machine(id: VmId) -> Error {
    Error::not_found("there is no such machine").on(vm_resource(id))
}

/// What we keep in a domain; `Denied` when it is not ours.
fn owned(domain: &Domain) -> Result<Ours, Trouble> {
    let seen = Seen::parse(&domain.xml_desc(0)?)?;
    seen.ours.ok_or_else(|| {
        Error::new(ErrorKind::Denied, "this software did not make the machine, so it does not change it").into()
    })
}

fn look(domain: &Domain) -> Result<Vm, Trouble> {
    let seen = Seen::parse(&domain.xml_desc(0)?)?;
    let is_paused =
        seen.is_active && matches!(domain.info()?.state.known(), Some(DomainState::Paused | DomainState::PMSuspended));
    Ok(vm(seen, is_paused))
}

fn vm(seen: Seen, is_paused: bool) -> Vm {
    let phase = seen.ours.as_ref().map(|ours| ours.phase);
    let state = match (seen.is_active, phase) {
        (_, Some(Phase::Deleting)) => VmState::Deleting,
        (true, _) if is_paused => VmState::Paused,
        (true, _) => VmState::Running,
        (false, Some(Phase::Making)) => VmState::Building,
        (false, _) => VmState::Stopped,
    };
    let links = seen.ours.as_ref().map(|ours| ours.links.clone()).unwrap_or_default();
    let nics = seen.nics.into_iter().enumerate();
    let nics = nics.map(|(index, (mac, _))| Nic { network: links.get(index).copied(), mac, addresses: Vec::new() });
    Vm {
        id: seen.id,
        state,
        cpus: seen.cpus,
        ram_bytes: seen.ram_bytes,
        nics: nics.collect(),
        has_agent_channel: seen.agent.is_some(),
        image: seen.ours.as_ref().map(|ours| ours.image),
        name: match &seen.ours {
            Some(ours) => ours.name.clone(),
            None => readable(&seen.domain_name),
        },
        tags: seen.ours.map(|ours| ours.tags),
    }
}

/// Somebody else's name for a domain, with what a [`Name`] cannot hold replaced.
fn readable(text: &str) -> Name {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':' | '@' | '+');
    let mapped: String = text.chars().map(|c| if fine(c) { c } else { '_' }).take(Name::MAX_BYTES - 1).collect();
    Name::new(mapped.as_str()).or_else(|_| Name::new(format!("_{mapped}"))).unwrap_or_else(|_| unreachable!("{mapped}"))
}

/// Starts a domain; fine when it runs already.
fn switch_on(domain: &Domain) -> Result<(), Trouble> {
    match domain.create() {
        Ok(()) => Ok(()),
        Err(error) => {
            // The thread's last error is overwritten by the next call.
            let failure = Failure::from(error);
            if failure.meaning() == Meaning::WrongState && domain.is_active()? {
                return Ok(());
            }
            Err(Trouble::Libvirt(failure))
        }
    }
}

/// Pulls the plug; fine when it is off already.
fn switch_off(domain: &Domain) -> Result<(), Trouble> {
    match domain.destroy() {
        Ok(()) => Ok(()),
        Err(error) => {
            let failure = Failure::from(error);
            match failure.meaning() {
                Meaning::NoDomain => Ok(()),
                Meaning::WrongState if !domain.is_active()? => Ok(()),
                _ => Err(Trouble::Libvirt(failure)),
            }
        }
    }
}

/// Writes how far a machine is into its metadata.
fn mark(domain: &Domain, phase: Phase) -> Result<(), Trouble> {
    let live = if domain.is_active()? { sys::VIR_DOMAIN_AFFECT_LIVE } else { 0 };
    domain.set_metadata(
        sys::VIR_DOMAIN_METADATA_ELEMENT as i32,
        Some(phase.element()),
        Some(PHASE_PREFIX),
        Some(PHASE_NAMESPACE),
        live | sys::VIR_DOMAIN_AFFECT_CONFIG,
    )?;
    Ok(())
}

/// Switches off, deletes the disk, forgets the domain; each step is fine when it was done before.
fn delete(connect: &Connect, pool_name: &str, domain: &Domain, id: VmId) -> Result<Deletion, Trouble> {
    let gone = |trouble: Trouble| match &trouble {
        Trouble::Libvirt(failure) if failure.meaning() == Meaning::NoDomain => Ok(()),
        _ => Err(trouble),
    };
    // Another one, at the same time, may be quicker at every step.
    match mark(domain, Phase::Deleting).or_else(gone) {
        // A machine that hangs may let nobody write to it. The mark is only for those who look.
        Err(Trouble::Libvirt(failure)) if failure.meaning() == Meaning::Busy => {}
        marked => marked?,
    }
    switch_off(domain).or_else(gone)?;
    let seen = match found(domain.xml_desc(0))? {
        Some(xml) => Seen::parse(&xml)?,
        None => return Ok(Deletion::Deleted),
    };
    if let Some(ours) = seen.ours {
        let name = volume::disk_name(&ours.tags.owner, id);
        if let Some(disk) = found(pool(connect, pool_name)?.lookup_storage_vol_by_name(&name))? {
            delete_volume(&disk)?;
        }
    }
    let flags = sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        | sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        | sys::VIR_DOMAIN_UNDEFINE_NVRAM;
    found(domain.undefine_flags(flags))?;
    Ok(Deletion::Deleted)
}

/// Deletes disks that have no domain; `wanted` is given a disk's owner mark and machine.
fn delete_disks<F>(connect: &Connect, pool_name: &str, wanted: F) -> Result<Vec<String>, Trouble>
where
    F: Fn(&str, VmId) -> bool,
{
    let mut deleted = Vec::new();
    for disk in pool(connect, pool_name)?.list_all_volumes(0)? {
        let name = disk.name()?;
        let Role::Disk { owner, vm } = Role::of(&name) else { continue };
        if wanted(&owner, vm) && domain_of(connect, vm)?.is_none() && delete_volume(&disk)?.is_some() {
            deleted.push(name);
        }
    }
    Ok(deleted)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_foreign_name_becomes_a_name(text in any::<String>()) {
            let _ = readable(&text);
        }
    }

    #[test]
    fn a_plain_foreign_name_stays() {
        assert_eq!(readable("web-0").as_str(), "web-0");
        assert_eq!(readable("-x").as_str(), "_-x");
        assert_eq!(readable("").as_str(), "_");
    }
}
