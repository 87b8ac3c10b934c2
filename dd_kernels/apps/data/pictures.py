"""One image file, of any mode that Pillow reads, as a square of bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from ..files import PathLike, check_readable

Colour = tuple[int, int, int]


def parse_colour(text: str) -> Colour:
    """Returns the red, green and blue, in [0, 255], of a colour as CSS spells it ("grey", "#808080", "rgb(0, 0, 0)").

    Raises:
        ValueError: no such colour.
    """
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"background must be a colour, such as grey or #ff0000; got {text!r}") from error
    return red, green, blue


GREY = parse_colour("grey")
# The most pixels that a byte of a file can stand for: a block of 64 in a JPEG takes at least 1 bit, deflate makes 1032
# bytes of 8 pixels of one, and a code of a GIF, of 9 bits or more, stands for less than 4096 pixels.
PIXELS_PER_BYTE = {"JPEG": 512, "PNG": 8256, "GIF": 3641}


def load_image(path: PathLike, size: int, channels: int = 3, background: Colour = GREY) -> Tensor:
    """Returns the largest central square of an image, resized, as [C, size, size] uint8.

    The orientation of the EXIF data is applied. Images of 16 bits are divided by 257; floats are [0, 1] or, if one is
    above 1, [0, 255]. Transparent pixels are composited on ``background``.

    Raises:
        ValueError: the file, which is named, is not regular or cannot be read as an image.
    """
    length = check_readable("image", path).stat().st_size
    return decoded(lambda: Image.open(path), length, str(path), size, channels, background)


def decode_image(content: bytes, name: str, size: int, channels: int = 3, background: Colour = GREY) -> Tensor:
    """Returns what :func:`load_image` returns, for an image file in memory; ``name`` is for the error."""
    return decoded(lambda: Image.open(io.BytesIO(content)), len(content), name, size, channels, background)


def decoded(
    open_image: Callable[[], Image.Image], length: int, name: str, size: int, channels: int, background: Colour
) -> Tensor:
    """Returns the square of bytes of the image that ``open_image`` opens from a file of ``length`` bytes."""
    try:
        with warnings.catch_warnings(), open_image() as file:
            warnings.simplefilter("ignore")  # about metadata, and about sizes that the error below limits too
            _check_promise(file, length)
            ImageOps.exif_transpose(file, in_place=True)
            image = _flat(file, channels, background)
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, KeyError ...
        raise ValueError(f"cannot read the image {name!r}: {_first_line(error)}") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if side != size or image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC, box)
    return torch.from_numpy(np.array(image).reshape(size, size, channels)).permute(2, 0, 1).contiguous()


def _check_promise(image: Image.Image, length: int) -> None:
    """Raises ``ValueError`` where a header tells of more pixels than ``length`` bytes can hold.

    Pillow would take memory for all of them, and fill in what is missing.
    """
    most = PIXELS_PER_BYTE.get(image.format or "")
    if most is not None and image.width * image.height > most * length:
        raise ValueError(f"its header tells of {image.width} x {image.height} pixels, the file has {length} bytes")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _flat(image: Image.Image, channels: int, background: Colour) -> Image.Image:
    """Returns an RGB or grey image of 8 bits without transparency."""
    wanted = "RGB" if channels == 3 else "L"
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image, background).convert(wanted)
    if image.mode in ("RGBa", "La"):  # colours multiplied by alpha
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(below, image)
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        image = image if converted is None else converted
    image.load()
    return image if image.mode == wanted else image.convert(wanted)  # a conversion to its own mode would copy it


def _eight_bits(image: Image.Image, background: Colour) -> Image.Image:
    """Returns a grey image of 16 or 32 bits, or of floats, in 8 bits."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or inf")
    low, high = float(values.min()), float(values.max())
    full = 65535.0
    if image.mode == "F":
        full = 1.0 if high <= 1 else 255.0
    if low < 0 or high > full:
        raise ValueError(f"its values go from {low:g} to {high:g}; wanted are [0, {full:g}]")
    # Half up, so that every 8-bit value that was widened by 257 comes back.
    grey = np.floor(values * (255.0 / full) + 0.5).astype(np.uint8)
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return Image.fromarray(grey)
    pixels = np.repeat(grey[..., None], 3, axis=2)
    pixels[values == transparent] = background
    return Image.fromarray(pixels)
