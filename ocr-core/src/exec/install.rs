//! Installs: intent, assets, action, reboot, record.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::{
    Inner, Installed,
    hold::Hold,
    output::{cut, cut_for_error},
    plan::{Plan, PlannedFile},
    reboot::BootMark,
    record::{Record, Stage, Stored},
    remove::{Removal, Removed},
    turns::{Slot, Turn, Verdict, gone, is_elsewhere},
};
use crate::{Error, ErrorKind, ExecOutput, ExecRequest, PutFiles, Result, Retry, error::reason};

/// How much of an action's output is fetched at least, so that an error can show its end, in bytes.
const FETCHED_BYTES: u64 = 1 << 20;
/// What a turn may take beside its copying and its action.
const TURN_MARGIN: Duration = Duration::from_secs(120);
/// A guest that takes files slower than this is broken, in bytes a second.
const LEAST_COPY_RATE: u64 = 64 << 10;
/// So much of a package is in memory while it is copied, or one asset if that is larger, in bytes.
const BATCH_BYTES: u64 = 32 << 20;
/// How long the store may be away when a stage is recorded.
pub(super) const STORE_PATIENCE: Duration = Duration::from_secs(10);

/// An install on its way. It is shared between the task that owns it and its turns in the queue, which never overlap.
struct Job {
    inner: Arc<Inner>,
    caller: CancellationToken,
    begun: Arc<AtomicBool>,
    record: Record,
    files: Vec<PlannedFile>,
    action: Option<ExecRequest>,
    restarts: bool,

    hold: Option<Hold>,
    stored: Option<Stored>,
    written: usize,
    /// The action may have run.
    acted: bool,
    output: Option<ExecOutput>,
    boot: Option<BootMark>,
}

impl Inner {
    /// Installs what the plan says and records it; or leaves nothing, but for a record of what could not be undone yet.
    pub(super) async fn install(
        self: Arc<Self>,
        record: Record,
        plan: Plan,
        caller: CancellationToken,
    ) -> Result<Installed> {
        self.check_sizes(&plan)?;
        let _active = self.activate(record.id);
        // For the reboot and the undoing too.
        let _need = self.need(record.vm);
        let slot = Slot {
            vm: record.vm,
            what: format!("{} {}", record.kind(), record.id),
            limit: self.turn_limit(plan.files.iter().map(|file| file.stored.bytes).sum(), plan.files.len()),
            patience: self.config.ready_deadline,
        };
        let begun = Arc::new(AtomicBool::new(false));
        let job = Arc::new(Mutex::new(Job {
            inner: self.clone(),
            caller: caller.clone(),
            begun: begun.clone(),
            files: plan.files,
            action: plan.action.map(|line| self.action_request(&record, line, plan.environment)),
            restarts: plan.restarts,
            hold: None,
            stored: None,
            written: 0,
            acted: false,
            output: None,
            boot: None,
            record: record.clone(),
        }));

        let outcome = loop {
            let outcome = self
                .turns(
                    slot.clone(),
                    &caller,
                    || begun.load(Ordering::Acquire),
                    || {
                        let job = job.clone();
                        Box::pin(async move { job.lock().await.turn().await })
                    },
                )
                .await;
            // What was copied under a session that has ended since may have been taken away with another install.
            if outcome.is_ok() && job.lock().await.is_outdated() {
                continue;
            }
            break outcome;
        };
        // No turn runs any more; this lock is free.
        let mut job = job.lock().await;
        let outcome = match outcome {
            Ok(()) => job.finish().await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => {}
            Err(error) if begun.load(Ordering::Acquire) => job.settle(error).await?,
            Err(error) => return Err(error),
        }
        let limit = self.config.reply_output_bytes;
        let (stdout, stderr) = job.output.as_ref().map_or_else(Default::default, |output| {
            (cut(&output.stdout, output.stdout_truncated, limit), cut(&output.stderr, output.stderr_truncated, limit))
        });
        tracing::info!(id = %record.id, vm = %record.vm, kind = %record.kind(), name = %record.name, "installed");
        Ok(Installed { id: record.id, stdout, stderr })
    }

    /// Records an install that has nothing to do in the guest.
    pub(super) async fn install_record(&self, record: Record) -> Result<Installed> {
        let _active = self.activate(record.id);
        let id = record.id;
        let recorded = match self.records.create(&record).await {
            Ok(mut stored) => self
                .records
                .advance(&mut stored, Stage::Installed, STORE_PATIENCE)
                .await
                .map_err(|error| (stored, error)),
            Err(error) => Err((Stored { record, version: crate::Version(0) }, error)),
        };
        if let Err((stored, error)) = recorded {
            // A write whose answer was lost may have succeeded.
            if let Ok(Some(seen)) = self.records.get(id).await
                && seen.record.stage == Stage::Installed
            {
                return Ok(Installed { id, stdout: String::new(), stderr: String::new() });
            }
            if let Err(kept) = self.records.delete(stored.record.vm, id).await {
                tracing::warn!(%id, error = %kept, "a condition that was not created stays recorded until recovery");
            }
            return Err(error);
        }
        Ok(Installed { id, stdout: String::new(), stderr: String::new() })
    }

