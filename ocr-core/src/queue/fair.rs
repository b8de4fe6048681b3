//! The policy of the queue: who runs next. Pure: no lock, no I/O, no clock; `now_us` is an argument.
//!
//! # What it promises
//! - At most one operation runs on a machine, and at most [`Limits::max_running`] run at once.
//! - Operations that never ran (one-shots, and first runs of periodic ones) go before re-runs, except for a
//!   reserve: an eighth of the slots, at least one, serves re-runs first. The same holds inside a machine: after
//!   seven first runs in a row a waiting re-run has its turn. So a flood of one-shots slows re-runs, and never
//!   stops them.
//! - Re-runs share what is left by *slip*: each gets its interval, or, when there is too much work, all get their
//!   interval stretched by the same factor. For equal intervals that is "the one that ran least goes first",
//!   without that rule's fault that newcomers starve all who came before.
//! - Between machines first runs take turns, so that one machine's burst does not hold up the others.
//! - Machines whose last operation hung are on probation: together they hold at most an eighth of the slots, at
//!   least one, until an operation of theirs ends in time.
//! - A periodic operation keeps a fixed grid of planned times. Ticks that pass while it waits or runs are skipped
//!   and counted; it never has more than one run pending.
//! - Nothing starts on a machine whose gate is closed. What is submitted there, and periodic operations whose tick
//!   comes, wait and cost no slot. When the gate opens, each has one run pending, planned for the latest tick that
//!   passed; the ticks before are skipped and counted.
//! - The limit may change at any time, to 0 too. Lowering it stops nothing: nothing starts until fewer run.
//!
//! # How
//! Start-time fair queueing (Goyal, Vin and Cheng, 1996) in two classes. A re-run carries a virtual start tag, which
//! grows by its interval with each run. The least tag goes first. The virtual clock follows the tags that were
//! served; it follows the real clock when nothing waits. A machine has a virtual clock of its own, since it may be
//! overloaded while the rest is not: inside a machine tags are compared with tags alone; between machines a tag
//! counts as at most one interval old. That bounds what a machine that was away can claim at once.
//!
//! ```text
//!             submit                start                   finish
//!  one-shot  --------> first queue -------> running ------------------------> gone
//!  periodic  --------> first queue -------> running --> waits for its tick --+
//!                                              ^                             | advance
//!                                              +---------- again queue <-----+
//! ```
//! Cancelling takes an operation out of any of these at once, except that what runs is let finish.
//!
//! # Cost
//! Every call is O(log n), amortised. Entries of cancelled operations stay in the heaps until they come up, or
//! until they are the greater part, and are told apart by generation numbers: a heap is never more than about
//! twice as long as what lives in it. What waits for its tick is in a timing wheel (`wheel.rs`), where it costs the same
//! however many there are. An operation takes 56 bytes, and 16 more while it is a re-run that is ready.

use std::{
    cmp::Ordering,
    collections::{BTreeSet, BinaryHeap, HashMap, VecDeque},
    num::NonZeroU64,
};

use super::wheel::{Links, NONE, Timed, Wheel};
use crate::VmId;

#[cfg(test)]
mod tests;

/// One part in this many of the slots is for re-runs, and at most one part in this many for machines on probation.
const SHARE: usize = 8;
/// Where there is only one slot to share (one in all, or one machine), it is shared in time: so many to one.
const TURNS: u8 = SHARE as u8 - 1;
/// How many machines without operations are remembered as hung.
const MAX_REMEMBERED: usize = 4096;
/// A heap is cleaned of dead entries when they outnumber the living by so many.
const DEAD_ALLOWED: usize = 32;

/// How much a [`FairQueue`] takes and runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Operations that run at once. With 0 nothing starts.
    pub max_running: usize,
    /// Operations that one machine may hold besides the one that runs.
    pub max_per_vm: usize,
    /// Operations in all, at most 2,147,483,647.
    pub max_total: usize,
}

/// Names an operation. Never reused, in the sense that an old id is told from a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OpId {
    index: u32,
    generation: u32,
}

impl OpId {
    /// A small number that no other living operation has, for a table beside the queue.
    pub fn index(self) -> usize {
        self.index as usize
    }
}

/// Why an operation was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// The machine holds [`Limits::max_per_vm`].
    Vm,
    /// The queue holds [`Limits::max_total`].
    Total,
}

/// An operation that is to run now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// The operation, for [`FairQueue::finish`].
    pub op: OpId,
    /// Its machine.
    pub vm: VmId,
    /// A small number that no other machine has while this one has operations, for a table beside the queue.
    pub vm_index: usize,
    /// How many runs came before this one.
    pub run: u64,
    /// When it was to run.
    pub planned_us: u64,
    /// Ticks skipped between the run before and this one.
    pub skipped: u64,
    /// None for a one-shot.
    pub interval_us: Option<u64>,
}

/// What became of an operation that finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// It will run again.
    Again,
    /// It is gone: it was a one-shot, or it was cancelled while it ran.
    Gone,
}

/// What became of an operation that was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// It is gone.
    Removed,
    /// It runs, and will be gone when it has finished.
    Running,
    /// It was gone already.
    Unknown,
}

