//! [`Writer`]: does writes, alone or in batches that wait for replicas together.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use deadpool_redis::redis::{Cmd, Pipeline, Value, cmd};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, timeout_at},
};

use super::{
    Keys,
    connect::{Connector, Link, numbers, sent},
    fault::Fault,
    scripts,
};
use crate::{Deletion, Error, ErrorKind, Key, Precondition, Result, Retry, Version, error::reason};

/// The most writes in one batch.
const BATCH: usize = 256;
/// Writes that wait hold at most this much, in KiB; further ones wait outside.
const WAITING_KIB: usize = 64 << 10;
/// Of the time left, how much the replicas get: their answer must be back before the deadline.
const WAIT_SHARE: u32 = 2;
const MIN_WAIT_MS: u128 = 1;
/// Before a write that surely was not done is tried again.
const PAUSE: Duration = Duration::from_millis(20);

pub(super) struct Writer {
    connector: Arc<Connector>,
    queue: Arc<Mutex<Queue>>,
    room: Arc<Semaphore>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    /// Whether a [`Batches`] exists. It takes all that waits, also what comes while it works.
    writing: bool,
}

struct Waiting {
    change: Change,
    deadline: Instant,
    answer: oneshot::Sender<Result<Done, Fault>>,
    _room: OwnedSemaphorePermit,
}

/// A write, up to the latest time at which the server may do it.
#[derive(Clone)]
struct Change {
    script: &'static str,
    keys: Vec<String>,
    key: String,
    only: String,
    /// In milliseconds; 0 is for ever.
    ttl_ms: u64,
    value: Option<Bytes>,
    records: String,
}

enum Done {
    Put(Version),
    Deleted(Deletion),
    ThereIsOne(i64),
    OtherVersion(i64),
}

impl Change {
    fn command(&self, latest_us: i64) -> Cmd {
        let mut command = Cmd::with_capacity(10, self.value.as_ref().map_or(0, Bytes::len) + 512);
        command.arg("EVALSHA").arg(self.script).arg(self.keys.len()).arg(&self.keys);
        command.arg(latest_us).arg(&self.key).arg(&self.only);
        if let Some(value) = &self.value {
            command.arg(self.ttl_ms).arg(value.as_ref()).arg(&self.records);
        }
        command
    }
}

impl Writer {
    pub(super) fn new(connector: Arc<Connector>) -> Self {
        Self { connector, queue: Arc::default(), room: Arc::new(Semaphore::new(WAITING_KIB)) }
    }

    pub(super) async fn put(
        &self,
        keys: &Keys,
        key: &Key,
        value: Bytes,
        only: Precondition,
        ttl: Option<Duration>,
    ) -> Result<Version> {
        let change = Change {
            script: scripts::PUT.get_hash(),
            keys: vec![keys.record(key.as_str()), keys.version.clone(), keys.keys.clone(), keys.ends.clone()],
            key: key.to_string(),
            only: match only {
                Precondition::Any => "any".to_owned(),
                Precondition::Absent => "absent".to_owned(),
                Precondition::Version(version) => digits(version),
            },
            ttl_ms: ttl.map_or(0, milliseconds),
            value: Some(value),
            records: keys.records.clone(),
        };
        match self.write(change).await.map_err(|fault| fault.error)? {
            Done::Put(version) => Ok(version),
            Done::ThereIsOne(version) => {
                Err(Error::new(ErrorKind::AlreadyExists, format!("there is a record already, version {version}")))
            }
            Done::OtherVersion(version) => Err(mismatch(only, version)),
            Done::Deleted(_) => Err(Error::internal("a put was answered as a delete")),
        }
    }

    pub(super) async fn delete(&self, keys: &Keys, key: &Key, only: Precondition) -> Result<Deletion> {
        let change = Change {
            script: scripts::DELETE.get_hash(),
            keys: vec![keys.record(key.as_str()), keys.keys.clone(), keys.ends.clone()],
            key: key.to_string(),
            only: match only {
                Precondition::Version(version) => digits(version),
                Precondition::Any | Precondition::Absent => "any".to_owned(),
            },
            ttl_ms: 0,
            value: None,
            records: String::new(),
        };
        match self.write(change).await.map_err(|fault| fault.error)? {
            Done::Deleted(deletion) => Ok(deletion),
            Done::OtherVersion(version) => Err(mismatch(only, version)),
            Done::Put(_) | Done::ThereIsOne(_) => Err(Error::internal("a delete was answered as a put")),
        }
    }

