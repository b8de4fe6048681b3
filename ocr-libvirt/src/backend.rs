//! [`Libvirt`]: what all four traits share.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ocr_core::{ComputeCapabilities, Error, NetworkId, Owner, RequestId, Result, VmId};
use tokio::{
    sync::OwnedMutexGuard,
    time::{Instant, timeout_at},
};
use uuid::Uuid;
use virt::{connect::Connect, storage_pool::StoragePool, storage_vol::StorageVol};

use crate::{
    config::{Config, DomainType},
    door::{Call, Door, Effect, Lane, Load, Trouble},
    guest::{AgentGuest, AgentGuestConfig, Link},
    probe,
    xml::{domain, volume},
};

/// The machines remembered at least; beyond that, those that nobody works on are forgotten.
const REMEMBERED_MACHINES: usize = 4096;
/// The longest single pause before a volume in use is tried again; all of them together are twice that.
const VOLUME_PATIENCE: Duration = Duration::from_secs(2);
/// The most virtual cpus where libvirt does not say.
const USUAL_MAX_CPUS: u32 = 16;

/// A libvirt: machines, networks, images and the insides of guests. Clones are the same libvirt.
///
/// Dropping the last clone closes the connections. Machines go on.
#[derive(Clone, Debug)]
pub struct Libvirt {
    pub(crate) inner: Arc<Inner>,
    pub(crate) guest: Arc<AgentGuest<Link>>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) config: Config,
    pub(crate) door: Door,
    pub(crate) is_kvm: bool,
    pub(crate) pool: Uuid,
    pub(crate) capabilities: ComputeCapabilities,
    machines: Mutex<HashMap<VmId, Arc<Machine>>>,
}

/// What is remembered of a machine while this process works on it.
#[derive(Debug, Default)]
pub(crate) struct Machine {
    /// Held by whoever makes, powers or deletes it.
    life: Arc<tokio::sync::Mutex<()>>,
    /// Held by the one agent command that may be under way. More at once only make each other slower, and libvirt
    /// lets them wait where no deadline of ours reaches.
    agent: Arc<tokio::sync::Mutex<()>>,
    /// Whether the agent was silent last time.
    is_suspect: AtomicBool,
}

impl Libvirt {
    /// Connects, looks at the pool, and settles how machines are run.
    ///
    /// # Errors
    /// `Invalid` for settings that make no sense, `Unavailable` or `Denied` when libvirt cannot be reached,
    /// `NotFound` without the pool, `Unsupported` for a pool that cannot hold disk files.
    pub async fn open(config: Config) -> Result<Self> {
        config.check()?;
        let door = Door::new(&config);
        let call = Call {
            operation: "libvirt.open",
            lane: Lane::Control,
            effect: Effect::None,
            deadline: config.call_deadline,
        };
        let pool = config.pool.clone();
        let facts = door.call(call, move |connect| Facts::read(connect, &pool)).await;
        let facts = facts.map_err(|trouble| trouble.into_error().during("libvirt.open").on(config.uri.clone()))?;
        let is_kvm = match config.domain_type {
            DomainType::Kvm => true,
            DomainType::Qemu => false,
            DomainType::Auto => probe::kvm_runs(&door, &config).await?,
        };
        let guest_config = AgentGuestConfig {
            base: config.guest_folder.clone(),
            margin: config.exec_margin,
            ..AgentGuestConfig::default()
        };
        let inner = Arc::new(Inner {
            config,
            door,
            is_kvm,
            pool: facts.pool,
            capabilities: ComputeCapabilities {
                max_cpus: facts.max_cpus,
                max_ram_bytes: facts.max_ram_bytes,
                power: true,
                nics: true,
            },
            machines: Mutex::default(),
        });
        let guest = Arc::new(AgentGuest::with_config(Link(inner.clone()), guest_config)?);
        Ok(Self { inner, guest })
    }

    /// How machines are run: what was set, or what [`DomainType::Auto`] came to.
    pub fn domain_type(&self) -> DomainType {
        if self.inner.is_kvm { DomainType::Kvm } else { DomainType::Qemu }
    }

    /// How busy libvirt is with us.
    pub fn load(&self) -> Load {
        self.inner.door.load()
    }

    /// The id that the machine of this request has, or would have.
    pub fn planned_id(owner: &Owner, request: &RequestId) -> VmId {
        domain::planned_id(owner, request)
    }
}

