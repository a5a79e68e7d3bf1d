"""Text out of a model: sampling and cached decoding (``numpy_ref``)."""
