//% from "blocks.wgsl" import place, half_of, word_of, part_of
//# Types whose weights are read four at a time: points of a grid (IQ1 to IQ3), digits of base three, and MXFP4.
//# A unit is 32 weights, u is its number in the row. `head` says, once for each row, what all of them share;
//# `piece` sets w0, w1, ... for weights 4 l to 4 l + 3. `grids` is the table of all points (layout.py), one word
//# for four weights.
//#
//# Bits: dequantize_row_* in ggml-quants.c of ggml at commit d99724f2b.

//% macro unit_of_pieces(emit, rows, group, head, piece)
//% for w, base, start in rows
{{ place(loop.index0, base, start, "(u >> 3u)", group) }}
{{ head(loop.index0, w) }}
//% endfor
for (var l = 0u; l < 8u; l++) {
  //% for w, base, start in rows
  {{ piece(loop.index0, w) }}
  //% endfor
  {{ emit("u * 8u + l") }}
}
//% endmacro


//% macro scale_head(r, w)
let d{{r}} = {{ half_of(r, w, 0) }};
//% endmacro

//# w = scale * points with the signs of four bits.
//% macro signed(r, scale, word, signs)
let n{{r}} = vec4<f32>((vec4<u32>({{signs}}) >> vec4<u32>(0u, 1u, 2u, 3u)) & vec4<u32>(1u));
let w{{r}} = {{scale}} * (vec4<f32>(unpack4xI8(grids[{{word}}])) * (1.0 - 2.0 * n{{r}}));
//% endmacro

//# Eight sign bits of seven: the eighth makes their number even.
//% macro with_parity(seven)
({{seven}} | ((countOneBits({{seven}}) & 1u) << 7u))
//%- endmacro

//% macro iq3_s_head(r, w)
let d{{r}} = {{ half_of(r, w, 0) }} * (1.0 + 2.0 * f32({{ part_of(r, w, 1, 1, 4, "u & 7u") }}));
let h{{r}} = {{ part_of(r, w, 3, 2, 8, "u & 7u") }};
let b{{r}} = {{ word_of(r, w, 7, 8, "u & 7u") }};
//% endmacro
//% macro iq3_s_piece(r, w)
let i{{r}} = {{ part_of(r, w, 23, 16, 8, "(u & 7u) * 8u + l") }} | (((h{{r}} >> l) & 1u) << 8u);
{{ signed(r, "d%d" % r, "%du + i%d" % (GRIDS["IQ3_S"], r), "b%d >> (4u * l)" % r) }}
//% endmacro
//% macro unit_IQ3_S(rows)
{{ unit_of_pieces(caller, rows, 55, iq3_s_head, iq3_s_piece) }}
//% endmacro

//% macro iq3_xxs_head(r, w)
let b{{r}} = {{ word_of(r, w, 1, 8, "u & 7u") }};
let d{{r}} = {{ half_of(r, w, 0) }} * (0.5 + f32(b{{r}} >> 28u)) * 0.5;
//% endmacro
//% macro iq3_xxs_piece(r, w)
let i{{r}} = {{ part_of(r, w, 17, 16, 8, "(u & 7u) * 8u + l") }};
let f{{r}} = (b{{r}} >> (7u * (l >> 1u))) & 127u;
{{ signed(r, "d%d" % r, "%du + i%d" % (GRIDS["IQ3_XXS"], r), "%s >> (4u * (l & 1u))" % with_parity("f%d" % r)) }}
//% endmacro
//% macro unit_IQ3_XXS(rows)
{{ unit_of_pieces(caller, rows, 49, iq3_xxs_head, iq3_xxs_piece) }}
//% endmacro

//% macro iq2_s_head(r, w)
let d{{r}} = {{ half_of(r, w, 0) }};
let c{{r}} = {{ part_of(r, w, 1, 2, 8, "u & 7u") }};
let h{{r}} = {{ part_of(r, w, 5, 2, 8, "u & 7u") }};
let b{{r}} = {{ word_of(r, w, 9, 8, "u & 7u") }};
let q{{r}} = {{ word_of(r, w, 25, 8, "u & 7u") }};
//% endmacro
//% macro iq2_s_piece(r, w)
let i{{r}} = ((q{{r}} >> (8u * (l >> 1u))) & 255u) | (((h{{r}} >> (l & 6u)) & 3u) << 8u);
let e{{r}} = d{{r}} * (0.5 + f32((c{{r}} >> (l & 4u)) & 15u)) * 0.25;
{{ signed(r, "e%d" % r, "%du + i%d * 2u + (l & 1u)" % (GRIDS["IQ2_S"], r), "b%d >> (4u * l)" % r) }}
//% endmacro
//% macro unit_IQ2_S(rows)
{{ unit_of_pieces(caller, rows, 41, iq2_s_head, iq2_s_piece) }}
//% endmacro

