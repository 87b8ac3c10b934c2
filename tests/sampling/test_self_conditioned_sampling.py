"""A model that reads x_0 of the step before: every way to draw hands it on, to an image the same in any batch."""

import copy

import pytest
import torch
from sample_bounds import assert_samples_are, bounded_sample
from torch import nn

import dd_kernels as dd
from dd_kernels import Sampler, SampleRequest
from dd_kernels.nn import UNet
from dd_kernels.ops.reverse_step import reverse_step
from dd_kernels.sampling.guidance import classifier_guided

SCHEDULE = dd.linear_schedule(100)
SHAPE = (3, 2, 4, 4)
TABLES = {
    "ddim": dd.ddim(SCHEDULE, 5),
    "ddpm": dd.ddpm(SCHEDULE, 6),
    "learned": dd.ddpm(SCHEDULE, 6, variance="learned_range"),
    "third order": dd.dpm_solver(SCHEDULE, 7, order=3),
    "float times": dd.euler(SCHEDULE, 5, spacing="karras"),
    "threshold": dd.ddim(SCHEDULE, 6, clip=dd.DynamicThreshold(0.9)),
}
Y = torch.tensor([0.1, 0.2, 0.3])
GUIDED = {"uncond_kwargs": {"y": -Y}, "guidance_scale": 2.0}


class Reader(nn.Module):
    """A network that looks at x, t, y and x_self of each sample alone."""

    self_conditioning = True

    def __init__(self, twice=False):
        super().__init__()
        self.weight, self.twice = nn.Parameter(torch.tensor(0.7)), twice

    def forward(self, x, t, y, x_self):
        h = torch.sin(self.weight * x + t[:, None, None, None] / 100 + y[:, None, None, None] + 3 * x_self)
        return torch.cat((h, h), dim=1) if self.twice else h


def draw(name="ddim", sample=dd.sample, y=Y, shape=SHAPE, **options):
    return sample(Reader(name == "learned"), shape, TABLES[name], seed=3, model_kwargs={"y": y}, **options)


@pytest.mark.parametrize("guidance", [{}, GUIDED])
@pytest.mark.parametrize("name", TABLES)
@torch.no_grad()
def test_the_estimate_is_x_0_of_the_step_before(name, guidance):
    """A loop written out: zeros at first, then x_0 that the step took, guided and clipped."""
    model, table = Reader(name == "learned"), TABLES[name]
    x = dd.randn(SHAPE, seed=3)
    x_self, history, found = torch.zeros(SHAPE), table.history_like(x), []
    for index, t in enumerate(table.model_times):
        t = t.expand(len(x)).to(table.on(x.device).times.dtype)
        out, uncond = model(x, t, Y, x_self), model(x, t, -Y, x_self) if guidance else None
        scale = {"uncond": uncond, "guidance_scale": 2.0} if guidance else {}
        x, x_self = reverse_step(x, out, table, index, seed=3, history=history, return_x0=True, **scale)
        found.append(x)
    steps = list(draw(name, dd.sample_progressive, **guidance))
    for step, expected in zip(steps, found, strict=True):
        assert torch.equal(step.x, expected)
    assert torch.equal(draw(name, **guidance), steps[-1].x)


@pytest.mark.parametrize("name", TABLES)
def test_an_image_does_not_depend_on_its_batch(name):
    whole = draw(name)
    assert torch.equal(draw(name, batch_size=2), whole)
    assert torch.equal(draw(name, y=Y[1:], shape=(2, *SHAPE[1:]), first_sample=1), whole[1:])


@pytest.mark.parametrize("guidance", [{}, GUIDED])
@pytest.mark.parametrize("name", TABLES)
def test_a_captured_loop_hands_it_on_too(name, guidance, graphs_on_cpu):
    model = Reader(name == "learned")
    options = {"seed": 3, "model_kwargs": {"y": Y}, **guidance}
    expected = dd.sample(model, SHAPE, TABLES[name], cuda_graph=False, **options)
    for _ in range(2):  # the second loop begins with zeros again
        assert torch.equal(dd.sample(model, SHAPE, TABLES[name], **options), expected)
    assert graphs_on_cpu.captures == 1


