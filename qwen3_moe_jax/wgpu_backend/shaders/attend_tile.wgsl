// Causal grouped-query attention of a long prompt, flash-style: attention.wgsl's results in another order of sums.
//
// A workgroup takes the GROUP query heads of one KV head for TOKENS tokens, QUERIES in all, and SPAN positions at a
// time. Keys and values go through workgroup memory a part at a time, so that neighbouring lanes load neighbouring
// words, and each lane keeps a block of sums: first of 4 queries x 4 positions, then of 4 queries x EACH vectors of
// the head. With several spans of the grid each leaves its maximum, sum and weighted values; merge.wgsl joins them.
{% from "cache.wgsl" import cache_unpack %}
{% include "common.wgsl" %}

{% include "spans.wgsl" %}

//% set H4 = HEAD_DIM // 4
//% set WG = 128
//% set QUERIES = 32
//% set TOKENS = QUERIES // GROUP
//% set SPAN = 64
//% set STRIDE = SPAN // 4 + 1
//% set EACH = H4 // 16
//% set VALUES = 16
const LOWEST = -3.0e38;

// Vectors of a query and of a key are turned by their row, so that lanes of neighbouring rows read different banks;
// rows of scores are a vector longer than they need for the same end.
var<workgroup> query: array<vec4<f32>, {{ QUERIES * H4 }}>;
var<workgroup> cached: array<vec4<f32>, {{ [SPAN * 8, VALUES * H4] | max }}>;
var<workgroup> scores: array<vec4<f32>, {{ QUERIES * STRIDE }}>;
var<workgroup> quarters: array<f32, {{ WG }}>;
var<workgroup> keeps: array<f32, {{ QUERIES }}>;
var<workgroup> highs: array<f32, {{ QUERIES }}>;

