//# What the kernels of tiles share: which rows and tokens a workgroup has, which of them a lane, and what it writes.

//# Lanes in rows, of a workgroup, rows of one matrix, and vectors of activations that a lane puts into workgroup memory.
//% set ROW_LANES = ROWS // LANE_ROWS
//% set WG = ROW_LANES * TOKENS // LANE_TOKENS
//% set HALF = ROWS // 2 if DUAL else ROWS
//% set LOADS = TOKENS * 8 // WG

//# The matrix, its rows and the tokens of this workgroup; ends those that have none.
//% macro place()
  //% if MODE == "dense"
  let first = wg.y * {{ TOKENS }}u;
  let count = min(step.tokens - p.x_head * step.head_row - first, {{ TOKENS }}u);
{% include "segment.wgsl" %}
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

//% endmacro

//# Where the rows of activations begin whose slot of eight this lane loads.
//% macro sources()
  let slot = local & 7u;
  //% for i in range(LOADS)
  let token{{i}} = local / 8u + {{ i * WG // 8 }}u;
  //% if MODE == "dense"
  let from{{i}} = (first + min(token{{i}}, count - 1u) + p.x_head * step.head_row) * p.x_stride;
  //% else
  let from{{i}} = (order[tile.y + min(token{{i}}, count - 1u)] / p.x_div) * p.x_stride;
  //% endif
  //% endfor

//% endmacro

//# The block of this lane, and its sums.
//% macro block_of_lane()
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
//% endmacro

//# Writes the sums.
//% macro results()
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
//% endmacro
