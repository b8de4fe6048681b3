//! A store and signals in memory that fail in the ways real ones do.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use ocr_core::{
    Deletion, Error, Key, Notice, NoticeStream, Precondition, Result, Retry, Signals, StateStore, Version, Versioned,
    memory::MemoryState, signal::LocalSignals,
};
use tokio::{sync::watch, time::sleep};

use crate::sim::Random;

/// One process's way to the store and to the others.
#[derive(Clone, Debug)]
pub(crate) struct Path {
    store: MemoryState,
    signals: LocalSignals,
    random: Arc<Random>,
    /// Nobody answers: calls wait, and arrive when it is over.
    stopped: watch::Sender<bool>,
    /// Every so many calls something goes wrong.
    every: Arc<AtomicBool>,
}

impl Path {
    pub(crate) fn new(store: &MemoryState, signals: &LocalSignals, seed: u64) -> Self {
        Self {
            store: store.clone(),
            signals: signals.clone(),
            random: Arc::new(Random::new(seed)),
            stopped: watch::Sender::new(false),
            every: Arc::default(),
        }
    }

    pub(crate) fn stop(&self, stopped: bool) {
        self.stopped.send_replace(stopped);
    }

    pub(crate) fn trouble(&self, on: bool) {
        self.every.store(on, Ordering::Relaxed);
    }

    /// Makes a call. Who no longer waits for it does not stop it: it arrives all the same.
    async fn call<T: Send + 'static>(&self, call: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        let (way, calm) = (self.clone(), !self.every.load(Ordering::Relaxed));
        let sent = tokio::spawn(async move {
            let random = &way.random;
            if !calm && random.once_in(40) {
                return Err(Error::unavailable("the connection was refused"));
            }
            let lost = !calm && random.once_in(40);
            sleep(random.millis(0, if !calm && random.once_in(40) { 400 } else { 2 })).await;
            let mut stopped = way.stopped.subscribe();
            drop(stopped.wait_for(|stopped| !stopped).await);
            let result = call.await;
            if lost {
                return Err(Error::unavailable("the connection broke").with_retry(Retry::Ambiguous));
            }
            result
        });
        sent.await.map_err(|error| Error::internal("the call broke off").with_source(error))?
    }
}

#[async_trait]
impl StateStore for Path {
    async fn get(&self, key: &Key) -> Result<Option<Versioned>> {
        let (store, key) = (self.store.clone(), key.clone());
        self.call(async move { store.get(&key).await }).await
    }

    async fn put(&self, key: &Key, value: Bytes, only: Precondition, ttl: Option<Duration>) -> Result<Version> {
        let (store, key) = (self.store.clone(), key.clone());
        self.call(async move { store.put(&key, value, only, ttl).await }).await
    }

    async fn delete(&self, key: &Key, only: Precondition) -> Result<Deletion> {
        let (store, key) = (self.store.clone(), key.clone());
        self.call(async move { store.delete(&key, only).await }).await
    }

    async fn list(&self, prefix: &str, after: Option<&Key>, limit: usize) -> Result<Vec<(Key, Versioned)>> {
        let (store, prefix, after) = (self.store.clone(), prefix.to_owned(), after.cloned());
        self.call(async move { store.list(&prefix, after.as_ref(), limit).await }).await
    }
}

#[async_trait]
impl Signals for Path {
    async fn send(&self, topic: &Key, payload: Bytes) -> Result<()> {
        // Some are lost, and nobody is told: worse than the contract allows.
        if self.every.load(Ordering::Relaxed) && self.random.once_in(10) || *self.stopped.borrow() {
            return Ok(());
        }
        sleep(self.random.millis(0, 2)).await;
        self.signals.send(topic, payload).await
    }

    async fn listen(&self, topic: &Key) -> Result<NoticeStream> {
        if *self.stopped.borrow() {
            return Err(Error::unavailable("nobody answers"));
        }
        // Who is cut off is told of a gap when it is over.
        let heard = self.signals.listen(topic).await?;
        let gaps = stream::unfold(self.stopped.subscribe(), |mut stopped| async move {
            stopped.wait_for(|stopped| *stopped).await.ok()?;
            stopped.wait_for(|stopped| !stopped).await.ok()?;
            Some((Notice::Gap, stopped))
        });
        Ok(Box::pin(stream::select(heard, gaps).chain(stream::pending())))
    }
}
