"""The judge of the exercises: ``check``, ``check_all`` and ``hint`` in a notebook, and
the same verdicts under ``pytest exercises/``.
"""

from grader.live import check, check_all, hint, passed

__all__ = ["check", "check_all", "hint", "passed"]
