"""Files whose headers promise more than they hold cost little memory: weights, arrays and pictures."""

import gzip
import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from dd_kernels.apps import tensors
from dd_kernels.apps.data.pictures import load_image

INFO = {
    "config": {"image_size": 8, "in_channels": 1, "channels": [1 << 20] * 4},
    "schedule": "linear",
    "num_timesteps": 1000,
    "prediction": "v",
    "classes": [],
    "training": {},
}
LONGEST = tensors.LONGEST_HEADER
LYING_SIDE = 13000  # Pillow's own limit is 13377


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one_tensor(shape):
    size = 4 * int(np.prod([int(v) for v in shape], dtype=object))
    return {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}


def described(**changes):
    text = json.dumps({"format": 1, "kind": "model", "info": {**INFO, **changes}})
    return safetensors({"__metadata__": {"dd_kernels": text}, **one_tensor([1])}, b"1234")


def configured(**options):
    return described(config={**INFO["config"], **options})


def models():
    """Yields the content of model files that lie."""
    yield safetensors(one_tensor([1 << 40]))
    yield safetensors(one_tensor([1 << 62, 1 << 62]))
    yield safetensors(b"{}", length=1 << 62)
    # The JSON texts that take most memory for their length.
    for opening in (b"[", b'{"a":'):
        yield safetensors(opening * (LONGEST // len(opening)))
    yield safetensors(b"[" + b"[],[]," * (LONGEST // 6 - 1))
    yield safetensors((b"{" + b",".join(b'"%d":{}' % i for i in range(LONGEST // 12)) + b"}")[:LONGEST])
    yield safetensors(b"x" * (64 << 20))
    yield described()
    yield described(num_timesteps=10**12)
    yield configured(num_res_blocks=10**9)
    yield configured(channels=[32] * 100_000)
    yield configured(num_classes=2**31 - 1)
    yield configured(image_size=2**30)


def npz():
    """Returns a .npz whose array is 64 GB long by its header."""
    array, content = io.BytesIO(), io.BytesIO()
    head = {"descr": "|u1", "fortran_order": False, "shape": (1 << 36, 8, 8, 1)}
    np.lib.format.write_array_header_1_0(array, head)
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("images.npy", array.getvalue())
    return content.getvalue()


def idx_folders():
    """Yields the files of training images, by name, of IDX folders whose headers promise more than they hold."""
    name = "train-images-idx3-ubyte"
    lie = struct.pack(">4B3I", 0, 0, 8, 3, 1 << 31, 1 << 15, 1 << 15)
    yield name, lie + bytes(99)
    yield f"{name}.gz", gzip.compress(lie + bytes(99))
    # As many bytes as a .gz of its length could hold at most, which these do not.
    yield f"{name}.gz", gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, 10_000, 28, 28) + os.urandom(10_000))
    yield f"{name}.gz", gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, 1, 1, 1) + bytes(300_000_000))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pictures():
    """Yields the content of pictures that have LYING_SIDE pixels a side by their headers."""
    head = struct.pack(">IIBBBBB", LYING_SIDE, LYING_SIDE, 8, 6, 0, 0, 0)
    yield b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    for kind in ("JPEG", "BMP", "GIF"):
        file = io.BytesIO()
        Image.new("RGB", (64, 64)).save(file, kind)
        content = bytearray(file.getvalue())
        place, layout = {"JPEG": (content.find(b"\xff\xc0") + 5, ">HH"), "BMP": (18, "<ii"), "GIF": (6, "<HH")}[kind]
        struct.pack_into(layout, content, place, LYING_SIDE, LYING_SIDE)
        yield bytes(content)


# The peak in MB. Of getrusage it would be that of the process too which started this one.
PEAK = """
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) // 1024
"""
# Prints what the imports take, and what remains the peak after every file was refused.
READ = (
    PEAK
    + """
import pathlib, sys
from dd_kernels.apps import checkpoint, data
from dd_kernels.apps.data import pictures
readers = {"idx": data.idx_folder, "model": checkpoint.load_model, "npz": data.npz_file}
readers["picture"] = lambda p: pictures.load_image(p, 8)
idle = peak()
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        readers[path.suffix[1:]](path)
        raise SystemExit(f"{path.name} was believed")
    except ValueError:
        pass
print(idle, peak())
"""
)
BARE = PEAK + "import torch; print(peak())"


def printed(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.fixture
def lies(tmp_path):
    """A folder of files that lie."""
    for kind, contents in (("model", models()), ("npz", [npz()]), ("picture", pictures())):
        for i, content in enumerate(contents):
            (tmp_path / f"{i:02d}.{kind}").write_bytes(content)
    for i, (name, content) in enumerate(idx_folders()):
        (tmp_path / f"{i:02d}.idx").mkdir()
        (tmp_path / f"{i:02d}.idx" / name).write_bytes(content)
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell no peak of one program alone")
def test_lying_files_cost_little_memory(lies):
    """Of the peak, PyTorch's own import is the most: 220 MB of 280 with its CPU build."""
    (torch_alone,) = printed(BARE)
    idle, peak = printed(READ, str(lies))
    count = len(list(lies.iterdir()))
    print(f"{count} files: peak {peak} MB, {peak - idle} above idle; import torch takes {torch_alone}")
    assert count == 23
    assert peak - idle < 70
    assert peak - torch_alone < 80  # below 300 MB in all where PyTorch takes 220


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF"])
def test_blank_pictures_are_no_lies(tmp_path, kind, mode):
    """Blank pictures are accepted, though nothing compresses better."""
    path = tmp_path / "blank"
    options = {"JPEG": {"progressive": True, "optimize": True, "quality": 1}, "PNG": {"optimize": True}, "GIF": {}}
    Image.new("L" if (kind, mode) == ("JPEG", "1") else mode, (4000, 4000)).save(
        pathlib.Path(path), kind, **options[kind]
    )
    assert (load_image(path, 2) < 2).all()
