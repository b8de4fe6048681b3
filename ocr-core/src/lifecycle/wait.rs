//! One poll for all waiters: waiting for N machines costs one list call a round, not N.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use crate::{ComputeBackend, Error, Owner, Result, Retry, Vm, VmFilter, VmId};

/// The first pause between two looks; it grows by half each round.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// Waits for machines of one owner. Clones share the poll.
#[derive(Clone, Debug)]
pub struct Waiter {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    compute: Arc<dyn ComputeBackend>,
    filter: VmFilter,
    max_pause: Duration,
    rounds: watch::Sender<Round>,
    /// Whether the poll task runs. It decides to end, and waiters decide to start it, under this lock.
    polling: Mutex<bool>,
    /// Wakes the poll task out of a long pause when somebody new waits.
    joined: tokio::sync::Notify,
}

/// What one look at the backend saw.
#[derive(Clone, Debug, Default)]
struct Round {
    seen: Option<Arc<Result<HashMap<VmId, Vm>>>>,
}

impl Waiter {
    /// A waiter that looks at least every `max_pause` while somebody waits, and not at all otherwise.
    pub fn new(compute: Arc<dyn ComputeBackend>, owner: &Owner, max_pause: Duration) -> Self {
        let (rounds, _) = watch::channel(Round::default());
        let shared = Shared {
            compute,
            filter: VmFilter::owned_by(owner),
            max_pause: max_pause.max(Duration::from_millis(1)),
            rounds,
            polling: Mutex::new(false),
            joined: tokio::sync::Notify::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Waits until `done` says so of the machine (`None` when it is not there) or fails.
    ///
    /// # Errors
    /// `TimedOut` naming the state seen last; what `done` returns; a backend's error that no repeat will cure.
    pub async fn wait<F>(&self, id: VmId, end: Instant, mut done: F) -> Result<Option<Vm>>
    where
        F: FnMut(Option<&Vm>) -> Result<bool> + Send,
    {
        let mut last = "nothing yet".to_owned();
        let watch = async {
            let mut rounds = self.join();
            loop {
                // The poll task holds the sender for as long as there are receivers.
                if rounds.changed().await.is_err() {
                    return Err(Error::internal("the poll for machines ended early"));
                }
                let Some(seen) = rounds.borrow_and_update().seen.clone() else { continue };
                match &*seen {
                    Ok(machines) => {
                        let vm = machines.get(&id);
                        if done(vm)? {
                            return Ok(vm.cloned());
                        }
                        last = vm.map_or_else(|| "no such machine".to_owned(), |vm| vm.state.to_string());
                    }
                    Err(error) if error.retry() == Retry::Never => return Err(error.clone()),
                    Err(error) => last = error.message().to_owned(),
                }
            }
        };
        let started = Instant::now();
        match tokio::time::timeout_at(end, watch).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::timed_out(format!(
                "the machine did not get there in {}; seen last: {last}",
                crate::error::seconds(started.elapsed())
            ))
            .during("lifecycle.wait")
            .on(format!("vm {id}"))),
        }
    }

    fn join(&self) -> watch::Receiver<Round> {
        let shared = &self.shared;
        let mut polling = shared.polling.lock().unwrap_or_else(PoisonError::into_inner);
        let mut receiver = shared.rounds.subscribe();
        receiver.mark_unchanged();
        if *polling {
            shared.joined.notify_one();
        } else {
            *polling = true;
            tokio::spawn(poll(shared.clone()));
        }
        receiver
    }
}

/// Looks, tells all, pauses; ends when nobody waits. It is owned by the waiters: it lives as long as one of them.
async fn poll(shared: Arc<Shared>) {
    let mut pause = FIRST_PAUSE.min(shared.max_pause);
    loop {
        let seen = shared
            .compute
            .list_vms(&shared.filter)
            .await
            .map(|machines| machines.into_iter().map(|vm| (vm.id, vm)).collect::<HashMap<_, _>>());
        shared.rounds.send_replace(Round { seen: Some(Arc::new(seen)) });
        let looked = Instant::now();
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 3 / 2).min(shared.max_pause),
            // Whoever has just come wants to know soon, but a crowd of them must not make a crowd of looks.
            () = shared.joined.notified() => {
                pause = FIRST_PAUSE.min(shared.max_pause);
                tokio::time::sleep_until(looked + pause).await;
            }
        }
        let mut polling = shared.polling.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.rounds.receiver_count() == 0 {
            *polling = false;
            return;
        }
    }
}
