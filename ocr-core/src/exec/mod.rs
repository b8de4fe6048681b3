//! The executor: installs features, injects and conditions in guests, and streams conditions' values.

use std::{collections::BTreeMap, fmt, pin::Pin, sync::Arc, time::Duration};

use futures::Stream;
use secrecy::SecretString;

use crate::{
    ComputeBackend, Deletion, GuestExec, InstallId, Result, StateStore, VmId, package::PackageSource,
    queue::scheduler::Scheduler,
};

/// Installs packages in guests and runs conditions there. Cloning is cheap; all clones are one executor.
#[derive(Clone, Debug)]
pub struct Executor {
    _inner: Arc<()>,
}

/// What an [`Executor`] works with.
#[derive(Clone, Debug)]
pub struct Parts {
    /// Acts inside machines.
    pub guest: Arc<dyn GuestExec>,
    /// Tells machines that are gone from machines that do not answer, and reboots.
    pub compute: Arc<dyn ComputeBackend>,
    /// Keeps what was installed.
    pub store: Arc<dyn StateStore>,
    /// Where packages come from.
    pub packages: Arc<dyn PackageSource>,
    /// One operation per machine, so many at once.
    pub scheduler: Scheduler,
}

/// An executor's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// How long one action may run.
    pub action_deadline: Duration,
    /// How long to wait for a guest's agent, at first and after a reboot.
    pub ready_deadline: Duration,
    /// The longest pause between two looks while waiting.
    pub ready_interval: Duration,
    /// How much of stdout and stderr a reply carries, in bytes each.
    pub reply_output_bytes: usize,
}

/// The account that actions run as. Neither secret is ever stored or shown.
#[derive(Clone, Debug)]
pub struct Account {
    /// The guest's user; empty means the agent's own.
    pub username: String,
    /// Its password, where the backend needs one.
    pub password: SecretString,
    /// Its private key, where the backend needs one.
    pub private_key: SecretString,
}

/// A package by name and version requirement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackageRef {
    /// The package's name.
    pub name: String,
    /// A semver requirement; empty or `*` is any.
    pub version: String,
}

/// What kind of thing is installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InstallKind {
    /// A feature: at deployment.
    Feature,
    /// An inject: during the exercise.
    Inject,
    /// A condition: run again and again.
    Condition,
}

/// A feature or an inject to install.
#[derive(Clone, Debug)]
pub struct InstallRequest {
    /// Feature or Inject.
    pub kind: InstallKind,
    /// The user's name for it.
    pub name: String,
    /// The machine.
    pub vm: VmId,
    /// The package.
    pub package: PackageRef,
    /// As whom the action runs.
    pub account: Account,
    /// Laid over the guest's environment.
    pub environment: BTreeMap<String, String>,
}

/// A condition to install.
#[derive(Clone, Debug)]
pub struct ConditionRequest {
    /// The user's name for it.
    pub name: String,
    /// The machine.
    pub vm: VmId,
    /// As whom it runs.
    pub account: Account,
    /// What runs.
    pub probe: Probe,
    /// Laid over the guest's environment.
    pub environment: BTreeMap<String, String>,
}

/// What a condition runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// A condition package; its manifest has the action and the interval.
    Package(PackageRef),
    /// A shell line.
    Command {
        /// The line.
        line: String,
        /// From one planned run to the next.
        interval: Duration,
    },
}

/// What an install returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// Its id, for delete and watch.
    pub id: InstallId,
    /// What the action wrote to stdout, cut to the reply's limit, trailing white space removed.
    pub stdout: String,
    /// Likewise stderr.
    pub stderr: String,
}

/// One value of a condition.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConditionValue {
    /// The condition.
    pub condition: InstallId,
    /// Always finite.
    pub value: f32,
    /// How much later than planned the run began.
    pub lateness: Duration,
}

/// Values of one condition until it or its machine is gone (`NotFound`). Dropping it frees its place at once.
pub type ConditionStream = Pin<Box<dyn Stream<Item = Result<ConditionValue>> + Send>>;

/// What is installed, as the store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstallRecord {
    /// Its id.
    pub id: InstallId,
    /// Its kind.
    pub kind: InstallKind,
    /// The user's name for it.
    pub name: String,
    /// The machine.
    pub vm: VmId,
    /// Package name and version, for a package.
    pub package: Option<(String, String)>,
    /// From one run to the next, for a condition.
    pub interval: Option<Duration>,
}

impl Executor {
    /// Makes an executor.
    pub fn new(_parts: Parts, _config: Config) -> Self {
        todo!()
    }

    /// Copies a package's assets into the machine and runs its action.
    ///
    /// # Errors
    /// `Conflict` with reason `COMMAND_FAILED` and the output in the text when the action's exit code is not 0.
    pub async fn install(&self, _request: InstallRequest) -> Result<Installed> {
        todo!()
    }

    /// Installs a condition; it runs while it is watched.
    ///
    /// # Errors
    /// `Invalid` for an interval of 0.
    pub async fn create_condition(&self, _request: ConditionRequest) -> Result<Installed> {
        todo!()
    }

    /// The values of a condition from now on.
    ///
    /// # Errors
    /// `NotFound` when there is no such condition.
    pub async fn watch(&self, _condition: InstallId) -> Result<ConditionStream> {
        todo!()
    }

    /// Removes an install's assets, and runs the package's delete action where it has one.
    ///
    /// # Errors
    /// `Invalid` when the id is of another kind.
    pub async fn remove(&self, _kind: InstallKind, _id: InstallId) -> Result<Deletion> {
        todo!()
    }

    /// What is installed, on one machine or on all.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn list(&self, _vm: Option<VmId>) -> Result<Vec<InstallRecord>> {
        todo!()
    }
}

impl fmt::Display for InstallKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Feature => "feature",
            Self::Inject => "inject",
            Self::Condition => "condition",
        })
    }
}
