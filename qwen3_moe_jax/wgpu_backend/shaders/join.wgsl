// Joins the parts of attend.wgsl: one workgroup a head.
{% include "common.wgsl" %}

@group(0) @binding(1) var<uniform> step: Step;
@group(0) @binding(2) var<storage, read> parts: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> output: array<vec4<f32>>;

//% set H4 = HEAD_DIM // 4
//% set SLICES = WG // H4

var<workgroup> tails: array<vec4<f32>, {{ MAX_PARTS }}>;
var<workgroup> slices: array<vec4<f32>, {{ WG }}>;

@compute @workgroup_size({{ WG }})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let count = min((step.position + {{ TILE }}u) / {{ TILE }}u, {{ MAX_PARTS }}u);
  let first = wg.x * count * {{ H4 + 1 }}u;
  let dim = lane % {{ H4 }}u;
  for (var i = lane; i < count; i += {{ WG }}u) {
    tails[i] = parts[first + i * {{ H4 + 1 }}u + {{ H4 }}u];
  }
  workgroupBarrier();
  var high = -3.0e38;
  for (var i = 0u; i < count; i++) {
    high = max(high, tails[i].x);
  }
  var acc = vec4<f32>(0.0);
  for (var i = lane / {{ H4 }}u; i < count; i += {{ SLICES }}u) {
    acc += parts[first + i * {{ H4 + 1 }}u + dim] * exp(tails[i].x - high);
  }
  slices[lane] = acc;
  workgroupBarrier();
  if (lane < {{ H4 }}u) {
    var sum = 0.0;
    for (var i = 0u; i < count; i++) {
      sum += tails[i].y * exp(tails[i].x - high);
    }
    for (var i = 1u; i < {{ SLICES }}u; i++) {
      acc += slices[i * {{ H4 }}u + lane];
    }
    output[wg.x * {{ H4 }}u + lane] = acc / sum;
  }
}
