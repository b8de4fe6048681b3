use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{Around, Attempt, Call, check_prefix};
use crate::{Error, ErrorKind, Result};

/// A test aid: makes chosen calls fail, before or after their effect, or answer late.
///
/// The plan is deterministic. A fault hits the nth call of all, the nth call of an operation, or a share of calls that
/// depends on the seed and on how often that operation was called, not on the order between operations. Of several
/// faults that hit the same call the one planned first happens. Clones share plan and counts; without a plan every call
/// passes through and is only counted.
///
/// To see what every single failure does, run once to count, then once for each call:
///
/// ```
/// # use std::{sync::Arc, time::Duration};
/// # use ocr_core::{ComputeBackend, ErrorKind, Result, VmFilter, layer::{Fault, FaultLayer, LayerExt}};
/// async fn for_every_call(backend: Arc<dyn ComputeBackend>, flow: impl AsyncFn(Arc<dyn ComputeBackend>)) {
///     let counted = FaultLayer::new();
///     flow(backend.clone().layer(counted.clone())).await;
///     for nth in 1..=counted.calls() {
///         flow(backend.clone().layer(FaultLayer::new().at(nth, Fault::LoseAnswer))).await;
///     }
/// }
/// ```
#[derive(Clone, Debug, Default)]
pub struct FaultLayer {
    state: Arc<Mutex<State>>,
}

/// What happens to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails without having had any effect. The retry hint is the usual one of the kind.
    Refuse(ErrorKind),
    /// It is made, and its answer is lost: `TimedOut`, which is ambiguous.
    LoseAnswer,
    /// It is made this much later.
    Delay(Duration),
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    calls: u64,
    injected: u64,
    // Bounded by the number of methods of the five traits.
    by_operation: BTreeMap<&'static str, u64>,
}

#[derive(Debug)]
struct Rule {
    prefix: &'static str,
    when: When,
    fault: Fault,
}

#[derive(Debug)]
enum When {
    /// The nth call of all whose operation matches.
    Nth { nth: u64, seen: u64 },
    /// A share of the calls, as a threshold of a 64-bit hash.
    Often { seed: u64, below: u64 },
}

impl FaultLayer {
    /// An empty plan: every call passes through.
    pub fn new() -> Self {
        Self::default()
    }

    /// Plans a fault for the nth call of all from now on, beginning with 1.
    ///
    /// # Panics
    /// When `nth` is 0: the test would prove nothing.
    pub fn at(self, nth: u64, fault: Fault) -> Self {
        self.on("", nth, fault)
    }

    /// Plans a fault for the nth call from now on, beginning with 1, of an operation (`compute.create_vm`) or of all
    /// whose name begins so (`compute.`).
    ///
    /// # Panics
    /// When `nth` is 0 or no operation begins so.
    pub fn on(self, prefix: &'static str, nth: u64, fault: Fault) -> Self {
        assert!(nth > 0, "calls are counted from 1");
        self.plan(prefix, When::Nth { nth, seen: 0 }, fault)
    }

    /// Plans a fault for a share of the calls, from 0 (none) to 1 (all), of an operation or of all whose name begins so.
    ///
    /// # Panics
    /// When `share` is not from 0 to 1 or no operation begins so.
    pub fn often(self, prefix: &'static str, share: f64, seed: u64, fault: Fault) -> Self {
        assert!((0.0..=1.0).contains(&share), "a share is from 0 to 1, not {share}");
        // The cast saturates, so that a share of 1 is all but one in 2^64.
        self.plan(prefix, When::Often { seed, below: (share * u64::MAX as f64) as u64 }, fault)
    }

    /// Forgets the plan; the counts stay.
    pub fn clear(&self) {
        self.lock().rules.clear();
    }

    /// How many calls arrived here.
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// How many calls of this operation arrived here.
    pub fn calls_of(&self, operation: &str) -> u64 {
        self.lock().by_operation.get(operation).copied().unwrap_or_default()
    }

