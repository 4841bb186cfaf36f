"""python -m moe_numba: the same as the command moe-numba."""

import sys

from .cli import main

sys.exit(main())
