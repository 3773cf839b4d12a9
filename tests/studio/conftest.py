import importlib

import pytest


@pytest.fixture(scope="session")
def page():
    """The module of the page, imported where it is used, since Gradio takes seconds."""
    pytest.importorskip("gradio")
    return importlib.import_module("shielded.studio.page")
