-- Forgets keys whose records have ended.
-- KEYS: keys, ends. ARGV: records' prefix, then keys.
for i = 2, #ARGV do
    if redis.call('EXISTS', ARGV[1] .. ARGV[i]) == 0 then
        redis.call('ZREM', KEYS[1], ARGV[i])
        redis.call('ZREM', KEYS[2], ARGV[i])
    end
end
return 0
