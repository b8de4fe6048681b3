//! [`Deployer`]: what servers and other programs call.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use tokio_util::task::TaskTracker;

use super::{
    journal::{Entry, Journal, Phase, VmRecord, same_machine},
    plan::Workshop,
    wait::Waiter,
};
use crate::{
    ComputeBackend, ComputeBackendExt, Deletion, Error, ErrorKind, GuestExec, ImageBackend, ImageBackendExt,
    ImageState, Key, Name, NetworkBackend, NetworkBackendExt, Owner, RequestId, Result, Scope, StateStore, Tags, Vm,
    VmFilter, VmId, VmSpec,
};

/// How often a create looks at a record that somebody else's work is about to change.
const ATTACH_PAUSE: Duration = Duration::from_millis(200);

/// Creates and deletes machines by journalled plans. Cloning is cheap; all clones are one deployer.
#[derive(Clone)]
pub struct Deployer {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) parts: DeployParts,
    pub(super) config: DeployConfig,
    pub(super) workshop: Workshop,
    /// Creates and deletes under way in this process, by record. They are owned by `tasks`, not by the callers.
    busy: Mutex<HashMap<Key, (JobId, Job)>>,
    next_job: AtomicU64,
    tasks: TaskTracker,
}

type JobId = u64;
type Outcome<T> = Shared<BoxFuture<'static, Result<T>>>;

/// Work under way on a record.
#[derive(Clone)]
enum Job {
    /// Gives `None` when the record was there before, so that nothing was begun.
    Create {
        spec: Arc<VmSpec>,
        outcome: Outcome<Option<Vm>>,
    },
    Delete {
        outcome: Outcome<Deletion>,
    },
}

/// What a [`Deployer`] works with.
#[derive(Clone, Debug)]
pub struct DeployParts {
    /// Makes machines.
    pub compute: Arc<dyn ComputeBackend>,
    /// Finds networks for links.
    pub network: Arc<dyn NetworkBackend>,
    /// Finds templates.
    pub image: Arc<dyn ImageBackend>,
    /// Tells when a guest is ready; none means machines are ready when they run.
    pub guest: Option<Arc<dyn GuestExec>>,
    /// Keeps the journal.
    pub store: Arc<dyn StateStore>,
}

/// A deployer's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeployConfig {
    /// The tag on everything this installation makes.
    pub owner: Owner,
    /// How long a machine may take from accepted to ready (HYPERVISOR_WAIT_TIMEOUT).
    pub ready_deadline: Duration,
    /// The longest pause between two looks (HYPERVISOR_WAIT_INTERVAL).
    pub ready_interval: Duration,
    /// How many creates may be under way at once; more are refused with `Exhausted`.
    pub max_creates: usize,
}

impl DeployConfig {
    /// The usual settings: 300 s, 5 s, 256 creates.
    pub fn new(owner: Owner) -> Self {
        Self {
            owner,
            ready_deadline: Duration::from_secs(300),
            ready_interval: Duration::from_secs(5),
            max_creates: 256,
        }
    }
}

/// A machine to create, in a user's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateRequest {
    /// Exercise and deployment.
    pub scope: Scope,
    /// The machine's name.
    pub name: Name,
    /// Virtual cpus.
    pub cpus: u32,
    /// Memory in bytes.
    pub ram_bytes: u64,
    /// A template's id or name.
    pub template: String,
    /// Networks' ids or names, one NIC for each.
    pub links: Vec<String>,
    /// Further metadata.
    pub labels: BTreeMap<String, String>,
}

