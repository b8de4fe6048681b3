//! Times to come, of so many things that neither a heap nor a list of them is cheap.
//!
//! A hashed, hierarchical timing wheel (Varghese and Lauck, 1987) of 1,024 microseconds, whose slots are lists that run
//! through the things themselves: it costs two indices for each, and putting in and taking out cost the same however
//! many there are. What is due in the slot that time has reached is sorted by its microsecond in a small heap.

use std::{cmp::Reverse, collections::BinaryHeap};

/// No index.
pub(super) const NONE: u32 = u32::MAX;
/// A slot is `2^SLOT_BITS` microseconds.
const SLOT_BITS: u32 = 10;
const DIGIT_BITS: u32 = 6;
const DIGITS: usize = 1 << DIGIT_BITS;
/// Seven digits of slots: over a hundred years.
const LEVELS: usize = 7;
/// What is later is taken as this.
const LAST_SLOT: u64 = (1 << (DIGIT_BITS * LEVELS as u32)) - 1;
/// Set in [`Links::prev`] where there is none: the rest is the list's number. All ones: it is in the heap.
const HEAD: u32 = 1 << 31;
const SORTED: u32 = u32::MAX;
/// A longer list is not searched for its earliest: its slot's begin will do, and it is looked at again then.
const SEARCHED: usize = 64;

/// Two indices that each thing lends: for the wheel while it is in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Links {
    pub(super) next: u32,
    pub(super) prev: u32,
}

impl Links {
    pub(super) const NONE: Links = Links { next: NONE, prev: NONE };
}

/// What a wheel is of. Indices are below 2^31.
pub(super) trait Timed {
    fn links(&mut self, index: u32) -> &mut Links;
    fn due_us(&self, index: u32) -> u64;
    /// Changes whenever the index is given to another thing.
    fn generation(&self, index: u32) -> u32;
}

#[derive(Debug)]
pub(super) struct Wheel {
    /// All earlier slots were reached.
    cursor: u64,
    lists: Box<[[u32; DIGITS]; LEVELS]>,
    occupied: [u64; LEVELS],
    in_lists: usize,
    /// Of the slots that were reached, by time.
    sorted: BinaryHeap<Reverse<(u64, u32, u32)>>,
    dead: usize,
    /// Nothing in the lists is due before this. Unknown after a change.
    earliest_us: Option<u64>,
}

