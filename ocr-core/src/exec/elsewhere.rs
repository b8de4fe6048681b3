//! What other processes do to the machines and installs that this one has streams for.

use std::{collections::HashMap, sync::Arc};

use futures::{StreamExt, stream};

use super::{Inner, InstallKind, condition::Ended, lock, record::Stage};
use crate::{
    InstallId, VmId,
    fleet::{Gone, Listener, RunReport},
};

/// So many conditions are looked up at once after notices were lost.
const AT_ONCE: usize = 16;

impl Listener for Inner {
    fn machine_changed(&self, vm: VmId) {
        for runner in self.runners_on(vm) {
            if let Err(error) = runner.engage() {
                tracing::warn!(%vm, %error, "a condition cannot be run");
            }
        }
    }

    fn followed(self: Arc<Self>, vm: VmId, conditions: Vec<InstallId>) {
        let mut gone = HashMap::new();
        let wanted = {
            let mut followed = lock(&self.followed);
            if conditions.is_empty() || self.closing.is_cancelled() {
                gone.extend(followed.remove(&vm).into_iter().flatten());
                Vec::new()
            } else {
                let there = followed.entry(vm).or_default();
                gone.extend(there.extract_if(|id, _| !conditions.contains(id)));
                conditions.into_iter().filter(|id| there.entry(*id).or_default().is_none()).collect()
            }
        };
        // Without the lock: with the last of its watchers a runner goes.
        drop(gone);
        for id in wanted {
            let inner = Arc::clone(&self);
            self.tasks.spawn(async move { inner.follow(vm, id).await });
        }
    }

    fn ran_elsewhere(&self, run: RunReport) {
        if let (Some(runner), Some(value)) = (self.runner_of(run.condition), run.value) {
            runner.take(value, run.lateness);
        }
    }

    fn look_again(self: Arc<Self>, what: Gone) {
        let watched: Vec<(InstallId, VmId)> = match what {
            Gone::Install(id) => match self.runner_of(id) {
                Some(runner) => vec![(id, runner.vm())],
                None => return,
            },
            Gone::Vm(vm) => self.runners_on(vm).iter().map(|runner| (runner.id(), vm)).collect(),
            Gone::Any => self.watched_ids(),
        };
        let ended = match what {
            Gone::Vm(_) => Ended::MachineGone,
            Gone::Install(_) | Gone::Any => Ended::Removed,
        };
        let inner = Arc::clone(&self);
        self.tasks.spawn(async move {
            stream::iter(watched)
                .for_each_concurrent(AT_ONCE, |(id, _)| {
                    let inner = &inner;
                    async move {
                        if matches!(inner.records.get(id).await, Ok(None)) {
                            inner.end_watch(id, ended);
                        }
                    }
                })
                .await;
        });
    }
}

impl Inner {
    /// Runs a condition because others watch it, if it is still to be.
    async fn follow(self: Arc<Self>, vm: VmId, id: InstallId) {
        let record = match self.records.get(id).await {
            Ok(Some(stored)) => stored.record,
            // Those who watch it find out by themselves.
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%id, %vm, %error, "a condition that others watch could not be looked up");
                return;
            }
        };
        if record.kind() != InstallKind::Condition || record.stage != Stage::Installed || record.vm != vm {
            return;
        }
        let runner = match self.runner(record) {
            Ok(runner) => runner,
            Err(error) => {
                tracing::debug!(%id, %vm, %error, "a condition that others watch cannot be run");
                return;
            }
        };
        let mut followed = lock(&self.followed);
        if let Some(place) = followed.get_mut(&vm).and_then(|there| there.get_mut(&id)) {
            *place = Some(runner);
        }
    }
}
