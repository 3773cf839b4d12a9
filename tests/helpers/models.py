"""A small random model on disk, with a text encoder, and a small LoRA for it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from helpers import pipelines
from shielded.models import EMOJI

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def save_model(folder: Path) -> Path:
    """A Stable Diffusion pipeline of 16×16 pixels that reads prompts of up to 16 tokens."""
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
        encoder = CLIPTextModel(config)
    pipelines.stable_diffusion(text_encoder=encoder, tokenizer=tokenizer).pipe.save_pretrained(folder)
    return folder


def low_rank(rank: int = 2) -> tuple[Tensor, Tensor]:
    """Factors (rank, 8) and (8, rank) for the layer."""
    return pipelines.randn(rank, 8, seed=5), pipelines.randn(8, rank, seed=6)


def save_lora(path: Path) -> Path:
    a, b = low_rank()
    save_file({f"unet.{LAYER}.lora_A.weight": a, f"unet.{LAYER}.lora_B.weight": b}, path)
    return path
