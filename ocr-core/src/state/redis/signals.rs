//! [`RedisSignals`]: notices over Redis' publish and subscribe.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use deadpool_redis::redis::{
    RedisResult,
    aio::{PubSubSink, PubSubStream},
    cmd,
};
use futures::{Stream, StreamExt};
use tokio::{
    sync::{Notify, oneshot},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, timeout_at},
};

use super::{
    config::{Address, RedisConfig},
    connect::Connector,
    fault::Fault,
};
use crate::{
    Error, Key, Result, Retry,
    signal::{BACKLOG, Notice, NoticeStream, Signals, check_payload},
};

/// Between two tries to connect: doubled from the one to the other.
const PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// How often a silent connection is asked whether it lives, and is still to the right server.
const PING: Duration = Duration::from_secs(2);
/// So many topics in one command.
const CHUNK: usize = 256;

/// [`Signals`] over Redis: one connection for all topics, opened for the first listener. Clones share it.
///
/// After the connection was lost every listener hears a [`Notice::Gap`], when it listens again. Redis answers a notice's
/// sender without waiting for its listeners, and forgets it: it is a hint, never truth.
#[derive(Clone)]
pub struct RedisSignals(Arc<Inner>);

struct Inner {
    connector: Arc<Connector>,
    channels: String,
    shared: Arc<Shared>,
    /// Listens; there is none before the first listener.
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(task) = lock(&self.task).take() {
            task.abort();
        }
    }
}

/// What listeners and the task share.
#[derive(Default)]
struct Shared {
    topics: Mutex<Topics>,
    changed: Notify,
}

#[derive(Default)]
struct Topics {
    by_name: HashMap<Key, Topic>,
    /// Topics to begin or to end.
    dirty: HashSet<Key>,
    /// Why there is no connection.
    trouble: Option<Error>,
}

#[derive(Default)]
struct Topic {
    mailboxes: Vec<Arc<Mailbox>>,
    /// Whether Redis has confirmed it on the connection that is in use.
    live: bool,
    /// Whether notices may have been missed since it was last live.
    missed: bool,
    waiting: Vec<oneshot::Sender<()>>,
}

impl RedisSignals {
    /// Checks the configuration; connects when it has something to do.
    ///
    /// # Errors
    /// `Invalid`, with what is wanted.
    pub fn new(config: RedisConfig) -> Result<Self> {
        Ok(Self::over(Arc::new(Connector::new(config).map_err(|error| error.during("signal.open"))?)))
    }

    pub(super) fn over(connector: Arc<Connector>) -> Self {
        let channels = format!("{{{}}}:n:", connector.config.prefix);
        Self(Arc::new(Inner { connector, channels, shared: Arc::default(), task: Mutex::default() }))
    }

    fn start(&self) {
        let mut task = lock(&self.0.task);
        if task.as_ref().is_none_or(JoinHandle::is_finished) {
            let (connector, shared) = (Arc::clone(&self.0.connector), Arc::clone(&self.0.shared));
            let carrier = Carrier { connector, shared, channels: self.0.channels.clone() };
            *task = Some(tokio::spawn(carrier.run()));
        }
    }
}

impl fmt::Debug for RedisSignals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let topics = lock(&self.0.shared.topics).by_name.len();
        f.debug_struct("RedisSignals").field("topics", &topics).finish_non_exhaustive()
    }
}

#[async_trait]
impl Signals for RedisSignals {
    async fn send(&self, topic: &Key, payload: Bytes) -> Result<()> {
        check_payload(&payload)?;
        let mut publish = cmd("PUBLISH");
        publish.arg(format!("{}{topic}", self.0.channels)).arg(payload.as_ref());
        match self.0.connector.once(&publish).await {
            Ok(_) => Ok(()),
            Err(fault) => Err(fault.error.during("signal.send").on(topic.as_str())),
        }
    }

