"""The former place of :mod:`dd_kernels.integrations.guided_diffusion`, kept for code that imports it."""

import sys

from ..integrations.guided_diffusion import *  # noqa: F403
from ..integrations.guided_diffusion import gaussian_diffusion, losses, nn, respace

for _module in (gaussian_diffusion, losses, nn, respace):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
