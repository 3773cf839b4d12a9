"""Train the embedded text-to-image model: a StableDiffusionPipeline with its own tokenizer, text encoder and UNet.

    python training/text_to_image.py --data emoji128.tar --vae runs/vae --out runs/model --minutes 70

Stops after the given time, writes a checkpoint every few minutes, and continues from one with --resume.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from data import STYLES, load, trained_captions
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
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


def build(tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
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
        block_out_channels=(64, 128, 256),
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
    parser.add_argument("--minutes", type=float, default=70)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    everything = load(args.data)
    captions = trained_captions(everything)
    data = everything.select(set(captions))
    vae = AutoencoderTiny.from_pretrained(args.vae).eval()
    with torch.no_grad():
        encoded = [vae.encoder(batch.float() / 127.5 - 1) for batch in data.images.split(64)]
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

    unet, text = build(tokenizer)
    trained = nn.ModuleDict({"unet": unet, "text": text}).to(memory_format=torch.channels_last)
    average = copy.deepcopy(trained).requires_grad_(False)
    print(f"{sum(p.numel() for p in trained.parameters()) / 1e6:.1f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-2)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    checkpoint = args.out / "checkpoint.safetensors"
    if args.resume:
        state = load_file(checkpoint)
        trained.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
        average.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("ema.")})

    def save() -> None:
        state = {f"model.{k}": v.contiguous() for k, v in trained.state_dict().items()}
        state |= {f"ema.{k}": v.contiguous() for k, v in average.state_dict().items()}
        save_file(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").rename(checkpoint)
        pipe = StableDiffusionPipeline(
            vae=vae,
            text_encoder=copy.deepcopy(average["text"]),
            tokenizer=tokenizer,
            unet=copy.deepcopy(average["unet"]),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.to(torch.float16).save_pretrained(args.out / "pipeline")
        vae.float()

    start, saved, step, running = time.time(), time.time(), 0, 0.0
    order = torch.randperm(len(latents))
    while (progress := (time.time() - start) / 60 / args.minutes) < 1:
        warm = min(1, (step + 1) / (50 if args.resume else 300))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * min(1, max(0.02, (1 - progress) / 0.6))
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
        output = unet(noisy, timesteps, text(ids).last_hidden_state).sample
        loss = F.mse_loss(output, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 20)) if not args.resume else 0.998
        with torch.no_grad():
            for old, new in zip(average.parameters(), trained.parameters(), strict=True):
                old.lerp_(new, 1 - decay)
        running = loss.item() if step == 0 else 0.99 * running + 0.01 * loss.item()
        step += 1
        if step % 100 == 0:
            speed = step * args.batch / (time.time() - start)
            print(f"step {step:6d} {100 * progress:5.1f} % loss {running:.4f} {speed:.0f} images/s", flush=True)
        if time.time() - saved > 300:
            save()
            saved = time.time()
    save()
    (args.out / "pipeline" / "captions.txt").write_text("\n".join(captions) + "\n")
    assert not math.isnan(running)
    print(f"{step} steps, {step * args.batch} images, loss {running:.4f}")


if __name__ == "__main__":
    main()
