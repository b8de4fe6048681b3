//! Removes installs: those that users want gone, and those that never were complete.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sha2::{Digest, Sha256};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::{
    Inner,
    hold::Hold,
    install::{STORE_PATIENCE, command_failed},
    record::{Record, Stage, StoredAsset},
    turns::{Slot, Turn, Verdict, is_elsewhere},
};
use crate::{Error, ErrorKind, ExecRequest, InstallId, OperationId, RemoveFiles, Result, Retry, VmId, error::reason};

/// What a turn may take beside the delete action, to remove files and to compare them.
const TURN_MARGIN: Duration = Duration::from_secs(300);

/// How a removal ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Removed {
    /// Assets and record are gone.
    Done,
    /// The machine was gone, so the record went too.
    Forgotten,
    /// There was no record.
    Absent,
    /// It is completely installed, and was to be undone only if it was not.
    Kept,
}

/// A removal on its way, shared between its owner and its turns like an install.
pub(super) struct Removal {
    inner: Arc<Inner>,
    begun: Arc<AtomicBool>,
    id: InstallId,
    vm: VmId,
    /// Also what is completely installed.
    also_installed: bool,
    hold: Option<Hold>,
    /// One for all turns, so that the delete action runs once.
    operation: OperationId,
    deleted: bool,
}

impl Removal {
    /// Takes an install back unless it is complete. `hold` is the install's own, which keeps the machine meanwhile.
    pub(super) fn undo(inner: &Arc<Inner>, id: InstallId, vm: VmId, hold: Option<Hold>) -> Self {
        Self {
            inner: inner.clone(),
            begun: Arc::new(AtomicBool::new(hold.is_some())),
            id,
            vm,
            also_installed: false,
            hold,
            operation: OperationId::random(),
            deleted: false,
        }
    }

    /// Removes an install in whatever stage.
    pub(super) fn remove(inner: &Arc<Inner>, id: InstallId, vm: VmId) -> Self {
        Self { also_installed: true, ..Self::undo(inner, id, vm, None) }
    }

    async fn turn(&mut self) -> Turn<Removed> {
        if self.hold.is_none() {
            match self.inner.holds.take(self.vm) {
                Ok(hold) => self.hold = Some(hold),
                Err(held) => return Turn::Held(held),
            }
        }
        let turn = self.steps().await;
        if !self.begun.load(Ordering::Acquire) {
            self.hold = None;
        }
        turn
    }

    async fn steps(&mut self) -> Turn<Removed> {
        let (inner, vm) = (self.inner.clone(), self.vm);
        let mut stored = match inner.records.get(self.id).await {
            Ok(Some(stored)) => stored,
            Ok(None) => return self.drop_record(Removed::Absent).await,
            Err(error) => return Turn::Failed(error),
        };
        if stored.record.stage == Stage::Installed && !self.also_installed {
            return Turn::Done(Removed::Kept);
        }
        if !stored.record.touches_guest() {
            return self.drop_record(Removed::Done).await;
        }
        if let Err(error) = inner.guest.guest_info(vm).await {
            return self.refused(error).await;
        }

        self.begun.store(true, Ordering::Release);
        if stored.record.stage == Stage::Installed
            && let Err(error) = inner.records.advance(&mut stored, Stage::Removing, STORE_PATIENCE).await
        {
            return if is_elsewhere(&error) { Turn::NotYet(error) } else { Turn::Failed(error) };
        }
        if stored.record.stage == Stage::Removing
            && !self.deleted
            && let Some(line) = stored.record.delete_action.clone()
        {
            let request = ExecRequest {
                operation: self.operation,
                user: stored.record.user.clone(),
                deadline: inner.config.action_deadline,
                output_limit_bytes: inner.guest.capabilities().max_output_bytes.min(1 << 20),
                ..ExecRequest::shell(line)
            };
            match inner.guest.exec(vm, &request).await {
                Ok(output) if output.success() => self.deleted = true,
                Ok(output) => {
                    let error = command_failed("the package's delete action", &output);
                    // Nothing was taken away: it is as installed as before, and the call can be made again.
                    if let Err(kept) = inner.records.advance(&mut stored, Stage::Installed, STORE_PATIENCE).await {
                        tracing::warn!(id = %self.id, error = %kept, "a failed removal stays recorded as begun");
                    }
                    return Turn::Failed(error);
                }
                Err(error) => return self.refused(error).await,
            }
        }
        match inner.clear(&stored.record).await {
            Ok(()) => self.drop_record(Removed::Done).await,
            Err(error) => self.refused(error).await,
        }
    }

