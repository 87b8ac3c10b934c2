"""Shapes and models of tiny sizes, and how the tests of benchmarks measure plans."""

import json

from benchmarks import harness, results

TINY_IMAGES = [(2, 3, 8, 8), (1, 3, 4, 4)]
TINY_NORMS = [(2, 32, 4), (1, 64, 2)]
TINY_UNET = {"channels": (32, 64), "image_size": 8, "attention_resolutions": (4,), "num_res_blocks": 1}
TINY_ADM = {**TINY_UNET, "head_channels": 32}


def measured(plans, target):
    rows = [harness.measure(plan, target) for plan in plans]
    assert results.aligned(results.cells(rows))
    return json.loads(json.dumps(rows))


def problems(row):
    return {name: peer for name, peer in row["peers"].items() if "not_measured" in peer}