    /// Does a write, and tries again what surely was not done.
    async fn write(&self, change: Change) -> Result<Done, Fault> {
        let deadline = self.connector.deadline();
        loop {
            let result = if self.connector.config.wait_replicas == 0 {
                self.alone(&change, deadline).await
            } else {
                self.in_batch(change.clone(), deadline).await
            };
            match result {
                Err(fault)
                    if fault.passing && fault.error.retry() == Retry::Safe && Instant::now() + PAUSE < deadline =>
                {
                    tokio::time::sleep(PAUSE).await;
                }
                result => return result,
            }
        }
    }

    async fn alone(&self, change: &Change, deadline: Instant) -> Result<Done, Fault> {
        let link = self.connector.link_for_write(deadline).await?;
        let command = change.command(self.connector.server_us(&link, deadline));
        let mut writes = link.writes.clone();
        let fault = match timeout_at(deadline, sent(writes.send_packed_command(&command))).await {
            Ok(Ok(answer)) => match done(&self.connector, &link, &answer) {
                Ok(done) => return Ok(done),
                Err(fault) => fault,
            },
            Ok(Err(fault)) => fault,
            Err(_) => Fault::timed_out("Redis did not answer in time; the write may have been done"),
        };
        if fault.relink {
            self.connector.forget(&link);
        }
        Err(fault)
    }

    async fn in_batch(&self, change: Change, deadline: Instant) -> Result<Done, Fault> {
        let kib = u32::try_from(1 + (change.value.as_ref().map_or(0, Bytes::len) >> 10)).unwrap_or(u32::MAX);
        let unsent = |text: &str| Fault {
            error: Error::unavailable(text).with_retry(Retry::Safe),
            relink: false,
            passing: false,
        };
        let room = match timeout_at(deadline, Arc::clone(&self.room).acquire_many_owned(kib)).await {
            Ok(Ok(room)) => room,
            _ => return Err(unsent("too many writes wait for Redis")),
        };
        let (answer, answered) = oneshot::channel();
        let first = {
            let mut queue = lock(&self.queue);
            queue.waiting.push_back(Waiting { change, deadline, answer, _room: room });
            !std::mem::replace(&mut queue.writing, true)
        };
        if first {
            // It ends when nothing waits any more; each of its steps has a deadline.
            let batches =
                Batches { connector: Arc::clone(&self.connector), queue: Arc::clone(&self.queue), ended: false };
            tokio::spawn(batches.run());
        }
        answered.await.unwrap_or_else(|_| {
            let error = Error::unavailable("the program is stopping; the write may have been done");
            Err(Fault { error: error.with_retry(Retry::Ambiguous), relink: false, passing: false })
        })
    }
}

/// Does the writes that wait, in batches, until none does.
struct Batches {
    connector: Arc<Connector>,
    queue: Arc<Mutex<Queue>>,
    /// Whether it ended because nothing waited any more.
    ended: bool,
}

impl Batches {
    async fn run(mut self) {
        loop {
            let batch: Vec<Waiting> = {
                let mut queue = lock(&self.queue);
                let count = queue.waiting.len().min(BATCH);
                if count == 0 {
                    queue.writing = false;
                    self.ended = true;
                    return;
                }
                queue.waiting.drain(..count).collect()
            };
            self.write(batch).await;
        }
    }

    async fn write(&self, batch: Vec<Waiting>) {
        // The first has waited longest; all end by its deadline.
        let Some(deadline) = batch.iter().map(|waiting| waiting.deadline).min() else { return };
        let results = self.send(&batch, deadline).await;
        match results {
            Ok(results) => {
                for (waiting, result) in batch.into_iter().zip(results) {
                    // Nobody waits any more when the caller gave up.
                    let _ = waiting.answer.send(result);
                }
            }
            Err(fault) => {
                for waiting in batch {
                    let _ = waiting.answer.send(Err(fault.clone()));
                }
            }
        }
    }

