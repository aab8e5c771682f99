"""The gated delta rule: reference, chunked, and flash-linear-attention's kernels."""
