-- wrk -s load.lua URL -- FILE START [PAUSE]: sends the requests in FILE (each ends with a NUL) in turn, starting with
-- number START, and prints one line of JSON. With PAUSE, each connection waits before each request, for an exponentially
-- distributed time with a mean of PAUSE milliseconds: many connections together make a Poisson stream.

local requests, at = {}, 0

function init(args)
  local file = assert(io.open(args[1], "rb"))
  for request in file:read("*a"):gmatch("(%Z+)%z") do
    requests[#requests + 1] = request
  end
  file:close()
  at = tonumber(args[2])
  local pause = tonumber(args[3])
  if pause then
    math.randomseed(os.time())
    function delay()
      return math.floor(-pause * math.log(1 - math.random()) + 0.5)
    end
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "refused": %d, "broken": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.status, e.connect + e.read + e.write + e.timeout
  ))
end
