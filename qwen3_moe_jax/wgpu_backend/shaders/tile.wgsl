//% from "formats.wgsl" import units, k_scales with context
// Rows of packed weights times many rows of activations, in float32: what matmul.wgsl computes, for long prompts.
//
// A workgroup computes ROWS rows of weights (with DUAL half of them of gate, half of up) times TOKENS activations,
// 32 columns at a time. Its lanes unpack the weights once into workgroup memory, and put the activations beside
// them. Then each lane has a block of LANE_ROWS x LANE_TOKENS sums in registers. A sum runs over all columns in one
// lane, in the order of the steps: it depends on nothing but the type of the weights. With AHEAD a lane asks for
// its words of the next step, of weights and activations, before the sums of this one, and unpacks them after.
{% include "common.wgsl" %}
{% include "products.wgsl" %}

//% if MODE == "grouped"
@group(0) @binding(5) var<storage, read> tiles: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> order: array<u32>;
//% endif

//% set ROW_LANES = ROWS // LANE_ROWS
//% set WG = ROW_LANES * TOKENS // LANE_TOKENS
//% set HALF = ROWS // 2 if DUAL else ROWS
//% set LOADS = TOKENS * 8 // WG
//% set SPLIT = ["Q4_K", "Q5_K", "Q6_K"]
//% set QUARTERED = ["Q2_K", "Q3_K"]

// Eight vectors of four columns for each row and each token. Those of the weights are turned by their row and those
// of the activations by their lane's block of tokens, so that lanes read different banks.
var<workgroup> weights: array<vec4<f32>, {{ ROWS * 8 }}>;
var<workgroup> inputs: array<vec4<f32>, {{ TOKENS * 8 }}>;

