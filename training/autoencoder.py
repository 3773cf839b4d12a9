"""Train the embedded model's autoencoder: 128x128 RGB <-> 4x16x16 latents of unit variance.

Two stages, because a processor's time is short. "encode" trains the encoder with a decoder that stops at 64x64,
which costs a third; "decode" freezes the encoder, doubles the decoder's output and trains it alone. The
text-to-image model needs only the first, so the second can run after it.

    python training/autoencoder.py encode --data emoji128.tar --out runs/vae --minutes 15
    python training/autoencoder.py decode --data emoji128.tar --out runs/vae --minutes 20
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from data import load
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import DecoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG = dict(
    latent_channels=4,
    encoder_block_out_channels=(32,) * 4,
    decoder_block_out_channels=(48,) * 4,
    num_encoder_blocks=(0, 0, 2, 3),
    num_decoder_blocks=(3, 2, 1, 0),
)


def half_decoder() -> DecoderTiny:
    """The decoder up to 64x64: the full one without its last upsampling and convolution."""
    return DecoderTiny(4, 3, (3, 2, 1), (48,) * 3, 2, "relu", "nearest")


def grow(decoder: DecoderTiny, half: DecoderTiny) -> None:
    """Start the 128x128 decoder from the 64x64 one: all its layers, and its output convolution at twice the size."""
    wide, narrow = list(decoder.layers), list(half.layers)
    for new, old in zip(wide, narrow[:-1], strict=False):
        new.load_state_dict(old.state_dict())
    with torch.no_grad():
        nn.init.dirac_(wide[-2].weight)
    wide[-1].load_state_dict(narrow[-1].state_dict())


def loss_of(image: Tensor, target: Tensor) -> Tensor:
    """L1 on pixels and on their differences, which keeps edges sharp."""
    return (
        F.l1_loss(image, target)
        + F.l1_loss(image.diff(dim=-1), target.diff(dim=-1))
        + F.l1_loss(image.diff(dim=-2), target.diff(dim=-2))
    )


def psnr(image: Tensor, target: Tensor) -> float:
    error = ((image.clamp(-1, 1) - target) / 2).square().mean(dim=(1, 2, 3))
    return (-10 * error.log10()).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["encode", "decode"])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    images = load(args.data).images
    held_out, images = images[::32], torch.cat([images[i::32] for i in range(1, 32)])
    vae = AutoencoderTiny(**CONFIG).to(memory_format=torch.channels_last)
    half = half_decoder().to(memory_format=torch.channels_last)
    encoding = args.stage == "encode"
    if encoding:
        decoder = half
        parameters = [*vae.encoder.parameters(), *half.parameters()]
    else:
        vae = AutoencoderTiny.from_pretrained(args.out).to(memory_format=torch.channels_last)
        decoder = vae.decoder
        if (args.out / "half_decoder.safetensors").exists():
            half.load_state_dict(load_file(args.out / "half_decoder.safetensors"))
            grow(decoder, half)
        vae.encoder.requires_grad_(False)
        parameters = list(decoder.parameters())
    # The decoder sees the latents as the pipeline hands them over: divided by the scaling factor.
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    average: dict[nn.Parameter, Tensor] = {}

    def evaluate() -> float:
        with torch.no_grad():
            target = held_out.float() / 127.5 - 1
            small = F.avg_pool2d(target, 2) if encoding else target
            output = torch.cat([decoder(vae.encoder(batch)) for batch in target.split(50)])
        return psnr(output, small)

    start, step = time.time(), 0
    while (progress := (time.time() - start) / 60 / args.minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                args.lr * min(1, (step + 1) / 200) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))
            )
        batch = images[torch.randint(len(images), (args.batch,))]
        batch = batch.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        if torch.rand(()) < 0.5:
            batch = batch.flip(-1)
        with torch.set_grad_enabled(encoding):
            latents = vae.encoder(batch)
        target = F.avg_pool2d(batch, 2) if encoding else batch
        noisy = latents + 0.05 * torch.randn_like(latents)  # the denoiser's errors must not show
        loss = loss_of(decoder(noisy), target)
        if encoding:  # unit variance and zero mean, so that no scaling is left to do
            variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
            moments = (variance.log().square() + mean.square()).mean()
            loss = loss + 0.05 * moments
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if progress > 0.6:
            with torch.no_grad():
                for parameter in parameters:
                    if parameter in average:
                        average[parameter].lerp_(parameter, 0.005)
                    else:
                        average[parameter] = parameter.clone()
        if step % 200 == 0:
            print(
                f"step {step:6d} {100 * progress:5.1f} % loss {loss.item():.4f} "
                f"psnr {evaluate():.2f} dB latents {latents.mean().item():+.3f} +- {latents.std().item():.3f}",
                flush=True,
            )
        step += 1

    with torch.no_grad():
        for parameter, value in average.items():
            parameter.copy_(value)
        if encoding:
            latents = torch.cat([vae.encoder(batch.float() / 127.5 - 1) for batch in held_out.split(50)])
            vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    print(f"{step} steps, held-out psnr {evaluate():.2f} dB, scaling factor {vae.config.scaling_factor}")
    vae.save_pretrained(args.out)
    if encoding:
        save_file({k: v.contiguous() for k, v in half.state_dict().items()}, args.out / "half_decoder.safetensors")


if __name__ == "__main__":
    main()
