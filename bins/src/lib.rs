//! The servers `ocr-machiner` and `ocr-executor`, and the command line `ocr`.
//!
//! A binary is a line: everything is here. [`settings`] reads and checks, [`startup`] serves, [`cli`] speaks to servers.

pub mod backends;
pub mod cli;
pub mod logging;
pub mod metrics;
pub mod service;
pub mod settings;
pub mod startup;