impl Deployer {
    /// Makes a deployer. Call [`Deployer::reconcile`] before serving: an earlier process may have been killed.
    pub fn new(parts: DeployParts, config: DeployConfig) -> Self {
        let workshop = Workshop {
            compute: parts.compute.clone(),
            guest: parts.guest.clone(),
            journal: Journal::new(parts.store.clone()),
            waiter: Waiter::new(parts.compute.clone(), &config.owner, config.ready_interval),
            owner: config.owner.clone(),
            ready_deadline: config.ready_deadline,
            ready_interval: config.ready_interval,
        };
        let inner = Inner {
            parts,
            config,
            workshop,
            busy: Mutex::default(),
            next_job: AtomicU64::new(0),
            tasks: TaskTracker::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Creates a machine and waits until it runs and, where it has an agent channel, its agent answers.
    ///
    /// The work goes on when the caller goes away; it is finished, or undone, and recorded. A repeat of the same
    /// request joins it, or returns the machine that it made.
    ///
    /// # Errors
    /// - `Invalid` or `NotFound` naming the field, before any effect.
    /// - `AlreadyExists` when the name is taken by a machine of another shape in the same exercise and deployment.
    /// - `Exhausted` when too many creates are under way.
    /// - `TimedOut` with what was seen last; then, as after any error of the backend, the create has been undone.
    pub async fn create(&self, request: CreateRequest) -> Result<Vm> {
        let spec = self.resolve(request).await?;
        let key = Journal::key(&spec.tags, &spec.name)?;
        let end = tokio::time::Instant::now() + self.inner.config.ready_deadline;
        let journal = &self.inner.workshop.journal;
        loop {
            match self.join_or_begin(&key, &spec)? {
                Job::Create { spec: other, .. } if !same_machine(&other, &spec) => return Err(name_taken(&other)),
                Job::Create { outcome, .. } => {
                    if let Some(vm) = outcome.await? {
                        return Ok(vm);
                    }
                }
                Job::Delete { outcome } => {
                    // The name is about to be free; a delete that fails is told to whoever asked for it.
                    let _ = outcome.await;
                }
            }
            let Some(entry) = journal.read(&key).await? else { continue };
            if !same_machine(&entry.record.spec, &spec) {
                return Err(name_taken(&entry.record.spec));
            }
            match (&entry.record.phase, entry.record.id) {
                (Phase::Ready, Some(id)) => match self.inner.parts.compute.find_vm(id).await? {
                    Some(vm) => return Ok(vm),
                    // Somebody deleted it behind our back. The record is of no use to anyone.
                    None => journal.close(&entry).await?,
                },
                // Another process is at work on it, or was killed there and reconcile will see to it.
                (phase, _) if tokio::time::Instant::now() >= end => {
                    return Err(Error::new(
                        ErrorKind::Conflict,
                        format!("an earlier request for this machine is unfinished ({phase}); reconcile ends it"),
                    )
                    .with_retry(crate::Retry::Safe)
                    .during("lifecycle.create")
                    .on(key.as_str()));
                }
                _ => tokio::time::sleep(ATTACH_PAUSE).await,
            }
        }
    }

    /// Deletes a machine of ours and waits until it is gone. What is gone already is `AlreadyGone`.
    ///
    /// # Errors
    /// `Denied` for a machine that this owner did not make.
    pub async fn delete(&self, id: VmId) -> Result<Deletion> {
        let Some(vm) = self.inner.parts.compute.find_vm(id).await? else {
            // Whatever record it may have had is closed by who deletes it, by the next create or by reconcile.
            return Ok(Deletion::AlreadyGone);
        };
        let Some(tags) = vm.tags.clone().filter(|tags| tags.owner == self.inner.config.owner) else {
            return Err(Error::new(ErrorKind::Denied, "this machine was not made here and is not touched")
                .during("lifecycle.delete")
                .on(format!("vm {id}")));
        };
        let entry = match self.inner.workshop.journal.find(&tags, &vm.name).await? {
            Some(entry) => entry,
            None => self.adopt(vm, tags).await?,
        };
        let outcome = self.start_delete(entry);
        outcome.await
    }

    /// Our machines, as the backend sees them.
    ///
    /// # Errors
    /// Those of the backend.
    pub async fn list(&self, scope: Option<&Scope>) -> Result<Vec<Vm>> {
        let filter = VmFilter { scope: scope.cloned(), ..VmFilter::owned_by(&self.inner.config.owner) };
        let mut machines = self.inner.parts.compute.list_vms(&filter).await?;
        machines.sort_by(|a, b| (scope_of(a), &a.name).cmp(&(scope_of(b), &b.name)));
        Ok(machines)
    }

    /// One machine of ours.
    ///
    /// # Errors
    /// `NotFound`, also for a machine of somebody else's.
    pub async fn get(&self, id: VmId) -> Result<Vm> {
        match self.inner.parts.compute.find_vm(id).await? {
            Some(vm) if vm.is_owned_by(&self.inner.config.owner) => Ok(vm),
            _ => Err(Error::not_found("there is no such machine of ours").on(format!("vm {id}"))),
        }
    }

    /// The journal's records, for operators.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn records(&self) -> Result<Vec<VmRecord>> {
        let entries = self.inner.workshop.journal.all(self.inner.config.owner.as_str()).await?;
        Ok(entries.into_iter().map(|entry| entry.record).collect())
    }

    /// Waits until all work under way has ended, but not longer than `grace`. What is cut off is left to
    /// [`Deployer::reconcile`]. Returns whether everything ended.
    pub async fn shutdown(&self, grace: Duration) -> bool {
        self.inner.tasks.close();
        tokio::time::timeout(grace, self.inner.tasks.wait()).await.is_ok()
    }

    /// Turns a user's words into a spec; nothing has an effect yet.
    async fn resolve(&self, request: CreateRequest) -> Result<VmSpec> {
        let parts = &self.inner.parts;
        let mut spec = VmSpec {
            tags: Tags { owner: self.inner.config.owner.clone(), request: RequestId::random(), scope: request.scope },
            name: request.name,
            cpus: request.cpus,
            ram_bytes: request.ram_bytes,
            image: crate::ImageId::from_uuid(uuid::Uuid::nil()),
            links: Vec::new(),
            labels: request.labels,
        };
        spec.check(&parts.compute.capabilities())?;
        if request.links.len() > VmSpec::MAX_LINKS {
            return Err(Error::invalid(
                "links",
                format_args!("at most {} networks for one machine", VmSpec::MAX_LINKS),
            ));
        }
        let image = parts.image.resolve_image(&request.template).await?;
        match image.state {
            ImageState::Active => spec.image = image.id,
            ImageState::Queued => {
                return Err(Error::unavailable(format!("templateId: template {} is not ready yet", image.name)));
            }
            ImageState::Failed(why) => {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    format!("templateId: template {} can never be used: {why}", image.name),
                ));
            }
        }
        for link in &request.links {
            spec.links.push(parts.network.resolve_network(link).await?.id);
        }
        spec.check(&parts.compute.capabilities())?;
        Ok(spec)
    }

    /// The work under way on the record, which is a create of this spec when there was none.
    fn join_or_begin(&self, key: &Key, spec: &VmSpec) -> Result<Job> {
        let mut busy = self.busy();
        if let Some((_, job)) = busy.get(key) {
            return Ok(job.clone());
        }
        if busy.len() >= self.inner.config.max_creates {
            return Err(Error::new(
                ErrorKind::Exhausted,
                format!("{} machines are being created or deleted; try again later", busy.len()),
            )
            .with_retry(crate::Retry::Safe)
            .during("lifecycle.create"));
        }
        let (inner, record_key, record) = (self.inner.clone(), key.clone(), VmRecord::intent(spec.clone()));
        let (id, outcome) = self.spawn(key, async move {
            match inner.workshop.journal.begin(&record_key, record).await? {
                Some(entry) => inner.workshop.make(entry).await.map(Some),
                None => Ok(None),
            }
        });
        let job = Job::Create { spec: Arc::new(spec.clone()), outcome };
        busy.insert(key.clone(), (id, job.clone()));
        Ok(job)
    }

    /// Begins to delete a record's machine, or joins who does.
    pub(super) fn start_delete(&self, mut entry: Entry) -> Outcome<Deletion> {
        let key = entry.key.clone();
        let mut busy = self.busy();
        if let Some((_, Job::Delete { outcome })) = busy.get(&key) {
            return outcome.clone();
        }
        let inner = self.inner.clone();
        let (id, outcome) = self.spawn(&key, async move { inner.workshop.leave(&mut entry, "it was deleted").await });
        // A create under way loses its place here: it notices that its record has moved, and cleans up after itself.
        busy.insert(key, (id, Job::Delete { outcome: outcome.clone() }));
        outcome
    }

    /// Runs work as a task of this deployer's, which outlives whoever asked for it. Call it with `busy` locked, so
    /// that the task cannot end before it stands in the table.
    fn spawn<T>(&self, key: &Key, work: impl Future<Output = Result<T>> + Send + 'static) -> (JobId, Outcome<T>)
    where
        T: Clone + Send + Sync + 'static,
    {
        let id = self.inner.next_job.fetch_add(1, Ordering::Relaxed);
        let place = Place { inner: Arc::downgrade(&self.inner), key: key.clone(), id };
        let task = self.inner.tasks.spawn(async move {
            let _place = place;
            work.await
        });
        let outcome = async move {
            task.await.unwrap_or_else(|error| Err(Error::internal("a task ended early").with_source(error)))
        };
        (id, outcome.boxed().shared())
    }

    /// A machine with our tag and without a record gets one, so that its deletion is journalled too.
    async fn adopt(&self, vm: Vm, tags: Tags) -> Result<Entry> {
        let spec = VmSpec {
            tags,
            name: vm.name,
            cpus: vm.cpus,
            ram_bytes: vm.ram_bytes,
            image: vm.image.unwrap_or(crate::ImageId::from_uuid(uuid::Uuid::nil())),
            links: vm.nics.iter().filter_map(|nic| nic.network).collect(),
            labels: BTreeMap::new(),
        };
        // Beside the name's own record, which may belong to a later machine.
        let key = Key::of("vm", &[spec.tags.owner.as_str(), "adopted", &vm.id.to_string()])?;
        let mut record = VmRecord::intent(spec);
        record.id = Some(vm.id);
        match self.inner.workshop.journal.begin(&key, record).await? {
            Some(entry) => Ok(entry),
            None => self.inner.workshop.journal.read(&key).await?.ok_or_else(|| {
                Error::new(ErrorKind::Conflict, "somebody else deletes this machine").with_retry(crate::Retry::Safe)
            }),
        }
    }

    pub(super) fn is_busy(&self, key: &Key) -> bool {
        self.busy().contains_key(key)
    }

    fn busy(&self) -> MutexGuard<'_, HashMap<Key, (JobId, Job)>> {
        self.inner.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A job's place in the table; it is given up when the task ends, also by a panic.
struct Place {
    inner: Weak<Inner>,
    key: Key,
    id: JobId,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.upgrade() {
            let mut busy = inner.busy.lock().unwrap_or_else(PoisonError::into_inner);
            if busy.get(&self.key).is_some_and(|(id, _)| *id == self.id) {
                busy.remove(&self.key);
            }
        }
    }
}

fn name_taken(spec: &VmSpec) -> Error {
    Error::new(
        ErrorKind::AlreadyExists,
        format!(
            "name: {} of {} is taken by a machine of another shape ({} cpu, {} bytes of memory, template {}); \
             delete it first or choose another name",
            spec.name, spec.tags.scope, spec.cpus, spec.ram_bytes, spec.image
        ),
    )
    .during("lifecycle.create")
}

fn scope_of(vm: &Vm) -> Option<&Scope> {
    vm.tags.as_ref().map(|tags| &tags.scope)
}

impl fmt::Debug for Deployer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deployer")
            .field("config", &self.inner.config)
            .field("busy", &self.busy().len())
            .finish_non_exhaustive()
    }
}