    async fn drop_record(&self, removed: Removed) -> Turn<Removed> {
        match self.inner.records.delete(self.vm, self.id).await {
            Ok(_) => Turn::Done(removed),
            Err(error) => Turn::Failed(error),
        }
    }

    async fn refused(&self, error: Error) -> Turn<Removed> {
        match self.inner.judge(self.vm, error).await {
            Verdict::Gone => self.drop_record(Removed::Forgotten).await,
            Verdict::NotYet(error) => Turn::NotYet(error),
            Verdict::Final(error) => Turn::Failed(error),
        }
    }
}

impl Inner {
    /// Brings a removal to its turn, and waits for its guest for at most `patience`.
    pub(super) async fn run_removal(
        self: Arc<Self>,
        removal: Removal,
        patience: Duration,
        caller: &CancellationToken,
    ) -> Result<Removed> {
        let (id, vm, begun) = (removal.id, removal.vm, removal.begun.clone());
        let limit = self.config.action_deadline.saturating_add(TURN_MARGIN);
        let slot = Slot { vm, what: format!("remove {id}"), limit, patience };
        let removal = Arc::new(Mutex::new(removal));
        let outcome = self
            .turns(
                slot,
                caller,
                || begun.load(Ordering::Acquire),
                || {
                    let removal = removal.clone();
                    Box::pin(async move { removal.lock().await.turn().await })
                },
            )
            .await;
        match outcome {
            // An agent that does not answer may belong to a machine that is gone.
            Err(error)
                if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Unavailable) && self.is_gone(vm).await =>
            {
                self.records.delete(vm, id).await.map(|_| Removed::Forgotten)
            }
            other => other,
        }
    }

    /// Removes a record's assets from its guest: the last one first, none that another install has too. With them goes
    /// what an interrupted copy left beside its target, even when no asset got as far as to have its name.
    async fn clear(&self, record: &Record) -> Result<()> {
        if record.assets.is_empty() {
            return Ok(());
        }
        if record.stage == Stage::Copying {
            // Under our token: lets a copy that a killed process had under way end, and refuses one that has not begun. Only
            // then is what is there the last word.
            self.guest.remove_files(record.vm, &RemoveFiles::default()).await?;
        }
        let shared = self.paths_of_others(record).await?;
        let mut request = RemoveFiles::default();
        for asset in record.assets.iter().rev().filter(|asset| !shared.contains(&asset.path)) {
            let ours = record.stage != Stage::Copying || self.is_ours(record.vm, asset).await?;
            if ours && !request.paths.contains(&asset.path) {
                request.paths.push(asset.path.clone());
            }
        }
        let mut failed = None;
        let outcomes = self.guest.remove_files(record.vm, &request).await?;
        for (path, outcome) in request.paths.iter().zip(outcomes) {
            match outcome {
                Ok(_) => {}
                // No parent folder either.
                Err(error) if error.kind() == ErrorKind::NotFound && error.reason() != Some(reason::GUEST_GONE) => {}
                // Nothing but a folder is refused like this, and a folder is never ours.
                Err(error)
                    if matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Conflict) && error.reason().is_none() =>
                {
                    tracing::debug!(id = %record.id, path, %error, "not a file; left alone");
                }
                Err(error) if error.reason().is_some() || error.retry() != Retry::Never => return Err(error),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Whether the guest's file is the asset's. While copying, an asset that was never written must not cost the guest
    /// a file of its own: it has that one whole, or ours whole.
    async fn is_ours(&self, vm: VmId, asset: &StoredAsset) -> Result<bool> {
        match self.guest.get_file(vm, &asset.path, asset.bytes).await {
            Ok(content) => Ok(hex(&Sha256::digest(&content)) == asset.sha256),
            Err(error) if error.kind() == ErrorKind::Exhausted => Ok(false),
            // A folder, or something else that is no file.
            Err(error)
                if matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Conflict) && error.reason().is_none() =>
            {
                Ok(false)
            }
            Err(error) if error.kind() == ErrorKind::NotFound && error.reason() != Some(reason::GUEST_GONE) => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    async fn paths_of_others(&self, record: &Record) -> Result<HashSet<String>> {
        let others = self.records.of_vm(record.vm).await?;
        Ok(others
            .into_iter()
            .filter(|other| other.record.id != record.id && has_assets(other.record.stage))
            .flat_map(|other| other.record.assets)
            .map(|asset| asset.path)
            .collect())
    }
}

/// Whether an install's assets are all there, and wanted. One that still copies writes its own again if need be.
fn has_assets(stage: Stage) -> bool {
    matches!(stage, Stage::Acting | Stage::Installed)
}

/// Lower-case hex.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