/// What a gate's keeper wants to know of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateEvent {
    /// Its gate is closed, and an operation is ready there.
    Wanted(VmId),
    /// It has no operations left: none that is ready, none that waits for its tick, none that runs. Told of machines
    /// whose gate is open where machines start with it closed, and of those that were told as wanted.
    Idle(VmId),
}

/// What the queue did so far, and what it holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Operations taken.
    pub submitted: u64,
    /// Operations refused because the queue was full.
    pub refused: u64,
    /// First runs started.
    pub started_first: u64,
    /// Re-runs started.
    pub started_again: u64,
    /// Runs finished.
    pub finished: u64,
    /// Of these, how many hung.
    pub hung: u64,
    /// Operations cancelled.
    pub cancelled: u64,
    /// Ticks of periodic operations that were skipped.
    pub skipped_ticks: u64,
    /// Operations that are ready and wait for a slot or for their machine.
    pub ready: usize,
    /// Periodic operations that wait for their next tick.
    pub waiting: usize,
    /// Operations that run.
    pub running: usize,
    /// Of these, how many on machines on probation.
    pub running_on_probation: usize,
    /// The most that ever ran at once.
    pub peak_running: usize,
    /// Machines on probation.
    pub on_probation: usize,
}

/// One machine's part of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmLoad {
    /// The machine.
    pub vm: VmId,
    /// As [`Start::vm_index`].
    pub index: usize,
    /// Its operations that are ready and wait.
    pub ready: usize,
    /// Its operations in all: ready, waiting for their tick, or running.
    pub operations: usize,
    /// The one of them that runs, and since when.
    pub running: Option<(OpId, u64)>,
    /// Whether its gate is open.
    pub open: bool,
    /// Whether its last operation hung.
    pub on_probation: bool,
}

/// The queue. See the [module](self). With each operation it keeps something of its user's, beside its own: what is
/// needed together lies together, and most of an operation's cost is waiting for memory.
#[derive(Debug)]
pub struct FairQueue<T = ()> {
    limits: Limits,
    ops: Ops<T>,
    free_ops: Vec<u32>,
    vms: Vec<Vm>,
    free_vms: Vec<u32>,
    by_id: HashMap<VmId, u32>,
    /// The heads of idle machines: by class, then healthy and on probation.
    heads: [[Heads; 2]; 2],
    wheel: Wheel,
    /// Machines on probation that have no operations, the longest forgotten first.
    remembered: VecDeque<u32>,
    /// The virtual clock of re-runs: the greatest tag served; the real time when nothing waits. Never ahead of that.
    virtual_us: u64,
    /// The virtual clock of first runs, in turns.
    round: u64,
    stamp: NonZeroU64,
    spread: u32,
    running_first: usize,
    /// First runs started in a row though a re-run was there; only one slot needs it.
    first_in_a_row: u8,
    /// Operations of healthy machines started in a row; only one slot needs it.
    healthy_in_a_row: u8,
    /// Whether machines start with their gate closed.
    gated: bool,
    /// Machines of which there is something to tell, when somebody listens.
    to_tell: Option<BTreeSet<u32>>,
    counters: Counters,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// It never ran.
    First,
    /// It did.
    Again,
}

impl Class {
    const BOTH: [Class; 2] = [Class::First, Class::Again];
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Free,
    Ready(Class),
    Waiting,
    Running { class: Class, cancelled: bool },
}

#[derive(Debug)]
struct Op<T> {
    generation: u32,
    vm: u32,
    place: Place,
    /// Among the operations of its machine that never ran, or in the wheel.
    links: Links,
    /// Ticks skipped since the last run.
    skipped: u32,
    /// 0 for a one-shot.
    interval_us: u64,
    /// In turns while it never ran, then in virtual microseconds.
    tag: u64,
    /// The tick it waits for, or whose run is pending or running.
    due_us: u64,
    runs: u64,
    payload: T,
}

/// All operations, by their index.
#[derive(Debug)]
struct Ops<T>(Vec<Op<T>>);

