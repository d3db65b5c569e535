"""The house: who may import whom, what a script may load, what is committed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, committed_files

SCRIPTS = ("train", "evaluate", "search_hyperparams", "synthesize_results")
GROUND = {"utils", "process", "checkpoint", "experiment", "sources"}
OURS = {*SCRIPTS, *GROUND, "teaching", "stores", "model", "sweep", "report"}
# room -> the rooms it may import, besides its own
ALLOWED = {
    "utils": set(),
    "process": {"utils"},
    "checkpoint": {"utils"},
    "experiment": {"utils", "process", "checkpoint"},
    "sources": {"utils", "checkpoint", "experiment"},
    "model": set(),
    "teaching": {*GROUND, "model"},
    "stores": {*GROUND, "model", "teaching"},
    "sweep": GROUND,
    "report": GROUND,
    **{script: OURS - set(SCRIPTS) for script in SCRIPTS},
}
# inside model/: a part may import those below it
BOTTOM = {"registry", "outputs", "errors", "rng", "plugins", "legacy", "devices", "parallel", "taps", "projected"}
PARTS = {
    **dict.fromkeys(BOTTOM, BOTTOM),
    "nets": BOTTOM,
    "losses": BOTTOM,
    "data": BOTTOM,
    "metrics": BOTTOM,
    "optim": BOTTOM,
    "folding": BOTTOM,
    "teacher_store": BOTTOM,
    "teacher": {*BOTTOM, "nets", "folding", "teacher_store"},
    "ensemble": {*BOTTOM, "losses", "teacher"},
    "sizes": {*BOTTOM, "nets", "metrics"},
    "engine": {*BOTTOM, "nets", "losses", "data", "optim", "teacher", "ensemble"},
    "schema": {*BOTTOM, "nets", "losses", "data", "optim"},
}


def sources() -> list[Path]:
    return list(ROOT.glob("*.py")) + [
        path for room in ("model", "sweep", "report") for path in (ROOT / room).rglob("*.py")
    ]


def imports(path: Path) -> list[str]:
    """Returns the dotted names of our own modules that a file imports, at any depth of its code."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found += [f"{module}.{alias.name}" for alias in node.names] if module == "model" else [module]
    return [name for name in found if name.split(".")[0] in OURS]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_room_imports_only_what_it_may(path: Path) -> None:
    relative = path.relative_to(ROOT).with_suffix("").parts
    room = relative[0]
    for name in imports(path):
        target, *rest = name.split(".")
        assert target == room or target in ALLOWED[room], f"{path} imports {name}"
        if room == target == "model" and rest and relative[1] != "__init__":
            assert rest[0] in {relative[1], *PARTS[relative[1]]}, f"{path} imports {name}"


def test_the_rules_cover_every_file() -> None:
    for path in sources():
        relative = path.relative_to(ROOT).with_suffix("").parts
        assert relative[0] in ALLOWED
        assert relative[0] != "model" or relative[1] in {*PARTS, "__init__"}


@pytest.mark.parametrize("module", [*sorted(GROUND), "search_hyperparams", "synthesize_results"])
def test_torch_is_not_loaded_by_what_does_not_need_it(module: str) -> None:
    heavy = ("torch", "torchvision", "pandas", "numpy", "sklearn", "tensorboardX", "pydantic", "optuna", "rich")
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["train", "evaluate"])
def test_training_loads_no_package_before_it_is_needed(module: str) -> None:
    heavy = ("torchvision", "timm", "pandas", "sklearn", "scipy", "tensorboardX", "matplotlib")
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_test_file_mirrors_a_source_file() -> None:
    about_the_whole = {"test_structure", "test_readme", "test_experiments", "test_bad_input", "test_net_contracts"}
    about_the_whole |= {"test_recipes", "test_net_sizes", "test_upstream_nets", "test_loss_contracts"}
    about_the_whole |= {"test_traps", "test_script_traps"}
    for path in (ROOT / "tests").rglob("test_*.py"):
        if path.stem not in about_the_whole:
            mirrored = path.relative_to(ROOT / "tests").with_name(path.name.removeprefix("test_"))
            assert (ROOT / mirrored).is_file(), f"{path} mirrors no {mirrored}"


def test_no_shell_no_unsafe_load_no_machine_path_in_the_code() -> None:
    for path in sources():
        text = path.read_text()
        for word in ("shell=True", "weights_only=False", "os.system", "pickle.load", "/tmp/"):
            assert word not in text, f"{path}: {word}"


def test_nothing_large_is_committed() -> None:
    for name in committed_files():
        assert (ROOT / name).stat().st_size < 300_000, name


def test_json_files_are_tidy() -> None:
    for name in committed_files():
        if name.startswith("experiments/") and name.endswith(".json"):
            text = (ROOT / name).read_text()
            assert text == json.dumps(json.loads(text), indent=4) + "\n", name
