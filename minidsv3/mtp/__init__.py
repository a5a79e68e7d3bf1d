r"""Multi-token prediction (MTP): training on more than the next token.

A hidden state that must serve the prediction of token i + 2, and not only of i + 1,
has to look ahead. So behind the trunk stand D small modules, a chain: module k takes
what depth k - 1 knew at position i, adds the token that has become known since,
:math:`t_{i+k}`, thinks for one block, and predicts the token after it,
:math:`t_{i+k+1}`. Embedding and head are the trunk's own. Unlike parallel heads, each
depth sees every token before the one it predicts: the causal chain is complete. The
gradient of the modules' losses flows into the trunk: that is the purpose. Afterwards
they can be thrown away, and the main model is untouched; or module 1 is kept to draft
tokens for speculative decoding.

:math:`h^0` is the trunk's hidden state, :math:`M_k` a projection from 2D to D,
:math:`\mathrm{TRM}_k` a whole block, λ the weight of it all. DeepSeek-V3 report,
section 2.2, pages 10–11:

.. math::

    h'^k_i &= M_k\,[\mathrm{RMSNorm}(h^{k-1}_i)\,;\,
        \mathrm{RMSNorm}(\mathrm{Emb}(t_{i+k}))] \quad (21) \\
    h^k_{1:T-k} &= \mathrm{TRM}_k(h'^k_{1:T-k}) \quad (22) \\
    P^k_{i+k+1} &= \mathrm{OutHead}(h^k_i) \quad (23) \\
    L^k &= -\tfrac1T \textstyle\sum_{i=2+k}^{T+1} \log P^k_i[t_i] \quad (24) \\
    L_{MTP} &= \tfrac{λ}{D} \textstyle\sum_{k=1}^{D} L^k \quad (25)

What the released weights do otherwise, and we with them: the embedding comes first,
[enorm(Emb); hnorm(h)]; :math:`h^0` is the state after the final norm; a norm of the
module's own, ``shared_head.norm``, stands between its block and the shared head. One
choice is ours: eq. (24) divides its T - k terms by T, we average over the T - k.

``numpy_ref`` has the module, its backward pass, the shifts, the schedule of λ and the
rule by which a draft is accepted; ``torch_port`` has the module. The chapter on MTP
derives them.
"""
