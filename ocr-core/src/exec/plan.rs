//! What a package means for the executor.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use super::{
    InstallKind,
    record::{Record, StoredAsset, StoredPackage, StoredProbe},
    remove::hex,
    request::check_interval,
};
use crate::{Error, PutFile, Result, package::Package};

/// What an install does in the guest.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) files: Vec<PutFile>,
    pub(super) action: Option<String>,
    pub(super) environment: BTreeMap<String, String>,
    pub(super) restarts: bool,
}

/// What of a package goes into the record.
pub(super) struct Description {
    package: StoredPackage,
    assets: Vec<StoredAsset>,
    delete_action: Option<String>,
    probe: Option<StoredProbe>,
}

impl Description {
    pub(super) fn describe(self, record: &mut Record) {
        record.package = Some(self.package);
        record.assets = self.assets;
        record.delete_action = self.delete_action;
        record.probe = self.probe;
    }
}

/// Reads a package of the kind that was asked for.
pub(super) fn plan(kind: InstallKind, package: &Package, user: &str) -> Result<(Plan, Description)> {
    if package.kind != kind.to_string() {
        return Err(Error::invalid(
            "source",
            format_args!(
                "wants a package of type {kind}; {} {} is of type {}",
                package.name, package.version, package.kind
            ),
        ));
    }
    let files: Vec<PutFile> = package
        .files
        .iter()
        .map(|(path, mode, content)| PutFile {
            path: path.clone(),
            content: content.clone(),
            mode: *mode,
            owner: Some(user.to_owned()).filter(|user| !user.is_empty()),
            make_parents: true,
        })
        .collect();
    let assets = files
        .iter()
        .map(|file| StoredAsset {
            path: file.path.clone(),
            bytes: file.content.len() as u64,
            sha256: hex(&Sha256::digest(&file.content)),
        })
        .collect();
    let (action, probe) = match (kind, &package.action, package.interval) {
        (InstallKind::Condition, Some(line), Some(interval)) => {
            check_interval(interval)?;
            (None, Some(StoredProbe::new(line.clone(), interval)))
        }
        (InstallKind::Condition, ..) => return Err(Error::internal("a condition package without action")),
        (_, action, _) => (action.clone(), None),
    };
    Ok((
        Plan { files, action, environment: BTreeMap::new(), restarts: package.restarts },
        Description {
            package: StoredPackage {
                name: package.name.clone(),
                version: package.version.clone(),
                sha256: package.sha256.clone(),
            },
            assets,
            delete_action: package.delete.clone(),
            probe,
        },
    ))
}
