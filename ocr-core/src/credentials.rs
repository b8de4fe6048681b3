//! Credentials of guests' accounts: who has them, and who asks for them.
//!
//! A hypervisor's agent needs none. A [`GuestExec`](crate::GuestExec) over the network does, and the trait names an
//! account only by its user name; so whoever learns credentials puts them into a [`CredentialSink`], and whoever logs in
//! takes them from a [`CredentialSource`]. Both are keyed by machine and user name.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use secrecy::{ExposeSecret, SecretString};

use crate::{Result, VmId, guest::check_user_name};

/// How to log in as one account. Its `Debug` shows neither secret.
#[derive(Clone)]
pub struct Credentials {
    /// The account's name in the guest.
    pub user: String,
    /// Its password.
    pub password: Option<SecretString>,
    /// Its private key as text, in OpenSSH's or a PEM form, without a passphrase.
    pub private_key: Option<SecretString>,
}

impl Credentials {
    /// An account without any secret yet.
    pub fn of(user: impl Into<String>) -> Self {
        Self { user: user.into(), password: None, private_key: None }
    }

    /// With a password; an empty one is none.
    pub fn with_password(mut self, password: impl Into<SecretString>) -> Self {
        self.password = Some(password.into()).filter(|text| !text.expose_secret().is_empty());
        self
    }

    /// With a private key; an empty one is none.
    pub fn with_private_key(mut self, key: impl Into<SecretString>) -> Self {
        self.private_key = Some(key.into()).filter(|text| !text.expose_secret().trim().is_empty());
        self
    }

    /// Whether there is anything to log in with.
    pub fn has_secret(&self) -> bool {
        self.password.is_some() || self.private_key.is_some()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("user", &self.user)
            .field("password", &self.password.is_some())
            .field("private_key", &self.private_key.is_some())
            .finish()
    }
}

/// Knows how to log in to machines.
#[async_trait]
pub trait CredentialSource: fmt::Debug + Send + Sync + 'static {
    /// Credentials of this account of this machine; without a name, of the account that the machine is managed by.
    /// `None` when there are none.
    ///
    /// It is asked before every operation, so it answers from memory where it can.
    ///
    /// # Errors
    /// When it is not known whether there are any.
    async fn credentials(&self, vm: VmId, user: Option<&str>) -> Result<Option<Credentials>>;
}

/// Is told credentials as they come by.
#[async_trait]
pub trait CredentialSink: fmt::Debug + Send + Sync + 'static {
    /// Keeps them for this machine. A later one for the same user takes the place of an earlier one.
    ///
    /// # Errors
    /// `Invalid` when the user's name can be none; when they cannot be kept.
    async fn remember(&self, vm: VmId, credentials: Credentials) -> Result<()>;

    /// Forgets all of a machine, such as one that is gone.
    ///
    /// # Errors
    /// When they cannot be forgotten.
    async fn forget(&self, vm: VmId) -> Result<()>;
}

/// The most machines that [`MemoryCredentials`] keeps accounts of; the one unused for longest makes room.
pub const MAX_MACHINES: usize = 100_000;

/// The most accounts of one machine that it keeps.
pub const MAX_ACCOUNTS: usize = 32;

/// Credentials in memory: what was remembered of a machine, and one set for all machines beside it.
#[derive(Default)]
pub struct MemoryCredentials {
    usual: Option<Credentials>,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    machines: HashMap<VmId, Accounts>,
    by_use: BTreeMap<u64, VmId>,
    uses: u64,
}

#[derive(Default)]
struct Accounts {
    /// The latest last.
    list: Vec<Credentials>,
    used: u64,
}

impl Kept {
    fn touch(&mut self, vm: VmId) -> &mut Accounts {
        self.uses += 1;
        let used = self.uses;
        let accounts = self.machines.entry(vm).or_default();
        self.by_use.remove(&accounts.used);
        accounts.used = used;
        self.by_use.insert(used, vm);
        accounts
    }
}

impl MemoryCredentials {
    /// With these for every machine of which nothing else is known.
    pub fn new(usual: Option<Credentials>) -> Self {
        Self { usual, kept: Mutex::default() }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for MemoryCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryCredentials")
            .field("usual", &self.usual)
            .field("machines", &self.kept().machines.len())
            .finish()
    }
}

