//% from "formats.wgsl" import units with context
// Rows of packed weights times rows of activations, in float32.
//
// MODE "dense":   y[t] = W x[t] for up to three matrices of one buffer (q, k and v).
// MODE "indexed": one row of x a (token, choice) pair: y[pair] = W[ids[pair]] x[pair / x_div].
// MODE "grouped": the same for TOKENS pairs that chose the same expert, by the tiles of group.wgsl.
// DUAL: two weight buffers, gate and up; y = silu(gate x) * (up x).
//
// A workgroup holds WG / LANES groups of LANES invocations. A group computes ROWS rows
// times TOKENS activations: its lanes share the units of a row between them, every
// weight is decoded once for all TOKENS and every activation loaded once for all ROWS.
// The order of a sum depends on LANES alone, so prefill and decode agree bit for bit.

{% include "common.wgsl" %}

{% include "products.wgsl" %}

//% if MODE == "indexed"
@group(0) @binding(5) var<storage, read> ids: array<u32>;
//% elif MODE == "grouped"
@group(0) @binding(5) var<storage, read> tiles: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> order: array<u32>;
//% endif

//% set R = ROWS * (2 if DUAL else 1)
//% set GROUPS = WG // LANES
//% if LANES > 1 and not SUBGROUPS
var<workgroup> partial: array<f32, {{ WG * R * TOKENS }}>;
//% endif

//% macro accumulate_unit(type, rows, first)
//% call(at) units[type](rows)
//% for t in range(TOKENS)
let v{{t}} = x[x{{t}} + {{at}}];
//% for _ in rows
acc{{first + loop.index0}}_{{t}} += dot(w{{loop.index0}}, v{{t}});
//% endfor
//% endfor
//% endcall
//% endmacro

//% macro accumulate(type, rows, first, units_per_row="seg.row_units")
//% if type == "F32" and TOKENS == 1
// A unit is one vector: several are written out, so that their loads are on their way together.
//% set AT_ONCE = 8
{
  var next = lane;
  for (; next + {{ (AT_ONCE - 1) * LANES }}u < {{ units_per_row }}; next += {{ AT_ONCE * LANES }}u) {
    //% for k in range(AT_ONCE)
    {
      let u = next + {{ k * LANES }}u;
      {{ accumulate_unit(type, rows, first) }}
    }
    //% endfor
  }
  for (; next < {{ units_per_row }}; next += {{ LANES }}u) {
    let u = next;
    {{ accumulate_unit(type, rows, first) }}
  }
}
//% else
for (var u = lane; u < {{ units_per_row }}; u += {{ LANES }}u) {
  {{ accumulate_unit(type, rows, first) }}
}
//% endif
//% endmacro

