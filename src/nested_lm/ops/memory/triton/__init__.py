"""The self-modifying memories as Triton kernels, for NVIDIA GPUs."""
