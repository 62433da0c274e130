// One token's attention, all of it: head norms and RoPE of q and k, the cache's write, causal attention over the cache.
//
// A workgroup takes the GROUP query heads of one KV head and a part of the positions, TILE at a time: the parts are
// as many as the grid is deep. The workgroup of the newest position writes its key and value. With one part the
// output is final; with several each leaves its maximum, sum and weighted values, and join.wgsl joins them.
//
// Scores: four lanes share a position, each with every fourth vector of the head. Values: H4 lanes share a position.
{% from "cache.wgsl" import cache_type, cache_pack, cache_unpack, cache_functions %}
{% include "common.wgsl" %}

struct Params {
  heads: u32,
  kv_heads: u32,
  capacity: u32,
  eps: f32,
  scale: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<uniform> step: Step;
@group(0) @binding(2) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> norms: array<vec4<f32>>;   // q_norm, then k_norm
@group(0) @binding(4) var<storage, read> table: array<vec4<f32>>;   // per position: cos, then sin
@group(0) @binding(5) var<storage, read_write> roped: array<vec4<f32>>;  // for a trace: after RoPE, then after the norm
@group(0) @binding(6) var<storage, read_write> keys: array<{{ cache_type(KV_F16) }}>;
@group(0) @binding(7) var<storage, read_write> values: array<{{ cache_type(KV_F16) }}>;
@group(0) @binding(9) var<storage, read_write> output: array<vec4<f32>>;
@group(0) @binding(10) var<storage, read_write> parts: array<vec4<f32>>;

{{ cache_functions(KV_F16) }}

//% set H4 = HEAD_DIM // 4
//% set H8 = HEAD_DIM // 8
//% set WG = TILE * 4
//% set SLICES = WG // H4
//% set EACH = TILE // SLICES
//% set TEAMS = WG // TEAM
const LOWEST = -3.0e38;

var<workgroup> query: array<vec4<f32>, {{ GROUP * H4 }}>;
var<workgroup> quarters: array<f32, {{ GROUP * TILE * 4 }}>;  // [head, quarter, position]
var<workgroup> scores: array<f32, {{ GROUP * TILE }}>;
var<workgroup> highs: array<f32, {{ GROUP }}>;
var<workgroup> totals: array<f32, {{ GROUP }}>;
var<workgroup> keeps: array<f32, {{ GROUP }}>;
var<workgroup> slices: array<vec4<f32>, {{ WG }}>;
//% if not SUBGROUPS
var<workgroup> lanes: array<f32, {{ WG }}>;
//% endif

//# The sum or the maximum over a team's lanes, in every one of them.
//% macro of_team(name, kind)
//% if SUBGROUPS
//% for power in range(8) if 2 ** power < TEAM
{
  let other = subgroupShuffleXor({{ name }}, {{ 2 ** power }}u);
  {{ name }} = {{ "max(%s, other)" % name if kind == "max" else "%s + other" % name }};
}
//% endfor
//% else
workgroupBarrier();
lanes[lane] = {{ name }};
workgroupBarrier();
{{ name }} = {{ "LOWEST" if kind == "max" else "0.0" }};
for (var i = 0u; i < {{ TEAM }}u; i++) {
  let other = lanes[team * {{ TEAM }}u + i];
  {{ name }} = {{ "max(%s, other)" % name if kind == "max" else "%s + other" % name }};
}
//% endif
//% endmacro

@compute @workgroup_size({{ WG }})
fn main(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32) {
  let kv_head = wg.x;
  let head = kv_head * {{ GROUP }}u;
  let position = step.position;
  let tiles = (position + {{ TILE }}u) / {{ TILE }}u;
  let each = (tiles + grid.z - 1u) / grid.z;
  let begin = wg.z * each * {{ TILE }}u;
  let end = min(position + 1u, begin + each * {{ TILE }}u);
  let newest = end == position + 1u && begin < end;
  let cached = kv_head * p.capacity * {{ H4 }}u;
  let team = lane / {{ TEAM }}u;
  let member = lane % {{ TEAM }}u;

  // A team for each head, the key last.
  //% set ROUNDS = (GROUP + TEAMS) // TEAMS
  //% set PAIRS = (H8 + TEAM - 1) // TEAM
  for (var round = 0u; round < {{ ROUNDS }}u; round++) {
    let g = round * {{ TEAMS }}u + team;
    let is_key = g >= {{ GROUP }}u;
    let row = select(head + g, p.heads + kv_head, is_key);
    let from_norm = select(0u, {{ H4 }}u, is_key);
    var square = 0.0;
    //% for i in range(PAIRS)
    let d{{i}} = min(member + {{ i * TEAM }}u, {{ H8 - 1 }}u);
    let own{{i}} = member + {{ i * TEAM }}u < {{ H8 }}u;
    let a{{i}} = qkv[row * {{ H4 }}u + d{{i}}];
    let b{{i}} = qkv[row * {{ H4 }}u + {{ H8 }}u + d{{i}}];
    square += select(0.0, dot(a{{i}}, a{{i}}) + dot(b{{i}}, b{{i}}), own{{i}});
    //% endfor
    {{ of_team("square", "sum") }}
    let root = sqrt(square / {{ HEAD_DIM }}.0 + p.eps);
    //% for i in range(PAIRS)
    if (own{{i}} && g <= {{ GROUP }}u) {
      let a = a{{i}} / root * norms[from_norm + d{{i}}];
      let b = b{{i}} / root * norms[from_norm + {{ H8 }}u + d{{i}}];
      let c = table[position * {{ H4 }}u + d{{i}}];
      let s = table[position * {{ H4 }}u + {{ H8 }}u + d{{i}}];
      let first = a * c - b * s;
      let second = b * c + a * s;
      if (!is_key) {
        query[g * {{ H4 }}u + d{{i}}] = first * p.scale;
        query[g * {{ H4 }}u + {{ H8 }}u + d{{i}}] = second * p.scale;
      } else if (newest) {
        let to = cached + position * {{ H4 }}u + d{{i}};
        keys[to] = {{ cache_pack("first", KV_F16) }};
        keys[to + {{ H8 }}u] = {{ cache_pack("second", KV_F16) }};
        let value = (p.heads + p.kv_heads + kv_head) * {{ H4 }}u + d{{i}};
        values[to] = {{ cache_pack("qkv[value]", KV_F16) }};
        values[to + {{ H8 }}u] = {{ cache_pack("qkv[value + %du]" % H8, KV_F16) }};
      }
      if (step.record == 1u && newest) {
        let traced = row * {{ H4 }}u + d{{i}};
        let before = traced + (p.heads + p.kv_heads) * {{ H4 }}u;
        roped[traced] = first;
        roped[traced + {{ H8 }}u] = second;
        roped[before] = a;
        roped[before + {{ H8 }}u] = b;
      }
    }
    //% endfor
  }
  if (lane < {{ GROUP }}u) {
    highs[lane] = LOWEST;
    totals[lane] = 0.0;
  }
  //% for g in range(GROUP)
  var acc{{g}} = vec4<f32>(0.0);
  //% endfor
  storageBarrier();
  workgroupBarrier();

  let quarter = lane % 4u;
  let own = lane / 4u;
  let dim = lane % {{ H4 }}u;
  let slice = lane / {{ H4 }}u;
  for (var tile = begin; tile < end; tile += {{ TILE }}u) {
    let stop = min(end - tile, {{ TILE }}u);
    if (own < stop) {
      let at = cached + (tile + own) * {{ H4 }}u + quarter;
      //% for g in range(GROUP)
      var s{{g}} = 0.0;
      //% endfor
      //% for d in range(H4 // 4)
      let k{{d}} = {{ cache_unpack("keys[at + %du]" % (4 * d), KV_F16) }};
      //% endfor
      //% for d in range(H4 // 4)
      //% for g in range(GROUP)
      s{{g}} += dot(k{{d}}, query[quarter + {{ g * H4 + 4 * d }}u]);
      //% endfor
      //% endfor
      //% for g in range(GROUP)
      quarters[quarter * {{ TILE }}u + own + {{ g * TILE * 4 }}u] = s{{g}};
      //% endfor
    }
    workgroupBarrier();
    for (var round = 0u; round < {{ (GROUP + TEAMS - 1) // TEAMS }}u; round++) {
      let g = min(round * {{ TEAMS }}u + team, {{ GROUP - 1 }}u);
      var high = highs[g];
      //% set OF_LANE = (TILE + TEAM - 1) // TEAM
      //% for i in range(OF_LANE)
      var t{{i}} = LOWEST;
      if (member + {{ i * TEAM }}u < stop) {
        let part = g * {{ TILE * 4 }}u + member + {{ i * TEAM }}u;
        t{{i}} = quarters[part] + quarters[part + {{ TILE }}u] + quarters[part + {{ 2 * TILE }}u] + quarters[part + {{ 3 * TILE }}u];
      }
      high = max(high, t{{i}});
      //% endfor
      {{ of_team("high", "max") }}
      var sum = 0.0;
      //% for i in range(OF_LANE)
      {
        let e = select(0.0, exp(t{{i}} - high), member + {{ i * TEAM }}u < stop);
        sum += e;
        if (member + {{ i * TEAM }}u < {{ TILE }}u) {
          scores[g * {{ TILE }}u + member + {{ i * TEAM }}u] = e;
        }
      }
      //% endfor
      {{ of_team("sum", "sum") }}
      if (member == 0u && round * {{ TEAMS }}u + team < {{ GROUP }}u) {
        let keep = exp(highs[g] - high);
        keeps[g] = keep;
        highs[g] = high;
        totals[g] = totals[g] * keep + sum;
      }
    }
    workgroupBarrier();
    //% for g in range(GROUP)
    acc{{g}} *= keeps[{{g}}];
    //% endfor
    //% for i in range(EACH)
    var v{{i}} = vec4<f32>(0.0);
    if (slice * {{ EACH }}u + {{i}}u < stop) {
      v{{i}} = {{ cache_unpack("values[cached + (tile + slice * %du + %du) * %du + dim]" % (EACH, i, H4), KV_F16) }};
    }
    //% endfor
    //% for i in range(EACH)
    //% for g in range(GROUP)
    acc{{g}} += scores[slice * {{ EACH }}u + {{ g * TILE + i }}u] * v{{i}};
    //% endfor
    //% endfor
    workgroupBarrier();
  }

  //% for g in range(GROUP)
  slices[lane] = acc{{g}};
  workgroupBarrier();
  if (lane < {{ H4 }}u) {
    var sum = vec4<f32>(0.0);
    for (var i = 0u; i < {{ SLICES }}u; i++) {
      sum += slices[i * {{ H4 }}u + lane];
    }
    let row = head + {{g}}u;
    if (grid.z == 1u) {
      output[row * {{ H4 }}u + lane] = sum / totals[{{g}}];
    } else {
      let to = (row * grid.z + wg.z) * {{ H4 + 1 }}u;
      parts[to + lane] = sum;
      if (lane == 0u) {
        parts[to + {{ H4 }}u] = vec4<f32>(highs[{{g}}], totals[{{g}}], 0.0, 0.0);
      }
    }
  }
  workgroupBarrier();
  //% endfor
}
