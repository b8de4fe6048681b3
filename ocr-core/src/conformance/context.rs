//! What cases work with: names under the run's prefix, waiting, and cleaning up.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::{MutexGuard, OnceCell};

use super::{Case, Subject};
use crate::{
    ComputeBackend, ComputeBackendExt, Error, ErrorKind, GuestExec, GuestExecExt, Image, ImageBackend, ImageFilter,
    Key, Name, Network, NetworkBackend, NetworkFilter, NetworkKind, Owner, Precondition, RequestId, Result, Scope,
    StateStore, Tags, Vm, VmFilter, VmId, VmSpec, VmState, signal::Signals, state::MAX_PAGE,
};

/// Why a case failed.
#[derive(Clone, Debug)]
pub(super) struct Broken(pub(super) String);

pub(super) type Check<T = ()> = std::result::Result<T, Broken>;

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        Self(format!("an error where there must be none: {}", shown(&error)))
    }
}

/// An error as a report shows it: with its kind, and its causes, since this is for those who write the backend.
pub(super) fn shown(error: &Error) -> String {
    let mut text = format!("{} ({}", error, error.kind());
    if let Some(reason) = error.reason() {
        text.push_str(&format!(", {reason}"));
    }
    text.push(')');
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        text.push_str(&format!(": {source}"));
        cause = source.source();
    }
    text
}

/// Fails the case when a condition does not hold.
macro_rules! ensure {
    ($condition:expr, $($why:tt)+) => {
        if !$condition {
            return Err($crate::conformance::context::Broken(format!($($why)+)));
        }
    };
}
pub(super) use ensure;

/// The error of a call that must fail with one of these kinds.
pub(super) fn fails<T: fmt::Debug>(result: Result<T>, kinds: &[ErrorKind], what: &str) -> Check<Error> {
    let wanted: Vec<_> = kinds.iter().map(|kind| kind.as_str()).collect();
    match result {
        Err(error) if kinds.contains(&error.kind()) => Ok(error),
        Err(error) => {
            Err(Broken(format!("{what} must fail with {}, it failed with {}", wanted.join(" or "), shown(&error))))
        }
        Ok(value) => Err(Broken(format!("{what} must fail with {}, it gave {value:?}", wanted.join(" or ")))),
    }
}

/// What the cases of one run share.
#[derive(Default)]
pub(super) struct Shared {
    guest: OnceCell<Check<VmId>>,
    /// A guest does one thing at a time: that is the callers' duty.
    turn: tokio::sync::Mutex<()>,
}

/// What one case works with.
pub(super) struct Context<'a> {
    pub(super) subject: &'a Subject,
    shared: &'a Shared,
    case: &'static Case,
    /// Machines made under this case, found again even where listing is broken.
    vms: Mutex<Vec<VmId>>,
}

impl<'a> Context<'a> {
    pub(super) fn new(subject: &'a Subject, shared: &'a Shared, case: &'static Case) -> Self {
        Self { subject, shared, case, vms: Mutex::default() }
    }

    pub(super) fn compute(&self) -> Check<&Arc<dyn ComputeBackend>> {
        self.subject.compute.as_ref().ok_or_else(|| Broken("no compute backend".to_owned()))
    }

    pub(super) fn network(&self) -> Check<&Arc<dyn NetworkBackend>> {
        self.subject.network.as_ref().ok_or_else(|| Broken("no network backend".to_owned()))
    }

    pub(super) fn image(&self) -> Check<&Arc<dyn ImageBackend>> {
        self.subject.image.as_ref().ok_or_else(|| Broken("no image backend".to_owned()))
    }

    pub(super) fn guest(&self) -> Check<&Arc<dyn GuestExec>> {
        self.subject.guest.as_ref().ok_or_else(|| Broken("no guest exec".to_owned()))
    }

    pub(super) fn state(&self) -> Check<&Arc<dyn StateStore>> {
        self.subject.state.as_ref().ok_or_else(|| Broken("no state store".to_owned()))
    }

    pub(super) fn signals(&self) -> Check<&Arc<dyn Signals>> {
        self.subject.signals.as_ref().ok_or_else(|| Broken("no signals".to_owned()))
    }

    pub(super) fn deadline(&self) -> Duration {
        self.subject.deadline
    }

    /// A name of this run and this case.
    pub(super) fn name(&self, suffix: &str) -> Check<Name> {
        Ok(Name::new(format!("{}-{}-{suffix}", self.subject.owner, self.case.name))?)
    }

    /// The case's own scope.
    pub(super) fn scope(&self) -> Scope {
        scope(self.subject, self.case.name)
    }

