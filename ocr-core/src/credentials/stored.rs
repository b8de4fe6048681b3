//! [`StoredCredentials`]: credentials that outlive the process, sealed in the store.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{CredentialSink, CredentialSource, Credentials, MAX_ACCOUNTS, MemoryCredentials};
use crate::{
    Error, ErrorKind, Key, Precondition, Result, StateStore, Versioned, VmId, error::reason, exec::SecretStorage,
    guest::check_user_name, state::MAX_PAGE,
};

const KIND: &str = "credentials";

/// Credentials sealed in the store, a record for each account of each machine, and read through memory. Every process on
/// the store can log in with what one of them was told, also after a restart.
///
/// A process keeps using what it has read: a password that another process was told later is taken up when this one is
/// told it too, or restarted.
///
/// Without a key ([`SecretStorage::Refuse`]) what has a secret is refused; with [`SecretStorage::Memory`] this is
/// [`MemoryCredentials`], and the store sees nothing.
#[derive(Debug)]
pub struct StoredCredentials {
    store: Arc<dyn StateStore>,
    storage: SecretStorage,
    memory: MemoryCredentials,
}

/// What is sealed.
#[derive(Serialize, Deserialize)]
struct Form {
    user: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    password: Option<Zeroizing<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    private_key: Option<Zeroizing<String>>,
}

impl StoredCredentials {
    /// In this store; `usual` are for every machine of which nothing else is known, and are not stored.
    pub fn new(usual: Option<Credentials>, store: Arc<dyn StateStore>, storage: SecretStorage) -> Self {
        Self { store, storage, memory: MemoryCredentials::new(usual) }
    }

    fn read(&self, key: &Key, sealed: &[u8]) -> Result<Credentials> {
        let SecretStorage::Sealed(sealer) = &self.storage else {
            return Err(Error::new(
                ErrorKind::Conflict,
                "the account's credentials are sealed and there is no key: set STATE_KEY or STATE_KEY_FILE",
            )
            .with_reason(reason::SEALED)
            .on(key.as_str()));
        };
        let opened = sealer.open(key.as_str(), &String::from_utf8_lossy(sealed))?;
        let form: Form = serde_json::from_slice(&opened).map_err(|_| {
            Error::internal("sealed credentials have another form than this version reads").on(key.as_str())
        })?;
        let mut credentials = Credentials::of(form.user);
        if let Some(password) = form.password {
            credentials = credentials.with_password(password.as_str());
        }
        if let Some(key) = form.private_key {
            credentials = credentials.with_private_key(key.as_str());
        }
        Ok(credentials)
    }

    /// A machine's stored accounts, the latest told first.
    async fn accounts(&self, vm: VmId) -> Result<Vec<(Key, Versioned)>> {
        let mut page = self.store.list(&format!("{KIND}/{vm}/"), None, MAX_PAGE).await?;
        page.sort_by_key(|(_, record)| std::cmp::Reverse(record.version));
        Ok(page)
    }
}

fn key(vm: VmId, user: &str) -> Result<Key> {
    Key::of(KIND, &[&vm.to_string(), user])
}

#[async_trait]
impl CredentialSource for StoredCredentials {
    async fn credentials(&self, vm: VmId, user: Option<&str>) -> Result<Option<Credentials>> {
        if let Some(known) = self.memory.credentials(vm, user).await? {
            return Ok(Some(known));
        }
        if matches!(self.storage, SecretStorage::Memory) {
            return Ok(None);
        }
        let found = match user {
            Some(user) => {
                let key = key(vm, user)?;
                self.store.get(&key).await?.map(|record| (key, record))
            }
            None => self.accounts(vm).await?.into_iter().next(),
        };
        let Some((key, record)) = found else { return Ok(None) };
        let credentials = self.read(&key, &record.value)?;
        self.memory.remember(vm, credentials.clone()).await?;
        Ok(Some(credentials))
    }
}

#[async_trait]
impl CredentialSink for StoredCredentials {
    /// A machine has at most [`MAX_ACCOUNTS`] stored accounts; the one told longest ago makes room.
    async fn remember(&self, vm: VmId, credentials: Credentials) -> Result<()> {
        check_user_name(&credentials.user)?;
        match &self.storage {
            SecretStorage::Memory => {}
            SecretStorage::Refuse if credentials.has_secret() => {
                return Err(Error::new(
                    ErrorKind::Conflict,
                    "an account's password or key is not stored without a key: set STATE_KEY or STATE_KEY_FILE, \
                     or SECRETS=memory to keep it until the server ends",
                )
                .with_reason(reason::SEALED));
            }
            SecretStorage::Refuse => {}
            SecretStorage::Sealed(sealer) => {
                let known = self.memory.credentials(vm, Some(&credentials.user)).await?;
                if known.is_some_and(|known| same(&known, &credentials)) {
                    return Ok(());
                }
                let text = |secret: &Option<secrecy::SecretString>| {
                    secret.as_ref().map(|secret| Zeroizing::new(secret.expose_secret().to_owned()))
                };
                let user = credentials.user.clone();
                let form =
                    Form { user, password: text(&credentials.password), private_key: text(&credentials.private_key) };
                let form = serde_json::to_vec(&form)
                    .map(Zeroizing::new)
                    .map_err(|error| Error::internal("credentials cannot be written as JSON").with_source(error))?;
                let key = key(vm, &credentials.user)?;
                let sealed = sealer.seal(key.as_str(), &form);
                self.store.put(&key, Bytes::from(sealed), Precondition::Any, None).await?;
                for (old, _) in self.accounts(vm).await?.into_iter().skip(MAX_ACCOUNTS) {
                    self.store.delete(&old, Precondition::Any).await?;
                }
            }
        }
        self.memory.remember(vm, credentials).await
    }

