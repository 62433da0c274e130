//# How one unit of weights of each type is read; layout.py writes these words.
//#
//# A unit is what one invocation decodes between two loop steps: 64 weights of a
//# K-quant, 32 of IQ1 to IQ4, of ternary types and of those of 32-weight blocks but 16 of Q8_0, 8 of F16 and
//# BF16, 4 of F32. A macro unrolls the reading
//# of unit `u` for several rows at once and hands its caller, four weights at a
//# time, `w0`, `w1`, ... (one vec4 per row) with the index of the matching vec4 of x.
//# `rows` is a list of (storage array, first vec4, first superblock or block of the row). `turns` of the K-quants:
//# from which to before which turn of the loop, each of them 32 weights (16 of Q2_K and Q3_K). `pair` of the K-quants
//# of four bits and more: which two of a turn's four words, 0u or 1u; all of them where it is empty.
//#
//# Bit layouts: ggml-common.h and ggml-quants.c (dequantize_row_*) of llama.cpp at
//# commit 0c1e57098. Six-bit scales are decoded four at a time inside a word.

//% from "blocks.wgsl" import place, half_of
//% from "grids.wgsl" import units as more_units with context

//# The words of a turn that are wanted.
//% macro words(all, pair)
{% if pair %}select({{ all }}.xy, {{ all }}.zw, {{ pair }} == 1u){% else %}{{ all }}{% endif %}
//% endmacro

//# Q4_K, Q5_K and Q6_K. A superblock has four units of 64 weights, and a unit two turns (`half`). In a turn four words give
//# 16 weights, and 16 others 32 columns on (four vectors of x are between them): the near and the far ones.
//# Eight superblocks of Q6_K share one vec4 of eight superblock scales, so that nothing is padded.

//# Where the superblock of unit `u` begins.
//% macro superblock(type, r, base, start)
//% if type == "Q6_K"
let s{{r}} = {{start}} + (u >> 2u);
let g{{r}} = {{base}} + (s{{r}} >> 3u) * 105u;
let a{{r}} = g{{r}} + 1u + (s{{r}} & 7u) * 13u;
//% else
let a{{r}} = {{base}} + ({{start}} + (u >> 2u)) * {{ 9 if type == "Q4_K" else 11 }}u;
//% endif
//% endmacro

//# The vectors that a turn reads, by name: scales first, then words.
//% set OF_SCALES = {"Q4_K": {"h": "a%s"}, "Q5_K": {"h": "a%s"}, "Q6_K": {"d": "g%s", "c": "a%s + 12u"}}
//% set OF_WORDS = {
  "Q4_K": {"q": "a%s + 1u + 2u * (u & 3u) + half"},
  "Q5_K": {"q": "a%s + 3u + 2u * (u & 3u) + half", "b": "a%s + 1u + half"},
  "Q6_K": {"q": "a%s + ((u >> 1u) & 1u) * 4u + (u & 1u)", "m": "a%s + ((u >> 1u) & 1u) * 4u + 2u + (u & 1u)", "b": "a%s + 8u + ((u >> 1u) & 1u) * 2u + (u & 1u)"},
}

//# From the vectors of scales: of the near and the far weights, and their minimums; for Q6_K of both turns.
//% macro scales_of(type, r)
//% if type == "Q6_K"
let both{{r}} = select(bitcast<vec4<i32>>(c{{r}}).xy, bitcast<vec4<i32>>(c{{r}}).zw, ((u >> 1u) & 1u) == 1u) >> vec2<u32>((u & 1u) * 8u);
let scales{{r}} = unpack2x16float(d{{r}}[(s{{r}} & 7u) >> 1u] >> ((s{{r}} & 1u) * 16u)).x * vec4<f32>(
    f32((both{{r}}.x << 24u) >> 24u), f32((both{{r}}.x << 8u) >> 24u),
    f32((both{{r}}.y << 24u) >> 24u), f32((both{{r}}.y << 8u) >> 24u));
