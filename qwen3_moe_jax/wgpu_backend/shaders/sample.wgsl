// Chooses the next token from one row of logits: one workgroup.
//
// Penalties, then the highest logit (lowest id among equals), or with SAMPLED one of the
// tokens that temperature, top-k, top-p and min-p leave, in the order of sampling.Sampling.
// Tokens are thought of as sorted by (logit, lowest id first); each cut keeps the front of
// that order, and is found by searching the bits of its last key instead of sorting.
// The step then moves on: next position, next token, one more token emitted.
{% include "common.wgsl" %}

struct Choice {
  vocabulary: u32,
  top_k: u32,
  seed: u32,
  temperature: f32,
  top_p: f32,
  min_p: f32,
  repetition_penalty: f32,
  presence_penalty: f32,
}

@group(0) @binding(0) var<uniform> p: Choice;
@group(0) @binding(1) var<storage, read_write> step: Step;
@group(0) @binding(2) var<storage, read_write> logits: array<f32>;
@group(0) @binding(3) var<storage, read_write> seen: array<u32>;     // 1: in prompt or output, 2: in output
@group(0) @binding(4) var<storage, read_write> tokens: array<u32>;   // [0] feeds the next step
@group(0) @binding(5) var<storage, read_write> emitted: array<u32>;

const NONFINITE = 0xffffffffu;
const WG = {{ WG }}u;

var<workgroup> values: array<f32, {{ WG }}>;
var<workgroup> found: array<u32, {{ WG }}>;
var<workgroup> bad: array<u32, {{ WG }}>;
//% if SAMPLED
var<workgroup> sums: array<f32, {{ WG * 7 }}>;
var<workgroup> answer: u32;
var<workgroup> rest: f32;
//% endif

fn penalized(logit: f32, flags: u32) -> f32 {
  var value = logit;
  if ((flags & 1u) == 1u) {
    value = select(value * p.repetition_penalty, value / p.repetition_penalty, value > 0.0);
  }
  if ((flags & 2u) == 2u) {
    value -= p.presence_penalty;
  }
  return value;
}

//% if SAMPLED
// Unsigned integers in the order of the floats.
fn key_of(value: f32) -> u32 {
  let bits = bitcast<u32>(value + 0.0);
  return select(bits | 0x80000000u, ~bits, bits >> 31u == 1u);
}

fn value_of(key: u32) -> f32 {
  return bitcast<f32>(select(~key, key & 0x7fffffffu, key >> 31u == 1u));
}

struct Cut {
  key: u32,  // keep tokens with a higher key,
  id: u32,   // and those with this key up to this id
}

fn kept(cut: Cut, key: u32, token: u32) -> bool {
  return key > cut.key || (key == cut.key && token <= cut.id);
}

fn mass(value: f32, high: f32) -> f32 {
  return exp((value - high) / p.temperature);
}