impl Wheel {
    pub(super) fn new() -> Self {
        Self {
            cursor: 0,
            lists: Box::new([[NONE; DIGITS]; LEVELS]),
            occupied: [0; LEVELS],
            in_lists: 0,
            sorted: BinaryHeap::new(),
            dead: 0,
            earliest_us: Some(u64::MAX),
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.in_lists + self.sorted.len() - self.dead
    }

    pub(super) fn insert(&mut self, things: &mut impl Timed, index: u32) {
        let due_us = things.due_us(index);
        let slot = (due_us >> SLOT_BITS).min(LAST_SLOT);
        if slot < self.cursor {
            *things.links(index) = Links { next: NONE, prev: SORTED };
            self.sorted.push(Reverse((due_us, index, things.generation(index))));
            return;
        }
        let differs = slot ^ self.cursor;
        let level = if differs == 0 { 0 } else { (differs.ilog2() / DIGIT_BITS) as usize };
        let digit = digit(slot, level);
        let head = std::mem::replace(&mut self.lists[level][digit], index);
        if head != NONE {
            things.links(head).prev = index;
        }
        *things.links(index) = Links { next: head, prev: HEAD | (level * DIGITS + digit) as u32 };
        self.occupied[level] |= 1 << digit;
        self.in_lists += 1;
        self.earliest_us = self.earliest_us.map(|earliest| earliest.min(due_us));
    }

    /// Takes out what is in the wheel. Call it while the thing still has the generation it had.
    pub(super) fn remove(&mut self, things: &mut impl Timed, index: u32) {
        let Links { next, prev } = std::mem::replace(things.links(index), Links::NONE);
        if prev == SORTED {
            self.dead += 1;
            if self.dead > self.sorted.len() / 2 {
                // This one still looks alive.
                self.sorted.retain(|Reverse((_, other, generation))| {
                    *other != index && things.generation(*other) == *generation && things.links(*other).prev == SORTED
                });
                self.dead = 0;
            }
            return;
        }
        if next != NONE {
            things.links(next).prev = prev;
        }
        if prev & HEAD == 0 {
            things.links(prev).next = next;
        } else {
            let (level, digit) = ((prev & !HEAD) as usize / DIGITS, (prev & !HEAD) as usize % DIGITS);
            self.lists[level][digit] = next;
            if next == NONE {
                self.occupied[level] &= !(1 << digit);
            }
        }
        self.in_lists -= 1;
        self.earliest_us = if self.in_lists == 0 { Some(u64::MAX) } else { None };
    }

    /// Takes out one that is due.
    pub(super) fn pop(&mut self, things: &mut impl Timed, now_us: u64) -> Option<u32> {
        if self.in_lists > 0 && now_us >> SLOT_BITS >= self.cursor {
            self.turn_to(things, (now_us >> SLOT_BITS) + 1);
        }
        self.clean(things);
        let &Reverse((due_us, index, _)) = self.sorted.peek()?;
        if due_us > now_us {
            return None;
        }
        self.sorted.pop();
        *things.links(index) = Links::NONE;
        Some(index)
    }

    /// When to look again: when the next is due, or before.
    pub(super) fn next_us(&mut self, things: &mut impl Timed) -> Option<u64> {
        self.clean(things);
        if let Some(&Reverse((due_us, ..))) = self.sorted.peek() {
            return Some(due_us);
        }
        if self.in_lists == 0 {
            return None;
        }
        if self.earliest_us.is_none() {
            self.earliest_us = self.next_list().map(|(level, slot)| {
                let mut earliest_us = u64::MAX;
                let mut index = self.lists[level][digit(slot, level)];
                for _ in 0..SEARCHED {
                    if index == NONE {
                        return earliest_us;
                    }
                    earliest_us = earliest_us.min(things.due_us(index));
                    index = things.links(index).next;
                }
                slot << SLOT_BITS
            });
        }
        self.earliest_us
    }

    /// Reaches all slots before this one.
    fn turn_to(&mut self, things: &mut impl Timed, target: u64) {
        while self.cursor < target {
            let Some((level, slot)) = self.next_list().filter(|(_, slot)| *slot < target) else {
                self.cursor = target;
                break;
            };
            let digit = digit(slot, level);
            let mut index = std::mem::replace(&mut self.lists[level][digit], NONE);
            self.occupied[level] &= !(1 << digit);
            self.earliest_us = None;
            // What is of this very slot is sorted; the others go to lower levels.
            self.cursor = slot + u64::from(level == 0);
            while index != NONE {
                let next = things.links(index).next;
                self.in_lists -= 1;
                self.insert(things, index);
                index = next;
            }
        }
        if self.in_lists == 0 {
            self.earliest_us = Some(u64::MAX);
        }
    }

    /// The occupied list that is reached next, and where it begins.
    fn next_list(&self) -> Option<(usize, u64)> {
        // A list of a higher level that begins here is for all that follows on the lower ones.
        for level in (1..LEVELS).rev() {
            let bits = DIGIT_BITS * level as u32;
            if self.cursor & ((1 << bits) - 1) == 0 && self.occupied[level] >> digit(self.cursor, level) & 1 == 1 {
                return Some((level, self.cursor));
            }
        }
        for (level, occupied) in self.occupied.iter().enumerate() {
            let from = digit(self.cursor, level) + usize::from(level > 0);
            let later = if from < DIGITS { occupied >> from << from } else { 0 };
            if later != 0 {
                let bits = DIGIT_BITS * level as u32;
                let above = self.cursor >> (bits + DIGIT_BITS) << (bits + DIGIT_BITS);
                return Some((level, above | u64::from(later.trailing_zeros()) << bits));
            }
        }
        None
    }

    fn clean(&mut self, things: &impl Timed) {
        while self.dead > 0
            && let Some(&Reverse((_, index, generation))) = self.sorted.peek()
            && things.generation(index) != generation
        {
            self.sorted.pop();
            self.dead -= 1;
        }
    }
}

fn digit(slot: u64, level: usize) -> usize {
    (slot >> (DIGIT_BITS * level as u32)) as usize % DIGITS
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Things(Vec<(u64, u32, Option<Links>)>);

    impl Timed for Things {
        fn links(&mut self, index: u32) -> &mut Links {
            self.0[index as usize].2.get_or_insert(Links::NONE)
        }

        fn due_us(&self, index: u32) -> u64 {
            self.0[index as usize].0
        }

        fn generation(&self, index: u32) -> u32 {
            self.0[index as usize].1
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u64, u32),
        Remove(usize),
        Pass(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        // From microseconds to years, and beyond what the wheel knows.
        let time = (0..62u32, any::<u64>()).prop_map(|(bits, random)| random & ((1 << bits) - 1));
        prop_oneof![
            8 => time.clone().prop_map(|after_us| Step::Insert(after_us, 1)),
            1 => time.prop_map(|after_us| Step::Insert(after_us, 2 * SEARCHED as u32)),
            4 => any::<prop::sample::Index>().prop_map(|index| Step::Remove(index.index(1 << 16))),
            4 => (0..45u32, any::<u64>()).prop_map(|(bits, random)| Step::Pass(random & ((1 << bits) - 1))),
        ]
    }

    proptest! {
        #[test]
        fn all_come_in_time_and_none_too_early(steps in prop::collection::vec(step(), 1..100)) {
            let (mut wheel, mut things, mut mirror) = (Wheel::new(), Things::default(), BTreeSet::new());
            let mut now_us = 0;
            for step in steps {
                match step {
                    Step::Insert(after_us, count) => for more_us in 0..u64::from(count) {
                        let (due_us, index) = (now_us + after_us + more_us * more_us, things.0.len() as u32);
                        things.0.push((due_us, 0, None));
                        wheel.insert(&mut things, index);
                        mirror.insert((due_us, index));
                    }
                    Step::Remove(pick) => {
                        if mirror.is_empty() { continue }
                        let one = *mirror.iter().nth(pick % mirror.len()).unwrap();
                        mirror.remove(&one);
                        wheel.remove(&mut things, one.1);
                        things.0[one.1 as usize].1 += 1;
                    }
                    Step::Pass(by_us) => {
                        // As a sleeper does: it wakes when it was told, and looks again.
                        let until_us = now_us + by_us;
                        let mut wakes = 0;
                        while let Some(next_us) = wheel.next_us(&mut things).filter(|next_us| *next_us <= until_us) {
                            prop_assert!(next_us >= now_us || wakes == 0);
                            now_us = now_us.max(next_us);
                            while let Some(index) = wheel.pop(&mut things, now_us) {
                                let due_us = things.due_us(index);
                                prop_assert!(due_us <= now_us && mirror.remove(&(due_us, index)));
                                prop_assert!(mirror.first().is_none_or(|first| first.0 >= due_us), "in order");
                            }
                            wakes += 1;
                            prop_assert!(wakes < 2000, "it does not spin");
                        }
                        now_us = until_us;
                        prop_assert!(mirror.first().is_none_or(|first| first.0 > now_us));
                    }
                }
                prop_assert_eq!(wheel.len(), mirror.len());
                let first_us = mirror.first().map(|first| first.0);
                let next_us = wheel.next_us(&mut things);
                prop_assert_eq!(next_us.is_some(), first_us.is_some());
                prop_assert!(next_us <= first_us);
            }
        }
    }

    #[test]
    fn who_is_removed_leaves_nothing() {
        let (mut wheel, mut things) = (Wheel::new(), Things::default());
        things.0.push((5, 0, None));
        for _ in 0..10_000 {
            wheel.insert(&mut things, 0);
            wheel.pop(&mut things, 1);
            wheel.remove(&mut things, 0);
            things.0[0].1 += 1;
        }
        assert!(wheel.sorted.len() < 3 && wheel.len() == 0);
    }
}
