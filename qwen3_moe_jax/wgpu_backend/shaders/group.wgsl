// Sorts (token, choice) pairs by expert and cuts each expert's pairs into tiles of TOKENS,
// so that a tile reads its expert's weights once. One workgroup; a counting sort in which
// every invocation has a contiguous share of the pairs, so pairs of an expert keep their order.
{% include "common.wgsl" %}

struct Params {
  chosen: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<uniform> step: Step;
@group(0) @binding(2) var<storage, read> ids: array<u32>;
@group(0) @binding(3) var<storage, read_write> tiles: array<vec4<u32>>;  // [0].x = how many; expert, first, count
@group(0) @binding(4) var<storage, read_write> order: array<u32>;

var<workgroup> counts: array<u32, {{ WG * EXPERTS }}>;  // [invocation, expert], then where its next pair goes
var<workgroup> totals: array<u32, {{ EXPERTS }}>;
var<workgroup> firsts: array<u32, {{ EXPERTS }}>;
var<workgroup> first_tiles: array<u32, {{ EXPERTS }}>;

@compute @workgroup_size({{ WG }})
fn main(@builtin(local_invocation_index) lane: u32) {
  let pairs = step.tokens * p.chosen;
  let share = (pairs + {{ WG - 1 }}u) / {{ WG }}u;
  let begin = lane * share;
  let end = min(begin + share, pairs);
  let own = lane * {{ EXPERTS }}u;
  for (var e = 0u; e < {{ EXPERTS }}u; e++) {
    counts[own + e] = 0u;
  }
  for (var i = begin; i < end; i++) {
    counts[own + ids[i]] += 1u;
  }
  workgroupBarrier();
  for (var e = lane; e < {{ EXPERTS }}u; e += {{ WG }}u) {
    var total = 0u;
    for (var i = 0u; i < {{ WG }}u; i++) {
      total += counts[i * {{ EXPERTS }}u + e];
    }
    totals[e] = total;
  }
  workgroupBarrier();
  if (lane == 0u) {
    var first = 0u;
    var tile = 1u;
    for (var e = 0u; e < {{ EXPERTS }}u; e++) {
      firsts[e] = first;
      first_tiles[e] = tile;
      first += totals[e];
      tile += (totals[e] + {{ TOKENS - 1 }}u) / {{ TOKENS }}u;
    }
    tiles[0].x = tile - 1u;
  }
  workgroupBarrier();
  for (var e = lane; e < {{ EXPERTS }}u; e += {{ WG }}u) {
    var next = firsts[e];
    for (var i = 0u; i < {{ WG }}u; i++) {
      let count = counts[i * {{ EXPERTS }}u + e];
      counts[i * {{ EXPERTS }}u + e] = next;
      next += count;
    }
    var tile = first_tiles[e];
    for (var done = 0u; done < totals[e]; done += {{ TOKENS }}u) {
      tiles[tile] = vec4<u32>(e, firsts[e] + done, min(totals[e] - done, {{ TOKENS }}u), 0u);
      tile++;
    }
  }
  workgroupBarrier();
  for (var i = begin; i < end; i++) {
    let at = own + ids[i];
    order[counts[at]] = i;
    counts[at] += 1u;
  }
}
