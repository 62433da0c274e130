// Matrices of a buffer, what products of them are told, and what every product binds. After common.wgsl.

struct Segment {
  kind: u32,
  rows: u32,
  group_begin: u32,   // first workgroup of this matrix
  y_begin: u32,
  base: u32,          // first vec4 of this matrix in the buffer
  row_blocks: u32,
  row_units: u32,
  expert_blocks: u32,
}

struct Params {
  x_stride: u32,      // vec4 per row of x
  y_stride: u32,
  x_head: u32,        // 1: x starts at row step.head_row
  x_div: u32,         // pairs a row of x
  expert_begin: u32,  // experts in this window
  expert_end: u32,
  plane: u32,         // floats between y and, when recording, gate and up
  segments: u32,
  eps: f32,           // of the norm of x
  pad: u32,
  pad0: u32,
  pad1: u32,
  segs: array<Segment, 3>,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<uniform> step: Step;
@group(0) @binding(2) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> x: array<vec4<{{ "u32" if BYTES is defined else "f32" }}>>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
//% if DUAL
@group(0) @binding(7) var<storage, read> w_up: array<vec4<u32>>;
//% endif
//% if READS_GRIDS
@group(0) @binding(8) var<storage, read> grids: array<u32>;
//% endif
