//! How the members of a fleet share one limit. Pure: what is, and what one member wants, gives the next record.
//!
//! A member runs at most as many operations at once as the record says it holds, and changes only its own entry, by
//! compare-and-set. So the sum over the living never passes the limit, whatever happens to whom:
//!
//! - more is taken only from what nobody living holds;
//! - less is written only when no more than that run.
//!
//! Slots go where the work is (max-min fair), but they move only when somebody is short of them. While there are enough
//! for all, each member keeps one, so that its first operation does not wait for the others. When there are fewer slots
//! than members, those that were served longest ago come first, and so they take turns.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::MemberId;

/// The record that all members share.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Quota {
    /// How often a member went from nothing to something.
    turns: u64,
    shares: BTreeMap<MemberId, Share>,
}

/// One member's part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Share {
    /// The limit in its settings.
    pub(super) limit: u32,
    /// How many operations it may run at once.
    pub(super) held: u32,
    /// How many it could run at once.
    pub(super) wanted: u32,
    /// When it got its first slot, counted in turns.
    turn: u64,
}

/// What a member does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// The record to write when no more than `held` operations run here.
    pub(super) next: Quota,
    /// What it then holds.
    pub(super) held: u32,
    /// Whether it would take more if others held less: they must be told.
    pub(super) short: bool,
}

impl Quota {
    /// The limit that holds: the least of those that the members have in their settings.
    pub(super) fn limit(&self) -> u32 {
        self.shares.values().map(|share| share.limit).min().unwrap_or(0)
    }

    pub(super) fn share(&self, member: MemberId) -> Option<Share> {
        self.shares.get(&member).copied()
    }

    /// What all members hold together.
    pub(super) fn held(&self) -> u32 {
        self.shares.values().map(|share| share.held).sum()
    }

    /// What `me` does next. `living` are the members whose sessions stand; `confirmed` is what `me` may run now, by its
    /// own last write.
    pub(super) fn plan(
        &self,
        me: MemberId,
        limit: u32,
        wanted: u32,
        confirmed: u32,
        living: &BTreeSet<MemberId>,
    ) -> Plan {
        let mut next = self.clone();
        next.shares.retain(|member, _| *member == me || living.contains(member));
        let mine = next.shares.entry(me).or_default();
        // What the record says of me and I did not write, or do not know to have written, I do not have.
        let held = mine.held.min(confirmed);
        *mine = Share { limit: limit.max(1), held, wanted: wanted.min(limit), turn: mine.turn };

        let targets = next.targets();
        let target = targets.get(&me).copied().unwrap_or(0);
        let free = i64::from(next.limit()) - i64::from(next.held());
        let missing: i64 = next
            .shares
            .iter()
            .filter(|(member, _)| **member != me)
            .map(|(member, share)| i64::from(targets.get(member).copied().unwrap_or(0).saturating_sub(share.held)))
            .sum();
        let after = if target > held {
            // A limit that was lowered can be passed by what is held: then nothing is free.
            held + (target - held).min(u32::try_from(free).unwrap_or(0))
        } else {
            let short = u32::try_from((missing - free).max(0)).unwrap_or(u32::MAX);
            held - (held - target).min(short)
        };
        if held == 0 && after > 0 {
            next.turns += 1;
        }
        let turns = next.turns;
        if let Some(mine) = next.shares.get_mut(&me) {
            if held == 0 && after > 0 {
                mine.turn = turns;
            }
            mine.held = after;
        }
        Plan { next, held: after, short: after < target }
    }

