"""Channel memories: the part of a block that works on each token by itself."""
