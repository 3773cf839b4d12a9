"""Train the embedded text-to-image model: a StableDiffusionPipeline with its own tokenizer, text encoder and UNet.

    python training/text_to_image.py --data emoji128.tar --vae runs/vae --out runs/model

Writes a checkpoint and a pipeline every few minutes and continues from them with --resume. The learning rate stays
the same until the last third of the steps, so that a run can be given more or fewer of them before that.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import checkpoint
import torch
import torch.nn.functional as F
from data import STYLES, load, trained_captions
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from measures import pixels_of
from optimizer import Optimizers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 16
WIDTH = 128


def train_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A byte-pair vocabulary in CLIP's format, in which each word of the captions is one token."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\s+"), "removed"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    words = [*captions, *(f"a an , {style} style" for style in STYLES)]
    bpe.train_from_iterator(words * 3, trainer)
    bpe.model.save(str(folder))
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH, pad_token="<|endoftext|>"
    )


def prompts_of(caption: str, style: str) -> list[str]:
    """The ways in which a picture is asked for; the first half leaves the style open."""
    article = "an" if caption[0] in "aeiou" else "a"
    return [caption, f"{article} {caption}", f"{caption}, {style} style", f"{article} {caption}, {style} style"]


def build(tokenizer: CLIPTokenizer, channels: int) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(96, 128, 224),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=16,
        # The pooled prompt also joins the time embedding and so reaches every layer: with few training steps
        # this is what makes the picture follow the words.
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    return unet, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9000, help="of all runs together")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--adam-lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    everything = load(args.data)
    captions = trained_captions(everything)
    data = everything.select(set(captions))
    vae = AutoencoderTiny.from_pretrained(args.vae).eval()
    with torch.no_grad():
        encoded = [vae.encoder(pixels_of(batch)) for batch in data.images.split(64)]
        latents = torch.cat(encoded) * vae.config.scaling_factor
    tokenizer = train_tokenizer(captions, args.out / "tokenizer")

    def tokens(prompts: list[str]) -> Tensor:
        return tokenizer(
            prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).input_ids

    prompts = torch.stack(
        [tokens(prompts_of(caption, style)) for caption, style in zip(data.captions, data.styles, strict=True)]
    )
    empty = tokens([""])
    print(f"{len(captions)} captions, {len(latents)} images, {len(tokenizer)} tokens, latents {latents.std():.3f}")

    unet, text = build(tokenizer, latents.shape[1])
    # Plain attention: on a processor the backward pass of the fused one takes several times as long at this size.
    unet.set_attn_processor(AttnProcessor())
    text.set_attn_implementation("eager")
    trained = nn.ModuleDict({"unet": unet, "text": text}).to(memory_format=torch.channels_last)
    average = copy.deepcopy(trained).requires_grad_(False)
    print(f"{sum(p.numel() for p in trained.parameters()) / 1e6:.1f} M parameters", flush=True)
    optimizer = Optimizers(trained, args.lr, args.adam_lr, ("unet.conv_in.", "unet.conv_out."), decay=1e-2)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    file = args.out / "checkpoint.pt"
    step, before, running = 0, 0.0, 0.0
    if args.resume:
        state = checkpoint.load(file)
        step, before, running = state["step"], state["minutes"], state["loss"]
        trained.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        torch.manual_seed(args.seed + step)

    def save() -> None:
        checkpoint.save(
            file,
            {
                "step": step,
                "minutes": clock.minutes,
                "loss": running,
                "model": trained.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
        )
        pipe = StableDiffusionPipeline(
            vae=copy.deepcopy(vae),
            text_encoder=copy.deepcopy(average["text"]),
            tokenizer=tokenizer,
            unet=copy.deepcopy(average["unet"]),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        folder = args.out / "pipeline"
        pipe.to(torch.float16).save_pretrained(folder)
        tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))  # vocab.json, merges.txt: transformers 4
        (folder / "captions.txt").write_text("\n".join(captions) + "\n")

    clock = checkpoint.Clock(before)
    saved, first, start = before, step, time.monotonic()
    order = torch.randperm(len(latents))
    while (progress := step / args.steps) < 1:
        if len(order) < args.batch:
            order = torch.randperm(len(latents))
        index, order = order[: args.batch], order[args.batch :]
        x0 = latents[index]
        ids = prompts[index, torch.randint(prompts.shape[1], index.shape)]
        ids = torch.where(torch.rand(len(index), 1) < 0.1, empty, ids)
        noise = torch.randn_like(x0)
        # Stratified: each batch covers the whole noise schedule, which steadies the loss of a small batch.
        timesteps = ((torch.rand(len(index)) + torch.arange(len(index))) / len(index) * 1000).long().clamp(max=999)
        noisy = scheduler.add_noise(x0, noise, timesteps).contiguous(memory_format=torch.channels_last)
        target = scheduler.get_velocity(x0, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(noisy, timesteps, text(ids).last_hidden_state).sample
        loss = F.mse_loss(output.float(), target)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step(min(1, (step + 1) / 200) * min(1, max(0.02, (1 - progress) / 0.35)))
        step += 1
        with torch.no_grad():
            for old, new in zip(average.parameters(), trained.parameters(), strict=True):
                old.lerp_(new, 1 - min(0.999, (step + 1) / (step + 20)))
        running = loss.item() if step == 1 else 0.99 * running + 0.01 * loss.item()
        if step % 50 == 0:
            speed = (step - first) * args.batch / (time.monotonic() - start)
            print(f"step {step:6d} {clock.minutes:5.1f} min loss {running:.4f} {speed:.0f} images/s", flush=True)
        if clock.minutes - saved > 4:
            save()
            saved = clock.minutes
    save()
    assert not math.isnan(running)
    print(f"{step} steps, {step * args.batch} images, loss {running:.4f}")


if __name__ == "__main__":
    main()
