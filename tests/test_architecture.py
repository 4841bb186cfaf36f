"""The rules of the house, read from the sources."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from helpers import PACKAGE

import moe_numba

#: A module imports only from rooms below its own. Names are modules or packages of moe_numba;
#: those in one row do not import each other.
FLOORS = [
    ["__main__"],
    ["cli"],
    ["batch", "data"],
    ["_warmup", "integrations"],
    ["__init__"],
    ["layer"],
    ["pretrained"],
    ["checkpoint", "families"],
    ["losses"],
    ["router"],
    ["experts"],
    ["_init", "_tokens", "_partial"],
    ["_safetensors"],
    ["_files"],
    ["_workspace"],
    ["_engines"],
    ["kernels"],
    ["simd"],
    ["formats", "_jit", "threads"],
    ["reference", "_cache"],
    ["config"],
    ["_check"],
    ["_aligned", "errors", "_version"],
]
LEVEL = {room: len(FLOORS) - i for i, rooms in enumerate(FLOORS) for room in rooms}

#: Within a package of several files.
WITHIN = {
    "simd": ["target", "plain", "vector", "products", "tile", "row", "outer", "amx", "math", "atomic", "calls"],
    "kernels": [
        *("activations", "projection", "amx_projection", "plan", "scoring", "routing"),
        *("experts", "amx", "amx_transposed"),
    ],
    "integrations": ["__init__", "transformers"],
    "formats": ["format", "float32", "bfloat16", "__init__"],
}

PUBLIC = {
    "MoeConfig",
    "MoeLayer",
    "Expert",
    "RouterConfig",
    "TopKRouter",
    "NoisyTopKRouter",
    "RoutingResult",
    "SparseMixerRouter",
    "balance_loss",
    "z_loss",
    "expert_load_fractions",
    "capacity_limit",
    "softmax_rows",
    "fused_experts",
    "set_num_threads",
    "get_num_threads",
    "list_moe_layers",
    "MoeError",
    "MoeValueError",
    "CheckpointError",
    "__version__",
}

SOURCES = sorted(PACKAGE.rglob("*.py"))
EACH_FILE = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
EACH_KERNEL_FILE = pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.parent.name == "kernels"], ids=lambda path: path.stem
)


def _tree(path):
    return ast.parse(path.read_text())


def _module(path):
    """Parts of the module's name below moe_numba."""
    return path.relative_to(PACKAGE).with_suffix("").parts


def _imports(path):
    """(absolute module name, names imported from it) of every import, wherever it stands."""
    package = ["moe_numba", *_module(path)[:-1]]
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])]), [alias.name for alias in node.names]


def _own_imports(path):
    """Parts, below moe_numba, of every module of this package that `path` imports."""
    for module, names in _imports(path):
        top, *parts = module.split(".")
        if top != "moe_numba":
            continue
        for name in names or [None]:
            folder = PACKAGE.joinpath(*parts)
            is_module = name and folder.is_dir() and ((folder / f"{name}.py").exists() or (folder / name).is_dir())
            yield (*parts, name) if is_module else tuple(parts) or ("__init__",)


@EACH_FILE
def test_imports_point_downwards(path):
    module = _module(path)
    for imported in _own_imports(path):
        if imported[0] != module[0]:
            assert LEVEL[imported[0]] < LEVEL[module[0]], f"{module} imports {imported}"
        elif len(imported) > 1:
            order = WITHIN[module[0]]
            assert order.index(imported[1]) < order.index(module[1]), f"{module} imports {imported}"


@EACH_FILE
def test_only_jit_mentions_njit(path):
    if path.name != "_jit.py":
        assert not re.search(r"\bnjit\b|\bnumba\.jit\b|\bimport jit\b", path.read_text())


@EACH_FILE
def test_only_simd_contains_llvm_ir(path):
    if _module(path)[0] != "simd":
        for module, names in _imports(path):
            assert module != "llvmlite.ir"
            assert not (module == "llvmlite" and "ir" in names)
            assert not (module == "numba.extending" and "intrinsic" in names)


ALLOCATIONS = re.compile(
    r"^(empty|zeros|ones|full|array|arange|asarray|ascontiguousarray|concatenate|stack|copy)(_like)?$"
)


@EACH_KERNEL_FILE
def test_kernels_do_not_raise_or_allocate(path):
    for function in ast.walk(_tree(path)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            assert not isinstance(node, (ast.Raise, ast.Assert, ast.Try)), where
            assert not isinstance(node, (ast.List, ast.ListComp, ast.Dict, ast.Set)), where
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert not ALLOCATIONS.match(node.func.attr), where


@EACH_KERNEL_FILE
def test_kernels_are_compiled_functions_with_documentation(path):
    for node in _tree(path).body:
        if isinstance(node, ast.FunctionDef):
            assert {d.id for d in node.decorator_list} <= {"inline", "helper", "kernel"}, node.name
            assert node.decorator_list, node.name
            assert ast.get_docstring(node) or node.name.startswith("_"), node.name


def test_the_specification_stands_alone():
    imported = {(module, *names) for module, names in _imports(PACKAGE / "reference.py")}
    assert {module for module, *_ in imported} == {"math", "typing", "numpy", "moe_numba.config"}


@EACH_FILE
def test_files_are_short_and_say_what_they_are(path):
    assert len(path.read_text().splitlines()) <= 500
    assert ast.get_docstring(_tree(path))


def test_public_names():
    assert set(moe_numba.__all__) == PUBLIC
    assert len(moe_numba.__all__) == len(PUBLIC)
    for name in PUBLIC:
        assert getattr(moe_numba, name) is not None


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_public_names_are_documented(name):
    thing = getattr(moe_numba, name)
    assert thing.__doc__
    if inspect.isclass(thing):
        assert not thing.__doc__.startswith(f"{name}("), "dataclass wrote it, not a person"
        for member, value in vars(thing).items():
            if not member.startswith("_") and isinstance(value, (property, classmethod, staticmethod, type(_tree))):
                documented = getattr(thing, member).__doc__ or member in thing.__doc__
                assert documented, f"{name}.{member}"


def test_every_module_has_a_test():
    tests = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    #: Tested through the modules that use them.
    elsewhere = {
        "_check",
        "_files",
        "_safetensors",
        "_tokens",
        "_version",
        "_warmup",
        "__init__",
        "__main__",
        "pretrained",
    }
    for path in SOURCES:
        if path.parent == PACKAGE and path.stem not in elsewhere:
            assert f"test_{path.stem.strip('_')}" in tests, path.stem
