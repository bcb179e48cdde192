"""``python -m ditq_kernels`` is the command ``ditq``."""

import sys

from .cli import main

sys.exit(main())
