"""Train the embedded model's autoencoder: 128x128 RGB <-> 8x16x16 latents of zero mean and unit variance.

Two stages. "joint" trains encoder and decoder; "decode" freezes the encoder and trains the decoder alone, so that the
text-to-image model can be trained on the latents at the same time.

    python training/autoencoder.py joint --data emoji128.tar --out runs/vae --steps 6000
    python training/autoencoder.py decode --data emoji128.tar --out runs/vae --steps 3000

Both write a checkpoint every few minutes and continue from it with --resume. The learning rate stays the same for half
of the steps; until then a run can be given more or fewer of them.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import checkpoint
import torch
import torch.nn.functional as F
from data import Emoji, load
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import DecoderTiny, EncoderTiny
from measures import autoencoder_figures, pixels_of
from optimizer import Optimizers
from torch import Tensor, nn

WIDTH_IN, WIDTH_OUT = 48, 64
BLOCKS_IN, BLOCKS_OUT = (0, 0, 3, 3), (3, 3, 1, 0)
NARROW = 16  # channels at 128x128 while training


class Doubling(nn.Module):
    """Nearest upsampling by two and a 3x3 convolution, as one convolution at the lower resolution.

    The same numbers for a quarter of the memory traffic: each output pixel of a 2x2 group sees the same 3x3 input
    pixels, with kernels that add up what falls on the same one.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        fold = torch.tensor([[[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]])
        self.register_buffer("fold", fold.float(), persistent=False)  # (side, pixel of the input, of the kernel)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.einsum("pak,qbl,ockl->opqcab", self.fold, self.fold, self.conv.weight)
        return F.pixel_shuffle(F.conv2d(x, weight.flatten(0, 2), padding=1), 2)


class Trained(nn.Module):
    """The autoencoder in the form in which it is trained.

    `AutoencoderTiny` has as many channels at 128x128 as elsewhere, but nothing but convolutions there, so that most of
    them say nothing new. With a few channels the same functions can be learned in a fraction of the time; `shipped`
    fills the rest with zeros.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.encoder = EncoderTiny(3, channels, BLOCKS_IN, (WIDTH_IN,) * 4, "relu")
        self.decoder = DecoderTiny(channels, 3, BLOCKS_OUT, (WIDTH_OUT,) * 4, 2, "relu", "nearest")
        self.encoder.layers[0] = nn.Conv2d(3, NARROW, 3, padding=1)
        self.encoder.layers[1] = nn.Conv2d(NARROW, WIDTH_IN, 3, stride=2, padding=1, bias=False)
        # Instead of the last upsampling and two convolutions:
        end = (Doubling(WIDTH_OUT, NARROW), nn.Conv2d(NARROW, 3, 3, padding=1))
        self.decoder.layers = nn.Sequential(*list(self.decoder.layers)[:-3], *end)

    def shipped(self) -> AutoencoderTiny:
        """Return the same functions as a model of diffusers."""
        vae = AutoencoderTiny(
            latent_channels=self.channels,
            encoder_block_out_channels=(WIDTH_IN,) * 4,
            decoder_block_out_channels=(WIDTH_OUT,) * 4,
            num_encoder_blocks=BLOCKS_IN,
            num_decoder_blocks=BLOCKS_OUT,
            scaling_factor=1.0,
        )
        # The decoder's upsampling is a layer without weights there and part of the convolution here.
        shift = {str(len(self.decoder.layers) - 1): len(vae.decoder.layers) - 1}
        shift[str(len(self.decoder.layers) - 2)] = len(vae.decoder.layers) - 2
        state = {}
        for name, value in self.state_dict().items():
            part, layers, number, *rest = name.split(".")
            if part == "decoder" and number in shift:
                number, rest = str(shift[number]), rest[-1:]
            state[".".join((part, layers, number, *rest))] = value
        for name, wide in vae.state_dict().items():
            if state[name].shape != wide.shape:
                wide = torch.zeros_like(wide)
                wide[tuple(slice(n) for n in state[name].shape)] = state[name]
                state[name] = wide
        vae.load_state_dict(state)
        return vae.eval()


def loss_of(image: Tensor, target: Tensor) -> Tensor:
    """Return L1 on pixels and on their differences, which keeps edges sharp."""
    return (
        F.l1_loss(image, target)
        + F.l1_loss(image.diff(dim=-1), target.diff(dim=-1))
        + F.l1_loss(image.diff(dim=-2), target.diff(dim=-2))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["joint", "decode"])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000, help="of this stage, all its runs together")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--adam-lr", type=float, default=1e-3)
    # Without it the weights grow, having no normalisation layers to make up for them, until training diverges.
    parser.add_argument("--decay", type=float, default=0.5)
    parser.add_argument("--crops", type=float, default=0.7, help="share of the steps in which 64x64 crops are learned")
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--consistency", type=float, default=4.0, help="weight of what keeps changes of latents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    data = load(args.data)
    held_out = Emoji(data.images[::32], data.captions[::32], data.styles[::32], data.groups[::32])
    few = Emoji(*(part[::2] for part in (held_out.images, held_out.captions, held_out.styles, held_out.groups)))
    learned = [i for i in range(len(data.images)) if i % 32]
    # The style with the finest detail, hardest to draw, comes up more often.
    often = torch.tensor([1.6 if data.styles[i] == "noto" else 1.0 for i in learned])
    images = data.images[learned]
    joint = args.stage == "joint"
    torch.manual_seed(args.seed)
    model = Trained(args.channels).to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    if not joint:
        trained = checkpoint.load(args.out / "joint.pt")["average"]
        model.load_state_dict(trained)
        average.load_state_dict(trained)
        model.encoder.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ends = ("encoder.layers.0.", f"decoder.layers.{len(model.decoder.layers) - 1}.")
    optimizer = Optimizers(model, args.lr, args.adam_lr, ends, decay=args.decay)
    step, before, running = 0, 0.0, [0.0, 0.0]
    file = args.out / f"{args.stage}.pt"
    if args.resume:
        state = checkpoint.load(file)
        step, before, running = state["step"], state["minutes"], state.get("running", running)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        torch.manual_seed(args.seed + step)

    def save() -> None:
        checkpoint.save(
            file,
            {
                "step": step,
                "minutes": clock.minutes,
                "running": running,
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
        )

    clock = checkpoint.Clock(before)
    saved, usual = before, 0.0
    while (progress := step / args.steps) < 1:
        crops = progress < args.crops
        batch = images[often.multinomial(args.batch * (2 if crops else 1), replacement=True)]
        if crops:  # half the time of a step on whole pictures
            corners = torch.randint(65, (len(batch), 2)).tolist()
            batch = torch.stack(
                [image[:, y : y + 64, x : x + 64] for image, (y, x) in zip(batch, corners, strict=True)]
            )
        batch = pixels_of(batch)
        if torch.rand(()) < 0.5:
            batch = batch.flip(-1)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(joint):
                latents = model.encoder(batch).float()
            # The denoiser's errors must not show.
            near = latents + 0.05 * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)
            decoded = model.decoder(near).float()
            loss = loss_of(decoded, batch)
            # A latent, also one that was changed by up to a third of its length, must be found again in its picture.
            some = latents[: len(latents) // 4].detach()
            far = some + 0.35 * torch.rand(len(some), 1, 1, 1) * torch.randn_like(some)
            pictures = torch.cat([decoded, model.decoder(far).float()])
            kept = pictures.clamp(-1, 1)
            again = model.encoder(kept + (2 * torch.rand_like(kept) - 1) / 255).float()  # as rounded in a file
            consistency = F.mse_loss(again, torch.cat([near.detach(), far]))
        total = loss + args.consistency * consistency + (pictures - kept).abs().mean()
        if joint:
            variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
            total = total + 0.05 * (variance.log().square() + mean.square()).mean()
        total.backward()
        # A batch of unusual gradient must not turn the momentum, whose length says nothing to Muon.
        norm = nn.utils.clip_grad_norm_(parameters, 1.5 * usual if usual else 1.0).item()
        usual = 0.98 * usual + 0.02 * min(norm, 3 * usual) if usual else norm
        optimizer.step(min(1, (step + 1) / 300) * max(0.02, min(1, 2 * (1 - progress))))
        step += 1
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.parameters(), strict=True):
                old.lerp_(new, 1 - min(0.998, step / (step + 10)))
        values = (loss.item(), consistency.item())
        running = [value if step == 1 else 0.99 * r + 0.01 * value for r, value in zip(running, values, strict=True)]
        if clock.minutes - saved > 3:
            save()
            saved = clock.minutes
        if step % 50 == 0:
            print(
                f"step {step:6d} {clock.minutes:5.1f} min loss {running[0]:.4f} consistency {running[1]:.4f}",
                flush=True,
            )
        if step % 500 == 0:
            print(" ".join(f"{value:.3f}" for value in autoencoder_figures(average, few).values()), flush=True)
    save()
    vae = average.shipped()
    with torch.no_grad():
        latents = torch.cat([vae.encoder(pixels_of(batch)) for batch in held_out.images.split(50)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 3))  # what the batches left to unit variance
    figures = autoencoder_figures(vae, held_out, vae.config.scaling_factor)
    print(f"{step} steps, {step * args.batch} images")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=2))
    vae.save_pretrained(args.out)


if __name__ == "__main__":
    main()
