//% from "formats.wgsl" import superblock, OF_SCALES, OF_WORDS, scales_of, bytes_of with context
//% from "tiles.wgsl" import ROW_LANES, WG, HALF, LOADS, place, sources, block_of_lane, results with context
// tile.wgsl for Q4_K, Q5_K and Q6_K by dots of four bytes: weights stay whole numbers, activations are those of
// rounded.wgsl. Sums of 32 columns (16 of Q6_K) are exact; their scales and minimums are float32.
//
// A step is a unit of 64 columns. Two lanes unpack a row, one turn each. A lane asks for its words of the next step before
// the sums of this one.
//% set BYTES = True
{% include "common.wgsl" %}
{% include "products.wgsl" %}

//% if MODE == "grouped"
@group(0) @binding(5) var<storage, read> tiles: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> order: array<u32>;
//% endif

// Four vectors of 16 weights for each row, eight of 16 upper or lower bytes for each token: turned, so that lanes read different
// banks. Beside them what sums are multiplied by: of Q6_K four scales; of others scale and minimum, scale and sum, twice.
var<workgroup> weights: array<vec4<u32>, {{ ROWS * 4 }}>;
var<workgroup> row_scales: array<vec4<f32>, {{ ROWS }}>;
var<workgroup> inputs: array<vec4<u32>, {{ TOKENS * 8 }}>;
var<workgroup> token_scales: array<array<f32, 4>, {{ TOKENS }}>;

//# For each type of a matrix of this kernel: the caller's text where the matrix is of it.
//% macro by_type()
//% for type in ([TYPES[0]] if DUAL else TYPES)
//% if TYPES | length > 1 and not DUAL
if (seg.kind == {{ KINDS[type] }}u)
//% endif
{
  {{ caller(type) }}
}
//% endfor
//% endmacro

//# Asks for this lane's words of step `u`.
//% macro fetch(type, array, base)
{
  {{ superblock(type, "", base, "begin") }}
  //% for index in (OF_SCALES[type].values() | list) + (OF_WORDS[type].values() | list)
  r{{loop.index0}} = {{array}}[{{ index % "" }}];
  //% endfor
}
//% endmacro

//# Asks for all of step `u`.
//% macro get_ahead()
//% if DUAL
if (second) {
  {{ fetch(TYPES[1], "w_up", "0u") }}
} else {
  {{ fetch(TYPES[0], "w", "0u") }}
}
//% endif
//% call(type) by_type()
//% if not DUAL
{{ fetch(type, "w", "seg.base") }}
//% endif
//% if type == "Q6_K"
let block = ((u >> 1u) * 4u + (slot & 3u)) * 5u;
let column = block + (slot >> 2u) * 2u + (u & 1u);
let part = 0u;
//% else
let column = (u * 2u + ((slot >> 1u) & 1u)) * 5u + (slot >> 2u) * 2u + (slot & 1u);
let block = (u * 2u + ((slot >> 1u) & 1u)) * 5u;
let part = slot & 1u;
//% endif
//% for i in range(LOADS)
next{{i}} = x[from{{i}} + column];
if (slot < 4u) {
  let shares = bitcast<vec4<f32>>(x[from{{i}} + block + 4u]);
  next_scale{{i}} = select(shares.x, shares.y + shares.z, part == 1u);
}
//% endfor
//% endcall
//% endmacro

//# Unpacks the words that were asked for, step `u`, into workgroup memory.
//% macro unpack(type)
{
  {{ superblock(type, "", "0u", "begin") }}
  //% for name in (OF_SCALES[type] | list) + (OF_WORDS[type] | list)
  let {{name}} = r{{loop.index0}};
  //% endfor
  {{ scales_of(type, "") }}
  //% for far in (False, True)
  let {{ "far" if far else "near" }} = vec4<u32>({% for c in "xyzw" %}{{ bytes_of(type, "", c, far) }}{{ ", " if c != "w" else "" }}{% endfor %});
  //% endfor
  //% if type == "Q6_K"
  // 32 less, with no borrow between the bytes.
  weights[to + ((2u * half) ^ turned)] = ((near | vec4<u32>(0x80808080u)) - vec4<u32>(0x20202020u)) ^ vec4<u32>(0x80808080u);
  weights[to + ((2u * half + 1u) ^ turned)] = ((far | vec4<u32>(0x80808080u)) - vec4<u32>(0x20202020u)) ^ vec4<u32>(0x80808080u);
  //% else
  weights[to + (half ^ turned)] = near;
  weights[to + ((2u + half) ^ turned)] = far;
  //% endif
  if (half == 0u) {
    row_scales[to / 4u] = scales;
  }
}
//% endmacro

