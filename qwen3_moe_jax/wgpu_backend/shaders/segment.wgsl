//# The matrix that a workgroup has part of, of those that lie side by side. In a function of products.wgsl's kernels.
  var seg = p.segs[0];
  if (p.segments > 1u && wg.x >= p.segs[1].group_begin) {
    seg = p.segs[1];
  }
  if (p.segments > 2u && wg.x >= p.segs[2].group_begin) {
    seg = p.segs[2];
  }
