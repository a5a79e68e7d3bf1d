"""Text out of a model: `generate` and `stream`, cached, batched and speculative.

``numpy_ref`` specifies the law, one batch in lockstep. ``decoding`` is the loop for
everyone: texts of different lengths, stops, statistics. What computes is a decoder:
``numpy_decoder`` (any model, slowly), ``torch_port`` (any device), ``compiled`` with
the loops of ``cpu_kernels`` (MLA on a processor, the fastest there).
"""

from minidsv3.generation.decoding import NOTHING, Step, decoder_for, generate, stream

__all__ = ["NOTHING", "Step", "decoder_for", "generate", "stream"]
