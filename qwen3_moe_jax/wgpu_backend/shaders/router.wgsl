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

const SMALLEST_WEIGHT_SUM = 0.00006103515625;  // 2^-14, llama.cpp's clamp

var<workgroup> prob: array<f32, {{ EXPERTS }}>;
var<workgroup> picked: array<u32, {{ EXPERTS }}>;
var<workgroup> of_lane: array<f32, {{ WG }}>;

@compute @workgroup_size({{ WG }})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let first = wg.y * p.experts;
  var high = -3.0e38;
  for (var e = lane; e < p.experts; e += {{ WG }}u) {
    high = max(high, logits[first + e]);
  }
  of_lane[lane] = high;
  workgroupBarrier();
  for (var i = 0u; i < {{ WG }}u; i++) {
    high = max(high, of_lane[i]);
  }
  workgroupBarrier();
  var sum = 0.0;
  for (var e = lane; e < p.experts; e += {{ WG }}u) {
    let value = exp(logits[first + e] - high);
    prob[e] = value;
    sum += value;
  }
  of_lane[lane] = sum;
  workgroupBarrier();
  sum = 0.0;
  for (var i = 0u; i < {{ WG }}u; i++) {
    sum += of_lane[i];
  }
  for (var e = lane; e < p.experts; e += {{ WG }}u) {
    let value = prob[e] / sum;
    prob[e] = value;
    probs[first + e] = value;
  }
  workgroupBarrier();

  // The rank of an expert: how many come before it. No lane waits for another, unlike in a choice one by one.
  // NaN compares false: then ids alone give the order, and the NaN shows in the weights.
  for (var e = lane; e < p.experts; e += {{ WG }}u) {
    let own = prob[e];
    var rank = 0u;
    //% set AT_ONCE = 8 if EXPERTS % 8 == 0 else 1
    for (var other = 0u; other < {{ EXPERTS }}u; other += {{ AT_ONCE }}u) {
      //% for k in range(AT_ONCE)
      let value{{k}} = prob[other + {{k}}u];
      //% endfor
      //% for k in range(AT_ONCE)
      rank += select(0u, 1u, value{{k}} > own || (!(value{{k}} < own) && other + {{k}}u < e));
      //% endfor
    }
    if (rank < p.chosen) {
      picked[rank] = e;
    }
  }
  workgroupBarrier();
  if (step.replay == 1u) {
    for (var choice = lane; choice < p.chosen; choice += {{ WG }}u) {
      picked[choice] = replay[wg.y * p.chosen + choice];
    }
  }
  workgroupBarrier();
  var weight_sum = 0.0;
  for (var choice = 0u; choice < p.chosen; choice++) {
    weight_sum += prob[picked[choice]];
  }
  for (var choice = lane; choice < p.chosen; choice += {{ WG }}u) {
    let id = picked[choice];
    ids[wg.y * p.chosen + choice] = id;
    weights[wg.y * p.chosen + choice] = prob[id] / max(weight_sum, SMALLEST_WEIGHT_SUM);
  }
}
