"""The command `nested-lm`: it reads arguments, calls one stage and prints the result."""