    /// A second scope of this case.
    pub(super) fn other_scope(&self) -> Scope {
        scope(self.subject, &format!("{}.2", self.case.name))
    }

    pub(super) fn other_owner(&self) -> Check<Owner> {
        Ok(other_owner(self.subject)?)
    }

    /// Tags of this case under a fresh request.
    pub(super) fn tags(&self) -> Tags {
        Tags { owner: self.subject.owner.clone(), request: RequestId::random(), scope: self.scope() }
    }

    /// A small machine under a fresh request.
    pub(super) fn spec(&self, suffix: &str) -> Check<VmSpec> {
        let template = self.subject.template.ok_or_else(|| Broken("no template".to_owned()))?;
        Ok(VmSpec {
            tags: self.tags(),
            name: self.name(suffix)?,
            cpus: self.subject.cpus,
            ram_bytes: self.subject.ram_bytes,
            image: template,
            links: Vec::new(),
            labels: BTreeMap::new(),
        })
    }

    /// Creates a machine that is cleaned up.
    pub(super) async fn create(&self, spec: &VmSpec) -> Check<Vm> {
        let vm = self.compute()?.create_vm(spec).await?;
        self.keep(vm.id);
        Ok(vm)
    }

    /// Cleans up this machine too, however it came to be.
    pub(super) fn keep(&self, id: VmId) {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).push(id);
    }

    /// Our machines in this case's scope.
    pub(super) async fn listed(&self) -> Check<Vec<Vm>> {
        let filter =
            VmFilter { owner: Some(self.subject.owner.clone()), scope: Some(self.scope()), ..VmFilter::default() };
        Ok(self.compute()?.list_vms(&filter).await?)
    }

    /// Waits until a machine is in a state; fails at once when it has failed.
    pub(super) async fn becomes(&self, id: VmId, wanted: VmState) -> Check<Vm> {
        let done = |vm: Option<&Vm>| match vm.map(|vm| &vm.state) {
            None | Some(VmState::Failed(_)) => true,
            Some(state) => *state == wanted,
        };
        match self.compute()?.poll_vm(id, self.deadline(), done).await? {
            Some(vm) if vm.state == wanted => Ok(vm),
            Some(vm) => Err(Broken(format!("the machine must become {wanted}, it is {}", vm.state))),
            None => Err(Broken(format!("the machine must become {wanted}, it is gone"))),
        }
    }

    /// A running machine of this case.
    pub(super) async fn running(&self, suffix: &str) -> Check<Vm> {
        let vm = self.create(&self.spec(suffix)?).await?;
        self.becomes(vm.id, VmState::Running).await
    }

    /// Waits until a machine is gone.
    pub(super) async fn goes(&self, id: VmId) -> Check {
        self.compute()?.poll_vm(id, self.deadline(), |vm| vm.is_none()).await?;
        Ok(())
    }

    /// The guest that all cases share, made and booted by the first, and the turn to use it.
    pub(super) async fn shared_guest(&self) -> Check<(VmId, MutexGuard<'a, ()>)> {
        let turn = self.shared.turn.lock().await;
        let vm = self.shared.guest.get_or_init(|| Box::pin(self.prepare_guest())).await.clone()?;
        Ok((vm, turn))
    }

    async fn prepare_guest(&self) -> Check<VmId> {
        let ready = async {
            let vm = match self.subject.guest_vm {
                Some(vm) => vm,
                None => self.make_guest().await?,
            };
            self.guest()?.wait_ready(vm, self.deadline(), Duration::from_secs(1)).await?;
            Ok(vm)
        };
        ready.await.map_err(|Broken(why)| Broken(format!("the guest could not be prepared: {why}")))
    }

    async fn make_guest(&self) -> Check<VmId> {
        let compute = self.compute()?;
        let mut spec = self.spec("guest")?;
        spec.name = Name::new(format!("{}-guest", self.subject.owner))?;
        spec.tags.scope = guest_scope(self.subject);
        if compute.capabilities().nics {
            spec.links = self.subject.links.iter().take(1).copied().collect();
        }
        let vm = compute.create_vm(&spec).await?;
        self.becomes(vm.id, VmState::Running).await?;
        Ok(vm.id)
    }

    /// A path in the guest that is this case's own; a name in `/tmp` without folders.
    pub(super) fn path(&self, suffix: &str) -> String {
        format!("/tmp/{}-{}-{suffix}", self.subject.owner, self.case.name)
    }

    /// The simplest network that the backend can make.
    pub(super) fn network_kind(&self) -> Check<NetworkKind> {
        if let Some(kind) = &self.subject.network_kind {
            return Ok(kind.clone());
        }
        let can = self.network()?.capabilities();
        if can.isolated {
            return Ok(NetworkKind::Isolated);
        }
        let octets = [198, 51, 100];
        Ok(NetworkKind::Routed {
            cidr: ([octets[0], octets[1], octets[2], 0].into(), 24),
            gateway: [octets[0], octets[1], octets[2], 1].into(),
        })
    }

    /// A key of this run and this case.
    pub(super) fn key(&self, suffix: &str) -> Check<Key> {
        Ok(Key::new(format!("{}/{}/{suffix}", self.subject.owner, self.case.name))?)
    }

    /// Deletes what this case made; says what it could not.
    pub(super) async fn clean_up(&self) -> Check {
        let mut left = Vec::new();
        if let Some(compute) = &self.subject.compute {
            let mut ids = std::mem::take(&mut *self.vms.lock().unwrap_or_else(PoisonError::into_inner));
            for scope in [self.scope(), self.other_scope()] {
                let filter = VmFilter { scope: Some(scope.clone()), ..VmFilter::default() };
                for vm in compute.list_vms(&filter).await.unwrap_or_default() {
                    if vm.tags.as_ref().is_some_and(|tags| is_ours(self.subject, tags) && tags.scope == scope) {
                        ids.push(vm.id);
                    }
                }
            }
            ids.sort_unstable();
            ids.dedup();
            delete_vms(self.subject, compute.as_ref(), ids, &mut left).await;
        }
        let here = [self.scope(), self.other_scope()];
        let of_this_case = |tags: &Tags| is_ours(self.subject, tags) && here.contains(&tags.scope);
        delete_images(self.subject, of_this_case, &mut left).await;
        delete_networks(self.subject, of_this_case, &mut left).await;
        delete_records(self.subject, &format!("{}/{}/", self.subject.owner, self.case.name), &mut left).await;
        verdict(&left)
    }
}

