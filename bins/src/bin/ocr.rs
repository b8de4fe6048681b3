//! The command line: a client of the servers, and all of them in one process.

fn main() -> std::process::ExitCode {
    ocr_bins::cli::main()
}
