-- The idlest permitted expert gets the request.
--
-- ext_authz puts the clusters that may serve a request into one header, the only input of the choice:
--
--     x-target-cluster: expert-a.84ca14c5b3fcbdb3;w=2;m=64,expert-b.6d9f8e4c0b1a2f37;s
--
-- `w` is the expert's weight (default 1), `m` the requests it may have in flight (default: any number). The cluster
-- with the smallest (in flight + 1) / weight wins; ties are broken at random. Full clusters come last. Before them come
-- clusters on standby (`s`), which serve only when no other can. In flight are the requests of all worker threads that
-- have been sent there or wait for a connection.
--
-- The result is a ladder, idlest~second (ext_authz/wire/clusters.py). A dead cluster has nothing in flight, so it is
-- often the idlest, and only Envoy knows that it is dead: Envoy skips it and takes the second. For the ladder's last
-- rung, envoy_on_request provides a list of all candidates that starts at a random one.
--
-- A header of any other form names no cluster: the request fails closed, with 503.

local NO_CLUSTER = "none" -- a cluster that does not exist; the policy may not define it
local MAX_CANDIDATES = 64
local MAX_CACHED = 1024 -- parsed headers per worker thread
local FULL = 1e9 -- added to the load of a cluster that can take no more
local STANDBY = 1e7 -- added to the load of a cluster on standby
local DECISION = "envoy.filters.http.ext_authz" -- its dynamic metadata

local random = math.random
local cached, count = {}, 0

local function candidate(text)
  local name, rest = text:match("^([a-z0-9][a-z0-9-]*%.%x+)(.*)$")
  if not name then
    return nil
  end
  local weight, max_requests, after
  weight, after = rest:match("^;w=([1-9]%d?%d?%d?)(.*)$")
  rest = after or rest
  max_requests, after = rest:match("^;m=([1-9]%d?%d?%d?%d?%d?%d?)(.*)$")
  rest = after or rest
  if rest ~= "" and rest ~= ";s" then
    return nil
  end
  return {
    name = name,
    weight = tonumber(weight or 1),
    max_requests = tonumber(max_requests or FULL),
    standby = rest == ";s" and STANDBY or 0,
    rung = { cluster = name },
  }
end

local function parse(header)
  local candidates = {}
  for text in (header .. ","):gmatch("(.-),") do
    local found = candidate(text)
    if not found or #candidates == MAX_CANDIDATES then
      return {}
    end
    candidates[#candidates + 1] = found
  end
  return candidates
end

-- The candidates in the request's header. Each worker thread caches them by the header's text.
local function candidates_of(handle)
  local header = handle:headers():get("x-target-cluster") -- `get` of a missing header returns no value at all
  if not header then
    return nil
  end
  local candidates = cached[header]
  if not candidates then
    if count == MAX_CACHED then
      cached, count = {}, 0
    end
    candidates = parse(header)
    cached[header], count = candidates, count + 1
  end
  return candidates
end

-- Runs twice: before ext_authz, when the header is not there yet, and again when ext_authz has set it.
function envoy_on_route(handle)
  local candidates = candidates_of(handle)
  if not candidates then
    return NO_CLUSTER
  end
  local best, second
  local least, next_least = math.huge, math.huge
  for i = 1, #candidates do
    local c = candidates[i]
    local cluster = handle:getCluster(c.name)
    if cluster then
      local busy = cluster:numRequests() + cluster:numPendingRequests()
      local load = (busy + 1) / c.weight + random() * 1e-7 + c.standby + (busy >= c.max_requests and FULL or 0)
      if load < least then
        best, second, least, next_least = c.name, best, load, least
      elseif load < next_least then
        second, next_least = c.name, load
      end
    end
  end
  if not best then
    return NO_CLUSTER
  end
  if second then
    for _, ladder in ipairs({ best .. "~" .. second, best .. "~" }) do
      if handle:getCluster(ladder) then
        return ladder
      end
    end
  end
  return best
end

-- Runs after ext_authz.
function envoy_on_request(handle)
  local candidates = candidates_of(handle)
  local n = candidates and #candidates or 0
  if n < 2 then
    return
  end
  local start, rungs = random(n), {}
  for i = 1, n do
    rungs[i] = candidates[(start + i) % n + 1].rung
  end
  handle:streamInfo():dynamicMetadata():set("envoy.lb", "fallback_list", rungs)
end

-- An answer from an expert on standby is a downgrade, and the headers say so. `x-srp-expert` is Envoy's own value here.
function envoy_on_response(handle)
  local decision = handle:streamInfo():dynamicMetadata():get(DECISION)
  if not decision or not decision.standby then
    return
  end
  local headers = handle:headers()
  local expert = headers:get("x-srp-expert")
  if expert and expert ~= decision.candidates then
    headers:replace("x-srp-decision", "downgrade")
    headers:replace("x-srp-reason", "unavailable")
  end
end
