//! Keeps this member's part of the limit: asks for more when there is more work than slots, gives when others are short.

use std::{collections::BTreeSet, sync::Arc};

use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use super::{
    Shared,
    message::Call,
    quota::{Plan, Quota},
    session::{MEMBERS, member_of},
};
use crate::{ErrorKind, Key, MemberId, Precondition, Result, StateStoreExt, Version, error::reason, state::MAX_PAGE};

/// So often a plan is made anew because others wrote first, before there is a pause.
const ROUNDS: usize = 16;

/// What the keeper of the share is told, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// Others are short.
    pub(super) asked: u64,
    /// Others gave, or are gone.
    pub(super) freed: u64,
    /// Renewals.
    pub(super) ticks: u64,
}

pub(super) struct Keeper {
    shared: Arc<Shared>,
    me: MemberId,
    key: Key,
    /// What may run here by our own last write.
    held: u32,
    /// What the record says we want.
    wanted: u32,
    short: bool,
    /// There was a renewal: who is still short says so again, since it may not have been heard.
    remind: bool,
    /// When we went from nothing to something.
    since: Instant,
    warned: bool,
}

impl Keeper {
    pub(super) fn new(shared: Arc<Shared>, me: MemberId) -> Result<Self> {
        let key = Key::new("quota")?;
        Ok(Self {
            shared,
            me,
            key,
            held: 0,
            wanted: 0,
            short: true,
            remind: false,
            since: Instant::now(),
            warned: false,
        })
    }

    /// Runs until it is dropped, which is when the session ends.
    pub(super) async fn keep(mut self, mut told: watch::Receiver<Told>) {
        let pause = self.shared.times.pause();
        let mut seen = Told::default();
        loop {
            if let Err(error) = self.balance().await {
                tracing::debug!(%error, "the share of the limit could not be looked up");
                sleep(pause).await;
                continue;
            }
            loop {
                tokio::select! {
                    changed = told.changed() => if changed.is_err() { return },
                    () = sleep(pause) => {}
                }
                let now = *told.borrow_and_update();
                let before = std::mem::replace(&mut seen, now);
                let demand = self.demand();
                // No work for the store as long as what we hold is enough, or what we want is written down already. A
                // member that could use more also looks when others gave, and at each renewal: one may have died.
                self.remind |= now.ticks != before.ticks;
                let others = now.freed != before.freed || now.ticks != before.ticks;
                if now.asked != before.asked || demand > self.held && (others || demand > self.wanted) {
                    break;
                }
            }
        }
    }

    fn demand(&self) -> u32 {
        let demand = u32::try_from(self.shared.gates.demand()).unwrap_or(u32::MAX);
        demand.min(self.shared.limit)
    }

    async fn balance(&mut self) -> Result<()> {
        let times = self.shared.times;
        for _ in 0..ROUNDS {
            let (there, living) = timeout(times.answer(), self.look()).await.map_err(|_| silent())??;
            let (quota, version) = there.map_or((Quota::default(), None), |(quota, version)| (quota, Some(version)));
            // In powers of two, so that growing work does not write at every step.
            let wanted = self.demand().checked_next_power_of_two().unwrap_or(u32::MAX).min(self.shared.limit);
            let plan = quota.plan(self.me, self.shared.limit, wanted, self.held, &living);
            self.warn(&plan);
            let tenure = self.since + times.ttl / 10;
            if plan.held == 0 && self.held > 0 && self.demand() > 0 && Instant::now() < tenure {
                // Slots that take turns stay for a moment, so that something is done in each turn.
                tokio::time::sleep_until(tenure).await;
                continue;
            }
            if self.settle(&quota, version, plan).await? {
                return Ok(());
            }
        }
        Err(crate::Error::unavailable("others write the limit's record all the time"))
    }

    async fn look(&self) -> Result<(Option<(Quota, Version)>, BTreeSet<MemberId>)> {
        // The record first: who is in it had a lease then, so who has none after that is gone. Who joins later and writes
        // changes the version.
        let quota = self.shared.store.get_json::<Quota>(&self.key).await?;
        let mut living = BTreeSet::new();
        let mut after: Option<Key> = None;
        loop {
            let page = self.shared.store.list(MEMBERS, after.as_ref(), MAX_PAGE).await?;
            living.extend(page.iter().filter_map(|(key, _)| member_of(key)));
            if page.len() < MAX_PAGE {
                return Ok((quota, living));
            }
            after = page.last().map(|(key, _)| key.clone());
        }
    }

    /// Writes the plan; false when another one wrote first.
    async fn settle(&mut self, quota: &Quota, version: Option<Version>, plan: Plan) -> Result<bool> {
        let before = self.held;
        if plan.held < self.held {
            self.held = plan.held;
            self.shared.gates.resize(plan.held as usize).await;
        }
        if plan.next != *quota {
            let only = version.map_or(Precondition::Absent, Precondition::Version);
            let put = self.shared.store.put_json(&self.key, &plan.next, only);
            match timeout(self.shared.times.answer(), put).await.map_err(|_| silent())? {
                Ok(_) => {}
                Err(error)
                    if error.kind() == ErrorKind::AlreadyExists || error.reason() == Some(reason::VERSION_MISMATCH) =>
                {
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        if self.held == 0 && plan.held > 0 {
            self.since = Instant::now();
        }
        self.held = plan.held;
        self.wanted = plan.next.share(self.me).map_or(0, |share| share.wanted);
        // More takes effect at once.
        drop(self.shared.gates.resize(plan.held as usize));
        if plan.held < before {
            self.shared.call(Call::Freed(self.me)).await;
        }
        // Not each time: two that are short would ask each other for ever.
        if plan.short && (self.remind || !self.short || plan.next != *quota) {
            self.shared.call(Call::Short(self.me)).await;
        }
        (self.short, self.remind) = (plan.short, false);
        Ok(true)
    }

    fn warn(&mut self, plan: &Plan) {
        let limit = plan.next.limit();
        if limit < self.shared.limit && !self.warned {
            self.warned = true;
            tracing::warn!(
                ours = self.shared.limit,
                limit,
                "another executor has a lower limit of operations at once; the lowest holds for all"
            );
        }
        self.warned &= limit < self.shared.limit;
    }
}

fn silent() -> crate::Error {
    crate::Error::timed_out("the store did not answer in time")
}
