//! What a server serves: put together once, run, drained.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use ocr_core::{
    Error, Owner, Result, Retry, StateStore,
    exec::{self, Executor, SecretStorage},
    lifecycle::{DeployConfig, DeployParts, Deployer},
    memory::MemoryState,
    package::LocalFolder,
    queue::scheduler::{Scheduler, SchedulerConfig},
    state::embedded::EmbeddedStore,
};
use ocr_grpc::{Bound, Generation, Readiness, Server};
use tokio_util::sync::CancellationToken;

use crate::{
    backends::Backends,
    metrics::{Metrics, MetricsSettings, Order, Sources},
    settings::Store,
};

/// How many of the things that could not be put in order one log line names.
const MAX_NAMED: usize = 10;
/// Between two tries to put the house in order at start, while the backend is away.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// The services of one process.
#[derive(Clone, Debug, Default)]
pub struct Service {
    deployer: Option<Deployer>,
    /// Where the deployer's machines may have left disks, and whose they are.
    disks: Option<(Backends, Owner)>,
    executor: Option<(Executor, Scheduler)>,
    order: Arc<Order>,
}

impl Service {
    /// With machines.
    pub fn with_deployer(mut self, backends: &Backends, store: Arc<dyn StateStore>, config: DeployConfig) -> Self {
        let parts = DeployParts {
            compute: backends.compute.clone(),
            network: backends.network.clone(),
            image: backends.image.clone(),
            guest: Some(backends.guest.clone()),
            store,
        };
        self.disks = Some((backends.clone(), config.owner.clone()));
        self.deployer = Some(Deployer::new(parts, config));
        self
    }

    /// With features, injects and conditions. Call it on a runtime: the queue's workers start.
    pub fn with_executor(
        mut self,
        backends: &Backends,
        store: Arc<dyn StateStore>,
        packages: &Path,
        config: exec::Config,
        secrets: SecretStorage,
        queue: SchedulerConfig,
    ) -> Self {
        let scheduler = Scheduler::start(queue);
        let parts = exec::Parts {
            guest: backends.guest.clone(),
            compute: backends.compute.clone(),
            store,
            packages: Arc::new(LocalFolder::new(packages)),
            scheduler: scheduler.clone(),
            secrets,
            fleet: None,
        };
        self.executor = Some((Executor::new(parts, config), scheduler));
        self
    }

    /// Takes the address; nothing is answered before [`Service::run`].
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn bind(&self, listen: SocketAddr, generation: Generation, reflection: bool) -> Result<Bound> {
        let mut server = Server::new().generation(generation).reflection(reflection);
        if let Some(deployer) = &self.deployer {
            server = server.deployer(deployer.clone());
        }
        if let Some((executor, _)) = &self.executor {
            server = server.executor(executor.clone());
        }
        server.bind(listen).await
    }

