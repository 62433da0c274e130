// Sorts (token, choice) pairs by expert and cuts each expert's pairs into tiles of TOKENS,
// so that a tile reads its expert's weights once. One workgroup; one invocation an expert.
{% include "common.wgsl" %}

struct Params {
  experts: u32,
  chosen: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<uniform> step: Step;
@group(0) @binding(2) var<storage, read> ids: array<u32>;
@group(0) @binding(3) var<storage, read_write> tiles: array<vec4<u32>>;  // [0].x = how many; expert, first, count
@group(0) @binding(4) var<storage, read_write> order: array<u32>;

var<workgroup> counts: array<u32, {{ EXPERTS }}>;
var<workgroup> firsts: array<u32, {{ EXPERTS }}>;
var<workgroup> first_tiles: array<u32, {{ EXPERTS }}>;

@compute @workgroup_size({{ WG }})
fn main(@builtin(local_invocation_index) lane: u32) {
  let pairs = step.tokens * p.chosen;
  for (var e = lane; e < p.experts; e += {{ WG }}u) {
    var count = 0u;
    for (var i = 0u; i < pairs; i++) {
      count += select(0u, 1u, ids[i] == e);
    }
    counts[e] = count;
  }
  workgroupBarrier();
  if (lane == 0u) {
    var first = 0u;
    var tile = 1u;
    for (var e = 0u; e < p.experts; e++) {
      firsts[e] = first;
      first_tiles[e] = tile;
      first += counts[e];
      tile += (counts[e] + {{ TOKENS - 1 }}u) / {{ TOKENS }}u;
    }
    tiles[0].x = tile - 1u;
  }
  workgroupBarrier();
  for (var e = lane; e < p.experts; e += {{ WG }}u) {
    var next = firsts[e];
    for (var i = 0u; i < pairs; i++) {
      if (ids[i] == e) {
        order[next] = i;
        next++;
      }
    }
    var tile = first_tiles[e];
    for (var done = 0u; done < counts[e]; done += {{ TOKENS }}u) {
      tiles[tile] = vec4<u32>(e, firsts[e] + done, min(counts[e] - done, {{ TOKENS }}u), 0u);
      tile++;
    }
  }
}
