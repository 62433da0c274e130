"""The sparse expert layer: SwiGLU of the chosen experts, weighted and summed."""