    /// Takes the address of the metrics page, where there is to be one.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn bind_metrics(&self, settings: Option<MetricsSettings>, bound: &Bound) -> Result<Option<Metrics>> {
        let Some(settings) = settings else { return Ok(None) };
        let executor = self.executor.as_ref().map(|(executor, _)| executor.clone());
        let sources = Sources { executor, load: bound.load(), order: Arc::clone(&self.order) };
        let metrics = Metrics::bind(settings, sources).await?;
        tracing::info!(address = %metrics.local_addr(), "metrics are at /metrics");
        Ok(Some(metrics))
    }

    /// Serves until `stop`, then lets work under way end within `grace`. Ready as soon as what an earlier process
    /// left unfinished was looked at.
    ///
    /// What of it could not be put in order does not keep the server from being ready: mostly it is one guest that does
    /// not answer, and all others would go without their conditions for it. The log names it, the metric
    /// `ocr_unfinished` counts it, and each later look tries again. A look that could not be made at all (the backend or
    /// the store is away) does keep it: nothing is known then.
    pub async fn run(
        self,
        bound: Bound,
        metrics: Option<Metrics>,
        reconcile_interval: Duration,
        grace: Duration,
        stop: CancellationToken,
    ) {
        let page_stop = CancellationToken::new();
        // It shows the drain too.
        let _page_ends = page_stop.clone().drop_guard();
        let page = metrics.map(|metrics| tokio::spawn(metrics.serve(page_stop.clone())));
        let keep = tokio::spawn(self.clone().keep_in_order(bound.readiness(), reconcile_interval, stop.clone()));
        let end = tokio::time::Instant::now;
        let stopped = bound.serve(stop.clone().cancelled_owned(), grace).await;
        let deadline = end() + grace;
        tracing::info!(cut_calls = stopped.cut_calls, "no longer serving; waiting for work under way");
        let left = || deadline.saturating_duration_since(end());
        if let Some((executor, scheduler)) = &self.executor {
            let cut = executor.shutdown(left()).await;
            scheduler.shutdown(left()).await;
            if cut > 0 {
                tracing::warn!(cut, "installs were cut off; the next start ends them");
            }
        }
        if let Some(deployer) = &self.deployer
            && !deployer.shutdown(left()).await
        {
            tracing::warn!("creates or deletes were cut off; the next start ends them");
        }
        keep.abort();
        let _ = keep.await;
        page_stop.cancel();
        if let Some(page) = page {
            let _ = page.await;
        }
    }

    /// Puts in order what a kill left, says that the server is ready, and looks again every now and then.
    async fn keep_in_order(self, readiness: Readiness, interval: Duration, stop: CancellationToken) {
        let mut pause = RETRY_PAUSE;
        let mut ready = false;
        let mut unfinished = Vec::new();
        loop {
            match self.put_in_order().await {
                Ok(left) => {
                    self.order.looked(left.len() as u64);
                    tell_unfinished(&unfinished, &left);
                    unfinished = left;
                    if !ready {
                        readiness.set_ready(true).await;
                        self.order.set_ready(true);
                        tracing::info!(unfinished = unfinished.len(), "ready");
                        (ready, pause) = (true, interval);
                    }
                }
                Err(error) => tracing::warn!(%error, "could not look for unfinished work; trying again"),
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(pause) => {}
            }
        }
        self.order.set_ready(false);
    }

    /// Says what could not be done now.
    async fn put_in_order(&self) -> Result<Vec<String>> {
        let mut unfinished = Vec::new();
        if let Some(deployer) = &self.deployer {
            let report = deployer.reconcile().await?;
            if !(report.ended.is_empty() && report.swept.is_empty() && report.forgotten.is_empty()) {
                tracing::warn!(
                    ended = ?report.ended, swept = ?report.swept, forgotten = ?report.forgotten,
                    "reconcile found work"
                );
            }
            unfinished.extend(report.failed);
        }
        if let Some((backends, owner)) = &self.disks {
            let swept = backends.sweep_disks(owner).await?;
            if !swept.is_empty() {
                tracing::warn!(?swept, "deleted disks that no machine has");
            }
        }
        if let Some((executor, _)) = &self.executor {
            unfinished.extend(executor.recover().await?.failed);
        }
        Ok(unfinished)
    }
}

/// Once for each change: the same guest may not answer for days.
fn tell_unfinished(before: &[String], now: &[String]) {
    if before == now {
        return;
    }
    if now.is_empty() {
        tracing::info!("what could not be put in order before is in order");
        return;
    }
    let named = now.iter().take(MAX_NAMED).collect::<Vec<_>>();
    tracing::warn!(
        unfinished = now.len(),
        ?named,
        "some of what an earlier process left cannot be put in order now; the server serves, and tries again"
    );
}

/// Opens the store.
///
/// # Errors
/// When its file cannot be opened, or another process has it.
pub fn open_store(store: &Store) -> Result<Arc<dyn StateStore>> {
    Ok(match store {
        Store::Embedded(path) => Arc::new(EmbeddedStore::open(path)?),
        Store::Memory => Arc::new(MemoryState::new()),
    })
}

/// Opens a backend, again and again while it is away; `None` when the process is told to stop first.
///
/// # Errors
/// Those that no waiting will cure.
pub async fn wait_for_backend<F>(open: impl Fn() -> F, stop: &CancellationToken) -> Result<Option<Backends>>
where
    F: Future<Output = Result<Backends, Error>>,
{
    loop {
        match open().await {
            Ok(backends) => return Ok(Some(backends)),
            Err(error) if error.retry() == Retry::Never => return Err(error),
            Err(error) => tracing::warn!(%error, "the backend is away; trying again"),
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(None),
            () = tokio::time::sleep(RETRY_PAUSE) => {}
        }
    }
}

/// A token that SIGTERM or SIGINT cancels.
///
/// # Errors
/// When the signals cannot be watched.
pub fn stop_on_signals() -> std::io::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};

    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    let told = stop.clone();
    // It ends with the process, or when it has told.
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("told to stop");
        told.cancel();
    });
    Ok(stop)
}
