//! Finishes or undoes what a killed server left, and forgets machines that are gone.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, stream};

use super::{
    Inner, RecoverReport,
    condition::Ended,
    record::{Record, Stage},
    remove::{Removal, Removed},
};
use crate::{Error, InstallId, Key, Result, VmFilter, VmId, fleet::Gone};

/// How many machines are worked on at once.
const AT_ONCE: usize = 16;
/// What listing all machines may take.
const LIST_LIMIT: Duration = Duration::from_secs(120);
/// What asking an agent may take.
const PROBE_LIMIT: Duration = Duration::from_secs(30);

impl Inner {
    pub(super) async fn recover(self: &Arc<Self>) -> Result<RecoverReport> {
        let mut report = RecoverReport::default();
        let listed = tokio::time::timeout(LIST_LIMIT, self.compute.list_vms(&VmFilter::default())).await;
        let known: Option<HashSet<VmId>> = match listed {
            Ok(Ok(machines)) => Some(machines.into_iter().map(|vm| vm.id).collect()),
            failed => {
                let why = match &failed {
                    Ok(Err(error)) => error.message(),
                    _ => "no answer in time",
                };
                report.failed.push(format!("machines could not be listed, so no complete install is forgotten: {why}"));
                None
            }
        };
        let mut after: Option<Key> = None;
        loop {
            let (page, next) = self.records.page(after.as_ref()).await?;
            let mut by_vm: HashMap<VmId, Vec<Record>> = HashMap::new();
            for read in page {
                match read {
                    Ok(stored) => by_vm.entry(stored.record.vm).or_default().push(stored.record),
                    Err(error) => report.failed.push(error.to_string()),
                }
            }
            let mut machines = Vec::new();
            for (vm, mut records) in by_vm {
                let there = known.as_ref().is_none_or(|known| known.contains(&vm));
                let mut elsewhere = HashSet::new();
                for record in records.iter().filter(|record| record.stage != Stage::Installed) {
                    if self.is_worked_on_elsewhere(record).await? {
                        elsewhere.insert(record.id);
                    }
                }
                // What this process works on is no leftover; what is whole, on a machine that is there, needs nothing.
                records.retain(|record| {
                    let whole = there && record.stage == Stage::Installed;
                    !whole && !self.is_active(record.id) && !elsewhere.contains(&record.id)
                });
                if !records.is_empty() {
                    machines.push((vm, there, records));
                }
            }
            let mut reports = stream::iter(machines)
                .map(|(vm, there, records)| self.clone().recover_machine(vm, there, records))
                .buffer_unordered(AT_ONCE);
            while let Some(part) = reports.next().await {
                report.undone.extend(part.undone);
                report.forgotten.extend(part.forgotten);
                report.failed.extend(part.failed);
            }
            match next {
                Some(_) => after = next,
                None => break,
            }
        }
        self.sweep_index().await?;
        if let Some(fleet) = &self.fleet {
            fleet.sweep().await?;
        }
        if report != RecoverReport::default() {
            tracing::info!(
                undone = report.undone.len(),
                forgotten = report.forgotten.len(),
                failed = report.failed.len(),
                "recovered"
            );
        }
        Ok(report)
    }

    async fn recover_machine(self: Arc<Self>, vm: VmId, there: bool, records: Vec<Record>) -> RecoverReport {
        let mut report = RecoverReport::default();
        if !there {
            match self.is_surely_gone(vm).await {
                Ok(false) => {}
                Ok(true) => {
                    match self.forget(vm).await {
                        Ok(forgotten) => report.forgotten.extend(forgotten),
                        Err(error) => report.failed.push(format!("vm {vm} is gone: {}", error.message())),
                    }
                    // Those that its own keys did not name.
                    for record in records {
                        match self.records.delete(vm, record.id).await {
                            Ok(crate::Deletion::Deleted) => report.forgotten.push(record.id),
                            Ok(crate::Deletion::AlreadyGone) => {}
                            Err(error) => report.failed.push(format!("install {}: {}", record.id, error.message())),
                        }
                    }
                    return report;
                }
                Err(why) => report.failed.push(why),
            }
        }
        for record in records.into_iter().filter(|record| record.stage != Stage::Installed) {
            let removal = Removal::undo(&self, record.id, vm, None);
            match self.clone().run_removal(removal, Duration::ZERO, &self.closing).await {
                Ok(Removed::Done) => report.undone.push(record.id),
                Ok(Removed::Forgotten) => report.forgotten.push(record.id),
                Ok(Removed::Absent | Removed::Kept) => {}
                Err(error) => report.failed.push(format!("install {} on vm {vm}: {}", record.id, error.message())),
            }
        }
        report
    }

    /// Whether another process, which lives, is at work on an install or its removal.
    pub(super) async fn is_worked_on_elsewhere(&self, record: &Record) -> Result<bool> {
        match (&self.fleet, record.member) {
            (Some(fleet), Some(member)) if fleet.member() != Some(member) => fleet.is_living(member).await,
            _ => Ok(false),
        }
    }

    /// Whether a machine that was not in the list is gone. A guest that answers says that the list is another cloud's:
    /// wrong credentials must not cost every record.
    async fn is_surely_gone(self: &Arc<Self>, vm: VmId) -> Result<bool, String> {
        if !self.is_gone(vm).await {
            return Ok(false);
        }
        let inner = self.clone();
        let _need = self.need(vm);
        let what = format!("look whether {vm} is gone");
        let answered = self
            .scheduler
            .run_once(vm, what, PROBE_LIMIT, async move { Ok(inner.guest.guest_info(vm).await.is_ok()) })
            .await;
        match answered {
            Ok(true) => Err(format!("vm {vm} is unknown to the compute backend, but its guest agent answers; kept")),
            _ => Ok(true),
        }
    }

    /// Drops all records of a machine and ends its watches.
    pub(super) async fn forget(&self, vm: VmId) -> Result<Vec<InstallId>> {
        let mut forgotten = Vec::new();
        let mut failed: Option<Error> = None;
        for id in self.records.ids_of(vm).await? {
            match self.records.delete(vm, id).await {
                Ok(crate::Deletion::Deleted) => forgotten.push(id),
                Ok(crate::Deletion::AlreadyGone) => {}
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        // After the records: a watch that begins meanwhile either finds no record or is ended here.
        self.end_watches(Some(vm), Ended::MachineGone);
        if let Some(fleet) = &self.fleet {
            fleet.announce(Gone::Vm(vm));
        }
        failed.map_or(Ok(forgotten), Err)
    }

    /// Drops machines' keys without a record, which a kill between two writes leaves.
    async fn sweep_index(&self) -> Result<()> {
        let mut after: Option<Key> = None;
        loop {
            let (page, next) = self.records.index_page(after.as_ref()).await?;
            for (vm, id) in page {
                if matches!(self.records.get(id).await, Ok(None)) {
                    self.records.delete_index(vm, id).await?;
                }
            }
            match next {
                Some(_) => after = next,
                None => return Ok(()),
            }
        }
    }
}
