//! The scripts that Redis runs for us, each as a whole or not at all.
//!
//! A record is one string: 16 digits of version, then the value. Beside the records stand the set of all keys in their
//! order (`keys`), the records that have an end of life by its time (`ends`), and the last version given (`version`).

use std::sync::LazyLock;

use deadpool_redis::redis::Script;

/// So many bytes of version stand before each value. 16 digits of microseconds last until the year 2286, and Lua's
/// numbers hold them exactly.
pub(super) const VERSION_BYTES: usize = 16;

/// What the first number of an answer says.
pub(super) const DONE: i64 = 0;
pub(super) const THERE_IS_ONE: i64 = 1;
pub(super) const OTHER_VERSION: i64 = 2;
pub(super) const NOTHING_THERE: i64 = 3;
pub(super) const TOO_LATE: i64 = 4;

/// Writes a record. Keys: record, `version`, `keys`, `ends`. Arguments: latest time in µs, key, precondition (`any`,
/// `absent`, or a version), milliseconds to live (0: for ever), value, what all records' keys begin with.
///
/// A write that comes too late is refused: its caller has given up, and may have done something else since.
pub(super) static PUT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("put.lua")));

/// Deletes a record. Keys: record, `keys`, `ends`. Arguments: latest time in µs, key, precondition (`any` or a version).
pub(super) static DELETE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("delete.lua")));

/// Forgets keys whose records have ended. Keys: `keys`, `ends`. Arguments: what all records' keys begin with, then keys.
pub(super) static FORGET: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("forget.lua")));

pub(super) fn all() -> [&'static Script; 3] {
    [&PUT, &DELETE, &FORGET]
}
