"""Guided reverse steps as the pipeline runs them, ready to be timed against a bare UNet forward."""

import torch

from jcdp_diffusers import GuidedDDPMScheduler, JointConditionalPurificationPipeline, LPIPSModel, PurificationConfig
from jcdp_diffusers.noise import image_keys, normal_noise


def guided_step(
    unet,
    reference,
    t: int,
    *,
    pixel_guidance_scale: float = 1.0,
    perceptual_guidance_scale: float = 1.0,
    perceptual_trunk: str = "alex",
    noise_reference: str = "fresh",
):
    """
    A reverse step of the whole batch with one UNet call, through the very functions that the pipeline uses.

    Args:
        unet (`UNet2DModel`): Or a stand-in with its `config`, `dtype` and `device`.
        reference (`torch.Tensor`): Images to be purified, (B, C, H, W) in [-1, 1].
        t (`int`): Timestep, from 0.
        pixel_guidance_scale, perceptual_guidance_scale (`float`): Scales of the guides; 0 leaves one out.
        perceptual_trunk (`str`): Trunk of the perceptual network, whose weights are random: only its cost matters
            here.
        noise_reference (`str`): `"fresh"` draws the reference's noise at every step, `"chain"` follows the forward
            chain.

    Returns:
        `Callable[[torch.Tensor], torch.Tensor]`: From x_t to x_{t-1}, float32 inside.
    """
    perceptual = LPIPSModel(perceptual_trunk).to(reference.device) if perceptual_guidance_scale else None
    pipe = JointConditionalPurificationPipeline(unet, GuidedDDPMScheduler(), perceptual)
    config = PurificationConfig(
        diffusion_steps=t + 1,
        pixel_guidance_scale=pixel_guidance_scale,
        perceptual_guidance_scale=perceptual_guidance_scale,
        reference=noise_reference,
        variance_type="fixed_large",
    )
    scheduler = pipe.prepare_scheduler(config)
    keys = image_keys(0, [str(i) for i in range(len(reference))], reference.device)
    original = reference.to(torch.float32, memory_format=torch.contiguous_format)
    chain_noise = original.clone()
    earlier = scheduler.alphas_cumprod[t].item() * 0.999

    def draw(use):
        return normal_noise(keys, reference.shape[1:], round_index=0, step_index=0, use=use)

    def step(x):
        x = x.to(torch.float32, memory_format=torch.contiguous_format)  # as the pipeline holds its state
        return pipe.reverse_step(scheduler, config, t, x, original, chain_noise, earlier, draw)[0]

    return step
