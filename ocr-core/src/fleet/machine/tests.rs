//! Several members, one machine, one record: every order of events, with writes and notices that are lost, late or
//! repeated, and with sessions that end.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

struct World {
    processes: Vec<Process>,
    record: Option<(Version, OwnerRecord)>,
    last_version: u64,
    /// Members whose sessions stand, by the store.
    living: BTreeSet<MemberId>,
    pending: Vec<Pending>,
}

struct Process {
    me: MemberId,
    session: u32,
    /// Whether its session stands, by its own clock.
    joined: bool,
    machine: Machine,
    gate_open: bool,
    running: bool,
    tokens: Vec<FencingToken>,
}

#[derive(Clone, Copy, Debug)]
enum Pending {
    Look {
        who: usize,
        session: u32,
    },
    Write {
        who: usize,
        session: u32,
        over: Option<Version>,
        record: Option<OwnerRecord>,
    },
    /// A write whose sender has given up on it, and which may yet arrive.
    Late {
        over: Option<Version>,
        record: Option<OwnerRecord>,
    },
    Closing {
        who: usize,
        session: u32,
    },
    Paused {
        who: usize,
        session: u32,
    },
    Notice {
        to: MemberId,
        event: Event,
    },
    /// The store lets a lease run out.
    Expires(MemberId),
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// Something pending happens, well or not.
    Next {
        pick: u16,
        fault: u8,
    },
    Tick(usize),
    Need(usize),
    Finish(usize),
    Pin(usize),
    Watch(usize),
    Fenced(usize),
    End(usize),
    Join(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let who = 0..3usize;
    let step = prop_oneof![
        30 => (any::<u16>(), 0..10u8).prop_map(|(pick, fault)| Step::Next { pick, fault }),
        5 => who.clone().prop_map(Step::Tick),
        6 => who.clone().prop_map(Step::Need),
        6 => who.clone().prop_map(Step::Finish),
        1 => who.clone().prop_map(Step::Pin),
        1 => who.clone().prop_map(Step::Watch),
        1 => who.clone().prop_map(Step::Fenced),
        1 => who.clone().prop_map(Step::End),
        2 => who.prop_map(Step::Join),
    ];
    prop::collection::vec(step, 0..300)
}

impl World {
    fn new() -> Self {
        let process = |_| {
            let me = MemberId::random();
            let machine = Machine::new(me);
            Process { me, session: 0, joined: true, machine, gate_open: false, running: false, tokens: Vec::new() }
        };
        let processes: Vec<_> = (0..3).map(process).collect();
        let living = processes.iter().map(|process| process.me).collect();
        Self { processes, record: None, last_version: 0, living, pending: Vec::new() }
    }

    fn event(&mut self, who: usize, event: Event) {
        if !self.processes[who].joined {
            return;
        }
        let effects = self.processes[who].machine.on(event);
        self.effects(who, effects);
    }

    fn answer(&mut self, who: usize, session: u32, event: Event) {
        if self.processes[who].session == session {
            self.event(who, event);
        }
    }

    fn effects(&mut self, who: usize, effects: Vec<Effect>) {
        let (me, session) = (self.processes[who].me, self.processes[who].session);
        for effect in effects {
            let notice = |to, event| Pending::Notice { to, event };
            let record = |member, token: FencingToken| Some(OwnerRecord { member, token: FencingToken(token.0 + 1) });
            self.pending.push(match effect {
                Effect::Look => Pending::Look { who, session },
                Effect::Take(there) => {
                    assert!(!self.processes[who].running, "taken while it runs");
                    let token = there.map_or(FencingToken(0), |(_, token)| token);
                    Pending::Write { who, session, over: there.map(|(version, _)| version), record: record(me, token) }
                }
                Effect::Give { to, version, token } => {
                    assert!(!self.processes[who].running, "given away while it runs");
                    Pending::Write { who, session, over: Some(version), record: record(to, token) }
                }
                Effect::Release(version) => Pending::Write { who, session, over: Some(version), record: None },
                Effect::Open(token) => {
                    let process = &mut self.processes[who];
                    process.gate_open = true;
                    process.running = true;
                    process.tokens.push(token);
                    continue;
                }
                Effect::Close => {
                    self.processes[who].gate_open = false;
                    Pending::Closing { who, session }
                }
                Effect::Hand { to, version, token } => notice(to, Event::Yours { version, token }),
                Effect::Ask(to) => notice(to, Event::Wanted(me)),
                Effect::Follow(to) => notice(to, Event::Followed(me)),
                Effect::NotOurs(to) => notice(to, Event::NotTheirs(me)),
                Effect::Moved => continue,
                Effect::Pause => Pending::Paused { who, session },
            });
        }
    }

    fn store(&mut self, over: Option<Version>, record: Option<OwnerRecord>) -> Option<Version> {
        if self.record.map(|(version, _)| version) != over {
            return None;
        }
        self.last_version += 1;
        let version = Version(self.last_version);
        self.record = record.map(|record| (version, record));
        Some(version)
    }