    /// What each member should hold.
    fn targets(&self) -> BTreeMap<MemberId, u32> {
        let limit = self.limit();
        let members = u32::try_from(self.shares.len()).unwrap_or(u32::MAX);
        if limit < members {
            let mut waiting: Vec<_> = self.shares.iter().filter(|(_, share)| share.wanted > 0).collect();
            // Who has nothing comes first, the longest unserved of them; of those who have something the oldest gives.
            waiting.sort_by_key(|(member, share)| match share.held {
                0 => (false, share.turn, **member),
                _ => (true, u64::MAX - share.turn, **member),
            });
            return waiting.into_iter().take(limit as usize).map(|(member, _)| (*member, 1)).collect();
        }
        // Water-filling, least demand first: who wants less than an equal part leaves the rest to the others.
        let mut demands: Vec<_> = self.shares.iter().map(|(member, share)| (share.wanted.max(1), *member)).collect();
        demands.sort_unstable();
        let (mut left, mut takers) = (limit, members);
        let mut targets = BTreeMap::new();
        for (demand, member) in demands {
            // Rounded up: the rest of the division goes to those who come first, and none of it is lost.
            let part = demand.min(left.div_ceil(takers)).max(1).min(left);
            targets.insert(member, part);
            left -= part;
            takers -= 1;
        }
        targets
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A member as its process sees it.
    #[derive(Clone, Debug)]
    struct Process {
        id: MemberId,
        limit: u32,
        wanted: u32,
        /// What it may run.
        allowed: u32,
        alive: bool,
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// A member plans and writes; the answer may be lost, and the write too.
        Plan {
            who: usize,
            applied: bool,
            answered: bool,
        },
        Want {
            who: usize,
            wanted: u32,
        },
        Die(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            8 => (0..4usize, prop::bool::weighted(0.9), prop::bool::weighted(0.9))
                .prop_map(|(who, applied, answered)| Step::Plan { who, applied, answered }),
            3 => (0..4usize, 0..12u32).prop_map(|(who, wanted)| Step::Want { who, wanted }),
            1 => (0..4usize).prop_map(Step::Die),
        ];
        prop::collection::vec(step, 0..120)
    }

    fn processes(limit: u32) -> Vec<Process> {
        let process = |_| Process { id: MemberId::random(), limit, wanted: 0, allowed: 0, alive: true };
        (0..4).map(process).collect()
    }

    fn living(processes: &[Process]) -> BTreeSet<MemberId> {
        processes.iter().filter(|process| process.alive).map(|process| process.id).collect()
    }

    fn turn(quota: &mut Quota, processes: &mut [Process], who: usize, applied: bool, answered: bool) {
        let living = living(processes);
        let process = &mut processes[who];
        if !process.alive {
            return;
        }
        let plan = quota.plan(process.id, process.limit, process.wanted, process.allowed, &living);
        // First run less, then write it.
        process.allowed = process.allowed.min(plan.held);
        if applied {
            *quota = plan.next;
            if answered {
                process.allowed = plan.held;
            }
        }
    }

    proptest! {
        #[test]
        fn together_they_never_run_more_than_the_limit(limit in 1..9u32, steps in steps()) {
            let mut processes = processes(limit);
            let mut quota = Quota::default();
            for step in steps {
                match step {
                    Step::Plan { who, applied, answered } => turn(&mut quota, &mut processes, who, applied, answered),
                    Step::Want { who, wanted } => processes[who].wanted = wanted,
                    Step::Die(who) => {
                        // Dead, and back as somebody else.
                        processes[who] = Process { id: MemberId::random(), allowed: 0, ..processes[who].clone() };
                    }
                }
                let allowed: u32 = processes.iter().map(|process| process.allowed).sum();
                prop_assert!(allowed <= limit, "{allowed} of {limit}: {quota:?}");
            }
        }

        #[test]
        fn when_demand_stands_still_everybody_gets_a_fair_part(
            limit in 4..40u32,
            wanted in prop::collection::vec(0..40u32, 4),
            steps in steps(),
        ) {
            let mut processes = processes(limit);
            let mut quota = Quota::default();
            for step in steps {
                if let Step::Plan { who, applied, answered } = step {
                    turn(&mut quota, &mut processes, who, applied, answered);
                } else if let Step::Want { who, wanted } = step {
                    processes[who].wanted = wanted;
                }
            }
            for (process, wanted) in processes.iter_mut().zip(&wanted) {
                process.wanted = *wanted;
            }
            // Two rounds to learn of each other and give, two to take.
            for _ in 0..4 {
                for who in 0..4 {
                    turn(&mut quota, &mut processes, who, true, true);
                }
            }
            let demands: u32 = wanted.iter().map(|wanted| (*wanted).min(limit).max(1)).sum();
            for (process, wanted) in processes.iter().zip(&wanted) {
                let wanted = (*wanted).min(limit).max(1);
                let fair = if demands <= limit { wanted } else { wanted.min(limit / 4) };
                prop_assert!(process.allowed >= fair, "{} < {fair} of {limit}: {wanted}, {quota:?}", process.allowed);
            }
            // And nothing moves any more.
            let still = quota.clone();
            for who in 0..4 {
                turn(&mut quota, &mut processes, who, true, true);
            }
            prop_assert_eq!(quota, still);
        }

        #[test]
        fn with_fewer_slots_than_members_they_take_turns(limit in 1..4u32) {
            let mut processes = processes(limit);
            processes.iter_mut().for_each(|process| process.wanted = 5);
            let mut quota = Quota::default();
            let mut served = BTreeMap::<usize, u32>::new();
            for _ in 0..40 {
                for who in 0..4 {
                    let before = processes[who].allowed;
                    turn(&mut quota, &mut processes, who, true, true);
                    if before == 0 && processes[who].allowed > 0 {
                        *served.entry(who).or_default() += 1;
                    }
                }
            }
            let (least, most) = (served.values().min().copied().unwrap_or(0), served.values().max().copied().unwrap_or(0));
            prop_assert!(served.len() == 4 && least >= 5 && most - least <= 2, "{served:?}");
        }
    }

    #[test]
    fn the_lowest_limit_of_the_living_holds() {
        let mut processes = processes(8);
        let mut quota = Quota::default();
        processes[0].wanted = 8;
        turn(&mut quota, &mut processes, 0, true, true);
        assert_eq!(processes[0].allowed, 8);
        processes[1].limit = 4;
        for _ in 0..2 {
            for who in 0..2 {
                turn(&mut quota, &mut processes, who, true, true);
            }
        }
        // The other two are not there yet.
        assert_eq!((quota.limit(), processes[0].allowed, processes[1].allowed), (4, 3, 1));
        processes[1].alive = false;
        turn(&mut quota, &mut processes, 0, true, true);
        assert_eq!((quota.limit(), processes[0].allowed), (8, 8));
    }

    #[test]
    fn slots_stay_where_they_are_while_nobody_is_short() {
        let mut processes = processes(10);
        let mut quota = Quota::default();
        processes[0].wanted = 8;
        turn(&mut quota, &mut processes, 0, true, true);
        processes[0].wanted = 0;
        turn(&mut quota, &mut processes, 0, true, true);
        assert_eq!(processes[0].allowed, 8);
        processes[1].wanted = 2;
        turn(&mut quota, &mut processes, 1, true, true);
        assert_eq!((processes[0].allowed, processes[1].allowed), (8, 2));
        processes[1].wanted = 5;
        turn(&mut quota, &mut processes, 1, true, true);
        turn(&mut quota, &mut processes, 0, true, true);
        turn(&mut quota, &mut processes, 1, true, true);
        assert_eq!((processes[0].allowed, processes[1].allowed), (5, 5));
    }
}
