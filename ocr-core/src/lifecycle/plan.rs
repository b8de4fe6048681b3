//! The plan that makes a machine: steps in order, and their undo in reverse.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    journal::{Entry, Journal, Phase},
    wait::Waiter,
};
use crate::{
    ComputeBackend, ComputeBackendExt, Deletion, Error, ErrorKind, GuestExec, GuestExecExt, Owner, Result, Retry, Vm,
    VmFilter, VmState, error::seconds,
};

/// How long an undo may take; it has its own time, since it often begins when the create's is used up.
const UNDO_DEADLINE: Duration = Duration::from_secs(120);
/// How often a call whose outcome is unknown is repeated. All of them are idempotent.
const ATTEMPTS: u32 = 3;

/// What the steps work with.
#[derive(Clone, Debug)]
pub(super) struct Workshop {
    pub(super) compute: Arc<dyn ComputeBackend>,
    pub(super) guest: Option<Arc<dyn GuestExec>>,
    pub(super) journal: Journal,
    pub(super) waiter: Waiter,
    pub(super) owner: Owner,
    pub(super) ready_deadline: Duration,
    pub(super) ready_interval: Duration,
}

impl Workshop {
    /// Carries a create from its intent to a machine that is ready, or undoes it.
    pub(super) async fn make(&self, mut entry: Entry) -> Result<Vm> {
        let end = Instant::now() + self.ready_deadline;
        let failure = match self.steps(&mut entry, end).await {
            Ok(vm) => return Ok(vm),
            Err(failure) => failure,
        };
        tracing::info!(machine = %entry.key, error = %failure, "a create failed and is undone");
        match self.leave(&mut entry, &format!("its create failed: {failure}")).await {
            Ok(_) => Err(failure),
            Err(stuck) => {
                tracing::warn!(machine = %entry.key, error = ?stuck, "an undo failed; reconcile will try again");
                Err(failure.on(format!("{}; undoing it failed too and will be tried again", entry.key)))
            }
        }
    }

    async fn steps(&self, entry: &mut Entry, end: Instant) -> Result<Vm> {
        let made = self.make_machine(entry, end).await?;
        self.journal
            .advance(entry, |record| {
                record.id = Some(made.id);
                record.phase = Phase::Made;
            })
            .await
            .map_err(taken_away)?;
        let vm = self.await_running(&made, end).await?;
        self.await_guest(&vm, end).await?;
        self.journal.advance(entry, |record| record.phase = Phase::Ready).await.map_err(taken_away)?;
        // Read once more: addresses are often known only now.
        Ok(self.compute.find_vm(vm.id).await.ok().flatten().unwrap_or(vm))
    }

    async fn make_machine(&self, entry: &Entry, end: Instant) -> Result<Vm> {
        let spec = &entry.record.spec;
        let call = repeated(|| self.compute.create_vm(spec));
        tokio::time::timeout_at(end, call).await.unwrap_or_else(|_| {
            Err(Error::timed_out(format!("the backend did not accept the machine in {}", seconds(self.ready_deadline)))
                .during("compute.create_vm"))
        })
    }

    async fn await_running(&self, made: &Vm, end: Instant) -> Result<Vm> {
        loop {
            let seen = self
                .waiter
                .wait(made.id, end, |vm| match vm.map(|vm| &vm.state) {
                    Some(VmState::Failed(why)) => {
                        Err(Error::internal(format!("the backend could not build the machine: {why}"))
                            .during("lifecycle.create")
                            .on(format!("vm {}", made.id)))
                    }
                    Some(VmState::Running) | None => Ok(true),
                    Some(_) => Ok(false),
                })
                .await?;
            match seen {
                Some(vm) => return Ok(vm),
                // The look may be older than the machine; only asking for it by id proves that it is gone.
                None => match self.compute.find_vm(made.id).await? {
                    Some(vm) if vm.state == VmState::Running => return Ok(vm),
                    Some(_) => {}
                    None => {
                        return Err(Error::new(ErrorKind::Conflict, "the machine was deleted while it was built")
                            .during("lifecycle.create")
                            .on(format!("vm {}", made.id)));
                    }
                },
            }
        }
    }

