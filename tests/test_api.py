"""Conventions as tests: rooms, imports, names and docstrings."""

import ast
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import raclora_jax as rl

PACKAGE = pathlib.Path(rl.__file__).parent

# Inside a folder each room imports only from rooms before it.
ROOMS = {
    "_core": "types checks parts bits polar cholesky orthonormal paths saved digest "
    "disk record stamp sharding whiten contraction select picks spec plan planning sides "
    "keys sketch lowrank rounding factor merge",
    "_autodiff": "stage reads elementwise uses axes attach weight rearrange arithmetic "
    "output picked consume join rounds updating interpret watch",
    "_chain": "boxes inner separable orthogonal state around clip start step slices",
    "_forms": "pure apply descent optimizer gradient fusable fused adapter link_end "
    "factor_rules unmerged trace costs summary shardings trainer",
    "flax": "_tree _optimizer _module _train_state _trainer",
    "follow": "_adapted _position _message _numbers _size _sketches _exact _checks "
    "_encode _fused _adapter _apply _log",
    "peft": "_folder _files _targets _families _pairs _best _format _patterns _config "
    "_ties _read _write _models",
    "quantized": "_codes _merge",
    "tunix": "_trainers _rollout _cluster",
    "theory": "_numbers _descent _variance_reduced _compressed _local _steps _lambda "
    "_lazy _smoothness _captured _certificate _report",
}
# What each folder stands on; strangers do not know each other.
BELOW = {
    "_core": set(),
    "_autodiff": {"_core"},
    "_chain": {"_core"},
    "_forms": {"_core", "_autodiff", "_chain"},
    "flax": {"_core", "_forms"},
    "follow": {"_core", "_chain", "_forms", "quantized"},
    "peft": {"_core", "_forms"},
    "quantized": {"_core", "_forms"},
    "theory": {"_core", "_forms"},
    "tunix": {"_core", "_chain", "flax", "follow"},
}
# What a room imports that not everyone has installed.
OPTIONAL = {
    "_module.py": {"flax"},
    "_optimizer.py": {"flax"},
    "_train_state.py": {"flax"},
    "_trainer.py": {"flax"},
    "_trainers.py": {"flax", "tunix"},
    "_rollout.py": {"flax", "tunix"},
    "_cluster.py": {"flax", "tunix"},
    "_tree.py": {"flax"},
    "_privacy.py": {"dp_accounting"},
    "_report.py": {"matplotlib"},
    "_checkpointer.py": {"orbax", "etils"},
    "_files.py": {"safetensors"},
    "record.py": {"safetensors"},
    "_codes.py": {"qwix"},
    "_merge.py": {"qwix"},
}
STRANGERS = ({"sketch", "lowrank", "rounding"}, {"optimizer", "adapter"})
NAMESPACES = (
    "checkpoint",
    "estimators",
    "federated",
    "flax",
    "follow",
    "methods",
    "peft",
    "quantized",
    "sharding",
    "theory",
    "tunix",
)
# Those whose package is not installed are read and not imported.
NEEDS = {"quantized": "qwix", "tunix": "tunix"}
ABSENT = {room for room, name in NEEDS.items() if not importlib.util.find_spec(name)}
ALL_ROOMS = [(folder, room) for folder, rooms in ROOMS.items() for room in rooms.split()]


def imported_rooms(path: pathlib.Path) -> set[str]:
    """What a file imports of this package, as ``folder.room``."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in named:
            package, *parts = name.split(".")
            if package == "raclora_jax":
                rooms.add(".".join(parts[:2]))
    return rooms


def imported_packages(path: pathlib.Path) -> set[str]:
    """Top-level packages that a file imports."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            packages.add(node.module.partition(".")[0])
    return packages


def test_rooms_are_known():
    for folder, rooms in ROOMS.items():
        found = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
        assert found == set(rooms.split())
    top = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert top - {"__init__", "__pycache__", "_extras", "py"} == {*ROOMS, *NAMESPACES}


@pytest.mark.parametrize(("folder", "room"), ALL_ROOMS, ids=[r for _, r in ALL_ROOMS])
def test_data_flows_one_way(folder, room):
    own = ROOMS[folder].split()
    before = own[: own.index(room)]
    for name in imported_rooms(PACKAGE / folder / f"{room}.py") - {"_extras.extra"}:
        into, _, imported = name.partition(".")
        assert into in BELOW[folder] or (into == folder and imported in before), name
        for group in STRANGERS:
            assert not (into == folder and {room, imported} <= group), name