    /// How many faults happened.
    pub fn injected(&self) -> u64 {
        self.lock().injected
    }

    fn plan(self, prefix: &'static str, when: When, fault: Fault) -> Self {
        check_prefix(prefix);
        self.lock().rules.push(Rule { prefix, when, fault });
        self
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock; a poisoned one would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Counts a call and says what happens to it.
    fn arrive(&mut self, operation: &'static str) -> (u64, Option<Fault>) {
        self.calls += 1;
        let nth_of_operation = self.by_operation.entry(operation).or_default();
        *nth_of_operation += 1;
        let nth_of_operation = *nth_of_operation;
        let mut fault = None;
        // Every rule sees every call, so that one that comes second still counts right.
        for rule in self.rules.iter_mut().filter(|rule| operation.starts_with(rule.prefix)) {
            let hits = match &mut rule.when {
                When::Nth { nth, seen } => {
                    *seen += 1;
                    seen == nth
                }
                When::Often { seed, below } => {
                    let name = operation.bytes().fold(*seed, |hash, byte| mix(hash ^ u64::from(byte)));
                    mix(name ^ nth_of_operation) < *below
                }
            };
            if hits {
                fault = fault.or(Some(rule.fault));
            }
        }
        self.injected += u64::from(fault.is_some());
        (self.calls, fault)
    }
}

/// The SplitMix64 step: a small hash whose output bits all depend on all input bits.
fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Around for FaultLayer {
    async fn around<'a, T, F>(&'a self, call: &'a Call<'a>, attempt: F) -> Result<T>
    where
        T: Send + 'a,
        F: Fn() -> Attempt<'a, T> + Send + Sync + 'a,
    {
        let (nth, fault) = self.lock().arrive(call.operation);
        let named = |error: Error| error.during(call.operation).on(call.resource.to_string());
        match fault {
            None => attempt().await,
            Some(Fault::Refuse(kind)) => {
                Err(named(Error::new(kind, format!("injected fault: call {nth} was refused"))))
            }
            Some(Fault::LoseAnswer) => {
                // What the call itself said is lost as well, whatever it was.
                let _ = attempt().await;
                Err(named(Error::timed_out(format!("injected fault: the answer of call {nth} was lost"))))
            }
            Some(Fault::Delay(delay)) => {
                tokio::time::sleep(delay).await;
                attempt().await
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    use proptest::prelude::*;
    use tokio::time::Instant;

    use super::*;
    use crate::{Retry, layer::Resource};

    const REFUSE: Fault = Fault::Refuse(ErrorKind::Unavailable);

    fn call(operation: &'static str) -> Call<'static> {
        Call::new(operation, Resource::Matching("vms"))
    }

    /// Makes a call; returns its result and whether it had its effect.
    async fn make(faults: &FaultLayer, operation: &'static str) -> (Result<()>, bool) {
        let made = AtomicU32::new(0);
        let result = faults
            .around(&call(operation), || {
                Box::pin(async {
                    made.fetch_add(1, SeqCst);
                    Ok(())
                })
            })
            .await;
        (result, made.into_inner() == 1)
    }

    #[tokio::test]
    async fn an_empty_plan_counts_and_changes_nothing() {
        let faults = FaultLayer::new();
        for operation in ["compute.get_vm", "compute.get_vm", "state.get"] {
            assert!(matches!(make(&faults, operation).await, (Ok(()), true)));
        }
        assert_eq!((faults.calls(), faults.injected()), (3, 0));
        assert_eq!((faults.calls_of("compute.get_vm"), faults.calls_of("state.put")), (2, 0));
    }

    #[tokio::test]
    async fn a_refused_call_has_no_effect_and_a_lost_answer_has_it() {
        let faults = FaultLayer::new().at(1, REFUSE).at(2, Fault::LoseAnswer);
        let (refused, effect) = make(&faults, "compute.create_vm").await;
        let refused = refused.unwrap_err();
        assert_eq!((refused.kind(), refused.retry(), effect), (ErrorKind::Unavailable, Retry::Safe, false));
        assert_eq!(refused.to_string(), "compute.create_vm (vms): injected fault: call 1 was refused");
        let (lost, effect) = make(&faults, "compute.create_vm").await;
        let lost = lost.unwrap_err();
        assert_eq!((lost.kind(), lost.retry(), effect), (ErrorKind::TimedOut, Retry::Ambiguous, true));
        assert!(matches!(make(&faults, "compute.create_vm").await, (Ok(()), true)));
        assert_eq!(faults.injected(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_delayed_call_comes_late_and_whole() {
        let faults = FaultLayer::new().at(1, Fault::Delay(Duration::from_secs(3)));
        let began = Instant::now();
        assert!(matches!(make(&faults, "state.get").await, (Ok(()), true)));
        assert_eq!(began.elapsed(), Duration::from_secs(3));
    }

    #[tokio::test]
    async fn a_fault_hits_the_nth_call_of_its_operation_from_when_it_was_planned() {
        let faults = FaultLayer::new().on("compute.", 2, REFUSE);
        let mut failed = Vec::new();
        for operation in ["compute.get_vm", "state.get", "compute.list_vms", "compute.get_vm"] {
            failed.push(make(&faults, operation).await.0.is_err());
        }
        assert_eq!(failed, [false, false, true, false]);
        let faults = faults.on("compute.get_vm", 1, REFUSE);
        assert!(make(&faults, "compute.get_vm").await.0.is_err());
        let faults = faults.at(1, REFUSE);
        faults.clear();
        assert!(make(&faults, "compute.get_vm").await.0.is_ok());
    }

    #[tokio::test]
    async fn the_fault_planned_first_happens_and_the_other_one_still_counts() {
        let faults = FaultLayer::new().at(1, Fault::LoseAnswer).on("state.", 1, REFUSE).on("state.", 2, REFUSE);
        assert_eq!(make(&faults, "state.get").await.0.unwrap_err().kind(), ErrorKind::TimedOut);
        assert_eq!(make(&faults, "state.get").await.0.unwrap_err().kind(), ErrorKind::Unavailable);
        assert!(make(&faults, "state.get").await.0.is_ok());
    }

    #[test]
    #[should_panic(expected = "compute.creat_vm")]
    fn a_plan_that_can_never_happen_is_a_mistake() {
        let _ = FaultLayer::new().on("compute.creat_vm", 1, REFUSE);
    }

    /// Which calls of each operation fail, when the operations take turns as `order` says.
    fn hits(seed: u64, share: f64, order: &[bool]) -> [Vec<bool>; 2] {
        let faults = FaultLayer::new().often("", share, seed, REFUSE);
        let mut hits = [Vec::new(), Vec::new()];
        for &second in order {
            let operation = ["compute.get_vm", "state.get"][usize::from(second)];
            hits[usize::from(second)].push(faults.lock().arrive(operation).1.is_some());
        }
        hits
    }

    proptest! {
        #[test]
        fn the_same_seed_fails_the_same_calls_in_any_order(seed: u64, mut order in prop::collection::vec(any::<bool>(), 0..200)) {
            let one = hits(seed, 0.3, &order);
            order.reverse();
            prop_assert_eq!(one, hits(seed, 0.3, &order));
        }

        #[test]
        fn a_share_of_the_calls_fails(seed: u64, share in 0.0f64..=1.0) {
            let [hits, _] = hits(seed, share, &[false; 4000]);
            let seen = hits.iter().filter(|hit| **hit).count() as f64 / 4000.0;
            // Six standard deviations at most: 6 * sqrt(0.25 / 4000).
            prop_assert!((seen - share).abs() < 0.048, "{seen} of {share}");
        }
    }

    #[test]
    fn a_share_of_nothing_and_of_all_are_exact() {
        assert!(hits(7, 0.0, &[false; 1000])[0].iter().all(|hit| !hit));
        assert!(hits(7, 1.0, &[false; 1000])[0].iter().all(|hit| *hit));
    }
}
