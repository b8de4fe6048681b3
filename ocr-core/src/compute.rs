//! [`ComputeBackend`]: create, find, power and delete virtual machines.

use std::{collections::BTreeMap, fmt, time::Duration};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{Error, ImageId, Name, NetworkId, Owner, RequestId, Result, Scope, Tags, VmId};

/// Deploys virtual machines.
///
/// Every call either had its effect or says in [`Error::retry`] what is known about it. Calls may run
/// at the same time from many tasks. A call is dropped safely at any await: what it began is found again
/// by its [`RequestId`].
///
/// Each MUST below is checked by the conformance case named beside it (`crate::conformance`).
#[async_trait]
pub trait ComputeBackend: fmt::Debug + Send + Sync + 'static {
    /// What this backend can do. It never changes while the backend lives.
    fn capabilities(&self) -> ComputeCapabilities;

    /// Accepts a new machine: a disk made from the image, one NIC per link, the tags of the spec.
    ///
    /// The machine is started. It may still be [`VmState::Building`] on return; waiting is the caller's
    /// ([`lifecycle`](crate::lifecycle) does it once for all waiters).
    ///
    /// # Behavior
    /// - The machine MUST be seen by `get_vm` and `list_vms` as soon as this returns [case: vm_create_visible].
    /// - Owner, request, scope, name and cpus MUST come back as given, memory as given or rounded up to a whole MiB
    ///   [case: vm_create_keeps_tags].
    /// - A repeat of the same spec MUST return the same machine and make no second one [case: vm_create_repeat].
    /// - Two at once with the same spec MUST give one machine [case: vm_create_race].
    /// - The same request with another spec MUST fail with `AlreadyExists` and change nothing [case: vm_create_request_reused].
    /// - The same owner, scope and name under another request MUST fail with `AlreadyExists` and make nothing
    ///   [case: vm_create_name_taken]; the same name in another scope MUST be free [case: vm_create_name_other_scope].
    /// - An unknown image or network MUST fail with `NotFound`, name it, and leave nothing
    ///   [case: vm_create_unknown_image] [case: vm_create_unknown_network].
    /// - No cpu, no memory, or more than [`ComputeCapabilities`] allows MUST fail with `Invalid` and leave nothing
    ///   [case: vm_create_bad_size].
    /// - NICs MUST be in the order of `links` [case: vm_create_nics]; without the capability `nics` any link MUST fail
    ///   with `Unsupported` and leave nothing [case: vm_create_nics_unsupported].
    async fn create_vm(&self, spec: &VmSpec) -> Result<Vm>;

    /// Reads one machine.
    ///
    /// # Behavior
    /// - A machine that does not exist MUST give `NotFound` [case: vm_get_missing].
    /// - A machine that was not made by this software is returned too, with no `tags`.
    async fn get_vm(&self, id: VmId) -> Result<Vm>;

    /// Lists the machines that match every part of the filter, in no particular order.
    ///
    /// # Behavior
    /// - Owner, scope and name MUST each narrow the list [case: vm_list_filter].
    /// - Nothing that matches MUST be an empty list, not an error [case: vm_list_empty].
    /// - One call costs the backend one round trip (a page at a time), however many machines there are.
    async fn list_vms(&self, filter: &VmFilter) -> Result<Vec<Vm>>;

    /// Starts, stops or reboots a machine.
    ///
    /// With a grace the guest is asked first (ACPI or agent), for at most that long, and then forced;
    /// with none it is forced at once.
    ///
    /// # Behavior
    /// - A machine that does not exist MUST give `NotFound` [case: vm_power_missing].
    /// - Starting what runs and stopping what is stopped MUST be `Ok` and change nothing [case: vm_power_repeat].
    /// - After `Stop` the machine MUST become `Stopped`, after `Start` `Running` again, the same id [case: vm_power_cycle].
    /// - After `Reboot` the machine MUST be `Running` [case: vm_power_reboot].
    /// - Rebooting a stopped machine MUST fail with `Conflict` and leave it stopped [case: vm_power_reboot_stopped].
    /// - Without the capability `power` it MUST fail with `Unsupported`, whatever the machine [case: vm_power_unsupported].
    async fn set_power(&self, id: VmId, action: PowerAction) -> Result<()>;

    /// Deletes a machine, running or not, and everything that the backend made for it (disks, ports, records).
    ///
    /// May return before the machine is gone; until then it is [`VmState::Deleting`].
    ///
    /// # Behavior
    /// - The machine MUST be gone soon after, from `get_vm` and from `list_vms` [case: vm_delete_gone].
    /// - Deleting what is gone or never was MUST be `Ok(AlreadyGone)` [case: vm_delete_missing].
    /// - Two at once MUST both succeed [case: vm_delete_race].
    /// - Afterwards the name MUST be free for another request [case: vm_delete_frees_name].
    async fn delete_vm(&self, id: VmId) -> Result<Deletion>;
}