def test_what_is_missing_names_the_command_that_installs_it():
    """And modules come with their first name, as README writes them."""
    code = """
import sys
for name in ("flax", "orbax", "safetensors", "qwix", "tunix", "dp_accounting"):
    sys.modules[name] = None
import jax.numpy as jnp, raclora_jax as rl
assert "theory" in dir(rl) and rl.theory.Gd and rl.federated and rl.methods
def said(call, extra):
    try:
        call()
    except ModuleNotFoundError as error:
        assert f"pip install 'raclora-jax[{extra}]'" in str(error), error
    else:
        raise AssertionError(extra)
said(lambda: rl.flax, "flax")
said(lambda: rl.follow, "follow")
said(lambda: rl.peft, "peft")
said(lambda: rl.quantized, "quantized")
said(lambda: rl.tunix, "flax")
said(lambda: rl.checkpoint.Checkpointer("run", 2), "checkpoint")
private = rl.federated.Privacy(clip=1.0, noise_multiplier=1.0, take=2, key=0)
said(lambda: rl.federated.epsilon(private, clients=9, rounds=1, delta=0.1), "privacy")
try:
    rl.theorie
except AttributeError:
    print("named")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "named\n", done.stderr


def test_folders_say_what_they_are_and_no_more():
    for folder in ROOMS.keys() - {*NAMESPACES}:
        body = ast.parse((PACKAGE / folder / "__init__.py").read_text()).body
        assert len(body) == 1
        assert isinstance(body[0], ast.Expr)


def test_nothing_imports_a_public_namespace():
    for path in PACKAGE.rglob("*.py"):
        own = {path.relative_to(PACKAGE).parts[0]}
        if own in ({"follow"}, {"checkpoint"}):
            own |= {"quantized"}  # who ends the links of a quantised base merges by it
        if own == {"tunix"}:
            own |= {"flax", "follow"}  # its trainers step and send by those rooms
        tops = {name.partition(".")[0] for name in imported_rooms(path)}
        assert not tops & (set(NAMESPACES) - own), path


def test_names_are_functions_and_rooms_are_private():
    """``import raclora_jax.summary`` must not give a function where a module is meant."""
    shown = {name for name in dir(rl) if not name.startswith("_")}
    assert shown == {*rl.__all__, *NAMESPACES}
    for module in modules():
        assert inspect.ismodule(module)
        parent, _, name = module.__name__.rpartition(".")
        if parent:
            assert getattr(importlib.import_module(parent), name) is module


def test_only_flax_room_imports_flax():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name not in ("flax", "tunix"):
            assert "flax" not in imported_packages(path), path.name


def test_core_needs_few_packages():
    allowed = {"jax", "numpy", "optax", "raclora_jax", *sys.stdlib_module_names}
    for path in PACKAGE.rglob("*.py"):
        extra = OPTIONAL.get(path.name, set())
        assert imported_packages(path) <= allowed | extra, path.name


def test_no_private_modules():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Attribute):
                names = [node.attr] if node.attr in ("_src",) else []
            assert not any("_src" in name for name in names), path.name


def modules():
    yield rl
    for found in pkgutil.walk_packages(rl.__path__, "raclora_jax."):
        if found.name.split(".")[1] not in ABSENT:
            yield importlib.import_module(found.name)


def public_functions():
    for name in rl.__all__:
        yield name, getattr(rl, name)
    for folder in (
        "checkpoint",
        "estimators",
        "federated",
        "flax",
        "follow",
        "methods",
        "peft",
        "quantized",
        "sharding",
        "theory",
    ):
        if folder in ABSENT:
            continue
        namespace = importlib.import_module(f"raclora_jax.{folder}")
        for name in namespace.__all__:
            yield f"{folder}.{name}", getattr(namespace, name)


for namespace in set(NAMESPACES) - ABSENT:
    importlib.import_module(f"raclora_jax.{namespace}")
PUBLIC = list(public_functions())


def test_all_is_sorted_and_true():
    assert list(rl.__all__) == sorted(rl.__all__)
    for module in modules():
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name)


@pytest.mark.parametrize(("name", "thing"), PUBLIC, ids=[name for name, _ in PUBLIC])
def test_public_docstrings(name, thing):
    doc = inspect.getdoc(thing)
    assert doc, name
    assert doc.splitlines()[0].endswith(".")
    if not inspect.isfunction(thing):
        return
    parameters = inspect.signature(thing).parameters
    for section in [*(["Args:"] if parameters else []), "Returns:", "Example:"]:
        assert section in doc, f"{name} lacks {section}"
    for parameter in parameters.values():
        assert parameter.name in doc, f"{name} does not explain {parameter.name}"
        if parameter.default is not inspect.Parameter.empty:
            # link counts sketches and reads naturally by position or name alike; a loss
            # stands before its arguments.
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY or (
                parameter.name in ("link", "loss_fn")
            )


@pytest.mark.parametrize(("name", "thing"), PUBLIC, ids=[name for name, _ in PUBLIC])
def test_randomness_is_a_required_keyword(name, thing):
    if not inspect.isfunction(thing):
        return
    key = inspect.signature(thing).parameters.get("key")
    assert key is None or key.kind is inspect.Parameter.KEYWORD_ONLY
    assert key is None or key.default is inspect.Parameter.empty


def test_learning_rate_annotation_tells_of_schedules():
    parameter = inspect.signature(rl.raclora).parameters["learning_rate"]
    assert "ScalarOrSchedule" in str(parameter.annotation)


def test_package_is_quiet_about_precision():
    """Importing the package and using it changes no global JAX setting."""
    before = jax.config.jax_enable_x64, jax.config.jax_threefry_partitionable
    rl.sample_sketch(jnp.zeros((6, 4)), 2, key=0)
    assert (jax.config.jax_enable_x64, jax.config.jax_threefry_partitionable) == before
