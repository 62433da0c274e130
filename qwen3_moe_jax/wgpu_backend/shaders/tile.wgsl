//% from "formats.wgsl" import units with context
//% from "tiles.wgsl" import ROW_LANES, WG, HALF, LOADS, place, sources, block_of_lane, results with context
// Rows of packed weights times many rows of activations, in float32: what matmul.wgsl computes, for long prompts.
//
// A workgroup computes ROWS rows of weights (with DUAL half of them of gate, half of up) times TOKENS activations,
// 32 columns at a time. Its lanes unpack the weights once into workgroup memory, and put the activations beside
// them. Then each lane has a block of LANE_ROWS x LANE_TOKENS sums in registers. A sum runs over all columns in one
// lane, in the order of the steps: it depends on nothing but the type of the weights.
{% include "common.wgsl" %}
{% include "products.wgsl" %}

//% if MODE == "grouped"
@group(0) @binding(5) var<storage, read> tiles: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> order: array<u32>;
//% endif

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
  {{ place() }}
  {{ sources() }}
  {{ block_of_lane() }}
  let steps = {% if TYPES | length == 1 or DUAL %}{{ steps_of(TYPES[0], "seg.row_units") }}{% else %}p.x_stride / 8u{% endif %};
  for (var k = 0u; k < steps; k++) {
    {{ stage() }}
    workgroupBarrier();
    {{ sums() }}
    workgroupBarrier();
  }
  {{ results() }}
}

//% if DUAL
{% include "swiglu.wgsl" %}
//% endif
