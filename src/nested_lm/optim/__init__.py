"""Which parameter is stepped by which optimizer, when, and at what rate."""
