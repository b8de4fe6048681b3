//! Brings work to its turn in the queue, and waits outside of the queue for guests that do not answer.
//!
//! An install is one operation of the queue: assets and action together, so that no other action ever sees half of a
//! package, and a guest that answers costs one turn. Its first act is to ask the agent; when that one does not answer,
//! the turn ends at once and the work comes again later, so that a booting guest keeps no permit. Once the work has
//! had an effect it keeps its machine by a [`Hold`](super::hold::Hold) while it waits.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Inner, hold::Held};
use crate::{
    Error, ErrorKind, Result, Retry, Vm, VmId, VmState, error::reason, fleet::Need, queue::scheduler::MAX_INTERVAL,
};

/// What asking for a machine may take.
const LOOK_UP_LIMIT: Duration = Duration::from_secs(30);

/// What one turn came to.
#[derive(Debug)]
pub(super) enum Turn<T> {
    /// The work is done.
    Done(T),
    /// It failed for good.
    Failed(Error),
    /// The guest does not answer now; come again.
    NotYet(Error),
    /// Another install has the machine; come again when it lets go.
    Held(Held),
}

/// How work is queued.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub(super) vm: VmId,
    /// What it is, for the queue's own lists.
    pub(super) what: String,
    /// The longest a turn may take.
    pub(super) limit: Duration,
    /// How long to wait for the guest in all; nothing means not to wait for other installs either.
    pub(super) patience: Duration,
}

/// What a refused guest call means for the work.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The machine does not exist any more.
    Gone,
    /// It may answer later.
    NotYet(Error),
    /// It will not.
    Final(Error),
}

impl Inner {
    /// Runs `turn` in its machine's turn, again and again until it is done.
    ///
    /// Work that has not begun ends when `caller` is gone, also out of the queue; work that has begun goes on.
    ///
    /// # Errors
    /// Those of the turn; `TimedOut` with what was seen last when the guest did not answer in time.
    pub(super) async fn turns<T: Send + 'static>(
        &self,
        slot: Slot,
        caller: &CancellationToken,
        begun: impl Fn() -> bool + Send,
        turn: impl Fn() -> BoxFuture<'static, Turn<T>> + Send,
    ) -> Result<T> {
        // The machine comes to this process, or stays here, as long as there is something to do.
        let need = self.need(slot.vm);
        let mut wait = Wait::new(self.config.ready_interval, slot.patience);
        let mut was_begun = begun();
        loop {
            let claim = Arc::new(Claim::default());
            let op = {
                let (claim, turn) = (claim.clone(), turn());
                async move {
                    if !claim.take() {
                        return Err(caller_gone());
                    }
                    match turn.await {
                        // The queue keeps machines that hang apart from the others; it knows them by such errors.
                        Turn::NotYet(error) if error.kind() == ErrorKind::TimedOut => {
                            claim.come_again.store(true, Ordering::Release);
                            Err(error)
                        }
                        Turn::Failed(error) => Err(error),
                        other => Ok(other),
                    }
                }
            };
            let mut queued = std::pin::pin!(self.scheduler.run_once(slot.vm, slot.what.clone(), slot.limit, op));
            let outcome = tokio::select! {
                biased;
                outcome = &mut queued => outcome,
                () = caller.cancelled(), if !was_begun => {
                    if claim.take() {
                        return Err(caller_gone());
                    }
                    queued.await
                }
            };
            if let Some(need) = &need {
                need.had_its_turn();
            }
            if !was_begun && begun() {
                // What was spent waiting for a guest to boot is not taken from what an interruption may take.
                was_begun = true;
                wait = Wait::new(self.config.ready_interval, slot.patience);
            }
            let not_yet = match outcome {
                Ok(Turn::Done(done)) => return Ok(done),
                Ok(Turn::Failed(error)) => return Err(error),
                Ok(Turn::NotYet(error)) if is_elsewhere(&error) => {
                    // Not the guest's doing, so it does not count as waiting for it. The next turn begins when the machine
                    // is this process's again.
                    tokio::select! {
                        () = tokio::time::sleep(Wait::FIRST) => continue,
                        () = caller.cancelled(), if !was_begun => return Err(caller_gone()),
                    }
                }
                Ok(Turn::NotYet(error)) => error,
                Ok(Turn::Held(_)) if slot.patience.is_zero() => {
                    return Err(Error::unavailable("another install keeps the machine"));
                }
                Ok(Turn::Held(held)) => {
                    tokio::select! {
                        () = held.released() => continue,
                        () = caller.cancelled(), if !was_begun => return Err(caller_gone()),
                        () = tokio::time::sleep(self.hold_limit()) => {
                            return Err(Error::timed_out(format!(
                                "another install has kept the machine for {}",
                                crate::error::seconds(self.hold_limit())
                            ))
                            .with_retry(Retry::Safe));
                        }
                    }
                }
                Err(error) if claim.come_again.load(Ordering::Acquire) => error,
                // Work that has begun was let into the queue once; a full queue only delays it.
                Err(error) if was_begun && error.reason() == Some(reason::QUEUE_FULL) => error,
                Err(error) => return Err(error),
            };
            tokio::select! {
                more = wait.pause() => if !more {
                    return Err(wait.give_up(&not_yet));
                },
                () = caller.cancelled(), if !was_begun => return Err(caller_gone()),
            }
        }
    }

    /// The longest that one install keeps a machine: waiting for its guest, a turn, and a reboot.
    fn hold_limit(&self) -> Duration {
        let ready = self.config.ready_deadline.saturating_mul(4);
        self.config.action_deadline.saturating_add(ready).saturating_add(Duration::from_secs(600)).min(MAX_INTERVAL)
    }

    /// What a refused guest call means. Asks the compute backend only when the guest's error leaves it open.
    pub(super) async fn judge(&self, vm: VmId, error: Error) -> Verdict {
        if error.reason() == Some(reason::GUEST_GONE) {
            // A machine that is rebooted the hard way, or moves, is out of the hypervisor's sight for a while.
            return if self.is_gone(vm).await { Verdict::Gone } else { Verdict::NotYet(error) };
        }
        if error.reason() == Some(reason::GUEST_NOT_RUNNING) {
            return match self.look_up(vm).await {
                Ok(seen) if matches!(seen.state, VmState::Running | VmState::Building) => Verdict::NotYet(error),
                Err(missing) if missing.kind() == ErrorKind::NotFound => Verdict::Gone,
                _ => Verdict::Final(error),
            };
        }
        if is_elsewhere(&error) {
            return Verdict::NotYet(error);
        }
        if error.retry() == Retry::Never { Verdict::Final(error) } else { Verdict::NotYet(error) }
    }

    /// Says to the fleet, where there is one, that this process has something to do on a machine.
    pub(super) fn need(&self, vm: VmId) -> Option<Need> {
        self.fleet.as_ref().map(|fleet| fleet.need(vm))
    }

    /// Whether the compute backend says for certain that there is no such machine.
    pub(super) async fn is_gone(&self, vm: VmId) -> bool {
        matches!(self.look_up(vm).await, Err(error) if error.kind() == ErrorKind::NotFound)
    }

    pub(super) async fn look_up(&self, vm: VmId) -> Result<Vm> {
        match tokio::time::timeout(LOOK_UP_LIMIT, self.compute.get_vm(vm)).await {
            Ok(result) => result,
            Err(_) => Err(Error::timed_out(format!(
                "the compute backend did not answer in {}",
                crate::error::seconds(LOOK_UP_LIMIT)
            ))),
        }
    }
}

