//! Connections to the servers.

use tonic::transport::Channel;

use super::{args::Cli, output::Failure};

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
    ocr_grpc::client::connect(address).await.map_err(|error| {
        Failure::new(format!("the {server} cannot be reached: {}; set its address with {setting}", error.message()))
    })
}
