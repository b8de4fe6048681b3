//! What a server serves: put together once, run, drained.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use ocr_core::{
    Error, Owner, Result, Retry, StateStore,
    exec::{self, Executor, SecretStorage},
    fleet::{Fleet, FleetConfig, FleetParts},
    lifecycle::{DeployConfig, DeployParts, Deployer},
    memory::MemoryState,
    package::{
        LocalFolder, PackageSource,
        query::{self, Queries},
        registry::Registry,
    },
    queue::scheduler::{Scheduler, SchedulerConfig},
    signal::{LocalSignals, Signals},
    state::{embedded::EmbeddedStore, redis::RedisStore},
};
use ocr_grpc::{Bound, Generation, Readiness, Server};
use tokio_util::sync::CancellationToken;

use crate::{
    backends::Backends,
    metrics::{Metrics, MetricsSettings, Order, Sources},
    settings::{Packages, Store},
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
    /// The other executors on the same store.
    fleet: Option<Fleet>,
    queries: Option<Queries>,
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

    /// With features, injects, conditions, and answers about packages. Call it on a runtime: the queue's workers start.
    ///
    /// With a fleet's configuration it joins the other executors on this store, and acts only while it is one of them.
    ///
    /// # Errors
    /// `Invalid` for a fleet's configuration that cannot be.
    pub fn with_executor(
        mut self,
        backends: &Backends,
        shared: Shared,
        packages: Arc<dyn PackageSource>,
        parts: ExecutorParts,
    ) -> Result<Self> {
        let Shared { store, signals } = shared;
        let ExecutorParts { config, secrets, queue, fleet } = parts;
        let (scheduler, fleet) = match fleet {
            Some(fleet) => {
                // Nothing runs before the fleet says what may.
                let scheduler = Scheduler::start(SchedulerConfig { gated: true, max_connections: 0, ..queue });
                let gates = Arc::new(scheduler.clone());
                let parts = FleetParts { store: store.clone(), signals, gates };
                (scheduler, Some(Fleet::start(parts, &fleet)?))
            }
            None => (Scheduler::start(queue), None),
        };
        let parts = exec::Parts {
            guest: backends.guest.clone(),
            compute: backends.compute.clone(),
            store: store.clone(),
            packages: packages.clone(),
            scheduler: scheduler.clone(),
            secrets,
            fleet: fleet.clone(),
        };
        let executor = match &backends.credentials {
            None => Executor::new(parts, config),
            Some(credentials) => Executor::with_credentials(parts, config, credentials.clone()),
        };
        self.executor = Some((executor, scheduler));
        self.fleet = fleet;
        self.queries = Some(Queries::new(packages, store, query::Config::default()));
        Ok(self)
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
        if let Some(queries) = &self.queries {
            server = server.queries(queries.clone());
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
            if let Some(fleet) = &self.fleet {
                fleet.leave(left()).await;
            }
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

/// An executor's settings.
#[derive(Clone, Debug)]
pub struct ExecutorParts {
    /// Its own.
    pub config: exec::Config,
    /// What becomes of secrets that are needed again later.
    pub secrets: SecretStorage,
    /// The queue's.
    pub queue: SchedulerConfig,
    /// The other executors', where the store is one that they share.
    pub fleet: Option<FleetConfig>,
}

/// What processes with the same store share.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Keeps the records.
    pub store: Arc<dyn StateStore>,
    /// Carries notices between those who share the store; within this process alone when nobody does.
    pub signals: Arc<dyn Signals>,
}

/// Opens the store. One on a server is not asked yet.
///
/// # Errors
/// When its file cannot be opened, or another process has it.
pub fn open_store(store: &Store) -> Result<Arc<dyn StateStore>> {
    Ok(open_shared(store)?.store)
}

/// [`open_store`], with the signals that belong to it.
///
/// # Errors
/// Those of [`open_store`].
pub fn open_shared(store: &Store) -> Result<Shared> {
    let store: Arc<dyn StateStore> = match store {
        Store::Redis(config) => {
            return Ok(over_redis(RedisStore::new((**config).clone())?));
        }
        Store::Embedded(path) => Arc::new(EmbeddedStore::open(path)?),
        Store::Memory => Arc::new(MemoryState::new()),
    };
    Ok(Shared { store, signals: Arc::new(LocalSignals::new()) })
}

fn over_redis(store: RedisStore) -> Shared {
    Shared { signals: Arc::new(store.signals()), store: Arc::new(store) }
}

/// Opens the store, and asks one on a server again and again while that is away; `None` when the process is told to stop
/// first.
///
/// # Errors
/// Those that no waiting will cure: a file that another process has, a password that is wrong.
pub async fn wait_for_store(store: &Store, stop: &CancellationToken) -> Result<Option<Shared>> {
    if let Store::Redis(config) = store {
        let asked = RedisStore::new((**config).clone())?;
        let Some(warnings) = wait_for("the server of the store", || asked.check(), stop).await? else {
            return Ok(None);
        };
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        return Ok(Some(over_redis(asked)));
    }
    open_shared(store).map(Some)
}

/// Opens the source of packages.
///
/// # Errors
/// When the registry's cache cannot be had, or its certificates cannot be used.
pub async fn open_packages(packages: &Packages) -> Result<Arc<dyn PackageSource>> {
    match packages {
        Packages::Folder(folder) => Ok(Arc::new(LocalFolder::new(folder))),
        Packages::Registry(config) => {
            let config = config.as_ref().clone();
            let opened = tokio::task::spawn_blocking(move || Registry::open(config)).await;
            let registry =
                opened.map_err(|error| Error::internal("the package cache was not opened").with_source(error))?;
            Ok(Arc::new(registry?))
        }
    }
}

/// Opens a backend, again and again while it is away; `None` when the process is told to stop first.
///
/// # Errors
/// Those that no waiting will cure.
pub async fn wait_for_backend<F>(open: impl Fn() -> F, stop: &CancellationToken) -> Result<Option<Backends>>
where
    F: Future<Output = Result<Backends, Error>>,
{
    wait_for("the backend", open, stop).await
}

async fn wait_for<T, F>(what: &str, open: impl Fn() -> F, stop: &CancellationToken) -> Result<Option<T>>
where
    F: Future<Output = Result<T, Error>>,
{
    loop {
        let opened = tokio::select! {
            () = stop.cancelled() => return Ok(None),
            opened = open() => opened,
        };
        match opened {
            Ok(opened) => return Ok(Some(opened)),
            Err(error) if error.retry() == Retry::Never => return Err(error),
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "{what} is away; trying again");
            }
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
