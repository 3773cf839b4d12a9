"""The rules of the house, read off the source: which room may import which, and how large a file may grow."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(importlib.import_module("shielded").__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# From the ground up: a room may import itself and the rooms before it. Rooms of one line do not know each other.
STOREYS = [
    ["_extras", "files"],
    ["core"],
    ["latent_space"],
    ["models", "copies"],
    ["protected"],
    ["samplers"],
    ["spell"],
    ["certificates"],
    ["generation"],
    ["evaluation"],
    ["radius"],
    ["runs"],
    ["studio"],
    ["cli"],
]
MAX_ROOMS = 16
MAX_LINES = 450
REASON = re.compile(r"\blines\b|\blong\b")  # in the docstring of a longer file, which says why


def imports(name):
    """Modules of the package that a module imports, also inside functions; not those for type checkers alone."""
    path = FILES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    pending = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1]]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            found |= {f"{source}.{alias.name}" if f"{source}.{alias.name}" in FILES else source for alias in node.names}
        pending += ast.iter_child_nodes(node)
    return {module for module in found if module in FILES} - {name}


GRAPH = {name: imports(name) for name in FILES}


def room(name):
    return name.split(".")[1] if "." in name else ""


def test_imports_are_absolute():
    relative = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_no_module_imports_itself_through_others():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_rooms_import_only_rooms_below():
    storey = {name: level for level, names in enumerate(STOREYS) for name in names}
    wrong = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if room(module) not in ("", "__main__", room(other)) and room(other)
        if storey[room(module)] <= storey[room(other)]
    ]
    assert not wrong


def test_there_are_few_rooms():
    rooms = {room(name) for name in FILES} - {"", "__main__"}
    assert rooms == {name for names in STOREYS for name in names}
    assert len(rooms) <= MAX_ROOMS


@pytest.mark.parametrize("name", [name for name, path in FILES.items() if path.read_text().count("\n") > MAX_LINES])
def test_long_files_give_a_reason(name):
    docstring = ast.get_docstring(ast.parse(FILES[name].read_text())) or ""
    assert REASON.search(docstring), f"{name} has over {MAX_LINES} lines: split it, or say in its docstring why not"


@pytest.mark.parametrize("name", [name for name, path in FILES.items() if path.name == "__init__.py"])
def test_no_module_is_shadowed_by_a_name_of_its_package(name):
    package = importlib.import_module(name)
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert not modules & set(getattr(package, "__all__", ()))


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in result.stdout.split()}


def test_core_loads_torch_and_nothing_else():
    assert loaded_by("import shielded.core") - loaded_by("import torch") == {"shielded"}


def test_the_package_loads_nothing_until_it_is_asked():
    assert not loaded_by("import shielded") & {"torch", "numpy", "PIL", "diffusers", "transformers", "safetensors"}