    async fn await_guest(&self, vm: &Vm, end: Instant) -> Result<()> {
        let Some(guest) = &self.guest else { return Ok(()) };
        if !vm.has_agent_channel {
            return Ok(());
        }
        let left = end.saturating_duration_since(Instant::now());
        guest.wait_ready(vm.id, left, self.ready_interval).await.map(drop).map_err(|error| {
            if error.kind() == ErrorKind::TimedOut {
                return Error::timed_out(format!(
                    "the machine runs, but it was not ready within {}: {}",
                    seconds(self.ready_deadline),
                    error.message()
                ))
                .during("lifecycle.create")
                .on(format!("vm {}", vm.id));
            }
            error
        })
    }

    /// Takes a machine away, whatever became of it, and closes its record. The undo of every step, and delete.
    pub(super) async fn leave(&self, entry: &mut Entry, why: &str) -> Result<Deletion> {
        if !self.claim_leaving(entry, why).await? {
            // Somebody else has closed the record. What this create made in the meantime is still ours to remove.
            return self.remove(entry).await;
        }
        match self.remove(entry).await {
            Ok(deletion) => {
                self.journal.close(entry).await?;
                Ok(deletion)
            }
            Err(error) => {
                let text = error.to_string();
                let note = |record: &mut super::VmRecord| {
                    if let Phase::Leaving { stuck, .. } = &mut record.phase {
                        *stuck = Some(text);
                    }
                };
                // The note is for people; that the record stays is what counts.
                if let Err(unnoted) = self.journal.advance(entry, note).await {
                    tracing::debug!(machine = %entry.key, error = %unnoted, "the failure could not be noted");
                }
                Err(error)
            }
        }
    }

    /// Marks the record as leaving; `false` when it is no longer this request's.
    async fn claim_leaving(&self, entry: &mut Entry, why: &str) -> Result<bool> {
        loop {
            if matches!(entry.record.phase, Phase::Leaving { .. }) {
                return Ok(true);
            }
            let why = why.to_owned();
            match self.journal.advance(entry, |record| record.phase = Phase::Leaving { why, stuck: None }).await {
                Ok(()) => return Ok(true),
                // Moved by somebody else: each round sees a later record, and there are few moves in a record's life.
                Err(error) if error.kind() == ErrorKind::Conflict => match self.journal.read(&entry.key).await? {
                    Some(now) if now.record.request() == entry.record.request() => *entry = now,
                    _ => return Ok(false),
                },
                Err(error) => return Err(error),
            }
        }
    }

    async fn remove(&self, entry: &Entry) -> Result<Deletion> {
        let end = Instant::now() + UNDO_DEADLINE;
        let mut outcome = Deletion::AlreadyGone;
        let work = async {
            // By what the machines carry and not by the recorded id alone: the answer with the id may have been lost.
            let spec = &entry.record.spec;
            let filter = VmFilter {
                owner: Some(self.owner.clone()),
                scope: Some(spec.tags.scope.clone()),
                name: Some(spec.name.clone()),
            };
            let mut ids: Vec<_> = repeated(|| self.compute.list_vms(&filter))
                .await?
                .into_iter()
                .filter(|vm| vm.is_made_by(entry.record.request()))
                .map(|vm| vm.id)
                .collect();
            ids.extend(entry.record.id.filter(|id| !ids.contains(id)));
            for id in ids {
                if repeated(|| self.compute.delete_vm(id)).await? == Deletion::Deleted {
                    outcome = Deletion::Deleted;
                }
                self.waiter.wait(id, end, |vm| Ok(vm.is_none())).await?;
            }
            Ok(())
        };
        tokio::time::timeout_at(end, work).await.unwrap_or_else(|_| {
            Err(Error::timed_out(format!("the machine was not gone in {}", seconds(UNDO_DEADLINE)))
                .during("lifecycle.delete"))
        })?;
        Ok(outcome)
    }
}

/// A record that moved under a running create was moved by a delete.
fn taken_away(error: Error) -> Error {
    if error.kind() == ErrorKind::Conflict {
        return Error::new(ErrorKind::Conflict, "the machine was deleted while it was created")
            .during("lifecycle.create");
    }
    error
}

/// Repeats an idempotent call a few times while its error says that this may help.
pub(super) async fn repeated<T, F>(call: impl Fn() -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let mut pause = Duration::from_millis(50);
    for _ in 1..ATTEMPTS {
        match call().await {
            Err(error) if error.retry() != Retry::Never => {
                tracing::debug!(%error, "repeating a call");
                tokio::time::sleep(pause).await;
                pause *= 4;
            }
            outcome => return outcome,
        }
    }
    call().await
}
