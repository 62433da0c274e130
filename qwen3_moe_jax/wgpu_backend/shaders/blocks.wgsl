//# Where the parts of a block lie in types whose eight blocks lie array by array (layout.py): k is the block's
//# place in its group, which begins at vec4 g.
//% macro place(r, base, start, block, group)
let s{{r}} = {{start}} + {{block}};
let k{{r}} = s{{r}} & 7u;
let g{{r}} = {{base}} + (s{{r}} >> 3u) * {{group}}u;
//% endmacro

//% macro half_of(r, w, vector)
unpack2x16float({{w}}[g{{r}} + {{vector}}u][k{{r}} >> 1u] >> ((k{{r}} & 1u) * 16u)).x
//%- endmacro

//# Word `index` of an array that begins at `vector` of the group and has so many words in a block.
//% macro word_of(r, w, vector, words, index)
{{w}}[g{{r}} + {{vector}}u + ((k{{r}} * {{words}}u + ({{index}})) >> 2u)][(k{{r}} * {{words}}u + ({{index}})) & 3u]
//%- endmacro

//# Part `index` of so many bits, counted within the block.
//% macro part_of(r, w, vector, words, bits, index)
(({{ word_of(r, w, vector, words, "(%s) / %du" % (index, 32 // bits)) }} >> (((({{index}}) * {{bits}}u) & 31u))) & {{ 2 ** bits - 1 }}u)
//%- endmacro