    async fn listen(&self, topic: &Key) -> Result<NoticeStream> {
        let deadline = self.0.connector.deadline();
        let mailbox = Arc::new(Mailbox::default());
        let confirmed = {
            let mut topics = lock(&self.0.shared.topics);
            let entry = topics.by_name.entry(topic.clone()).or_default();
            entry.mailboxes.push(Arc::clone(&mailbox));
            if entry.live {
                None
            } else {
                let (confirm, confirmed) = oneshot::channel();
                entry.waiting.push(confirm);
                topics.dirty.insert(topic.clone());
                Some(confirmed)
            }
        };
        // From here on, dropping it takes the mailbox away.
        let listener = Listener { mailbox, topic: topic.clone(), shared: Arc::downgrade(&self.0.shared) };
        if let Some(confirmed) = confirmed {
            self.start();
            self.0.shared.changed.notify_one();
            if !matches!(timeout_at(deadline, confirmed).await, Ok(Ok(()))) {
                let trouble = lock(&self.0.shared.topics).trouble.clone();
                let error = trouble.unwrap_or_else(|| Error::unavailable("Redis did not confirm the topic in time"));
                let error = if error.retry() == Retry::Ambiguous { error.with_retry(Retry::Safe) } else { error };
                return Err(error.during("signal.listen").on(topic.as_str()));
            }
        }
        Ok(Box::pin(listener))
    }
}

/// The notices that one listener has not taken yet.
#[derive(Default)]
struct Mailbox(Mutex<Letters>);

#[derive(Default)]
struct Letters {
    notices: VecDeque<Notice>,
    /// Whether older ones were dropped.
    dropped: bool,
    waker: Option<Waker>,
}

