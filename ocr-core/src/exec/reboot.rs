//! Reboots a guest and waits until it has really come back.

use std::{sync::Arc, time::Duration};

use super::{
    Inner,
    turns::{Verdict, Wait, gone},
};
use crate::{Command, Error, ErrorKind, ExecRequest, OsFamily, PowerAction, Result, Retry, VmId};

/// How long a guest may take to shut down by itself before it is reset.
const GRACE: Duration = Duration::from_secs(60);
/// What asking the agent may take.
const PROBE_LIMIT: Duration = Duration::from_secs(30);

/// Tells one boot of a guest from the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BootMark(Option<String>);

impl Inner {
    /// Reads the mark of the guest's present boot. A guest without such a mark gives an empty one.
    pub(super) async fn boot_mark(&self, vm: VmId) -> Result<BootMark> {
        if self.guest.guest_info(vm).await?.os_family != OsFamily::Linux {
            return Ok(BootMark(None));
        }
        let request = ExecRequest {
            deadline: Duration::from_secs(10),
            output_limit_bytes: 128,
            ..ExecRequest::new(Command::Argv(vec!["cat".to_owned(), "/proc/sys/kernel/random/boot_id".to_owned()]))
        };
        let output = self.guest.exec(vm, &request).await?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Ok(BootMark((output.success() && !text.is_empty()).then_some(text)))
    }

    /// Reboots the machine and waits until its agent answers from the new boot.
    ///
    /// The caller holds the machine. The wait itself is outside of the queue; each look at the guest is a turn of its
    /// own, so that a hundred machines that reboot at once neither keep a hundred permits nor pass by the limit.
    ///
    /// An agent answers for a while after it was told to go down, so an answer alone proves nothing: the boot's mark
    /// must have changed. Where a guest has none, the agent must have been seen silent, or the grace after which the
    /// backend pulls the plug must have passed.
    pub(super) async fn reboot(self: &Arc<Self>, vm: VmId, before: BootMark) -> Result<()> {
        let _need = self.need(vm);
        self.ask_for_reboot(vm).await?;
        let forced = tokio::time::Instant::now() + GRACE;
        let mut wait = Wait::new(self.config.ready_interval, self.config.ready_deadline);
        let mut seen_silent = false;
        loop {
            let not_yet = match self.boot_mark_in_turn(vm).await {
                Ok(Ok(now)) => match (&before.0, now.0) {
                    (Some(before), Some(now)) if *before != now => return Ok(()),
                    (Some(_), Some(_)) => Error::unavailable("the agent still answers from before the reboot"),
                    _ if seen_silent || tokio::time::Instant::now() >= forced => return Ok(()),
                    _ => Error::unavailable("the agent answers, and its guest does not tell from which boot"),
                },
                Ok(Err(error)) => {
                    seen_silent = true;
                    match self.judge(vm, error).await {
                        Verdict::Gone => return Err(gone(vm)),
                        // Some backends take the machine away and put it up again.
                        Verdict::NotYet(error) | Verdict::Final(error) => error,
                    }
                }
                // The queue's word, not the guest's.
                Err(error) => error,
            };
            if !wait.pause().await {
                let error = wait.give_up(&not_yet);
                return Err(Error::timed_out(format!(
                    "after the reboot that the package asks for: {}",
                    error.message()
                ))
                .with_retry(Retry::Safe));
            }
        }
    }

    async fn ask_for_reboot(&self, vm: VmId) -> Result<()> {
        let mut wait = Wait::new(self.config.ready_interval, self.config.ready_deadline);
        loop {
            let asked = self.compute.set_power(vm, PowerAction::Reboot { grace: Some(GRACE) });
            let error = match tokio::time::timeout(GRACE.saturating_add(self.config.ready_deadline), asked).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) if error.retry() == Retry::Safe => error,
                // It may be on its way; the boot's mark will tell.
                Ok(Err(error)) if error.retry() == Retry::Ambiguous => return Ok(()),
                Ok(Err(error)) if error.kind() == ErrorKind::NotFound => return Err(gone(vm)),
                Ok(Err(error)) => return Err(error),
                Err(_) => return Ok(()),
            };
            if !wait.pause().await {
                return Err(error);
            }
        }
    }

    /// The outer error is the queue's, the inner one the guest's.
    async fn boot_mark_in_turn(self: &Arc<Self>, vm: VmId) -> Result<Result<BootMark>> {
        let inner = self.clone();
        self.scheduler
            .run_once(
                vm,
                format!("wait for {vm} to come back"),
                PROBE_LIMIT,
                async move { Ok(inner.boot_mark(vm).await) },
            )
            .await
    }
}
