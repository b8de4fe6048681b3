//! `ocr serve`: everything in one process.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use ocr_core::{
    exec::{self, SecretStorage},
    lifecycle::DeployConfig,
    package::registry,
    queue::scheduler::SchedulerConfig,
};
use ocr_grpc::{Generation, executor::MAX_REPLY_OUTPUT_BYTES};
use tokio_util::sync::CancellationToken;

use super::{
    args::{BackendArgs, ServeArgs},
    output::{Failure, Output},
};
use crate::{
    backends::Backends,
    logging,
    metrics::MetricsSettings,
    service::{ExecutorParts, Service, open_packages, open_shared, stop_on_signals, wait_for_backend},
    settings::{LogSettings, Packages, Store, read_key_file},
};

const RECONCILE_INTERVAL: Duration = Duration::from_secs(60);
/// As METRICS_TOP's default.
const METRICS_TOP: usize = 100;
const GRACE: Duration = Duration::from_secs(25);

/// Serves until SIGTERM or SIGINT.
pub(crate) async fn run(args: &ServeArgs, output: &Output) -> Result<(), Failure> {
    let log = LogSettings { level: tracing::Level::INFO, dir: None, file_name: String::new() };
    let _log = logging::start(&log).map_err(Failure::new)?;
    let stop = stop_on_signals().map_err(|error| Failure::new(error.to_string()))?;
    let Some(backends) = wait_for_backend(|| Backends::open(&args.backend), &stop).await? else { return Ok(()) };
    let packages = match (&args.packages, &args.registry, &args.registry_cache) {
        (None, Some(url), Some(cache)) => Packages::Registry(Box::new(registry::Config::new(url, cache))),
        (folder, ..) => Packages::Folder(folder.clone().unwrap_or_default()),
    };
    let metrics = args.metrics.map(|address| MetricsSettings { address, top: METRICS_TOP });
    let secrets = match (&args.state_key_file, &args.state) {
        (Some(path), _) => SecretStorage::Sealed(Arc::new(read_key_file(path).map_err(Failure::new)?)),
        (None, None) => SecretStorage::Memory,
        (None, Some(_)) => SecretStorage::Refuse,
    };
    let state = args.state.as_deref();
    let serving = start(backends, &args.backend, args.listen, &packages, state, secrets, metrics).await?;
    output.result(
        format_args!("ocr listening on {}", serving.address()),
        &serde_json::json!({ "address": serving.address().to_string() }),
    );
    stop.cancelled().await;
    serving.stop().await;
    Ok(())
}

/// A server that runs as a task of this process.
#[derive(Debug)]
pub(crate) struct Serving {
    address: SocketAddr,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Serving {
    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends it, and waits until it has ended.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the server ended badly");
        }
    }
}

/// Starts a server with all services.
///
/// # Errors
/// When the store or the address cannot be had.
pub(crate) async fn start(
    backends: Backends,
    args: &BackendArgs,
    listen: SocketAddr,
    packages: &Packages,
    state: Option<&Path>,
    secrets: SecretStorage,
    metrics: Option<MetricsSettings>,
) -> Result<Serving, Failure> {
    let shared = open_shared(&state.map_or(Store::Memory, |path| Store::Embedded(path.to_owned())))?;
    let deploy = DeployConfig { ready_deadline: args.ready_timeout, ..DeployConfig::new(args.owner.clone()) };
    let config = exec::Config {
        action_deadline: Duration::from_secs(300),
        ready_deadline: args.ready_timeout,
        ready_interval: deploy.ready_interval,
        reply_output_bytes: MAX_REPLY_OUTPUT_BYTES,
    };
    let packages = open_packages(packages).await?;
    let parts = ExecutorParts { config, secrets, queue: SchedulerConfig::default(), fleet: None };
    let service = Service::default()
        .with_deployer(&backends, shared.store.clone(), deploy)
        .with_executor(&backends, shared, packages, parts)?;
    let bound = service.bind(listen, Generation::Newer, true).await?;
    let metrics = service.bind_metrics(metrics, &bound).await?;
    let (address, stop) = (bound.local_addr(), CancellationToken::new());
    let task = tokio::spawn(service.run(bound, metrics, RECONCILE_INTERVAL, GRACE, stop.clone()));
    Ok(Serving { address, stop, task })
}
