//% from "formats.wgsl" import units with context
// Rows of packed weights times the activations of one token, in float32, with what comes before and after joined to it.
//
// MODE "dense":  up to three matrices of one buffer.
// MODE "chosen": W[ids[i]] for the choice i = workgroup's y; DUAL: gate and up, y = silu(gate x) * (up x).
// MODE "summed": y[row] += sum over the choices of weight * W[id] x[choice]; a team of lanes for each choice.
// NORMED: x is the residual stream. Every workgroup takes the RMSNorm itself: the norm's weights go to its input, the
// root to its sums. The first one leaves the normed input in `normed` for a trace, or for KEEPS always.
// ADDED: y[row] += W x, the residual; the sums alone go to `sums` for a trace.
//
// A row's units are shared between LANES invocations, which compute ROWS rows at a time. With STAGED the input lies in
// workgroup memory, its vectors turned by their unit so that lanes of neighbouring units read different banks.
{% include "common.wgsl" %}
{% include "products.wgsl" %}

//% if NORMED
@group(0) @binding(5) var<storage, read> norm: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> normed: array<vec4<f32>>;
//% elif MODE != "dense"
@group(0) @binding(5) var<storage, read> ids: array<u32>;
//% endif
//% if MODE == "summed"
@group(0) @binding(6) var<storage, read> shares: array<f32>;
//% endif
//% if ADDED
@group(0) @binding(7) var<storage, read_write> sums: array<f32>;
//% endif
//% if MODE == "summed"
@group(0) @binding(9) var<storage, read_write> products: array<f32>;
//% endif

