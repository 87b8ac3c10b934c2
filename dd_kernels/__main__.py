"""``python -m dd_kernels``."""

import sys

from .apps.cli import main

sys.exit(main())
