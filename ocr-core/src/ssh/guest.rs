//! [`GuestExec`] over the connections.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::Instant;

use super::{Addresses, HostKeys, SshConfig, login::Accounts, pool::Pool};
use crate::{
    Deletion, Error, ExecOutput, ExecRequest, GuestCapabilities, GuestExec, GuestInfo, OsFamily, PutFile, Result, VmId,
    credentials::CredentialSource,
};

/// Acts inside Linux guests over SSH.
#[derive(Clone, Debug)]
pub struct SshGuest {
    accounts: Arc<Accounts>,
}

impl SshGuest {
    /// Guests at these addresses.
    pub fn new(
        addresses: Arc<dyn Addresses>,
        credentials: Arc<dyn CredentialSource>,
        keys: HostKeys,
        config: &SshConfig,
    ) -> Self {
        let pool = Pool::new(Arc::clone(&addresses), keys, config);
        Self { accounts: Arc::new(Accounts::new(pool, addresses, credentials, config)) }
    }

    /// How many connections to machines there are now.
    pub fn connections(&self) -> usize {
        self.accounts.pool.connections()
    }
}

impl SshGuest {
    pub async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        let acting = self.accounts.acting(vm, None, "username").await?;
        // The connection may be an old one: ask the guest itself.
        let argv = ["/bin/sh", "-c", "echo ready"].map(str::to_owned);
        acting.run(&argv, Bytes::new(), 1 << 20, Instant::now() + Duration::from_secs(15)).await?;
        Ok(GuestInfo {
            agent_version: acting.session.version.clone(),
            can_exec: true,
            can_files: true,
            os_family: OsFamily::Linux,
            os_name: acting.login.os_name.clone(),
        })
    }
}
