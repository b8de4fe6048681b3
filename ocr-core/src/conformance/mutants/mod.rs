//! Backends that break one rule each: the suite's own test.
//!
//! A case that no broken backend fails would prove nothing. Each [`Mutant`] wraps the backend in memory, changes what one
//! or two methods do, and names exactly the cases that must fail; all others must pass.

mod compute;
mod guest;
mod image;
mod network;
mod signal;
mod state;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;

use super::{Subject, Trait};
use crate::{
    Access, ComputeBackend, ComputeCapabilities, Deletion, Error, ErrorKind, ExecOutput, ExecRequest,
    GuestCapabilities, GuestExec, GuestInfo, Image, ImageBackend, ImageCapabilities, ImageFilter, ImageId, ImageSpec,
    Key, Name, Network, NetworkBackend, NetworkCapabilities, NetworkFilter, NetworkId, NetworkSpec, PowerAction,
    Precondition, PutFiles, RemoveFiles, Result, StateStore, Tags, Version, Versioned, Vm, VmFilter, VmId, VmSpec,
    memory::{MemoryCloud, MemoryOptions, MemoryState},
    signal::{LocalSignals, NoticeStream, Signals},
};

/// A backend that breaks one rule.
pub struct Mutant {
    /// What it does wrong.
    pub name: &'static str,
    /// The trait whose rule it breaks.
    pub subject: Trait,
    /// The cases that must fail, and no others.
    pub must_fail: &'static [&'static str],
    /// Whether it lacks all capabilities.
    less: bool,
    hooks: Hooks,
}

impl fmt::Debug for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mutant").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Mutant {
    /// A fresh one, as a subject of the suite.
    pub fn subject(&self) -> Subject {
        let step = Duration::from_secs(1);
        let options =
            MemoryOptions { boot_time: step, agent_time: step, delete_time: step, ..MemoryOptions::default() };
        let options = if self.less { super::with_less(options) } else { options };
        let (cloud, state) = (MemoryCloud::with(options), MemoryState::new());
        let plain = Subject::memory(&cloud, &state);
        let bent =
            Arc::new(Bent { world: World(Arc::new(Things { cloud, state, ..Things::default() })), hooks: self.hooks });
        Subject {
            compute: Some(bent.clone()),
            network: Some(bent.clone()),
            image: Some(bent.clone()),
            guest: Some(bent.clone()),
            state: Some(bent.clone()),
            signals: Some(bent),
            ..plain
        }
    }
}

/// All mutants.
pub fn all() -> impl Iterator<Item = &'static Mutant> {
    [compute::MUTANTS, network::MUTANTS, image::MUTANTS, guest::MUTANTS, state::MUTANTS, signal::MUTANTS]
        .into_iter()
        .flatten()
}

type Answer<T> = BoxFuture<'static, Result<T>>;
type Hook<I, O> = Option<fn(World, I) -> Answer<O>>;

macro_rules! hooks {
    ($($method:ident: $input:ty => $output:ty;)*) => {
        /// What is done instead of a method, each with its arguments.
        #[derive(Clone, Copy)]
        struct Hooks {
            $($method: Hook<$input, $output>,)*
        }

        const NONE: Hooks = Hooks { $($method: None,)* };
    };
}

hooks! {
    create_vm: VmSpec => Vm;
    get_vm: VmId => Vm;
    list_vms: VmFilter => Vec<Vm>;
    set_power: (VmId, PowerAction) => ();
    delete_vm: VmId => Deletion;
    create_network: NetworkSpec => Network;
    get_network: NetworkId => Network;
    list_networks: NetworkFilter => Vec<Network>;
    delete_network: NetworkId => Deletion;
    set_access: (VmId, Access) => ();
    import_image: ImageSpec => Image;
    find_images: ImageFilter => Vec<Image>;
    get_image: ImageId => Image;
    delete_image: ImageId => Deletion;
    capture_vm: (VmId, Name, Tags) => Image;
    export_image: (ImageId, PathBuf) => u64;
    guest_info: VmId => GuestInfo;
    put_files: (VmId, PutFiles) => ();
    get_file: (VmId, String, u64) => Bytes;
    remove_files: (VmId, RemoveFiles) => Vec<Result<Deletion>>;
    exec: (VmId, ExecRequest) => ExecOutput;
    get: Key => Option<Versioned>;
    put: (Key, Bytes, Precondition, Option<Duration>) => Version;
    delete: (Key, Precondition) => Deletion;
    list: (String, Option<Key>, usize) => Vec<(Key, Versioned)>;
    send: (Key, Bytes) => ();
    listen: Key => NoticeStream;
}

