-- Leases: decisions of ext_authz, repeated for a while without asking it again.
--
-- Runs before ext_authz. Envoy does not load this file: ext_authz sends its text over ADS, with a line before it that
-- sets SRP (ext_authz/wire/lease_filter.py). A new epoch is a new text, and a new text starts with empty tables on
-- every worker thread.
--
-- A lease's key is the exact text of everything that its decision read. A lease is stored when ext_authz grants one, in
-- the dynamic metadata of its answer, and this filter belongs to the epoch that granted it.
--
-- If anything fails here, the request is not marked, and ext_authz decides.

local EPOCH, ENTRIES = SRP.epoch, SRP.entries
local RULES = SRP.rules -- of the gate, in order
local READ = SRP.read -- what decisions read besides the path and the gate's header
local TO_EXPERT = SRP.to_expert -- headers that decisions set for the expert
local TO_CLIENT = SRP.to_client -- headers that report the decision to the client, by the name of the fact
local LOGGED = SRP.logged -- names of the facts in the dynamic metadata, for the access log
local REMOVED = SRP.removed -- the client's headers that are not forwarded to experts

local OWN = "srp.lease" -- `hit` in this namespace switches ext_authz off (envoy.yaml); only this filter writes it
local DECISION = "envoy.filters.http.ext_authz"
local MAX_KEY = 4096 -- bytes
local MAX_LEASE = 8192 -- bytes of a key and everything stored with it
local MAX_PENDING = 1024 -- misses that wait for their answer
local MAX_BODY = 65535 -- bytes; ext_authz, which would refuse a larger body, is not asked
local MAX_HEADERS, MAX_HEADER_BYTES = SRP.max_lines, SRP.max_size -- ext_authz rejects a request with more
local MAX_WAIT = 10 -- milliseconds for the whole body after the headers, far fewer than a new epoch waits

-- Two generations: when the young one is full, the old one is evicted as a whole.
local function new_cache(capacity)
  return { capacity = capacity, young = {}, old = {}, young_count = 0, old_count = 0 }
end

-- Stores a value; returns how many others were evicted for it.
local function put(cache, key, value)
  local evicted = 0
  if cache.young[key] == nil then
    if cache.young_count == cache.capacity then
      evicted = cache.old_count
      cache.old, cache.old_count = cache.young, cache.young_count
      cache.young, cache.young_count = {}, 0
    end
    cache.young_count = cache.young_count + 1
  end
  cache.young[key] = value
  return evicted
end

local leases = new_cache(ENTRIES)
local pending, serial = new_cache(MAX_PENDING), 0

local function count(handle, name, n)
  if n > 0 then
    handle:stats():counter(name):add(n)
  end
end