def test_a_loop_that_goes_on_without_its_capture_hands_it_on(graphs_on_cpu):
    def run(cuda_graph):
        def callback(step):
            if step.index == 2:
                model.twice = False

        model = Reader()
        model.twice = 0
        return dd.sample(
            model, SHAPE, TABLES["ddpm"], seed=0, model_kwargs={"y": Y}, callback=callback, cuda_graph=cuda_graph
        )

    assert torch.equal(run("auto"), run(False))
    assert graphs_on_cpu.replays == 3


@pytest.mark.parametrize("guided", [False, True])
def test_a_running_batch_hands_it_on_to_each_image(guided):
    model = Reader()
    names = ("ddim", "ddpm", "third order")
    sampler, images = Sampler(model, SHAPE[1:], max_batch=2), []
    for i, name in enumerate(names):
        at = {"seed": 5, "first_sample": i, "model_kwargs": {"y": Y[i : i + 1]}}
        at |= {"uncond_kwargs": {"y": -Y[i : i + 1]}, "guidance_scale": 2.0} if guided else {}
        exact = bounded_sample(copy.deepcopy(model).double(), (1, *SHAPE[1:]), TABLES[name], **at)
        images.append((sampler.submit(SampleRequest(TABLES[name], **at)), exact))
    while sampler.step():
        pass
    for image, exact in images:
        assert_samples_are(exact, image.result())


def test_a_loop_may_begin_with_an_estimate():
    """The first of two loops that share the steps gives the second one its last x_0."""
    table, at = TABLES["ddim"], {"seed": 3}
    (*_, last) = dd.sample_progressive(Reader(), SHAPE, table[:2], model_kwargs={"y": Y}, **at)
    rest = {"y": Y, "x_self": last.x0}
    assert torch.equal(dd.sample(Reader(), last.x, table[2:], model_kwargs=rest, batch_size=2, **at), draw())
    nothing = {"y": Y, "x_self": None}
    assert torch.equal(dd.sample(Reader(), SHAPE, table, model_kwargs=nothing, **at), draw())


def test_inpainting_hands_it_on_between_its_moves():
    """With nothing known it is a sample; with resampling an image does not depend on its batch."""
    everything, images, seen = torch.ones(4, 4, dtype=torch.bool), torch.zeros(SHAPE), []

    def painted(mask=everything, **options):
        return dd.inpaint(Reader(), images, mask, TABLES["ddpm"], SCHEDULE, seed=3, model_kwargs={"y": Y}, **options)

    assert torch.equal(painted(callback=seen.append), draw("ddpm"))
    assert len(seen) == len(TABLES["ddpm"])
    again = {"mask": torch.eye(4, dtype=torch.bool), "resample": 2, "jump": 2}
    assert torch.equal(painted(**again), painted(**again, batch_size=2))


def test_guidance_by_a_classifier_leaves_the_estimate_to_the_model():
    """A classifier that knows nothing changes nothing."""

    def log_probability(x, t, y):
        return 0 * x.flatten(1).sum(1)

    guided = classifier_guided(Reader(), log_probability, SCHEDULE)
    assert torch.equal(dd.sample(guided, SHAPE, TABLES["ddim"], seed=3, model_kwargs={"y": Y}), draw())


def test_the_network_reads_the_estimate():
    torch.manual_seed(0)
    options = {"image_size": 8, "in_channels": 1, "channels": (8,), "num_groups": 4, "middle_attention": False}
    model = UNet(**options, self_conditioning=True, learn_variance=True).eval()
    nn.init.normal_(model.conv_out.weight)
    x, estimate = torch.randn(2, 2, 1, 8, 8)
    t = torch.tensor([3, 5])
    assert torch.equal(model(x, t), model(x, t, x_self=torch.zeros_like(x)))
    assert (model(x, t, x_self=estimate) != model(x, t)).any()
    assert model(x[:0], t[:0]).shape == (0, 2, 8, 8)  # what a process asks that has no image of the half
    assert model.bfloat16()(x, t, x_self=estimate).dtype is torch.bfloat16
    with pytest.raises(ValueError, match=r"x_self must have the shape of x, \[2, 1, 8, 8\]; got \[1, 1, 8, 8\]"):
        model(x, t, x_self=estimate[:1])
    with pytest.raises(ValueError, match="x_self must be None: the model has no self-conditioning"):
        UNet(**options)(x, t, x_self=estimate)