impl Mailbox {
    fn put(&self, notice: Notice) {
        let waker = {
            let mut letters = lock(&self.0);
            if notice == Notice::Gap && letters.notices.back() == Some(&Notice::Gap) {
                return;
            }
            if letters.notices.len() == BACKLOG {
                letters.notices.pop_front();
                letters.dropped = true;
            }
            letters.notices.push_back(notice);
            letters.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn poll_take(&self, context: &Context<'_>) -> Poll<Notice> {
        let mut letters = lock(&self.0);
        if std::mem::take(&mut letters.dropped) {
            return Poll::Ready(Notice::Gap);
        }
        match letters.notices.pop_front() {
            Some(notice) => Poll::Ready(notice),
            None => {
                letters.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

struct Listener {
    mailbox: Arc<Mailbox>,
    topic: Key,
    /// The carrier may be dropped before its listeners; for those nothing is ever sent again.
    shared: Weak<Shared>,
}

impl Stream for Listener {
    type Item = Notice;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Notice>> {
        self.mailbox.poll_take(context).map(Some)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(shared) = self.shared.upgrade() else { return };
        let mut topics = lock(&shared.topics);
        let Some(topic) = topics.by_name.get_mut(&self.topic) else { return };
        topic.mailboxes.retain(|mailbox| !Arc::ptr_eq(mailbox, &self.mailbox));
        if topic.mailboxes.is_empty() {
            topics.dirty.insert(self.topic.clone());
            drop(topics);
            shared.changed.notify_one();
        }
    }
}

/// The task that listens.
struct Carrier {
    connector: Arc<Connector>,
    shared: Arc<Shared>,
    channels: String,
}

/// Why it stopped listening.
enum Stopped {
    /// Nobody listens.
    Idle,
    Lost(Fault),
}

impl Carrier {
    async fn run(self) {
        let mut pause = PAUSE;
        loop {
            while lock(&self.shared.topics).by_name.is_empty() {
                self.shared.changed.notified().await;
            }
            let fault = match self.open().await {
                Ok((address, sink, stream)) => match self.serve(&address, sink, stream, &mut pause).await {
                    Stopped::Idle => continue,
                    Stopped::Lost(fault) => fault,
                },
                Err(fault) => fault,
            };
            tracing::debug!(error = %fault.error, "notices stopped; connecting again");
            self.lost(fault.error);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    async fn open(&self) -> Result<(Address, PubSubSink, PubSubStream), Fault> {
        let deadline = self.connector.deadline();
        let link = self.connector.link(deadline).await?;
        let fault = match self.connector.client(&link.address) {
            Ok(client) => match timeout_at(deadline, client.get_async_pubsub()).await {
                Ok(Ok(opened)) => {
                    let (sink, stream) = opened.split();
                    return Ok((link.address.clone(), sink, stream));
                }
                Ok(Err(error)) => Fault::connecting_by(error),
                Err(_) => Fault::timed_out("Redis does not answer in time"),
            },
            Err(error) => Fault { error, relink: false, passing: false },
        };
        // The other connections are hardly better then; and the master may be elsewhere by now.
        self.connector.forget(&link);
        Err(fault)
    }

    async fn serve(
        &self,
        address: &Address,
        mut sink: PubSubSink,
        mut stream: PubSubStream,
        pause: &mut Duration,
    ) -> Stopped {
        lock(&self.shared.topics).mark_all();
        let mut tick = interval(PING);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tick.reset();
        self.shared.changed.notify_one();
        loop {
            tokio::select! {
                biased;
                message = stream.next() => match message {
                    Some(message) => {
                        let payload = Bytes::copy_from_slice(message.get_payload_bytes());
                        self.deliver(message.get_channel_name(), payload);
                    }
                    None => return Stopped::Lost(lost()),
                },
                () = self.shared.changed.notified() => {
                    if let Err(fault) = self.change(&mut sink).await {
                        return Stopped::Lost(fault);
                    }
                    *pause = PAUSE;
                }
                _ = tick.tick() => {
                    if lock(&self.shared.topics).by_name.is_empty() {
                        return Stopped::Idle;
                    }
                    if let Err(fault) = self.answered(sink.ping::<()>()).await {
                        return Stopped::Lost(fault);
                    }
                    if self.connector.address().is_some_and(|now| now != *address) {
                        return Stopped::Lost(lost());
                    }
                }
            }
        }
    }

    fn deliver(&self, channel: &str, payload: Bytes) {
        let Some(topic) = channel.strip_prefix(&self.channels) else { return };
        if let Some(topic) = lock(&self.shared.topics).by_name.get(topic) {
            for mailbox in &topic.mailboxes {
                mailbox.put(Notice::Payload(payload.clone()));
            }
        }
    }

    /// Begins and ends topics as listeners have come and gone.
    async fn change(&self, sink: &mut PubSubSink) -> Result<(), Fault> {
        let (begin, end) = lock(&self.shared.topics).changes();
        for topics in end.chunks(CHUNK) {
            self.answered(sink.unsubscribe(self.names(topics))).await?;
        }
        for topics in begin.chunks(CHUNK) {
            self.answered(sink.subscribe(self.names(topics))).await?;
            let mut shared = lock(&self.shared.topics);
            shared.trouble = None;
            for topic in topics {
                shared.live(topic);
            }
        }
        Ok(())
    }

    fn names(&self, topics: &[Key]) -> Vec<String> {
        topics.iter().map(|topic| format!("{}{topic}", self.channels)).collect()
    }

    async fn answered<T>(&self, answer: impl Future<Output = RedisResult<T>>) -> Result<T, Fault> {
        match timeout_at(Instant::now() + self.connector.config.deadline, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(Fault::of(error)),
            Err(_) => Err(Fault::timed_out("Redis does not answer in time")),
        }
    }

    fn lost(&self, error: Error) {
        let mut topics = lock(&self.shared.topics);
        topics.trouble = Some(error);
        for topic in topics.by_name.values_mut() {
            topic.missed |= topic.live;
            topic.live = false;
        }
    }
}

impl Topics {
    /// A new connection knows no topics.
    fn mark_all(&mut self) {
        self.dirty = self.by_name.keys().cloned().collect();
        for topic in self.by_name.values_mut() {
            topic.missed |= topic.live;
            topic.live = false;
        }
    }

    fn changes(&mut self) -> (Vec<Key>, Vec<Key>) {
        let (mut begin, mut end) = (Vec::new(), Vec::new());
        for key in std::mem::take(&mut self.dirty) {
            match self.by_name.get(&key) {
                Some(topic) if topic.mailboxes.is_empty() => {
                    if topic.live {
                        end.push(key.clone());
                    }
                    self.by_name.remove(&key);
                }
                Some(topic) if !topic.live => begin.push(key),
                _ => {}
            }
        }
        (begin, end)
    }

    fn live(&mut self, key: &Key) {
        let Some(topic) = self.by_name.get_mut(key) else { return };
        topic.live = true;
        if std::mem::take(&mut topic.missed) {
            for mailbox in &topic.mailboxes {
                mailbox.put(Notice::Gap);
            }
        }
        for waiting in topic.waiting.drain(..) {
            // Nobody waits any more when the caller gave up.
            let _ = waiting.send(());
        }
    }
}

fn lost() -> Fault {
    let error = Error::unavailable("the connection for notices was lost");
    Fault { error, relink: true, passing: true }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is whole before anything can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
