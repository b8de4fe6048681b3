//! Logs: to stderr for people, or to one file a day.

use std::io::IsTerminal;

use tracing_appender::{non_blocking::WorkerGuard, rolling};
use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};

use crate::settings::LogSettings;

/// How many log files of earlier days are kept.
const KEPT_FILES: usize = 30;

/// Keeps the writer of the log file alive; what is not written yet is written when it is dropped.
#[derive(Debug)]
pub struct LogGuard {
    _writer: Option<WorkerGuard>,
}

/// Begins to log. Call it once.
///
/// # Errors
/// When the folder cannot be made or written.
pub fn start(settings: &LogSettings) -> Result<LogGuard, String> {
    // The level is ours; what libraries below say is of use only when it is bad.
    let filter = EnvFilter::new(format!(
        "warn,ocr={0},ocr_bins={0},ocr_core={0},ocr_grpc={0},ocr_libvirt={0},ocr_openstack={0}",
        settings.level
    ));
    let registry = tracing_subscriber::registry().with(filter);
    let writer = match &settings.dir {
        None => {
            // Escape codes make a log file unreadable.
            let layer = tracing_subscriber::fmt::layer()
                .with_writer(std::io::stderr)
                .with_ansi(std::io::stderr().is_terminal());
            registry.with(layer).try_init().map_err(|error| error.to_string())?;
            None
        }
        Some(dir) => {
            std::fs::create_dir_all(dir).map_err(|error| format!("LOG_DIR {}: {error}", dir.display()))?;
            let appender = rolling::Builder::new()
                .rotation(rolling::Rotation::DAILY)
                .filename_prefix(&settings.file_name)
                .max_log_files(KEPT_FILES)
                .build(dir)
                .map_err(|error| format!("LOG_DIR {}: {error}", dir.display()))?;
            let (writer, guard) = tracing_appender::non_blocking(appender);
            let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false);
            registry.with(layer).try_init().map_err(|error| error.to_string())?;
            Some(guard)
        }
    };
    Ok(LogGuard { _writer: writer })
}
