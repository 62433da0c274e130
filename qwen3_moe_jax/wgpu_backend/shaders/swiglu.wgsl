fn finish(at: u32, gate: f32, up: f32) {
  y[at] = gate / (1.0 + exp(-gate)) * up;
  if (step.record == 1u) {
    y[p.plane + at] = gate;
    y[2u * p.plane + at] = up;
  }
}
