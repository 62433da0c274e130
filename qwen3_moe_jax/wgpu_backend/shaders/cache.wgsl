//# Four elements of the KV cache: a vec4 of float32, or two words of packed float16.
//% macro cache_type(f16)
{{- "vec2<u32>" if f16 else "vec4<f32>" -}}
//% endmacro
//% macro cache_pack(v, f16)
{{- "vec2<u32>(pack2x16float((%s).xy), pack2x16float((%s).zw))" % (v, v) if f16 else v -}}
//% endmacro
//% macro cache_unpack(v, f16)
{{- "unpack_cached(%s)" % v if f16 else v -}}
//% endmacro
//% macro cache_functions(f16)
//% if f16
fn unpack_cached(v: vec2<u32>) -> vec4<f32> {
  return vec4<f32>(unpack2x16float(v.x), unpack2x16float(v.y));
}
//% endif
//% endmacro
