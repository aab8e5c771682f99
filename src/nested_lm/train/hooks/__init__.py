"""What hangs on the training loop: each part in a file of its own, opened in `registry`."""