//% set R = ROWS * (2 if DUAL else 1)
//% set TEAMS = CHOICES if MODE == "summed" else 1
//% set TEAM = WG // TEAMS
//% set GROUPS = TEAM // LANES
//% if STAGED
var<workgroup> inputs: array<vec4<f32>, {{ TEAMS * VECTORS }}>;
//% endif
//% if NORMED
var<workgroup> squares: array<f32, {{ WG // SUBGROUP if SUBGROUP else WG }}>;
//% endif
//% if LANES > 1 and not SUBGROUP
var<workgroup> partial: array<f32, {{ WG * R }}>;
//% endif
//% if MODE == "summed"
var<workgroup> choices: array<f32, {{ TEAMS * GROUPS * ROWS }}>;
//% endif

//% macro accumulate_unit(type, rows, first)
//% call(at) units[type](rows)
//% if STAGED
let v = inputs[staged + turned({{ at }})];
//% else
let v = x[staged + {{ at }}];
//% endif
//% for _ in rows
acc{{ first + loop.index0 }} += dot(w{{ loop.index0 }}, v);
//% endfor
//% endcall
//% endmacro

//# Units are known here, so that a driver can write out the turns: their loads are on their way together.
//% macro accumulate(type, rows, first)
//% set count = VECTORS * 4 // UNITS[type]
//% set at_once = 8 if type == "F32" and count % (8 * LANES) == 0 else 1
for (var next = lane; next < {{ count }}u; next += {{ at_once * LANES }}u) {
  //% for turn in range(at_once)
  {
    let u = next + {{ turn * LANES }}u;
    {{ accumulate_unit(type, rows, first) }}
  }
  //% endfor
}
//% endmacro

//% if STAGED
fn turned(at: u32) -> u32 {
  return at ^ ((at >> 4u) & 7u);
}
//% endif

@compute @workgroup_size({{ WG }})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  //% if NORMED
  var square = 0.0;
  for (var i = local; i < {{ VECTORS }}u; i += {{ WG }}u) {
    let v = x[i];
    square += dot(v, v);
    inputs[turned(i)] = v * norm[i];
  }
  //% if SUBGROUP
  //% for power in range(8) if 2 ** power < SUBGROUP
  square += subgroupShuffleXor(square, {{ 2 ** power }}u);
  //% endfor
  if (local % {{ SUBGROUP }}u == 0u) {
    squares[local / {{ SUBGROUP }}u] = square;
  }
  //% else
  squares[local] = square;
  //% endif
  workgroupBarrier();
  square = 0.0;
  for (var i = 0u; i < {{ WG // SUBGROUP if SUBGROUP else WG }}u; i++) {
    square += squares[i];
  }
  let root = sqrt(square / {{ VECTORS * 4 }}.0 + p.eps);
  if ({{ "wg.x == 0u" if KEEPS else "wg.x == 0u && step.record == 1u" }}) {
    for (var i = local; i < {{ VECTORS }}u; i += {{ WG }}u) {
      normed[i] = inputs[turned(i)] / root;
    }
  }
  //% elif STAGED
  for (var i = local; i < {{ TEAMS * VECTORS }}u; i += {{ WG }}u) {
    inputs[{{ "i / %du * %du + turned(i %% %du)" % (VECTORS, VECTORS, VECTORS) if TEAMS > 1 else "turned(i)" }}] = x[i];
  }
  workgroupBarrier();
  //% endif

  //% if MODE == "dense"
{% include "segment.wgsl" %}
  let expert = 0u;
  //% else
  //% if MODE == "chosen"
  let choice = wg.y;
  //% else
  let choice = local / {{ TEAM }}u;
  //% endif
  let chosen = ids[choice];
  //% if MODE == "chosen"
  if (chosen < p.expert_begin || chosen >= p.expert_end) {
    return;
  }
  let expert = chosen - p.expert_begin;
  //% else
  let expert = chosen;
  //% endif
  let seg = p.segs[0];
  //% endif
  //% if MODE == "summed"
  let staged = choice * {{ VECTORS }}u;
  //% else
  let staged = 0u;
  //% endif

  let lane = local % {{ LANES }}u;
  let group = local % {{ TEAM }}u / {{ LANES }}u;
  let row = ((wg.x - seg.group_begin) * {{ GROUPS }}u + group) * {{ ROWS }}u;
  let last = seg.rows - 1u;
  //% set ns = namespace(rows=[], up=[])
  //% for r in range(ROWS)
  let row{{r}} = min(row + {{r}}u, last);
  let start{{r}} = expert * seg.expert_blocks + row{{r}} * seg.row_blocks;
  //% if DUAL
  let up_start{{r}} = expert * p.segs[1].expert_blocks + row{{r}} * p.segs[1].row_blocks;
  //% endif
  //% set _ = ns.rows.append(("w", "seg.base", "start%d" % r))
  //% set _ = ns.up.append(("w_up", "0u", "up_start%d" % r))
  //% endfor
  //% for r in range(R)
  var acc{{r}} = 0.0;
  //% endfor

  //% if DUAL and TYPES[0] == TYPES[1]
  {{ accumulate(TYPES[0], ns.rows + ns.up, 0) }}
  //% elif DUAL
  {{ accumulate(TYPES[0], ns.rows, 0) }}
  {{ accumulate(TYPES[1], ns.up, ROWS) }}
  //% elif TYPES | length == 1
  {{ accumulate(TYPES[0], ns.rows, 0) }}
  //% else
  //% for type in TYPES
  if (seg.kind == {{ KINDS[type] }}u) {
    {{ accumulate(type, ns.rows, 0) }}
  }
  //% endfor
  //% endif

  //% if LANES > 1
  //% if SUBGROUP
  //% for r in range(R)
  //% for power in range(8) if 2 ** power < LANES
  acc{{r}} += subgroupShuffleXor(acc{{r}}, {{ 2 ** power }}u);
  //% endfor
  //% endfor
  //% else
  //% for r in range(R)
  partial[{{ r * WG }}u + local] = acc{{r}};
  //% endfor
  workgroupBarrier();
  //% for r in range(R)
  acc{{r}} = total({{ r * WG }}u + local - lane);
  //% endfor
  //% endif
  //% endif

  //% if MODE == "summed"
  if (lane == 0u) {
    //% for r in range(ROWS)
    choices[(choice * {{ GROUPS }}u + group) * {{ ROWS }}u + {{r}}u] = acc{{r}} * shares[choice];
    if (step.record == 1u && row + {{r}}u <= last) {
      products[choice * seg.rows + row + {{r}}u] = acc{{r}};
    }
    //% endfor
  }
  workgroupBarrier();
  let own = wg.x * {{ GROUPS * ROWS }}u + local;
  if (local < {{ GROUPS * ROWS }}u && own <= last) {
    var sum = 0.0;
    for (var i = 0u; i < {{ TEAMS }}u; i++) {
      sum += choices[i * {{ GROUPS * ROWS }}u + local];
    }
    y[own] += sum;
    if (step.record == 1u) {
      sums[own] = sum;
    }
  }
  //% else
  //% for r in range(ROWS)
  if (lane == {{ r % LANES }}u && row + {{r}}u <= last) {
    //% if DUAL
    finish(choice * p.y_stride + row{{r}}, acc{{r}}, acc{{ r + ROWS }});
    //% else
    let at = {{ "choice * p.y_stride + " if MODE == "chosen" else "" }}seg.y_begin + row{{r}};
    let sum = acc{{r}}{{ " / root" if NORMED else "" }};
    //% if ADDED
    y[at] += sum;
    if (step.record == 1u) {
      sums[at] = sum;
    }
    //% else
    y[at] = sum;
    //% endif
    //% endif
  }
  //% endfor
  //% endif
}

//% if LANES > 1 and not SUBGROUP
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
