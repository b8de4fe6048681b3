//! Who owns one machine, as one member sees it. Pure: events in, effects out.
//!
//! ```text
//!                  need                nobody alive, or us            written
//!        Away -------------> Looking ----------------------> Taking ---------> Ours (gate open)
//!         ^  ^                ^    |                          |  ^               |   ^
//!         |  | nothing        |    | somebody alive           |  | "yours"       |   | kept by a hold
//!         |  | needed         |    v                          |  |       wanted, |   |
//!         |  +----------------+-- Theirs <--------------------+--+       or idle v   |
//!         |                   |    ^  asks, or follows        |                Closing
//!         |                   |    |                          |                  | nothing runs
//!         |       store failed: Stuck                         |                  v
//!         +--------------------------------------------------------------- Giving, Releasing
//! ```
//!
//! **One rule carries all: ownership begins with a successful write of one's own, and with nothing else.** Not with a
//! notice, which may be late; not with reading one's own name, which may be followed by a write of one's own that was
//! thought lost and still is under way. Every write names the version it replaces, so after the write that begins the
//! ownership no older one can have an effect. The giver writes the taker's name only when nothing runs on the machine
//! any more, and from there on the record is a reservation that the taker makes its own by one more write.
//!
//! (Not shown: a guest that refuses the owner's token as too old gets a newer one: from Ours through Renewing, with the
//! gate closed, to Taking.)
//!
//! So, whatever is lost, late or repeated: of the members whose sessions stand at most one is in `Ours` or `Closing`.

use serde::{Deserialize, Serialize};

use crate::{FencingToken, MemberId, Version};

/// The record of a machine's owner. It counts while that member's session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OwnerRecord {
    pub(super) member: MemberId,
    pub(super) token: FencingToken,
}

/// So far a token goes ahead after the guest refused one for the first time, and at most, in microseconds: a second, a day.
const FIRST_LEAP_US: u64 = 1_000_000;
const LONGEST_LEAP_US: u64 = 86_400_000_000;
/// So many ticks a machine that nothing needs is kept, and then released.
const IDLE_TICKS: u32 = 30;
/// So many ticks one keeps a machine that others want, though none of one's own operations has had its turn on it.
const TENURE_TICKS: u32 = 3;
/// So many ticks without a word from the owner, and one looks whether it lives.
const SILENT_TICKS: u32 = 2;

/// One machine, for one session of one member.
#[derive(Debug)]
pub(super) struct Machine {
    me: MemberId,
    state: State,
    /// One-shots that wait or run here.
    pub(super) once: u32,
    /// Conditions that are watched here.
    pub(super) watched: u32,
    /// Conditions that other members watch, and that we run.
    pub(super) followed: u32,
    /// Holds: the machine must not go while there are any.
    pub(super) pins: u32,
    /// Who wants it, the longest waiting first.
    wanted_by: Vec<MemberId>,
    /// One-shots of ours that had a turn since the machine is ours.
    turns: u32,
    /// Since the state is what it is, since there is a reason to let go, or since the last word from the owner.
    ticks: u32,
    /// Whether the owner was asked for it.
    asked: bool,
    /// How far the next token goes ahead of the one before, in microseconds.
    leap: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Away,
    Looking,
    Taking,
    Stuck,
    Theirs(MemberId),
    Ours {
        version: Version,
        token: FencingToken,
    },
    /// `to` is empty when nothing needs the machine any more.
    Closing {
        to: Option<MemberId>,
        version: Version,
        token: FencingToken,
    },
    /// The guest wants a newer token: the machine stays ours, and nothing runs until there is one.
    Renewing {
        version: Version,
        token: FencingToken,
    },
    Giving {
        to: MemberId,
    },
    Releasing,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// How many one-shots or holds there are here changed.
    Need,
    /// What is watched here changed.
    Watch,
    /// The guest refused this token as too old.
    Fenced(FencingToken),
    /// A one-shot here had its turn.
    Turn,
    /// The record was read.
    Seen(Seen),
    /// A write of ours: its outcome.
    Wrote(Wrote),
    /// The gate is closed and nothing runs.
    Closed,
    /// A member wants the machine.
    Wanted(MemberId),
    /// A member asks us to run what it watches, and we do not have the machine.
    Followed(MemberId),
    /// The machine was given to us with this version.
    Yours { version: Version, token: FencingToken },
    /// The owner runs what we watch.
    Acknowledged(MemberId),
    /// A member says that the machine is not its own, or that it leaves.
    NotTheirs(MemberId),
    /// A pause after trouble is over.
    Paused,
    /// A renewal has passed.
    Tick,
}

