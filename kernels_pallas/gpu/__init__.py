"""What the GPU kernels of several operations share: device checks, grouped products, operands."""