#[derive(Debug)]
struct Vm {
    id: VmId,
    operations: u32,
    /// What runs, and since when.
    running: Option<(OpId, u64)>,
    open: bool,
    /// The last that was told of it, while it holds.
    told: Option<News>,
    /// It was told as wanted, and neither opened nor told as idle since.
    asked_for: bool,
    on_probation: bool,
    remembered: bool,
    /// First runs started in a row though a re-run was ready here.
    first_in_a_row: u8,
    /// The turn that its newest first run has.
    round: u64,
    /// Its virtual clock, which its re-runs' tags are of.
    virtual_us: u64,
    /// What to add to its virtual time to get the queue's. It grows when the machine lags by more than its credit:
    /// all its operations alike are forgiven what they missed.
    offset_us: u64,
    first: FirstLane,
    again: AgainLane,
    /// What of each class is among the heads of all idle machines.
    listed: [Option<Listed>; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    Wanted,
    Idle,
}

/// The operations of one machine that never ran, the oldest first. Their tags rise.
#[derive(Debug)]
struct FirstLane {
    head: u32,
    tail: u32,
    len: u32,
}

/// The re-runs of one machine that are ready.
#[derive(Debug, Default)]
struct AgainLane {
    /// The top is always alive.
    heap: BinaryHeap<ByTag>,
    dead: u32,
}

/// The greatest is that with the least tag; nothing else is compared.
#[derive(Clone, Copy, Debug)]
struct ByTag {
    tag: u64,
    op: OpId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Listed {
    /// Never used twice: an entry among the heads is alive when its machine still has its stamp.
    stamp: NonZeroU64,
    op: u32,
}

/// A machine's head among those of the other machines. The greatest is that with the least tag, then the oldest.
#[derive(Clone, Copy, Debug)]
struct Listing {
    tag: u64,
    stamp: NonZeroU64,
    vm: u32,
}

#[derive(Debug, Default)]
struct Heads {
    heap: BinaryHeap<Listing>,
    alive: usize,
}

impl<T: Default> FairQueue<T> {
    /// An empty queue. Where it is `gated`, machines start with their gate closed.
    pub fn new(limits: Limits, gated: bool) -> Self {
        let max_total = limits.max_total.min(i32::MAX as usize);
        Self {
            limits: Limits { max_total, ..limits },
            ops: Ops(Vec::new()),
            free_ops: Vec::new(),
            vms: Vec::new(),
            free_vms: Vec::new(),
            by_id: HashMap::new(),
            heads: Default::default(),
            wheel: Wheel::new(),
            remembered: VecDeque::new(),
            virtual_us: 0,
            round: 0,
            stamp: NonZeroU64::MIN,
            spread: 0,
            running_first: 0,
            first_in_a_row: 0,
            healthy_in_a_row: 0,
            gated,
            to_tell: None,
            counters: Counters::default(),
        }
    }

    /// Takes an operation that runs once.
    ///
    /// # Errors
    /// When the queue is full.
    pub fn submit_once(&mut self, vm: VmId, now_us: u64) -> Result<OpId, Full> {
        self.submit(vm, 0, now_us)
    }

    /// Takes an operation that runs every `interval_us` (at least 1), first as soon as the queue allows.
    ///
    /// The first run's end sets the grid: the second run is planned between a twentieth and the whole of an interval
    /// later, spread by the golden ratio, so that what was deployed together does not come back together.
    ///
    /// # Errors
    /// When the queue is full.
    pub fn submit_every(&mut self, vm: VmId, interval_us: u64, now_us: u64) -> Result<OpId, Full> {
        self.submit(vm, interval_us.max(1), now_us)
    }

    /// Takes an operation that ran elsewhere: it carries on from there, next at `due_us`, an interval apart from then on.
    /// Of ticks that have passed it has one run pending, as always.
    ///
    /// # Errors
    /// When the queue is full.
    pub fn resume_every(&mut self, vm: VmId, interval_us: u64, due_us: u64, now_us: u64) -> Result<OpId, Full> {
        let id = self.admit(vm, interval_us.max(1), now_us)?;
        let op = &mut self.ops.0[id.index()];
        (op.runs, op.due_us) = (1, due_us);
        self.counters.skipped_ticks += op.skip(now_us);
        let vm_index = op.vm;
        let vm = &mut self.vms[vm_index as usize];
        vm.catch_up(self.virtual_us);
        op.tag = vm.virtual_us.saturating_add(op.due_us.saturating_sub(now_us).min(op.interval_us));
        self.await_tick(id.index, now_us);
        self.list_heads(vm_index);
        self.note(vm_index);
        Ok(id)
    }

    /// Makes ready what is due. Call it before [`FairQueue::start_next`].
    pub fn advance(&mut self, now_us: u64) {
        while self.counters.waiting > 0
            && let Some(index) = self.wheel.pop(&mut self.ops, now_us)
        {
            self.counters.waiting -= 1;
            self.make_ready_again(index);
            let vm_index = self.ops.0[index as usize].vm;
            self.list_heads(vm_index);
            self.note(vm_index);
        }
    }

    /// When the next operation that waits for its tick is due; or earlier, when to [advance](FairQueue::advance) before
    /// that can be told.
    pub fn next_due_us(&mut self) -> Option<u64> {
        if self.counters.waiting == 0 {
            return None;
        }
        self.wheel.next_us(&mut self.ops)
    }

    /// Whether [`FairQueue::start_next`] would start something.
    pub fn can_start(&mut self) -> bool {
        self.counters.running < self.limits.max_running
            && Class::BOTH.into_iter().any(|class| self.first_of(class).is_some())
    }

    /// Starts the operation whose turn it is: takes a slot and its machine. `None` when there is none, or no slot.
    pub fn start_next(&mut self, now_us: u64) -> Option<Start> {
        if self.counters.running >= self.limits.max_running {
            return None;
        }
        let first = self.first_of(Class::First);
        let again = self.first_of(Class::Again);
        if again.is_none() {
            // No re-run waits for a slot, so all are served in full: virtual time is real time.
            self.virtual_us = self.virtual_us.max(now_us);
        }
        let (class, listing) = match (first, again) {
            (None, None) => return None,
            (Some(first), None) => (Class::First, first),
            (None, Some(again)) => (Class::Again, again),
            (Some(first), Some(again)) => {
                let first_goes = if self.limits.max_running == 1 {
                    self.first_in_a_row < TURNS
                } else {
                    self.running_first < self.limits.max_running - self.share()
                };
                if first_goes {
                    self.first_in_a_row = self.first_in_a_row.saturating_add(1);
                    (Class::First, first)
                } else {
                    self.first_in_a_row = 0;
                    (Class::Again, again)
                }
            }
        };
        self.start(class, listing, now_us)
    }

