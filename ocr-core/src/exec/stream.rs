//! A condition's values on their way to its streams: one place for the latest value, and a seat for each stream.
//!
//! There are many more streams than anything else in this process, and nearly all of them are silent. So a stream is
//! a few words and a seat is a waker: no channel, no future and no buffer of its own.

use std::{
    fmt,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures::Stream;
use slab::Slab;

use super::{
    ConditionValue,
    condition::{Ended, Runner},
    lock,
};
use crate::{Result, fleet::Watch};

/// How many streams are woken between two locks. Wakers are other people's code: none runs under the lock.
const BATCH: usize = 32;

/// Values of one condition until it or its machine is gone (`NotFound`). A slow reader misses values and gets the
/// latest. Dropping it frees its place at once.
#[must_use = "dropping it ends the watch"]
pub struct ConditionStream {
    /// `None` after the end. It keeps the runs going.
    runner: Option<Arc<Runner>>,
    /// How many values had come when it last looked.
    seen: u64,
    seat: usize,
    /// Tells other processes that it is watched here. Boxed: most executors are alone.
    watch: Option<Box<Watch>>,
}

/// The latest of a condition, and who waits for the next.
#[derive(Default)]
pub(super) struct Channel {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    values: u64,
    /// The latest, once there is one, and how late its run was.
    value: f32,
    lateness_us: u64,
    ended: Option<Ended>,
    seats: Slab<Option<Waker>>,
}

impl Channel {
    /// Gives all streams a value.
    pub(super) fn publish(&self, value: f32, lateness: Duration) {
        self.tell(|state| {
            state.values += 1;
            state.value = value;
            state.lateness_us = u64::try_from(lateness.as_micros()).unwrap_or(u64::MAX);
        });
    }

    /// Ends all streams. The first reason stays.
    pub(super) fn end(&self, ended: Ended) {
        self.tell(|state| {
            state.ended.get_or_insert(ended);
        });
    }

    pub(super) fn has_ended(&self) -> bool {
        lock(&self.state).ended.is_some()
    }

    /// How many streams there are.
    pub(super) fn streams(&self) -> usize {
        lock(&self.state).seats.len()
    }

    /// Changes what is there to see, then wakes those that wait. Who sits down meanwhile has seen the change.
    fn tell(&self, change: impl FnOnce(&mut State)) {
        let mut wakers = [const { None::<Waker> }; BATCH];
        let mut from = 0;
        let mut state = lock(&self.state);
        change(&mut state);
        loop {
            let mut places = wakers.iter_mut();
            let end = state.seats.capacity();
            while from < end && places.len() > 0 {
                if let Some(waker) = state.seats.get_mut(from).and_then(Option::take)
                    && let Some(place) = places.next()
                {
                    *place = Some(waker);
                }
                from += 1;
            }
            drop(state);
            wakers.iter_mut().filter_map(Option::take).for_each(Waker::wake);
            if from >= end {
                return;
            }
            state = lock(&self.state);
        }
    }
}

impl ConditionStream {
    /// A stream of the values from now on.
    pub(super) fn new(runner: Arc<Runner>, watch: Option<Watch>) -> Self {
        let (seen, seat) = {
            let state = &mut *lock(&runner.channel().state);
            if state.seats.capacity() == 0 {
                // Most conditions have one stream; a slab begins with four seats.
                state.seats.reserve_exact(1);
            }
            (state.values, state.seats.insert(None))
        };
        Self { runner: Some(runner), seen, seat, watch: watch.map(Box::new) }
    }

    /// Gives the seat back. The waker and the runner are dropped without the lock: either may be the last of its kind.
    fn leave(&mut self) -> Option<Arc<Runner>> {
        let runner = self.runner.take()?;
        let waker = lock(&runner.channel().state).seats.try_remove(self.seat);
        drop(waker);
        self.watch = None;
        Some(runner)
    }
}

impl Stream for ConditionStream {
    type Item = Result<ConditionValue>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(runner) = &this.runner else { return Poll::Ready(None) };
        let (ended, earlier) = {
            let state = &mut *lock(&runner.channel().state);
            if state.ended.is_none() && state.values != this.seen {
                this.seen = state.values;
                let (value, lateness) = (state.value, Duration::from_micros(state.lateness_us));
                return Poll::Ready(Some(Ok(ConditionValue { condition: runner.id(), value, lateness })));
            }
            let mut earlier = None;
            if state.ended.is_none()
                && let Some(seat) = state.seats.get_mut(this.seat)
                && !seat.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()))
            {
                earlier = seat.replace(cx.waker().clone());
            }
            (state.ended, earlier)
        };
        // Not under the lock: the task that it is of may end with it, and have streams of its own.
        drop(earlier);
        match ended {
            None => Poll::Pending,
            Some(ended) => Poll::Ready(this.leave().map(|runner| Err(runner.end_error(ended)))),
        }
    }
}

impl Drop for ConditionStream {
    fn drop(&mut self) {
        self.leave();
    }
}

impl fmt::Debug for ConditionStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConditionStream")
            .field("condition", &self.runner.as_ref().map(|runner| runner.id()))
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("streams", &self.streams()).finish_non_exhaustive()
    }
}
