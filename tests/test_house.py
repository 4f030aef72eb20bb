"""The plan of the house: imports point down, only entry points know Hydra, files stay readable."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each room of sae_zoo may import of the others. Files directly in sae_zoo/ are entry points, except these.
ROOMS = {
    "functional": set(),
    "training": {"functional"},
    "saes": {"functional", "training", "records", "files"},
    "lm": {"files"},
    "data": {"functional", "lm", "records", "files"},
    "evaluation": {"functional", "lm"},
    "planning": {"functional", "saes", "lm", "data"},
    "running": {"training", "saes", "lm", "data", "evaluation", "records", "files", "command_line", "process"},
    "frontier": {"records", "paths"},
    "command_line": set(),
    "records": {"files"},
    "files": set(),
    "process": set(),
    "paths": set(),
}
PACKAGES = ("sae_zoo", "analysis", "benchmarks", "hydra_plugins")
MODULES = {path.relative_to(ROOT): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
# Of analysis: what looks into SAEs, which no record can hold.
USE_SAES = {"theory", "thresholds", "latents", "dashboard"}
READ_RECORDS = {"records", "frontier", "command_line"}
NO_TORCH = "sae_zoo.functional.kernel_widths"
KNOW_HYDRA = {"sae_zoo": {"train", "plan", "harvest", "evaluate", "pretrain", "config"}, "analysis": set(),
              "benchmarks": set(), "hydra_plugins": {"sae_zoo_one_stream"}}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "sae_zoo")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_down(module):
    room = module.parts[1].removesuffix(".py")
    for name in imports(MODULES[module]):
        parts = name.split(".")
        if parts[0] == "hydra":
            assert room in KNOW_HYDRA[module.parts[0]], f"{module} imports {name}"
        if parts[0] in ("analysis", "benchmarks"):  # nobody's but their own
            assert module.parts[0] == parts[0], f"{module} imports {name}"
        if module.parts[0] == parts[0] == "sae_zoo" and len(parts) > 1 and room in ROOMS:
            assert parts[1] in ROOMS[room] | {room}, f"{module} imports {name}"
        if module.parts[0] == "analysis" and room not in USE_SAES and parts[0] == "sae_zoo" and name != NO_TORCH:
            assert parts[1] in READ_RECORDS, f"{module} imports {name}: analysis reads records only"


def test_functional_is_torch_only_but_for_its_kernels_and_their_memory():
    for module, path in MODULES.items():
        if "functional" in module.parts:
            more = {"cpu_kernels": {"numpy", "numba"}, "workspace": {"numpy"}, "triton_kernels": {"triton"}}
            allowed = sys.stdlib_module_names | {"torch", "sae_zoo"} | more.get(module.stem, set())
            foreign = {name.split(".")[0] for name in imports(path)} - allowed
            assert not foreign, f"{module} imports {foreign}"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_files_are_one_room(module):
    assert len(MODULES[module].read_text().splitlines()) <= 400
