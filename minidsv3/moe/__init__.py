r"""A mixture of experts (MoE): a feed-forward of which each token uses a small part.

Instead of one wide feed-forward stand E narrow ones, the experts. A router scores them
for each token, K of them run, and their answers are added, weighed with gates; a shared
expert runs always. DeepSeek-V3 has E = 256, K = 8 and one shared expert in 58 of its 61
layers: 97 % of its parameters are routed experts, and a token passes through 1/32 of
those.

:math:`u_t` is the normalised hidden state, :math:`e_i` a row of the router,
:math:`b_i` a bias that no gradient reaches, λ the routed scaling factor 2.5.
DeepSeek-V3 report, section 2.1.2, pages 8–10:

.. math::

    h'_t &= u_t + \mathrm{Shared}(u_t) + \textstyle\sum_i g_{i,t}\,\mathrm{FFN}_i(u_t)
        \quad (12) \\
    g_{i,t} &= λ\,g'_{i,t} / \textstyle\sum_j g'_{j,t} \quad (13) \\
    g'_{i,t} &= s_{i,t} \text{ if } s_{i,t} + b_i \text{ is among the K best, else } 0
        \quad (16) \\
    s_{i,t} &= σ(u_t^\top e_i) \quad (15)

The E experts form groups, one a machine. A group's score is the sum of its two best
:math:`s + b`; only experts of the best groups (4 of 8) can be chosen, so that a token
travels to four machines at most.

Balance: after each step the bias of an expert that got more than its share of tokens
falls by γ, that of the others rises by γ; it decides who is chosen and never how much
an answer counts. A loss of tiny weight α (eqs. 17–20) keeps single sequences from
leaning on few experts.

What the report leaves out and the released weights have: λ stands in the config file
only, and the layer reads a normalised copy, adding to the stream that is not.

``numpy_ref`` has the router, the experts, the layer, the bias rule and the balance
loss, and what tells how well balanced they are. The chapter on MoE derives them.
``torch_port`` has the same as modules; the experts' backward pass stays ours.
"""