    /// Ends the run of an operation and frees its slot and its machine. `hung` puts the machine on probation, anything
    /// else takes it off.
    pub fn finish(&mut self, id: OpId, now_us: u64, hung: bool) -> Finished {
        let Some(Place::Running { class, cancelled }) = self.place(id) else {
            debug_assert!(false, "finish of {id:?}, which does not run");
            return Finished::Gone;
        };
        let op = &mut self.ops.0[id.index()];
        let vm_index = op.vm;
        let vm = &mut self.vms[vm_index as usize];
        self.counters.running -= 1;
        self.counters.finished += 1;
        self.counters.hung += u64::from(hung);
        self.counters.running_on_probation -= usize::from(vm.on_probation);
        self.running_first -= usize::from(class == Class::First);
        if hung != vm.on_probation {
            self.counters.on_probation += usize::from(hung);
            self.counters.on_probation -= usize::from(vm.on_probation);
            vm.on_probation = hung;
        }
        vm.running = None;
        let finished = if cancelled || op.interval_us == 0 {
            self.remove(id);
            Finished::Gone
        } else {
            self.plan(id.index, now_us);
            Finished::Again
        };
        self.list_heads(vm_index);
        self.note(vm_index);
        self.forget_if_unused(vm_index);
        finished
    }

    /// Takes an operation out. What runs is let finish.
    pub fn cancel(&mut self, id: OpId) -> Cancelled {
        let Some(place) = self.place(id) else { return Cancelled::Unknown };
        let op = &mut self.ops.0[id.index()];
        let vm_index = op.vm;
        match place {
            Place::Free => return Cancelled::Unknown,
            Place::Running { cancelled: true, .. } => return Cancelled::Running,
            Place::Running { class, cancelled: false } => {
                op.place = Place::Running { class, cancelled: true };
                self.counters.cancelled += 1;
                return Cancelled::Running;
            }
            Place::Waiting => {
                self.wheel.remove(&mut self.ops, id.index);
                self.remove(id);
                self.counters.waiting -= 1;
            }
            Place::Ready(class) => {
                if class == Class::First {
                    self.vms[vm_index as usize].first.unlink(&mut self.ops, id.index);
                    self.remove(id);
                } else {
                    self.remove(id);
                    self.vms[vm_index as usize].again.bury(&self.ops);
                }
                self.counters.ready -= 1;
                self.list_heads(vm_index);
            }
        }
        self.counters.cancelled += 1;
        self.note(vm_index);
        self.forget_if_unused(vm_index);
        Cancelled::Removed
    }

    /// Changes how many operations run at once.
    pub fn set_max_running(&mut self, max_running: usize) {
        self.limits.max_running = max_running;
    }

    /// Opens a machine's gate. It stays so, with or without operations, until [`FairQueue::close`].
    pub fn open(&mut self, vm: VmId, now_us: u64) {
        let vm_index = match self.by_id.get(&vm) {
            Some(&index) => index,
            None if self.gated => self.add_vm(vm),
            None => return,
        };
        let vm = &mut self.vms[vm_index as usize];
        if vm.open {
            return;
        }
        vm.open = true;
        vm.asked_for = false;
        for entry in vm.again.heap.iter() {
            let op = &mut self.ops.0[entry.op.index()];
            if op.generation == entry.op.generation {
                self.counters.skipped_ticks += op.skip(now_us);
            }
        }
        self.list_heads(vm_index);
        self.note(vm_index);
        self.forget_if_unused(vm_index);
    }

    /// Closes a machine's gate: nothing starts there. What runs is let finish; whether something does is returned.
    pub fn close(&mut self, vm: VmId) -> bool {
        let vm_index = match self.by_id.get(&vm) {
            Some(&index) => index,
            None if self.gated => return false,
            None => self.add_vm(vm),
        };
        self.shut(vm_index)
    }

    /// Closes all gates, also those of machines that are yet to come.
    pub fn close_all(&mut self) {
        self.gated = true;
        let all: Vec<VmId> = self.by_id.keys().copied().collect();
        for vm in all {
            self.close(vm);
        }
    }

    /// Begins to collect events. All that is so now is told, whether or not it was told before.
    pub fn listen(&mut self) {
        self.to_tell = Some(BTreeSet::new());
        let all: Vec<u32> = self.by_id.values().copied().collect();
        for vm_index in all {
            self.vms[vm_index as usize].told = None;
            self.note(vm_index);
        }
    }

    /// Whether there is an event to tell.
    pub fn has_event(&self) -> bool {
        self.to_tell.as_ref().is_some_and(|to_tell| !to_tell.is_empty())
    }

