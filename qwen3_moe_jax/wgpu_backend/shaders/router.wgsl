// Softmax over all experts, the most probable ones (lowest id first among equals), and
// their renormalized weights. One workgroup per token.
{% include "common.wgsl" %}

struct Params {
  experts: u32,
  chosen: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<uniform> step: Step;
@group(0) @binding(2) var<storage, read> logits: array<f32>;
@group(0) @binding(3) var<storage, read_write> probs: array<f32>;
@group(0) @binding(4) var<storage, read_write> ids: array<u32>;
@group(0) @binding(5) var<storage, read_write> weights: array<f32>;
@group(0) @binding(6) var<storage, read> replay: array<u32>;

const NONE = 0xffffffffu;
const SMALLEST_WEIGHT_SUM = 0.00006103515625;  // 2^-14, llama.cpp's clamp

var<workgroup> prob: array<f32, {{ EXPERTS }}>;
var<workgroup> taken: array<u32, {{ EXPERTS }}>;
var<workgroup> best_value: array<f32, {{ WG }}>;
var<workgroup> best_id: array<u32, {{ WG }}>;

@compute @workgroup_size({{ WG }})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let first = wg.y * p.experts;
  var high = -3.0e38;
  for (var e = lane; e < p.experts; e += {{ WG }}u) {
    high = max(high, logits[first + e]);
  }
  best_value[lane] = high;
  workgroupBarrier();
  for (var i = 0u; i < {{ WG }}u; i++) {
    high = max(high, best_value[i]);
  }
  workgroupBarrier();
  var sum = 0.0;
  for (var e = lane; e < p.experts; e += {{ WG }}u) {
    let value = exp(logits[first + e] - high);
    prob[e] = value;
    taken[e] = 0u;
    sum += value;
  }
  best_value[lane] = sum;
  workgroupBarrier();
  sum = 0.0;
  for (var i = 0u; i < {{ WG }}u; i++) {
    sum += best_value[i];
  }
  for (var e = lane; e < p.experts; e += {{ WG }}u) {
    let value = prob[e] / sum;
    prob[e] = value;
    probs[first + e] = value;
  }
  workgroupBarrier();

  var weight_sum = 0.0;
  for (var choice = 0u; choice < p.chosen; choice++) {
    var value = -1.0;
    var id = NONE;
    // NaN compares false: the lowest untaken id then stands in, and the NaN shows in the weights.
    for (var e = lane; e < p.experts; e += {{ WG }}u) {
      if (taken[e] == 0u && (id == NONE || prob[e] > value)) {
        value = prob[e];
        id = e;
      }
    }
    best_value[lane] = value;
    best_id[lane] = id;
    workgroupBarrier();
    value = best_value[0];
    id = best_id[0];
    for (var i = 1u; i < {{ WG }}u; i++) {
      let other = best_id[i];
      if (other != NONE && (id == NONE || best_value[i] > value || (!(best_value[i] < value) && other < id))) {
        value = best_value[i];
        id = other;
      }
    }
    workgroupBarrier();
    if (step.replay == 1u) {
      id = replay[wg.y * p.chosen + choice];
    }
    weight_sum += prob[id];
    if (lane == 0u) {
      taken[id] = 1u;
      ids[wg.y * p.chosen + choice] = id;
    }
    workgroupBarrier();
  }
  if (lane == 0u) {
    for (var choice = 0u; choice < p.chosen; choice++) {
      let pair = wg.y * p.chosen + choice;
      weights[pair] = prob[ids[pair]] / max(weight_sum, SMALLEST_WEIGHT_SUM);
    }
  }
}
