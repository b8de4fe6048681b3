//! Packages for tests: real ones, in a folder that goes with the test.

use std::{
    collections::HashMap,
    fs,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;
use tempfile::TempDir;

use super::*;
use crate::package::{LocalFolder, Package};

/// A local folder, and where in it each package was put last.
#[derive(Debug)]
pub(super) struct Shelf {
    folder: TempDir,
    source: LocalFolder,
    put: Mutex<HashMap<String, PathBuf>>,
}

impl Shelf {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { source: LocalFolder::new(folder.path()), folder, put: Mutex::default() }
    }

    /// Puts a package there, in the place of one with the same name.
    pub(super) fn put(&self, draft: Draft) {
        let mut put = self.put.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = put.remove(&draft.name) {
            fs::remove_dir_all(old).unwrap();
        }
        // A new place each time, so that nobody takes it for the old one.
        let path = self.folder.path().join(InstallId::random().to_string());
        fs::create_dir(&path).unwrap();
        fs::write(path.join("package.toml"), draft.manifest()).unwrap();
        for (index, (.., content)) in draft.assets.iter().enumerate() {
            fs::write(path.join(format!("asset{index}")), content).unwrap();
        }
        put.insert(draft.name, path);
    }

    /// Where a package's files are.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.put.lock().unwrap_or_else(PoisonError::into_inner)[name].clone()
    }
}

#[async_trait]
impl PackageSource for Shelf {
    async fn fetch(&self, name: &str, requirement: &str) -> Result<Arc<Package>> {
        self.source.fetch(name, requirement).await
    }
}

/// A package that is not written yet.
#[derive(Clone)]
pub(super) struct Draft {
    kind: InstallKind,
    name: String,
    assets: Vec<(String, u32, String)>,
    action: Option<String>,
    delete: Option<String>,
    restarts: bool,
    interval_s: u64,
}

pub(super) fn feature(name: &str) -> Draft {
    draft(InstallKind::Feature, name)
}

pub(super) fn inject(name: &str) -> Draft {
    draft(InstallKind::Inject, name)
}

pub(super) fn condition(name: &str, action: &str, interval: Duration) -> Draft {
    Draft { interval_s: interval.as_secs(), ..draft(InstallKind::Condition, name) }.action(action)
}

fn draft(kind: InstallKind, name: &str) -> Draft {
    Draft { kind, name: name.to_owned(), assets: vec![], action: None, delete: None, restarts: false, interval_s: 0 }
}

impl Draft {
    pub(super) fn asset(mut self, path: &str, mode: u32, content: &str) -> Self {
        self.assets.push((path.to_owned(), mode, content.to_owned()));
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

    fn manifest(&self) -> String {
        let assets: Vec<_> = self
            .assets
            .iter()
            .enumerate()
            .map(|(index, (path, mode, _))| {
                let parts = [format!("asset{index}"), path.clone(), format!("{mode:03o}")];
                toml::Value::Array(parts.map(toml::Value::String).into())
            })
            .collect();
        let mut section = toml::Table::new();
        for (key, line) in [("action", &self.action), ("delete", &self.delete)] {
            if let Some(line) = line {
                section.insert(key.to_owned(), line.clone().into());
            }
        }
        match self.kind {
            InstallKind::Feature => {
                section.insert("type".to_owned(), "service".into());
                section.insert("restarts".to_owned(), self.restarts.into());
            }
            InstallKind::Inject => {
                section.insert("restarts".to_owned(), self.restarts.into());
            }
            InstallKind::Condition => {
                section.insert("interval".to_owned(), i64::try_from(self.interval_s).unwrap().into());
            }
        }
        let kind = self.kind.to_string();
        let manifest = toml::toml! {
            [package]
            version = "1.0.0"
            license = "MIT"
        };
        let mut manifest = manifest;
        let package = manifest["package"].as_table_mut().unwrap();
        package.insert("name".to_owned(), self.name.clone().into());
        package.insert("assets".to_owned(), toml::Value::Array(assets));
        manifest
            .insert("content".to_owned(), toml::Table::from_iter([("type".to_owned(), kind.clone().into())]).into());
        manifest.insert(kind, section.into());
        toml::to_string(&manifest).unwrap()
    }
}
