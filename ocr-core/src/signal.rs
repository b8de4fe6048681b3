//! [`Signals`]: short notices between the processes that share a store.

use std::{
    collections::HashMap,
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio::sync::broadcast::{self, error::RecvError};

use crate::{Error, Result, state::Key};

/// Carries short notices to whoever listens now: hints, never truth.
///
/// What must not be lost belongs into the [`StateStore`](crate::StateStore); a notice only says that it is worth a look
/// there, so that nobody has to poll. A notice may be lost, and then the listener is told of a [`Notice::Gap`]. Each MUST
/// is checked by the conformance case named beside it.
#[async_trait]
pub trait Signals: fmt::Debug + Send + Sync + 'static {
    /// Sends a notice to all who listen to the topic, the sender's own listeners too.
    ///
    /// # Behavior
    /// - Every listener of the topic MUST hear it [case: signal_everyone], and nobody of another topic
    ///   MUST hear it [case: signal_topics]. Without any listener it MUST be fine [case: signal_nobody].
    /// - A payload of any bytes up to [`MAX_NOTICE_BYTES`] MUST arrive as sent [case: signal_payload]; a larger one MUST
    ///   fail with `Invalid` [case: signal_payload_too_large].
    ///
    /// # Errors
    /// `Unavailable` or `TimedOut` when the carrier is away: it may have been sent.
    async fn send(&self, topic: &Key, payload: Bytes) -> Result<()>;

    /// Listens to a topic from now on.
    ///
    /// The stream never ends. After trouble it carries on by itself, with a [`Notice::Gap`] when something may have been
    /// missed.
    ///
    /// # Behavior
    /// - What is sent after this has returned MUST be heard, in the order of each sender [case: signal_order]; what was
    ///   sent before MUST NOT be [case: signal_from_now_on].
    /// - A listener that is more than [`BACKLOG`] notices behind MUST hear a [`Notice::Gap`] in place of the oldest, and
    ///   then the others [case: signal_backlog].
    /// - Dropping the stream ends the listening; other listeners MUST go on, and a new one MUST hear again
    ///   [case: signal_drop].
    ///
    /// # Errors
    /// `Unavailable` when the carrier is away.
    async fn listen(&self, topic: &Key) -> Result<NoticeStream>;
}

/// The largest payload, in bytes: 64 KiB.
pub const MAX_NOTICE_BYTES: usize = 64 << 10;
/// So many notices wait for a slow listener; older ones are dropped.
pub const BACKLOG: usize = 1024;

/// What a listener hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Somebody sent this.
    Payload(Bytes),
    /// Something may have been missed: look at the store.
    Gap,
}

/// Notices of one topic. It never ends; dropping it ends the listening.
pub type NoticeStream = Pin<Box<dyn Stream<Item = Notice> + Send>>;

/// Checks a payload's size. Implementations call this first.
///
/// # Errors
/// `Invalid`.
pub fn check_payload(payload: &[u8]) -> Result<()> {
    if payload.len() > MAX_NOTICE_BYTES {
        return Err(Error::invalid(
            "payload",
            format_args!("wants at most {MAX_NOTICE_BYTES} bytes, got {}", payload.len()),
        ));
    }
    Ok(())
}

/// [`Signals`] within one process. Clones share their topics.
#[derive(Clone, Default)]
pub struct LocalSignals {
    topics: Arc<Mutex<HashMap<Key, broadcast::Sender<Bytes>>>>,
}

impl LocalSignals {
    /// No listeners yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn topics(&self) -> MutexGuard<'_, HashMap<Key, broadcast::Sender<Bytes>>> {
        // Every change is a single insert or removal, so a panic elsewhere leaves nothing half done.
        self.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for LocalSignals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalSignals").field("topics", &self.topics().len()).finish()
    }
}

#[async_trait]
impl Signals for LocalSignals {
    async fn send(&self, topic: &Key, payload: Bytes) -> Result<()> {
        check_payload(&payload)?;
        let mut topics = self.topics();
        // Topics that nobody listens to any more go with the next notice.
        if topics.get(topic).is_some_and(|sender| sender.send(payload).is_err()) {
            topics.remove(topic);
        }
        Ok(())
    }

    async fn listen(&self, topic: &Key) -> Result<NoticeStream> {
        let receiver = {
            let mut topics = self.topics();
            topics.retain(|_, sender| sender.receiver_count() > 0);
            topics.entry(topic.clone()).or_insert_with(|| broadcast::Sender::new(BACKLOG)).subscribe()
        };
        let notices = futures::stream::unfold(receiver, |mut receiver| async move {
            match receiver.recv().await {
                Ok(payload) => Some((Notice::Payload(payload), receiver)),
                Err(RecvError::Lagged(_)) => Some((Notice::Gap, receiver)),
                Err(RecvError::Closed) => None,
            }
        });
        // The carrier may be dropped before its listeners; for those nothing is ever sent again.
        Ok(Box::pin(notices.chain(futures::stream::pending())))
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn topic(name: &str) -> Key {
        Key::of("topic", &[name]).unwrap()
    }

    #[tokio::test]
    async fn every_listener_hears_what_is_sent_after_it_began_and_only_on_its_topic() {
        let signals = LocalSignals::new();
        signals.send(&topic("a"), Bytes::from_static(b"nobody hears")).await.unwrap();
        let mut one = signals.listen(&topic("a")).await.unwrap();
        let mut two = signals.clone().listen(&topic("a")).await.unwrap();
        let mut other = signals.listen(&topic("b")).await.unwrap();
        for payload in ["1", "2"] {
            signals.send(&topic("a"), Bytes::from_static(payload.as_bytes())).await.unwrap();
        }
        for listener in [&mut one, &mut two] {
            for payload in ["1", "2"] {
                assert_eq!(listener.next().await, Some(Notice::Payload(Bytes::from_static(payload.as_bytes()))));
            }
        }
        assert_eq!(other.next().now_or_never(), None);
    }

    #[tokio::test]
    async fn a_listener_that_is_far_behind_is_told_of_a_gap_and_gets_the_latest() {
        let signals = LocalSignals::new();
        let mut slow = signals.listen(&topic("a")).await.unwrap();
        for number in 0..=BACKLOG {
            signals.send(&topic("a"), Bytes::from(number.to_string())).await.unwrap();
        }
        assert_eq!(slow.next().await, Some(Notice::Gap));
        assert_eq!(slow.next().await, Some(Notice::Payload(Bytes::from("1"))));
    }

    #[tokio::test]
    async fn topics_without_listeners_are_dropped() {
        let signals = LocalSignals::new();
        for number in 0..100 {
            drop(signals.listen(&topic(&number.to_string())).await.unwrap());
        }
        let kept = signals.listen(&topic("kept")).await.unwrap();
        assert_eq!(signals.topics().len(), 1);
        drop(kept);
        signals.send(&topic("kept"), Bytes::new()).await.unwrap();
        assert_eq!(signals.topics().len(), 0);
    }

    #[tokio::test]
    async fn a_payload_that_is_too_large_is_refused() {
        let refused = LocalSignals::new().send(&topic("a"), Bytes::from(vec![0; MAX_NOTICE_BYTES + 1])).await;
        assert_eq!(refused.unwrap_err().kind(), crate::ErrorKind::Invalid);
    }
}
