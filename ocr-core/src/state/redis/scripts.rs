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
pub(super) static PUT: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
if now > tonumber(ARGV[1]) then return {4, 0, now} end
if ARGV[3] ~= 'any' then
    local have = redis.call('GETRANGE', KEYS[1], 0, 15)
    if ARGV[3] == 'absent' then
        if have ~= '' then return {1, tonumber(have), now} end
    elseif have ~= ARGV[3] then
        return {2, tonumber(have) or 0, now}
    end
end
local version = math.max((tonumber(redis.call('GET', KEYS[2])) or 0) + 1, now)
local text = string.format('%016.0f', version)
local ttl = tonumber(ARGV[4])
if ttl > 0 then
    redis.call('SET', KEYS[1], text .. ARGV[5], 'PX', ttl)
else
    redis.call('SET', KEYS[1], text .. ARGV[5])
end
redis.call('SET', KEYS[2], text)
redis.call('ZADD', KEYS[3], 0, ARGV[2])
if ttl > 0 then
    redis.call('ZADD', KEYS[4], now + ttl * 1000, ARGV[2])
    for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now - 2000000, 'LIMIT', 0, 4)) do
        if redis.call('EXISTS', ARGV[6] .. key) == 0 then redis.call('ZREM', KEYS[3], key) end
        redis.call('ZREM', KEYS[4], key)
    end
end
return {0, version, now}
",
    )
});

/// Deletes a record. Keys: record, `keys`, `ends`. Arguments: latest time in µs, key, precondition (`any` or a version).
pub(super) static DELETE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
if now > tonumber(ARGV[1]) then return {4, 0, now} end
if ARGV[3] ~= 'any' then
    local have = redis.call('GETRANGE', KEYS[1], 0, 15)
    if have ~= ARGV[3] then return {2, tonumber(have) or 0, now} end
end
local gone = redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[2])
redis.call('ZREM', KEYS[3], ARGV[2])
return {gone == 1 and 0 or 3, 0, now}
",
    )
});

/// Forgets keys whose records have ended. Keys: `keys`, `ends`. Arguments: what all records' keys begin with, then keys.
pub(super) static FORGET: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
for i = 2, #ARGV do
    if redis.call('EXISTS', ARGV[1] .. ARGV[i]) == 0 then
        redis.call('ZREM', KEYS[1], ARGV[i])
        redis.call('ZREM', KEYS[2], ARGV[i])
    end
end
return 0
",
    )
});

pub(super) fn all() -> [&'static Script; 3] {
    [&PUT, &DELETE, &FORGET]
}