//% else
let upper{{r}} = (u & 2u) == 2u;
let sc{{r}} = select(h{{r}}.y & 0x3f3f3f3fu, (h{{r}}.w & 0x0f0f0f0fu) | ((h{{r}}.y >> 2u) & 0x30303030u), upper{{r}}) >> ((u & 1u) * 16u);
let mn{{r}} = select(h{{r}}.z & 0x3f3f3f3fu, ((h{{r}}.w >> 4u) & 0x0f0f0f0fu) | ((h{{r}}.z >> 2u) & 0x30303030u), upper{{r}}) >> ((u & 1u) * 16u);
let d{{r}} = unpack2x16float(h{{r}}.x);
let scales{{r}} = vec4<f32>(d{{r}}.x * f32(sc{{r}} & 0xffu), d{{r}}.y * f32(mn{{r}} & 0xffu), d{{r}}.x * f32((sc{{r}} >> 8u) & 0xffu), d{{r}}.y * f32((mn{{r}} >> 8u) & 0xffu));
//% endif
//% endmacro

//# Component `c` of a turn's words as four whole numbers of 8 bits; those of Q6_K are 32 too large.
//% macro bytes_of(type, r, c, far)
//% if type == "Q4_K"
{{ "((q%s.%s >> 4u) & 0x0f0f0f0fu)" % (r, c) if far else "(q%s.%s & 0x0f0f0f0fu)" % (r, c) }}
//%- elif type == "Q5_K"
{{ "(((q%s.%s >> 4u) & 0x0f0f0f0fu) | (((b%s.%s >> (2u * (u & 3u))) & 0x02020202u) << 3u))" % (r, c, r, c) if far else "((q%s.%s & 0x0f0f0f0fu) | (((b%s.%s >> (2u * (u & 3u))) & 0x01010101u) << 4u))" % (r, c, r, c) }}
//%- else
{{ "(((m%s.%s >> (half * 4u)) & 0x0f0f0f0fu) | (((b%s.%s >> (half * 4u)) & 0x0c0c0c0cu) << 2u))" % (r, c, r, c) if far else "(((q%s.%s >> (half * 4u)) & 0x0f0f0f0fu) | (((b%s.%s >> (half * 4u)) & 0x03030303u) << 4u))" % (r, c, r, c) }}
//%- endif
//% endmacro

//% macro weights_of(type, r, c, far)
//% if type == "Q6_K"
{{ "far" if far else "near" }}{{r}} * (vec4<f32>(unpack4xU8({{ bytes_of(type, r, c, far) }})) - 32.0)
//%- else
scales{{r}}.{{ "z" if far else "x" }} * vec4<f32>(unpack4xU8({{ bytes_of(type, r, c, far) }})) - scales{{r}}.{{ "w" if far else "y" }}
//%- endif
//% endmacro

//% macro unit_of_superblock(emit, type, rows, turns, pair)
//% for w, base, start in rows
//% set r = loop.index0
{{ superblock(type, r, base, start) }}
//% for name, index in OF_SCALES[type].items()
let {{name}}{{r}} = {{w}}[{{ index % r }}];
//% endfor
{{ scales_of(type, r) }}
//% endfor
for (var half = {{ turns[0] }}; half < {{ turns[1] }}; half++) {
  //% for w, base, start in rows
  //% set r = loop.index0
  //% for name, index in OF_WORDS[type].items()
  let all_{{name}}{{r}} = {{w}}[{{ index % r }}];
  let {{name}}{{r}} = {{ words("all_%s%d" % (name, r), pair) }};
  //% endfor
  //% if type == "Q6_K"
  let near{{r}} = select(scales{{r}}.x, scales{{r}}.z, half == 1u);
  let far{{r}} = select(scales{{r}}.y, scales{{r}}.w, half == 1u);
  //% endif
  //% endfor
  let at = {{ "(u >> 1u) * 32u + (u & 1u) * 4u + half * 16u" if type == "Q6_K" else "u * 16u + half * 4u" }}{% if pair %} + {{ pair }} * 2u{% endif %};
  //% for c in ("xy" if pair else "xyzw")
  //% set i = loop.index0
  //% for far in (False, True)
  {
    //% for _ in rows
    let w{{loop.index0}} = {{ weights_of(type, loop.index0, c, far) }};
    //% endfor
    {{ emit("at + %du" % (i + (8 if far else 0))) }}
  }
  //% endfor
  //% endfor
}
//% endmacro