fn scope(subject: &Subject, deployment: &str) -> Scope {
    Scope { exercise: subject.owner.to_string(), deployment: deployment.to_owned() }
}

fn guest_scope(subject: &Subject) -> Scope {
    scope(subject, "guest")
}

fn other_owner(subject: &Subject) -> Result<Owner> {
    Owner::new(format!("{}.2", subject.owner))
}

fn is_ours(subject: &Subject, tags: &Tags) -> bool {
    tags.owner == subject.owner || other_owner(subject).is_ok_and(|other| tags.owner == other)
}

fn verdict(left: &[String]) -> Check {
    if left.is_empty() { Ok(()) } else { Err(Broken(left.join("; "))) }
}

/// Deletes everything of this run; what is still there, or cannot be seen, is a failure. What a case failed to clean up
/// is a failure too, even when it goes now.
pub(super) async fn sweep(subject: &Subject, shared: &Shared) -> Check {
    let mut left = Vec::new();
    let ours = |tags: &Tags| is_ours(subject, tags);
    if let (Some(guest), Some(vm), Some(Ok(_))) = (&subject.guest, subject.guest_vm, shared.guest.get()) {
        // A machine that was lent stays, without our files. Names begin with the owner, which no pattern is in.
        let line = format!("rm -rf /tmp/{}-*; ls -A /tmp | grep -F '{}-' || true", subject.owner, subject.owner);
        match guest.shell(vm, &line).await {
            Ok(output) if output.stdout.is_empty() => {}
            Ok(output) => left.push(format!("files in the guest: {}", String::from_utf8_lossy(&output.stdout))),
            Err(error) => left.push(format!("the guest's files cannot be removed: {}", shown(&error))),
        }
    }
    if let Some(compute) = &subject.compute {
        if let Some(Ok(guest)) = shared.guest.get()
            && subject.guest_vm.is_none()
        {
            delete_vms(subject, compute.as_ref(), vec![*guest], &mut left).await;
        }
        match our_vms(subject, compute.as_ref()).await {
            Ok(vms) => {
                // A guest that could not be prepared may be there still: it is no case's failure to clean up.
                let guests = |vm: &&Vm| vm.tags.as_ref().is_some_and(|tags| tags.scope == guest_scope(subject));
                left.extend(vms.iter().filter(|vm| !guests(vm)).map(|vm| format!("machine {} {}", vm.id, vm.name)));
                delete_vms(subject, compute.as_ref(), vms.iter().map(|vm| vm.id).collect(), &mut left).await;
            }
            Err(error) => left.push(format!("the machines cannot be listed: {}", shown(&error))),
        }
    }
    let images = our_images(subject, ours).await;
    left.extend(images.iter().map(|image| format!("image {} {}", image.id, image.name)));
    delete_images(subject, ours, &mut left).await;
    let networks = our_networks(subject, ours).await;
    left.extend(networks.iter().map(|network| format!("network {} {}", network.id, network.name)));
    delete_networks(subject, ours, &mut left).await;
    let prefix = format!("{}/", subject.owner);
    if let Some(state) = &subject.state {
        match state.list(&prefix, None, MAX_PAGE).await {
            Ok(records) => left.extend(records.iter().map(|(key, _)| format!("record {key}"))),
            Err(error) => left.push(format!("the records cannot be listed: {}", shown(&error))),
        }
        delete_records(subject, &prefix, &mut left).await;
    }
    left.truncate(20);
    verdict(&left)
}

