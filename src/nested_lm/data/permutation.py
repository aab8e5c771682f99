"""A shuffled order that is a formula: any place can be asked for, nothing is stored."""

import numpy as np

_ROUNDS = 8
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Permutation:
    """A pseudo-random bijection of 0 .. size - 1, fixed by its key.

    A balanced Feistel network over the next even power of two, walked until the value falls below `size`:
    at most four steps on average, any range in one vectorised call, no memory.
    """

    def __init__(self, size: int, *key: int) -> None:
        assert size >= 1, size
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        # Philox is counter-based and its stream is fixed by NumPy's compatibility policy.
        self._keys = np.random.Philox(np.random.SeedSequence(key)).random_raw(_ROUNDS).astype(np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Values at these places, int64."""
        values = self._encrypt(places.astype(np.uint64))
        outside = values >= np.uint64(self.size)
        while outside.any():
            values[outside] = self._encrypt(values[outside])
            outside = values >= np.uint64(self.size)
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
