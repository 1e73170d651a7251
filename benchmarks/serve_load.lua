-- Load for wrk: sends each line of a file of bodies in turn, and notes every response.
-- wrk … URL -- BODIES SAMPLES [DELAY]: DELAY is the mean pause before each request of a connection, in seconds.
--
-- A request carries its start in x-client-request-id. Where the response gives it back as x-request-id, its latency is known
-- apart from those of others, and is noted beside the times of the engine and of the alignment that the response tells.
local ffi = require("ffi")
ffi.cdef("typedef struct { long seconds; long nanoseconds; } moment; int clock_gettime(int clock, moment *now);")

local bodies, samples, pause, place = {}, nil, 0, 0
local now = ffi.new("moment")

local function microseconds()
   ffi.C.clock_gettime(1, now)
   return tonumber(now.seconds) * 1000000 + math.floor(tonumber(now.nanoseconds) / 1000)
end

function init(args)
   for line in io.lines(args[1]) do
      bodies[#bodies + 1] = line
   end
   samples = io.open(args[2], "w")
   pause = tonumber(args[3] or "0")
   math.randomseed(microseconds() % 1000000)
   if pause > 0 then
      -- of an exponential distribution, so that many connections make requests that arrive at random
      delay = function() return math.floor(-1000 * pause * math.log(1 - math.random())) end
      wrk.headers["Connection"] = "close"  -- a server would close it in the pause
   end
   wrk.method = "POST"
   wrk.headers["Content-Type"] = "application/json"
end

function request()
   place = place % #bodies + 1
   wrk.headers["x-client-request-id"] = string.format("%d", microseconds())
   return wrk.format(nil, nil, nil, bodies[place])
end

function response(status, headers, body)
   local begun = tonumber(headers["x-request-id"] or "")
   local latency = begun and (microseconds() - begun) / 1000 or -1
   local own = tonumber(body:match('"seconds": ?([%d.e-]+)') or "")
   local aligned = headers["x-aligner-duration-ms"] or "0"
   local retry = headers["retry-after"] or "-"
   samples:write(string.format("%d %.3f %.3f %s %s\n", status, latency, own and own * 1000 or 0, aligned, retry))
end

function done(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format(
      '\nRESULT {"requests": %d, "seconds": %.3f, "p50": %.3f, "p95": %.3f, "p99": %.3f, "p100": %.3f, '
         .. '"broken": %d, "refused": %d}\n',
      summary.requests, summary.duration / 1e6, latency:percentile(50) / 1000, latency:percentile(95) / 1000,
      latency:percentile(99) / 1000, latency.max / 1000, errors.connect + errors.read + errors.write, errors.status
   ))
end
