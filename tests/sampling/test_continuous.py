"""A running batch of requests: the same images as one by one, and what one request does to the others."""

import copy
import gc
import queue
import random
import threading
import weakref

import pytest
import torch
from sample_bounds import assert_samples_are, bounded_sample
from torch import nn

import dd_kernels as dd
from dd_kernels import Sampler, SampleRequest
from dd_kernels.sampling import slots

SCHEDULE = dd.linear_schedule(100)
SHAPE = (3, 4, 4)
TABLES = {
    "ddim": dd.ddim(SCHEDULE, 5),
    "odd": dd.ddim(SCHEDULE, 7, eta=1.0),
    "ddpm": dd.ddpm(SCHEDULE, 6),
    "dpm++": dd.dpm_solver(SCHEDULE, 5),
    "third order": dd.dpm_solver(SCHEDULE, 7, order=3),
    "float times": dd.euler(SCHEDULE, 5, spacing="karras"),
}


class Model(nn.Module):
    """A network that looks at each sample's x, t and y alone; keeps the sizes of its batches."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.batches = []

    def forward(self, x, t, y=None, scale=1.0):
        self.batches.append(len(x))
        y = 0.0 if y is None else y[:, None, None, None]
        return torch.sin(self.weight * scale * x + t[:, None, None, None] / 100 + y)


def options_of(request):
    """Returns the arguments of dd.sample that draw what a request asks for."""
    guided = request.uncond_kwargs is not None
    options = {"uncond_kwargs": request.uncond_kwargs, "guidance_scale": request.guidance_scale} if guided else {}
    options |= {"guidance_rescale": request.guidance_rescale, "guidance_interval": request.guidance_interval}
    return options | {name: getattr(request, name) for name in ("seed", "first_sample", "model_kwargs")}


def alone(model, request):
    return dd.sample(model, (1, *SHAPE), request.table, **options_of(request))


def assert_as_alone(model, request, image):
    """Elementwise operations round alike in any batch; guidance is one fused multiply-add in the kernel alone."""
    if request.uncond_kwargs is None:
        assert torch.equal(image, alone(model, request))
        return
    exact = bounded_sample(copy.deepcopy(model).double(), (1, *SHAPE), request.table, **options_of(request))
    assert_samples_are(exact, image, alone(model, request))


def mixed_requests(count=40):
    choose = random.Random(0)
    for number in range(count):
        options = {}
        if choose.random() < 0.5:
            options["model_kwargs"] = {"y": torch.tensor([choose.random()])}
            if choose.random() < 0.5:
                options["uncond_kwargs"] = {"y": torch.zeros(1)}
                options["guidance_scale"] = choose.uniform(0, 3)
                options["guidance_rescale"] = choose.choice([0.0, 0.5])
                options["guidance_interval"] = choose.choice([None, (20, 70)])
        if choose.random() < 0.2:
            options["model_kwargs"] = {**options.get("model_kwargs", {}), "scale": choose.choice([0.5, 2.0])}
        yield SampleRequest(TABLES[choose.choice(list(TABLES))], seed=number, first_sample=number % 3, **options)


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_images_are_those_that_are_drawn_one_by_one(max_batch):
    model, requests = Model(), list(mixed_requests())
    results = dict(Sampler(model, SHAPE, max_batch=max_batch).generate(requests))
    assert max(model.batches) <= 2 * max_batch  # guidance joins both conditions to one call
    assert sorted(results) == list(range(len(requests)))
    for number, image in results.items():
        assert_as_alone(model, requests[number], image)


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("other", TABLES)
def test_any_two_samplers_run_side_by_side(name, other, ahead):
    """The first is some steps ahead, so that even and odd steps, and tables of other lengths and histories, meet."""
    model, sampler = Model(), Sampler(Model(), SHAPE)
    first, second = SampleRequest(TABLES[name], 1), SampleRequest(TABLES[other], 2)
    futures = [sampler.submit(first)]
    for _ in range(ahead):
        sampler.step()
    futures.append(sampler.submit(second))
    while sampler.step():
        pass
    for request, future in zip((first, second), futures, strict=True):
        assert_as_alone(model, request, future.result(0))


def test_a_finished_images_place_is_taken_at_the_next_step():
    model = Model()
    sampler = Sampler(model, SHAPE, max_batch=2)
    futures = [sampler.submit(SampleRequest(dd.ddim(SCHEDULE, steps), 0)) for steps in (2, 5, 3, 1)]
    done = []
    while sampler.step():
        done.append([future.done() for future in futures])
    assert model.batches == [2, 2, 2, 2, 2, 1]
    assert done == [
        [False, False, False, False],
        [True, False, False, False],
        [True, False, False, False],
        [True, False, False, False],
        [True, True, True, False],
        [True, True, True, True],
    ]


def test_requests_are_taken_as_places_become_free():
    taken = []

    def requests():
        for number in range(20):
            taken.append(number)
            yield SampleRequest(TABLES["ddim"], number)

    results = Sampler(Model(), SHAPE, max_batch=4).generate(requests())
    next(results)
    assert len(taken) == 4
    assert len(list(results)) == 19


def test_the_highest_priority_goes_first_and_of_equal_ones_the_oldest():
    sampler, order = Sampler(Model(), SHAPE, max_batch=1), []
    for number, priority in enumerate((0, 5, 0, 5, 9)):
        future = sampler.submit(SampleRequest(TABLES["ddim"], number), priority)
        future.add_done_callback(lambda _, number=number: order.append(number))
    while sampler.step():
        pass
    assert order == [4, 1, 3, 0, 2]


def test_a_queue_has_a_bound():
    sampler = Sampler(Model(), SHAPE, max_batch=1, max_queue=2)
    for number in range(2):
        sampler.submit(SampleRequest(TABLES["ddim"], number))
    with pytest.raises(queue.Full, match="max_queue=2"):
        sampler.submit(SampleRequest(TABLES["ddim"], 9))
    sampler.step()
    last = sampler.submit(SampleRequest(TABLES["ddim"], 9))
    with pytest.raises(queue.Full, match="max_queue=2"):
        sampler.submit(SampleRequest(TABLES["ddim"], 9))
    assert last.cancel()  # its place in the queue is free at once
    sampler.submit(SampleRequest(TABLES["ddim"], 9))


def test_cancelled_requests_leave_their_places_at_the_next_step():
    model = Model()
    sampler = Sampler(model, SHAPE, max_batch=2)
    futures = [sampler.submit(SampleRequest(TABLES["ddim"], number)) for number in range(4)]
    sampler.step()
    assert futures[0].cancel()  # in flight
    assert futures[2].cancel()  # waiting
    while sampler.step():
        pass
    assert model.batches == [2] * 5 + [1]
    for number in (1, 3):
        assert torch.equal(futures[number].result(0), alone(Model(), SampleRequest(TABLES["ddim"], number)))
    assert not futures[1].cancel()


class Fails(Model):
    """Raises where a sample of the batch has y above 1, and where the batch is larger than what fits."""

    fits = 100

    def forward(self, x, t, y=None, scale=1.0):
        if len(x) > self.fits:
            self.batches.append(-len(x))
            raise torch.OutOfMemoryError("CUDA out of memory")
        if (y > 1).any():
            raise ValueError("y is too large")
        return super().forward(x, t, y, scale)


def test_a_request_that_fails_leaves_the_others_right():
    model, values = Fails(), [0.1, 0.2, 5.0, 0.3, 0.4, 7.0, 0.5]
    requests = [SampleRequest(TABLES["ddpm"], i, model_kwargs={"y": torch.tensor([y])}) for i, y in enumerate(values)]
    sampler = Sampler(model, SHAPE)
    futures = [sampler.submit(request) for request in requests]
    while sampler.step():
        pass
    for request, future, y in zip(requests, futures, values, strict=True):
        if y > 1:
            with pytest.raises(ValueError, match="y is too large"):
                future.result(0)
        else:
            assert_as_alone(Model(), request, future.result(0))
    with pytest.raises(ValueError, match="y is too large"):
        list(Sampler(model, SHAPE).generate(requests))


def test_what_the_device_cannot_hold_is_drawn_in_smaller_batches():
    model, table = Fails(), TABLES["ddim"]
    model.fits = 3
    requests = [SampleRequest(table, i, model_kwargs={"y": torch.zeros(1)}) for i in range(10)]
    for number, image in Sampler(model, SHAPE).generate(requests):
        assert_as_alone(Model(), requests[number], image)
    assert [size for size in model.batches if size < 0] == [-10, -5]  # later calls keep to what has fitted
    model.fits = 0
    sampler = Sampler(model, SHAPE)
    future = sampler.submit(requests[0])
    assert sampler.step()
    with pytest.raises(torch.OutOfMemoryError):
        future.result(0)


def test_a_thread_serves_requests_of_others():
    model, requests, results = Model(), list(mixed_requests(30)), {}
    with Sampler(model, SHAPE, max_batch=4).serving() as sampler:

        def ask(numbers):
            for number in numbers:
                results[number] = sampler.submit(requests[number]).result(30)

        threads = [threading.Thread(target=ask, args=(range(i, 30, 3),)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        waiting = [sampler.submit(SampleRequest(dd.ddim(SCHEDULE, 100), n)) for n in range(9)]
    assert all(future.cancelled() or future.done() for future in waiting)
    assert waiting[-1].cancelled()
    with pytest.raises(RuntimeError, match="closed"):
        sampler.submit(requests[0])
    for number, image in results.items():
        assert_as_alone(Model(), requests[number], image)


def test_nothing_is_kept_of_what_is_drawn():
    sampler, seen = Sampler(Model(), SHAPE, max_batch=4), []
    for _ in range(3):
        for _, image in sampler.generate(mixed_requests(8)):
            seen.append(weakref.ref(image))
        del image
    slots._joined.cache_clear()
    gc.collect()
    assert not any(reference() is not None for reference in seen)
    assert (sampler._slots, sampler._waiting) == ([], [])


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "table must be a StepTable", {"table": 3}),
        (ValueError, r"guidance_rescale must lie in \[0, 1\]; got 2", {"guidance_rescale": 2}),
        (ValueError, "guidance_interval must be two timesteps, the lower one first", {"guidance_interval": (2, 1)}),
        (
            ValueError,
            r"model_kwargs\['y'\] must be a tensor \[1, ...\]; got \[2\]",
            {"model_kwargs": {"y": torch.ones(2)}},
        ),
        (ValueError, r"uncond_kwargs\['y'\] must be a tensor", {"uncond_kwargs": {"y": torch.tensor(1)}}),
        (TypeError, r"model_kwargs\['y'\] must be .* got list", {"model_kwargs": {"y": [1]}}),
    ],
)
def test_bad_requests(error, message, options):
    with pytest.raises(error, match=message):
        SampleRequest(**{"table": TABLES["ddim"], "seed": 0, **options})


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "model must be callable", {"model": 3}),
        (ValueError, "max_batch must be at least 1; got 0", {"max_batch": 0}),
        (ValueError, "max_queue must be at least 1; got 0", {"max_queue": 0}),
    ],
)
def test_bad_samplers(error, message, options):
    with pytest.raises(error, match=message):
        Sampler(**{"model": Model(), "shape": SHAPE, **options})


def test_only_requests_are_taken():
    with pytest.raises(TypeError, match="request must be a SampleRequest; got dict"):
        Sampler(Model(), SHAPE).submit({})


def test_models_in_half_precision_and_with_learned_variance():
    class Learned(nn.Linear):
        def forward(self, x, t, y=None):
            assert x.dtype is torch.bfloat16
            return torch.cat((torch.sin(x), torch.cos(x)), 1)

    model = Learned(1, 1).bfloat16()
    table = dd.ddpm(SCHEDULE, 5, variance="learned_range")
    requests = [
        SampleRequest(table, 3),
        SampleRequest(table, 4, model_kwargs={"y": None}, uncond_kwargs={"y": None}, guidance_scale=2.0),
    ]
    for number, image in Sampler(model, SHAPE).generate(requests):
        # Both outputs of the guided one are the same, so that guidance is exact.
        assert torch.equal(image, alone(model, requests[number]))
