//! After a kill, and every now and then: make what is there and what is recorded the same again.

use std::{collections::HashSet, time::Duration};

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{Deployer, journal::Phase, plan::repeated};
use crate::{ComputeBackendExt, Result, VmFilter, VmId};

/// What a reconcile did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReconcileReport {
    /// Unfinished creates and deletes that were undone or finished, as `scope/name: why`.
    pub ended: Vec<String>,
    /// Machines with our tag that no record owned, deleted.
    pub swept: Vec<VmId>,
    /// Records whose machine somebody else had deleted, removed.
    pub forgotten: Vec<String>,
    /// What could not be done now, and why. The next reconcile tries again.
    pub failed: Vec<String>,
}

impl ReconcileReport {
    /// Whether there was nothing to do.
    pub fn is_clean(&self) -> bool {
        *self == Self::default()
    }
}

impl Deployer {
    /// Ends every unfinished plan, deletes machines of ours that no record owns, forgets what is gone.
    ///
    /// A create that was cut off is undone: its client has had no answer and will not get one. Work under way in this
    /// process is left alone. Several reconciles may run at once. **The journal must belong to this process alone**:
    /// another process's creates would look cut off.
    ///
    /// # Errors
    /// Those of store and backend when they cannot even be read; what fails later is in the report.
    pub async fn reconcile(&self) -> Result<ReconcileReport> {
        let mut report = ReconcileReport::default();
        let inner = &self.inner;
        // Machines first, records after: a machine that is seen had its intent written before, so a missing record
        // proves that it was closed, never that it is not written yet.
        let filter = VmFilter::owned_by(&inner.config.owner);
        let machines = repeated(|| inner.parts.compute.list_vms(&filter)).await?;
        let entries = inner.workshop.journal.all(inner.config.owner.as_str()).await?;

        let requests: HashSet<_> = entries.iter().map(|entry| entry.record.request().clone()).collect();
        let present: HashSet<_> = machines.iter().map(|vm| vm.id).collect();
        for entry in entries {
            let what = format!("{}/{}", entry.record.spec.tags.scope, entry.record.spec.name);
            if self.is_busy(&entry.key) || inner.workshop.journal.read(&entry.key).await? != Some(entry.clone()) {
                // Under way, or ended by this process since the records were read.
                continue;
            }
            let outcome = match (&entry.record.phase, entry.record.id) {
                (Phase::Ready, Some(id)) if present.contains(&id) => continue,
                (Phase::Ready, Some(id)) => match inner.parts.compute.find_vm(id).await {
                    Ok(Some(_)) => continue,
                    Ok(None) => {
                        inner.workshop.journal.close(&entry).await.map(|()| report.forgotten.push(what.clone()))
                    }
                    Err(error) => Err(error),
                },
                (phase, _) => {
                    let why = match phase {
                        Phase::Leaving { why, .. } => why.clone(),
                        phase => format!("cut off in phase {phase}"),
                    };
                    self.start_delete(entry).await.map(|_| report.ended.push(format!("{what}: {why}")))
                }
            };
            if let Err(error) = outcome {
                report.failed.push(format!("{what}: {error}"));
            }
        }
        for vm in machines {
            let owned = vm.tags.as_ref().is_some_and(|tags| requests.contains(&tags.request));
            if owned {
                continue;
            }
            match self.delete(vm.id).await {
                Ok(_) => report.swept.push(vm.id),
                Err(error) => report.failed.push(format!("vm {}: {error}", vm.id)),
            }
        }
        Ok(report)
    }

    /// Reconciles every `interval` until it is told to stop. Run it as a task that the server owns.
    pub async fn maintain(self, interval: Duration, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(interval) => {}
            }
            match self.reconcile().await {
                Ok(report) if report.is_clean() => {}
                Ok(report) => tracing::warn!(
                    ended = ?report.ended, swept = ?report.swept, forgotten = ?report.forgotten, failed = ?report.failed,
                    "reconcile found work"
                ),
                Err(error) => tracing::warn!(%error, "reconcile could not look"),
            }
        }
    }
}