// Adds up `count` columns of sums, each WG long, in three steps with few barriers.
fn add_up(count: u32, lane: u32) {
  workgroupBarrier();
  var part = 0.0;
  let busy = lane < count * {{ WG // 16 }}u;
  if (busy) {
    for (var i = 0u; i < 16u; i++) {
      part += sums[lane * 16u + i];
    }
  }
  workgroupBarrier();
  if (busy) {
    sums[lane] = part;
  }
  workgroupBarrier();
}

fn column(i: u32) -> f32 {
  var sum = 0.0;
  for (var j = 0u; j < {{ WG // 16 }}u; j++) {
    sum += sums[i * {{ WG // 16 }}u + j];
  }
  return sum;
}

// Cuts after the token with which the sum of what is kept reaches `wanted`: the sum of
// ones (top-k) or of masses (top-p).
fn cut_at(before: Cut, wanted: f32, by_mass: bool, high: f32, lane: u32) -> Cut {
  // The highest key such that tokens at or above it reach `wanted`, three bits per pass.
  var key = 0u;
  for (var turn = 0u; turn < 11u; turn++) {
    let shift = 30u - 3u * turn;
    var local = array<f32, 7>();
    for (var token = lane; token < p.vocabulary; token += WG) {
      let value = logits[token];
      let k = key_of(value);
      if (kept(before, k, token)) {
        let amount = select(1.0, mass(value, high), by_mass);
        let digit = select(0u, min((k >> shift) - (key >> shift), 7u), (k >> shift) >= (key >> shift));
        for (var i = 0u; i < 7u; i++) {
          local[i] += select(0.0, amount, digit > i);
        }
      }
    }
    for (var i = 0u; i < 7u; i++) {
      sums[i * WG + lane] = local[i];
    }
    add_up(7u, lane);
    if (lane == 0u) {
      var digit = 0u;
      let most = select(7u, 3u, turn == 0u);
      for (var i = 0u; i < most; i++) {
        if (column(i) >= wanted) {
          digit = i + 1u;
        }
      }
      answer = key | (digit << shift);
    }
    key = workgroupUniformLoad(&answer);
  }
  // How many of those that tie at this key belong to the front; 0 stands for all.
  var above = 0.0;
  var equal = 0.0;
  for (var token = lane; token < p.vocabulary; token += WG) {
    let value = logits[token];
    let k = key_of(value);
    if (kept(before, k, token)) {
      let amount = select(1.0, mass(value, high), by_mass);
      above += select(0.0, amount, k > key);
      equal += select(0.0, 1.0, k == key);
    }
  }
  sums[lane] = above;
  sums[WG + lane] = equal;
  add_up(2u, lane);
  if (lane == 0u) {
    let needed = max(ceil((wanted - column(0u)) / select(1.0, mass(value_of(key), high), by_mass)), 1.0);
    rest = select(needed, 0.0, needed >= column(1u));
  }
  let ties = workgroupUniformLoad(&rest);
  if (ties == 0.0) {
    return Cut(key, NONFINITE);
  }
  // The last id that belongs: the highest j such that fewer than `ties` of them are below j.
  var id = 0u;
  for (var turn = 0u; turn < 8u; turn++) {
    let shift = 21u - 3u * turn;
    var local = array<f32, 7>();
    for (var token = lane; token < p.vocabulary; token += WG) {
      let k = key_of(logits[token]);
      if (k == key && kept(before, k, token)) {
        for (var i = 0u; i < 7u; i++) {
          local[i] += select(0.0, 1.0, token < (id | ((i + 1u) << shift)));
        }
      }
    }
    workgroupBarrier();
    for (var i = 0u; i < 7u; i++) {
      sums[i * WG + lane] = local[i];
    }
    add_up(7u, lane);
    if (lane == 0u) {
      var digit = 0u;
      for (var i = 0u; i < 7u; i++) {
        if (column(i) < ties) {
          digit = i + 1u;
        }
      }
      answer = id | (digit << shift);
    }
    id = workgroupUniformLoad(&answer);
  }
  return Cut(key, id);
}

// PCG hash of four words (Jarzynski and Olano, "Hash Functions for GPU Rendering", JCGT 2020).
fn random(position: u32) -> f32 {
  var v = vec4<u32>(p.seed, position, 0x9e3779b9u, 0x85ebca6bu) * 1664525u + 1013904223u;
  v += v.yzxy * v.wxyz;
  v ^= v >> vec4<u32>(16u);
  v += v.yzxy * v.wxyz;
  return f32(v.x >> 8u) / 16777216.0;
}

fn draw(high: f32, lane: u32) -> u32 {
  var cut = Cut(0u, NONFINITE);
  if (p.top_k > 0u && p.top_k < p.vocabulary) {
    cut = cut_at(cut, f32(p.top_k), false, high, lane);
  }
  if (p.top_p < 1.0) {
    var total = 0.0;
    for (var token = lane; token < p.vocabulary; token += WG) {
      let value = logits[token];
      total += select(0.0, mass(value, high), kept(cut, key_of(value), token));
    }
    workgroupBarrier();
    sums[lane] = total;
    add_up(1u, lane);
    if (lane == 0u) {
      rest = column(0u);
    }
    let wanted = workgroupUniformLoad(&rest) * p.top_p;
    cut = cut_at(cut, wanted, true, high, lane);
  }
  // A contiguous share of the vocabulary a lane, so that tokens are walked in the order of their ids.
  let share = (p.vocabulary + WG - 1u) / WG;
  let begin = lane * share;
  let end = min(begin + share, p.vocabulary);
  var total = 0.0;
  for (var token = begin; token < end; token++) {
    let value = logits[token];
    let m = mass(value, high);
    total += select(0.0, m, kept(cut, key_of(value), token) && m >= p.min_p);
  }
  workgroupBarrier();
  values[lane] = total;
  workgroupBarrier();
  if (lane == 0u) {
    var all = 0.0;
    for (var i = 0u; i < WG; i++) {
      all += values[i];
    }
    var left = random(step.position + step.tokens) * all;
    var owner = 0u;
    for (var i = 0u; i < WG; i++) {
      if (values[i] > 0.0) {
        owner = i;
        if (left < values[i]) {
          break;
        }
        left -= values[i];
      }
    }
    answer = owner;
    rest = left;
  }
  workgroupBarrier();
  if (lane == answer) {
    var left = rest;
    var token = 0u;
    for (var candidate = begin; candidate < end; candidate++) {
      let value = logits[candidate];
      let m = mass(value, high);
      if (kept(cut, key_of(value), candidate) && m >= p.min_p) {
        token = candidate;
        if (left < m) {
          break;
        }
        left -= m;
      }
    }
    found[0] = token;
  }
  workgroupBarrier();
  return found[0];
}
//% endif

// The next `count` tokens of a lane, in their order; their loads are on their way together.
//% set AT_ONCE = 8
//% macro look_at(count)
//% for k in range(count)
let logit{{k}} = logits[next + {{ k * WG }}u];
let flags{{k}} = seen[next + {{ k * WG }}u];
//% endfor
//% for k in range(count)
// By its bits: a compiler may fold a comparison of NaN with itself.
nonfinite |= select(0u, 1u, (bitcast<u32>(logit{{k}}) & 0x7f800000u) == 0x7f800000u);
let value{{k}} = penalized(logit{{k}}, flags{{k}});
//% if SAMPLED
logits[next + {{ k * WG }}u] = value{{k}};
//% endif
if (value{{k}} > high) {
  high = value{{k}};
  id = next + {{ k * WG }}u;
}
//% endfor
//% endmacro

@compute @workgroup_size({{ WG }})
fn main(@builtin(local_invocation_index) lane: u32) {
  var high = -3.4e38;
  var id = 0u;
  var nonfinite = 0u;
  var next = lane;
  for (; next + {{ (AT_ONCE - 1) * WG }}u < p.vocabulary; next += {{ AT_ONCE * WG }}u) {
    {{ look_at(AT_ONCE) }}
  }
  for (; next < p.vocabulary; next += WG) {
    {{ look_at(1) }}
  }
  values[lane] = high;
  found[lane] = id;
  bad[lane] = nonfinite;
  for (var width = WG / 2u; width > 0u; width >>= 1u) {
    workgroupBarrier();
    if (lane < width) {
      let other = values[lane + width];
      if (other > values[lane] || (other == values[lane] && found[lane + width] < found[lane])) {
        values[lane] = other;
        found[lane] = found[lane + width];
      }
      bad[lane] |= bad[lane + width];
    }
  }
  workgroupBarrier();
  var token = found[0];
  //% if SAMPLED
  high = values[0];
  storageBarrier();
  workgroupBarrier();
  token = draw(high, lane);
  //% endif
  if (lane == 0u) {
    emitted[step.emitted] = select(token, NONFINITE, bad[0] == 1u);
    step.emitted += 1u;
    step.position += step.tokens;
    step.tokens = 1u;
    step.head_row = 0u;
    tokens[0] = token;
    seen[token] |= 3u;
  }
}
