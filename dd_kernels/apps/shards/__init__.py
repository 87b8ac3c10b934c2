"""A job of many images, cut into shards: drawn by any number of processes, stopped and resumed, and checked.

A folder holds the shards and ``manifest.json``, which says what is drawn and lists every shard that is there with its
checksum. A shard counts from the moment at which the manifest that names it takes the place of the one before.
"""

from .formats import FORMATS
from .job import Job, Shard
from .manifest import MANIFEST, Manifest
from .work import draw_all

__all__ = ["FORMATS", "MANIFEST", "Job", "Manifest", "Shard", "draw_all"]
