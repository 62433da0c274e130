// Per-head RMSNorm and RoPE of q and k, and the write of k and v to the cache.
// One workgroup a (head, token). Pairs are (j, j + H/2), NEOX order.
// q and k after their norm go back to qkv, after RoPE to roped [T, N + K, H].
{% from "cache.wgsl" import cache_type, cache_pack %}
{% include "common.wgsl" %}

struct Params {
  heads: u32,
  kv_heads: u32,
  capacity: u32,  // positions of the cache
  eps: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<uniform> step: Step;
@group(0) @binding(2) var<storage, read_write> qkv: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> norms: array<vec4<f32>>;   // q_norm, then k_norm
@group(0) @binding(4) var<storage, read> table: array<vec4<f32>>;   // per position: cos, then sin
@group(0) @binding(5) var<storage, read_write> roped: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> keys: array<{{ cache_type(KV_F16) }}>;
@group(0) @binding(7) var<storage, read_write> values: array<{{ cache_type(KV_F16) }}>;

//% set H4 = HEAD_DIM // 4
//% set H8 = HEAD_DIM // 8
var<workgroup> squares: array<f32, {{ WG }}>;

@compute @workgroup_size({{ WG }})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let head = wg.x;
  let position = step.position + wg.y;
  let source = (wg.y * (p.heads + 2u * p.kv_heads) + head) * {{ H4 }}u;
  if (head >= p.heads + p.kv_heads) {
    let cached = ((head - p.heads - p.kv_heads) * p.capacity + position) * {{ H4 }}u;
    for (var i = lane; i < {{ H4 }}u; i += {{ WG }}u) {
      values[cached + i] = {{ cache_pack("qkv[source + i]", KV_F16) }};
    }
    return;
  }
  var square = 0.0;
  for (var i = lane; i < {{ H4 }}u; i += {{ WG }}u) {
    square += dot(qkv[source + i], qkv[source + i]);
  }
  squares[lane] = square;
  for (var width = {{ WG }}u / 2u; width > 0u; width >>= 1u) {
    workgroupBarrier();
    if (lane < width) {
      squares[lane] += squares[lane + width];
    }
  }
  workgroupBarrier();
  let root = sqrt(squares[0] / {{ HEAD_DIM }}.0 + p.eps);
  let is_key = head >= p.heads;
  let norm = select(0u, {{ H4 }}u, is_key);
  let to = (wg.y * (p.heads + p.kv_heads) + head) * {{ H4 }}u;
  let cached = ((head - p.heads) * p.capacity + position) * {{ H4 }}u;
  for (var i = lane; i < {{ H8 }}u; i += {{ WG }}u) {
    let a = qkv[source + i] / root * norms[norm + i];
    let b = qkv[source + {{ H8 }}u + i] / root * norms[norm + {{ H8 }}u + i];
    let c = table[position * {{ H4 }}u + i];
    let s = table[position * {{ H4 }}u + {{ H8 }}u + i];
    let first = a * c - b * s;
    let second = b * c + a * s;
    qkv[source + i] = a;
    qkv[source + {{ H8 }}u + i] = b;
    roped[to + i] = first;
    roped[to + {{ H8 }}u + i] = second;
    if (is_key) {
      keys[cached + i] = {{ cache_pack("first", KV_F16) }};
      keys[cached + {{ H8 }}u + i] = {{ cache_pack("second", KV_F16) }};
    }
  }
}
