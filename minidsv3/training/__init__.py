"""Training: optimiser, schedule, clipping, the loop, and resuming bit for bit.

``numpy_ref`` has the rules and the loop, ``run_folder`` keeps a run on disk.
"""
