//! What the command line says: text for people, JSON for programs, progress on a terminal.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is where the command line speaks")]

use std::{fmt, process::ExitCode, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Where results go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    /// Output as JSON, or as text.
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether programs read it.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// A line for people; programs do not see it.
    pub(crate) fn line(&self, text: fmt::Arguments<'_>) {
        if !self.json {
            println!("{text}");
        }
    }

    /// A result: `text` for people, `value` for programs.
    pub(crate) fn result(&self, text: fmt::Arguments<'_>, value: &impl Serialize) {
        if !self.json {
            println!("{text}");
            return;
        }
        match serde_json::to_string(value) {
            Ok(json) => println!("{json}"),
            Err(error) => eprintln!("ocr: the result cannot be written as JSON: {error}"),
        }
    }

    /// A spinner for work that takes long; it shows nothing where nobody looks.
    pub(crate) fn progress(&self, message: impl Into<String>) -> ProgressBar {
        if self.json {
            return ProgressBar::hidden();
        }
        // Hidden by itself when stderr is no terminal.
        let bar = ProgressBar::new_spinner().with_message(message.into());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    }

    /// Says why nothing came of it.
    pub(crate) fn fail(&self, failure: &Failure) -> ExitCode {
        if self.json {
            eprintln!("{}", serde_json::json!({ "error": { "code": failure.code, "message": failure.message } }));
        } else {
            eprintln!("ocr: {}", failure.message);
        }
        ExitCode::FAILURE
    }
}

/// Why a command came to nothing.
#[derive(Debug)]
pub(crate) struct Failure {
    code: Option<String>,
    message: String,
}

impl Failure {
    /// A failure of this program's own.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { code: None, message: message.into() }
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        Self {
            code: Some(format!("{:?}", status.code())),
            message: format!("{} ({:?})", status.message(), status.code()),
        }
    }
}

impl From<ocr_core::Error> for Failure {
    fn from(error: ocr_core::Error) -> Self {
        // The cause is not in the text; on a terminal nobody reads a log for it.
        let cause = std::error::Error::source(&error).map(|source| format!(" ({source})")).unwrap_or_default();
        Self { code: Some(error.kind().to_string()), message: format!("{error}{cause}") }
    }
}