    fn check_sizes(&self, plan: &Plan) -> Result<()> {
        let most = self.guest.capabilities().max_file_bytes;
        match plan.files.iter().map(|file| &file.stored).find(|asset| asset.bytes > most) {
            None => Ok(()),
            Some(asset) => Err(Error::invalid(
                "assets",
                format_args!(
                    "{} has {} bytes; files of at most {most} bytes can be copied into this guest",
                    crate::id::shown(&asset.path),
                    asset.bytes
                ),
            )),
        }
    }

    fn turn_limit(&self, bytes: u64, files: usize) -> Duration {
        let copying = Duration::from_secs(bytes / LEAST_COPY_RATE) + Duration::from_secs(5 * files as u64);
        self.config.action_deadline.saturating_add(TURN_MARGIN + copying)
    }

    fn action_request(
        &self,
        record: &Record,
        line: String,
        environment: std::collections::BTreeMap<String, String>,
    ) -> ExecRequest {
        let kept = FETCHED_BYTES.max(self.config.reply_output_bytes as u64);
        ExecRequest {
            user: record.user.clone(),
            environment,
            deadline: self.config.action_deadline,
            output_limit_bytes: kept.min(self.guest.capabilities().max_output_bytes),
            ..ExecRequest::shell(line)
        }
    }

    /// What a turn comes to whose guest call was refused.
    pub(super) async fn refused<T>(&self, vm: crate::VmId, error: Error) -> Turn<T> {
        match self.judge(vm, error).await {
            Verdict::Gone => Turn::Failed(gone(vm)),
            Verdict::NotYet(error) => Turn::NotYet(error),
            Verdict::Final(error) => Turn::Failed(error),
        }
    }
}

