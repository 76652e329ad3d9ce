-- The idlest permitted expert gets the request.
--
-- ext_authz puts the clusters that may serve a request into one header, the only thing read here:
--
--     x-target-cluster: expert-a;w=2;m=64,expert-b;s
--
-- `w` is the expert's weight (default 1), `m` the requests it may have in flight (default: any number). Of these
-- clusters the one with the smallest (in flight + 1) / weight wins, ties at random. Full clusters come last, and before
-- them those on standby (`s`), which are for when no other can serve. In flight means what all worker threads together
-- have sent there, or hold for want of a connection.
--
-- The answer is a ladder, idlest~second (ext_authz/clusters.py): a dead cluster has nothing in flight, so it is often
-- the idlest, and only Envoy knows that it is dead. Envoy steps over it to the second. For the rest of the candidates
-- envoy_on_request leaves the ladder's last rung a list of all of them, its start turned at random.
--
-- Anything that is not of the form above names nobody: the request fails closed, with 503.

local NOBODY = "none" -- a cluster that does not exist; the policy may not define it
local MAX_CANDIDATES = 64
local MAX_REMEMBERED = 1024 -- parsed headers per worker thread
local FULL = 1e9 -- added to the load of a cluster that can take no more
local STANDBY = 1e7 -- added to the load of a cluster on standby
local DECISION = "envoy.filters.http.ext_authz" -- its dynamic metadata

local random = math.random
local remembered, count = {}, 0

local function candidate(text)
  local name, rest = text:match("^([a-z0-9][a-z0-9-]*)(.*)$")
  if not name then
    return nil
  end
  local weight, most, after
  weight, after = rest:match("^;w=([1-9]%d?%d?%d?)(.*)$")
  rest = after or rest
  most, after = rest:match("^;m=([1-9]%d?%d?%d?%d?%d?%d?)(.*)$")
  rest = after or rest
  if rest ~= "" and rest ~= ";s" then
    return nil
  end
  local aside = rest == ";s" and STANDBY or 0
  most = tonumber(most or FULL)
  return { name = name, weight = tonumber(weight or 1), most = most, aside = aside, rung = { cluster = name } }
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

-- The candidates in the request's header, parsed once per worker thread and text.
local function candidates_of(handle)
  local header = handle:headers():get("x-target-cluster") -- `get` of a missing header returns no value at all
  if not header then
    return nil
  end
  local candidates = remembered[header]
  if not candidates then
    if count == MAX_REMEMBERED then
      remembered, count = {}, 0
    end
    candidates = parse(header)
    remembered[header], count = candidates, count + 1
  end
  return candidates
end

-- Runs twice: before ext_authz, when the header is not there yet, and again when ext_authz has set it.
function envoy_on_route(handle)
  local candidates = candidates_of(handle)
  if not candidates then
    return NOBODY
  end
  local best, second
  local least, next_least = math.huge, math.huge
  for i = 1, #candidates do
    local c = candidates[i]
    local cluster = handle:getCluster(c.name)
    if cluster then
      local busy = cluster:numRequests() + cluster:numPendingRequests()
      local load = (busy + 1) / c.weight + random() * 1e-7 + c.aside + (busy >= c.most and FULL or 0)
      if load < least then
        best, second, least, next_least = c.name, best, load, least
      elseif load < next_least then
        second, next_least = c.name, load
      end
    end
  end
  if not best then
    return NOBODY
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
  local turn, rungs = random(n), {}
  for i = 1, n do
    rungs[i] = candidates[(turn + i) % n + 1].rung
  end
  handle:streamInfo():dynamicMetadata():set("envoy.lb", "fallback_list", rungs)
end

-- An answer of an expert on standby is a downgrade, and the client is told so. `x-srp-expert` is Envoy's own word here.
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
