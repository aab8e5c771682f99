"""What one CUDA machine can show in a few minutes."""
