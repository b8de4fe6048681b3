-- Deletes a record.
-- KEYS: record, keys, ends. ARGV: latest time in us, key, precondition.
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
