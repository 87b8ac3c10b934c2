"""A check that a piece of work fits this machine's memory, made before the work begins."""

from __future__ import annotations

import os


def physical_memory() -> int | None:
    """Returns this machine's memory in bytes, or None where the system does not say (Windows)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def check_memory(what: str, size: int) -> None:
    """Raises ``ValueError`` where ``what`` needs more bytes than this machine has."""
    limit = physical_memory()
    if limit is not None and size > limit:
        raise ValueError(f"{what} takes {size / 2**30:,.1f} GiB of memory; this machine has {limit / 2**30:,.1f} GiB")
