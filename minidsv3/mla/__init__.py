r"""Multi-head latent attention (MLA): keep one short latent a token, not its keys.

Attention keeps, for every token it has read, a key and a value a head. MLA keeps a
latent :math:`c` instead, from which a fixed matrix makes the keys and values of all
heads, and one rotated key :math:`k^R` that all heads share. In DeepSeek-V3 these are
512 + 64 numbers a token and layer, where 128 heads of plain attention need 32,768.

The rotation cannot pass through the latent: between :math:`W^{UQ}` and :math:`W^{UK}`
would stand a matrix that differs for each distance. So a head's query and key have two
parts, one of content without position, and one that rotates. Rows, as in the code, with
:math:`x` the normalised stream; DeepSeek-V3 report, section 2.1.1, pages 7–8:

.. math::

    c &= \mathrm{norm}(x W_{DKV}^\top) \quad (1)
        \qquad [k^C_i; v_i] = c\,[W_{UK,i}^\top; W_{UV,i}^\top] \quad (2), (5) \\
    k^R &= \mathrm{RoPE}(x W_{KR}^\top) \quad (3)
        \qquad c^Q = \mathrm{norm}(x W_{DQ}^\top) \quad (6) \\
    q^C_i &= c^Q W_{UQ,i}^\top, \quad
        q^R_i = \mathrm{RoPE}(c^Q W_{QR,i}^\top) \quad (7)–(9) \\
    o_i &= \textstyle\sum_j \mathrm{softmax}_j\big(α\,(q^C_i k^{C\top}_{j,i}
        + q^R_i k_j^{R\top})\big)\, v_{j,i}, \quad u = [o_1; …] W_O^\top
        \quad (10), (11)

Two forms compute the same. The naive form makes every key and value and is used where
many queries meet: training, the reading of a prompt. The absorbed form moves
:math:`W_{UK}` to the query and :math:`W_{UV}` to the output and attends to the latents
themselves: more arithmetic a pair, far fewer numbers to read, hence decoding.

The two norms on the latents are in the report's text (p. 22), not in its equations.
``numpy_ref`` has queries, latents, both forms and their backward passes; ``torch_port``
the same as a module. The chapter on MLA derives them.
"""