impl Inner {
    /// A control call with the usual deadline.
    pub(crate) async fn control<T, F>(&self, operation: &'static str, effect: Effect, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: Fn(&Connect) -> Result<T, Trouble> + Send + 'static,
    {
        let call = Call { operation, lane: Lane::Control, effect, deadline: self.config.call_deadline };
        self.door.call(call, work).await.map_err(|trouble| trouble.into_error().during(operation))
    }

    /// What is remembered of a machine.
    pub(crate) fn machine(&self, id: VmId) -> Arc<Machine> {
        let mut machines = self.machines.lock().unwrap_or_else(PoisonError::into_inner);
        if machines.len() >= REMEMBERED_MACHINES && !machines.contains_key(&id) {
            machines.retain(|_, machine| {
                Arc::strong_count(machine) > 1
                    || Arc::strong_count(&machine.life) > 1
                    || Arc::strong_count(&machine.agent) > 1
            });
        }
        machines.entry(id).or_default().clone()
    }
}

impl Machine {
    /// The right to make, power or delete the machine, before `deadline`.
    pub(crate) async fn life(&self, deadline: Duration) -> Result<OwnedMutexGuard<()>> {
        timeout_at(Instant::now() + deadline, self.life.clone().lock_owned())
            .await
            .map_err(|_| Error::unavailable("another call works on the machine"))
    }

    /// The right to send its agent a command, before `end`.
    pub(crate) async fn agent(&self, end: Instant) -> Result<OwnedMutexGuard<()>> {
        timeout_at(end, self.agent.clone().lock_owned()).await.map_err(|_| {
            Error::unavailable("the guest agent is busy with another command")
                .with_reason(ocr_core::error::reason::AGENT_NOT_READY)
        })
    }

    pub(crate) fn is_suspect(&self) -> bool {
        self.is_suspect.load(Ordering::Relaxed)
    }

    pub(crate) fn set_suspect(&self, is_suspect: bool) {
        self.is_suspect.store(is_suspect, Ordering::Relaxed);
    }
}

/// What is asked once, at the beginning.
struct Facts {
    pool: Uuid,
    max_cpus: u32,
    max_ram_bytes: u64,
}

impl Facts {
    fn read(connect: &Connect, pool: &str) -> Result<Self, Trouble> {
        let found = volume::Pool::parse(&self::pool(connect, pool)?.xml_desc(0)?)?;
        if !matches!(found.kind.as_str(), "dir" | "fs" | "netfs") {
            return Err(Error::unsupported(format!(
                "storage pool {pool} is of kind {}; disks are files, so it must be one of dir, fs, netfs",
                found.kind
            ))
            .into());
        }
        let uuid =
            Uuid::try_parse(&found.uuid).map_err(|error| Error::internal("the pool has no UUID").with_source(error))?;
        // Both kinds allow about the same; a driver that does not tell gets a usual value.
        let max_cpus = connect.max_vcpus(Some("qemu")).or_else(|_| connect.max_vcpus(None)).unwrap_or(USUAL_MAX_CPUS);
        let max_ram_bytes = connect.node_info()?.memory.saturating_mul(1024);
        Ok(Self { pool: uuid, max_cpus: max_cpus.max(1), max_ram_bytes })
    }
}

/// The pool by its name.
pub(crate) fn pool(connect: &Connect, name: &str) -> Result<StoragePool, Trouble> {
    Ok(connect.lookup_storage_pool_by_name(name)?)
}

/// `None` when libvirt says that there is no such thing.
pub(crate) fn found<T>(result: Result<T, virt::error::Error>) -> Result<Option<T>, Trouble> {
    use crate::error::{Failure, Meaning};
    match result {
        Ok(thing) => Ok(Some(thing)),
        Err(error) => {
            let failure = Failure::from(error);
            match failure.meaning() {
                Meaning::NoDomain | Meaning::NoNetwork | Meaning::NoPool | Meaning::NoVolume => Ok(None),
                _ => Err(Trouble::Libvirt(failure)),
            }
        }
    }
}

/// Repeats what libvirt refuses while it has its hands on a volume: for a moment after an upload, and while somebody
/// else reads it.
pub(crate) fn patiently<T>(mut call: impl FnMut() -> Result<T, Trouble>) -> Result<T, Trouble> {
    let mut pause = Duration::from_millis(10);
    loop {
        match call() {
            Err(Trouble::Libvirt(failure))
                if failure.meaning() == crate::error::Meaning::WrongState && pause < VOLUME_PATIENCE =>
            {
                std::thread::sleep(pause);
                pause *= 2;
            }
            result => return result,
        }
    }
}

/// Deletes a volume; `None` when it was gone.
pub(crate) fn delete_volume(volume: &StorageVol) -> Result<Option<()>, Trouble> {
    patiently(|| found(volume.delete(0)))
}

/// The resource names of errors.
pub(crate) fn vm_resource(id: VmId) -> String {
    format!("vm {id}")
}

/// The resource names of errors.
pub(crate) fn network_resource(id: NetworkId) -> String {
    format!("network {id}")
}
