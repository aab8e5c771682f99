"""Update rules of inner and outer optimizers, as pure functions."""
