//! What a package means for the executor.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use super::{
    InstallKind,
    record::{Record, StoredAsset, StoredPackage, StoredProbe},
    remove::hex,
    request::check_interval,
};
use crate::{
    Error, PutFile, Result,
    package::{Content, Package, PackageKind},
};

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
pub(super) async fn plan(kind: InstallKind, package: &Package, user: &str) -> Result<(Plan, Description)> {
    let manifest = package.manifest();
    let wanted = match kind {
        InstallKind::Feature => PackageKind::Feature,
        InstallKind::Inject => PackageKind::Inject,
        InstallKind::Condition => PackageKind::Condition,
    };
    if package.kind() != wanted {
        return Err(Error::invalid(
            "source",
            format_args!(
                "wants a package of type {kind}; {} {} is of type {}",
                manifest.name,
                manifest.version,
                package.kind().as_str()
            ),
        ));
    }
    let mut files = Vec::new();
    for asset in package.assets() {
        files.push(PutFile {
            path: asset.destination.clone(),
            content: package.asset_bytes(asset).await?,
            mode: asset.mode,
            owner: Some(user.to_owned()).filter(|user| !user.is_empty()),
            make_parents: true,
        });
    }
    let assets = files
        .iter()
        .map(|file| StoredAsset {
            path: file.path.clone(),
            bytes: file.content.len() as u64,
            sha256: hex(&Sha256::digest(&file.content)),
        })
        .collect();
    let (action, restarts, delete_action, probe) = match package.content() {
        Content::Feature(feature) => (feature.action.clone(), feature.restarts, feature.delete.clone(), None),
        Content::Inject(inject) => (inject.action.clone(), inject.restarts, None, None),
        Content::Condition(condition) => {
            check_interval(condition.interval())?;
            (None, false, None, Some(StoredProbe::new(condition.action.clone(), condition.interval())))
        }
        _ => return Err(Error::internal("a package of another type was let through")),
    };
    Ok((
        Plan { files, action, environment: BTreeMap::new(), restarts },
        Description {
            package: StoredPackage {
                name: manifest.name.clone(),
                version: manifest.version.to_string(),
                sha256: package.digest().to_owned(),
            },
            assets,
            delete_action,
            probe,
        },
    ))
}
