"""The whole model in JAX: NVIDIA GPUs through Pallas kernels, CPUs through XLA."""
