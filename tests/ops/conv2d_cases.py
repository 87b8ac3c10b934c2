"""How far conv2d's kernels may be from the exact result: a bound from the arithmetic, and what the tests share.

Of every output the bound is the number of roundings on a path from an input to it, times the unit roundoff, times the
sum of the magnitudes of all terms (Higham, 2002, section 3.1), with the transforms' matrices in absolute values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bounds import UNIT, unit
from group_norm_bounds import LARGEST_CURVATURE, LARGEST_SLOPE, activation_errors
from torch import Tensor

from dd_kernels.ops.activation import Activation, activate
from dd_kernels.ops.conv2d import reference
from dd_kernels.ops.conv2d.op import Method

CHUNK = 64  # input channels, taps or tiles that are summed in one chain
POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.5**0.5, -(0.5**0.5), 2.0**0.5, -(2.0**0.5))}
TILE = {Method.WINOGRAD2: 2, Method.WINOGRAD4: 4}
SAME = (1, 1, 1, 1)


def matrices(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns A^T, G and B^T of F(m x m, 3 x 3), from polynomials through its points."""
    points = POINTS[m]
    a = torch.zeros(m, m + 2, dtype=torch.float64)
    g = torch.zeros(m + 2, 3, dtype=torch.float64)
    b = torch.zeros(m + 2, m + 2, dtype=torch.float64)
    for j, point in enumerate((*points, None)):
        others = [other for other in points if other != point]
        polynomial = torch.ones(1, dtype=torch.float64)  # lowest power first
        for other in others:
            shifted, scaled = F.pad(polynomial, (1, 0)), F.pad(polynomial, (0, 1))
            polynomial = shifted - other * scaled
        b[j, : len(polynomial)] = polynomial
        if point is None:
            a[m - 1, j] = g[j, 2] = 1
        else:
            a[:, j] = torch.tensor([point**i for i in range(m)], dtype=torch.float64)
            product = torch.tensor([point - other for other in others], dtype=torch.float64).prod()
            g[j] = torch.tensor([point**i for i in range(3)], dtype=torch.float64) / product
    return a, g, b


def input_tiles(x: Tensor, m: int, padding: tuple[int, int, int, int]) -> Tensor:
    """Returns the tiles [N, C, rows, columns, m + 2, m + 2] of x [N, C, H, W] with zeros around it."""
    x = F.pad(x, padding)
    height, width = x.shape[2] - 2, x.shape[3] - 2
    x = F.pad(x, (0, -width % m, 0, -height % m))
    return x.unfold(2, m + 2, m).unfold(3, m + 2, m)


def output_tiles(y: Tensor, m: int) -> Tensor:
    """Returns the tiles [N, K, rows, columns, m, m] of y [N, K, H, W]."""
    y = F.pad(y, (0, -y.shape[3] % m, 0, -y.shape[2] % m))
    return y.unfold(2, m, m).unfold(3, m, m)


def both_sides(matrix: Tensor, squares: Tensor) -> Tensor:
    """Returns M S M^T of every square S, the last two dimensions."""
    return matrix @ squares @ matrix.T


def winograd(x: Tensor, weight: Tensor, m: int, padding: tuple[int, int, int, int], absolute: bool) -> Tensor:
    """Returns the convolution by Winograd's algorithm in the dtype of x, or the magnitudes of its terms."""
    a, g, b = (v.abs() if absolute else v for v in matrices(m))
    x, weight = (v.abs() if absolute else v for v in (x, weight))
    products = torch.einsum("kcij,ncxyij->nkxyij", both_sides(g, weight), both_sides(b, input_tiles(x, m, padding)))
    tiles = both_sides(a, products).permute(0, 1, 2, 4, 3, 5)
    y = tiles.reshape(*tiles.shape[:2], tiles.shape[2] * m, tiles.shape[4] * m)
    left, right, top, bottom = padding
    return y[:, :, : x.shape[2] + top + bottom - 2, : x.shape[3] + left + right - 2]


def gradient_magnitude(x: Tensor, dy: Tensor, m: int, padding: tuple[int, int, int, int]) -> Tensor:
    """Returns the magnitudes of all terms of the weights' gradient."""
    a, g, b = (v.abs() for v in matrices(m))
    inputs, outputs = both_sides(b, input_tiles(x.abs(), m, padding)), both_sides(a.T, output_tiles(dy.abs(), m))
    return both_sides(g.T, torch.einsum("ncxyij,nkxyij->kcij", inputs, outputs))


# Each of a transform's two passes rounds its coefficients, up to four products and sums, and a sum or difference.
TRANSFORM = 2 * 6
EPILOGUE = 2  # bias and residual


def bound(
    x: Tensor,
    weight: Tensor,
    method: Method,
    isa: str | None,
    padding: tuple[int, int, int, int] = SAME,
    stride: int = 1,
    added: Tensor | float = 0.0,
    prologue: int = 0,
    bfloat16: bool = False,
) -> Tensor:
    """Returns how far the kernel may be from the exact convolution of x; all tensors are float64.

    ``added`` holds the magnitudes of bias and residual, ``prologue`` counts the roundings of x itself. With AVX-512,
    products of ``bfloat16`` round both of their factors to it.
    """
    if method == Method.DIRECT:
        depth = weight[0].numel()
        magnitude = F.conv2d(F.pad(x.abs(), padding), weight.abs(), stride=stride)
        # A chain may end at the padding that makes a chunk's taps whole vectors.
        roundings = min(depth, CHUNK) + depth // CHUNK + weight.shape[1] // CHUNK + 2
    else:
        magnitude = winograd(x, weight, TILE[method], padding, True)
        roundings = 3 * TRANSFORM + min(weight.shape[1], CHUNK) + weight.shape[1] // CHUNK + 1
    factors = 2 * 2.0**-8 + 2.0**-16 if bfloat16 and isa == "avx512" else 0.0
    return unit(roundings + prologue + EPILOGUE, isa) * (1 + factors) * (magnitude + added) + factors * magnitude