    /// The next event. It is so at this moment: what has passed since it was noted is not told. Each is told once,
    /// until it changes; so at most one for each machine waits.
    pub fn next_event(&mut self) -> Option<GateEvent> {
        while let Some(vm_index) = self.to_tell.as_mut()?.pop_first() {
            let vm = &mut self.vms[vm_index as usize];
            let news = vm.news(self.gated);
            let event = match news {
                Some(News::Wanted) => {
                    vm.asked_for = true;
                    Some(GateEvent::Wanted(vm.id))
                }
                Some(News::Idle) => {
                    vm.asked_for = false;
                    Some(GateEvent::Idle(vm.id))
                }
                None => None,
            };
            vm.told = vm.news(self.gated);
            self.forget_if_unused(vm_index);
            if event.is_some() {
                return event;
            }
        }
        None
    }

    /// The machine of an operation that is in the queue.
    pub fn vm(&self, id: OpId) -> Option<VmId> {
        let op = self.ops.0.get(id.index()).filter(|op| op.generation == id.generation)?;
        Some(self.vms[op.vm as usize].id)
    }

    /// All operations in the queue.
    pub fn operations(&self) -> impl Iterator<Item = OpId> + '_ {
        let alive = self.ops.0.iter().enumerate().filter(|(_, op)| op.place != Place::Free);
        alive.map(|(index, op)| OpId { index: index as u32, generation: op.generation })
    }

    /// Those of them that are periodic.
    pub fn periodics(&self) -> impl Iterator<Item = OpId> + '_ {
        self.operations().filter(|id| self.ops.0[id.index()].interval_us > 0)
    }

    /// A periodic operation's machine, its interval in microseconds, and how many runs have begun.
    pub fn periodic(&self, id: OpId) -> Option<(VmId, u64, u64)> {
        let vm = self.vm(id)?;
        let op = &self.ops.0[id.index()];
        let begun = op.runs + u64::from(matches!(op.place, Place::Running { .. }));
        (op.interval_us > 0).then_some((vm, op.interval_us, begun))
    }

    /// What its user keeps with an operation.
    pub fn kept(&self, id: OpId) -> &T {
        &self.ops.0[id.index()].payload
    }

    /// The same, to change it. It stays until the operation's index is used again.
    pub fn kept_mut(&mut self, id: OpId) -> &mut T {
        &mut self.ops.0[id.index()].payload
    }