//% macro unit_Q4_K(rows, turns=("0u", "2u"), pair="")
{{ unit_of_superblock(caller, "Q4_K", rows, turns, pair) }}
//% endmacro

//% macro unit_Q5_K(rows, turns=("0u", "2u"), pair="")
{{ unit_of_superblock(caller, "Q5_K", rows, turns, pair) }}
//% endmacro

//% macro unit_Q6_K(rows, turns=("0u", "2u"), pair="")
{{ unit_of_superblock(caller, "Q6_K", rows, turns, pair) }}
//% endmacro

//# Eight blocks share one vec4 of eight scales.
//% macro unit_Q8_0(rows)
//% for w, base, start in rows
//% set r = loop.index0
let s{{r}} = {{start}} + (u >> 1u);
let g{{r}} = {{base}} + (s{{r}} >> 3u) * 17u;
let d{{r}} = unpack2x16float({{w}}[g{{r}}][(s{{r}} & 7u) >> 1u] >> ((s{{r}} & 1u) * 16u)).x;
let q{{r}} = {{w}}[g{{r}} + 1u + (s{{r}} & 7u) * 2u + (u & 1u)];
//% endfor
//% for c in "xyzw"
{
  //% for _ in rows
  let w{{loop.index0}} = d{{loop.index0}} * vec4<f32>(unpack4xI8(q{{loop.index0}}.{{c}}));
  //% endfor
  {{ caller("u * 4u + %du" % loop.index0) }}
}
//% endfor
//% endmacro

//% macro unit_F16(rows)
//% for w, base, start in rows
let q{{loop.index0}} = {{w}}[{{base}} + {{start}} + u];
//% endfor
//% for first, second in ("xy", "zw")
{
  //% for _ in rows
  let w{{loop.index0}} = vec4<f32>(unpack2x16float(q{{loop.index0}}.{{first}}), unpack2x16float(q{{loop.index0}}.{{second}}));
  //% endfor
  {{ caller("u * 2u + %du" % loop.index0) }}
}
//% endfor
//% endmacro

//% macro unit_BF16(rows)
//% for w, base, start in rows
let q{{loop.index0}} = {{w}}[{{base}} + {{start}} + u];
//% endfor
//% for first, second in ("xy", "zw")
{
  //% for _ in rows
  let w{{loop.index0}} = bitcast<vec4<f32>>(vec4<u32>(q{{loop.index0}}.{{first}} << 16u, q{{loop.index0}}.{{first}} & 0xffff0000u, q{{loop.index0}}.{{second}} << 16u, q{{loop.index0}}.{{second}} & 0xffff0000u));
  //% endfor
  {{ caller("u * 2u + %du" % loop.index0) }}
}
//% endfor
//% endmacro

//% macro unit_F32(rows)
//% for w, base, start in rows
let w{{loop.index0}} = bitcast<vec4<f32>>({{w}}[{{base}} + {{start}} + u]);
//% endfor
{{ caller("u") }}
//% endmacro

//# Four values of IQ4 out of the four nibbles of a word's bytes: the table is four words.
//% macro iq4(r, scale, nibbles)
let n{{r}} = unpack4xU8({{nibbles}});
let odd{{r}} = (n{{r}} & vec4<u32>(4u)) != vec4<u32>(0u);
let t{{r}} = select(select(vec4<u32>({{IQ4[0]}}), vec4<u32>({{IQ4[1]}}), odd{{r}}), select(vec4<u32>({{IQ4[2]}}), vec4<u32>({{IQ4[3]}}), odd{{r}}), n{{r}} > vec4<u32>(7u));
let w{{r}} = {{scale}} * vec4<f32>(bitcast<vec4<i32>>(t{{r}} << (vec4<u32>(24u) - 8u * (n{{r}} & vec4<u32>(3u)))) >> vec4<u32>(24u));
//% endmacro

