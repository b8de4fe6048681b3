//! What is secret of an install and needed again later, and where it is kept.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex},
};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::lock;
use crate::{Error, ErrorKind, InstallId, Result, error::reason, seal::Sealer};

/// What becomes of secrets that are needed again after the call that brought them: a condition's environment.
#[derive(Clone, Debug, Default)]
pub enum SecretStorage {
    /// They are sealed in the store. All executors on one store need the same keys.
    Sealed(Arc<Sealer>),
    /// They stay in this process's memory. After it has ended, its conditions that had any run no more.
    #[default]
    Memory,
    /// What brings any is refused.
    Refuse,
}

/// What is needed again later and nobody may read.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Secrets {
    Known(BTreeMap<String, String>),
    /// There are some, which cannot be read here.
    Unknown(Kept, &'static str),
}

/// What the store has of an install's secrets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    /// The sealed text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sealed: Option<String>,
    /// They are in the memory of the process that wrote this.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    in_memory: bool,
}

const OTHER_KEY: &str = "the condition's environment was sealed with another key: give that one to STATE_KEY_FILE too";
const BROKEN: &str = "the condition's sealed environment was changed in the store";
const NO_KEY: &str = "the condition's environment is sealed and there is no key: set STATE_KEY or STATE_KEY_FILE";
const ENDED: &str = "the condition's environment was only in the memory of a server process: make the condition again, or set STATE_KEY";

impl Default for Secrets {
    fn default() -> Self {
        Self::Known(BTreeMap::new())
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(environment) => f.debug_list().entries(environment.keys()).finish(),
            Self::Unknown(_, why) => f.write_str(why),
        }
    }
}

impl Secrets {
    pub(super) fn of_environment(environment: BTreeMap<String, String>) -> Self {
        Self::Known(environment)
    }

    /// The condition's environment.
    ///
    /// # Errors
    /// `Conflict` with reason `SEALED`, saying what to do, when there is one that cannot be read here.
    pub(super) fn environment(&self) -> Result<&BTreeMap<String, String>> {
        match self {
            Self::Known(environment) => Ok(environment),
            Self::Unknown(_, why) => Err(Error::new(ErrorKind::Conflict, *why).with_reason(reason::SEALED)),
        }
    }

    /// At most what they take in a record, in bytes.
    pub(super) fn stored_bytes(&self) -> usize {
        // A character of JSON takes up to 6 bytes, base64 a third more, and so do a few names.
        match self {
            Self::Known(all) => all.iter().map(|(name, value)| (name.len() + value.len() * 6 + 6) * 4 / 3).sum(),
            Self::Unknown(kept, _) => kept.sealed.as_ref().map_or(0, String::len),
        }
    }
}

/// Where secrets are kept.
#[derive(Clone, Debug)]
pub(super) struct Place {
    storage: SecretStorage,
    memory: Arc<Mutex<HashMap<InstallId, Secrets>>>,
}

impl Place {
    pub(super) fn new(storage: SecretStorage) -> Self {
        Self { storage, memory: Arc::default() }
    }

    pub(super) fn check(&self, secrets: &Secrets) -> Result<()> {
        match (&self.storage, secrets) {
            (SecretStorage::Refuse, Secrets::Known(environment)) if !environment.is_empty() => Err(Error::new(
                ErrorKind::Conflict,
                "a condition's environment is not stored without a key: set STATE_KEY or STATE_KEY_FILE, \
                 or SECRETS=memory to keep it until the server ends",
            )
            .with_reason(reason::SEALED)),
            _ => Ok(()),
        }
    }

    /// Keeps an install's secrets, and gives what the store shall have of them.
    pub(super) fn keep(&self, key: &str, id: InstallId, secrets: &Secrets) -> Result<Kept> {
        let environment = match secrets {
            Secrets::Unknown(kept, _) => return Ok(kept.clone()),
            Secrets::Known(environment) if environment.is_empty() => return Ok(Kept::default()),
            Secrets::Known(environment) => environment,
        };
        match &self.storage {
            SecretStorage::Sealed(sealer) => {
                let text = serde_json::to_vec(environment)
                    .map(Zeroizing::new)
                    .map_err(|error| Error::internal("an environment cannot be written as JSON").with_source(error))?;
                Ok(Kept { sealed: Some(sealer.seal(key, &text)), in_memory: false })
            }
            // A record of the first form, which had its environment in clear, must lose neither that nor its place.
            SecretStorage::Memory | SecretStorage::Refuse => {
                lock(&self.memory).insert(id, secrets.clone());
                Ok(Kept { sealed: None, in_memory: true })
            }
        }
    }

    /// The secrets that a stored install has.
    pub(super) fn find(&self, key: &str, id: InstallId, kept: Kept) -> Secrets {
        let Some(sealed) = &kept.sealed else {
            return match lock(&self.memory).get(&id) {
                _ if !kept.in_memory => Secrets::default(),
                Some(secrets) => secrets.clone(),
                None => Secrets::Unknown(kept, ENDED),
            };
        };
        let SecretStorage::Sealed(sealer) = &self.storage else {
            return Secrets::Unknown(kept, NO_KEY);
        };
        match sealer.open(key, sealed) {
            Ok(text) => match serde_json::from_slice(&text) {
                Ok(environment) => Secrets::Known(environment),
                Err(_) => Secrets::Unknown(kept, BROKEN),
            },
            Err(error) if error.reason() == Some(reason::SEALED) => Secrets::Unknown(kept, OTHER_KEY),
            Err(_) => Secrets::Unknown(kept, BROKEN),
        }
    }

    pub(super) fn forget(&self, id: InstallId) {
        lock(&self.memory).remove(&id);
    }
}
