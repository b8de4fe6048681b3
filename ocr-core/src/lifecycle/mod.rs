//! Deploying machines so that nothing is ever left behind: plans with a journal.

mod deploy;

pub use deploy::{CreateRequest, DeployConfig, DeployParts, Deployer, ReconcileReport};