//% macro iq2_xs_head(r, w)
let d{{r}} = {{ half_of(r, w, 0) }};
let c{{r}} = {{ part_of(r, w, 1, 2, 8, "u & 7u") }};
//% endmacro
//% macro iq2_xs_piece(r, w)
let i{{r}} = {{ part_of(r, w, 5, 16, 16, "(u & 7u) * 4u + (l >> 1u)") }};
let f{{r}} = i{{r}} >> 9u;
let e{{r}} = d{{r}} * (0.5 + f32((c{{r}} >> (l & 4u)) & 15u)) * 0.25;
{{ signed(r, "e%d" % r, "%du + (i%d & 511u) * 2u + (l & 1u)" % (GRIDS["IQ2_XS"], r), "%s >> (4u * (l & 1u))" % with_parity("f%d" % r)) }}
//% endmacro
//% macro unit_IQ2_XS(rows)
{{ unit_of_pieces(caller, rows, 37, iq2_xs_head, iq2_xs_piece) }}
//% endmacro

//% macro iq2_xxs_head(r, w)
let b{{r}} = {{ word_of(r, w, 1, 8, "u & 7u") }};
let q{{r}} = {{ word_of(r, w, 17, 8, "u & 7u") }};
let d{{r}} = {{ half_of(r, w, 0) }} * (0.5 + f32(b{{r}} >> 28u)) * 0.25;
//% endmacro
//% macro iq2_xxs_piece(r, w)
let i{{r}} = (q{{r}} >> (8u * (l >> 1u))) & 255u;
let f{{r}} = (b{{r}} >> (7u * (l >> 1u))) & 127u;
{{ signed(r, "d%d" % r, "%du + i%d * 2u + (l & 1u)" % (GRIDS["IQ2_XXS"], r), "%s >> (4u * (l & 1u))" % with_parity("f%d" % r)) }}
//% endmacro
//% macro unit_IQ2_XXS(rows)
{{ unit_of_pieces(caller, rows, 33, iq2_xxs_head, iq2_xxs_piece) }}
//% endmacro

//# w = scale * (points + or - an eighth).
//% macro moved(r, scale, is_down)
let w{{r}} = {{scale}} * (vec4<f32>(unpack4xI8(grids[{{GRIDS["IQ1"]}}u + i{{r}} * 2u + (l & 1u)])) + select(0.125, -0.125, {{is_down}}));
//% endmacro

//% macro iq1_s_head(r, w)
let h{{r}} = {{ part_of(r, w, 1, 4, 16, "u & 7u") }};
let q{{r}} = {{ word_of(r, w, 9, 8, "u & 7u") }};
let d{{r}} = {{ half_of(r, w, 0) }} * (1.0 + 2.0 * f32((h{{r}} >> 12u) & 7u));
//% endmacro
//% macro iq1_s_piece(r, w)
let i{{r}} = ((q{{r}} >> (8u * (l >> 1u))) & 255u) | (((h{{r}} >> (3u * (l >> 1u))) & 7u) << 8u);
{{ moved(r, "d%d" % r, "h%d > 32767u" % r) }}
//% endmacro
//% macro unit_IQ1_S(rows)
{{ unit_of_pieces(caller, rows, 25, iq1_s_head, iq1_s_piece) }}
//% endmacro

//% macro iq1_m_head(r, w)
let d{{r}} = {{ half_of(r, w, 0) }};
let c{{r}} = {{ part_of(r, w, 1, 2, 16, "(u & 7u) >> 1u") }} >> (6u * (u & 1u));
let h{{r}} = {{ part_of(r, w, 5, 4, 16, "u & 7u") }};
let q{{r}} = {{ word_of(r, w, 13, 8, "u & 7u") }};
//% endmacro
//% macro iq1_m_piece(r, w)
let f{{r}} = (h{{r}} >> (4u * (l >> 1u))) & 15u;
let i{{r}} = ((q{{r}} >> (8u * (l >> 1u))) & 255u) | ((f{{r}} & 7u) << 8u);
let e{{r}} = d{{r}} * (1.0 + 2.0 * f32((c{{r}} >> (3u * (l >> 2u))) & 7u));
{{ moved(r, "e%d" % r, "f%d > 7u" % r) }}
//% endmacro
//% macro unit_IQ1_M(rows)
{{ unit_of_pieces(caller, rows, 29, iq1_m_head, iq1_m_piece) }}
//% endmacro

