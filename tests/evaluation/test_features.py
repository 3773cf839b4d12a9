"""Feature extractors: the embedded encoder, and tiny models of other libraries saved to a folder."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from shielded.evaluation.extractors import features

SIZE = 28


def pictures(n: int = 5) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)) for _ in range(n)]


def as_tensor(images):
    return torch.tensor(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of a few thousand weights."""
    folder = tmp_path_factory.mktemp("clip")
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *(f"{c}</w>" for c in "abcdefghij"), *"abcdefghij"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": 1},
        vision_config={**tower, "image_size": SIZE, "patch_size": 14},
        projection_dim=12,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def test_clip_matches_the_model_itself(clip):
    found = features("clip", str(clip))
    images, prompts = pictures(), ["a b", "c d e f"]
    image_features, text_features = found.image_features(images), found.text_features(prompts)
    assert image_features.shape == (5, 12)
    model = CLIPModel.from_pretrained(clip).eval()
    tokens = CLIPTokenizer.from_pretrained(clip)(prompts, padding=True, return_tensors="pt")
    # Pixels prepared by hand: no resizing is left to do.
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    pixels = ((as_tensor(images) + 1) / 2 - mean) / std
    with torch.no_grad():
        output = model(**tokens, pixel_values=pixels)
    torch.testing.assert_close(image_features, output.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text_features, output.text_embeds, rtol=1e-4, atol=1e-5)


def test_tensors_and_batches_give_the_same_clip_features(clip, monkeypatch):
    found = features("clip", str(clip))
    whole = found.image_features(pictures())
    monkeypatch.setattr("shielded.evaluation.extractors._MAX_IMAGES_PER_PASS", 2)
    torch.testing.assert_close(found.image_features(as_tensor(pictures())), whole)


def test_dinov2_is_the_class_token(tmp_path):
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE, patch_size=14, mlp_ratio=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dinov2Model(config).save_pretrained(tmp_path)
    BitImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_normalize=False
    ).save_pretrained(tmp_path)
    found = features("dinov2", str(tmp_path))
    image_features = found.image_features(pictures())
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(tmp_path).eval()((as_tensor(pictures()) + 1) / 2).last_hidden_state[:, 0]
    torch.testing.assert_close(image_features, expected, rtol=1e-4, atol=1e-5)
    assert found.text_features is None


def test_the_embedded_encoder_scores_its_own_captions():
    found = features()
    assert found.image_features(pictures(2)).shape == (2, 128)
    assert found.text_features(["cat face"]).norm().item() == pytest.approx(1, abs=1e-5)


def test_inception_without_its_library_is_one_clear_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch-fidelity"):
        features("inception")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("siglip",), ValueError, "use one of emoji, clip"),
        (("emoji", "somewhere"), ValueError, "leave the source out"),
    ],
)
def test_bad_names(arguments, error, message):
    with pytest.raises(error, match=message):
        features(*arguments)


def test_a_folder_without_a_model_and_no_images(tmp_path, clip):
    with pytest.raises(OSError, match="give a folder with a saved model") as error:
        features("clip", str(tmp_path))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="at least one"):
        features("clip", str(clip)).image_features([])
