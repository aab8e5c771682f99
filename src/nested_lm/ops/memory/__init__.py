"""Self-modifying memories as pure functions: the rule, the reference, and the faster forms."""
