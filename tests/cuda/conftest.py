"""These tests need the ``cuda`` extra: without it they stop, and say so."""

from importlib import metadata

import pytest

from minidsv3.gpu.compile import BUILT_FOR, NEEDED, available

if not available():
    pytest.exit(f"tests/cuda: {NEEDED}", returncode=pytest.ExitCode.USAGE_ERROR)


def pytest_report_header() -> str:
    return (
        f"numba-cuda {metadata.version('numba-cuda')} "
        f"(minidsv3.gpu.compile was built for {BUILT_FOR})"
    )