//# Blocks of 32 weights: low nibbles are the first 16, high ones the others. Four bits times
//# 0x204081 are one bit in each byte.
//% macro unit_of_32(emit, rows, group, q, center=0, m=0, qh=0, curve=False)
//% for w, base, start in rows
//% set r = loop.index0
{{ place(r, base, start, "u", group) }}
let d{{r}} = {{ half_of(r, w, 0) }};
//% if m
let m{{r}} = {{ half_of(r, w, m) }};
//% endif
//% if qh
let b{{r}} = {{w}}[g{{r}} + {{qh}}u + (k{{r}} >> 2u)][k{{r}} & 3u];
//% endif
let q{{r}} = {{w}}[g{{r}} + {{q}}u + k{{r}}];
//% endfor
for (var high = 0u; high < 2u; high++) {
  //% for _ in rows
  let l{{loop.index0}} = (q{{loop.index0}} >> vec4<u32>(high * 4u)) & vec4<u32>(0x0f0f0f0fu);
  //% if qh
  let f{{loop.index0}} = b{{loop.index0}} >> (high * 16u);
  //% endif
  //% endfor
  let at = u * 8u + high * 4u;
  //% for c in "xyzw"
  //% set i = loop.index0
  {
    //% for _ in rows
    //% set r = loop.index0
    //% if curve
    {{ iq4(r, "d%d" % r, "l%d.%s" % (r, c)) }}
    //% else
    let w{{r}} = d{{r}} * (vec4<f32>(unpack4xU8(l{{r}}.{{c}}{% if qh %} | (((((f{{r}} >> {{ 4 * i }}u) & 15u) * 0x204081u) & 0x01010101u) << 4u){% endif %})) - {{center}}.0){% if m %} + m{{r}}{% endif %};
    //% endif
    //% endfor
    {{ emit("at + %du" % i) }}
  }
  //% endfor
}
//% endmacro

//% macro unit_Q4_0(rows)
{{ unit_of_32(caller, rows, 9, 1, center=8) }}
//% endmacro

//% macro unit_Q4_1(rows)
{{ unit_of_32(caller, rows, 10, 2, m=1) }}
//% endmacro

//% macro unit_Q5_0(rows)
{{ unit_of_32(caller, rows, 11, 3, center=16, qh=1) }}
//% endmacro

//% macro unit_Q5_1(rows)
{{ unit_of_32(caller, rows, 12, 4, m=1, qh=2) }}
//% endmacro

//% macro unit_IQ4_NL(rows)
{{ unit_of_32(caller, rows, 9, 1, curve=True) }}
//% endmacro

//% macro unit_IQ4_XS(rows)
//% for w, base, start in rows
//% set r = loop.index0
{{ place(r, base, start, "(u >> 3u)", 69) }}
let c{{r}} = bitcast<i32>({{w}}[g{{r}} + 1u + (k{{r}} >> 1u)][(k{{r}} & 1u) * 2u + ((u >> 2u) & 1u)]);
let d{{r}} = {{ half_of(r, w, 0) }} * f32((c{{r}} << (24u - 8u * (u & 3u))) >> 24u);
let q{{r}} = {{w}}[g{{r}} + 5u + k{{r}} * 8u + (u & 7u)];
//% endfor
for (var high = 0u; high < 2u; high++) {
  //% for _ in rows
  let l{{loop.index0}} = (q{{loop.index0}} >> vec4<u32>(high * 4u)) & vec4<u32>(0x0f0f0f0fu);
  //% endfor
  let at = u * 8u + high * 4u;
  //% for c in "xyzw"
  {
    //% for _ in rows
    {{ iq4(loop.index0, "d%d" % loop.index0, "l%d.%s" % (loop.index0, c)) }}
    //% endfor
    {{ caller("at + %du" % loop.index0) }}
  }
  //% endfor
}
//% endmacro

