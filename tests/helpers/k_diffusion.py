"""k-diffusion's samplers; modules that import this one are skipped where it is not installed."""

import importlib
import importlib.util
import sys
import types

import pytest


def load_sampling():
    """`k_diffusion.sampling` alone: the package itself imports what training needs, and torchvision for images."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion", allow_module_level=True)
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations)
    transforms = types.ModuleType("torchvision.transforms")
    transforms.functional = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "k_diffusion", package)
        patch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
        patch.setitem(sys.modules, "torchvision.transforms", transforms)
        return importlib.import_module("k_diffusion.sampling")


sampling = load_sampling()
