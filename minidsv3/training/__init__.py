"""Training: optimiser, schedule, clipping, the loop, and resuming bit for bit.

``numpy_ref`` has the rules and the loop, ``torch_port`` the loop on torch's optimiser,
``run_folder`` keeps a run on disk, ``command`` is ``python -m minidsv3 train``.
"""
