// Blocks as a file has them, put in the order in which the device holds them: one word per invocation.

struct Params {
  words: u32,        // of this piece
  first: u32,        // its first word in the target
  group_bytes: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> raw: array<u32>;
@group(0) @binding(2) var<storage, read> order: array<u32>;
@group(0) @binding(3) var<storage, read_write> words: array<u32>;

fn byte_at(place: u32) -> u32 {
  return (raw[place / 4u] >> (8u * (place % 4u))) & 255u;
}

@compute @workgroup_size({{ WG }})
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x >= p.words) {
    return;
  }
  let place = 4u * id.x;
  let within = place % p.group_bytes;
  let group = place - within;
  var word = 0u;
  for (var i = 0u; i < 4u; i++) {
    word |= byte_at(group + order[within + i]) << (8u * i);
  }
  words[p.first + id.x] = word;
}