def gradient_bound(
    x: Tensor, dy: Tensor, method: Method, isa: str | None, padding: tuple[int, int, int, int]
) -> Tensor:
    """Returns how far float32 may be from the weights' exact gradient; blocks of tiles are added up too."""
    m = TILE[method]
    tiles = output_tiles(dy, m)[:, 0, :, :, 0, 0].numel()
    roundings = 3 * TRANSFORM + min(tiles, CHUNK) + 2 * (tiles // CHUNK + 1)
    return unit(roundings, isa) * gradient_magnitude(x, dy, m, padding)


class Training:
    """How far y and every gradient may be from float64, by whichever method, after a prologue by PyTorch.

    All tensors are float64. Where PyTorch convolves, each product and each sum is a rounding, in any order.
    """

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        dy: Tensor,
        stride: int,
        padding: tuple[int, int, int, int],
        activation: Activation,
        isa: str | None,
    ) -> None:
        """Takes the tensors x, weight, bias, scale, shift and residual."""
        self.x, self.weight, self.bias, scale, shift, self.residual = tensors
        self.dy, self.stride, self.padding, self.isa = dy, stride, padding, isa
        self.scale, shift = scale[:, :, None, None], shift[:, :, None, None]
        self.by_winograd = stride == 1 and self.weight.shape[2:] == (3, 3)
        z = (self.x * self.scale + shift).requires_grad_()
        e_z = 2 * UNIT * ((self.x * self.scale).abs() + shift.abs())
        value = activate(z, activation)
        (self.slope,) = torch.autograd.grad(value.sum(), z)
        e_value, e_slope = activation_errors(z.detach(), activation, False)
        self.value, self.e_value = value.detach(), LARGEST_SLOPE * e_z + e_value
        self.e_slope = LARGEST_CURVATURE * e_z + e_slope

    def by_name(self) -> dict[str, Tensor]:
        """Returns the bounds of y and the gradients of the tensors."""
        count = self.dy.numel() // self.dy.shape[1]
        dz, e_dz = self._of_prologue()

        def summed(factor: Tensor) -> Tensor:
            term, error = (dz * factor).abs(), e_dz * factor.abs()
            return (unit(term[0, 0].numel() + 1, None) * (term + error) + error).sum((2, 3))

        return {
            "y": self._of_result(),
            "x": self.scale.abs() * (e_dz + 2 * UNIT * (dz.abs() + e_dz)),
            "weight": self._of_filters(),
            "bias": unit(count, None) * self.dy.abs().sum((0, 2, 3)),
            "scale": summed(self.x),
            "shift": summed(torch.ones_like(self.x)),
            "residual": torch.zeros_like(self.dy),
        }

    def _of_result(self) -> Tensor:
        added = self.bias.abs()[:, None, None] + self.residual.abs()
        sizes, methods = self.value.abs() + self.e_value, list(TILE) if self.by_winograd else []
        of = [Method.DIRECT, *methods]
        limits = [bound(sizes, self.weight, m, self.isa, self.padding, self.stride, added) for m in of]
        carried = reference.conv2d(self.e_value, self.weight.abs(), None, self.stride, self.padding, None)
        return torch.stack(limits).amax(0) + carried

    def _of_filters(self) -> Tensor:
        sizes, rest = self.value.abs() + self.e_value, (self.weight, self.stride, self.padding)
        if self.by_winograd:
            limits = [gradient_bound(sizes, self.dy, m, self.isa, self.padding) for m in TILE]
            limit = torch.stack(limits).amax(0)
        else:
            products = self.dy[:, 0].numel()
            limit = unit(2 * products, None) * reference.weight_gradient(self.dy.abs(), sizes, *rest)
        return limit + reference.weight_gradient(self.dy.abs(), self.e_value, *rest)

    def _of_prologue(self) -> tuple[Tensor, Tensor]:
        """Returns the exact gradient of the activation's argument, and its error."""
        rest = (self.stride, self.padding)
        exact = reference.input_gradient(self.dy, self.x, self.weight, *rest)
        if self.stride == 1:
            turned = self.weight.flip(2, 3).transpose(0, 1)
            height, width = self.weight.shape[2:]
            left, right, top, bottom = self.padding
            back = (width - 1 - left, width - 1 - right, height - 1 - top, height - 1 - bottom)
            of = [Method.DIRECT, *(TILE if self.by_winograd else [])]
            error = torch.stack([bound(self.dy, turned, m, self.isa, back) for m in of]).amax(0)
        else:
            products = self.weight[:, 0].numel()
            error = unit(2 * products, None) * reference.input_gradient(self.dy.abs(), self.x, self.weight.abs(), *rest)
        dz = exact * self.slope
        return dz, (exact.abs() + error) * self.e_slope + self.slope.abs() * error + 2 * UNIT * (dz.abs() + error)
