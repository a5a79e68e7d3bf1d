"""The trained model that comes with the package: `MINI`, ready to write text.

``mini/`` holds it in DeepSeek's own layout, in FP8 blocks, and with it what it comes
from: the command, the log of its training, the bits per byte on held-out text.
"""

from pathlib import Path

MINI_FOLDER = Path(__file__).parent / "mini"
