"""The base of this package's diffusers schedulers: timesteps, tables, noise, one reverse_step per step."""

from __future__ import annotations

import inspect
import operator
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...ops.q_sample import q_sample
from ...ops.reverse_step import reverse_step
from ...ops.upload import real
from . import rows
from .arguments import (
    ShapeError,
    StepsNotSetError,
    Timestep,
    TimestepValueError,
    broadcast,
    check_values,
)

Generators = torch.Generator | list[torch.Generator] | None
# A scheduler drops its tables when there would be more than this, as when eta changes at every step.
MOST_TABLES = 32
# The attributes that tables are made of; the options of the configuration are in the tables' keys.
SOURCES = ("betas", "alphas", "alphas_cumprod", "one", "final_alpha_cumprod", "initial_alpha_cumprod", "timesteps")


def constructor(parent: Any) -> Any:
    """Returns diffusers' constructor with the option ``noise``, which from_config finds in its signature."""

    def __init__(self: Any, *args: Any, noise: str = "generator", **kwargs: Any) -> None:
        if noise not in ("generator", "philox"):
            raise ValueError(f"noise must be 'generator' or 'philox'; got {noise!r}")
        parent.__init__(self, *args, **kwargs)
        self.__module__ = parent.__module__  # what a saved pipeline names: it then loads without this package
        self._seed = None
        if noise != "generator":
            self.register_to_config(noise=noise)

    signature = inspect.signature(parent.__init__)
    option = inspect.Parameter("noise", inspect.Parameter.KEYWORD_ONLY, default="generator", annotation=str)
    parameters = list(signature.parameters.values())
    place = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:place], option, *parameters[place:]]
    )
    return __init__


