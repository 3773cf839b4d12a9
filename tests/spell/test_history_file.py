"""Files of finished images: what was written comes back, or an error names the file."""

import pytest
import torch
from safetensors.torch import save_file

from shielded import History


@pytest.fixture
def file(tmp_path):
    history = History()
    history.add(torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    history.save(tmp_path / "history.safetensors")
    return tmp_path / "history.safetensors"


@pytest.mark.parametrize("kind", ["flip", "cut", "zero"])
def test_a_damaged_file_gives_an_error_or_what_was_written(file, kind):
    expected, content = History.load(file).latents, file.read_bytes()
    noticed = 0
    for at in range(0, len(content), 7):
        data = bytearray(content)
        if kind == "flip":
            data[at] ^= 1 << at % 8
        elif kind == "cut":
            del data[at:]
        else:
            data[at : at + 16] = bytes(len(data[at : at + 16]))
        file.write_bytes(data)
        try:
            assert torch.equal(History.load(file).latents, expected)
        except ValueError as error:
            noticed += "history.safetensors is damaged" in str(error)
    assert noticed > 40


@pytest.mark.parametrize("latents", [torch.full((2, 4), float("nan")), torch.zeros(2, 4, dtype=torch.int64)])
def test_a_file_with_other_numbers(tmp_path, latents):
    save_file({"latents": latents}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged: its latents are not finite"):
        History.load(tmp_path / "x.safetensors")


def test_a_file_of_the_first_version_has_no_checksum(tmp_path):
    save_file({"latents": torch.ones(2, 4)}, tmp_path / "x.safetensors", metadata={"limit": "8"})
    assert torch.equal(History.load(tmp_path / "x.safetensors").latents, torch.ones(2, 4))
    with pytest.raises(FileNotFoundError):
        History.load(tmp_path / "nowhere.safetensors")
