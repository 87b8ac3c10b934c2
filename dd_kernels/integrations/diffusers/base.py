"""What this package's diffusers schedulers share: tables of their attributes, noise, one reverse_step per step."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...ops.q_sample import q_sample
from ...ops.reverse_step import reverse_step
from ...ops.upload import real
from .arguments import StepsNotSetError, as_step_count, broadcast

Generators = torch.Generator | list[torch.Generator] | None
# A scheduler drops its tables when there would be more than this, as when eta changes at every step.
MOST_TABLES = 32
# What is known of an attribute without asking its device, by name.
VALUES = {"timesteps": "_values", "sigmas": "_sigma_values"}


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


def timesteps_setter(parent: Any) -> Any:
    """Returns diffusers' ``set_timesteps``, computed on the CPU; the timesteps are then moved to ``device``."""
    method = parent.set_timesteps
    signature = inspect.signature(method)

    @functools.wraps(method)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        device = call.arguments.pop("device", None)
        steps = call.arguments.get("num_inference_steps")
        if steps is not None:
            call.arguments["num_inference_steps"] = as_step_count(steps)
        method(*call.args, **call.kwargs)
        self._place_timesteps(device)

    return set_timesteps


class FusedBase:
    """The base of the schedulers: it builds each table once, and takes a step by one :func:`dd_kernels.reverse_step`.

    A subclass says which attributes its tables are made of, and has a method per kind of table.
    """

    SOURCES: tuple[str, ...] = ()  # the attributes that tables are made of; the configuration's options are in the keys
    WATCHED = "alphas_cumprod"  # the one that users write to in place

    # Attributes that diffusers' class sets.
    config: Any
    timesteps: Tensor
    num_inference_steps: int | None

    _values: tuple[Any, ...] = ()  # the values of ``timesteps``
    _sigma_values: tuple[float, ...] = ()  # those of ``sigmas``, where the scheduler has them
    _given: Tensor  # WATCHED as it was set, on the device where it was
    _known_version = 0
    _counts_writes = False
    _seed: int | None

    def __setattr__(self, name: str, value: Any) -> None:
        """Drops the tables when an attribute is set that they are made of, in the graphs of torch.compile too."""
        super().__setattr__(name, value)
        if name == self.WATCHED:
            self._given = value
            self._watch(value)
        values = VALUES.get(name)
        if values is not None:
            before = getattr(self, values)
            object.__setattr__(self, values, tuple(value.tolist()))
            if getattr(self, values) == before:
                return
        if name in self.SOURCES:
            self._forget_tables()

    def _place_timesteps(self, device: torch.device | str | None) -> None:
        """Moves the timesteps, which set_timesteps made on the CPU, and draws the seed of their noise."""
        # Bypasses __setattr__, which would read the values back from the device; they are known already.
        object.__setattr__(self, "timesteps", self.timesteps.to(device))
        self._seed = self._drawn_seed()

    def _steps_set(self) -> int:
        """Returns the number of steps that set_timesteps was called with."""
        if self.num_inference_steps is None:
            raise StepsNotSetError("num_inference_steps must be set before step is called: call set_timesteps first")
        return self.num_inference_steps

    def _listed(self, timestep: Tensor) -> Any:
        """Returns the value of a view of ``timesteps``, as ``for t in timesteps`` hands out, of its offset; or None."""
        whole = self.timesteps
        if timestep.untyped_storage()._cdata != whole.untyped_storage()._cdata or not whole.is_contiguous():
            return None
        return self._values[timestep.storage_offset() - whole.storage_offset()]

    def _watch(self, tensor: Tensor) -> None:
        """Notes how often a tensor was written to in place; torch does not count for inference tensors."""
        self._counts_writes = not tensor.is_inference()
        self._known_version = tensor._version if self._counts_writes else 0

    def _forget_tables(self) -> None:
        self._tables: dict[tuple, Any] = {}
        self._traced = SimpleNamespace()  # the same tables as attributes, see _name_of_built

    def _built(self, key: tuple, device: torch.device) -> Any:
        """Returns the table of ``key``, uploaded to the device; ``key`` is (method without "_", its arguments)."""
        watched = getattr(self, self.WATCHED)
        if self._counts_writes and watched._version != self._known_version:
            # It was written to in place.
            self._watch(watched)
            self._given = watched
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

    def _clip(self) -> tuple | None:
        config = self.config
        if config.get("thresholding"):
            return ("threshold", config.dynamic_thresholding_ratio, config.sample_max_value)
        return ("clip", config.clip_sample_range) if config.get("clip_sample") else None

    def _noise(self, like: Tensor, generator: Generators, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Returns reverse_step's argument for the noise: the tensor that diffusers draws, or a seed."""
        if self.config.get("noise") != "philox":
            dtype = like.dtype if dtype is None else dtype
            return {"noise": randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)}
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

    def _history(self, table: Any, sample: Tensor) -> tuple[Tensor, ...]:
        """Returns where a multistep solver keeps x_0 of earlier steps."""
        raise NotImplementedError

    def _reverse(
        self,
        table: Any,
        row: int | Tensor,
        sample: Tensor,
        model_output: Tensor,
        source: dict[str, Any],
        return_x0: bool = True,
    ) -> Any:
        """Returns (previous sample, x_0), or the first alone, in the wider of the dtypes, broadcast as diffusers'."""
        noise = source.get("noise")
        sample, model_output, noise = broadcast(sample, model_output, noise, table.learned_variance)
        if sample.dtype is not model_output.dtype:
            sample = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        options: dict[str, Any] = {"noise": noise, "seed": source.get("seed")}
        if table.history:
            options["history"] = self._history(table, sample)
        return reverse_step(sample, model_output, table, row, return_x0=return_x0, **options)

    def _mixed(self, key: tuple, x: Tensor, y: Tensor, index: int | Tensor, count: int) -> Tensor:
        """Returns a x + b y, with a and b of row ``index`` of a marginal table, of ``count`` samples or more."""
        shape = torch.broadcast_shapes(x.shape, y.shape, (count, *[1] * (x.ndim - 1)))
        x = x.to(torch.promote_types(x.dtype, y.dtype))
        return q_sample(x.expand(shape), index, self._table(key, x.device), y.expand(shape))
