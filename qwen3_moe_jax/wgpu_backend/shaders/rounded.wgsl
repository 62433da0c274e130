// Activations as whole numbers of 16 bits: 32 columns have one scale, their largest magnitude over 32639.
//
// A block of 32 is five vectors: the upper bytes of its numbers, the lower bytes (both signed, a number is 256 upper +
// lower), then the scale and the sums of the rounded first and last 16. Blocks below 1e-30 are zero. A
// block that is not finite has a scale that is none. One lane per block; a workgroup has blocks of one token.
{% include "common.wgsl" %}

struct Params {
  blocks: u32,   // of a token
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<uniform> step: Step;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> y: array<vec4<u32>>;

@compute @workgroup_size({{ WG }})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let within = wg.x * {{ WG }}u + lane;
  if (within >= p.blocks) {
    return;
  }
  let block = wg.y * p.blocks + within;
  //% for i in range(8)
  let x{{i}} = x[block * 8u + {{i}}u];
  let e{{i}} = bitcast<vec4<u32>>(x{{i}}) & vec4<u32>(0x7f800000u);
  //% endfor
  let largest4 = {% for i in range(7) %}max(abs(x{{i}}), {% endfor %}abs(x7){{ ")" * 7 }};
  let largest = max(max(largest4.x, largest4.y), max(largest4.z, largest4.w));
  let exponents = {% for i in range(7) %}max(e{{i}}, {% endfor %}e7{{ ")" * 7 }};
  let is_finite = all(exponents != vec4<u32>(0x7f800000u));
  let is_small = largest < 1e-30;
  let scale = select(largest / 32639.0, 0.0, is_small);
  let factor = select(32639.0 / largest, 0.0, is_small);
  //% for i in range(8)
  let n{{i}} = clamp(vec4<i32>(round(x{{i}} * factor)), vec4<i32>(-32639), vec4<i32>(32639));
  //% endfor
  //% for half in range(2)
  y[block * 5u + {{half}}u] = vec4<u32>({% for i in range(4) %}pack4xI8((n{{ half * 4 + i }} + vec4<i32>(128)) >> vec4<u32>(8u)){{ ", " if i < 3 else "" }}{% endfor %});
  y[block * 5u + {{ 2 + half }}u] = vec4<u32>({% for i in range(4) %}pack4xI8(n{{ half * 4 + i }}){{ ", " if i < 3 else "" }}{% endfor %});
  let sum{{half}} = {% for i in range(4) %}n{{ half * 4 + i }}{{ " + " if i < 3 else "" }}{% endfor %};
  let of{{half}} = scale * f32(sum{{half}}.x + sum{{half}}.y + sum{{half}}.z + sum{{half}}.w);
  //% endfor
  y[block * 5u + 4u] = vec4<u32>(select(0x7fc00000u, bitcast<u32>(scale), is_finite), bitcast<u32>(of0), bitcast<u32>(of1), 0u);
}
