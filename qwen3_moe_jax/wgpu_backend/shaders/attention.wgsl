// Causal grouped-query attention over the cache, flash-style: softmax over TILE positions
// at a time with a running maximum and sum, so that scores never leave the workgroup.
//
// One workgroup a (GROUP query heads of one KV head, TOKENS tokens, span of positions). With one
// span the output is final; with several each leaves its maximum, sum and weighted
// values in `parts`, and merge.wgsl joins them.
{% from "cache.wgsl" import cache_unpack %}
{% include "common.wgsl" %}

{% include "spans.wgsl" %}

//% set H4 = HEAD_DIM // 4
//% set DIMS = (H4 + WG - 1) // WG
//% set SLICES = WG // H4 if WG > H4 else 1
const LOWEST = -3.0e38;

// Loads of several keys or values are written out before their use: they are on their way together.
// Drivers leave loops rolled up, since wgpu bounds the turns of each.
//% set KEYS = 8 if H4 % 8 == 0 else 1
//% set MAXIMA = 8 if WG % 8 == 0 else 1
//% set VALUES = 4
// A query is a head of a token. With several tokens each sees the positions up to its own.
//% set QUERIES = GROUP * TOKENS

// Adds the values of `count` positions, in their order.
//% macro weigh(count)
let at = cached + (tile + i) * {{ H4 }}u + {{ "lane % " ~ H4 ~ "u" if SLICES > 1 else "lane" }};
//% for k in range(count)
//% for g in range(QUERIES)
let e{{g}}_{{k}} = scores[{{ g * TILE }}u + i + {{ k * SLICES }}u];
sum{{g}} += e{{g}}_{{k}};
//% endfor
//% endfor
//% for d in range(DIMS)
//% if (d + 1) * WG > H4 and SLICES == 1
if (lane + {{ d * WG }}u < {{ H4 }}u) {
//% else
{
//% endif
  //% for k in range(count)
  let v{{k}} = {{ cache_unpack("values[at + %du]" % (d * WG + k * SLICES * H4), KV_F16) }};
  //% endfor
  //% for k in range(count)
  //% for g in range(QUERIES)
  acc{{g}}_{{d}} += e{{g}}_{{k}} * v{{k}};
  //% endfor
  //% endfor
}
//% endfor
//% endmacro

var<workgroup> query: array<vec4<f32>, {{ QUERIES * H4 }}>;
var<workgroup> scores: array<f32, {{ QUERIES * TILE }}>;
var<workgroup> lanes: array<f32, {{ QUERIES * WG }}>;
//% if SLICES > 1
var<workgroup> slices: array<vec4<f32>, {{ SLICES * GROUP * H4 }}>;
//% endif

@compute @workgroup_size({{ WG }})
fn main(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32) {
  let head = wg.x * {{ GROUP }}u;
  let kv_head = head / (p.heads / p.kv_heads);
  //% if TOKENS == 1
  let token = wg.y;
  let length = step.position + token + 1u;
  //% else
  let token = wg.y * {{ TOKENS }}u;
  let last = step.tokens - 1u;
  let length = step.position + min(token + {{ TOKENS - 1 }}u, last) + 1u;
  //% endif
  let begin = wg.z * p.span;
  let end = min(length, begin + p.span);
  let cached = kv_head * p.capacity * {{ H4 }}u;
  for (var i = lane; i < {{ GROUP * H4 }}u; i += {{ WG }}u) {
    //% for t in range(TOKENS)
    query[i + {{ t * GROUP * H4 }}u] = roped[({{ "min(token + %du, last)" % t if TOKENS > 1 else "token" }} * (p.heads + p.kv_heads) + head) * {{ H4 }}u + i] * p.scale;
    //% endfor
  }
  //% for g in range(QUERIES)
  var high{{g}} = LOWEST;
  var sum{{g}} = 0.0;
  //% for d in range(DIMS)
  var acc{{g}}_{{d}} = vec4<f32>(0.0);
  //% endfor
  //% endfor
  workgroupBarrier();

  for (var tile = begin; tile < end; tile += {{ TILE }}u) {
    let stop = min(end - tile, {{ TILE }}u);
    //% for g in range(QUERIES)
    var best{{g}} = LOWEST;
    //% endfor
    for (var i = lane; i < stop; i += {{ WG }}u) {
      let at = cached + (tile + i) * {{ H4 }}u;
      //% for g in range(QUERIES)
      var s{{g}} = 0.0;
      //% endfor
      for (var d = 0u; d < {{ H4 }}u; d += {{ KEYS }}u) {
        //% for k in range(KEYS)
        let k{{k}} = {{ cache_unpack("keys[at + d + %du]" % k, KV_F16) }};
        //% endfor
        //% for k in range(KEYS)
        //% for g in range(QUERIES)
        s{{g}} += dot(k{{k}}, query[{{ g * H4 }}u + d + {{k}}u]);
        //% endfor
        //% endfor
      }
      //% for g in range(QUERIES)
      //% if TOKENS > 1
      s{{g}} = select(LOWEST, s{{g}}, tile + i <= step.position + token + {{ g // GROUP }}u);
      //% endif
      scores[{{ g * TILE }}u + i] = s{{g}};
      best{{g}} = max(best{{g}}, s{{g}});
      //% endfor
    }
    //% for g in range(QUERIES)
    lanes[{{ g * WG }}u + lane] = best{{g}};
    //% endfor
    workgroupBarrier();
    //% for g in range(QUERIES)
    let old{{g}} = high{{g}};
    //% endfor
    for (var i = 0u; i < {{ WG }}u; i += {{ MAXIMA }}u) {
      //% for k in range(MAXIMA)
      //% for g in range(QUERIES)
      high{{g}} = max(high{{g}}, lanes[{{ g * WG }}u + i + {{k}}u]);
      //% endfor
      //% endfor
    }
    for (var i = lane; i < stop; i += {{ WG }}u) {
      //% for g in range(QUERIES)
      //% if TOKENS > 1
      scores[{{ g * TILE }}u + i] = select(0.0, exp(scores[{{ g * TILE }}u + i] - high{{g}}), tile + i <= step.position + token + {{ g // GROUP }}u);
      //% else
      scores[{{ g * TILE }}u + i] = exp(scores[{{ g * TILE }}u + i] - high{{g}});
      //% endif
      //% endfor
    }
    //% for g in range(QUERIES)
    let keep{{g}} = exp(old{{g}} - high{{g}});
    sum{{g}} *= keep{{g}};
    //% for d in range(DIMS)
    acc{{g}}_{{d}} *= keep{{g}};
    //% endfor
    //% endfor
    workgroupBarrier();
    let slice = lane / {{ H4 }}u;
    //% if SLICES > 1
    if (slice < {{ SLICES }}u) {
    //% endif
    var i = {{ "slice" if SLICES > 1 else "0u" }};
    for (; i + {{ (VALUES - 1) * SLICES }}u < stop; i += {{ VALUES * SLICES }}u) {
      {{ weigh(VALUES) }}
    }
    for (; i < stop; i += {{ SLICES }}u) {
      {{ weigh(1) }}
    }
    //% if SLICES > 1
    }
    //% endif
    workgroupBarrier();
  }

  //% for t in range(TOKENS)
  //% set queries = range(t * GROUP, (t + 1) * GROUP)
  //% if SLICES > 1
  // Lanes of other slices hold other positions of the same dimensions: lane order joins them.
  {
    let dim = lane % {{ H4 }}u;
    //% if t > 0
    workgroupBarrier();
    //% endif
    if (lane < {{ SLICES * H4 }}u) {
      //% for g in queries
      slices[(lane / {{ H4 }}u * {{ GROUP }}u + {{ g - t * GROUP }}u) * {{ H4 }}u + dim] = acc{{g}}_0;
      lanes[{{ g * WG }}u + lane] = sum{{g}};
      //% endfor
    }
    workgroupBarrier();
    if (lane < {{ H4 }}u) {
      //% for g in queries
      //% for s in range(1, SLICES)
      acc{{g}}_0 += slices[{{ (s * GROUP + g - t * GROUP) * H4 }}u + dim];
      sum{{g}} += lanes[{{ g * WG + s * H4 }}u];
      //% endfor
      //% endfor
    }
  }
  //% endif
  //% if TOKENS > 1
  if (token + {{t}}u <= last) {
  //% else
  {
  //% endif
    //% for g in queries
    {
      let row = (token + {{t}}u) * p.heads + head + {{ g - t * GROUP }}u;
      //% for d in range(DIMS)
      if (lane + {{ d * WG }}u < {{ H4 }}u) {
        if (grid.z == 1u) {
          output[row * {{ H4 }}u + lane + {{ d * WG }}u] = acc{{g}}_{{d}} / sum{{g}};
        } else {
          parts[(row * grid.z + wg.z) * {{ H4 + 1 }}u + lane + {{ d * WG }}u] = acc{{g}}_{{d}};
        }
      }
      //% endfor
      if (grid.z > 1u && lane == 0u) {
        parts[(row * grid.z + wg.z) * {{ H4 + 1 }}u + {{ H4 }}u] = vec4<f32>(high{{g}}, sum{{g}}, 0.0, 0.0);
      }
    }
    //% endfor
  }
  //% endfor
}
