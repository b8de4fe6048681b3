-- Writes a record.
-- KEYS: record, version, keys, ends. ARGV: latest time in us, key, precondition, ms to live, value, records' prefix.
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