/// A table of mutants. After `less`, the mutant lacks all capabilities.
macro_rules! mutants {
    ($subject:ident $($name:literal $(($less:ident))? fails [$($case:ident)*] {
        $($method:ident: |$world:pat_param, $input:pat_param| $body:expr),* $(,)?
    })*) => {
        pub(super) static MUTANTS: &[$crate::conformance::mutants::Mutant] = &[$(
            $crate::conformance::mutants::Mutant {
                name: $name,
                subject: $crate::conformance::Trait::$subject,
                must_fail: &[$(stringify!($case)),*],
                less: mutants!(@less $($less)?),
                hooks: $crate::conformance::mutants::Hooks {
                    $($method: Some(|$world, $input| Box::pin(async move { $body })),)*
                    ..$crate::conformance::mutants::NONE
                },
            },
        )*];
    };
    (@less) => { false };
    (@less less) => { true };
}
use mutants;

/// What hooks work with.
#[derive(Clone, Debug)]
struct World(Arc<Things>);

#[derive(Debug, Default)]
struct Things {
    cloud: MemoryCloud,
    state: MemoryState,
    signals: LocalSignals,
    seen: Mutex<HashMap<String, u64>>,
    vms: Mutex<Vec<Vm>>,
    specs: Mutex<Vec<VmSpec>>,
    networks: Mutex<Vec<Network>>,
    versions: Mutex<BTreeMap<Key, u64>>,
    notices: Mutex<HashMap<Key, Bytes>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    fn cloud(&self) -> &MemoryCloud {
        &self.0.cloud
    }

    fn state(&self) -> &MemoryState {
        &self.0.state
    }

    fn signals(&self) -> &LocalSignals {
        &self.0.signals
    }

    /// How often this was asked for the same key, this time included.
    fn times(&self, key: impl fmt::Display) -> u64 {
        let mut seen = lock(&self.0.seen);
        let count = seen.entry(key.to_string()).or_default();
        *count += 1;
        *count
    }
}

/// Another error kind in place of the right one.
fn swap<T>(result: Result<T>, right: ErrorKind, wrong: ErrorKind) -> Result<T> {
    result.map_err(|error| match error.kind() == right {
        true => Error::new(wrong, error.message()),
        false => error,
    })
}

/// Ids in memory are of version 5; the suite's own inventions are random.
fn invented(id: &uuid::Uuid) -> bool {
    id.get_version_num() == 4
}

fn renamed(name: &Name) -> Name {
    Name::new(format!("{name}x")).unwrap_or_else(|_| name.clone())
}

/// The backend in memory with some methods replaced.
#[derive(Clone)]
struct Bent {
    world: World,
    hooks: Hooks,
}

impl fmt::Debug for Bent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bent").field("world", &self.world).finish_non_exhaustive()
    }
}

macro_rules! bent {
    ($self:ident, $method:ident, $input:expr, $plain:expr) => {
        match $self.hooks.$method {
            Some(hook) => hook($self.world.clone(), $input).await,
            None => $plain.await,
        }
    };
}

#[async_trait]
impl ComputeBackend for Bent {
    fn capabilities(&self) -> ComputeCapabilities {
        ComputeBackend::capabilities(self.world.cloud())
    }

    async fn create_vm(&self, spec: &VmSpec) -> Result<Vm> {
        bent!(self, create_vm, spec.clone(), self.world.cloud().create_vm(spec))
    }

    async fn get_vm(&self, id: VmId) -> Result<Vm> {
        bent!(self, get_vm, id, self.world.cloud().get_vm(id))
    }

    async fn list_vms(&self, filter: &VmFilter) -> Result<Vec<Vm>> {
        bent!(self, list_vms, filter.clone(), self.world.cloud().list_vms(filter))
    }

    async fn set_power(&self, id: VmId, action: PowerAction) -> Result<()> {
        bent!(self, set_power, (id, action), self.world.cloud().set_power(id, action))
    }

    async fn delete_vm(&self, id: VmId) -> Result<Deletion> {
        bent!(self, delete_vm, id, self.world.cloud().delete_vm(id))
    }
}

#[async_trait]
impl NetworkBackend for Bent {
    fn capabilities(&self) -> NetworkCapabilities {
        NetworkBackend::capabilities(self.world.cloud())
    }

