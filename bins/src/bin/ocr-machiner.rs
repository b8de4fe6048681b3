//! Creates and deletes virtual machines for Ranger and everybody who speaks its wire.

use ocr_bins::{settings::Server, startup};

fn main() -> std::process::ExitCode {
    startup::main(Server::Machiner)
}
