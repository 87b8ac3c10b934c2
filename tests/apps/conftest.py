"""Makes the helpers of this folder importable from those below it."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
