//! The command line `ocr`: a client of the servers, and all of them in one process.

pub mod args;
mod client;
mod condition;
mod conform;
mod demo;
mod install;
mod output;
mod package;
mod queue;
mod screen;
mod serve;
mod vm;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use ocr_core::seal::SealKey;
use secrecy::ExposeSecret;

use self::{
    args::{Cli, Command},
    output::{Failure, Output},
};

/// Runs `ocr` with this process's arguments.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = Output::new(cli.json);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return output.fail(&Failure::new(format!("no runtime: {error}"))),
    };
    let outcome = runtime.block_on(run(cli, &output));
    // Blocking threads may hang in a library; the outcome is known, so they are not waited for.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => code,
        Err(failure) => output.fail(&failure),
    }
}

async fn run(cli: Cli, output: &Output) -> Result<ExitCode, Failure> {
    match &cli.command {
        Command::Vm(command) => vm::run(&cli, command, output).await?,
        Command::Feature(command) => install::run(&cli, install::Kind::Feature, command, output).await?,
        Command::Inject(command) => install::run(&cli, install::Kind::Inject, command, output).await?,
        Command::Condition(command) => condition::run(&cli, command, output).await?,
        Command::Package(command) => package::run(&cli, command, output).await?,
        Command::Queue(command) => queue::run(&cli, command, output).await?,
        Command::Reconcile => vm::reconcile(&cli, output).await?,
        Command::Conform(args) => return conform::run(args, output).await,
        Command::Demo(args) => return demo::run(args, output).await,
        Command::Key => {
            let key = SealKey::generate();
            let text = key.reveal();
            let text = text.expose_secret();
            output.result(format_args!("{text}"), &serde_json::json!({ "key": text, "id": key.id() }));
        }
        Command::Serve(args) => serve::run(args, output).await?,
        #[cfg(feature = "ssh")]
        Command::ForgetHostKey { id, state } => {
            // Opening would make a store where there is none.
            if !state.is_file() {
                return Err(Failure::new(format!("{}: there is no such file", state.display())));
            }
            let store = crate::service::open_store(&crate::settings::Store::Embedded(state.clone()))?;
            let forgotten = ocr_core::ssh::HostKeys::new(store).forget(*id).await?;
            let said = match forgotten {
                ocr_core::Deletion::Deleted => "forgotten; the next contact pins the key that it finds",
                ocr_core::Deletion::AlreadyGone => "there was no key of this machine",
            };
            output.line(format_args!("{said}"));
        }
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "ocr", &mut std::io::stdout());
        }
        Command::Man { folder } => {
            std::fs::create_dir_all(folder)
                .and_then(|()| clap_mangen::generate_to(Cli::command(), folder))
                .map_err(|error| Failure::new(format!("{}: {error}", folder.display())))?;
            output.line(format_args!("man pages are in {}", folder.display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}