//# Q2_K and Q3_K: 16 bytes of two bits are 16 weights of each of four sets of 32; one scale each.
//% macro unit_of_two_bits(emit, rows, turns, group, scales, q, dmin=0, qh=0)
let sb = u >> 2u;
let upper = (u >> 1u) & 1u;
let part = u & 1u;
//% for w, base, start in rows
//% set r = loop.index0
{{ place(r, base, start, "sb", group) }}
let d{{r}} = {{ half_of(r, w, 0) }};
//% if dmin
let m{{r}} = {{ half_of(r, w, dmin) }};
//% endif
let sc{{r}} = {{w}}[g{{r}} + {{scales}}u + k{{r}}];
let sc_lo{{r}} = select(sc{{r}}.x, sc{{r}}.z, upper == 1u) >> (part * 8u);
let sc_hi{{r}} = select(sc{{r}}.y, sc{{r}}.w, upper == 1u) >> (part * 8u);
let q{{r}} = {{w}}[g{{r}} + {{q}}u + k{{r}} * 4u + upper * 2u + part];
//% if qh
let b{{r}} = {{w}}[g{{r}} + {{qh}}u + k{{r}} * 2u + part] >> vec4<u32>(upper * 4u);
//% endif
//% endfor
for (var turn = {{ turns[0] }}; turn < {{ turns[1] }}; turn++) {
  //% for _ in rows
  //% set r = loop.index0
  let c{{r}} = (select(sc_lo{{r}}, sc_hi{{r}}, turn > 1u) >> ((turn & 1u) * 16u)) & 0xffu;
  let l{{r}} = (q{{r}} >> vec4<u32>(turn * 2u)) & vec4<u32>(0x03030303u);
  //% if dmin
  let scale{{r}} = d{{r}} * f32(c{{r}} & 15u);
  let minimum{{r}} = m{{r}} * f32(c{{r}} >> 4u);
  //% else
  let scale{{r}} = d{{r}} * f32((bitcast<i32>(c{{r}}) << 24u) >> 24u);
  let h{{r}} = ((b{{r}} >> vec4<u32>(turn)) & vec4<u32>(0x01010101u)) << vec4<u32>(2u);
  //% endif
  //% endfor
  let at = sb * 64u + upper * 32u + turn * 8u + part * 4u;
  //% for c in "xyzw"
  {
    //% for _ in rows
    //% set r = loop.index0
    //% if dmin
    let w{{r}} = scale{{r}} * vec4<f32>(unpack4xU8(l{{r}}.{{c}})) - minimum{{r}};
    //% else
    let w{{r}} = scale{{r}} * (vec4<f32>(unpack4xU8(l{{r}}.{{c}} | h{{r}}.{{c}})) - 4.0);
    //% endif
    //% endfor
    {{ emit("at + %du" % loop.index0) }}
  }
  //% endfor
}
//% endmacro

//% macro unit_Q2_K(rows, turns=("0u", "4u"))
{{ unit_of_two_bits(caller, rows, turns, 42, 2, 10, dmin=1) }}
//% endmacro

//% macro unit_Q3_K(rows, turns=("0u", "4u"))
{{ unit_of_two_bits(caller, rows, turns, 57, 1, 25, qh=9) }}
//% endmacro

//% set units = dict({"Q4_K": unit_Q4_K, "Q5_K": unit_Q5_K, "Q6_K": unit_Q6_K, "Q8_0": unit_Q8_0, "F16": unit_F16, "BF16": unit_BF16, "F32": unit_F32, "Q2_K": unit_Q2_K, "Q3_K": unit_Q3_K, "IQ4_XS": unit_IQ4_XS, "IQ4_NL": unit_IQ4_NL, "Q4_0": unit_Q4_0, "Q4_1": unit_Q4_1, "Q5_0": unit_Q5_0, "Q5_1": unit_Q5_1}, **more_units)
