//! Keeps a machine for one install while that one is not in the queue.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use crate::{
    VmId,
    fleet::{Fleet, Pin},
};

/// Which machines are held. Cloning is cheap; all clones are one.
///
/// The scheduler gives a machine to one operation at a time. An install that has begun must sometimes leave the
/// scheduler, because a guest that reboots would otherwise keep a permit for minutes; its hold keeps the machine then.
/// Every operation looks for a hold first thing in its turn, and no turn can begin while the one that takes the hold
/// still runs, so there is no gap.
#[derive(Clone, Debug, Default)]
pub(super) struct Holds {
    held: Arc<Mutex<HashMap<VmId, Holding>>>,
    fleet: Option<Fleet>,
}

#[derive(Debug)]
struct Holding {
    /// Dropped when the machine is let go.
    released: watch::Sender<()>,
    since: Instant,
}

/// A machine is held until this is dropped.
#[derive(Debug)]
pub(super) struct Hold {
    holds: Holds,
    vm: VmId,
    /// Nor does the machine go to another process.
    _pin: Option<Pin>,
}

/// Somebody else holds the machine.
#[derive(Debug)]
pub(super) struct Held(watch::Receiver<()>);

impl Holds {
    /// Holds that keep machines from the other members of a fleet too.
    pub(super) fn within(fleet: Option<Fleet>) -> Self {
        Self { fleet, ..Self::default() }
    }

    pub(super) fn take(&self, vm: VmId) -> Result<Hold, Held> {
        let mut held = self.lock();
        match held.get(&vm) {
            Some(holding) => Err(Held(holding.released.subscribe())),
            None => {
                held.insert(vm, Holding { released: watch::Sender::new(()), since: Instant::now() });
                Ok(Hold { holds: self.clone(), vm, _pin: self.fleet.as_ref().map(|fleet| fleet.pin(vm)) })
            }
        }
    }

    pub(super) fn is_held(&self, vm: VmId) -> bool {
        self.lock().contains_key(&vm)
    }

    /// For how long a machine has been held.
    pub(super) fn held_for(&self, vm: VmId) -> Option<Duration> {
        self.lock().get(&vm).map(|holding| holding.since.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<VmId, Holding>> {
        // The map is whole between any two of its operations, so a panic elsewhere does not spoil it.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Dropping the sender wakes all that wait.
        self.holds.lock().remove(&self.vm);
    }
}

impl Held {
    /// Waits until the machine was let go. Somebody else may have taken it again since.
    pub(super) async fn released(mut self) {
        while self.0.changed().await.is_ok() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_held_machine_is_free_again_when_the_hold_is_dropped() {
        let holds = Holds::default();
        let vm = VmId::random();
        let hold = holds.take(vm).unwrap();
        let held = holds.take(vm).unwrap_err();
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!((holds.held_for(vm), holds.held_for(VmId::random())), (Some(Duration::from_secs(5)), None));
        assert!(holds.is_held(vm) && !holds.is_held(VmId::random()));
        let waiting = tokio::spawn(held.released());
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(hold);
        waiting.await.unwrap();
        assert!(holds.take(vm).is_ok());
    }
}
