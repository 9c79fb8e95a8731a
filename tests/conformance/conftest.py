"""The golden files are made of what the runtime's own tests draw."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "mobile_runtime"))
