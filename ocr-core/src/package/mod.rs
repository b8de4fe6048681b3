//! Deputy packages: manifests, archives, and where they come from.
use std::{fmt, sync::Arc};

use async_trait::async_trait;

use crate::Result;

/// placeholder
#[derive(Debug)]
pub struct Package;

/// Where packages come from.
#[async_trait]
pub trait PackageSource: fmt::Debug + Send + Sync + 'static {
    /// The newest package of this name whose version meets the requirement, unpacked and checked.
    async fn fetch(&self, name: &str, requirement: &str) -> Result<Arc<Package>>;
}