    async fn create_network(&self, spec: &NetworkSpec) -> Result<Network> {
        bent!(self, create_network, spec.clone(), self.world.cloud().create_network(spec))
    }

    async fn get_network(&self, id: NetworkId) -> Result<Network> {
        bent!(self, get_network, id, self.world.cloud().get_network(id))
    }

    async fn list_networks(&self, filter: &NetworkFilter) -> Result<Vec<Network>> {
        bent!(self, list_networks, filter.clone(), self.world.cloud().list_networks(filter))
    }

    async fn delete_network(&self, id: NetworkId) -> Result<Deletion> {
        bent!(self, delete_network, id, self.world.cloud().delete_network(id))
    }

    async fn set_access(&self, vm: VmId, access: &Access) -> Result<()> {
        bent!(self, set_access, (vm, access.clone()), self.world.cloud().set_access(vm, access))
    }
}

#[async_trait]
impl ImageBackend for Bent {
    fn capabilities(&self) -> ImageCapabilities {
        ImageBackend::capabilities(self.world.cloud())
    }

    async fn import_image(&self, spec: &ImageSpec) -> Result<Image> {
        bent!(self, import_image, spec.clone(), self.world.cloud().import_image(spec))
    }

    async fn find_images(&self, filter: &ImageFilter) -> Result<Vec<Image>> {
        bent!(self, find_images, filter.clone(), self.world.cloud().find_images(filter))
    }

    async fn get_image(&self, id: ImageId) -> Result<Image> {
        bent!(self, get_image, id, self.world.cloud().get_image(id))
    }

    async fn delete_image(&self, id: ImageId) -> Result<Deletion> {
        bent!(self, delete_image, id, self.world.cloud().delete_image(id))
    }

    async fn capture_vm(&self, vm: VmId, name: &Name, tags: &Tags) -> Result<Image> {
        bent!(self, capture_vm, (vm, name.clone(), tags.clone()), self.world.cloud().capture_vm(vm, name, tags))
    }

    async fn export_image(&self, id: ImageId, to: &Path) -> Result<u64> {
        bent!(self, export_image, (id, to.to_owned()), self.world.cloud().export_image(id, to))
    }
}

#[async_trait]
impl GuestExec for Bent {
    fn capabilities(&self) -> GuestCapabilities {
        GuestExec::capabilities(self.world.cloud())
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        bent!(self, guest_info, vm, self.world.cloud().guest_info(vm))
    }

    async fn put_files(&self, vm: VmId, request: &PutFiles) -> Result<()> {
        bent!(self, put_files, (vm, request.clone()), self.world.cloud().put_files(vm, request))
    }

    async fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        let input = (vm, path.to_owned(), limit_bytes);
        bent!(self, get_file, input, self.world.cloud().get_file(vm, path, limit_bytes))
    }

    async fn remove_files(&self, vm: VmId, request: &RemoveFiles) -> Result<Vec<Result<Deletion>>> {
        bent!(self, remove_files, (vm, request.clone()), self.world.cloud().remove_files(vm, request))
    }

    async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        bent!(self, exec, (vm, request.clone()), self.world.cloud().exec(vm, request))
    }
}

#[async_trait]
impl StateStore for Bent {
    async fn get(&self, key: &Key) -> Result<Option<Versioned>> {
        bent!(self, get, key.clone(), self.world.state().get(key))
    }

    async fn put(&self, key: &Key, value: Bytes, only: Precondition, ttl: Option<Duration>) -> Result<Version> {
        let plain = value.clone();
        bent!(self, put, (key.clone(), value, only, ttl), self.world.state().put(key, plain, only, ttl))
    }

    async fn delete(&self, key: &Key, only: Precondition) -> Result<Deletion> {
        bent!(self, delete, (key.clone(), only), self.world.state().delete(key, only))
    }

    async fn list(&self, prefix: &str, after: Option<&Key>, limit: usize) -> Result<Vec<(Key, Versioned)>> {
        let input = (prefix.to_owned(), after.cloned(), limit);
        bent!(self, list, input, self.world.state().list(prefix, after, limit))
    }
}

#[async_trait]
impl Signals for Bent {
    async fn send(&self, topic: &Key, payload: Bytes) -> Result<()> {
        let plain = payload.clone();
        bent!(self, send, (topic.clone(), payload), self.world.signals().send(topic, plain))
    }

    async fn listen(&self, topic: &Key) -> Result<NoticeStream> {
        bent!(self, listen, topic.clone(), self.world.signals().listen(topic))
    }
}
