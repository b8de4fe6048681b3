//! [`Libvirt`]: one hypervisor, behind all the traits.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use ocr_core::{
    ComputeCapabilities, Deletion, Error, ExecOutput, ExecRequest, GuestCapabilities, GuestExec, GuestInfo, Owner,
    PutFile, Result, VmId,
};
use virt::{connect::Connect, storage_pool::StoragePool};

use crate::{
    config::{Config, DomainType},
    domain::{VolumeView, machine_of_disk},
    door::{Door, Raw},
    error::{Fault, NO_VOLUME},
    guest::{AgentGuest, AgentLink},
    probe,
};

/// One hypervisor. Cloning is cheap; all clones share their connections.
#[derive(Clone)]
pub struct Libvirt {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) door: Arc<Door>,
    pub(crate) config: Config,
    /// Never `Auto`.
    pub(crate) domain_type: DomainType,
    pub(crate) capabilities: ComputeCapabilities,
    pub(crate) guest: AgentGuest<DoorLink>,
    /// The pool's own id; images' ids are made of it.
    pub(crate) pool_id: String,
    turns: Mutex<HashMap<VmId, Arc<tokio::sync::Mutex<()>>>>,
}

impl Libvirt {
    /// Connects, looks what the hypervisor can do and, for [`DomainType::Auto`], tries it.
    ///
    /// # Errors
    /// `Invalid` for settings that cannot be, `Unavailable` when libvirt cannot be reached, `Denied` when it refuses
    /// us, `NotFound` when the storage pool is not there or not active.
    pub async fn open(config: Config) -> Result<Self> {
        config.check()?;
        let door = Arc::new(Door::new(&config));
        let pool = config.pool.clone();
        let (pool_id, cpus, ram_kib) = door
            .call("libvirt.open", move |connect| {
                let pool = connect.lookup_storage_pool_by_name(&pool)?;
                let id = pool.uuid_string()?;
                // A pool that is not active fails here, and says so.
                pool.refresh(0).or_else(|error| if pool.is_active()? { Ok(()) } else { Err(error) })?;
                let node = connect.node_info()?;
                Ok((id, node.cpus, node.memory))
            })
            .await
            .map_err(|error| error.on(format!("{}, storage pool {}", config.uri, config.pool)))?;
        let domain_type = match config.domain_type {
            DomainType::Auto => probe::find_out(&door, &config).await,
            chosen => chosen,
        };
        tracing::info!(uri = %config.uri, %domain_type, "connected to libvirt");
        let capabilities = ComputeCapabilities {
            // More than the host has is slow but possible; far more is a mistake.
            max_cpus: (cpus * 4).max(16),
            max_ram_bytes: ram_kib << 10,
            power: true,
            nics: true,
        };
        let guest = AgentGuest::new(DoorLink { door: door.clone() });
        let inner = Inner { door, config, domain_type, capabilities, guest, pool_id, turns: Mutex::default() };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// How machines are virtualised here: what was set or, for `auto`, what was found out.
    pub fn domain_type(&self) -> DomainType {
        self.inner.domain_type
    }

    /// The names of disks in the pool that belong to machines of this owner, or to machines that are not there.
    ///
    /// # Errors
    /// Those of reading the pool.
    pub async fn disks_of(&self, owner: &Owner) -> Result<Vec<String>> {
        use ocr_core::{ComputeBackend, VmFilter};

        let machines: HashMap<_, _> =
            self.list_vms(&VmFilter::default()).await?.into_iter().map(|vm| (vm.id, vm)).collect();
        let volumes = self.volumes("libvirt.disks_of").await?;
        let theirs = |volume: &VolumeView| {
            machine_of_disk(&volume.name).is_some_and(|id| machines.get(&id).is_none_or(|vm| vm.is_owned_by(owner)))
        };
        Ok(volumes.into_iter().filter(theirs).map(|volume| volume.name).collect())
    }

    /// All volumes of the pool.
    pub(crate) async fn volumes(&self, operation: &'static str) -> Result<Vec<VolumeView>> {
        let pool = self.inner.config.pool.clone();
        let documents = self
            .inner
            .door
            .call(operation, move |connect| {
                let mut documents = Vec::new();
                for volume in connect.lookup_storage_pool_by_name(&pool)?.list_all_volumes(0)? {
                    // One that has just been deleted is no fault.
                    if let Some(document) = if_there(volume.xml_desc(0), NO_VOLUME)? {
                        documents.push(document);
                    }
                }
                Ok(documents)
            })
            .await?;
        documents.iter().map(|document| VolumeView::read(document)).collect()
    }

    /// A turn at changing one machine: two creates, or a create and a delete, of the same one wait for each other.
    pub(crate) async fn turn(&self, id: VmId) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut turns = self.inner.turns.lock().unwrap_or_else(PoisonError::into_inner);
            // Those that nobody holds are of no more use.
            turns.retain(|_, lock| Arc::strong_count(lock) > 1);
            turns.entry(id).or_default().clone()
        };
        lock.lock_owned().await
    }
}

impl fmt::Debug for Libvirt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Libvirt")
            .field("uri", &self.inner.config.uri)
            .field("pool", &self.inner.config.pool)
            .field("domain_type", &self.inner.domain_type)
            .finish_non_exhaustive()
    }
}

/// The pool, looked up anew each time: it may have been restarted.
pub(crate) fn pool_of(connect: &Connect, name: &str) -> Raw<StoragePool> {
    connect.lookup_storage_pool_by_name(name)
}

/// `None` where libvirt says that the thing is not there.
pub(crate) fn if_there<T>(outcome: Raw<T>, absent: i64) -> Raw<Option<T>> {
    match outcome {
        Ok(found) => Ok(Some(found)),
        Err(error) if Fault::from(error.clone()).code == absent => Ok(None),
        Err(error) => Err(error),
    }
}

/// Fine where libvirt says that it need not be done.
pub(crate) fn unless<T: Default>(outcome: Raw<T>, fine: &[i64]) -> Raw<T> {
    match outcome {
        Err(error) if fine.contains(&Fault::from(error.clone()).code) => Ok(T::default()),
        outcome => outcome,
    }
}

/// The agent's commands, through the door.
#[derive(Debug)]
pub(crate) struct DoorLink {
    door: Arc<Door>,
}

#[async_trait]
impl AgentLink for DoorLink {
    async fn command(&self, vm: VmId, command: &str, limit: Duration) -> Result<String> {
        if command.contains('\0') {
            return Err(Error::invalid("command", "must not contain a NUL byte"));
        }
        self.door.agent(vm, command.to_owned(), limit).await
    }
}

/// The guest's side is the agent's; it knows no libvirt.
#[async_trait]
impl GuestExec for Libvirt {
    fn capabilities(&self) -> GuestCapabilities {
        self.inner.guest.capabilities()
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        self.inner.guest.guest_info(vm).await
    }

    async fn put_file(&self, vm: VmId, file: &PutFile) -> Result<()> {
        self.inner.guest.put_file(vm, file).await
    }

    async fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        self.inner.guest.get_file(vm, path, limit_bytes).await
    }

    async fn remove_file(&self, vm: VmId, path: &str) -> Result<Deletion> {
        self.inner.guest.remove_file(vm, path).await
    }

    async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        self.inner.guest.exec(vm, request).await
    }
}
