"""The shapes and dtypes that core/ annotates, checked at run time by jaxtyping and beartype.

core/ imports jaxtyping for type checkers alone, so its annotations are strings; here they are evaluated, and every
function and method is replaced by one that checks its arguments and its result, also where core/ calls itself.
"""

import importlib
import inspect
import pkgutil
import types
import typing

import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, beartype
from torch import Tensor

import shielded.core
from shielded.core.correction import check_radius
from shielded.core.references import Hits, Joined, TensorReferences, closest, deepest, merge, unknown

MODULES = {
    name: importlib.import_module(f"shielded.core.{name}")
    for _, name, _ in pkgutil.iter_modules(shielded.core.__path__)
}
CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
SHAPE = (2, 3)
COUNT = 5  # references


def hints(function, module):
    names = {**vars(jaxtyping), **vars(typing), **vars(module)}
    return typing.get_type_hints(function, names, include_extras=True)


def functions(module):
    """(owner, name, function) of the functions of a module and the methods of its classes."""
    for owner in (
        module,
        *(c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__),
    ):
        for name, value in list(vars(owner).items()):
            if isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
                yield owner, name, value


def checked(function, module):
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__, copy.__qualname__ = function.__kwdefaults__, function.__qualname__
    copy.__module__, copy.__annotations__ = function.__module__, hints(function, module)
    return jaxtyping.jaxtyped(copy, typechecker=CHECK)


PUBLIC = {
    f"{module.__name__}.{function.__qualname__}": (function, module)
    for module in MODULES.values()
    for _, name, function in functions(module)
    if not name.startswith("_") and "._" not in f".{function.__qualname__}"
}


@pytest.fixture(scope="module")
def core():
    """The functions of core/ by name, each of them checked wherever core/ uses it."""
    result = {}
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES.values():
            for owner, name, function in functions(module):
                if isinstance(owner, type) and (name.startswith("__") or getattr(owner, "_is_protocol", False)):
                    continue
                result[name] = checked(function, module)
                for place in (owner, *MODULES.values()):
                    if vars(place).get(name) is function:
                        patch.setattr(place, name, result[name])
        yield types.SimpleNamespace(**result)


def bare(annotation):
    """Whether a tensor without a shape is part of an annotation."""
    return annotation is Tensor or any(bare(part) for part in typing.get_args(annotation))


