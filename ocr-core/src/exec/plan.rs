//! What a package means for the executor.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::{
    InstallKind,
    record::{Record, StoredAsset, StoredPackage, StoredProbe},
    remove::hex,
    request::check_interval,
};
use crate::{
    Error, ErrorKind, PutFile, Result,
    error::reason,
    package::{Asset, Content, Package},
};

/// What an install does in the guest.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) files: Vec<PlannedFile>,
    pub(super) action: Option<String>,
    pub(super) environment: BTreeMap<String, String>,
    pub(super) restarts: bool,
}

/// An asset on its way. Its bytes stay in the package until their turn has come: a hundred installs that wait for
/// their guests must not hold a hundred copies.
pub(super) struct PlannedFile {
    package: Arc<Package>,
    asset: Asset,
    pub(super) stored: StoredAsset,
    owner: Option<String>,
}

impl PlannedFile {
    /// Reads the asset, which must still be what the record says.
    pub(super) async fn read(&self) -> Result<PutFile> {
        let content = self.package.asset_bytes(&self.asset).await?;
        if digest(&content) != self.stored.sha256 {
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("{}: {} changed while it was installed", self.package, self.asset.source.display()),
            ));
        }
        Ok(PutFile {
            path: self.asset.destination.clone(),
            content,
            mode: self.asset.mode,
            owner: self.owner.clone(),
            make_parents: true,
        })
    }
}

/// Reads a package of the kind that was asked for, for an account's user, and writes into the record what is kept of it.
pub(super) async fn plan(record: &mut Record, package: Arc<Package>) -> Result<Plan> {
    let kind = record.kind();
    let wrong = || {
        Err(Error::invalid(
            "source",
            format_args!("wants a package of type {kind}; {package} is of type {}", package.kind()),
        )
        .with_reason(reason::PACKAGE_TYPE))
    };
    let mut plan = Plan::default();
    match (kind, package.content()) {
        (InstallKind::Feature, Content::Feature(feature)) => {
            plan.action = feature.action.clone();
            plan.restarts = feature.restarts;
            record.delete_action = feature.delete.clone();
        }
        (InstallKind::Inject, Content::Inject(inject)) => {
            plan.action = inject.action.clone();
            plan.restarts = inject.restarts;
        }
        (InstallKind::Condition, Content::Condition(condition)) => {
            check_interval(condition.interval())?;
            record.probe = Some(StoredProbe::new(condition.action.clone(), condition.interval()));
        }
        _ => return wrong(),
    }
    let manifest = package.manifest();
    record.package = Some(StoredPackage {
        name: manifest.name.clone(),
        version: manifest.version.to_string(),
        sha256: package.digest().to_owned(),
    });
    for asset in package.assets() {
        let content = package.asset_bytes(asset).await?;
        let stored =
            StoredAsset { path: asset.destination.clone(), bytes: content.len() as u64, sha256: digest(&content) };
        record.assets.push(stored.clone());
        plan.files.push(PlannedFile {
            package: package.clone(),
            asset: asset.clone(),
            stored,
            owner: record.user.clone(),
        });
    }
    record.check_size()?;
    Ok(plan)
}

fn digest(content: &Bytes) -> String {
    hex(&Sha256::digest(content))
}
