// Joins the spans of attention.wgsl: one workgroup a (head, token).

{% include "common.wgsl" %}

struct Params {
  heads: u32,
  span: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<uniform> step: Step;
@group(0) @binding(2) var<storage, read> parts: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> output: array<vec4<f32>>;

//% set H4 = HEAD_DIM // 4

@compute @workgroup_size({{ WG }})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let row = wg.y * p.heads + wg.x;
  let spans = (step.position + step.tokens + p.span - 1u) / p.span;
  let first = row * spans * {{ H4 + 1 }}u;
  var high = -3.0e38;
  for (var s = 0u; s < spans; s++) {
    high = max(high, parts[first + s * {{ H4 + 1 }}u + {{ H4 }}u].x);
  }
  for (var d = lane; d < {{ H4 }}u; d += {{ WG }}u) {
    var sum = 0.0;
    var acc = vec4<f32>(0.0);
    for (var s = 0u; s < spans; s++) {
      let at = first + s * {{ H4 + 1 }}u;
      let tail = parts[at + {{ H4 }}u];
      let keep = exp(tail.x - high);
      sum += tail.y * keep;
      acc += parts[at + d] * keep;
    }
    output[row * {{ H4 }}u + d] = acc / sum;
  }
}