#[async_trait]
impl CredentialSource for MemoryCredentials {
    /// By name: what was remembered, else the usual ones when they are that account's. Without a name: the usual ones,
    /// else what was remembered last.
    async fn credentials(&self, vm: VmId, user: Option<&str>) -> Result<Option<Credentials>> {
        let usual = self.usual.clone();
        let mut kept = self.kept();
        let known = kept.machines.contains_key(&vm).then(|| kept.touch(vm));
        let Some(user) = user else {
            return Ok(usual.or_else(|| known.and_then(|accounts| accounts.list.last().cloned())));
        };
        let found = known.and_then(|accounts| accounts.list.iter().find(|one| one.user == user).cloned());
        Ok(found.or_else(|| usual.filter(|usual| usual.user == user)))
    }
}

#[async_trait]
impl CredentialSink for MemoryCredentials {
    async fn remember(&self, vm: VmId, credentials: Credentials) -> Result<()> {
        check_user_name(&credentials.user)?;
        let mut kept = self.kept();
        let accounts = kept.touch(vm);
        accounts.list.retain(|one| one.user != credentials.user);
        if accounts.list.len() == MAX_ACCOUNTS {
            accounts.list.remove(0);
        }
        accounts.list.push(credentials);
        if kept.machines.len() > MAX_MACHINES
            && let Some((_, oldest)) = kept.by_use.pop_first()
        {
            kept.machines.remove(&oldest);
        }
        Ok(())
    }

    async fn forget(&self, vm: VmId) -> Result<()> {
        let mut kept = self.kept();
        if let Some(accounts) = kept.machines.remove(&vm) {
            kept.by_use.remove(&accounts.used);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> Credentials {
        Credentials::of("root").with_private_key("canary-key".to_owned())
    }

    #[tokio::test]
    async fn an_account_is_found_by_machine_and_name() {
        let (book, one, two) = (MemoryCredentials::new(Some(root())), VmId::random(), VmId::random());
        let alice = Credentials::of("alice").with_password("canary-password".to_owned());
        book.remember(one, alice).await.unwrap();
        let found = async |vm, user| book.credentials(vm, user).await.unwrap().map(|found| found.user);
        assert_eq!(found(one, Some("alice")).await.as_deref(), Some("alice"));
        assert_eq!(found(two, Some("alice")).await, None);
        assert_eq!(found(one, None).await.as_deref(), Some("root"));
        assert_eq!(found(two, Some("root")).await.as_deref(), Some("root"));
        book.forget(one).await.unwrap();
        assert_eq!(found(one, Some("alice")).await, None);
    }

    #[tokio::test]
    async fn without_usual_ones_the_latest_account_is_the_machines_own() {
        let (book, vm) = (MemoryCredentials::default(), VmId::random());
        assert!(book.credentials(vm, None).await.unwrap().is_none());
        for user in ["alice", "bob", "alice"] {
            book.remember(vm, Credentials::of(user)).await.unwrap();
        }
        assert_eq!(book.credentials(vm, None).await.unwrap().unwrap().user, "alice");
        assert_eq!(book.kept().machines[&vm].list.len(), 2);
    }

    #[tokio::test]
    async fn accounts_and_machines_are_bounded() {
        let (book, vm) = (MemoryCredentials::default(), VmId::random());
        for number in 0..=MAX_ACCOUNTS {
            book.remember(vm, Credentials::of(format!("u{number}"))).await.unwrap();
        }
        assert!(book.credentials(vm, Some("u0")).await.unwrap().is_none());
        for _ in 0..MAX_MACHINES - 1 {
            book.remember(VmId::random(), Credentials::of("u")).await.unwrap();
        }
        // It was used last, so another one goes.
        assert!(book.credentials(vm, Some("u1")).await.unwrap().is_some());
        book.remember(VmId::random(), Credentials::of("u")).await.unwrap();
        assert!(book.credentials(vm, Some("u1")).await.unwrap().is_some());
        let kept = book.kept();
        assert_eq!((kept.machines.len(), kept.by_use.len()), (MAX_MACHINES, MAX_MACHINES));
    }

    #[test]
    fn nothing_secret_is_shown() {
        let shown =
            format!("{:?} {:?}", root(), MemoryCredentials::new(Some(root().with_password("canary-2".to_owned()))));
        assert!(!shown.contains("canary"), "{shown}");
    }
}
