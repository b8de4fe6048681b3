//! A small harness: figures by CPU time, compared with a floor that runs in turn with them in the same process.
//!
//! A bench prints lines `figure <name> <value> <unit>`; lines that begin with `#` are for people.

use std::{
    fmt,
    io::{Write, stdout},
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};

/// How often each measurement is taken; its median counts.
pub const ROUNDS: usize = 5;

/// CPU time that this process has used so far, all threads together.
pub fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// Memory of this process that is in RAM, in bytes. 0 where the system does not say.
pub fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: usize = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size()
}

/// The median.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Prints a figure for programs.
pub fn figure(name: &str, value: f64, unit: &str) {
    line(format_args!("figure {name} {value:.3} {unit}"));
}

/// Prints a line for people.
pub fn remark(text: impl fmt::Display) {
    line(format_args!("# {text}"));
}

fn line(text: fmt::Arguments<'_>) {
    // Nobody reads any more: there is nothing left to do.
    let _ = writeln!(stdout().lock(), "{text}");
}
