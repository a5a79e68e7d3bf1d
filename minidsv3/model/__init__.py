"""The whole model, assembled from the rooms of the mechanisms.

``numpy_ref``: embedding, blocks, final norm and head as pure functions, with the
backward pass written by hand (chapter 1), and the MTP modules behind them.
``torch_port``: `DeepSeekV3`, the same as a module, with the same names.
"""