@compute @workgroup_size({{ WG }})
fn main(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) local: u32) {
  let head = wg.x * {{ GROUP }}u;
  let kv_head = head / (p.heads / p.kv_heads);
  let token = (grid.y - 1u - wg.y) * {{ TOKENS }}u;  // the longest first
  let last = step.tokens - 1u;
  let length = step.position + min(token + {{ TOKENS - 1 }}u, last) + 1u;
  let begin = wg.z * p.span;
  let end = min(length, begin + p.span);
  let rows = kv_head * p.capacity;
  for (var i = local; i < {{ QUERIES * H4 }}u; i += {{ WG }}u) {
    let q = i / {{ H4 }}u;
    let from_row = min(token + q / {{ GROUP }}u, last) * (p.heads + p.kv_heads) + head + q % {{ GROUP }}u;
    query[i ^ (q & 7u)] = roped[from_row * {{ H4 }}u + i % {{ H4 }}u] * p.scale;
  }

  // Of the scores: queries q_lane, q_lane + 8, ... and positions p_lane, p_lane + 16, ...
  let q_lane = local & 7u;
  let p_lane = local >> 3u;
  // Of the softmax: every fourth position of a query.
  let own = local >> 2u;
  let fourth = local & 3u;
  let newest = step.position + token + own / {{ GROUP }}u;
  var high = LOWEST;
  var sum = 0.0;
  // Of the values: four queries, and vectors d_lane, d_lane + 16, ... of the head.
  let d_lane = local & 15u;
  let first = (local >> 4u) * 4u;
  //% for q in range(4)
  //% for d in range(EACH)
  var acc{{q}}_{{d}} = vec4<f32>(0.0);
  //% endfor
  //% endfor

  for (var tile = begin; tile < end; tile += {{ SPAN }}u) {
    let stop = min(end - tile, {{ SPAN }}u);
    //% for q in range(4)
    //% for k in range(4)
    var s{{q}}_{{k}} = 0.0;
    //% endfor
    //% endfor
    for (var part = 0u; part < {{ H4 }}u; part += 8u) {
      workgroupBarrier();
      //% for i in range(SPAN * 8 // WG)
      {
        let row = p_lane + {{ i * WG // 8 }}u;
        if (row < stop) {
          cached[row * 8u + (q_lane ^ (row & 7u))] = {{ cache_unpack("keys[(rows + tile + row) * %du + part + q_lane]" % H4, KV_F16) }};
        }
      }
      //% endfor
      workgroupBarrier();
      for (var d = 0u; d < 8u; d++) {
        let of_query = q_lane * {{ H4 }}u + part + (d ^ q_lane);
        let of_key = p_lane * 8u + (d ^ (p_lane & 7u));
        //% for q in range(4)
        let q{{q}} = query[of_query + {{ q * 8 * H4 }}u];
        //% endfor
        //% for k in range(4)
        {
          let key = cached[of_key + {{ k * 16 * 8 }}u];
          //% for q in range(4)
          s{{q}}_{{k}} = fma(q{{q}}.w, key.w, fma(q{{q}}.z, key.z, fma(q{{q}}.y, key.y, fma(q{{q}}.x, key.x, s{{q}}_{{k}}))));
          //% endfor
        }
        //% endfor
      }
    }
    //% for q in range(4)
    //% for k in range(4)
    scores[(q_lane + {{ q * 8 }}u) * {{ STRIDE }}u + (p_lane + {{ k * 16 }}u) / 4u][p_lane & 3u] = s{{q}}_{{k}};
    //% endfor
    //% endfor
    workgroupBarrier();

    let visible = min(stop, select(0u, newest - tile + 1u, newest >= tile));
    var best = LOWEST;
    //% for i in range(SPAN // 4)
    let t{{i}} = select(LOWEST, scores[own * {{ STRIDE }}u + {{i}}u][fourth], {{ i * 4 }}u + fourth < visible);
    best = max(best, t{{i}});
    //% endfor
    quarters[local] = best;
    workgroupBarrier();
    let old = high;
    //% for i in range(4)
    high = max(high, quarters[own * 4u + {{i}}u]);
    //% endfor
    let keep = exp(old - high);
    sum *= keep;
    //% for i in range(SPAN // 4)
    {
      let e = select(0.0, exp(t{{i}} - high), {{ i * 4 }}u + fourth < visible);
      scores[own * {{ STRIDE }}u + {{i}}u][fourth] = e;
      sum += e;
    }
    //% endfor
    if (fourth == 0u) {
      keeps[own] = keep;
    }
    workgroupBarrier();

    //% for q in range(4)
    {
      let keep = keeps[first + {{q}}u];
      //% for d in range(EACH)
      acc{{q}}_{{d}} *= keep;
      //% endfor
    }
    //% endfor
    for (var part = 0u; part < stop; part += {{ VALUES }}u) {
      workgroupBarrier();
      for (var i = local; i < {{ VALUES * H4 }}u; i += {{ WG }}u) {
        // Where there is no position a weight is 0, and what it multiplies must be a number.
        let row = min(tile + part + i / {{ H4 }}u, end - 1u);
        cached[i] = {{ cache_unpack("values[(rows + row) * %du + i %% %du]" % (H4, H4), KV_F16) }};
      }
      workgroupBarrier();
      for (var i = 0u; i < {{ VALUES }}u; i += 4u) {
        //% for q in range(4)
        let e{{q}} = scores[(first + {{q}}u) * {{ STRIDE }}u + (part + i) / 4u];
        //% endfor
        //% for c in "xyzw"
        //% set k = loop.index0
        //% for d in range(EACH)
        {
          let v = cached[(i + {{k}}u) * {{ H4 }}u + d_lane + {{ d * 16 }}u];
          //% for q in range(4)
          acc{{q}}_{{d}} = fma(vec4<f32>(e{{q}}.{{c}}), v, acc{{q}}_{{d}});
          //% endfor
        }
        //% endfor
        //% endfor
      }
    }
  }

  quarters[local] = sum;
  if (fourth == 0u) {
    highs[own] = high;
  }
  workgroupBarrier();
  //% for q in range(4)
  {
    let q = first + {{q}}u;
    let of_token = token + q / {{ GROUP }}u;
    if (of_token <= last) {
      let row = of_token * p.heads + head + q % {{ GROUP }}u;
      let total = quarters[q * 4u] + quarters[q * 4u + 1u] + quarters[q * 4u + 2u] + quarters[q * 4u + 3u];
      //% for d in range(EACH)
      if (grid.z == 1u) {
        output[row * {{ H4 }}u + d_lane + {{ d * 16 }}u] = acc{{q}}_{{d}} / total;
      } else {
        parts[(row * grid.z + wg.z) * {{ H4 + 1 }}u + d_lane + {{ d * 16 }}u] = acc{{q}}_{{d}};
      }
      //% endfor
      if (grid.z > 1u && d_lane == 0u) {
        parts[(row * grid.z + wg.z) * {{ H4 + 1 }}u + {{ H4 }}u] = vec4<f32>(highs[q], total, 0.0, 0.0);
      }
    }
  }
  //% endfor
}
