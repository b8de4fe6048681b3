//! Host keys, pinned at first contact.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use russh::keys::{HashAlg, PublicKey};
use serde::{Deserialize, Serialize};

use crate::{Deletion, Error, ErrorKind, Key, Precondition, Result, StateStore, VmId, state::Versioned};

/// How long a pin outlives the last contact. Machines end without anybody telling this module.
const LIFETIME: Duration = Duration::from_secs(180 * 86_400);

/// How old the note of the last contact may become before it is written again.
const REFRESH: Duration = Duration::from_secs(86_400);

/// Whose key it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Host {
    /// A machine: one that is built anew has another id, and so another pin.
    Machine(VmId),
    /// A jump host, by its address.
    Jump(String),
}

impl Host {
    fn key(&self) -> Result<Key> {
        match self {
            Self::Machine(vm) => Key::of("ssh_pin", &["vm", &vm.to_string()]),
            Self::Jump(address) => Key::of("ssh_pin", &["jump", address]),
        }
    }
}

/// The pins of all hosts, in a store.
#[derive(Clone, Debug)]
pub struct HostKeys {
    store: Arc<dyn StateStore>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Pin {
    schema: u32,
    /// As in `authorized_keys`, without a comment.
    key: String,
    /// When it was used last, in seconds since 1970, at most a day off.
    seen: u64,
}

const SCHEMA: u32 = 1;

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl HostKeys {
    /// Pins in this store, under keys that begin with `ssh_pin/`.
    pub fn new(store: Arc<dyn StateStore>) -> Self {
        Self { store }
    }

    /// Forgets a machine's key, so that the next contact pins a new one. For an operator who knows why it changed.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn forget(&self, vm: VmId) -> Result<Deletion> {
        self.store.delete(&Host::Machine(vm).key()?, Precondition::Any).await
    }

    /// The key that this host must have, if it was met before.
    pub(super) async fn known(&self, host: &Host) -> Result<Option<PublicKey>> {
        match self.read(&host.key()?).await? {
            Some((pin, _)) => Ok(Some(pin)),
            None => Ok(None),
        }
    }

    /// Pins the key of a host that is met first, and refuses another one of a host that was met before.
    pub(super) async fn check(&self, host: &Host, shown: &PublicKey) -> Result<()> {
        let key = host.key()?;
        let pin = self.record(shown)?;
        match self.store.put(&key, pin.clone().into(), Precondition::Absent, Some(LIFETIME)).await {
            Ok(_) => {
                tracing::info!(%key, fingerprint = %fingerprint(shown), "pinned an SSH host key at first contact");
                return Ok(());
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        match self.read(&key).await? {
            Some((pinned, seen)) if pinned.key_data() == shown.key_data() => {
                if now().saturating_sub(seen.0) >= REFRESH.as_secs() {
                    // Whoever loses this race has nothing to add.
                    match self.store.put(&key, pin.into(), Precondition::Version(seen.1.version), Some(LIFETIME)).await
                    {
                        Err(error) if error.kind() != ErrorKind::Conflict => return Err(error),
                        _ => {}
                    }
                }
                Ok(())
            }
            Some((pinned, _)) => Err(changed(&key, &fingerprint(&pinned), Some(&fingerprint(shown)))),
            // It was forgotten this very moment.
            None => Err(Error::unavailable("the pinned host key went away while it was compared")),
        }
    }

    /// The error for a host that has no key of the kind that was pinned.
    pub(super) fn kind_is_gone(host: &Host, pinned: &PublicKey) -> Error {
        match host.key() {
            Ok(key) => changed(&key, &fingerprint(pinned), None),
            Err(error) => error,
        }
    }

    fn record(&self, key: &PublicKey) -> Result<Vec<u8>> {
        let mut bare = key.clone();
        bare.set_comment("");
        let text =
            bare.to_openssh().map_err(|cause| Error::internal("a host key cannot be written").with_source(cause))?;
        serde_json::to_vec(&Pin { schema: SCHEMA, key: text, seen: now() })
            .map_err(|cause| Error::internal("a host key cannot be written").with_source(cause))
    }

    async fn read(&self, key: &Key) -> Result<Option<(PublicKey, (u64, Versioned))>> {
        let Some(record) = self.store.get(key).await? else { return Ok(None) };
        let fault = || Error::internal("the stored host key has another form than this version reads").on(key.as_str());
        let pin: Pin = serde_json::from_slice(&record.value).map_err(|cause| fault().with_source(cause))?;
        if pin.schema != SCHEMA {
            return Err(fault());
        }
        let public = PublicKey::from_openssh(&pin.key).map_err(|cause| fault().with_source(cause))?;
        Ok(Some((public, (pin.seen, record))))
    }
}

pub(super) fn fingerprint(key: &PublicKey) -> String {
    key.fingerprint(HashAlg::Sha256).to_string()
}

fn changed(key: &Key, pinned: &str, shown: Option<&str>) -> Error {
    let shown = shown.map_or_else(|| "a key of another kind only".to_owned(), str::to_owned);
    Error::new(
        ErrorKind::Denied,
        format!(
            "the SSH host key is not the one of the first contact: pinned {pinned}, shown {shown}. Nothing was sent. \
             Somebody may be in between, or the guest's keys were made anew; if you know that they were, remove the \
             record {key} and the next contact pins the new one"
        ),
    )
}