impl Job {
    async fn turn(&mut self) -> Turn<()> {
        if self.hold.is_none() {
            match self.inner.holds.take(self.record.vm) {
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

    /// Each step is remembered, so that the next turn carries on where the guest stopped answering.
    async fn steps(&mut self) -> Turn<()> {
        let (inner, vm) = (self.inner.clone(), self.record.vm);
        let info = match inner.guest.guest_info(vm).await {
            Ok(info) => info,
            Err(error) => return inner.refused(vm, error).await,
        };
        let cannot = match () {
            () if !self.files.is_empty() && !info.can_files => Some("copying files"),
            () if self.action.is_some() && !info.can_exec => Some("running commands"),
            () => None,
        };
        if let Some(cannot) = cannot {
            return Turn::Failed(
                Error::unsupported(format!("the guest agent's configuration forbids {cannot}"))
                    .with_reason(reason::AGENT_COMMAND_DISABLED),
            );
        }

        if self.stored.is_none() {
            if self.caller.is_cancelled() {
                return Turn::Failed(Error::unavailable("the request was given up before it began"));
            }
            // Set before the write: one whose answer is lost may have succeeded.
            self.begun.store(true, Ordering::Release);
            match inner.records.create(&self.record).await {
                Ok(stored) => self.stored = Some(stored),
                Err(error) if is_elsewhere(&error) => {
                    self.begun.store(false, Ordering::Release);
                    return Turn::NotYet(error);
                }
                Err(error) => return Turn::Failed(error),
            }
        }
        if let Some(stored) = &mut self.stored
            && inner.records.is_of_another_session(&stored.record)
        {
            // The session ended under which it began. Another process may have taken it for abandoned and undone it; if
            // not, the record now says that it is being worked on.
            let stage = stored.record.stage;
            match inner.records.advance(stored, stage, STORE_PATIENCE).await {
                // What others removed meanwhile may have been assets of this one too.
                Ok(()) if !self.acted => self.written = 0,
                Ok(()) => {}
                Err(error) if is_elsewhere(&error) => return Turn::NotYet(error),
                Err(error) => return Turn::Failed(error),
            }
        }
        while self.written < self.files.len() {
            let (request, next) = match self.batch().await {
                Ok(batch) => batch,
                Err(error) => return Turn::Failed(error),
            };
            match inner.guest.put_files(vm, &request).await {
                Ok(()) => self.written = next,
                Err(error) => return inner.refused(vm, error).await,
            }
        }
        if let Some(action) = &self.action
            && self.output.is_none()
        {
            if let Some(stored) = &mut self.stored
                && stored.record.stage == Stage::Copying
                && let Err(error) = inner.records.advance(stored, Stage::Acting, STORE_PATIENCE).await
            {
                return if is_elsewhere(&error) { Turn::NotYet(error) } else { Turn::Failed(error) };
            }
            // The record may have been written across an outage, and the session with it be over.
            if let Some(fleet) = &inner.fleet
                && let Err(error) = fleet.permit(vm)
            {
                return Turn::NotYet(error);
            }
            self.acted = true;
            // The same operation id in every turn: an action that ran while the agent was away is not run again.
            match inner.guest.exec(vm, action).await {
                Ok(output) if output.success() => self.output = Some(output),
                Ok(output) => return Turn::Failed(self.action_failed(&output)),
                // One that is safe to repeat did not begin.
                Err(error) if error.kind() == ErrorKind::TimedOut && error.retry() != Retry::Safe => {
                    return Turn::Failed(
                        Error::timed_out(format!("{}; {}", self.of_package("the action"), error.message()))
                            .with_retry(Retry::Never)
                            .with_source(error),
                    );
                }
                Err(error) => return inner.refused(vm, error).await,
            }
        }
        if self.restarts && self.boot.is_none() {
            match inner.boot_mark(vm).await {
                Ok(mark) => self.boot = Some(mark),
                Err(error) => return inner.refused(vm, error).await,
            }
        }
        Turn::Done(())
    }

    /// The next files to copy, and the place after them: all of a package, unless it is too large to be held at once.
    async fn batch(&self) -> Result<(PutFiles, usize)> {
        let (mut request, mut bytes, mut next) = (PutFiles::default(), 0, self.written);
        while let Some(file) = self.files.get(next) {
            bytes += file.stored.bytes;
            if bytes > BATCH_BYTES && !request.files.is_empty() {
                break;
            }
            next += 1;
            // Of several assets for one place the last one counts.
            if !self.files[next..].iter().any(|later| later.stored.path == file.stored.path) {
                request.files.push(file.read().await?);
            }
        }
        Ok((request, next))
    }

    /// Whether its assets are to be looked after once more.
    fn is_outdated(&self) -> bool {
        let of_another = |stored: &Stored| self.inner.records.is_of_another_session(&stored.record);
        !self.acted && !self.files.is_empty() && self.stored.as_ref().is_some_and(of_another)
    }

    /// What comes after the queue: the reboot, and the record that says "installed".
    async fn finish(&mut self) -> Result<()> {
        if let Some(before) = self.boot.take() {
            self.inner.reboot(self.record.vm, before).await?;
        }
        match &mut self.stored {
            Some(stored) => self.inner.records.advance(stored, Stage::Installed, STORE_PATIENCE).await,
            None => Err(Error::internal("an install without a record")),
        }
    }

    /// After a failure: nothing stays, or a record of what stays.
    async fn settle(&mut self, error: Error) -> Result<()> {
        let (id, vm) = (self.record.id, self.record.vm);
        // A guest that has just not answered for as long as is allowed is not waited for again.
        let patience = match error.kind() {
            ErrorKind::TimedOut if error.retry() == Retry::Safe => Duration::ZERO,
            _ => self.inner.config.ready_deadline,
        };
        let removal = Removal::undo(&self.inner, id, vm, self.hold.take());
        match self.inner.clone().run_removal(removal, patience, &CancellationToken::new()).await {
            Ok(Removed::Kept) => Ok(()),
            Ok(Removed::Done | Removed::Forgotten | Removed::Absent) => Err(error),
            Err(undo) => {
                tracing::warn!(%id, %vm, error = %undo, "a failed install could not be undone now; recovery will");
                let text = format!(
                    "{}; what was copied could not be removed now and stays recorded for recovery: {}",
                    error.message(),
                    undo.message()
                );
                let told = Error::new(error.kind(), text).with_retry(error.retry());
                let told = match error.reason() {
                    Some(reason) => told.with_reason(reason),
                    None => told,
                };
                Err(told.with_source(error))
            }
        }
    }

    fn of_package(&self, what: &str) -> String {
        match &self.record.package {
            Some(package) => format!("{what} of package {} {}", package.name, package.version),
            None => what.to_owned(),
        }
    }

    fn action_failed(&self, output: &ExecOutput) -> Error {
        command_failed(&self.of_package("the action"), output)
    }
}

/// The error of a command that ended with an exit code other than 0.
pub(super) fn command_failed(what: &str, output: &ExecOutput) -> Error {
    let part = |name: &str, bytes: &[u8], truncated: bool| match cut_for_error(bytes, truncated) {
        text if text.is_empty() => format!("{name} is empty"),
        text => format!("{name}: {text}"),
    };
    Error::new(
        ErrorKind::Conflict,
        format!(
            "{what} ended with exit code {}; {}; {}",
            output.exit_code,
            part("stderr", &output.stderr, output.stderr_truncated),
            part("stdout", &output.stdout, output.stdout_truncated)
        ),
    )
    .with_reason(reason::COMMAND_FAILED)
}
