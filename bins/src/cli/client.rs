//! Connections to the servers.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use super::{args::Cli, output::Failure};

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Connects to the Machiner.
///
/// # Errors
/// When the address is none, or nobody answers there.
pub(crate) async fn machiner(cli: &Cli) -> Result<Channel, Failure> {
    connect("Machiner", &cli.machiner, "--machiner or OCR_MACHINER").await
}

/// Connects to the Executor.
///
/// # Errors
/// When the address is none, or nobody answers there.
pub(crate) async fn executor(cli: &Cli) -> Result<Channel, Failure> {
    connect("Executor", &cli.executor, "--executor or OCR_EXECUTOR").await
}

async fn connect(server: &str, address: &str, setting: &str) -> Result<Channel, Failure> {
    let endpoint = Endpoint::from_shared(address.to_owned())
        .map_err(|_| Failure::new(format!("{setting}: wants an address such as http://127.0.0.1:9000, got {address:?}")))?
        .connect_timeout(CONNECT_DEADLINE)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_while_idle(true);
    endpoint.connect().await.map_err(|error| {
        let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        Failure::new(format!("the {server} at {address} cannot be reached: {cause}; is it running? ({setting})"))
    })
}