def rows(count, *shape, dtype=torch.float32, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_state_every_shape(name):
    function, module = PUBLIC[name]
    assert not [key for key, annotation in hints(function, module).items() if bare(annotation)]


batches = pytest.mark.parametrize("count", [1, 2, COUNT, COUNT + 1])


@batches
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("overlap", ["sum", "project"])
@pytest.mark.parametrize("radius", [0.5, 4.0, torch.linspace(1, 4, COUNT)])
def test_repellency(core, count, dtype, overlap, radius):
    x0, references = rows(count, *SHAPE, dtype=dtype), rows(COUNT, *SHAPE, dtype=dtype, seed=1)
    noise = rows(count, *SHAPE, dtype=dtype, seed=2)
    for direction in (None, noise):
        delta = core.repellency(x0, references, radius, overlap=overlap, noise=direction)
        assert delta.dtype == dtype
    assert core.repellency(references, references, radius, overlap=overlap).shape == references.shape
    assert isinstance(check_radius(radius, COUNT), float) == isinstance(radius, float)


@batches
@pytest.mark.parametrize("nearest", [None, 1, COUNT])
def test_corrections_and_references(core, count, nearest):
    x0, noise = rows(count, 8), rows(count, 8, seed=2)
    first = TensorReferences(rows(COUNT, 8, seed=1), 4.0, nearest)
    second = TensorReferences(rows(2, 8, seed=3), torch.tensor([3.0, 5.0]))
    for references in (first, second, Joined([first, second], [COUNT, 2])):
        for shrink in (None, torch.ones(count)):
            hits = references.scan(x0, shrink).hits()
            core.sum_correction(x0, references, hits, noise)
            core.project_correction(x0, references, hits, noise, shrink)
        assert core.rank_within_query(hits).shape == (len(hits),)
        assert len(closest(hits, 1)) == len(deepest(hits, 1)) == len(hits.query.unique())
        assert len(merge(unknown(hits, hits[:1]), hits[:1])) == len(hits)
    nothing = first.scan(x0 + 100).hits()
    assert len(nothing) == 0
    assert not core.sum_correction(x0, first, nothing, noise).any()
    assert not core.project_correction(x0, first, nothing, noise)[0].any()


@batches
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances(core, count, dtype):
    x, z = rows(count, 8, dtype=dtype), rows(COUNT, 8, dtype=dtype, seed=1)
    squared, error = core.squared_distances(x, z)
    query, row = torch.ones(count, COUNT).nonzero(as_tuple=True)
    exact = core.pair_distances(x, z, query, row)
    for radius in (None, exact):
        assert torch.allclose(core.distances_of(x, z, query, row, squared, error, radius), exact)
    assert core.pair_distances(x, z, query[:0], row[:0]).shape == (0,)
    assert torch.allclose(core.squared_gaps(z)[0], torch.cdist(z.double(), z.double()).square(), atol=1e-12)
    assert torch.cat([x[:, part] for part in core.column_blocks(x, COUNT)], dim=1).equal(x)


@batches
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs(core, count, dtype):
    x0 = rows(count, 8, dtype=dtype)
    x0[-1] = x0[0]  # a coincident pair
    radius, repels = torch.full((count, count), 3.0), torch.ones(count, count, dtype=torch.bool)
    close = core.active_pairs(x0, radius, repels)
    core.sum_pairs(x0, radius, close)
    core.project_pairs(x0, radius, repels)
    points = rows(count, 8, dtype=torch.float64)
    core.separate(points, radius.double(), repels)


@batches
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions(core, count, dtype):
    x0 = rows(count, 8, dtype=dtype)
    assert core.push_direction(x0, None).shape == x0.shape
    assert core.push_direction(x0, rows(count, 8, dtype=dtype, seed=1)).shape == x0.shape
    core.tie_break(count, 8, x0.device)


@batches
def test_projection(core, count):
    unit = torch.nn.functional.normalize(rows(count * COUNT, 8, dtype=torch.float64), dim=1).view(count, COUNT, 8)
    gram = unit @ unit.mT
    distance, radius = torch.full((2, count, COUNT), 0.5, dtype=torch.float64)
    radius = radius + 0.5
    valid = torch.ones(count, COUNT, dtype=torch.bool)
    core.non_negative_quadratic(gram, radius, valid, valid)
    multipliers, least = core.smallest_move(gram, distance, radius, valid, valid)
    core.smallest_move(gram, distance, radius, valid, valid, multipliers > 0, least)
    core.stays_inside(gram, multipliers, distance, radius, valid)
    core.escape_length(distance, radius)
    core.way_out(gram, multipliers, distance, radius, valid, 0 * distance, radius[:, 0])


def test_wrong_shapes_are_found(core):
    """The checks do check: two batch sizes, and one dtype instead of another."""
    with pytest.raises(jaxtyping.TypeCheckError):
        core.push_direction(rows(2, 8), rows(3, 8))
    with pytest.raises(jaxtyping.TypeCheckError):
        core.pair_distances(rows(2, 8), rows(2, 8), torch.zeros(1), torch.zeros(1))
    references, empty = TensorReferences(rows(2, 8), 1.0), torch.zeros(0, dtype=torch.int64)
    hits = Hits(empty, empty, empty.double(), empty.double())
    with pytest.raises(jaxtyping.TypeCheckError):
        core.sum_correction(rows(2, 8), references, hits, rows(2, 7))
