"""The CUDA elementwise ops where a GPU has bounds of its own: of a grid, of 16-byte accesses, of a table."""

import pytest
import torch
from budget import NORMAL_ERROR

import dd_kernels as dd
from dd_kernels.ops.randn import noise_key

pytestmark = pytest.mark.slow  # Building the kernels for the host takes half a minute.

SCHEDULE = dd.linear_schedule(50)
TABLE, TABLE_SMALL = (dd.ddpm(SCHEDULE, 20, variance=variance) for variance in ("learned_range", "fixed_small"))
SHAPE = (3, 3, 4, 8)
# Of normals that are each within 1e-6 of the exact ones, times a factor of 1 at most, and a dozen roundings of numbers
# that lie within 6: what is at another place is of another sample or element, and as far off as these.
NEAR = 2 * NORMAL_ERROR + 12 * 6 * 2.0**-24


def arguments(op):
    """Returns all arguments that the operator takes, by name; all outputs are NaN."""
    drawn, unset = iter(torch.randn(5, *SHAPE)), iter(torch.full((2, *SHAPE), float("nan")))
    cpu = torch.device("cpu")
    if op == "randn":
        return {"z": next(unset), "key": noise_key(1, 0, 0, cpu), "stream": 0}
    if op == "q_sample":
        rows = {"rows": SCHEDULE.on(cpu).rows, "t": torch.tensor([9, 0, 49]), "key": None}
        return {"x_start": next(drawn), "noise": next(drawn), **rows, "x_t": next(unset), "noise_out": next(unset)}
    on = TABLE.on(cpu)
    inputs = {name: next(drawn) for name in ("x", "out", "variance", "uncond")}
    options = {"guidance_scale": 2.0, "noise": next(drawn), "threshold": torch.tensor([1.0, 0.7, 2.0])}
    step = {"rows": on.rows, "timesteps": on.timesteps, "step": torch.tensor([19, 0, 7]), "key": None}
    return {**inputs, **options, **step, "x_prev": next(unset), "x0": next(unset)}


def run(op, given):
    getattr(torch.ops.dd_kernels, op)(*given.values())
    return [given[name] for name in ("z", "x_t", "noise_out", "x_prev", "x0") if name in given]


@pytest.mark.parametrize("op", ["randn", "q_sample", "reverse_step"])
def test_every_sample_may_start_anywhere(host, op):
    """A sample that starts at no multiple of 16 bytes is read by elements: a vector access would end the process."""
    given = arguments(op)
    aligned = [v.clone() for v in run(op, given)]
    for name in [name for name, v in given.items() if isinstance(v, torch.Tensor) and v.shape == SHAPE]:
        x = given[name]
        first, others = torch.empty(x.numel() + 1)[1:].view(SHAPE), torch.empty(len(x), x[0].numel() + 1)[:, :-1]
        # Only the tensor that gives the layout is dense.
        for elsewhere in (first,) if name in ("z", "x_start", "x") else (first, others.view(SHAPE)):
            assert all(map(torch.equal, run(op, {**given, name: elsewhere.copy_(x)}), aligned)), name


@pytest.mark.parametrize("op", ["q_sample", "reverse_step"])
def test_an_index_beyond_the_table_gives_nan(host, op):
    """An index beyond the table gives NaN, since nothing may be read from a GPU to raise an error."""
    given = arguments(op)
    index = "t" if op == "q_sample" else "step"
    tables = [name for name in ("rows", "timesteps") if name in given]
    given |= {name: given[name][2:-2] for name in tables}  # the storage has numbers before and after the table
    given[index] = torch.tensor([-1, 5, len(given["rows"])])
    written = run(op, given)[0] if op == "q_sample" else torch.stack(run(op, given), 1)
    assert written[[0, 2]].isnan().all()
    assert written[1].isfinite().all()


def test_more_samples_than_a_grid_has_rows(host):
    x = torch.randn(65535 + 2, 1)
    for op in (
        lambda backend: dd.randn(x.shape, seed=1, backend=backend),
        lambda backend: dd.q_sample(x, 20, SCHEDULE, seed=1, backend=backend),
        lambda backend: dd.reverse_step(x, x, TABLE_SMALL, 7, seed=1, backend=backend),
    ):
        torch.testing.assert_close(op("cuda"), op("reference"), rtol=0, atol=NEAR)


@pytest.mark.parametrize(("samples", "elements"), [(4100, 130), (2050, 3080), (2050, 3328)])
def test_threads_take_turns_where_there_are_many_blocks(host, samples, elements):
    """Each thread handles several units, by elements, by vectors or in pairs; not every thread has a last one."""
    x, steps = torch.randn(samples, elements), torch.arange(samples) % 20
    for op in (
        lambda backend: dd.randn(x.shape, seed=1, backend=backend),
        lambda backend: dd.q_sample(x, steps, SCHEDULE, seed=1, backend=backend),
        lambda backend: dd.reverse_step(x, x, TABLE_SMALL, steps, seed=1, backend=backend),
    ):
        torch.testing.assert_close(op("cuda"), op("reference"), rtol=0, atol=NEAR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pixels", [64, 72])
class TestFloat32And16Bits:
    """Two threads exchange quads where a sample is a multiple of 256 elements, and not where it is none."""

    def test_inputs_of_16_bits(self, host, pixels, dtype):
        x, out, uncond, noise = (torch.randn(2, 4, pixels).to(d) for d in (torch.float32, dtype, dtype, dtype))

        def step(*inputs):
            given, guide, z = inputs
            return dd.reverse_step(x, given, TABLE_SMALL, 7, uncond=guide, guidance_scale=2.0, noise=z, backend="cuda")

        assert step(out, uncond, noise).equal(step(out.float(), uncond.float(), noise.float()))

    def test_a_state_of_16_bits(self, host, pixels, dtype):
        x, out, noise = torch.randn(3, 2, 4, pixels)
        x = x.to(dtype)

        def results(x):
            stepped = dd.reverse_step(x, out, TABLE_SMALL, 7, seed=1, return_x0=True, backend="cuda")
            return *stepped, dd.q_sample(x, 20, SCHEDULE, noise, backend="cuda")

        for result, exact in zip(results(x), results(x.float()), strict=True):
            assert result.equal(exact.to(dtype))
