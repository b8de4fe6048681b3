//! How a server starts: once, for all of them.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "what a server says before and beside its log")]

use std::{path::PathBuf, process::ExitCode};

use clap::{Arg, ArgAction, Command, value_parser};
use ocr_grpc::Generation;

use crate::{
    backends::Backends,
    logging,
    service::{ExecutorParts, Service, open_packages, stop_on_signals, wait_for_backend, wait_for_store},
    settings::{Backend, Guest, Server, Settings, VARIABLES, Wanted, environment_over},
};

/// The exit code for settings that cannot be used.
const BAD_SETTINGS: u8 = 2;

/// Runs a server with this process's arguments and environment.
pub fn main(server: Server) -> ExitCode {
    let matches = command(server).get_matches();
    let env_file = matches.get_one::<PathBuf>("env-file");
    let settings =
        match environment_over(env_file.map(PathBuf::as_path)).and_then(|source| Settings::read(server, &source)) {
            Ok(settings) => settings,
            Err(faults) => {
                eprintln!("{}: {faults}", server.program());
                return ExitCode::from(BAD_SETTINGS);
            }
        };
    if matches.get_flag("check-config") {
        for (name, value) in settings.effective() {
            println!("{name}={value}");
        }
        for warning in &settings.warnings {
            println!("# {warning}");
        }
        return ExitCode::SUCCESS;
    }
    let _log = match logging::start(&settings.log) {
        Ok(guard) => guard,
        Err(why) => {
            eprintln!("{}: {why}", server.program());
            return ExitCode::from(BAD_SETTINGS);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "no runtime");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(serve(settings));
    // A thread that hangs in a library must not keep the process; what counts has been waited for.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "the server cannot run");
            ExitCode::FAILURE
        }
    }
}

async fn serve(settings: Settings) -> ocr_core::Result<()> {
    let program = settings.server.program();
    let shown: Vec<_> = settings.effective().map(|(name, value)| format!("{name}={value}")).collect();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), settings = %shown.join(" "), "{program} starts");
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    if settings.insecure {
        tracing::warn!("GLOBAL_INSECURE is true: certificates of the servers that we call are not verified");
    }
    if !settings.listen.ip().is_loopback() {
        tracing::warn!("GLOBAL_HOST is not loopback: whoever reaches {} can use this server", settings.listen);
    }
    if let Some(metrics) = settings.metrics.filter(|metrics| !metrics.address.ip().is_loopback()) {
        tracing::warn!("METRICS_ADDRESS is not loopback: whoever reaches {} can read the metrics", metrics.address);
    }
    let stop =
        stop_on_signals().map_err(|error| ocr_core::Error::internal("signals cannot be watched").with_source(error))?;
    // The store first: it tells another process with the same file before anything is touched.
    let Some(shared) = wait_for_store(&settings.store, &stop).await? else { return Ok(()) };
    let open = || async {
        match &settings.backend {
            Backend::Libvirt(libvirt) => Backends::libvirt(libvirt).await,
            Backend::Memory => Ok(Backends::memory()),
        }
    };
    let Some(backends) = wait_for_backend(open, &stop).await? else { return Ok(()) };
    let backends = match &settings.guest {
        Guest::Agent => backends,
        #[cfg(feature = "ssh")]
        Guest::Ssh(ssh) => backends.over_ssh(ssh, shared.store.clone())?,
    };
    let service = match settings.server {
        Server::Machiner => Service::default().with_deployer(&backends, shared.store, settings.deploy),
        Server::Executor => {
            let packages = open_packages(&settings.packages).await?;
            let parts = ExecutorParts {
                config: settings.exec,
                secrets: settings.secrets,
                queue: settings.queue,
                fleet: settings.fleet,
            };
            Service::default().with_executor(&backends, shared, packages, parts)?
        }
    };
    let generation = if settings.identifier_reply { Generation::Older } else { Generation::Newer };
    let bound = service.bind(settings.listen, generation, settings.reflection).await?;
    let metrics = service.bind_metrics(settings.metrics, &bound).await?;
    tracing::info!(address = %bound.local_addr(), "listening");
    // For whoever started us with port 0.
    println!("{program} listening on {}", bound.local_addr());
    service.run(bound, metrics, settings.reconcile_interval, settings.shutdown_grace, stop).await;
    Ok(())
}

fn command(server: Server) -> Command {
    let about = match server {
        Server::Machiner => "Creates and deletes virtual machines for Ranger and everybody who speaks its wire.",
        Server::Executor => "Installs features and injects in virtual machines, and watches conditions there.",
    };
    Command::new(server.program())
        .version(env!("CARGO_PKG_VERSION"))
        .about(about)
        .max_term_width(100)
        .arg(
            Arg::new("env-file")
                .long("env-file")
                .value_name("FILE")
                .value_parser(value_parser!(PathBuf))
                .help("Read variables from this file too; the environment goes before it"),
        )
        .arg(
            Arg::new("check-config")
                .long("check-config")
                .action(ArgAction::SetTrue)
                .help("Check the settings, print what is in effect, and end"),
        )
        .after_help(variables_help(server))
}

fn variables_help(server: Server) -> String {
    let mut text = String::from("Variables:\n");
    for variable in VARIABLES.iter().filter(|variable| variable.servers.contains(&server)) {
        let wanted = match variable.wanted {
            Wanted::Always => " (mandatory)".to_owned(),
            Wanted::WithOpenStack | Wanted::ByOpenStack => " (mandatory with BACKEND=openstack)".to_owned(),
            Wanted::Optional => variable
                .default
                .map(|default| format!(" [{}]", default.replace("SERVER", server.name())))
                .unwrap_or_default(),
        };
        text += &format!("  {}{wanted}\n        {}\n", variable.name, variable.about);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_names_every_variable_of_the_server() {
        for server in [Server::Machiner, Server::Executor] {
            let help = command(server).render_long_help().to_string();
            for variable in VARIABLES.iter().filter(|variable| variable.servers.contains(&server)) {
                assert!(help.contains(variable.name), "{} in the help of {}", variable.name, server.name());
            }
        }
    }
}