/// Whether another process has the machine now, or may have it: what was refused so comes again.
pub(super) fn is_elsewhere(error: &Error) -> bool {
    matches!(error.reason(), Some(reason::LEASE_LOST | reason::FENCED))
}

/// The error of a machine that is gone.
pub(super) fn gone(vm: VmId) -> Error {
    Error::not_found("the virtual machine does not exist any more")
        .with_reason(reason::GUEST_GONE)
        .on(format!("vm {vm}"))
}

fn caller_gone() -> Error {
    // Seen by nobody unless the executor shuts down: who would read it is gone.
    Error::unavailable("the request was given up before it began")
}

/// Pauses that grow, within a budget that begins with the first one.
#[derive(Debug)]
pub(super) struct Wait {
    pause: Duration,
    longest: Duration,
    patience: Duration,
    ends: Option<Instant>,
}

impl Wait {
    const FIRST: Duration = Duration::from_millis(50);

    pub(super) fn new(longest: Duration, patience: Duration) -> Self {
        // A pause of nothing would spin, and a time that the clock cannot reach would panic.
        let longest = longest.max(Duration::from_millis(1));
        let patience = patience.min(MAX_INTERVAL);
        Self { pause: Self::FIRST.min(longest), longest, patience, ends: None }
    }

    /// Pauses, and says whether there is time for another try.
    pub(super) async fn pause(&mut self) -> bool {
        let now = Instant::now();
        let ends = *self.ends.get_or_insert(now + self.patience);
        if now + self.pause > ends {
            return false;
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 3 / 2).min(self.longest);
        true
    }

    pub(super) fn give_up(&self, last: &Error) -> Error {
        let text = match self.patience {
            Duration::ZERO => format!("the guest does not answer now: {}", last.message()),
            patience => {
                format!(
                    "the guest did not answer in {}; seen last: {}",
                    crate::error::seconds(patience),
                    last.message()
                )
            }
        };
        let error = Error::timed_out(text).with_retry(Retry::Safe);
        match last.reason() {
            Some(reason) => error.with_reason(reason),
            None => error,
        }
    }
}

/// Decides the race between a turn that begins and a caller that goes: the first to take it wins.
#[derive(Debug, Default)]
struct Claim {
    taken: AtomicBool,
    /// The turn's error means "not yet".
    come_again: AtomicBool,
}

impl Claim {
    fn take(&self) -> bool {
        !self.taken.swap(true, Ordering::AcqRel)
    }
}