/// Who owns a machine, by the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// Nobody whose session stands; with the record that is to be replaced, if there is one.
    Nobody(Option<(Version, FencingToken)>),
    /// We, by the record.
    Us(Version, FencingToken),
    /// A member whose session stands.
    Other(MemberId),
    /// The store did not answer.
    Failed,
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrote {
    /// It is there.
    Done(Version, FencingToken),
    /// Another version is there.
    Mismatch,
    /// Nobody knows: it may even come later.
    Unknown,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Read the record, and whether its member's session stands.
    Look,
    /// Write us into the record, in place of this one.
    Take(Option<(Version, FencingToken)>),
    /// Let operations run, with this token.
    Open(FencingToken),
    /// Let no more operations begin, and tell when none runs.
    Close,
    /// Write this member into the record.
    Give { to: MemberId, version: Version, token: FencingToken },
    /// Delete the record.
    Release(Version),
    /// Tell the new owner that the machine is its own.
    Hand { to: MemberId, version: Version, token: FencingToken },
    /// Ask a member for the machine.
    Ask(MemberId),
    /// Ask a member to run what we watch.
    Follow(MemberId),
    /// Tell a member, and all that follow us, to look again.
    NotOurs(MemberId),
    /// Tell all that follow us to look again.
    Moved,
    /// Wait a little.
    Pause,
}

impl Machine {
    pub(super) fn new(me: MemberId) -> Self {
        Self {
            me,
            state: State::Away,
            once: 0,
            watched: 0,
            followed: 0,
            pins: 0,
            wanted_by: Vec::new(),
            turns: 0,
            ticks: 0,
            asked: false,
            leap: 0,
        }
    }

    /// Whether operations may run here.
    pub(super) fn may_run(&self) -> bool {
        matches!(self.state, State::Ours { .. } | State::Closing { .. } | State::Renewing { .. })
    }

    /// Who runs what we watch here.
    pub(super) fn owner(&self) -> Option<MemberId> {
        match self.state {
            State::Theirs(owner) => Some(owner),
            _ => None,
        }
    }

    /// Whether there is nothing left to remember.
    pub(super) fn is_over(&self) -> bool {
        self.state == State::Away && !self.is_needed() && self.wanted_by.is_empty() && self.pins == 0
    }

    /// Takes what happened, and says what is to be done.
    pub(super) fn on(&mut self, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.take(event, &mut effects);
        self.settle(&mut effects);
        effects
    }

    fn is_needed(&self) -> bool {
        self.once > 0 || self.watched > 0
    }

    /// Whether nobody, here or elsewhere, needs what runs here.
    fn is_idle(&self) -> bool {
        !self.is_needed() && self.followed == 0
    }

    fn take(&mut self, event: Event, effects: &mut Vec<Effect>) {
        match (event, self.state) {
            (Event::Need, State::Theirs(owner)) if self.once > 0 && !self.asked => {
                self.asked = true;
                effects.push(Effect::Ask(owner));
            }
            (Event::Watch, State::Theirs(owner)) if self.watched > 0 => effects.push(Effect::Follow(owner)),
            (Event::Need | Event::Watch, _) => {}
            (Event::Fenced(refused), State::Ours { version, token }) if refused == token => {
                // Further with each refusal, so that it is over soon whatever the guest has seen.
                self.leap = (self.leap * 8).clamp(FIRST_LEAP_US, LONGEST_LEAP_US);
                self.enter(State::Renewing { version, token });
                effects.push(Effect::Close);
            }
            (Event::Fenced(_), _) => {}
            (Event::Turn, State::Ours { .. } | State::Closing { .. }) => self.turns += 1,
            (Event::Turn, _) => {}

            (Event::Seen(seen), State::Looking) => match seen {
                Seen::Failed => self.stuck(effects),
                Seen::Other(owner) => self.theirs(owner, effects),
                Seen::Us(version, token) => match self.wanted_by.first().copied() {
                    // Ours by the record alone; the one who asks shall have it.
                    Some(to) if !self.is_needed() => self.give(to, version, token, effects),
                    _ if self.is_needed() => self.write(Some((version, token)), effects),
                    _ => self.enter(State::Away),
                },
                Seen::Nobody(there) if self.is_needed() => self.write(there, effects),
                Seen::Nobody(_) => {
                    self.refuse_all(effects);
                    self.enter(State::Away);
                }
            },
            (Event::Seen(_), _) => {}

            (Event::Wrote(wrote), State::Taking) => match wrote {
                Wrote::Done(version, token) => {
                    self.enter(State::Ours { version, token });
                    self.turns = 0;
                    effects.push(Effect::Open(token));
                }
                Wrote::Mismatch => self.look(effects),
                Wrote::Unknown => self.stuck(effects),
            },
            (Event::Wrote(wrote), State::Giving { to }) => match wrote {
                Wrote::Done(version, token) => {
                    effects.push(Effect::Hand { to, version, token });
                    self.wanted_by.retain(|member| *member != to);
                    self.refuse_all(effects);
                    effects.push(Effect::Moved);
                    self.theirs(to, effects);
                }
                // Whatever the record says: it is ours no more until we write it again.
                Wrote::Mismatch | Wrote::Unknown => {
                    effects.push(Effect::Moved);
                    self.look_or_leave(effects);
                }
            },
            (Event::Wrote(_), State::Releasing) => {
                effects.push(Effect::Moved);
                self.refuse_all(effects);
                self.enter(State::Away);
            }
            (Event::Wrote(_), _) => {}

            (Event::Closed, State::Closing { to, version, token }) => {
                match to.or(self.wanted_by.first().copied()) {
                    // A turn that ended last has taken a hold.
                    _ if self.pins > 0 => self.reopen(version, token, effects),
                    Some(to) => self.give(to, version, token, effects),
                    None if self.is_idle() => {
                        self.enter(State::Releasing);
                        effects.push(Effect::Release(version));
                    }
                    None => self.reopen(version, token, effects),
                }
            }
            (Event::Closed, State::Renewing { version, token }) => {
                self.write(Some((version, FencingToken(token.0.saturating_add(self.leap)))), effects);
            }
            (Event::Closed, _) => {}

            (Event::Wanted(by), _) if by == self.me => {}
            (Event::Wanted(by) | Event::Followed(by), State::Theirs(_)) => effects.push(Effect::NotOurs(by)),
            // It will ask again, and then there is an answer.
            (Event::Followed(_), state) if state != State::Away => {}
            // When the record names us although we do not have the machine, who asks shall have it.
            (Event::Wanted(by) | Event::Followed(by), _) => {
                if !self.wanted_by.contains(&by) {
                    self.wanted_by.push(by);
                }
                if self.state == State::Away {
                    self.look(effects);
                }
            }

            (Event::Yours { version, token }, State::Away | State::Stuck | State::Theirs(_)) if self.is_needed() => {
                self.write(Some((version, token)), effects);
            }
            (Event::Yours { .. }, _) => {}

            (Event::Acknowledged(owner), State::Theirs(theirs)) if owner == theirs => self.ticks = 0,
            (Event::Acknowledged(_), _) => {}
            (Event::NotTheirs(owner), State::Theirs(theirs)) if owner == theirs => self.look_or_leave(effects),
            (Event::NotTheirs(gone), _) => self.wanted_by.retain(|member| *member != gone),

            (Event::Paused | Event::Tick, State::Stuck) => self.look_or_leave(effects),
            (Event::Paused, _) => {}
            (Event::Tick, State::Theirs(owner)) => {
                self.ticks += 1;
                // A one-shot looks at each tick: its notice may be lost, or the owner dead. Who only watches hears from
                // the owner.
                if self.once > 0 || self.ticks > SILENT_TICKS {
                    self.look_or_leave(effects);
                } else if self.watched > 0 {
                    effects.push(Effect::Follow(owner));
                }
            }
            (Event::Tick, State::Ours { .. }) => {
                let may_go = !self.wanted_by.is_empty() || self.is_idle();
                self.ticks = if may_go { self.ticks + 1 } else { 0 };
            }
            (Event::Tick, _) => {}
        }
    }

