//! Deploying machines so that nothing is ever left behind.
//!
//! A create is a plan of steps, and its undo takes back whatever they made. Before any effect the intent is
//! written to the journal in the [`StateStore`](crate::StateStore). Four things together keep the promise, and none of
//! them is enough alone (each was measured by a crash model before this was built):
//!
//! 1. the intent is durable before the effect;
//! 2. a repeat adopts what carries its request before it creates ([`ComputeBackend::create_vm`](crate::ComputeBackend)
//!    is idempotent by its request);
//! 3. the backend has a natural lock (a domain's UUID and name, a port that can be used once);
//! 4. [`Deployer::reconcile`] deletes what carries our owner tag and has no record.
//!
//! Nothing without our owner tag is ever touched.

mod deploy;
mod journal;
mod plan;
mod reconcile;
mod wait;

pub use deploy::{CreateRequest, DeployConfig, DeployParts, Deployer};
pub use journal::{Phase, VmRecord};
pub use reconcile::ReconcileReport;
pub use wait::Waiter;
