"""The functions of csrc/common/vec_math.h keep the largest errors that they state, in every instruction set."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import compiled
import numpy as np
import pytest
from compiled import HERE, ROOT
from numpy.typing import NDArray

Array = NDArray[np.generic]
Evaluate = Callable[[str, Array], NDArray[np.float64]]
WORDS = np.arange(0, 1 << 32, 4999, dtype=np.uint64).astype(np.uint32)  # every exponent, both signs, all fractions
FLOATS = WORDS.view(np.float32)[np.isfinite(WORDS.view(np.float32))]


@pytest.fixture(scope="module", params=["baseline", "avx2", "avx512"])
def evaluate(request: pytest.FixtureRequest) -> Evaluate:
    """A function of tests/csrc/vec_math.cpp at an array, in float64."""
    if compiled.compiler() is None:
        pytest.skip("no C++ compiler")
    flags = ["-O2", "-fno-math-errno", "-fno-trapping-math"]
    sources = [HERE / "vec_math.cpp", ROOT / "csrc/common/cpu.cpp"]
    library = ctypes.CDLL(str(compiled.build("vec_math", sources, flags, [HERE])))
    library.dd_kernels_cpu_isa.restype = ctypes.c_char_p
    if library.dd_kernels_cpu_isa(request.param.encode()) is None:
        pytest.skip(f"this processor lacks {request.param}")
    isa = ["baseline", "avx2", "avx512"].index(request.param)

    def function(name: str, values: Array) -> NDArray[np.float64]:
        values = np.ascontiguousarray(values)
        result = np.empty(len(values), np.float32)
        to_pointer = ctypes.c_void_p
        getattr(library, name)(
            isa, to_pointer(values.ctypes.data), to_pointer(result.ctypes.data), ctypes.c_int64(len(values))
        )
        return result.astype(np.float64)

    return function


def error_in_ulp(actual: NDArray[np.float64], exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """Errors in units of float32's last place at the exact value; subnormals have that of the smallest normal."""
    unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-126))) - 23)
    return np.abs(actual - exact) / unit


def test_exp(evaluate):
    v = FLOATS[FLOATS < 88.72]
    assert error_in_ulp(evaluate("exp_of", v), np.exp(v.astype(np.float64))).max() <= 1.1
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 89.0, -104.0], np.float32)
    np.testing.assert_array_equal(evaluate("exp_of", special), [np.nan, np.inf, 0.0, 1.0, 1.0, np.inf, 0.0])


def test_exp2(evaluate):
    v = np.concatenate(
        [FLOATS[(FLOATS >= -126) & (FLOATS <= 127)], np.linspace(-126, 127, 1_000_003, dtype=np.float32)]
    )
    assert error_in_ulp(evaluate("exp2_of", v), np.exp2(v.astype(np.float64))).max() <= 2.3
    special = np.array([np.nan, -np.inf, -1000.0, -127.0, 0.0, -0.0, 1.0, -126.0], np.float32)
    expected = [np.nan, 0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0**-126]
    np.testing.assert_array_equal(evaluate("exp2_of", special), expected)


def test_one_plus_exp_minus(evaluate):
    v = np.concatenate([FLOATS[FLOATS > -88.3], np.linspace(-88.3, 89.0, 1_000_003, dtype=np.float32)])
    wide = v.astype(np.float64)
    error = error_in_ulp(evaluate("one_plus_exp_minus_of", v), 1 + np.exp(-wide))
    assert (error <= np.where(wide < 1, 1.4 * (1 + np.abs(wide)), 1.1)).all()
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -89.0], np.float32)
    np.testing.assert_array_equal(evaluate("one_plus_exp_minus_of", special), [np.nan, 1.0, np.inf, 2.0, np.inf])


def test_minus_two_log(evaluate):
    near_one = 1 - np.arange(1 << 16, dtype=np.float64) * 2.0**-24
    v = np.concatenate([FLOATS[(FLOATS >= 2.0**-33) & (FLOATS <= 1)], near_one.astype(np.float32)])
    actual, exact = evaluate("minus_two_log_of", v), -2 * np.log(v.astype(np.float64))
    assert error_in_ulp(actual, exact).max() <= 1.3
    assert (actual[v == 1] == 0).all()


def test_minus_two_uniform(evaluate):
    words = np.concatenate([WORDS, np.array([0, 1, 0xFFFF, 0x10000, 0xFFFFFFFF], np.uint32)])
    exact = -2 * (words.astype(np.float64) + 1) * 2.0**-32
    assert error_in_ulp(evaluate("minus_two_uniform_of", words), exact).max() <= 1


def test_sine_and_cosine_of_turns(evaluate):
    quarters = np.array([0, 1 << 30, 1 << 31, 3 << 30], np.uint32)
    words = np.concatenate([WORDS, *(quarters + np.uint32(offset) for offset in range(4)), quarters - np.uint32(1)])
    angle = words.astype(np.float64) * (2 * np.pi * 2.0**-32)
    assert np.abs(evaluate("sine_of", words) - np.sin(angle)).max() <= 1.6e-7
    assert np.abs(evaluate("cosine_of", words) - np.cos(angle)).max() <= 2.1e-7
