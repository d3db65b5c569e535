"""README.md says what is true. `python tests/test_readme.py --write` writes its reference anew."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sweep.children import Planner
from sweep.space import cover

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- reference: made by `make readme` -->\n", "<!-- end of reference -->\n"


def parts() -> tuple[str, str, str]:
    """Returns README.md before, within and after the reference."""
    before, rest = README.read_text().split(BEGIN)
    reference, after = rest.split(END)
    return before, reference, after


METHODS = ROOT / "docs" / "methods.md"
BEGIN_METHODS, END_METHODS = "<!-- methods: made by `make readme` -->\n", "<!-- end of methods -->\n"


def methods_parts() -> tuple[str, str, str]:
    """Returns docs/methods.md before, within and after its table."""
    before, rest = METHODS.read_text().split(BEGIN_METHODS)
    table, after = rest.split(END_METHODS)
    return before, table, after


def commands() -> list[list[str]]:
    """Returns the commands in the shell blocks of README.md and docs/searches.md that start a script of ours."""
    documents = README.read_text() + (ROOT / "docs/searches.md").read_text()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", documents, re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("python ")]


def test_the_reference_is_that_of_the_signatures() -> None:
    from model import schema

    assert parts()[1] == schema.reference(), "run `make readme`"


def test_the_table_of_methods_is_that_of_their_attributes_and_docstrings() -> None:
    from model import schema
    from model.losses import LOSSES

    table = methods_parts()[1]
    assert table == schema.methods(), "run `make readme`"
    for name in LOSSES:
        [row] = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
        assert len([cell for cell in row.split(" | ") if cell.strip(" |")]) >= 5, "each has a summary and a source"


@pytest.mark.parametrize("section", ["loss", "teacher", "unlabelled", "dataset", "student"])
def test_the_sections_that_docs_methods_shows_pass_the_check(section: str) -> None:
    from model import schema

    blocks = re.findall(r"```json\n(.*?)```", METHODS.read_text(), re.DOTALL)
    shown = [json.loads(f"{{{block}}}") for block in blocks]
    assert any(section in params for params in shown)
    reference = json.loads((ROOT / "experiments/cnn_distill_resnet20/params.json").read_text())
    for params in (params for params in shown if section in params):
        merged = {**reference, **params}
        if params.get("loss") and "dml" in json.dumps(params):
            del merged["teacher"]
        assert schema.resolve(merged)[1] == []


def test_every_registered_entry_is_in_the_reference() -> None:
    from model import schema

    for registry in schema.SECTIONS.values():
        for name in registry:
            assert f"| `{name}" in parts()[1]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_name_scripts_flags_and_directories_that_exist(command: list[str]) -> None:
    _, script, *arguments = command
    if script == "-m":
        assert (ROOT / arguments[0].replace(".", "/")).with_suffix(".py").is_file()
        return
    assert (ROOT / script).is_file()
    source = (ROOT / script).read_text()
    for flag in (word for word in arguments if word.startswith("--")):
        assert f'"{flag}"' in source, flag
    for folder in (word for word in arguments if word.startswith("experiments")):
        assert (ROOT / folder).is_dir()


def test_there_are_commands_for_every_script() -> None:
    scripts = {command[1] for command in commands()}
    assert {"train.py", "evaluate.py", "search_hyperparams.py", "synthesize_results.py"} <= scripts


@pytest.mark.parametrize("script", ["train", "evaluate", "search_hyperparams", "synthesize_results"])
def test_help_describes_every_flag(script: str) -> None:
    command = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for flag in re.findall(r'add_argument\(\s*"(--\w+)"', (ROOT / f"{script}.py").read_text()):
        assert flag in shown
        assert flag in README.read_text(), f"{flag} of {script}.py is not in README.md"


def test_the_search_json_that_is_explained_can_be_read(tmp_path: Path) -> None:
    [text] = re.findall(r"```json\n(.*?)```", (ROOT / "docs/searches.md").read_text(), re.DOTALL)
    (tmp_path / "search.json").write_text(text)
    (tmp_path / "params.json").write_text((ROOT / "experiments/cnn_distill_resnet20/params.json").read_text())
    search = Planner.read(tmp_path).search
    assert search.space.keys() < json.loads(text).keys()
    assert len(cover(search)) >= 3


def test_links_lead_to_files_that_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "docs/searches.md", "docs/clusters.md", "docs/methods.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text()):
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"`make ([a-z-]+)", (ROOT / document).read_text()):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document}: make {target}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from model import schema

    before, _, after = parts()
    before_methods, _, after_methods = methods_parts()
    if "--write" in sys.argv:
        README.write_text(before + BEGIN + schema.reference() + END + after)
        METHODS.write_text(before_methods + BEGIN_METHODS + schema.methods() + END_METHODS + after_methods)
