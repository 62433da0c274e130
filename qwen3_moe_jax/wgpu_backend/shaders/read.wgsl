// What memory gives a shader: every invocation reads vectors of a buffer, a whole grid apart, and adds them up.

struct Params {
  vectors: u32,   // of the buffer
  stride: u32,    // invocations of the grid
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> data: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> sums: array<u32>;

@compute @workgroup_size({{ WG }})
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  var sum = vec4<u32>(0u);
  for (var i = id.x; i < p.vectors; i += 4u * p.stride) {
    //% for turn in range(4)
    if (i + {{ turn }}u * p.stride < p.vectors) {
      sum += data[i + {{ turn }}u * p.stride];
    }
    //% endfor
  }
  sums[id.x] = sum.x + sum.y + sum.z + sum.w;
}
