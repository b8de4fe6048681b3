//! Puts a token on everything that an executor of its own does in guests.
//!
//! A process that is killed may have begun something in a guest that has not got as far as to leave a trace there. The
//! next process, which undoes what the records say, comes with a newer token: the guest lets what is under way end first,
//! and refuses what has not begun. (In a [fleet](crate::fleet) each machine has a token of its own.)

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    Deletion, ExecOutput, ExecRequest, FencingToken, GuestCapabilities, GuestExec, GuestInfo, PutFiles, RemoveFiles,
    Result, VmId, error::reason,
};

/// A second, in the microseconds that tokens count.
const SECOND: u64 = 1_000_000;
/// So often a guest is asked again with a newer token, each time twice as far ahead, up to a day: together a month.
const TRIES: u32 = 46;

/// A [`GuestExec`] whose requests go out under this process's token: the time of its start.
///
/// A guest that has seen a newer one, since the clock was set back or it was cloned from where the clock was ahead, gets
/// a newer one still: there is no other process that it could be meant for.
#[derive(Debug)]
pub(super) struct Stamped {
    guest: Arc<dyn GuestExec>,
    token: AtomicU64,
}

impl Stamped {
    pub(super) fn new(guest: Arc<dyn GuestExec>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        Self { guest, token: AtomicU64::new(u64::try_from(now).unwrap_or(u64::MAX)) }
    }

    fn tries(&self) -> Tries<'_> {
        Tries { token: &self.token, given: 0, count: 0 }
    }
}

/// The tokens of one request.
struct Tries<'a> {
    token: &'a AtomicU64,
    given: u64,
    count: u32,
}

impl Tries<'_> {
    fn token(&mut self) -> Option<FencingToken> {
        self.given = self.token.load(Ordering::Relaxed);
        Some(FencingToken(self.given))
    }

    /// Whether the guest refused the token and shall be asked with a newer one.
    fn again<T>(&mut self, result: &Result<T>) -> bool {
        let refused = matches!(result, Err(error) if error.reason() == Some(reason::FENCED));
        if !refused || self.count == TRIES {
            return false;
        }
        let ahead = (SECOND << self.count.min(17)).min(86_400 * SECOND);
        self.count += 1;
        // One of several that were refused at once goes ahead for all.
        let next = self.given.saturating_add(ahead);
        let _ = self.token.compare_exchange(self.given, next, Ordering::Relaxed, Ordering::Relaxed);
        true
    }
}

#[async_trait]
impl GuestExec for Stamped {
    fn capabilities(&self) -> GuestCapabilities {
        self.guest.capabilities()
    }

    async fn guest_info(&self, vm: VmId) -> Result<GuestInfo> {
        self.guest.guest_info(vm).await
    }

    async fn put_files(&self, vm: VmId, request: &PutFiles) -> Result<()> {
        let (mut request, mut tries) = (request.clone(), self.tries());
        loop {
            request.fence = tries.token();
            let result = self.guest.put_files(vm, &request).await;
            if !tries.again(&result) {
                return result;
            }
        }
    }

    async fn get_file(&self, vm: VmId, path: &str, limit_bytes: u64) -> Result<Bytes> {
        self.guest.get_file(vm, path, limit_bytes).await
    }

    async fn remove_files(&self, vm: VmId, request: &RemoveFiles) -> Result<Vec<Result<Deletion>>> {
        let (mut request, mut tries) = (request.clone(), self.tries());
        loop {
            request.fence = tries.token();
            let result = self.guest.remove_files(vm, &request).await;
            if !tries.again(&result) {
                return result;
            }
        }
    }

    async fn exec(&self, vm: VmId, request: &ExecRequest) -> Result<ExecOutput> {
        let (mut request, mut tries) = (request.clone(), self.tries());
        loop {
            request.fence = tries.token();
            let result = self.guest.exec(vm, &request).await;
            if !tries.again(&result) {
                return result;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ComputeBackend, GuestExecExt, memory::MemoryCloud};

    #[tokio::test]
    async fn what_an_earlier_process_had_under_way_comes_to_nothing_once_a_later_one_acts() {
        let cloud = MemoryCloud::new();
        let vm = cloud.create_vm(&MemoryCloud::tiny_spec("web-0")).await.unwrap().id;
        let (earlier, later) = (Stamped::new(Arc::new(cloud.clone())), Stamped::new(Arc::new(cloud.clone())));
        later.token.store(earlier.token.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        let late = FencingToken(earlier.token.load(Ordering::Relaxed));
        later.shell(vm, "true").await.unwrap();
        let file = crate::PutFile::new("/root/left", "left");
        let put = PutFiles { files: vec![file], fence: Some(late) };
        let refused = cloud.put_files(vm, &put).await.unwrap_err();
        assert_eq!(refused.reason(), Some(reason::FENCED));
    }

    #[tokio::test]
    async fn a_guest_whose_token_is_ahead_of_the_clock_is_caught_up_with() {
        let cloud = MemoryCloud::new();
        let vm = cloud.create_vm(&MemoryCloud::tiny_spec("web-0")).await.unwrap().id;
        let stamped = Stamped::new(Arc::new(cloud.clone()));
        let ahead = FencingToken(stamped.token.load(Ordering::Relaxed) + 20 * 86_400 * SECOND);
        cloud.exec(vm, &ExecRequest { fence: Some(ahead), ..ExecRequest::shell("true") }).await.unwrap();
        assert!(stamped.shell(vm, "true").await.unwrap().success());
        assert!(stamped.token.load(Ordering::Relaxed) > ahead.0);
    }
}
