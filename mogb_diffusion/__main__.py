"""``python -m mogb_diffusion``, also under ``torchrun -m`` and ``accelerate launch -m``."""

import sys

from mogb_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