    /// What follows from the state and the needs, whatever happened last.
    fn settle(&mut self, effects: &mut Vec<Effect>) {
        match self.state {
            State::Away if self.is_needed() => self.look(effects),
            State::Theirs(_) if !self.is_needed() => self.enter(State::Away),
            State::Ours { version, token } if self.pins == 0 => {
                let waits = !self.wanted_by.is_empty();
                let may_go = self.once == 0 || self.turns > 0 || self.ticks >= TENURE_TICKS;
                let to = self.wanted_by.first().copied();
                if waits && may_go || self.is_idle() && self.ticks >= IDLE_TICKS {
                    self.enter(State::Closing { to, version, token });
                    effects.push(Effect::Close);
                }
            }
            // Needed again before it was gone.
            State::Closing { to: None, version, token } if !self.is_idle() => {
                self.reopen(version, token, effects);
            }
            _ => {}
        }
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.ticks = 0;
    }

    fn look(&mut self, effects: &mut Vec<Effect>) {
        self.enter(State::Looking);
        effects.push(Effect::Look);
    }

    fn look_or_leave(&mut self, effects: &mut Vec<Effect>) {
        if self.is_needed() || !self.wanted_by.is_empty() { self.look(effects) } else { self.enter(State::Away) }
    }

    fn stuck(&mut self, effects: &mut Vec<Effect>) {
        self.enter(State::Stuck);
        effects.push(Effect::Pause);
    }

    fn write(&mut self, there: Option<(Version, FencingToken)>, effects: &mut Vec<Effect>) {
        self.enter(State::Taking);
        effects.push(Effect::Take(there));
    }

    fn give(&mut self, to: MemberId, version: Version, token: FencingToken, effects: &mut Vec<Effect>) {
        self.enter(State::Giving { to });
        self.followed = 0;
        effects.push(Effect::Give { to, version, token });
    }

    fn reopen(&mut self, version: Version, token: FencingToken, effects: &mut Vec<Effect>) {
        self.enter(State::Ours { version, token });
        effects.push(Effect::Open(token));
    }

    fn theirs(&mut self, owner: MemberId, effects: &mut Vec<Effect>) {
        self.refuse_all(effects);
        self.enter(State::Theirs(owner));
        self.asked = self.once > 0;
        if self.asked {
            effects.push(Effect::Ask(owner));
        }
        if self.watched > 0 {
            effects.push(Effect::Follow(owner));
        }
    }

    fn refuse_all(&mut self, effects: &mut Vec<Effect>) {
        effects.extend(self.wanted_by.drain(..).map(Effect::NotOurs));
    }
}

#[cfg(test)]
mod tests;
