"""The sampling of GaussianDiffusion: single steps and whole loops of DDPM and DDIM."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...ops.randn import randn
from ...ops.reverse_step import reverse_step
from ...sampling.guidance import Model, device_of
from .process import Process, wide

Denoised = Callable[[Tensor], Tensor]
Kwargs = Mapping[str, Any]


def _last(results: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the last of the results; there is one, since a process has at least one step."""
    return collections.deque(results, maxlen=1)[0]


class Sampler(Process):
    """The sampling methods of :class:`GaussianDiffusion`."""

    def _is_fused(self, denoised_fn: Denoised | None, cond_fn: Model | None) -> bool:
        """Returns whether one reverse_step on the model's output is the whole step.

        It is not where a function changes x_0 or the mean on the way, or a subclass p_mean_variance.
        """
        untouched = type(self).p_mean_variance is Process.p_mean_variance
        return untouched and denoised_fn is None and cond_fn is None

    def _step(
        self, kind: str, x: Tensor, out: Tensor, t: Tensor, seed: int | None, first_sample: int, **table: Any
    ) -> dict[str, Tensor]:
        """Takes a step by one reverse_step, with noise from torch's generator or from the seed."""
        # guided-diffusion draws at every step, also where sigma is 0: later draws find the same state.
        noise = torch.randn_like(x) if seed is None else None
        rows = self._table(kind, **table)
        noise = noise if rows.stochastic else None
        sample, x0 = reverse_step(
            wide(x), out, rows, t, noise=noise, seed=seed, first_sample=first_sample, return_x0=True
        )
        return {"sample": sample, "pred_xstart": x0}

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs | None = None,
        *,
        seed: int | None = None,
        first_sample: int = 0,
    ) -> dict[str, Tensor]:
        """Takes a step of algorithm 2 of DDPM: returns "sample", x_{t-1}, and "pred_xstart", x_0.

        Args:
            model, x, t, clip_denoised, denoised_fn, model_kwargs: see :meth:`p_mean_variance`.
            cond_fn: cond_fn(x, t, **model_kwargs) -> gradient of log p(y | x_t), see :meth:`condition_mean`.
            seed, first_sample: noise from a seed instead of torch's generator.
        """
        if self._is_fused(denoised_fn, cond_fn):
            out, _ = self._predict(model, x, t, model_kwargs)
            return self._step("sample", x, out, t, seed, first_sample, clip=clip_denoised)
        p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        # The noise is drawn before cond_fn is called, which may draw too.
        noise = torch.randn_like(x) if seed is None else None
        mean = p["mean"] if cond_fn is None else self.condition_mean(cond_fn, p, x, t, model_kwargs)
        given = torch.cat((wide(mean), wide(p["log_variance"])), dim=1)
        table = self._table("sample_of_mean")
        sample = reverse_step(wide(x), given, table, t, noise=noise, seed=seed, first_sample=first_sample)
        return {"sample": sample, "pred_xstart": p["pred_xstart"]}

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs | None = None,
        eta: float = 0.0,
        *,
        seed: int | None = None,
        first_sample: int = 0,
    ) -> dict[str, Tensor]:
        """Takes a step of DDIM (Song et al., 2021, eq. 12), epsilon re-derived from x_0; as :meth:`p_sample`."""
        if self._is_fused(denoised_fn, cond_fn):
            kind, given = "ddim", self._predict(model, x, t, model_kwargs)[0]
        else:
            p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
            if cond_fn is not None:
                p = self.condition_score(cond_fn, p, x, t, model_kwargs)
            kind, given, clip_denoised = "ddim_of_x0", p["pred_xstart"], False
        return self._step(kind, x, given, t, seed, first_sample, clip=clip_denoised, eta=eta)

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised | None = None,
        model_kwargs: Kwargs | None = None,
        eta: float = 0.0,
        *,
        cond_fn: Model | None = None,
    ) -> dict[str, Tensor]:
        """Returns x_{t+1} from x_t by DDIM's ODE; eta must be 0, since only that path is deterministic.

        ``cond_fn`` is GLIDE's and DiT's, see :meth:`condition_score`.
        """
        if eta != 0:
            raise ValueError(f"eta must be 0 for ddim_reverse_sample; got {eta}")
        p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            p = self.condition_score(cond_fn, p, x, t, model_kwargs)
        sample = reverse_step(wide(x), p["pred_xstart"], self._table("ddim_reverse_of_x0"), t)
        return {"sample": sample, "pred_xstart": p["pred_xstart"]}

    def _progressive(
        self,
        step: Callable[..., dict[str, Tensor]],
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Denoised | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float | None = None,
        *,
        seed: int | None = None,
        first_sample: int = 0,
    ) -> Iterator[dict[str, Tensor]]:
        """Yields what ``step`` returns at t = T-1 .. 0."""
        if not isinstance(shape, (tuple, list)):
            raise TypeError(f"shape must be a tuple or list, (N, C, H, W); got {type(shape).__name__}")
        device = device_of(model) if device is None else torch.device(device)
        options: dict[str, Any] = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn}
        options |= {"model_kwargs": model_kwargs} | ({} if eta is None else {"eta": eta})
        if seed is not None:
            options |= {"seed": seed, "first_sample": first_sample}
        if noise is not None:
            x = noise
        elif seed is not None:
            x = randn(shape, seed=seed, first_sample=first_sample, device=device)
        else:
            x = torch.randn(*shape, device=device)
        timesteps = torch.arange(self.num_timesteps, device=x.device)
        for i in tqdm(range(self.num_timesteps - 1, -1, -1), disable=not progress):
            with torch.no_grad():
                result = step(model, x, timesteps[i].expand(shape[0]), **options)
            yield result
            x = result["sample"]

    def p_sample_loop_progressive(self, *args: Any, **kwargs: Any) -> Iterator[dict[str, Tensor]]:
        """Samples by DDPM, t = T-1 .. 0: yields what :meth:`p_sample` returns after every step.

        Called as p_sample_loop_progressive(model, shape, noise=None, clip_denoised=True, denoised_fn=None,
        cond_fn=None, model_kwargs=None, device=None, progress=False, *, seed=None, first_sample=0).

        Args:
            shape: (N, C, H, W) of the samples.
            noise: x_T; drawn if None, on ``device`` (the model's if None).
            progress: show a tqdm bar.
            model, clip_denoised, denoised_fn, cond_fn, model_kwargs, seed, first_sample: see :meth:`p_sample`.
        """
        return self._progressive(self.p_sample, *args, **kwargs)

    def ddim_sample_loop_progressive(self, *args: Any, **kwargs: Any) -> Iterator[dict[str, Tensor]]:
        """Samples by DDIM; as :meth:`p_sample_loop_progressive`, with :meth:`ddim_sample`, and eta after progress."""
        return self._progressive(self.ddim_sample, *args, **kwargs)

    def p_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the samples that :meth:`p_sample_loop_progressive`, which takes the same arguments, ends with."""
        return _last(self.p_sample_loop_progressive(*args, **kwargs))["sample"]

    def ddim_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the samples that :meth:`ddim_sample_loop_progressive`, which takes the same arguments, ends with."""
        return _last(self.ddim_sample_loop_progressive(*args, **kwargs))["sample"]
