"""Pure tensor functions: the write rules of the memories."""
