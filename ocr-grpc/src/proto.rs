//! The messages, clients and servers of the contract, generated from `proto/ocr.proto`.
//!
//! Messages that may carry secrets (accounts, environments, commands, output) have a `Debug` that shows none of them.

use std::{fmt, str::FromStr};

use ocr_core::Error;
use prost::Message as _;
use prost_types::FileDescriptorSet;

pub use generated::*;

#[allow(
    clippy::all,
    missing_docs,
    non_camel_case_types,
    unreachable_pub,
    unused_qualifications,
    reason = "generated; the schema has the documentation"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/_.rs"));
}

/// The one service that differs in [`Generation::Older`]: `ConditionService.create` returns an [`Identifier`].
#[allow(
    clippy::all,
    missing_docs,
    non_camel_case_types,
    unused_qualifications,
    reason = "generated; the schema has the documentation"
)]
pub mod older {
    include!(concat!(env!("OUT_DIR"), "/older/_.rs"));
}

/// Which generation of the contract a server speaks. They differ in the reply of `ConditionService.create` alone.
///
/// Each is unreadable to clients of the other: an older client takes the newer reply for an id that is no UUID, and a
/// newer one cannot decode the older reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Generation {
    /// An [`ExecutorResponse`]: id and output.
    #[default]
    Newer,
    /// An [`Identifier`] alone, as the public Ranger of 2024 wants it.
    Older,
}

impl FromStr for Generation {
    type Err = Error;

    /// Reads `newer` or `older`.
    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "newer" => Ok(Self::Newer),
            "older" => Ok(Self::Older),
            _ => Err(Error::invalid(
                "generation",
                format_args!("wants newer or older, got {}", ocr_core::id::shown(text)),
            )),
        }
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Newer => "newer",
            Self::Older => "older",
        })
    }
}

impl Generation {
    /// The schema as this generation has it, with all its services.
    pub fn descriptors(self) -> FileDescriptorSet {
        let bytes: &[u8] = match self {
            Self::Newer => include_bytes!(concat!(env!("OUT_DIR"), "/ocr.bin")),
            Self::Older => include_bytes!(concat!(env!("OUT_DIR"), "/ocr_older.bin")),
        };
        // Written by the build script from the same types.
        FileDescriptorSet::decode(bytes).expect("the built-in descriptors decode")
    }

    /// [`Generation::descriptors`] with only these services, so that reflection announces nothing that is not served.
    pub fn descriptors_of(self, services: &[&str]) -> FileDescriptorSet {
        let mut set = self.descriptors();
        for file in &mut set.file {
            let package = file.package.as_ref().map(|package| format!("{package}.")).unwrap_or_default();
            file.service.retain(|service| services.contains(&format!("{package}{}", service.name()).as_str()));
        }
        set
    }
}

impl From<uuid::Uuid> for Identifier {
    fn from(id: uuid::Uuid) -> Self {
        Self { value: id.hyphenated().to_string() }
    }
}

/// Whether a secret is there, and nothing more of it.
fn hidden(secret: &str) -> &'static str {
    if secret.is_empty() { "" } else { "[redacted]" }
}

/// The names in `NAME=value` entries; what has no `=` may be a value that went astray, and is not shown.
fn names(environment: &[String]) -> Vec<&str> {
    environment.iter().map(|entry| entry.split_once('=').map_or("[redacted]", |(name, _)| name)).collect()
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Account")
            .field("username", &self.username)
            .field("password", &hidden(&self.password))
            .field("private_key", &hidden(&self.private_key))
            .finish()
    }
}

impl fmt::Debug for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Feature")
            .field("name", &self.name)
            .field("virtual_machine_id", &self.virtual_machine_id)
            .field("feature_type", &self.feature_type)
            .field("source", &self.source)
            .field("account", &self.account)
            .field("environment", &names(&self.environment))
            .finish()
    }
}

impl fmt::Debug for Inject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inject")
            .field("name", &self.name)
            .field("virtual_machine_id", &self.virtual_machine_id)
            .field("source", &self.source)
            .field("account", &self.account)
            .field("to_entities", &self.to_entities)
            .field("environment", &names(&self.environment))
            .finish()
    }
}

impl fmt::Debug for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Condition")
            .field("name", &self.name)
            .field("virtual_machine_id", &self.virtual_machine_id)
            .field("account", &self.account)
            .field("source", &self.source)
            .field("command_bytes", &self.command.len())
            .field("interval", &self.interval)
            .field("environment", &names(&self.environment))
            .finish()
    }
}

impl fmt::Debug for ExecutorResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecutorResponse")
            .field("identifier", &self.identifier)
            .field("stdout_bytes", &self.stdout.len())
            .field("stderr_bytes", &self.stderr.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CANARY: &str = "s3cr3t-canary";

    #[test]
    fn debug_shows_no_secret_of_any_message_that_may_hold_one() {
        let account = || {
            Some(Account {
                username: "admin".into(),
                password: CANARY.into(),
                private_key: format!("-----{CANARY}-----"),
            })
        };
        let environment = || vec![format!("TOKEN={CANARY}"), CANARY.to_owned()];
        let feature = Feature { account: account(), environment: environment(), ..Default::default() };
        let inject = Inject { account: account(), environment: environment(), ..Default::default() };
        let condition = Condition {
            account: account(),
            environment: environment(),
            command: format!("login {CANARY}"),
            ..Default::default()
        };
        let reply = ExecutorResponse { identifier: None, stdout: CANARY.into(), stderr: CANARY.into() };
        for shown in [
            format!("{feature:#?}"),
            format!("{inject:?}"),
            format!("{condition:?}"),
            format!("{reply:?}"),
            format!("{:?}", tonic::Request::new(feature.clone())),
        ] {
            assert!(!shown.contains(CANARY), "{shown}");
        }
        let shown = format!("{feature:?}");
        for wanted in ["admin", "TOKEN", "[redacted]"] {
            assert!(shown.contains(wanted), "{wanted} is missing in {shown}");
        }
    }

    #[test]
    fn an_absent_secret_is_told_from_a_hidden_one() {
        assert_eq!(
            format!("{:?}", Account { username: "u".into(), password: "p".into(), private_key: String::new() }),
            r#"Account { username: "u", password: "[redacted]", private_key: "" }"#
        );
    }

    #[test]
    fn a_generation_is_read_as_it_is_shown() {
        for generation in [Generation::Newer, Generation::Older] {
            assert_eq!(generation.to_string().parse::<Generation>().unwrap(), generation);
        }
        assert!("2024".parse::<Generation>().unwrap_err().to_string().contains("wants newer or older"));
    }
}
