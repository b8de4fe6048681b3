//! placeholder
use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    ComputeBackend, Deletion, GuestExec, ImageBackend, Name, NetworkBackend, Owner, Result, Scope, StateStore, Vm, VmId,
};

/// Creates and deletes machines by journalled plans. Cloning is cheap; all clones are one deployer.
#[derive(Clone, Debug)]
pub struct Deployer {
    _inner: Arc<()>,
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

/// What a reconcile did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReconcileReport {
    /// Plans that were completed.
    pub completed: Vec<VmId>,
    /// Plans that were undone.
    pub undone: Vec<String>,
    /// Machines with our tag that no record owned, deleted.
    pub swept: Vec<VmId>,
    /// Records whose machine is gone, removed.
    pub forgotten: Vec<String>,
    /// What could not be done now, and why.
    pub failed: Vec<String>,
}

impl Deployer {
    /// Makes a deployer.
    pub fn new(_parts: DeployParts, _config: DeployConfig) -> Self {
        todo!()
    }

    /// Creates a machine and waits until it runs and, where it has an agent channel, its agent answers.
    ///
    /// The work goes on when the caller goes away: it is finished or undone by the journal.
    ///
    /// # Errors
    /// `TimedOut` with what was seen last; then the create has been undone.
    pub async fn create(&self, _request: CreateRequest) -> Result<Vm> {
        todo!()
    }

    /// Deletes a machine of ours and waits until it is gone.
    ///
    /// # Errors
    /// `Denied` for a machine that this owner did not make.
    pub async fn delete(&self, _id: VmId) -> Result<Deletion> {
        todo!()
    }

    /// Our machines.
    ///
    /// # Errors
    /// Those of the backend.
    pub async fn list(&self, _scope: Option<&Scope>) -> Result<Vec<Vm>> {
        todo!()
    }

    /// One machine of ours.
    ///
    /// # Errors
    /// `NotFound`, also for a machine of somebody else's.
    pub async fn get(&self, _id: VmId) -> Result<Vm> {
        todo!()
    }

    /// Finishes or undoes every unfinished plan, deletes what no record owns, forgets what is gone.
    ///
    /// # Errors
    /// Those of store and backend when nothing could be done at all.
    pub async fn reconcile(&self) -> Result<ReconcileReport> {
        todo!()
    }
}