/// Comfort over any [`ComputeBackend`]; no backend implements it.
#[async_trait]
pub trait ComputeBackendExt: ComputeBackend {
    /// The machine, or `None` when there is none.
    ///
    /// # Errors
    /// Those of [`ComputeBackend::get_vm`] but `NotFound`.
    async fn find_vm(&self, id: VmId) -> Result<Option<Vm>> {
        crate::error::none_if_not_found(self.get_vm(id).await)
    }

    /// Polls one machine until `done` says so, with a growing pause between looks.
    ///
    /// For many machines at once use [`lifecycle::Waiter`](crate::lifecycle::Waiter), which lists once a round.
    ///
    /// # Errors
    /// `TimedOut` naming the state seen last when `deadline` has passed; those of `get_vm`, but for
    /// transient ones, which are waited out.
    async fn poll_vm<F>(&self, id: VmId, deadline: Duration, mut done: F) -> Result<Option<Vm>>
    where
        F: FnMut(Option<&Vm>) -> bool + Send,
    {
        let end = tokio::time::Instant::now() + deadline;
        let mut pause = Duration::from_millis(20);
        loop {
            let last = match self.find_vm(id).await {
                Ok(seen) if done(seen.as_ref()) => return Ok(seen),
                Ok(Some(vm)) => vm.state.to_string(),
                Ok(None) => "gone".to_owned(),
                Err(error) if error.retry() == crate::Retry::Never => return Err(error),
                Err(error) => error.to_string(),
            };
            if tokio::time::Instant::now() + pause > end {
                return Err(Error::timed_out(format!(
                    "the machine did not get there in {}; seen last: {last}",
                    crate::error::seconds(deadline)
                ))
                .during("compute.poll_vm")
                .on(format!("vm {id}")));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 3 / 2).min(Duration::from_secs(1));
        }
    }
}

impl<T: ComputeBackend + ?Sized> ComputeBackendExt for T {}

/// What a [`ComputeBackend`] can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ComputeCapabilities {
    /// The most virtual cpus a machine may have.
    pub max_cpus: u32,
    /// The most memory a machine may have, in bytes.
    pub max_ram_bytes: u64,
    /// Whether a stopped machine can be started again and a running one stopped.
    pub power: bool,
    /// Whether machines can have NICs on networks.
    pub nics: bool,
}

/// What to create.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VmSpec {
    /// Kept on the machine. A repeat of the same request returns the same machine.
    pub tags: Tags,
    /// Unique per owner and scope.
    pub name: Name,
    /// Virtual cpus, at least 1.
    pub cpus: u32,
    /// Memory in bytes, at least [`VmSpec::MIN_RAM_BYTES`]. Backends round up to their own unit.
    pub ram_bytes: u64,
    /// The image that the first disk is made from.
    pub image: ImageId,
    /// One NIC for each, in this order.
    pub links: Vec<NetworkId>,
    /// Further metadata for people and other programs; kept on the machine where the backend can.
    pub labels: BTreeMap<String, String>,
}

impl VmSpec {
    /// The least memory that is not surely a mistake, in bytes: 16 MiB.
    pub const MIN_RAM_BYTES: u64 = 16 << 20;
    /// The most NICs of one machine.
    pub const MAX_LINKS: usize = 32;

    /// Checks sizes against what a backend can do. Backends call this first.
    ///
    /// # Errors
    /// `Invalid` naming the field and the limit.
    pub fn check(&self, capabilities: &ComputeCapabilities) -> Result<()> {
        if !(1..=capabilities.max_cpus).contains(&self.cpus) {
            return Err(Error::invalid(
                "cpu",
                format_args!("wants 1 to {} virtual cpus, got {}", capabilities.max_cpus, self.cpus),
            ));
        }
        if !(Self::MIN_RAM_BYTES..=capabilities.max_ram_bytes).contains(&self.ram_bytes) {
            return Err(Error::invalid(
                "ram",
                format_args!(
                    "wants {} to {} bytes of memory, got {}",
                    Self::MIN_RAM_BYTES,
                    capabilities.max_ram_bytes,
                    self.ram_bytes
                ),
            ));
        }
        if self.links.len() > Self::MAX_LINKS {
            return Err(Error::invalid(
                "links",
                format_args!("at most {} networks for one machine, got {}", Self::MAX_LINKS, self.links.len()),
            ));
        }
        if !self.links.is_empty() && !capabilities.nics {
            return Err(Error::unsupported("this backend gives machines no NICs; leave links empty"));
        }
        Ok(())
    }
}

