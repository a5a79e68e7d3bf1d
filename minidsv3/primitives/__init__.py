r"""What any transformer has, before DeepSeek-V3 changes it.

Linear layer, embedding, RMSNorm, rotary positions (RoPE and YaRN), softmax and
cross-entropy, SiLU and SwiGLU, causal attention with grouped heads and a cache.

Chapter 1 of the book builds them; every mechanism stands on them.
"""
