"""``python -m mogb`` is ``mogb``."""

import sys

from mogb.cli import main

if __name__ == "__main__":
    sys.exit(main())