/// A machine as the backend sees it now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    /// The backend's own id.
    pub id: VmId,
    /// The name that was asked for (not a name the backend made of it).
    pub name: Name,
    /// What we keep on it; `None` when this software did not make it.
    pub tags: Option<Tags>,
    /// What it does now.
    pub state: VmState,
    /// Virtual cpus.
    pub cpus: u32,
    /// Memory in bytes.
    pub ram_bytes: u64,
    /// The image it was made from, where that is known.
    pub image: Option<ImageId>,
    /// Its NICs in order.
    pub nics: Vec<Nic>,
    /// Whether it has a channel for a guest agent, so that waiting for one makes sense.
    pub has_agent_channel: bool,
}

impl Vm {
    /// Whether this owner made it.
    pub fn is_owned_by(&self, owner: &Owner) -> bool {
        self.tags.as_ref().is_some_and(|tags| tags.owner == *owner)
    }

    /// Whether this request made it.
    pub fn is_made_by(&self, request: &RequestId) -> bool {
        self.tags.as_ref().is_some_and(|tags| tags.request == *request)
    }
}

/// A machine's NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// The network it is plugged into; `None` when the backend knows it only by another name.
    pub network: Option<NetworkId>,
    /// The MAC address, lower case with colons, where it is known.
    pub mac: Option<String>,
    /// The addresses that the backend gave or has seen; may be empty.
    pub addresses: Vec<std::net::IpAddr>,
}

/// What a machine does.
///
/// ```text
///            create              ready              Stop
///   (none) ---------> Building ---------> Running <------> Stopped
///                        |                 |    ^   Start     |
///                        | fault           |    | resume      |
///                        v                 v    v             |
///                     Failed             (Paused)             |
///                        |                 |                  |
///                        +------ delete ---+------------------+
///                                  v
///                               Deleting ---> (gone: NotFound)
/// ```
///
/// `Failed` never turns into `Running` by itself. `Paused` is entered only from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmState {
    /// Accepted, not yet started.
    Building,
    /// The virtual hardware runs; the guest may still boot.
    Running,
    /// Suspended by somebody else.
    Paused,
    /// Switched off.
    Stopped,
    /// Being deleted.
    Deleting,
    /// It will never run; the backend's own words say why.
    Failed(String),
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Building => f.write_str("building"),
            Self::Running => f.write_str("running"),
            Self::Paused => f.write_str("paused"),
            Self::Stopped => f.write_str("stopped"),
            Self::Deleting => f.write_str("deleting"),
            Self::Failed(why) => write!(f, "failed: {why}"),
        }
    }
}

/// Which machines to list; an empty filter lists all, also those that are not ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmFilter {
    /// Only machines with this owner tag.
    pub owner: Option<Owner>,
    /// Only machines of this exercise and deployment.
    pub scope: Option<Scope>,
    /// Only machines of exactly this name.
    pub name: Option<Name>,
}

impl VmFilter {
    /// All machines of an owner.
    pub fn owned_by(owner: &Owner) -> Self {
        Self { owner: Some(owner.clone()), ..Self::default() }
    }

    /// Whether a machine matches; for backends that filter by themselves.
    pub fn matches(&self, vm: &Vm) -> bool {
        let tags = vm.tags.as_ref();
        self.owner.as_ref().is_none_or(|owner| tags.is_some_and(|tags| tags.owner == *owner))
            && self.scope.as_ref().is_none_or(|scope| tags.is_some_and(|tags| tags.scope == *scope))
            && self.name.as_ref().is_none_or(|name| vm.name == *name)
    }
}

/// What to do to a machine's power.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PowerAction {
    /// Switch it on.
    Start,
    /// Ask the guest to shut down for `grace`, then pull the plug; no grace pulls it at once.
    Stop {
        /// How long the guest may take.
        grace: Option<Duration>,
    },
    /// Ask the guest to reboot for `grace`, then reset; no grace resets at once.
    Reboot {
        /// How long the guest may take.
        grace: Option<Duration>,
    },
}

/// How a deletion went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deletion {
    /// It was there, and is gone or going.
    Deleted,
    /// It was not there.
    AlreadyGone,
}
