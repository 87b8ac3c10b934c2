"""latent-diffusion's and stable-diffusion's ``DDIMSampler`` over the ops: change the import, keep the calls.

>>> from dd_kernels.integrations.latent_diffusion import DDIMSampler
>>> samples, intermediates = DDIMSampler(model).sample(S=50, batch_size=4, shape=(4, 64, 64), conditioning=c)

The model is theirs: ``num_timesteps``, ``betas``, ``alphas_cumprod``, ``alphas_cumprod_prev``,
``apply_model(x, t, c)``, and ``q_sample``, ``first_stage_model``, ``parameterization`` where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ...ops.q_sample import q_sample
from ...ops.reverse_step import reverse_step
from .schedule import DDIMSchedule

Conditioning = Any


def _joined(uncond: Conditioning, cond: Conditioning) -> Conditioning:
    """Joins both conditionings, a tensor or a dict or list of them, to one of twice the batch."""
    if isinstance(cond, dict):
        return {key: _joined(uncond[key], cond[key]) for key in cond}
    if isinstance(cond, list):
        return [_joined(a, b) for a, b in zip(uncond, cond, strict=True)]
    return torch.cat((uncond, cond))


class DDIMSampler(DDIMSchedule):
    """DDIM (Song et al., 2021) as latent-diffusion samples with it: x_0 is not clipped, timesteps are one later.

    Noise comes from torch's global generator in the same order, also where eta is 0: the same seed gives the same
    samples to rounding. Samples are float32 for 16-bit latents, as there.
    """

    def _predict(
        self, x: Tensor, t: Tensor, c: Conditioning, scale: float, uncond: Conditioning
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the model's (conditional, unconditional) output, None without guidance."""
        if uncond is None or scale == 1.0:
            return self.model.apply_model(x, t, c), None
        both = self.model.apply_model(torch.cat((x, x)), torch.cat((t, t)), _joined(uncond, c))
        uncond_out, out = both.chunk(2)
        return out, uncond_out

    @torch.no_grad()
    def p_sample_ddim(
        self,
        x: Tensor,
        c: Conditioning,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        dynamic_threshold: None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (x_prev, x_0) from x_t at row ``index`` of the schedule, whose timestep is t [N]."""
        if dynamic_threshold is not None:
            raise NotImplementedError(
                f"dynamic_threshold must be None, as in latent-diffusion; got {dynamic_threshold!r}"
            )
        scale = unconditional_guidance_scale
        out, uncond = self._predict(x, t, c, scale, unconditional_conditioning)
        if uncond is not None and (score_corrector is not None or quantize_denoised):
            out, uncond = uncond + scale * (out - uncond), None
        if score_corrector is not None:
            if self.parameterization != "eps":
                raise ValueError("score_corrector must be None for a model that predicts v")
            out = score_corrector.modify_score(self.model, out, x, t, c, **(corrector_kwargs or {}))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        # latent-diffusion draws at every step, also where sigma is 0: later draws find the same state.
        noise = torch.randn((1 if repeat_noise else x.shape[0], *x.shape[1:]), device=x.device).expand(x.shape)
        if noise_dropout > 0:
            noise = F.dropout(noise, p=noise_dropout)
        table = self._table("sample", use_original_steps, temperature)
        given = noise if table.stochastic else None
        x_prev, x0 = reverse_step(
            x, out, table, index, uncond=uncond, guidance_scale=scale, noise=given, return_x0=True
        )
        if not quantize_denoised:
            return x_prev, x0
        x0 = self.model.first_stage_model.quantize(x0)[0]
        epsilon = self.model.predict_eps_from_z_and_v(x, t, out) if self.parameterization == "v" else out
        table = self._table("of_x0", use_original_steps, temperature)
        return reverse_step(epsilon.to(x.dtype), x0, table, index, noise=given), x0

    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Conditioning = None,
        callback: Callable[[int], None] | None = None,
        normals_sequence: object = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        dynamic_threshold: None = None,
        ucg_schedule: Sequence[float] | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Samples [batch_size, *shape]: make_schedule(S, ddim_eta=eta), then :meth:`ddim_sampling`.

        Args:
            S: number of timesteps, see :meth:`make_schedule`.
            quantize_x0: pass x_0 through ``model.first_stage_model.quantize``.
            normals_sequence, kwargs: taken and not used, as in latent-diffusion, whose log_images passes
                quantize_denoised here.
            verbose: print the timesteps, and show a bar.
        """
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        return self.ddim_sampling(
            conditioning,
            (batch_size, *shape),
            x_T=x_T,
            callback=callback,
            quantize_denoised=quantize_x0,
            mask=mask,
            x0=x0,
            img_callback=img_callback,
            log_every_t=log_every_t,
            temperature=temperature,
            noise_dropout=noise_dropout,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            dynamic_threshold=dynamic_threshold,
            ucg_schedule=ucg_schedule,
            verbose=verbose,
        )

    @torch.no_grad()
    def ddim_sampling(
        self,
        cond: Conditioning,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        dynamic_threshold: None = None,
        ucg_schedule: Sequence[float] | None = None,
        *,
        verbose: bool = True,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Samples of ``shape``, and what lies between: {"x_inter": [...], "pred_x0": [...]}.

        Args:
            cond, unconditional_conditioning: tensors, or dicts or lists of them; classifier-free guidance with
                ``unconditional_guidance_scale`` where it is not 1, or with the step's of ``ucg_schedule``.
            x_T: where to start; drawn if None.
            ddim_use_original_steps: all of the original process instead of the schedule's steps.
            timesteps: of the original process, how many, from its first; of the schedule's, one fewer than that.
            mask, x0: where the mask is 1, x is kept at x0 (diffused by ``model.q_sample``).
            temperature, noise_dropout: factor and dropout of the steps' noise.
            score_corrector: its ``modify_score`` changes epsilon.
            callback, img_callback: called with the step, and with (x_0, step), after every step.
            log_every_t: how often a state is kept.
        """
        if mask is not None and x0 is None:
            raise ValueError("x0 must be given with mask; got None")
        chosen = self._chosen(ddim_use_original_steps, timesteps)
        total = len(chosen)
        if ucg_schedule is not None and len(ucg_schedule) != total:
            raise ValueError(f"ucg_schedule must hold a scale for each of {total} steps; got {len(ucg_schedule)}")
        device, scale = self.model.betas.device, unconditional_guidance_scale
        x = torch.randn(tuple(shape), device=device) if x_T is None else x_T
        intermediates = {"x_inter": [x], "pred_x0": [x]}
        for i in tqdm(range(total), desc="DDIM Sampler", disable=not verbose):
            index = total - i - 1
            t = torch.full((shape[0],), int(chosen[index]), device=device)
            if mask is not None:
                x = self.model.q_sample(x0, t) * mask + (1.0 - mask) * x
            x, pred_x0 = self.p_sample_ddim(
                x,
                cond,
                t,
                index,
                use_original_steps=ddim_use_original_steps,
                quantize_denoised=quantize_denoised,
                temperature=temperature,
                noise_dropout=noise_dropout,
                score_corrector=score_corrector,
                corrector_kwargs=corrector_kwargs,
                unconditional_guidance_scale=scale if ucg_schedule is None else ucg_schedule[i],
                unconditional_conditioning=unconditional_conditioning,
                dynamic_threshold=dynamic_threshold,
            )
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(pred_x0, i)
            if index % log_every_t == 0 or index == total - 1:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)
        return x, intermediates

    def _chosen(self, original: bool, count: int | None) -> np.ndarray:
        """Returns the timesteps of ddim_sampling, increasing."""
        if original:
            return np.arange(self.ddpm_num_timesteps if count is None else count)
        steps = len(self.ddim_timesteps)
        return self.ddim_timesteps if count is None else self.ddim_timesteps[: int(min(count / steps, 1) * steps) - 1]

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Returns x_0 diffused to the schedule's step t [N], in one draw, eq. 4 of DDPM (Ho et al., 2020)."""
        noise = torch.randn_like(x0) if noise is None else noise
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        return q_sample(x0, t, self._forward_process(use_original_steps), noise)

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Conditioning,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Returns x_0 from the latent at the schedule's step ``t_start``, by its last ``t_start`` steps."""
        timesteps = (np.arange(self.ddpm_num_timesteps) if use_original_steps else self.ddim_timesteps)[:t_start]
        for i, index in enumerate(reversed(range(len(timesteps)))):
            t = torch.full((x_latent.shape[0],), int(timesteps[index]), device=x_latent.device)
            x_latent, _ = self.p_sample_ddim(
                x_latent,
                cond,
                t,
                index,
                use_original_steps=use_original_steps,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
            )
            if callback is not None:
                callback(i)
        return x_latent

    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        c: Conditioning,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        callback: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns the latent at the schedule's step ``t_enc`` that :meth:`decode` (eta = 0) takes back to about x_0.

        The model is asked at the schedule's timesteps (some versions of theirs: at the steps' numbers).

        Returns:
            It, and {"x_encoded": it, "intermediate_steps": [...]} with "intermediates" where
            ``return_intermediates``, about how many, is given.
        """
        if self.parameterization != "eps":
            raise ValueError("encode needs a model that predicts epsilon; got parameterization='v'")
        timesteps = np.arange(self.ddpm_num_timesteps) if use_original_steps else self.ddim_timesteps
        if not 0 <= t_enc <= len(timesteps):
            raise ValueError(f"t_enc must be in [0, {len(timesteps)}]; got {t_enc}")
        x, kept = x0, {}
        table, scale = self._table("encode", use_original_steps), unconditional_guidance_scale
        for i in range(t_enc):
            t = torch.full((x.shape[0],), int(timesteps[i]), device=x.device)
            out, uncond = self._predict(x, t, c, scale, unconditional_conditioning)
            x = reverse_step(x, out, table, i, uncond=uncond, guidance_scale=scale)
            if return_intermediates and (i % max(t_enc // return_intermediates, 1) == 0 or i >= t_enc - 2):
                kept[i] = x
            if callback is not None:
                callback(i)
        result: dict[str, Any] = {"x_encoded": x, "intermediate_steps": list(kept)}
        return x, {**result, "intermediates": list(kept.values())} if return_intermediates else result
