"""What the solvers' tests share."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # gramians.py, whatever pytest's import mode