    /// The counters.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The machines that the queue knows, in no order.
    pub fn vms(&self) -> impl Iterator<Item = VmLoad> + '_ {
        self.by_id.values().map(|&index| {
            let vm = &self.vms[index as usize];
            VmLoad {
                vm: vm.id,
                index: index as usize,
                ready: vm.ready(),
                operations: vm.operations as usize,
                running: vm.running,
                open: vm.open,
                on_probation: vm.on_probation,
            }
        })
    }

    /// How many slots there is work for now: what runs, and the idle machines that are open and have something ready.
    pub fn demand(&self) -> usize {
        let machines = |ward: usize| self.heads[0][ward].alive.max(self.heads[1][ward].alive);
        self.counters.running + machines(0) + machines(1)
    }

    /// What runs on a machine, and since when.
    pub fn running_on(&self, vm: VmId) -> Option<(OpId, u64)> {
        self.vms[*self.by_id.get(&vm)? as usize].running
    }

    fn submit(&mut self, vm: VmId, interval_us: u64, now_us: u64) -> Result<OpId, Full> {
        let id = self.admit(vm, interval_us, now_us)?;
        let vm_index = self.ops.0[id.index()].vm;
        self.vms[vm_index as usize].first.push(&mut self.ops, id.index);
        self.counters.ready += 1;
        self.list_heads(vm_index);
        self.note(vm_index);
        Ok(id)
    }

    /// Makes an operation that is in no list yet.
    fn admit(&mut self, vm: VmId, interval_us: u64, now_us: u64) -> Result<OpId, Full> {
        let known = self.by_id.get(&vm).copied();
        let held = known.map_or(0, |index| {
            let vm = &self.vms[index as usize];
            vm.operations as usize - usize::from(vm.running.is_some())
        });
        let full = if held >= self.limits.max_per_vm {
            Some(Full::Vm)
        } else if self.ops.0.len() - self.free_ops.len() >= self.limits.max_total {
            Some(Full::Total)
        } else {
            None
        };
        if let Some(full) = full {
            self.counters.refused += 1;
            return Err(full);
        }
        let vm_index = known.unwrap_or_else(|| self.add_vm(vm));
        let vm = &mut self.vms[vm_index as usize];
        vm.operations += 1;
        vm.round = self.round.max(vm.round + 1);
        let round = vm.round;
        let index = self.free_ops.pop().unwrap_or_else(|| {
            self.ops.0.push(Op {
                generation: 0,
                vm: 0,
                place: Place::Free,
                links: Links::NONE,
                skipped: 0,
                interval_us: 0,
                tag: 0,
                due_us: 0,
                runs: 0,
                payload: T::default(),
            });
            (self.ops.0.len() - 1) as u32
        });
        let op = &mut self.ops.0[index as usize];
        let generation = op.generation;
        *op = Op {
            generation,
            vm: vm_index,
            place: Place::Ready(Class::First),
            links: Links::NONE,
            skipped: 0,
            interval_us,
            tag: round,
            due_us: now_us,
            runs: 0,
            payload: T::default(),
        };
        self.counters.submitted += 1;
        Ok(OpId { index, generation })
    }

    fn start(&mut self, class: Class, listing: Listing, now_us: u64) -> Option<Start> {
        let vm = &mut self.vms[listing.vm as usize];
        let index = match class {
            Class::First => vm.first.pop(&mut self.ops)?,
            Class::Again => vm.again.pop(&self.ops)?.index,
        };
        let op = &mut self.ops.0[index as usize];
        op.place = Place::Running { class, cancelled: false };
        match class {
            Class::First => {
                self.round = self.round.max(op.tag);
                self.running_first += 1;
                self.counters.started_first += 1;
                vm.first_in_a_row = if vm.again.len() > 0 { vm.first_in_a_row.saturating_add(1) } else { 0 };
            }
            Class::Again => {
                self.virtual_us = self.virtual_us.max(listing.tag.min(now_us));
                vm.virtual_us = vm.virtual_us.max(op.tag.min(now_us.saturating_sub(vm.offset_us)));
                op.tag += op.interval_us;
                vm.first_in_a_row = 0;
                self.counters.started_again += 1;
            }
        }
        let id = OpId { index, generation: op.generation };
        vm.running = Some((id, now_us));
        self.healthy_in_a_row = if vm.on_probation { 0 } else { self.healthy_in_a_row.saturating_add(1) };
        self.counters.ready -= 1;
        self.counters.running += 1;
        self.counters.running_on_probation += usize::from(vm.on_probation);
        self.counters.peak_running = self.counters.peak_running.max(self.counters.running);
        let start = Start {
            op: id,
            vm: vm.id,
            vm_index: listing.vm as usize,
            run: op.runs,
            planned_us: op.due_us,
            skipped: op.skipped.into(),
            interval_us: (op.interval_us > 0).then_some(op.interval_us),
        };
        // It is the top: nothing of its machine is listed any more.
        let ward = usize::from(vm.on_probation);
        self.heads[class as usize][ward].heap.pop();
        for class in Class::BOTH {
            if vm.listed[class as usize].take().is_some() {
                self.heads[class as usize][ward].alive -= 1;
            }
        }
        Some(start)
    }

    /// Plans the next run of a periodic operation that ran.
    fn plan(&mut self, index: u32, now_us: u64) {
        let op = &mut self.ops.0[index as usize];
        op.runs += 1;
        op.skipped = 0;
        if op.runs == 1 {
            let vm = &mut self.vms[op.vm as usize];
            // Steps of the golden ratio fall into the widest gap that is left, however many they are.
            self.spread = self.spread.wrapping_add(0x9E37_79B9);
            let least_us = op.interval_us / 20;
            let phase_us = least_us + scale(op.interval_us - least_us, self.spread);
            op.due_us = now_us.saturating_add(phase_us.max(1));
            vm.catch_up(self.virtual_us);
            // The tag is spread likewise: under overload, streams come back together in virtual time. On average it is
            // one interval on, which charges for the first run: else who opens a stream again and again gains by it.
            op.tag = vm.virtual_us.saturating_add(op.interval_us / 2 + phase_us);
        } else {
            op.due_us = op.due_us.saturating_add(op.interval_us);
            self.counters.skipped_ticks += op.skip(now_us);
        }
        self.await_tick(index, now_us);
    }

    fn await_tick(&mut self, index: u32, now_us: u64) {
        let op = &mut self.ops.0[index as usize];
        if op.due_us <= now_us {
            self.make_ready_again(index);
        } else {
            op.place = Place::Waiting;
            self.wheel.insert(&mut self.ops, index);
            self.counters.waiting += 1;
        }
    }

    fn make_ready_again(&mut self, index: u32) {
        let op = &mut self.ops.0[index as usize];
        let vm = &mut self.vms[op.vm as usize];
        vm.catch_up(self.virtual_us);
        op.tag = op.tag.max(vm.virtual_us.saturating_sub(op.interval_us));
        op.place = Place::Ready(Class::Again);
        vm.again.heap.push(ByTag { tag: op.tag, op: OpId { index, generation: op.generation } });
        self.counters.ready += 1;
    }

    fn shut(&mut self, vm_index: u32) -> bool {
        let vm = &mut self.vms[vm_index as usize];
        vm.open = false;
        let busy = vm.running.is_some();
        self.list_heads(vm_index);
        self.note(vm_index);
        self.forget_if_unused(vm_index);
        busy
    }

    /// Notes what there is to tell of a machine, or that there is nothing any more.
    fn note(&mut self, vm_index: u32) {
        let Some(to_tell) = &mut self.to_tell else { return };
        let vm = &mut self.vms[vm_index as usize];
        let news = vm.news(self.gated);
        let is_new = news.is_some() && news != vm.told;
        if news != vm.told {
            vm.told = None;
        }
        if is_new {
            to_tell.insert(vm_index);
        } else {
            to_tell.remove(&vm_index);
        }
    }

    /// Makes the lists of heads say what this machine offers now: nothing while it is busy or its gate is closed.
    fn list_heads(&mut self, vm_index: u32) {
        let vm = &mut self.vms[vm_index as usize];
        let idle = vm.running.is_none() && vm.open;
        let held_back = vm.first_in_a_row >= TURNS && vm.again.len() > 0;
        let ward = usize::from(vm.on_probation);
        for class in Class::BOTH {
            let head = match class {
                _ if !idle => None,
                Class::First if held_back => None,
                Class::First => vm.first.head(),
                Class::Again => vm.again.heap.peek().map(|head| head.op.index),
            };
            if vm.listed[class as usize].map(|listed| listed.op) == head {
                continue;
            }
            let heads = &mut self.heads[class as usize][ward];
            heads.alive -= usize::from(vm.listed[class as usize].is_some());
            vm.listed[class as usize] = None;
            if let Some(index) = head {
                let tag = match class {
                    Class::First => self.ops.0[index as usize].tag,
                    Class::Again => {
                        let tag = vm.again.heap.peek().map_or(0, |head| head.tag);
                        if tag + vm.offset_us < self.virtual_us {
                            let floor_us = self.virtual_us.saturating_sub(self.ops.0[index as usize].interval_us);
                            vm.offset_us = vm.offset_us.max(floor_us.saturating_sub(tag));
                        }
                        tag + vm.offset_us
                    }
                };
                self.stamp = self.stamp.saturating_add(1);
                vm.listed[class as usize] = Some(Listed { stamp: self.stamp, op: index });
                heads.alive += 1;
                heads.heap.push(Listing { tag, stamp: self.stamp, vm: vm_index });
            }
        }
        for class in Class::BOTH {
            let heads = &mut self.heads[class as usize][ward];
            if heads.heap.len() > 2 * heads.alive + DEAD_ALLOWED {
                let vms = &self.vms;
                heads.heap.retain(|head| vms[head.vm as usize].lists(class, head));
            }
        }
    }

    /// The head whose turn it is in a class.
    fn first_of(&mut self, class: Class) -> Option<Listing> {
        let healthy = self.first_in(class, 0);
        if self.heads[class as usize][1].alive == 0 {
            return healthy;
        }
        let probation_open = if self.limits.max_running == 1 {
            self.healthy_in_a_row >= TURNS || self.heads.iter().all(|wards| wards[0].alive == 0)
        } else {
            self.counters.running_on_probation < self.share()
        };
        if !probation_open {
            return healthy;
        }
        match (healthy, self.first_in(class, 1)) {
            (Some(healthy), Some(probation)) => Some(healthy.max(probation)),
            (healthy, probation) => healthy.or(probation),
        }
    }

    fn first_in(&mut self, class: Class, ward: usize) -> Option<Listing> {
        let heads = &mut self.heads[class as usize][ward];
        while let Some(head) = heads.heap.peek() {
            if self.vms[head.vm as usize].lists(class, head) {
                return Some(*head);
            }
            heads.heap.pop();
        }
        None
    }

    fn share(&self) -> usize {
        self.limits.max_running.div_ceil(SHARE)
    }

    fn add_vm(&mut self, id: VmId) -> u32 {
        let vm = Vm {
            id,
            operations: 0,
            running: None,
            open: !self.gated,
            told: None,
            asked_for: false,
            on_probation: false,
            remembered: false,
            first_in_a_row: 0,
            round: 0,
            virtual_us: 0,
            offset_us: 0,
            first: FirstLane::EMPTY,
            again: AgainLane::default(),
            listed: [None; 2],
        };
        let index = match self.free_vms.pop() {
            Some(index) => {
                self.vms[index as usize] = vm;
                index
            }
            None => {
                self.vms.push(vm);
                (self.vms.len() - 1) as u32
            }
        };
        self.by_id.insert(id, index);
        index
    }

    /// Drops a machine without operations, whose gate is as that of any other. One that hung is remembered: its next
    /// operation may hang too.
    fn forget_if_unused(&mut self, vm_index: u32) {
        let vm = &mut self.vms[vm_index as usize];
        if vm.operations > 0 || vm.remembered || vm.is_kept(self.gated) {
            return;
        }
        if !vm.on_probation {
            self.drop_vm(vm_index);
            return;
        }
        vm.remembered = true;
        self.remembered.push_back(vm_index);
        if self.remembered.len() <= MAX_REMEMBERED {
            return;
        }
        if let Some(oldest) = self.remembered.pop_front() {
            let vm = &mut self.vms[oldest as usize];
            vm.remembered = false;
            if vm.operations == 0 && !vm.is_kept(self.gated) {
                self.counters.on_probation -= usize::from(vm.on_probation);
                self.drop_vm(oldest);
            }
        }
    }

    fn drop_vm(&mut self, vm_index: u32) {
        let vm = &mut self.vms[vm_index as usize];
        // A burst must not hold its memory for ever.
        vm.again = AgainLane::default();
        self.by_id.remove(&vm.id);
        self.free_vms.push(vm_index);
    }

    fn remove(&mut self, id: OpId) {
        let op = &mut self.ops.0[id.index()];
        op.generation = op.generation.wrapping_add(1);
        op.place = Place::Free;
        self.vms[op.vm as usize].operations -= 1;
        self.free_ops.push(id.index);
    }

    fn place(&self, id: OpId) -> Option<Place> {
        self.ops.0.get(id.index()).filter(|op| op.generation == id.generation).map(|op| op.place)
    }
}