async fn our_vms(subject: &Subject, compute: &dyn ComputeBackend) -> Result<Vec<Vm>> {
    let mut vms = compute.list_vms(&VmFilter::owned_by(&subject.owner)).await?;
    vms.extend(compute.list_vms(&VmFilter::owned_by(&other_owner(subject)?)).await?);
    vms.retain(|vm| vm.tags.as_ref().is_some_and(|tags| is_ours(subject, tags)));
    Ok(vms)
}

async fn delete_vms(subject: &Subject, compute: &dyn ComputeBackend, ids: Vec<VmId>, left: &mut Vec<String>) {
    for id in &ids {
        if let Err(error) = compute.delete_vm(*id).await {
            left.push(format!("machine {id} cannot be deleted: {}", shown(&error)));
        }
    }
    for id in ids {
        if let Err(error) = compute.poll_vm(id, subject.deadline, |vm| vm.is_none()).await {
            left.push(shown(&error));
        }
    }
}

async fn our_images(subject: &Subject, ours: impl Fn(&Tags) -> bool) -> Vec<Image> {
    let Some(backend) = &subject.image else { return Vec::new() };
    let mut images = Vec::new();
    for owner in [Ok(subject.owner.clone()), other_owner(subject)].into_iter().flatten() {
        let filter = ImageFilter { owner: Some(owner), ..ImageFilter::default() };
        images.extend(backend.find_images(&filter).await.unwrap_or_default());
    }
    images.retain(|image| image.tags.as_ref().is_some_and(&ours));
    images
}

async fn delete_images(subject: &Subject, ours: impl Fn(&Tags) -> bool, left: &mut Vec<String>) {
    let Some(backend) = &subject.image else { return };
    for image in our_images(subject, ours).await {
        if let Err(error) = backend.delete_image(image.id).await {
            left.push(format!("image {} cannot be deleted: {}", image.id, shown(&error)));
        }
    }
}

async fn our_networks(subject: &Subject, ours: impl Fn(&Tags) -> bool) -> Vec<Network> {
    let Some(backend) = &subject.network else { return Vec::new() };
    let mut networks = Vec::new();
    for owner in [Ok(subject.owner.clone()), other_owner(subject)].into_iter().flatten() {
        let filter = NetworkFilter { owner: Some(owner), ..NetworkFilter::default() };
        networks.extend(backend.list_networks(&filter).await.unwrap_or_default());
    }
    networks.retain(|network| network.tags.as_ref().is_some_and(&ours));
    networks
}

async fn delete_networks(subject: &Subject, ours: impl Fn(&Tags) -> bool, left: &mut Vec<String>) {
    let Some(backend) = &subject.network else { return };
    for network in our_networks(subject, ours).await {
        if let Err(error) = backend.delete_network(network.id).await {
            left.push(format!("network {} cannot be deleted: {}", network.id, shown(&error)));
        }
    }
}

async fn delete_records(subject: &Subject, prefix: &str, left: &mut Vec<String>) {
    let Some(state) = &subject.state else { return };
    // A page that does not shrink would keep this going for ever.
    for _ in 0..100 {
        let records = state.list(prefix, None, MAX_PAGE).await.unwrap_or_default();
        let ours: Vec<_> = records.into_iter().filter(|(key, _)| key.as_str().starts_with(prefix)).collect();
        if ours.is_empty() {
            return;
        }
        for (key, _) in ours {
            if let Err(error) = state.delete(&key, Precondition::Any).await {
                left.push(format!("record {key} cannot be deleted: {}", shown(&error)));
                return;
            }
        }
    }
    left.push(format!("records under {prefix} stay"));
}
