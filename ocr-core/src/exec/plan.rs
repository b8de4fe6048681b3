//! What a package means for the executor.

use std::{collections::BTreeMap, time::Duration};

use super::{InstallKind, record::Record};
use crate::{PutFile, Result, package::Package};

/// What an install does in the guest.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) files: Vec<PutFile>,
    pub(super) action: Option<String>,
    pub(super) environment: BTreeMap<String, String>,
    pub(super) restarts: bool,
}

/// What of a package goes into the record.
#[derive(Debug)]
pub(super) struct Description {}

impl Description {
    pub(super) fn describe(self, record: &mut Record) {}
}

pub(super) fn plan(kind: InstallKind, package: &Package, user: &str) -> Result<(Plan, Description)> {
    unreachable!()
}