local function rule_of(path)
  for i = 1, #RULES do
    local rule = RULES[i]
    if rule.exact then
      if path == rule.match then
        return rule
      end
    elseif path:sub(1, #rule.match) == rule.match then
      return rule
    end
  end
end

-- A header's part of the key, with its length so that no value can pass for two; nil if it appears more than once.
local function key_part(headers, name)
  local n = headers:getNumValues(name)
  if n == 0 then
    return "-"
  end
  if n == 1 then
    local value = headers:get(name)
    return #value .. ":" .. value
  end
end

-- Everything that the decision on this request reads; nil if that is more than a key may hold.
local function key_of(headers)
  local path = headers:get(":path") -- `get` of a missing header returns no value at all
  path = path and path:match("^[^?]*")
  local rule = path and rule_of(path)
  if not rule or not rule.leasable then
    return nil
  end
  local parts = { #path .. ":" .. path }
  for i = 1, #READ do
    parts[i + 1] = key_part(headers, READ[i])
    if not parts[i + 1] then
      return nil
    end
  end
  if rule.header then
    local names = key_part(headers, rule.header)
    if not names then
      return nil
    end
    parts[#READ + 2] = names
  end
  local key = table.concat(parts, " ")
  if #key <= MAX_KEY then
    return key
  end
end

local function valid(lease, now)
  return lease.since <= now and now < lease.expires -- a clock that was set back also ends it
end

local function find(handle, key)
  local now = handle:timestamp() -- milliseconds since the epoch
  local lease = leases.young[key]
  if lease then
    return valid(lease, now) and lease or nil
  end
  lease = leases.old[key]
  if not lease then
    return nil
  end
  leases.old[key], leases.old_count = nil, leases.old_count - 1
  if valid(lease, now) then
    count(handle, "evictions", put(leases, key, lease))
    return lease
  end
end

-- Whether the headers have room for those of a decision. If not, Envoy rejects what ext_authz has decided.
local function has_room(headers)
  local n, bytes = 0, 0
  for name, value in pairs(headers) do
    n, bytes = n + 1, bytes + #name + #value
  end
  return n <= MAX_HEADERS and bytes <= MAX_HEADER_BYTES
end

-- Whether the request is complete within MAX_WAIT, the lease is still valid, and ext_authz, which also waits for the
-- whole body, would accept it. A slow sender must not keep an expert busy, or a lease alive beyond its epoch.
local function complete(handle, lease)
  local started = handle:timestamp()
  local body = handle:body() -- returns at once, without a value, if there is none
  local now = handle:timestamp()
  return (not body or body:length() <= MAX_BODY) and started <= now and now <= started + MAX_WAIT and valid(lease, now)
end

local function repeat_decision(handle, lease)
  local headers = handle:headers() -- headers from before a wait are no longer valid
  for i = 1, #TO_EXPERT do
    local value = lease.headers[TO_EXPERT[i]]
    if value then
      headers:replace(TO_EXPERT[i], value)
    else
      headers:remove(TO_EXPERT[i])
    end
  end
  handle:clearRouteCache()
  local metadata = handle:streamInfo():dynamicMetadata()
  for i = 1, #LOGGED do
    metadata:set(DECISION, LOGGED[i], lease.decision[LOGGED[i]])
  end
  metadata:set(DECISION, "leased", true)
  for i = 1, #REMOVED do
    headers:remove(REMOVED[i])
  end
  metadata:set(OWN, "hit", true)
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local key = key_of(headers)
  if not key then
    return
  end
  local lease = find(handle, key)
  if lease then
    if has_room(headers) and complete(handle, lease) then
      repeat_decision(handle, lease)
      count(handle, "hits", 1)
    end
    return
  end
  serial = serial + 1
  put(pending, serial, key)
  handle:streamInfo():dynamicMetadata():set(OWN, "asked", serial)
  count(handle, "misses", 1)
end

local function store(handle, key, decision)
  local grant = decision.lease
  local now = handle:timestamp()
  local expires = tonumber(grant.expires)
  if grant.epoch ~= EPOCH or not expires or now >= expires then
    return
  end
  if decision.decision ~= "allow" and decision.decision ~= "downgrade" then
    return
  end
  local lease, bytes = { since = now, expires = expires, headers = {}, decision = {} }, #key
  for i = 1, #TO_EXPERT do
    local value = grant.headers[TO_EXPERT[i]]
    lease.headers[TO_EXPERT[i]], bytes = value, bytes + #(value or "")
  end
  for i = 1, #LOGGED do
    local value = decision[LOGGED[i]]
    lease.decision[LOGGED[i]], bytes = value, bytes + #value
  end
  if bytes > MAX_LEASE then
    return
  end
  count(handle, "evictions", put(leases, key, lease))
  count(handle, "stores", 1)
end

function envoy_on_response(handle)
  local metadata = handle:streamInfo():dynamicMetadata()
  local own = metadata:get(OWN)
  if not own then
    return
  end
  local decision = metadata:get(DECISION)
  local headers = handle:headers()
  if own.hit then
    for i = 1, #TO_CLIENT do
      local value = decision[TO_CLIENT[i].name]
      if value ~= "" then
        headers:replace(TO_CLIENT[i].header, value)
      end
    end
    return
  end
  local key = pending.young[own.asked] or pending.old[own.asked]
  pending.young[own.asked], pending.old[own.asked] = nil, nil
  -- The response has the decision's id unless Envoy rejected the decision.
  if key and decision and decision.lease and headers:get("x-srp-decision-id") == decision.decision_id then
    store(handle, key, decision)
  end
end
