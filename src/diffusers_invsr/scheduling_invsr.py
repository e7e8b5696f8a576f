"""The schedules of InvSR: a DDIM scheduler that starts in the middle of the diffusion process."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  (diffusers looks it up in this module)
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from .checks import is_integer


logger = logging.get_logger(__name__)

# Steps are counted from 1 here, as in the paper: step 200 is schedule index 199.
START_TIMESTEPS = (250, 200, 150, 100)
TIMESTEP_GRID = (250, 200, 150, 100, 50)
MAX_TIMESTEP = 250
PUBLISHED_SCHEDULES = {
    1: (200,),
    2: (200, 100),
    3: (200, 100, 50),
    4: (200, 150, 100, 50),
    5: (250, 200, 150, 100, 50),
}


def published_schedule(num_steps: int) -> list[int]:
    r"""
    Steps of the published `num_steps`-step schedule, counted from 1, in descending order.

    Args:
        num_steps (`int`): Number of steps, from 1 to 250. Beyond 5 they are `250 * (1 - i / num_steps)`, rounded down.

    Returns:
        `list[int]`: `num_steps` steps.

    Raises:
        ValueError: If `num_steps` is not from 1 to 250.
    """
    if not is_integer(num_steps) or not 1 <= num_steps <= MAX_TIMESTEP:
        raise ValueError(f"`num_steps` must be an integer from 1 to {MAX_TIMESTEP}, got {num_steps!r}.")
    if num_steps in PUBLISHED_SCHEDULES:
        return list(PUBLISHED_SCHEDULES[num_steps])
    return [MAX_TIMESTEP * (num_steps - i) // num_steps for i in range(num_steps)]


def starting_schedule(num_steps: int, start_timestep: int) -> list[int]:
    r"""
    Steps of a `num_steps`-step schedule from a chosen start, counted from 1, in descending order.

    This is the published schedule where that one starts there. Otherwise the steps are spread evenly from the start
    down to 50: over the grid 250, 200, 150, 100, 50 while it has enough points (250 in 3 steps: 250, 150, 50), else
    over the integers.

    Args:
        num_steps (`int`): Number of steps.
        start_timestep (`int`): First step, one of 250, 200, 150, 100.

    Returns:
        `list[int]`: `num_steps` steps.

    Raises:
        ValueError: If the start is not one of the four, or if there are not `num_steps` integers to choose from.
    """
    if not is_integer(start_timestep) or start_timestep not in START_TIMESTEPS:
        raise ValueError(f"`start_timestep` must be one of {START_TIMESTEPS}, got {start_timestep!r}.")
    published = published_schedule(num_steps)
    if published[0] == start_timestep:
        return published
    if num_steps == 1:
        return [start_timestep]
    grid = [start_timestep, *(step for step in TIMESTEP_GRID if step < start_timestep)]
    candidates = grid if num_steps <= len(grid) else list(range(start_timestep, grid[-1] - 1, -1))
    if num_steps > len(candidates):
        raise ValueError(
            f"`num_steps` must be at most {len(candidates)} with `start_timestep={start_timestep}`, got {num_steps}."
        )
    last = len(candidates) - 1
    return [candidates[round(i * last / (num_steps - 1))] for i in range(num_steps)]


def check_timesteps(timesteps: Sequence[int], num_steps: int | None = None) -> list[int]:
    r"""
    Check a schedule given by hand.

    Args:
        timesteps (`Sequence[int]`): Steps counted from 1.
        num_steps (`int`, *optional*): Number of steps that was asked for beside them.

    Returns:
        `list[int]`: The steps.

    Raises:
        ValueError: If they are not strictly descending integers in 1 ... 250, or not `num_steps` many.
    """
    steps = timesteps.tolist() if isinstance(timesteps, (np.ndarray, torch.Tensor)) else timesteps
    if not isinstance(steps, (list, tuple, range)) or not steps or not all(is_integer(step) for step in steps):
        raise ValueError(f"`timesteps` must be a list of one or more integers, got {timesteps!r}.")
    steps = [int(step) for step in steps]
    if not all(1 <= step <= MAX_TIMESTEP for step in steps):
        raise ValueError(f"`timesteps` must be from 1 to {MAX_TIMESTEP} (counted as in the paper), got {steps}.")
    if any(later >= earlier for earlier, later in zip(steps, steps[1:])):
        raise ValueError(f"`timesteps` must descend strictly, got {steps}.")
    if num_steps is not None and num_steps != len(steps):
        raise ValueError(f"`num_steps={num_steps}` contradicts `timesteps={steps}`, which has {len(steps)} steps.")
    return steps


class InvSRScheduler(DDIMScheduler):
    r"""
    DDIM over an arbitrary descending list of steps that starts at step 250 or later, as InvSR samples (section 3 of
    the [InvSR paper](https://arxiv.org/abs/2412.09013)).

    It differs from [`~diffusers.DDIMScheduler`] in `set_timesteps` (which chooses the published schedules) and in the
    previous step of `step`, which is the next one of the schedule rather than a fixed stride away. The defaults are
    SD-Turbo's diffusion process, and its `EulerDiscreteScheduler` file loads as it is. `from_config` of a scheduler
    that was made with its own defaults gets ours in their place, as between all schedulers of diffusers.

    Args:
        num_train_timesteps (`int`, defaults to 1000): Steps of the whole diffusion process.
        beta_start (`float`, defaults to 0.00085): First beta.
        beta_end (`float`, defaults to 0.012): Last beta.
        beta_schedule (`str`, defaults to `"scaled_linear"`): `"linear"`, `"scaled_linear"` or `"squaredcos_cap_v2"`.
        trained_betas (`list[float]`, *optional*): The betas themselves, instead of the three above.
        clip_sample (`bool`, defaults to `False`): Whether to clip the predicted clean sample.
        set_alpha_to_one (`bool`, defaults to `True`):
            Kept for compatibility; without effect here, where the last step goes to an alpha product of 1 (SD-Turbo's
            file has `False`, left from another scheduler).
        steps_offset (`int`, defaults to 1): Kept for compatibility with other schedulers; without effect here.
        prediction_type (`str`, defaults to `"epsilon"`): `"epsilon"`, `"sample"` or `"v_prediction"`.
        thresholding (`bool`, defaults to `False`): Whether to use dynamic thresholding.
        dynamic_thresholding_ratio (`float`, defaults to 0.995): Its ratio.
        clip_sample_range (`float`, defaults to 1.0): Bound of `clip_sample`.
        sample_max_value (`float`, defaults to 1.0): Bound of `thresholding`.
        timestep_spacing (`str`, defaults to `"trailing"`): Kept for compatibility; without effect here.
        rescale_betas_zero_snr (`bool`, defaults to `False`): Whether the betas are rescaled to zero terminal SNR.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 1,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["leading", "trailing", "linspace"] = "trailing",
        rescale_betas_zero_snr: bool = False,
    ):
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        # `from_config` of another class would put its own defaults in place of ours (a clipped sample, other betas).
        self.register_to_config(_use_default_values=[])
        self.final_alpha_cumprod = torch.tensor(1.0)
        # Fixed from here on. `add_noise` moves the tensor to a device, and reading it there would wait for the device
        self._alphas = self.alphas_cumprod.tolist()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        start_timestep: int | None = None,
        timesteps: Sequence[int] | None = None,
    ):
        r"""
        Choose the schedule. Arguments count steps from 1, as the paper does; the attribute `timesteps` holds schedule
        indices (199 for step 200).

        Args:
            num_inference_steps (`int`, *optional*): Number of steps; 1 if nothing else is given.
            device (`str` or `torch.device`, *optional*): Where `timesteps` is placed.
            start_timestep (`int`, *optional*): First step: 250, 200, 150 or 100. See [`starting_schedule`].
            timesteps (`Sequence[int]`, *optional*): The whole schedule, strictly descending in 1 ... 250.

        Raises:
            ValueError: If the arguments contradict each other or are out of range.
        """
        if timesteps is not None:
            steps = check_timesteps(timesteps, num_inference_steps)
            if start_timestep not in (None, steps[0]):
                raise ValueError(f"`start_timestep={start_timestep}` contradicts `timesteps={steps}`.")
            if steps[0] not in START_TIMESTEPS:
                logger.warning(f"Noise predictors are trained to start at {START_TIMESTEPS}, not at {steps[0]}.")
        elif start_timestep is not None:
            steps = starting_schedule(1 if num_inference_steps is None else num_inference_steps, start_timestep)
        else:
            steps = published_schedule(1 if num_inference_steps is None else num_inference_steps)
        if steps[0] > len(self._alphas):
            raise ValueError(f"`timesteps={steps}` cannot start beyond `num_train_timesteps={len(self._alphas)}`.")
        self.num_inference_steps = len(steps)
        indices = [step - 1 for step in steps]
        self.timesteps = torch.tensor(indices, dtype=torch.int64, device=device)
        alphas = [self._alphas[index] for index in indices]
        self._alpha_prods = dict(zip(indices, zip(alphas, [*alphas[1:], 1.0])))

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""
        One DDIM step, from `timestep` to the next one of the schedule and from the last one to the clean sample.

        Args:
            model_output (`torch.Tensor`): What the UNet predicted, `(batch, channels, height, width)`.
            timestep (`int`): Schedule index, one of `timesteps`.
            sample (`torch.Tensor`): Noisy latents at `timestep`, of the same shape.
            eta (`float`, defaults to 0.0): 0 is deterministic DDIM, 1 has the variance of DDPM.
            use_clipped_model_output (`bool`, defaults to `False`):
                Whether to derive the noise again from the clipped clean sample.
            generator (`torch.Generator`, *optional*): Source of the noise if `eta > 0`.
            variance_noise (`torch.Tensor`, *optional*):
                That noise itself instead of a generator: standard Gaussian, of the same shape.
            return_dict (`bool`, defaults to `True`): Whether to return a `DDIMSchedulerOutput` instead of a tuple.

        Returns:
            `DDIMSchedulerOutput` or a tuple with its `prev_sample` and `pred_original_sample`, each
            `(batch, channels, height, width)`.

        Raises:
            ValueError: If no schedule was set, `timestep` is not in it, or both sources of noise are given.
        """
        if self.num_inference_steps is None:
            raise ValueError("The scheduler has no schedule yet: call `set_timesteps` first.")
        timestep = int(timestep)
        if timestep not in self._alpha_prods:
            raise ValueError(f"`timestep` must be an index of the schedule {self.timesteps.tolist()}, got {timestep}.")
        if generator is not None and variance_noise is not None:
            raise ValueError("`generator` and `variance_noise` cannot both be given.")

        alpha_prod, alpha_prod_prev = self._alpha_prods[timestep]
        sqrt_alpha, sqrt_beta = alpha_prod**0.5, (1 - alpha_prod) ** 0.5

        # z_0 and epsilon of z = sqrt(alpha) z_0 + sqrt(1 - alpha) epsilon
        if self.config["prediction_type"] == "epsilon":
            pred_original_sample = (sample - sqrt_beta * model_output) / sqrt_alpha
            pred_epsilon = model_output
        elif self.config["prediction_type"] == "sample":
            pred_original_sample = model_output
            pred_epsilon = (sample - sqrt_alpha * pred_original_sample) / sqrt_beta
        elif self.config["prediction_type"] == "v_prediction":
            pred_original_sample = sqrt_alpha * sample - sqrt_beta * model_output
            pred_epsilon = sqrt_alpha * model_output + sqrt_beta * sample
        else:
            raise ValueError(
                "`prediction_type` must be 'epsilon', 'sample' or 'v_prediction', got"
                f" {self.config['prediction_type']!r}."
            )

        if self.config["thresholding"]:
            pred_original_sample = self._threshold_sample(pred_original_sample)
        elif self.config["clip_sample"]:
            bound = self.config["clip_sample_range"]
            pred_original_sample = pred_original_sample.clamp(-bound, bound)
        if use_clipped_model_output:
            pred_epsilon = (sample - sqrt_alpha * pred_original_sample) / sqrt_beta

        # Equations (12) and (16) of DDIM (https://arxiv.org/abs/2010.02502)
        variance = (1 - alpha_prod_prev) / (1 - alpha_prod) * (1 - alpha_prod / alpha_prod_prev)
        std_dev = eta * variance**0.5
        direction = (1 - alpha_prod_prev - std_dev**2) ** 0.5 * pred_epsilon
        prev_sample = alpha_prod_prev**0.5 * pred_original_sample + direction
        if std_dev > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
            prev_sample = prev_sample + std_dev * variance_noise

        if not return_dict:
            return (prev_sample, pred_original_sample)
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
