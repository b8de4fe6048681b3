//! Faults on demand: refuse a call, lose its answer, hang it.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{Error, Result};

/// What happens to one call.
#[derive(Debug)]
pub enum Fault {
    /// The call is refused and has no effect.
    Before(Error),
    /// The call has its effect, but its answer is lost and this error is seen instead.
    After(Error),
    /// The call never returns and has no effect.
    Hang,
    /// The call has its effect and never returns.
    HangAfter,
    /// The call waits first.
    Delay(Duration),
}

/// The plan of faults of one [`MemoryCloud`](super::MemoryCloud) or [`MemoryState`](super::MemoryState), or of several
/// that share it. Cloning gives another handle on the same plan.
#[derive(Clone, Default)]
pub struct Faults(Arc<Mutex<Plan>>);

#[derive(Default)]
struct Plan {
    calls: BTreeMap<&'static str, u64>,
    planned: Vec<Planned>,
}

struct Planned {
    operation: String,
    /// How many calls still pass before this one fires; 1 is the next one.
    nth: u64,
    fault: Fault,
}

impl Faults {
    /// All operations that can be given a fault, as `trait.method`.
    pub const OPERATIONS: [&'static str; 25] = [
        "compute.create_vm",
        "compute.get_vm",
        "compute.list_vms",
        "compute.set_power",
        "compute.delete_vm",
        "network.create_network",
        "network.get_network",
        "network.list_networks",
        "network.delete_network",
        "network.set_access",
        "image.import_image",
        "image.find_images",
        "image.get_image",
        "image.delete_image",
        "image.capture_vm",
        "image.export_image",
        "guest.guest_info",
        "guest.put_files",
        "guest.get_file",
        "guest.remove_files",
        "guest.exec",
        "state.get",
        "state.put",
        "state.delete",
        "state.list",
    ];

    /// Plans a fault for the `nth` call from now on (1 is the next) of an operation such as `compute.create_vm`;
    /// `*` counts the calls of all operations. Each planned fault fires once.
    ///
    /// # Panics
    /// When no operation has this name or `nth` is 0: the test would prove nothing.
    pub fn inject(&self, operation: &str, nth: u64, fault: Fault) {
        assert!(operation == "*" || Self::OPERATIONS.contains(&operation), "no operation is named {operation:?}");
        assert!(nth > 0, "calls are counted from 1");
        self.plan().planned.push(Planned { operation: operation.to_owned(), nth, fault });
    }

    /// Forgets the faults that have not fired.
    pub fn clear(&self) {
        self.plan().planned.clear();
    }

    /// How many planned faults have not fired.
    pub fn waiting(&self) -> usize {
        self.plan().planned.len()
    }

    /// How often an operation was called so far; `*` is all of them.
    pub fn calls(&self, operation: &str) -> u64 {
        let plan = self.plan();
        if operation == "*" {
            return plan.calls.values().sum();
        }
        plan.calls.get(operation).copied().unwrap_or(0)
    }

    /// Makes a call, or what the plan has for it.
    pub(super) async fn around<T>(
        &self,
        operation: &'static str,
        effect: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        debug_assert!(Self::OPERATIONS.contains(&operation), "{operation} is missing in the table");
        let fault = self.next(operation);
        let result = match fault {
            None => effect.await,
            Some(Fault::Before(error)) => Err(error),
            Some(Fault::After(error)) => {
                let _lost = effect.await;
                Err(error)
            }
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::HangAfter) => {
                let _lost = effect.await;
                std::future::pending().await
            }
            Some(Fault::Delay(pause)) => {
                tokio::time::sleep(pause).await;
                effect.await
            }
        };
        result.map_err(|error| error.during(operation))
    }

    fn next(&self, operation: &'static str) -> Option<Fault> {
        let mut plan = self.plan();
        *plan.calls.entry(operation).or_default() += 1;
        let mut fires = None;
        for (index, planned) in plan.planned.iter_mut().enumerate() {
            if planned.operation == operation || planned.operation == "*" {
                // A fault that is due while another one fires waits for the call after it.
                planned.nth = planned.nth.saturating_sub(1);
                if planned.nth == 0 && fires.is_none() {
                    fires = Some(index);
                }
            }
        }
        fires.map(|index| plan.planned.remove(index).fault)
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults").field("waiting", &self.waiting()).finish_non_exhaustive()
    }
}
