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

use crate::{backends::Backends, settings::Store};

/// Between two tries to put the house in order at start, while the backend is away.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// The services of one process.
#[derive(Clone, Debug, Default)]
pub struct Service {
    deployer: Option<Deployer>,
    /// Where the deployer's machines may have left disks, and whose they are.
    disks: Option<(Backends, Owner)>,
    executor: Option<(Executor, Scheduler)>,
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

    /// Serves until `stop`, then lets work under way end within `grace`. Ready as soon as what an earlier process
    /// left unfinished is in order.
    pub async fn run(self, bound: Bound, reconcile_interval: Duration, grace: Duration, stop: CancellationToken) {
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
    }

    /// Puts in order what a kill left, says that the server is ready, and looks again every now and then.
    async fn keep_in_order(self, readiness: Readiness, interval: Duration, stop: CancellationToken) {
        let mut pause = RETRY_PAUSE;
        let mut ready = false;
        loop {
            match self.put_in_order().await {
                Ok(()) if !ready => {
                    readiness.set_ready(true).await;
                    tracing::info!("ready");
                    (ready, pause) = (true, interval);
                }
                Ok(()) => {}
                Err(error) => tracing::warn!(%error, "could not look for unfinished work; trying again"),
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn put_in_order(&self) -> Result<()> {
        if let Some(deployer) = &self.deployer {
            let report = deployer.reconcile().await?;
            if !report.is_clean() {
                tracing::warn!(
                    ended = ?report.ended, swept = ?report.swept, forgotten = ?report.forgotten, failed = ?report.failed,
                    "reconcile found work"
                );
            }
        }
        if let Some((backends, owner)) = &self.disks {
            let swept = backends.sweep_disks(owner).await?;
            if !swept.is_empty() {
                tracing::warn!(?swept, "deleted disks that no machine has");
            }
        }
        if let Some((executor, _)) = &self.executor {
            let report = executor.recover().await?;
            tracing::debug!(?report, "looked for unfinished installs");
        }
        Ok(())
    }
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
