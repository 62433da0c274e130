//% from "cache.wgsl" import cache_type, cache_functions
//# What kernels of attention over spans of the cache read and write.
struct Params {
  heads: u32,
  kv_heads: u32,
  capacity: u32,
  span: u32,      // positions a workgroup; a multiple of what it takes at a time
  scale: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<uniform> step: Step;
@group(0) @binding(2) var<storage, read> roped: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> keys: array<{{ cache_type(KV_F16) }}>;
@group(0) @binding(4) var<storage, read> values: array<{{ cache_type(KV_F16) }}>;
@group(0) @binding(5) var<storage, read_write> output: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> parts: array<vec4<f32>>;

{{ cache_functions(KV_F16) }}