    /// Writes, then waits for the replicas, on one connection: Redis counts for each connection its own writes.
    async fn send(&self, batch: &[Waiting], deadline: Instant) -> Result<Vec<Result<Done, Fault>>, Fault> {
        let connector = &self.connector;
        let link = connector.link_for_write(deadline).await?;
        let latest_us = connector.server_us(&link, deadline);
        let replicas = connector.config.wait_replicas;
        let left = deadline.saturating_duration_since(Instant::now());
        let wait_ms = (left / WAIT_SHARE).as_millis().max(MIN_WAIT_MS);
        let mut pipeline = Pipeline::with_capacity(batch.len() + 1);
        for waiting in batch {
            pipeline.add_command(waiting.change.command(latest_us));
        }
        let mut wait = cmd("WAIT");
        wait.arg(replicas).arg(u64::try_from(wait_ms).unwrap_or(u64::MAX));
        pipeline.add_command(wait);
        let mut writes = link.writes.clone();
        let answers = match timeout_at(deadline, writes.send_packed_commands(&pipeline, 0, batch.len() + 1)).await {
            Ok(Ok(answers)) => answers,
            Ok(Err(error)) => {
                connector.forget(&link);
                return Err(Fault::of(error));
            }
            Err(_) => {
                connector.forget(&link);
                return Err(Fault::timed_out("Redis did not answer in time; the write may have been done"));
            }
        };
        let Some((confirmed, answers)) = answers.split_last().filter(|(_, answers)| answers.len() == batch.len())
        else {
            connector.forget(&link);
            return Err(Fault::nonsense("too few answers"));
        };
        let confirmed = match confirmed {
            Value::Int(confirmed) => u32::try_from(*confirmed).unwrap_or(u32::MAX),
            _ => 0,
        };
        let enough = confirmed >= replicas;
        let mut relink = !enough;
        let results = answers.iter().map(|answer| {
            let result = match answer {
                Value::ServerError(error) => Err(Fault::refused(error.clone())),
                answer => done(connector, &link, answer),
            };
            match result {
                Ok(done) if !enough => Err(unconfirmed(&done, confirmed, replicas)),
                Ok(done) => Ok(done),
                Err(fault) => {
                    relink |= fault.relink;
                    Err(fault)
                }
            }
        });
        let results = results.collect();
        // A master without its replicas may be one that was cut off; Sentinels and clusters know a better one then.
        if relink {
            connector.forget(&link);
        }
        Ok(results)
    }
}

impl Drop for Batches {
    /// When it ends early (a panic, a runtime that stops), those who wait must not wait for ever.
    fn drop(&mut self) {
        if !self.ended {
            let mut queue = lock(&self.queue);
            queue.writing = false;
            // Their senders go with them, which answers them.
            queue.waiting.clear();
        }
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the script says that it did.
fn done(connector: &Connector, link: &Link, answer: &Value) -> Result<Done, Fault> {
    let Some([what, version, now_us]) = numbers(answer) else { return Err(Fault::nonsense("no outcome of a write")) };
    connector.measure(link, now_us);
    match what {
        scripts::DONE if version > 0 => Ok(Done::Put(Version(version.unsigned_abs()))),
        scripts::DONE => Ok(Done::Deleted(Deletion::Deleted)),
        scripts::NOTHING_THERE => Ok(Done::Deleted(Deletion::AlreadyGone)),
        scripts::THERE_IS_ONE => Ok(Done::ThereIsOne(version)),
        scripts::OTHER_VERSION => Ok(Done::OtherVersion(version)),
        // The server's clock was set, or the write was on its way for too long. A new connection measures it anew.
        scripts::TOO_LATE => Err(Fault {
            error: Error::unavailable("the write reached Redis too late, and was not done"),
            relink: true,
            passing: true,
        }),
        _ => Err(Fault::nonsense("an unknown outcome of a write")),
    }
}

/// Fails closed: what only the master knows may be forgotten, and the refusal of a write may rest on it.
fn unconfirmed(done: &Done, confirmed: u32, wanted: u32) -> Fault {
    let (text, retry) = match done {
        Done::Put(_) | Done::Deleted(Deletion::Deleted) => ("the write may or may not stand", Retry::Ambiguous),
        _ => ("the write was not done", Retry::Safe),
    };
    let error = Error::unavailable(format!(
        "only {confirmed} of the {wanted} replicas wanted have confirmed in time (REDIS_WAIT_REPLICAS): {text}"
    ));
    Fault { error: error.with_retry(retry), relink: true, passing: false }
}

fn mismatch(only: Precondition, found: i64) -> Error {
    let wanted = if let Precondition::Version(Version(version)) = only { version } else { 0 };
    let found = if found == 0 { "there is none".to_owned() } else { format!("it has {found}") };
    Error::new(ErrorKind::Conflict, format!("the record should have version {wanted}, but {found}"))
        .with_reason(reason::VERSION_MISMATCH)
}

/// A version as it stands before a value.
fn digits(version: Version) -> String {
    format!("{:016}", version.0)
}

/// At least as long as asked for; what no clock can reach is for ever.
fn milliseconds(ttl: Duration) -> u64 {
    const MAX_MS: u128 = 1 << 42;
    match ttl.as_nanos().div_ceil(1_000_000) {
        0 => 1,
        longer if longer > MAX_MS => 0,
        ms => u64::try_from(ms).unwrap_or(0),
    }
}
