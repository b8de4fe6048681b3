//! [`Calls`]: the task of every call, so that a stop can end them and wait for them.
//!
//! It is told of two kinds of end. When the server stops, calls without an end of their own are woken to say goodbye;
//! when the time for that is over, every task is aborted. Open streams are many, so a call is an entry in a table here,
//! and not a future that waits for each kind.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Poll, Waker},
};

use futures::FutureExt as _;
use slab::Slab;
use tokio::{sync::Notify, task::AbortHandle};

/// All calls of one server. Clones are one.
#[derive(Clone, Default)]
pub(super) struct Calls {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Set under the lock, so that who looks there first and finds it unset is woken.
    stopping: AtomicBool,
    none_left: Notify,
}

#[derive(Default)]
struct State {
    tasks: Slab<Task>,
    /// Calls without an end of their own.
    open_ended: Slab<Option<Waker>>,
    killed: bool,
}

/// A task may end before its handle is there.
enum Task {
    Begun,
    Running(AbortHandle),
    Ended,
}

impl Calls {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change under this lock is a single one.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many calls there are.
    pub(super) fn len(&self) -> usize {
        self.lock().tasks.len()
    }

    /// How many of them have no end of their own.
    pub(super) fn open_ended(&self) -> usize {
        self.lock().open_ended.len()
    }

    /// Waits until there is no call.
    pub(super) async fn wait(&self) {
        loop {
            let told = self.shared.none_left.notified();
            if self.len() == 0 {
                return;
            }
            told.await;
        }
    }

    /// Tells calls without an end of their own to end, also those to come.
    pub(super) fn stop(&self) {
        let wakers: Vec<_> = {
            let state = &mut *self.lock();
            self.shared.stopping.store(true, Ordering::Release);
            state.open_ended.iter_mut().filter_map(|(_, waker)| waker.take()).collect()
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Ends all calls where they are. There will be no more.
    pub(super) fn kill(&self) {
        let handles: Vec<_> = {
            let state = &mut *self.lock();
            state.killed = true;
            let running = state.tasks.iter().filter_map(|(_, task)| match task {
                Task::Running(handle) => Some(handle.clone()),
                Task::Begun | Task::Ended => None,
            });
            running.collect()
        };
        handles.iter().for_each(AbortHandle::abort);
    }

    /// A place for a call without an end of its own.
    pub(super) fn open(&self) -> OpenEnded {
        OpenEnded { calls: self.clone(), key: self.lock().open_ended.insert(None), waker: 0 }
    }

    fn ended(&self, key: usize) {
        let state = &mut *self.lock();
        match state.tasks.get_mut(key) {
            Some(task @ Task::Begun) => *task = Task::Ended,
            Some(Task::Running(_)) => self.remove(state, key),
            Some(Task::Ended) | None => {}
        }
    }

    fn remove(&self, state: &mut State, key: usize) {
        state.tasks.remove(key);
        if state.tasks.is_empty() {
            self.shared.none_left.notify_waiters();
        }
    }
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Calls {
    fn execute(&self, call: F) {
        let key = {
            let state = &mut *self.lock();
            (!state.killed).then(|| state.tasks.insert(Task::Begun))
        };
        let Some(key) = key else { return };
        let entry = Entry { calls: self.clone(), key };
        // The task is dropped at its end, and the closure with it, also when it is aborted.
        let handle = tokio::spawn(call.map(move |()| drop(entry))).abort_handle();
        let late = {
            let state = &mut *self.lock();
            match state.tasks.get_mut(key) {
                Some(task @ Task::Begun) => {
                    *task = Task::Running(handle.clone());
                    state.killed
                }
                _ => {
                    self.remove(state, key);
                    false
                }
            }
        };
        if late {
            handle.abort();
        }
    }
}

impl fmt::Debug for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calls").field("calls", &self.len()).finish_non_exhaustive()
    }
}

/// A call's entry, for as long as its task lives.
struct Entry {
    calls: Calls,
    key: usize,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.calls.ended(self.key);
    }
}

/// The place of a call without an end of its own, for as long as it is open.
pub(super) struct OpenEnded {
    calls: Calls,
    key: usize,
    /// Which task is woken: the address of its waker's data. A call keeps its task, so it says so once.
    waker: usize,
}

impl OpenEnded {
    /// Ready when the server stops.
    pub(super) fn poll_stop(&mut self, waker: &Waker) -> Poll<()> {
        let address = waker.data().addr();
        if self.waker != address {
            let earlier = {
                let state = &mut *self.calls.lock();
                self.waker = address;
                state.open_ended.get_mut(self.key).and_then(|place| place.replace(waker.clone()))
            };
            // Not under the lock: a task may end with its last waker.
            drop(earlier);
        }
        if self.calls.shared.stopping.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for OpenEnded {
    fn drop(&mut self) {
        let waker = self.calls.lock().open_ended.try_remove(self.key);
        drop(waker);
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, time::Duration};

    use hyper::rt::Executor as _;
    use tokio::sync::oneshot;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_stop_wakes_calls_without_an_end_and_no_others() {
        let calls = Calls::default();
        let (ended, open_ended) = oneshot::channel();
        let mut place = calls.open();
        assert_eq!(calls.open_ended(), 1);
        calls.execute(async move {
            poll_fn(|cx| place.poll_stop(cx.waker())).await;
            drop(place);
            let _ = ended.send(());
        });
        let (finish, told) = oneshot::channel::<()>();
        calls.execute(async move {
            let _ = told.await;
        });
        tokio::task::yield_now().await;
        calls.stop();
        tokio::time::timeout(SOON, open_ended).await.unwrap().unwrap();
        tokio::task::yield_now().await;
        assert_eq!((calls.len(), calls.open_ended()), (1, 0));
        finish.send(()).unwrap();
        tokio::time::timeout(SOON, calls.wait()).await.unwrap();
        let mut late = calls.open();
        assert!(
            poll_fn(|cx| Poll::Ready(late.poll_stop(cx.waker()))).await.is_ready(),
            "one that comes after the stop"
        );
    }

    #[tokio::test]
    async fn a_kill_ends_all_and_lets_nothing_begin() {
        let calls = Calls::default();
        let (held, dropped) = oneshot::channel::<()>();
        calls.execute(async move {
            let _held = held;
            std::future::pending().await
        });
        tokio::task::yield_now().await;
        calls.kill();
        tokio::time::timeout(SOON, calls.wait()).await.unwrap();
        assert!(dropped.await.is_err());
        let (held, dropped) = oneshot::channel::<()>();
        calls.execute(async move {
            let _held = held;
            std::future::pending().await
        });
        assert!(tokio::time::timeout(SOON, dropped).await.unwrap().is_err());
        assert_eq!(calls.len(), 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn calls_that_end_at_once_on_many_threads_leave_nothing() {
        let calls = Calls::default();
        let tasks: Vec<_> = (0..8)
            .map(|_| {
                let calls = calls.clone();
                tokio::spawn(async move {
                    for _ in 0..2000 {
                        calls.execute(async {});
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        tokio::time::timeout(SOON, calls.wait()).await.unwrap();
    }
}