    fn next(&mut self, pick: u16, fault: u8) {
        if self.pending.is_empty() {
            return;
        }
        let pending = self.pending.remove(usize::from(pick) % self.pending.len());
        match pending {
            Pending::Look { who, session } => {
                let me = self.processes[who].me;
                let seen = match self.record {
                    _ if fault == 0 => Seen::Failed,
                    None => Seen::Nobody(None),
                    Some((version, record)) if record.member == me => Seen::Us(version, record.token),
                    Some((_, record)) if self.living.contains(&record.member) => Seen::Other(record.member),
                    Some((version, record)) => Seen::Nobody(Some((version, record.token))),
                };
                self.answer(who, session, Event::Seen(seen));
            }
            Pending::Write { who, session, over, record } => {
                let wrote = match fault {
                    0 => {
                        self.store(over, record);
                        Wrote::Unknown
                    }
                    1 => {
                        self.pending.push(Pending::Late { over, record });
                        Wrote::Unknown
                    }
                    _ => match self.store(over, record) {
                        Some(version) => Wrote::Done(version, record.map_or(FencingToken(0), |record| record.token)),
                        None => Wrote::Mismatch,
                    },
                };
                self.answer(who, session, Event::Wrote(wrote));
            }
            Pending::Late { over, record } => {
                self.store(over, record);
            }
            Pending::Closing { who, session } => {
                if self.processes[who].session == session && self.processes[who].joined {
                    // What ran has come to its end, unless the gate was opened again.
                    self.processes[who].running = self.processes[who].gate_open;
                    self.answer(who, session, Event::Closed);
                }
            }
            Pending::Paused { who, session } => self.answer(who, session, Event::Paused),
            Pending::Notice { to, event } => {
                if fault == 1 {
                    self.pending.push(pending);
                }
                if fault != 0
                    && let Some(who) = self.processes.iter().position(|process| process.me == to)
                {
                    self.event(who, event);
                }
            }
            Pending::Expires(member) => {
                self.living.remove(&member);
            }
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Next { pick, fault } => self.next(pick, fault),
            Step::Tick(who) => self.event(who, Event::Tick),
            Step::Need(who) => {
                self.processes[who].machine.once += 1;
                self.event(who, Event::Need);
            }
            Step::Finish(who) => {
                if self.processes[who].running && self.processes[who].machine.once > 0 {
                    self.processes[who].machine.once -= 1;
                    self.event(who, Event::Turn);
                }
            }
            Step::Pin(who) => {
                // A hold is taken in a turn, and let go at any time.
                let process = &mut self.processes[who];
                process.machine.pins = u32::from(process.machine.pins == 0 && process.running);
                self.event(who, Event::Need);
            }
            Step::Watch(who) => {
                self.processes[who].machine.watched ^= 1;
                self.event(who, Event::Watch);
            }
            Step::Fenced(who) => {
                if let Some(token) = self.processes[who].tokens.last().copied() {
                    self.event(who, Event::Fenced(token));
                }
            }
            Step::End(who) => {
                let process = &mut self.processes[who];
                if process.joined {
                    process.joined = false;
                    process.session += 1;
                    (process.gate_open, process.running) = (false, false);
                    self.pending.push(Pending::Expires(process.me));
                }
            }
            Step::Join(who) => {
                let process = &mut self.processes[who];
                if !process.joined {
                    process.joined = true;
                    process.me = MemberId::random();
                    self.living.insert(process.me);
                    // With a new session nothing is its own any more; what it needs it still needs.
                    let Machine { once, watched, pins, .. } = process.machine;
                    process.machine = Machine { once, watched, pins, ..Machine::new(process.me) };
                    let effects = process.machine.on(Event::Need);
                    self.effects(who, effects);
                }
            }
        }
    }

    fn running(&self) -> usize {
        self.processes.iter().filter(|process| process.running).count()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn a_machine_never_runs_at_two_members(steps in steps()) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
            prop_assert!(world.running() <= 1, "{step:?}");
            for process in &world.processes {
                prop_assert!(!process.running || process.machine.may_run());
                prop_assert!(process.tokens.is_sorted(), "{:?}", process.tokens);
            }
        }
    }

    #[test]
    fn whatever_was_lost_everybody_gets_the_machine_in_the_end(steps in steps()) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        for who in 0..3 {
            world.step(Step::Join(who));
            world.processes[who].machine.pins = 0;
            world.step(Step::Need(who));
        }
        let mut served = [false; 3];
        for _ in 0..40 {
            for who in 0..3 {
                world.step(Step::Tick(who));
            }
            for _ in 0..200 {
                world.next(0, 9);
                for (who, served) in served.iter_mut().enumerate() {
                    *served |= world.processes[who].running && world.processes[who].machine.once > 0;
                    world.step(Step::Finish(who));
                }
                prop_assert!(world.running() <= 1);
                if world.pending.is_empty() {
                    break;
                }
            }
        }
        prop_assert_eq!(served, [true; 3]);
        let left: Vec<_> = world.processes.iter().map(|process| process.machine.once).collect();
        prop_assert_eq!(left, vec![0; 3]);
    }
}
