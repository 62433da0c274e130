//% from "formats.wgsl" import units with context
// Rows of the embedding table, dequantized: one workgroup per token.
// A table larger than a binding comes in windows of rows; other windows' tokens are left alone.

{% include "common.wgsl" %}

struct Params {
  row_begin: u32,
  row_end: u32,
  row_blocks: u32,
  row_units: u32,
  x_stride: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> tokens: array<u32>;
@group(0) @binding(3) var<storage, read_write> x: array<vec4<f32>>;
//% if READS_GRIDS
@group(0) @binding(8) var<storage, read> grids: array<u32>;
//% endif

@compute @workgroup_size({{ WG }})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let token = tokens[wg.y];
  if (token < p.row_begin || token >= p.row_end) {
    return;
  }
  let start = (token - p.row_begin) * p.row_blocks;
  for (var u = lane; u < p.row_units; u += {{ WG }}u) {
    //% call(at) units[TYPE]([("table", "0u", "start")])
    x[wg.y * p.x_stride + {{at}}] = w0;
    //% endcall
  }
}
