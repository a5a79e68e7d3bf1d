"""Text out of a model: sampling, cached and speculative decoding (``numpy_ref``)."""
