//! Installs features and injects in virtual machines, and watches conditions there.

use ocr_bins::{settings::Server, startup};

fn main() -> std::process::ExitCode {
    startup::main(Server::Executor)
}