//# Puts all that was asked for into workgroup memory.
//% macro put_ahead()
//% if DUAL
if (second) {
  {{ unpack(TYPES[1]) }}
} else {
  {{ unpack(TYPES[0]) }}
}
//% else
//% call(type) by_type()
{{ unpack(type) }}
//% endcall
//% endif
//% for i in range(LOADS)
inputs[token{{i}} * 8u + (slot ^ ((token{{i}} / {{ LANE_TOKENS }}u) & 7u))] = next{{i}};
if (slot < 4u) {
  token_scales[token{{i}}][slot] = next_scale{{i}};
}
//% endfor
//% endmacro

//# The dot of vectors of 16 bytes, added to `before`.
//% macro dots(before, pairs)
{{ before }}{% for a, b in pairs %}{% for c in "xyzw" %} + dot4I8Packed({{a}}.{{c}}, {{b}}.{{c}}){% endfor %}{% endfor %}
//% endmacro

//# Adds a step in workgroup memory to the sums of this lane.
//% macro sums()
//% call(type) by_type()
//% set vectors = 1 if type == "Q6_K" else 2
for (var g = 0u; g < {{ 4 // vectors }}u; g++) {
  //% for r in range(LANE_ROWS)
  //% for v in range(vectors)
  let w{{r}}_{{v}} = weights[of_row + {{ r * ROW_LANES * 4 }}u + ((g * {{vectors}}u + {{v}}u) ^ row_turned)];
  //% endfor
  //% if vectors == 1
  let scale{{r}} = row_scales[row_lane + {{ r * ROW_LANES }}u][g];
  //% else
  let both{{r}} = row_scales[row_lane + {{ r * ROW_LANES }}u];
  let scale{{r}} = select(both{{r}}.xy, both{{r}}.zw, g == 1u);
  //% endif
  //% endfor
  //% for t in range(LANE_TOKENS)
  {
    //% for v in range(vectors)
    let upper{{v}} = inputs[of_token + {{ t * 8 }}u + ((g * {{vectors}}u + {{v}}u) ^ token_turned)];
    let lower{{v}} = inputs[of_token + {{ t * 8 }}u + ((4u + g * {{vectors}}u + {{v}}u) ^ token_turned)];
    //% endfor
    //% if vectors == 1
    let own = token_scales[token_lane + {{t}}u][g];
    //% else
    let own = token_scales[token_lane + {{t}}u][2u * g];
    let sum = token_scales[token_lane + {{t}}u][2u * g + 1u];
    //% endif
    //% for r in range(LANE_ROWS)
    {
      //% set of_row = [("w%d_0" % r, "upper0"), ("w%d_1" % r, "upper1")][:vectors]
      //% set lower = [("w%d_0" % r, "lower0"), ("w%d_1" % r, "lower1")][:vectors]
      let high = {{ dots("0", of_row) }};
      let sums = {{ dots("(high << 8u)", lower) }};
      //% if vectors == 1
      acc{{r}}_{{t}} = fma(f32(sums) * own, scale{{r}}, acc{{r}}_{{t}});
      //% else
      acc{{r}}_{{t}} = fma(f32(sums) * own, scale{{r}}.x, fma(-scale{{r}}.y, sum, acc{{r}}_{{t}}));
      //% endif
    }
    //% endfor
  }
  //% endfor
}
//% endcall
//% endmacro

@compute @workgroup_size({{ WG }})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  {{ place() }}
  {{ sources() }}
  {{ block_of_lane() }}
  //% if DUAL
  let second = local >= {{ WG // 2 }}u;
  let within = local % {{ HALF }}u;
  let half = (local / {{ HALF }}u) & 1u;
  let begin = select(start + min(row_first + within, last) * seg.row_blocks, up_start + min(row_first + within, last) * p.segs[1].row_blocks, second);
  let to = (within + select(0u, {{ HALF }}u, second)) * 4u;
  //% else
  let within = local % {{ HALF }}u;
  let half = local / {{ HALF }}u;
  let begin = start + min(row_first + within, last) * seg.row_blocks;
  let to = within * 4u;
  //% endif
  let turned = (within >> 1u) & 3u;
  let of_row = row_lane * 4u;
  let row_turned = (row_lane >> 1u) & 3u;
  let of_token = token_lane * 8u;
  let token_turned = (token_lane / {{ LANE_TOKENS }}u) & 7u;
  //% for i in range(5)
  var r{{i}} = vec4<u32>(0u);
  //% endfor
  //% for i in range(LOADS)
  var next{{i}} = vec4<u32>(0u);
  var next_scale{{i}} = 0.0;
  //% endfor
  {
    let u = 0u;
    {{ get_ahead() }}
  }
  for (var u = 0u; u < seg.row_units; u++) {
    {{ put_ahead() }}
    workgroupBarrier();
    {
      let now = u;
      let u = min(now + 1u, seg.row_units - 1u);
      {{ get_ahead() }}
    }
    if (token_lane < count) {
      {{ sums() }}
    }
    workgroupBarrier();
  }
  {{ results() }}
}

//% if DUAL
{% include "swiglu.wgsl" %}
//% endif