@compute @workgroup_size({{ WG }})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  //% if MODE == "dense"
  //% if TOKENS == 1
  let count = 1u;
  let first = 0u;
  //% else
  let first = wg.y * {{ TOKENS }}u;
  let count = min(step.tokens - p.x_head * step.head_row - first, {{ TOKENS }}u);
  //% endif
  //% for t in range(TOKENS)
  let y{{t}} = first + min({{t}}u, count - 1u);
  let x{{t}} = (y{{t}} + p.x_head * step.head_row) * p.x_stride;
  //% endfor
{% include "segment.wgsl" %}
  let expert = 0u;
  //% else
  //% if MODE == "indexed"
  let count = 1u;
  let y0 = wg.y;
  let chosen = ids[y0];
  //% else
  if (wg.y >= tiles[0].x) {
    return;
  }
  let tile = tiles[wg.y + 1u];
  let chosen = tile.x;
  let count = tile.z;
  //% for t in range(TOKENS)
  let y{{t}} = order[tile.y + min({{t}}u, count - 1u)];
  //% endfor
  //% endif
  if (chosen < p.expert_begin || chosen >= p.expert_end) {
    return;
  }
  let expert = chosen - p.expert_begin;
  //% for t in range(TOKENS)
  let x{{t}} = (y{{t}} / p.x_div) * p.x_stride;
  //% endfor
  let seg = p.segs[0];
  //% endif

  let lane = local % {{ LANES }}u;
  let row = ((wg.x - seg.group_begin) * {{ GROUPS }}u + local / {{ LANES }}u) * {{ ROWS }}u;
  let last = seg.rows - 1u;
  //% for r in range(ROWS)
  let row{{r}} = min(row + {{r}}u, last);
  let start{{r}} = expert * seg.expert_blocks + row{{r}} * seg.row_blocks;
  //% if DUAL
  let up_start{{r}} = expert * p.segs[1].expert_blocks + row{{r}} * p.segs[1].row_blocks;
  //% endif
  //% endfor
  //% for r in range(R)
  //% for t in range(TOKENS)
  var acc{{r}}_{{t}} = 0.0;
  //% endfor
  //% endfor

  //% set ns = namespace(rows=[], up=[])
  //% for r in range(ROWS)
  //% set _ = ns.rows.append(("w", "seg.base", "start%d" % r))
  //% set _ = ns.up.append(("w_up", "0u", "up_start%d" % r))
  //% endfor
  //% if DUAL and TYPES[0] == TYPES[1]
  {{ accumulate(TYPES[0], ns.rows + ns.up, 0) }}
  //% elif DUAL
  {{ accumulate(TYPES[0], ns.rows, 0) }}
  {{ accumulate(TYPES[1], ns.up, ROWS, "p.segs[1].row_units") }}
  //% elif TYPES | length == 1
  {{ accumulate(TYPES[0], ns.rows, 0) }}
  //% else
  //% for type in TYPES
  if (seg.kind == {{ KINDS[type] }}u) {
    {{ accumulate(type, ns.rows, 0) }}
  }
  //% endfor
  //% endif

  //% if LANES == 1
  //% for t in range(TOKENS)
  if ({{t}}u < count) {
    let at = y{{t}} * p.y_stride + seg.y_begin;
    //% for r in range(ROWS)
    if (row + {{r}}u <= last) {
      {% if DUAL %}finish(at + row{{r}}, acc{{r}}_{{t}}, acc{{r + ROWS}}_{{t}}){% else %}y[at + row{{r}}] = acc{{r}}_{{t}}{% endif %};
    }
    //% endfor
  }
  //% endfor
  //% else
  //% if SUBGROUPS
  //% for r in range(R)
  //% for t in range(TOKENS)
  //% for power in range(8) if 2 ** power < LANES
  acc{{r}}_{{t}} += subgroupShuffleXor(acc{{r}}_{{t}}, {{ 2 ** power }}u);
  //% endfor
  //% endfor
  //% endfor
  if (lane == 0u) {
    //% for t in range(TOKENS)
    if ({{t}}u < count) {
      let at = y{{t}} * p.y_stride + seg.y_begin;
      //% for r in range(ROWS)
      if (row + {{r}}u <= last) {
        {% if DUAL %}finish(at + row{{r}}, acc{{r}}_{{t}}, acc{{r + ROWS}}_{{t}}){% else %}y[at + row{{r}}] = acc{{r}}_{{t}}{% endif %};
      }
      //% endfor
    }
    //% endfor
  }
  //% else
  //% for r in range(R)
  //% for t in range(TOKENS)
  partial[{{ (r * TOKENS + t) * WG }}u + local] = acc{{r}}_{{t}};
  //% endfor
  //% endfor
  workgroupBarrier();
  //% for t in range(TOKENS)
  //% for r in range(ROWS)
  if (lane == {{ (t * ROWS + r) % LANES }}u && {{t}}u < count && row + {{r}}u <= last) {
    let at = y{{t}} * p.y_stride + seg.y_begin + row{{r}};
    //% if DUAL
    finish(at, total({{ (r * TOKENS + t) * WG }}u + local - lane), total({{ ((r + ROWS) * TOKENS + t) * WG }}u + local - lane));
    //% else
    y[at] = total({{ (r * TOKENS + t) * WG }}u + local - lane);
    //% endif
  }
  //% endfor
  //% endfor
  //% endif
  //% endif
}

//% if LANES > 1 and not SUBGROUPS
fn total(begin: u32) -> f32 {
  var sum = 0.0;
  for (var i = 0u; i < {{ LANES }}u; i++) {
    sum += partial[begin + i];
  }
  return sum;
}
//% endif

//% if DUAL
{% include "swiglu.wgsl" %}
//% endif
