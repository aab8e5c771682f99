"""What the Triton kernels take, compiled ahead of time without a GPU, and how much is launched."""