    async fn forget(&self, vm: VmId) -> Result<()> {
        self.memory.forget(vm).await?;
        for (key, _) in self.accounts(vm).await? {
            self.store.delete(&key, Precondition::Any).await?;
        }
        Ok(())
    }
}

fn same(one: &Credentials, other: &Credentials) -> bool {
    let text = |secret: &Option<secrecy::SecretString>| secret.as_ref().map(|secret| secret.expose_secret().to_owned());
    text(&one.password).map(Zeroizing::new) == text(&other.password).map(Zeroizing::new)
        && text(&one.private_key).map(Zeroizing::new) == text(&other.private_key).map(Zeroizing::new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        memory::MemoryState,
        seal::{SealKey, Sealer},
    };

    fn alice() -> Credentials {
        Credentials::of("alice").with_password("canary-password").with_private_key("canary-key")
    }

    fn sealed() -> SecretStorage {
        SecretStorage::Sealed(Arc::new(Sealer::new(vec![SealKey::generate()]).unwrap()))
    }

    async fn stored(store: &MemoryState) -> String {
        format!(
            "{:?}",
            store
                .list("", None, MAX_PAGE)
                .await
                .unwrap()
                .iter()
                .map(|(key, record)| (key, &record.value))
                .collect::<Vec<_>>()
        )
    }

    #[tokio::test]
    async fn another_process_logs_in_with_what_this_one_was_told_and_the_store_has_it_sealed() {
        let (store, storage, vm) = (MemoryState::new(), sealed(), VmId::random());
        let book = || StoredCredentials::new(None, Arc::new(store.clone()), storage.clone());
        book().remember(vm, Credentials::of("bob").with_password("x")).await.unwrap();
        book().remember(vm, alice()).await.unwrap();
        assert!(!stored(&store).await.contains("canary"));
        for user in [Some("alice"), None] {
            let found = book().credentials(vm, user).await.unwrap().unwrap();
            assert!(same(&found, &alice()) && found.user == "alice", "{user:?}");
        }
        assert!(book().credentials(VmId::random(), None).await.unwrap().is_none());
        book().forget(vm).await.unwrap();
        assert!(book().credentials(vm, Some("alice")).await.unwrap().is_none());
        assert_eq!(stored(&store).await, "[]");
    }

    #[tokio::test]
    async fn what_is_known_is_not_written_again() {
        let (store, vm) = (MemoryState::new(), VmId::random());
        let book = StoredCredentials::new(None, Arc::new(store.clone()), sealed());
        book.remember(vm, alice()).await.unwrap();
        let before = stored(&store).await;
        book.remember(vm, alice()).await.unwrap();
        assert_eq!(stored(&store).await, before);
        book.remember(vm, alice().with_password("another")).await.unwrap();
        assert_ne!(stored(&store).await, before);
    }

    #[tokio::test]
    async fn without_a_key_secrets_are_refused_and_in_memory_the_store_sees_none() {
        let (store, vm) = (MemoryState::new(), VmId::random());
        let refusing = StoredCredentials::new(None, Arc::new(store.clone()), SecretStorage::Refuse);
        let error = refusing.remember(vm, alice()).await.unwrap_err();
        assert_eq!(error.reason(), Some(reason::SEALED));
        assert!(!error.to_string().contains("canary"));
        refusing.remember(vm, Credentials::of("bob")).await.unwrap();
        let forgetful = StoredCredentials::new(None, Arc::new(store.clone()), SecretStorage::Memory);
        forgetful.remember(vm, alice()).await.unwrap();
        assert!(forgetful.credentials(vm, Some("alice")).await.unwrap().is_some());
        assert_eq!(stored(&store).await, "[]");
    }

    #[tokio::test]
    async fn with_another_key_it_says_so() {
        let (store, vm) = (MemoryState::new(), VmId::random());
        StoredCredentials::new(None, Arc::new(store.clone()), sealed()).remember(vm, alice()).await.unwrap();
        for storage in [sealed(), SecretStorage::Refuse] {
            let other = StoredCredentials::new(None, Arc::new(store.clone()), storage);
            let error = other.credentials(vm, Some("alice")).await.unwrap_err();
            assert_eq!(error.reason(), Some(reason::SEALED), "{error}");
        }
    }

    #[tokio::test]
    async fn a_machines_accounts_are_bounded() {
        let (store, vm) = (MemoryState::new(), VmId::random());
        let book = StoredCredentials::new(None, Arc::new(store.clone()), sealed());
        for number in 0..MAX_ACCOUNTS + 3 {
            book.remember(vm, Credentials::of(format!("u{number}")).with_password("x")).await.unwrap();
        }
        let kept = book.accounts(vm).await.unwrap();
        assert_eq!(kept.len(), MAX_ACCOUNTS);
        assert!(book.store.get(&key(vm, "u2").unwrap()).await.unwrap().is_none());
        assert!(book.store.get(&key(vm, "u3").unwrap()).await.unwrap().is_some());
    }
}