//# Weights of TQ1_0 are digits of its bytes: five of 32 bytes, then five of 16, then four of 4. Digit n of a byte
//# is 3/256 of the byte times the n-th power of three, modulo 256.
//% macro tq1_0_piece(r, w)
let e{{r}} = (u & 7u) * 8u + l;
var t{{r}} = {{ word_of(r, w, 3, 8, "e%d & 7u" % r) }};
var p{{r}} = e{{r}} >> 3u;
if (e{{r}} >= 60u) {
  t{{r}} = {{ word_of(r, w, 1, 1, "0u") }};
  p{{r}} = e{{r}} - 60u;
} else if (e{{r}} >= 40u) {
  t{{r}} = {{ word_of(r, w, 19, 4, "e%d & 3u" % r) }};
  p{{r}} = (e{{r}} - 40u) >> 2u;
}
let m{{r}} = (unpack4xU8(t{{r}}) * select((0x1b090301u >> (8u * (p{{r}} & 3u))) & 255u, 81u, p{{r}} == 4u)) & vec4<u32>(255u);
let w{{r}} = d{{r}} * (vec4<f32>((m{{r}} * 3u) >> vec4<u32>(8u)) - 1.0);
//% endmacro
//% macro unit_TQ1_0(rows)
{{ unit_of_pieces(caller, rows, 27, scale_head, tq1_0_piece) }}
//% endmacro

//% macro tq2_0_piece(r, w)
let t{{r}} = {{ word_of(r, w, 1, 16, "((u & 7u) >> 2u) * 8u + l") }} >> (2u * (u & 3u));
let w{{r}} = d{{r}} * (vec4<f32>(unpack4xU8(t{{r}} & 0x03030303u)) - 1.0);
//% endmacro
//% macro unit_TQ2_0(rows)
{{ unit_of_pieces(caller, rows, 33, scale_head, tq2_0_piece) }}
//% endmacro

//# Sixteen blocks of MXFP4: their exponents, then their nibbles. The scale is 2^(e - 128), in two factors, because
//# a processor may take a subnormal number for zero. The table is four words of twice the values.
//% macro unit_MXFP4(rows)
//% for w, base, start in rows
//% set r = loop.index0
let s{{r}} = {{start}} + u;
let k{{r}} = s{{r}} & 15u;
let g{{r}} = {{base}} + (s{{r}} >> 4u) * 17u;
let e{{r}} = ({{w}}[g{{r}}][k{{r}} >> 2u] >> (8u * (k{{r}} & 3u))) & 255u;
let d{{r}} = bitcast<f32>((max(e{{r}}, 2u) - 1u) << 23u);
let f{{r}} = bitcast<f32>(select(127u, e{{r}} + 125u, e{{r}} < 2u) << 23u);
let q{{r}} = {{w}}[g{{r}} + 1u + k{{r}}];
//% endfor
for (var l = 0u; l < 8u; l++) {
  //% for _ in rows
  //% set r = loop.index0
  let n{{r}} = unpack4xU8((q{{r}}[l & 3u] >> (l & 4u)) & 0x0f0f0f0fu);
  let z{{r}} = select(select(vec4<u32>({{FP4[0]}}), vec4<u32>({{FP4[1]}}), (n{{r}} & vec4<u32>(4u)) != vec4<u32>(0u)), select(vec4<u32>({{FP4[2]}}), vec4<u32>({{FP4[3]}}), (n{{r}} & vec4<u32>(4u)) != vec4<u32>(0u)), n{{r}} > vec4<u32>(7u));
  let w{{r}} = (vec4<f32>(bitcast<vec4<i32>>(z{{r}} << (vec4<u32>(24u) - 8u * (n{{r}} & vec4<u32>(3u)))) >> vec4<u32>(24u)) * f{{r}}) * d{{r}};
  //% endfor
  {{ caller("u * 8u + l") }}
}
//% endmacro

//% set units = {"MXFP4": unit_MXFP4, "IQ3_S": unit_IQ3_S, "IQ3_XXS": unit_IQ3_XXS, "IQ2_S": unit_IQ2_S, "IQ2_XS": unit_IQ2_XS, "IQ2_XXS": unit_IQ2_XXS, "IQ1_S": unit_IQ1_S, "IQ1_M": unit_IQ1_M, "TQ1_0": unit_TQ1_0, "TQ2_0": unit_TQ2_0}
