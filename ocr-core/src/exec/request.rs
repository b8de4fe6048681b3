//! Checks requests before anything is done for them.

use std::{collections::BTreeMap, time::Duration};

use super::{Account, ConditionRequest, InstallKind, InstallRequest, Probe};
use crate::{
    Error, Result,
    guest::{check_user_name, check_variable_name},
    queue::scheduler::{MAX_INTERVAL, MIN_INTERVAL},
};

/// The longest name of an install, in bytes.
const MAX_NAME_BYTES: usize = 255;
/// The most variables of one request.
const MAX_VARIABLES: usize = 256;
/// The most that all names and values of an environment take, in bytes. It goes to the guest with each run.
const MAX_ENVIRONMENT_BYTES: usize = 32 << 10;
/// The longest shell line, in bytes.
const MAX_LINE_BYTES: usize = 32 << 10;

pub(super) fn check_install(request: &InstallRequest) -> Result<()> {
    if request.kind == InstallKind::Condition {
        return Err(Error::invalid("kind", "wants a feature or an inject; a condition has a call of its own"));
    }
    check_name(&request.name)?;
    check_account(&request.account)?;
    check_environment(&request.environment)
}

pub(super) fn check_condition(request: &ConditionRequest) -> Result<()> {
    check_name(&request.name)?;
    check_account(&request.account)?;
    check_environment(&request.environment)?;
    match &request.probe {
        Probe::Package(_) => Ok(()),
        Probe::Command { line, interval } => {
            if line.trim().is_empty() {
                return Err(Error::invalid("command", "must not be empty"));
            }
            if line.len() > MAX_LINE_BYTES || line.contains('\0') {
                return Err(Error::invalid(
                    "command",
                    format_args!("wants a shell line of at most {MAX_LINE_BYTES} bytes, without NUL"),
                ));
            }
            check_interval(*interval)
        }
    }
}

pub(super) fn check_interval(interval: Duration) -> Result<()> {
    if interval < MIN_INTERVAL {
        return Err(Error::invalid("interval", "must be greater than 0 seconds"));
    }
    if interval > MAX_INTERVAL {
        return Err(Error::invalid("interval", format_args!("must be at most {} seconds", MAX_INTERVAL.as_secs())));
    }
    Ok(())
}

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() {
        return Err(Error::invalid("name", "must not be empty"));
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(Error::invalid(
            "name",
            format_args!("must be at most {MAX_NAME_BYTES} bytes long, got {} bytes", name.len()),
        ));
    }
    match name.chars().find(|c| c.is_control()) {
        Some(bad) => Err(Error::invalid("name", format_args!("must not contain {bad:?}"))),
        None => Ok(()),
    }
}

fn check_account(account: &Account) -> Result<()> {
    if account.username.is_empty() { Ok(()) } else { check_user_name(&account.username) }
}

fn check_environment(environment: &BTreeMap<String, String>) -> Result<()> {
    let bytes: usize = environment.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    if environment.len() > MAX_VARIABLES || bytes > MAX_ENVIRONMENT_BYTES {
        return Err(Error::invalid(
            "environment",
            format_args!(
                "wants at most {MAX_VARIABLES} variables and {MAX_ENVIRONMENT_BYTES} bytes in all, got {} and {bytes}",
                environment.len()
            ),
        ));
    }
    for (name, value) in environment {
        check_variable_name(name)?;
        if value.contains('\0') {
            return Err(Error::invalid("environment", format_args!("the value of {name} must not contain a NUL byte")));
        }
    }
    Ok(())
}