impl<T> Op<T> {
    /// Moves the planned time to the latest tick that has passed. Returns how many were skipped.
    fn skip(&mut self, now_us: u64) -> u64 {
        let Some(late_us) = now_us.checked_sub(self.due_us) else { return 0 };
        let skipped = late_us / self.interval_us;
        self.due_us += skipped * self.interval_us;
        self.skipped = self.skipped.saturating_add(u32::try_from(skipped).unwrap_or(u32::MAX));
        skipped
    }
}

impl Vm {
    /// Its gate is not as that of any other, or there is something to tell of it.
    fn is_kept(&self, gated: bool) -> bool {
        self.open == gated || self.asked_for
    }

    fn ready(&self) -> usize {
        self.first.len as usize + self.again.len()
    }

    /// Whether an entry among the heads is alive.
    fn lists(&self, class: Class, head: &Listing) -> bool {
        self.listed[class as usize].is_some_and(|listed| listed.stamp == head.stamp)
    }

    fn news(&self, gated: bool) -> Option<News> {
        if !self.open && self.ready() > 0 {
            Some(News::Wanted)
        } else if self.operations == 0 && (self.open && gated || self.asked_for) {
            Some(News::Idle)
        } else {
            None
        }
    }

    /// A machine on which nothing waits is served in full: its virtual clock is the queue's.
    fn catch_up(&mut self, virtual_us: u64) {
        if self.running.is_none() && self.again.len() == 0 {
            self.virtual_us = self.virtual_us.max(virtual_us.saturating_sub(self.offset_us));
        }
    }
}