class FusedScheduler:
    """The base of the schedulers, mixed into diffusers' class of the same name.

    It knows the values of ``timesteps`` without asking the device, builds each table once, and takes a step by one
    :func:`dd_kernels.reverse_step`.
    """

    # Attributes that diffusers' class sets.
    config: Any
    timesteps: Tensor
    num_inference_steps: int | None
    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    one: Tensor
    variance_type: str

    _values: tuple[int, ...] = ()  # the values of ``timesteps``
    _known_version = 0
    _counts_writes = False
    _seed: int | None

    def __setattr__(self, name: str, value: Any) -> None:
        """Drops the tables when an attribute is set that they are made of, in the graphs of torch.compile too."""
        super().__setattr__(name, value)
        if name == "alphas_cumprod":
            self._given_alphas_cumprod = value  # stays on its device when add_noise moves alphas_cumprod
            self._watch(value)
        if name == "timesteps":
            before, self._values = self._values, tuple(value.tolist())
            if self._values == before:
                return
        if name in SOURCES:
            self._forget_tables()

    def _place_timesteps(self, device: torch.device | str | None) -> None:
        """Moves the timesteps, which set_timesteps made on the CPU, and draws the seed of their noise."""
        # Bypasses __setattr__, which would read the values back from the device; they are known already.
        object.__setattr__(self, "timesteps", self.timesteps.to(device))
        self._seed = self._drawn_seed()

    def _ends_below_0(self) -> bool:
        """Returns whether timestep -1 is among the timesteps, as in some of diffusers' "trailing" spacings."""
        return -1 in self._values[:1] + self._values[-1:]

    def _all_timesteps(self) -> Tensor:
        """Returns the timestep of each row of a table: 0 .. T-1, and -1 where ``timesteps`` has it."""
        steps = torch.arange(len(self.alphas_cumprod))
        return torch.cat((steps, torch.tensor([-1]))) if self._ends_below_0() else steps

    def _value(self, timestep: Timestep) -> int | None:
        """Returns a timestep as an int, or None for a tensor whose value only the device knows.

        The loop ``for t in scheduler.timesteps`` hands out views of ``timesteps``: their offset tells their value.
        """
        if not isinstance(timestep, Tensor):
            return timestep if torch.compiler.is_compiling() else operator.index(timestep)
        if torch.compiler.is_compiling() or timestep.numel() != 1:
            return None
        if timestep.device.type == "cpu":
            return operator.index(timestep)
        whole = self.timesteps
        if timestep.untyped_storage()._cdata != whole.untyped_storage()._cdata or not whole.is_contiguous():
            return None
        return self._values[timestep.storage_offset() - whole.storage_offset()]

    def _row(self, timestep: Timestep, value: int | None, device: torch.device) -> int | Tensor:
        """Returns the table's row of a timestep: t itself, T for timestep -1."""
        below, steps = self._ends_below_0(), len(self.alphas_cumprod)
        if value is None:
            if isinstance(timestep, Tensor) and timestep.is_cpu and not torch.compiler.is_compiling():
                check_values(timestep, -below, steps)
            return timestep % (steps + 1) if below else timestep
        if torch.compiler.is_compiling():
            # As a tensor, so that another timestep is not another graph.
            return torch.full((1,), value, device=device) % (steps + 1)
        if not -below <= value < steps:
            raise TimestepValueError(f"timestep must be in [{-below}, {steps}); got {value}")
        return value % (steps + 1)

    def _watch(self, alphas_cumprod: Tensor) -> None:
        """Returns how often a tensor was written to in place; torch does not count for inference tensors."""
        self._counts_writes = not alphas_cumprod.is_inference()
        self._known_version = alphas_cumprod._version if self._counts_writes else 0

    def _forget_tables(self) -> None:
        self._tables: dict[tuple, Any] = {}
        self._traced = SimpleNamespace()  # the same tables as attributes, see _name_of_built

    def _built(self, key: tuple, device: torch.device) -> Any:
        """Returns the table of ``key``, uploaded to the device; ``key`` is (method without "_", its arguments)."""
        if self._counts_writes and self.alphas_cumprod._version != self._known_version:
            # It was written to in place.
            self._watch(self.alphas_cumprod)
            self._given_alphas_cumprod = self.alphas_cumprod
            self._forget_tables()
        if len(self._tables) >= MOST_TABLES and key not in self._tables:
            self._forget_tables()
        if key not in self._tables:
            kind, *options = key
            self._tables[key] = real(lambda: getattr(self, f"_{kind}")(*options))
        self._tables[key].on(device)
        return self._tables[key]

    @torch.compiler.assume_constant_result
    def _name_of_built(self, key: tuple, device: torch.device) -> str:
        """Builds a table and stores it as an attribute.

        While it traces, torch.compile sees new attributes, but not new entries of a dict.
        """
        table, name = self._built(key, device), repr(key).replace(".", "_")  # an attribute has no dot
        setattr(self._traced, name, table)
        return name

    def _table(self, key: tuple, device: torch.device) -> Any:
        if not torch.compiler.is_compiling():
            return self._built(key, device)
        # torch.compile takes a number of a tuple as an input of the graph, but what a set holds as a constant.
        key = tuple([list({option})[0] for option in key])  # noqa: RUF015
        name = self._name_of_built(key, device)
        return getattr(self._traced, name)

    def _before_first(self) -> Tensor:
        """Returns alpha_bar before timestep 0."""
        return self.one

    def _alpha_bar(self, timesteps: Tensor) -> Tensor:
        """Returns alpha_bar at ``timesteps``, and that before the first for those below 0."""
        alpha_bar = self._given_alphas_cumprod.cpu()
        return torch.where(timesteps >= 0, alpha_bar[timesteps.clamp(min=0)], self._before_first().cpu())

    def _alpha_bar_of_rows(self) -> Tensor:
        """Returns alpha_bar of each row; for timestep -1 theirs is, by Python's indexing, that of T - 1."""
        return self._given_alphas_cumprod.cpu()[self._all_timesteps()]

    def _stride(self) -> int:
        """Returns how far DDIM steps: T // N, whatever the list of timesteps says."""
        if self.num_inference_steps is None:
            raise StepsNotSetError("num_inference_steps must be set before step is called: call set_timesteps first")
        return self.config.num_train_timesteps // self.num_inference_steps

    def _clip(self) -> tuple | None:
        config = self.config
        if config.get("thresholding"):
            return ("threshold", config.dynamic_thresholding_ratio, config.sample_max_value)
        return ("clip", config.clip_sample_range) if config.clip_sample else None

    def _noise(self, like: Tensor, generator: Generators) -> dict[str, Any]:
        """Returns reverse_step's argument for the noise: the tensor that diffusers draws, or a seed."""
        if self.config.get("noise") != "philox":
            return {"noise": randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)}
        if isinstance(generator, list) and len(generator) == 1:
            generator = generator[0]
        if isinstance(generator, list):
            raise ValueError(
                "generator must be one torch.Generator with noise='philox', where image n of a seed is the same "
                f"in any batch; got a list of {len(generator)}"
            )
        if generator is not None:
            return {"seed": generator.initial_seed() % 2**64}
        if self._seed is None:
            self._seed = self._drawn_seed()
        return {"seed": self._seed}

    def _drawn_seed(self) -> int | None:
        """Draws the seed of the steps' noise where no generator is given, from torch's global generator.

        It holds until set_timesteps is called again.
        """
        return int(torch.randint(2**63 - 1, ())) if self.config.get("noise") == "philox" else None

    def _advance(
        self,
        key: tuple,
        timestep: Timestep,
        value: int | None,
        sample: Tensor,
        model_output: Tensor,
        source: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Returns (previous sample, x_0) by the row of a timestep in the table of a key."""
        row = self._row(timestep, value, sample.device)
        return self._reverse(self._table(key, sample.device), row, sample, model_output, source)

    def _reverse(
        self, table: Any, row: int | Tensor, sample: Tensor, model_output: Tensor, source: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Returns (previous sample, x_0), in the wider of the two dtypes and broadcast as in diffusers."""
        noise = source.get("noise")
        sample, model_output, noise = broadcast(sample, model_output, noise, table.learned_variance)
        if sample.dtype is not model_output.dtype:
            sample = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        return reverse_step(sample, model_output, table, row, return_x0=True, noise=noise, seed=source.get("seed"))

    def _ancestral_noise(
        self, value: int | None, sample: Tensor, model_output: Tensor, generator: Generators
    ) -> tuple[Tensor, bool, dict[str, Any]]:
        """Prepares a step of DDPM: (model_output, whether the variance is learned, reverse_step's noise argument).

        Timestep 0 has no noise. For a timestep whose value only the device knows noise is drawn, and the row of
        timestep 0 leaves it out.
        """
        draws = value is None or value > 0
        channels = sample.shape[1]
        can_learn = self.variance_type in ("learned", "learned_range")
        learned = can_learn and model_output.shape[1] == 2 * channels
        if can_learn and draws and not learned:
            raise ShapeError(
                f"model_output must have {2 * channels} channels, half of them the variance, for "
                f"variance_type={self.variance_type!r}; got {model_output.shape[1]}"
            )
        if learned and self.variance_type == "learned":
            # diffusers' model gives the variance itself, reverse_step takes its logarithm.
            model_output = torch.cat((model_output[:, :channels], model_output[:, channels:].log()), dim=1)
        return model_output, learned, self._noise(model_output[:, :channels], generator) if draws else {}

    def _diffused(self, sign: int, x: Tensor, y: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar) x + sign sqrt(1 - alpha_bar) y, broadcast as diffusers does."""
        table = self._table(("marginal", sign), x.device)
        self._move_alphas_cumprod(x.device)
        timesteps = timesteps.flatten()
        shape = torch.broadcast_shapes(x.shape, y.shape, (len(timesteps), *[1] * (x.ndim - 1)))
        x = x.to(torch.promote_types(x.dtype, y.dtype))
        return q_sample(x.expand(shape), timesteps, table, y.expand(shape))

    def _move_alphas_cumprod(self, device: torch.device) -> None:
        """Moves alphas_cumprod as diffusers does, whose users index it there afterwards; the tables stay."""
        if self.alphas_cumprod.device != device:
            object.__setattr__(self, "alphas_cumprod", self.alphas_cumprod.to(device))
            self._watch(self.alphas_cumprod)

    def _marginal(self, sign: int) -> rows.Marginal:
        return rows.Marginal(self._given_alphas_cumprod.cpu(), sign)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) original_samples + sqrt(1 - alpha_bar_t) noise, see :func:`dd_kernels.q_sample`."""
        return self._diffused(1, original_samples, noise, timesteps)


class FusedSchedulerWithVelocity(FusedScheduler):
    """Adds the velocity, which diffusers gives to DDPM and DDIM alone."""

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) sample: v of Salimans & Ho (2022)."""
        return self._diffused(-1, noise, sample, timesteps)
