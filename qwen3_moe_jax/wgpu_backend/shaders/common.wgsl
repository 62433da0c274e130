// What every kernel shares: the state of the current step.

struct Step {
  position: u32,   // of the first token of this pass
  tokens: u32,     // tokens of this pass
  head_row: u32,   // first token of this pass whose logits are wanted
  replay: u32,     // 1: take the experts from the replay buffer
  emitted: u32,    // tokens chosen since the last read-back
  record: u32,     // 1: keep intermediate values that only a trace reads
}
