"""What this package's diffusers schedulers share; the schedulers themselves are in ``diffusers``."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..ops import q_sample, reverse_step
from . import diffusers_rows as rows

Generators = torch.Generator | list[torch.Generator] | None
Timestep = int | Tensor


def constructor(parent: type) -> Callable[..., None]:
    """diffusers' constructor with one more option; from_config reads the options in its signature."""

    def __init__(self: Any, *args: Any, noise: str = "generator", **kwargs: Any) -> None:
        if noise not in ("generator", "philox"):
            raise ValueError(f"noise must be 'generator' or 'philox'; got {noise!r}")
        parent.__init__(self, *args, **kwargs)
        self._tables: dict[tuple, Any] = {}
        self._sources: tuple[Tensor, ...] = ()
        self._host: tuple[Tensor | None, list[int], bool] = (None, [], False)
        self._seed: int | None = None
        if noise != "generator":
            self.register_to_config(noise=noise)

    signature = inspect.signature(parent.__init__)
    option = inspect.Parameter("noise", inspect.Parameter.KEYWORD_ONLY, default="generator", annotation=str)
    parameters = list(signature.parameters.values())
    place = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    __init__.__signature__ = signature.replace(parameters=[*parameters[:place], option, *parameters[place:]])
    return __init__


class FusedScheduler:
    """What the four share: timesteps known without asking the device, tables that are built once, one step."""

    # Timesteps.

    def _place_timesteps(self, device: torch.device | str | None) -> None:
        """Ends set_timesteps, which ran on the CPU: notes the values before they go to the device."""
        values = self.timesteps.tolist()
        self.timesteps = self.timesteps.to(device)
        self._host = (self.timesteps, values, -1 in values)
        self._tables.clear()
        self._seed = self._drawn_seed()

    def _values(self) -> list[int]:
        """The values of ``self.timesteps``; read from the device only where somebody else has put them there."""
        if self._host[0] is not self.timesteps:
            values = self.timesteps.tolist()
            self._host = (self.timesteps, values, -1 in values)
        return self._host[1]

    def _ends_below_0(self) -> bool:
        """Whether timestep -1 is among the timesteps, as in some of diffusers' "trailing" spacings."""
        self._values()
        return self._host[2]

    def _all_timesteps(self) -> Tensor:
        """The timestep of each row of a table: 0 .. T-1, and -1 where it is needed."""
        steps = torch.arange(len(self.alphas_cumprod))
        return torch.cat((steps, torch.tensor([-1]))) if self._ends_below_0() else steps

    def _value(self, timestep: Timestep) -> int | None:
        """A timestep as an int; None for a tensor whose value only the device knows.

        The loop ``for t in scheduler.timesteps`` hands out views of ``timesteps``, which tell their place.
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
        return self._values()[timestep.storage_offset() - whole.storage_offset()]

    def _row(self, timestep: Timestep, value: int | None, device: torch.device) -> int | Tensor:
        """The table's row of a timestep."""
        below, steps = self._ends_below_0(), len(self.alphas_cumprod)
        if value is None:
            return timestep.remainder(steps + 1) if below else timestep
        if torch.compiler.is_compiling():
            # As a tensor, so that another timestep is not another graph.
            return torch.full((1,), value, device=device) % (steps + 1)
        if not -below <= value < steps:
            raise ValueError(f"timestep must be in [{-below}, {steps}); got {value}")
        return value % (steps + 1)

    # Tables.

    @torch.compiler.assume_constant_result
    def _build(self, key: tuple, device: torch.device) -> bool:
        """Sees that ``self._tables`` holds ``key`` on the device; under torch.compile this runs while tracing."""
        sources = (self.alphas_cumprod, self._before_first(), self.timesteps)
        if not self._sources or any(a is not b for a, b in zip(sources, self._sources, strict=True)):
            self._tables.clear()
            self._sources = sources
        if key not in self._tables:
            kind, *options = key
            self._tables[key] = getattr(self, f"_{kind}")(*options)
        self._tables[key].on(device)
        return True

    def _table(self, key: tuple, device: torch.device) -> Any:
        if torch.compiler.is_compiling():
            # What a set holds is a constant of the graph; a number on its own may be an input of it.
            key = tuple([list({option})[0] for option in key])  # noqa: RUF015
        self._build(key, device)
        return self._tables[key]

    def _before_first(self) -> Tensor:
        """alpha_bar before timestep 0."""
        return self.one

    def _alpha_bar(self, timesteps: Tensor) -> Tensor:
        """alpha_bar at ``timesteps``; below 0, before the first."""
        alpha_bar = self.alphas_cumprod.cpu()
        return torch.where(timesteps >= 0, alpha_bar[timesteps.clamp(min=0)], self._before_first().cpu())

    def _alpha_bar_of_rows(self) -> Tensor:
        """alpha_bar of each row; theirs for timestep -1 is, by Python's indexing, that of T - 1."""
        return self.alphas_cumprod.cpu()[self._all_timesteps()]

    def _stride(self) -> int:
        """How far DDIM steps, whatever the list of timesteps says."""
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps must be set before step is called: call set_timesteps first")
        return self.config.num_train_timesteps // self.num_inference_steps

    def _clip(self) -> tuple | None:
        config = self.config
        if config.get("thresholding"):
            return ("threshold", config.dynamic_thresholding_ratio, config.sample_max_value)
        return ("clip", config.clip_sample_range) if config.clip_sample else None

    # The step.

    def _noise(self, like: Tensor, generator: Generators) -> dict[str, Any]:
        """Where reverse_step takes its noise from: diffusers' tensor, or a seed."""
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
        """Of the steps' noise where no generator is given, until set_timesteps: torch.manual_seed decides."""
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
        """(previous sample, x_0), in the wider of the two dtypes as in diffusers."""
        sample = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        row = self._row(timestep, value, sample.device)
        table = self._table(key, sample.device)
        return reverse_step(sample, model_output, table, row, return_x0=True, **source)

    def _ancestral_step(
        self, key: tuple, timestep: Timestep, sample: Tensor, model_output: Tensor, generator: Generators
    ) -> tuple[Tensor, Tensor]:
        """A step of DDPM: the variance may be learned, timestep 0 has no noise. Both end the table's key."""
        value = self._value(timestep)
        # Of a timestep that only the device knows, noise is drawn, and left out by the row of timestep 0.
        draws = value is None or value > 0
        channels = sample.shape[1]
        can_learn = self.variance_type in ("learned", "learned_range")
        learned = can_learn and model_output.shape[1] == 2 * channels
        if can_learn and draws and not learned:
            raise ValueError(
                f"model_output must have {2 * channels} channels, half of them the variance, for "
                f"variance_type={self.variance_type!r}; got {model_output.shape[1]}"
            )
        if learned and self.variance_type == "learned":
            # Theirs is the variance itself, the ops' its logarithm.
            model_output = torch.cat((model_output[:, :channels], model_output[:, channels:].log()), dim=1)
        source = self._noise(model_output[:, :channels], generator) if draws else {}
        return self._advance((*key, learned, draws), timestep, value, sample, model_output, source)

    # The forward process.

    def _diffused(self, sign: int, x: Tensor, y: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar) x + sign sqrt(1 - alpha_bar) y, broadcast as diffusers does."""
        table = self._table(("marginal", sign), x.device)
        self._move_alphas_cumprod(x.device)
        timesteps = timesteps.flatten()
        shape = torch.broadcast_shapes(x.shape, y.shape, (len(timesteps), *[1] * (x.ndim - 1)))
        x = x.to(torch.promote_types(x.dtype, y.dtype))
        return q_sample(x.expand(shape), timesteps, table, y.expand(shape))

    def _move_alphas_cumprod(self, device: torch.device) -> None:
        """As in diffusers, whose users index it there afterwards. The tables stay what they are."""
        moved = self.alphas_cumprod.to(device)
        if moved is not self.alphas_cumprod:
            self.alphas_cumprod = moved
            self._sources = (moved, *self._sources[1:])

    def _marginal(self, sign: int) -> rows.Marginal:
        return rows.Marginal(self.alphas_cumprod.cpu(), sign)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) original_samples + sqrt(1 - alpha_bar_t) noise, see :func:`dd_kernels.q_sample`."""
        return self._diffused(1, original_samples, noise, timesteps)


class FusedSchedulerWithVelocity(FusedScheduler):
    """With the velocity, which diffusers gives to DDPM and DDIM alone."""

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) sample: v of Salimans & Ho (2022)."""
        return self._diffused(-1, noise, sample, timesteps)
