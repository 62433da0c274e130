// Residual and RMSNorm: x += sum_i weight_i * delta_i, then h = x / sqrt(mean(x^2) + eps) * norm.
// One workgroup per token. The deltas are the attention's output (one, weight 1), the
// outputs of the chosen experts (in the order of the choice), or none.

{% include "common.wgsl" %}

struct Params {
  deltas: u32,     // per token
  weighted: u32,   // 0: every weight is 1
  stride: u32,     // D / 4
  eps: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<uniform> step: Step;
@group(0) @binding(2) var<storage, read_write> x: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> delta: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> weights: array<f32>;
@group(0) @binding(5) var<storage, read> norm: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> h: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> sums: array<vec4<f32>>;

var<workgroup> squares: array<f32, {{ WG }}>;

@compute @workgroup_size({{ WG }})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let row = wg.y * p.stride;
  var square = 0.0;
  for (var i = lane; i < p.stride; i += {{ WG }}u) {
    var v = x[row + i];
    if (p.deltas > 0u) {
      var sum = vec4<f32>(0.0);
      for (var s = 0u; s < p.deltas; s++) {
        let pair = wg.y * p.deltas + s;
        sum += delta[pair * p.stride + i] * select(1.0, weights[pair], p.weighted == 1u);
      }
      v += sum;
      x[row + i] = v;
      if (step.record == 1u) {
        sums[row + i] = sum;
      }
    }
    square += dot(v, v);
  }
  squares[lane] = square;
  for (var width = {{ WG }}u / 2u; width > 0u; width >>= 1u) {
    workgroupBarrier();
    if (lane < width) {
      squares[lane] += squares[lane + width];
    }
  }
  workgroupBarrier();
  let root = sqrt(squares[0] / f32(p.stride * 4u) + p.eps);
  for (var i = lane; i < p.stride; i += {{ WG }}u) {
    h[row + i] = x[row + i] / root * norm[i];
  }
}
