//! What members tell each other. Notices are hints: what must hold is in the store.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{Error, FencingToken, InstallId, Key, MemberId, Result, Version, VmId, signal::MAX_NOTICE_BYTES};

/// So many entries of one sort go into one letter; the largest entry takes some 150 bytes.
const MAX_ENTRIES: usize = 64;

/// Where all members listen.
pub(super) fn fleet_topic() -> Result<Key> {
    Key::new("fleet")
}

/// Where one member listens.
pub(super) fn member_topic(member: MemberId) -> Result<Key> {
    Key::new(format!("member/{member}"))
}

/// From one member to another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Letter {
    pub(super) by: MemberId,
    /// The sender wants these machines.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) wants: Vec<VmId>,
    /// These machines are the receiver's now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) yours: Vec<Yours>,
    /// The sender watches these conditions on machines of the receiver's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) watches: Vec<Run>,
    /// On these machines the sender runs what the receiver watches.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) watching: Vec<VmId>,
    /// These machines are not the sender's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) not_mine: Vec<VmId>,
    /// What conditions gave that the receiver watches.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) values: Vec<StoredValue>,
}

/// A machine that changes hands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Yours {
    pub(super) vm: VmId,
    pub(super) version: Version,
    pub(super) token: FencingToken,
}

/// A condition, and how long ago its last run began.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) vm: VmId,
    pub(super) id: InstallId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) age_us: Option<u64>,
}

/// A run of a condition, as it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct StoredValue {
    pub(super) run: Run,
    /// None for a run that gave none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) value: Option<f32>,
    pub(super) lateness_us: u64,
}

/// From one member to all.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Call {
    /// It has left; nothing is its own any more.
    Left(MemberId),
    /// It has fewer slots than its part.
    Short(MemberId),
    /// It has given slots back.
    Freed(MemberId),
    /// This install is gone.
    Removed(InstallId),
    /// This machine is gone.
    Gone(VmId),
}

impl Letter {
    pub(super) fn new(by: MemberId) -> Self {
        Self {
            by,
            wants: Vec::new(),
            yours: Vec::new(),
            watches: Vec::new(),
            watching: Vec::new(),
            not_mine: Vec::new(),
            values: Vec::new(),
        }
    }

    fn is_empty(&self) -> bool {
        let Self { by: _, wants, yours, watches, watching, not_mine, values } = self;
        wants.is_empty()
            && yours.is_empty()
            && watches.is_empty()
            && watching.is_empty()
            && not_mine.is_empty()
            && values.is_empty()
    }

    /// The letter as notices, each small enough to be sent.
    pub(super) fn notices(mut self) -> Vec<Bytes> {
        fn front<T>(all: &mut Vec<T>) -> Vec<T> {
            let rest = all.split_off(all.len().min(MAX_ENTRIES));
            std::mem::replace(all, rest)
        }
        let mut notices = Vec::new();
        while !self.is_empty() {
            let part = Self {
                by: self.by,
                wants: front(&mut self.wants),
                yours: front(&mut self.yours),
                watches: front(&mut self.watches),
                watching: front(&mut self.watching),
                not_mine: front(&mut self.not_mine),
                values: front(&mut self.values),
            };
            notices.extend(write(&part));
        }
        notices
    }
}

pub(super) fn write(message: &impl Serialize) -> Option<Bytes> {
    match serde_json::to_vec(message) {
        Ok(bytes) if bytes.len() <= MAX_NOTICE_BYTES => Some(Bytes::from(bytes)),
        Ok(bytes) => {
            tracing::error!(bytes = bytes.len(), "a notice is too large to be sent");
            None
        }
        Err(error) => {
            tracing::error!(%error, "a notice cannot be written");
            None
        }
    }
}

/// A notice of another version that this one cannot read is no error of anybody's: it is a hint less.
pub(super) fn read<T: for<'a> Deserialize<'a>>(payload: &[u8]) -> Result<T> {
    serde_json::from_slice(payload)
        .map_err(|error| Error::invalid("notice", "has a form that this version does not read").with_source(error))
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_of_any_length_goes_out_in_notices_that_can_be_sent() {
        let (by, vm) = (MemberId::random(), VmId::random());
        let run = Run { vm, id: InstallId::random(), age_us: Some(u64::MAX) };
        let letter = Letter {
            wants: vec![vm; 1000],
            yours: vec![Yours { vm, version: Version(u64::MAX), token: FencingToken(u64::MAX) }; 1000],
            watches: vec![run; 1000],
            watching: vec![vm; 1000],
            not_mine: vec![vm; 7],
            values: vec![StoredValue { run, value: Some(f32::MIN), lateness_us: u64::MAX }; 3000],
            ..Letter::new(by)
        };
        let letters: Vec<Letter> = letter.notices().iter().map(|notice| read(notice).unwrap()).collect();
        assert_eq!(letters.iter().map(|letter| letter.values.len()).sum::<usize>(), 3000);
        assert_eq!(letters.iter().map(|letter| letter.wants.len()).sum::<usize>(), 1000);
        assert_eq!(letters.iter().map(|letter| letter.not_mine.len()).sum::<usize>(), 7);
        assert!(letters.iter().all(|letter| letter.by == by));
        assert!(Letter::new(by).notices().is_empty());
    }
}
