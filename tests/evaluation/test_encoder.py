"""The image and text encoder: its contract, on random weights."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPTokenizer

from shielded.evaluation.encoder import Encoder, encoder_pixels

WORDS = ["red", "heart", "cat", "face"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A CLIP vocabulary of the letters, four words and every merge that leads to them."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            vocabulary.append(pieces[0])
    vocabulary, merges = list(dict.fromkeys(vocabulary)), list(dict.fromkeys(merges))
    folder = tmp_path_factory.mktemp("source")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


@pytest.fixture(scope="module")
def encoder(tokenizer_folder):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder(CLIPTokenizer.from_pretrained(tokenizer_folder)).eval()


def pictures(n: int = 3, size: tuple[int, int] = (128, 128)) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(n)]


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.tensor(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


def test_features_have_unit_norm_and_the_stated_shape(encoder):
    images, texts = encoder.image_features(pictures(3)), encoder.text_features(["a red heart", "cat"])
    assert images.shape == (3, 128)
    assert texts.shape == (2, 128)
    for features in (images, texts):
        assert features.dtype == torch.float32
        assert not features.requires_grad
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))


@pytest.mark.parametrize("size", [(128, 128), (64, 64), (50, 90), (16, 16)])
def test_pil_images_and_tensors_agree(encoder, size):
    images = pictures(2, size)
    assert torch.equal(encoder.image_features(images), encoder.image_features(as_tensor(images)))


def test_pixels_are_area_means():
    image = as_tensor(pictures(1))
    expected = image.reshape(1, 3, 64, 2, 64, 2).double().mean(dim=(3, 5))
    torch.testing.assert_close(encoder_pixels(image).double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(encoder_pixels(torch.full((1, 3, 64, 64), 1.2)), torch.ones(1, 3, 64, 64))


def test_pil_images_of_different_sizes_and_modes_go_together(encoder):
    grey = Image.new("L", (40, 30), 128)
    features = encoder.image_features([*pictures(1), grey])
    torch.testing.assert_close(features[1:], encoder.image_features([grey.convert("RGB")]))


def test_features_do_not_depend_on_the_batch(encoder, monkeypatch):
    images, prompts = as_tensor(pictures(5)), ["red heart", "", "cat face", "xyz"]
    singly = torch.cat([encoder.image_features(image[None]) for image in images])
    monkeypatch.setattr("shielded.evaluation.encoder._MAX_IMAGES_PER_PASS", 2)
    torch.testing.assert_close(encoder.image_features(images), singly, rtol=0, atol=1e-5)
    alone = torch.cat([encoder.text_features([prompt]) for prompt in prompts])
    torch.testing.assert_close(encoder.text_features(prompts), alone, rtol=0, atol=1e-6)


def test_the_text_tower_is_the_mean_of_the_token_embeddings(encoder):
    ids = encoder.tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in ("red", "cat", "face")])
    assert encoder.tokenizer("red cat face", add_special_tokens=False).input_ids == ids
    expected = F.normalize(encoder.text(encoder.tokens.weight[ids].mean(dim=0, keepdim=True)), dim=1)
    torch.testing.assert_close(encoder.text_features(["Red  cat face"]), expected)


def test_prompts_longer_than_the_tokenizers_maximum_are_read_to_the_end(encoder):
    long = "red " * 30
    assert not torch.equal(encoder.text_features([long + "cat"]), encoder.text_features([long + "heart"]))


def test_save_and_load(encoder, tokenizer_folder, tmp_path):
    encoder.save_pretrained(tmp_path / "encoder")
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir()) == ["config.json", "model.safetensors"]
    state = torch.get_rng_state()
    loaded = Encoder.from_pretrained(tmp_path / "encoder", tokenizer_folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    rounded = {name: value.half().float() for name, value in encoder.named_parameters()}
    for name, value in loaded.named_parameters():
        assert torch.equal(value, rounded[name])

    images, prompts = pictures(4), ["red heart", "cat face"]
    torch.testing.assert_close(loaded.image_features(images), encoder.image_features(images), rtol=0, atol=5e-3)
    torch.testing.assert_close(loaded.text_features(prompts), encoder.text_features(prompts), rtol=0, atol=5e-3)
    # Saving what was loaded changes nothing any more.
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "encoder" / name).read_bytes()


def test_the_default_encoder_is_small(tokenizer_folder):
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    with torch.device("meta"):
        encoder = Encoder(tokenizer)
    without_tokens = sum(p.numel() for p in encoder.parameters()) - 128 * len(tokenizer)
    assert without_tokens + 128 * 2000 < 0.9e6


def test_loading_with_another_tokenizer_or_from_nowhere_is_an_error(encoder, tokenizer_folder, tmp_path):
    encoder.save_pretrained(tmp_path)
    other = CLIPTokenizer.from_pretrained(tokenizer_folder)
    other.add_tokens(["dog"])
    with pytest.raises(ValueError, match="the tokenizer that it was trained with"):
        Encoder.from_pretrained(tmp_path, other)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        Encoder.from_pretrained(tmp_path / "nothing", tokenizer_folder)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "at least one"),
        (torch.zeros(0, 3, 64, 64), ValueError, "at least one"),
        (["a.png"], TypeError, "PIL"),
        (torch.zeros(3, 64, 64), ValueError, "batch dimension"),
        (torch.zeros(2, 4, 64, 64), ValueError, "shape"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), ValueError, "uint8"),
        (torch.full((1, 3, 64, 64), 255.0), ValueError, r"\[-1, 1\]"),
        (torch.full((1, 3, 64, 64), torch.nan), ValueError, "NaN"),
    ],
)
def test_bad_images(encoder, images, error, message):
    with pytest.raises(error, match=message):
        encoder.image_features(images)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [("red heart", TypeError, "wrap"), ([1, 2], TypeError, "strings"), ([], ValueError, "at least one")],
)
def test_bad_prompts(encoder, prompts, error, message):
    with pytest.raises(error, match=message):
        encoder.text_features(prompts)
