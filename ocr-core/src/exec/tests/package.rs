//! Packages for tests.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;

use super::*;
use crate::package::Package;

/// A source of packages that were put there.
#[derive(Debug, Default)]
pub(super) struct Shelf(Mutex<HashMap<String, Arc<Package>>>);

impl Shelf {
    pub(super) fn put(&self, package: Package) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(package.name.clone(), Arc::new(package));
    }
}

#[async_trait]
impl PackageSource for Shelf {
    async fn fetch(&self, name: &str, _requirement: &str) -> Result<Arc<Package>> {
        let shelf = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shelf.get(name).cloned().ok_or_else(|| {
            Error::not_found(format!("there is no package {name}")).with_reason(crate::error::reason::PACKAGE_NOT_FOUND)
        })
    }
}

/// A package under construction.
pub(super) fn feature(name: &str) -> Package {
    package("feature", name)
}

pub(super) fn inject(name: &str) -> Package {
    package("inject", name)
}

pub(super) fn condition(name: &str, action: &str, interval: Duration) -> Package {
    Package { interval: Some(interval), ..package("condition", name) }.action(action)
}

fn package(kind: &str, name: &str) -> Package {
    Package {
        kind: kind.to_owned(),
        name: name.to_owned(),
        version: "1.0.0".to_owned(),
        sha256: "00".repeat(32),
        ..Package::default()
    }
}

impl Package {
    pub(super) fn asset(mut self, path: &str, mode: u32, content: &str) -> Self {
        self.files.push((path.to_owned(), Some(mode), content.to_owned().into()));
        self
    }

    pub(super) fn action(mut self, line: &str) -> Self {
        self.action = Some(line.to_owned());
        self
    }

    pub(super) fn delete(mut self, line: &str) -> Self {
        self.delete = Some(line.to_owned());
        self
    }

    pub(super) fn restarts(mut self) -> Self {
        self.restarts = true;
        self
    }
}