impl<T> Timed for Ops<T> {
    fn links(&mut self, index: u32) -> &mut Links {
        &mut self.0[index as usize].links
    }

    fn due_us(&self, index: u32) -> u64 {
        self.0[index as usize].due_us
    }

    fn generation(&self, index: u32) -> u32 {
        self.0[index as usize].generation
    }
}

impl FirstLane {
    const EMPTY: FirstLane = FirstLane { head: NONE, tail: NONE, len: 0 };

    fn head(&self) -> Option<u32> {
        (self.head != NONE).then_some(self.head)
    }

    fn push<T>(&mut self, ops: &mut Ops<T>, index: u32) {
        ops.0[index as usize].links = Links { next: NONE, prev: self.tail };
        match self.tail {
            NONE => self.head = index,
            tail => ops.0[tail as usize].links.next = index,
        }
        self.tail = index;
        self.len += 1;
    }

    fn pop<T>(&mut self, ops: &mut Ops<T>) -> Option<u32> {
        let head = self.head()?;
        self.unlink(ops, head);
        Some(head)
    }

    fn unlink<T>(&mut self, ops: &mut Ops<T>, index: u32) {
        let Links { next, prev } = std::mem::replace(&mut ops.0[index as usize].links, Links::NONE);
        match prev {
            NONE => self.head = next,
            prev => ops.0[prev as usize].links.next = next,
        }
        match next {
            NONE => self.tail = prev,
            next => ops.0[next as usize].links.prev = prev,
        }
        self.len -= 1;
    }
}

impl AgainLane {
    fn len(&self) -> usize {
        self.heap.len() - self.dead as usize
    }

    /// Takes the head.
    fn pop<T>(&mut self, ops: &Ops<T>) -> Option<OpId> {
        let head = self.heap.pop()?;
        self.clean_top(ops);
        Some(head.op)
    }

    /// Notes that one entry died.
    fn bury<T>(&mut self, ops: &Ops<T>) {
        self.dead += 1;
        self.clean_top(ops);
        if self.dead as usize > self.heap.len() / 2 + DEAD_ALLOWED {
            self.heap.retain(|entry| ops.0[entry.op.index()].generation == entry.op.generation);
            self.dead = 0;
        }
    }

    fn clean_top<T>(&mut self, ops: &Ops<T>) {
        while self.dead > 0
            && let Some(ByTag { op, .. }) = self.heap.peek()
            && ops.0[op.index()].generation != op.generation
        {
            self.heap.pop();
            self.dead -= 1;
        }
    }
}

impl Ord for ByTag {
    fn cmp(&self, other: &Self) -> Ordering {
        other.tag.cmp(&self.tag)
    }
}

impl Ord for Listing {
    fn cmp(&self, other: &Self) -> Ordering {
        other.order().cmp(&self.order())
    }
}

impl Listing {
    /// As one number, compared without a branch: most of a heap's time goes there.
    fn order(&self) -> u128 {
        u128::from(self.tag) << 64 | u128::from(self.stamp.get())
    }
}

/// Whole orders from [`Ord::cmp`].
macro_rules! order_by_cmp {
    ($($what:ty),*) => { $(
        impl PartialOrd for $what {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl PartialEq for $what {
            fn eq(&self, other: &Self) -> bool {
                self.cmp(other) == Ordering::Equal
            }
        }

        impl Eq for $what {}
    )* };
}

order_by_cmp!(ByTag, Listing);

/// `span` times `numerator / 2^32`.
fn scale(span: u64, numerator: u32) -> u64 {
    ((u128::from(span) * u128::from(numerator)) >> 32) as u64
}