//# Steps of 32 columns in a row.
//% macro steps_of(type, units_per_row)
{%- if UNITS[type] > 32 %}{{ units_per_row }} * {{ UNITS[type] // 32 }}u{% else %}{{ units_per_row }} / {{ 32 // UNITS[type] }}u{% endif -%}
//% endmacro

//# Which vector of a row of x belongs to slot `slot` of step `k`.
//% macro column_of(type)
//%- if type in ("Q4_K", "Q5_K")
(k >> 1u) * 16u + (k & 1u) * 4u + (slot >> 2u) * 8u + (slot & 3u)
//%- elif type == "Q6_K"
(k >> 3u) * 64u + ((k >> 2u) & 1u) * 32u + ((k >> 1u) & 1u) * 4u + (k & 1u) * 16u + (slot >> 2u) * 8u + (slot & 3u)
//%- else
k * 8u + slot
//%- endif
//% endmacro

//# Unpacks step `k` of the rows of one matrix: the ones from `first` to before `end` of the tile.
//% macro unpack(type, array, base, start, blocks, first, end)
//% set parts = 2 if type in QUARTERED or type in SPLIT else [32 // UNITS[type], 1] | max
//% set tasks = (end - first) * parts
// The second of two matrices begins with the lanes that the first leaves idle.
for (var task = {{ "(local + %du) %% %du" % (tasks, WG) if first and tasks < WG else "local" }}; task < {{ tasks }}u; task += {{ WG }}u) {
  let within = task % {{ end - first }}u;
  let begin = {{ start }} + min(row_first + within, last) * {{ blocks }};
  let to = (within + {{ first }}u) * 8u;
  let turned = within & 7u;
  //% if type in SPLIT
  let u = k >> 1u;
  let turn_first = k & 1u;
  let pair = task / {{ end - first }}u;
  //% set turns = ("turn_first", "turn_first + 1u")
  //% elif type in QUARTERED
  let u = (k >> 2u) * 2u + task / {{ end - first }}u;
  let turn_first = k & 3u;
  //% set turns = ("turn_first", "turn_first + 1u")
  //% else
  let u = k * {{ parts }}u + task / {{ end - first }}u;
  //% endif
  //% set ns = namespace(calls=0)
  //% if turns is defined
  //% set options = {"pair": "pair"} if type in SPLIT else {}
  //% call(at) units[type]([(array, base, "begin")], turns, **options)
  {{ put(type, at, ns) }}
  //% endcall
  //% else
  //% call(at) units[type]([(array, base, "begin")])
  {{ put(type, at, ns) }}
  //% endcall
  //% endif
}
//% endmacro

//% macro put(type, at, ns)
//% if type in SPLIT
weights[to + (({{ (ns.calls % 2) * 4 + ns.calls // 2 }}u + pair * 2u) ^ turned)] = w0;
//% else
weights[to + ((({{ at }}) & 7u) ^ turned)] = w0;
//% endif
//% set ns.calls = ns.calls + 1
//% endmacro

//# Puts step `k` into workgroup memory.
//% macro stage()
//% if DUAL
{{ unpack(TYPES[0], "w", "0u", "start", "seg.row_blocks", 0, HALF) }}
{{ unpack(TYPES[1], "w_up", "0u", "up_start", "p.segs[1].row_blocks", HALF, ROWS) }}
//% else
//% for type in TYPES
//% if TYPES | length > 1
if (seg.kind == {{ KINDS[type] }}u)
//% endif
{
  {{ unpack(type, "w", "seg.base", "start", "seg.row_blocks", 0, ROWS) }}
}
//% endfor
//% endif
//% if DUAL or TYPES | length == 1
let column = {{ column_of(TYPES[0]) }};
//% else
var column = k * 8u + slot;
//% for type in TYPES if type in SPLIT
if (seg.kind == {{ KINDS[type] }}u) {
  column = {{ column_of(type) }};
}
//% endfor
//% endif
//% for i in range(LOADS)
if (token{{i}} < count) {
  inputs[token{{i}} * 8u + (slot ^ ((token{{i}} / {{ LANE_TOKENS }}u) & 7u))] = x[from{{i}} + column];
}
//% endfor
//% endmacro

//% if AHEAD
//# Asks for this lane's words of step `k`: those that formats.wgsl reads, apart from their use.
//% macro fetch(type, array, base)
{
  //% if type == "Q4_K"
  let u = k >> 1u;
  let a = {{ base }} + (begin + (u >> 2u)) * 9u;
  r0 = {{ array }}[a];
  r1 = {{ array }}[a + 1u + 2u * (u & 3u) + (k & 1u)];
  //% else
  let u = k >> 1u;
  let s = begin + (u >> 2u);
  let g = {{ base }} + (s >> 3u) * 105u;
  let a = g + 1u + (s & 7u) * 13u;
  let upper = (u >> 1u) & 1u;
  let part = u & 1u;
  r0 = {{ array }}[g];
  r1 = {{ array }}[a + 12u];
  r2 = {{ array }}[a + upper * 4u + part];
  r3 = {{ array }}[a + upper * 4u + 2u + part];
  r4 = {{ array }}[a + 8u + upper * 2u + part];
  //% endif
}
//% endmacro
//# Unpacks them into workgroup memory, two vectors of four weights in each half of a turn.
//% macro unpack_ahead(type)
{
  let u = k >> 1u;
  //% if type == "Q4_K"
  let j = u & 3u;
  let h0 = r0;
  {{ k_scales(0) }}
  let q0 = select(r1.xy, r1.zw, pair == 1u);
  //% for c in "xy"
  weights[to + (({{ loop.index0 }}u + pair * 2u) ^ turned)] = lo_scale0 * vec4<f32>(unpack4xU8(q0.{{c}} & 0x0f0f0f0fu)) - lo_min0;
  weights[to + (({{ loop.index0 + 4 }}u + pair * 2u) ^ turned)] = hi_scale0 * vec4<f32>(unpack4xU8((q0.{{c}} >> 4u) & 0x0f0f0f0fu)) - hi_min0;
  //% endfor
  //% else
  let s = begin + (u >> 2u);
  let upper = (u >> 1u) & 1u;
  let part = u & 1u;
  let d = unpack2x16float(r0[(s & 7u) >> 1u] >> ((s & 1u) * 16u)).x;
  let sc = bitcast<vec4<i32>>(r1);
  let sc_lo = select(sc.x, sc.z, upper == 1u) >> (part * 8u);
  let sc_hi = select(sc.y, sc.w, upper == 1u) >> (part * 8u);
  let high = k & 1u;
  let near = d * f32((select(sc_lo << 24u, sc_hi << 24u, high == 1u)) >> 24u);
  let far = d * f32((select(sc_lo << 8u, sc_hi << 8u, high == 1u)) >> 24u);
  let ln = (select(r2.xy, r2.zw, pair == 1u) >> vec2<u32>(high * 4u)) & vec2<u32>(0x0f0f0f0fu);
  let mn = (select(r3.xy, r3.zw, pair == 1u) >> vec2<u32>(high * 4u)) & vec2<u32>(0x0f0f0f0fu);
  let bn = select(r4.xy, r4.zw, pair == 1u) >> vec2<u32>(high * 4u);
  //% for c in "xy"
  weights[to + (({{ loop.index0 }}u + pair * 2u) ^ turned)] = near * (vec4<f32>(unpack4xU8(ln.{{c}} | ((bn.{{c}} & 0x03030303u) << 4u))) - 32.0);
  weights[to + (({{ loop.index0 + 4 }}u + pair * 2u) ^ turned)] = far * (vec4<f32>(unpack4xU8(mn.{{c}} | ((bn.{{c}} & 0x0c0c0c0cu) << 2u))) - 32.0);
  //% endfor
  //% endif
}
//% endmacro

//# Asks for all of step `k`.
//% macro get_ahead()
//% if DUAL
if (second) {
  {{ fetch(TYPES[1], "w_up", "0u") }}
} else {
  {{ fetch(TYPES[0], "w", "0u") }}
}
let column = {{ column_of(TYPES[0]) }};
//% else
//% for type in TYPES
//% if TYPES | length > 1
if (seg.kind == {{ KINDS[type] }}u)
//% endif
{{ fetch(type, "w", "seg.base") }}
//% endfor
//% if TYPES | length == 1
let column = {{ column_of(TYPES[0]) }};
//% else
var column = k * 8u + slot;
//% for type in TYPES
if (seg.kind == {{ KINDS[type] }}u) {
  column = {{ column_of(type) }};
}
//% endfor
//% endif
//% endif
//% for i in range(LOADS)
next{{i}} = x[from{{i}} + column];
//% endfor
//% endmacro

//# Puts what was asked for, step `k`, into workgroup memory.
//% macro put_ahead()
//% if DUAL
if (second) {
  {{ unpack_ahead(TYPES[1]) }}
} else {
  {{ unpack_ahead(TYPES[0]) }}
}
//% else
//% for type in TYPES
//% if TYPES | length > 1
if (seg.kind == {{ KINDS[type] }}u)
//% endif
{{ unpack_ahead(type) }}
//% endfor
//% endif
//% for i in range(LOADS)
inputs[token{{i}} * 8u + (slot ^ ((token{{i}} / {{ LANE_TOKENS }}u) & 7u))] = next{{i}};
//% endfor
//% endmacro
//% endif

//# Adds a step in workgroup memory to the sums of this lane.
//% macro sums()
if (token_lane < count) {
  for (var s = 0u; s < 8u; s++) {
    let at = row_lane * 8u + (s ^ (row_lane & 7u));
    let of_token = token_lane * 8u + (s ^ ((token_lane / {{ LANE_TOKENS }}u) & 7u));
    //% for r in range(LANE_ROWS)
    let w{{r}} = weights[at + {{ r * ROW_LANES * 8 }}u];
    //% endfor
    //% for t in range(LANE_TOKENS)
    {
      let v = inputs[of_token + {{ t * 8 }}u];
      //% for r in range(LANE_ROWS)
      acc{{r}}_{{t}} = fma(w{{r}}.w, v.w, fma(w{{r}}.z, v.z, fma(w{{r}}.y, v.y, fma(w{{r}}.x, v.x, acc{{r}}_{{t}}))));
      //% endfor
    }
    //% endfor
  }
}
//% endmacro

@compute @workgroup_size({{ WG }})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  //% if MODE == "dense"
  let first = wg.y * {{ TOKENS }}u;
  let count = min(step.tokens - p.x_head * step.head_row - first, {{ TOKENS }}u);
  var seg = p.segs[0];
  if (p.segments > 1u && wg.x >= p.segs[1].group_begin) {
    seg = p.segs[1];
  }
  if (p.segments > 2u && wg.x >= p.segs[2].group_begin) {
    seg = p.segs[2];
  }
  let expert = 0u;
  //% else
  if (wg.y >= tiles[0].x) {
    return;
  }
  let tile = tiles[wg.y + 1u];
  let chosen = tile.x;
  let count = tile.z;
  if (chosen < p.expert_begin || chosen >= p.expert_end) {
    return;
  }
  let expert = chosen - p.expert_begin;
  let seg = p.segs[0];
  //% endif
  let row_first = (wg.x - seg.group_begin) * {{ HALF }}u;
  let last = seg.rows - 1u;
  let start = expert * seg.expert_blocks;
  //% if DUAL
  let up_start = expert * p.segs[1].expert_blocks;
  //% endif

  let slot = local & 7u;
  //% for i in range(LOADS)
  let token{{i}} = local / 8u + {{ i * WG // 8 }}u;
  //% if MODE == "dense"
  let from{{i}} = (first + min(token{{i}}, count - 1u) + p.x_head * step.head_row) * p.x_stride;
  //% else
  let from{{i}} = (order[tile.y + min(token{{i}}, count - 1u)] / p.x_div) * p.x_stride;
  //% endif
  //% endfor

  // A subgroup is 8 x 4 lanes, neighbours of them 2 x 2: their loads of 16 bytes share most words.
  let lane = local & 31u;
  let team = local / 32u;
  let row_lane = (lane & 1u) + ((lane >> 1u) & 6u) + (team % {{ ROW_LANES // 8 }}u) * 8u;
  let token_lane = (((lane >> 1u) & 1u) + ((lane >> 3u) & 2u) + (team / {{ ROW_LANES // 8 }}u) * 4u) * {{ LANE_TOKENS }}u;
  //% for r in range(LANE_ROWS)
  //% for t in range(LANE_TOKENS)
  var acc{{r}}_{{t}} = 0.0;
  //% endfor
  //% endfor

  let steps = {% if TYPES | length == 1 or DUAL %}{{ steps_of(TYPES[0], "seg.row_units") }}{% else %}p.x_stride / 8u{% endif %};
  //% if AHEAD
  //% if DUAL
  let second = local >= {{ WG // 2 }}u;
  let within = local % {{ HALF }}u;
  let pair = (local / {{ HALF }}u) & 1u;
  let begin = select(start + min(row_first + within, last) * seg.row_blocks, up_start + min(row_first + within, last) * p.segs[1].row_blocks, second);
  let to = (within + select(0u, {{ HALF }}u, second)) * 8u;
  //% else
  let within = local % {{ HALF }}u;
  let pair = local / {{ HALF }}u;
  let begin = start + min(row_first + within, last) * seg.row_blocks;
  let to = within * 8u;
  //% endif
  let turned = within & 7u;
  //% for i in range(5)
  var r{{i}} = vec4<u32>(0u);
  //% endfor
  //% for i in range(LOADS)
  var next{{i}} = vec4<f32>(0.0);
  //% endfor
  {
    let k = 0u;
    {{ get_ahead() }}
  }
  for (var k = 0u; k < steps; k++) {
    {{ put_ahead() }}
    workgroupBarrier();
    {
      let now = k;
      let k = min(now + 1u, steps - 1u);
      {{ get_ahead() }}
    }
    {{ sums() }}
    workgroupBarrier();
  }
  //% else
  for (var k = 0u; k < steps; k++) {
    {{ stage() }}
    workgroupBarrier();
    {{ sums() }}
    workgroupBarrier();
  }
  //% endif

  //% for t in range(LANE_TOKENS)
  if (token_lane + {{t}}u < count) {
    //% if MODE == "dense"
    let at = (first + token_lane + {{t}}u) * p.y_stride + seg.y_begin + row_first + row_lane;
    //% else
    let at = order[tile.y + token_lane + {{t}}u] * p.y_stride + seg.y_begin + row_first + row_lane;
    //% endif
    //% for r in range(HALF // ROW_LANES)
    if (row_first + row_lane + {{ r * ROW_LANES }}u <= last) {
      {% if DUAL %}finish(at + {{ r * ROW_LANES }}u, acc{{r}}_{{t}}, acc{{ r + LANE_ROWS // 2 }}_{{t}}){% else %}y[at + {{ r * ROW_LANES }}u] = acc{{r}}_{{t}}{% endif %};
    }
    //% endfor
  }
  //% endfor
}

//% if DUAL
{% include "swiglu.wgsl" %}
//% endif
