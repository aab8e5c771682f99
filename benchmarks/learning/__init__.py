"""Small tasks that separate architectures: what a model can learn at all, and beyond the trained length."""
