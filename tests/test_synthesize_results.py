from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from helpers import Make, Script

import synthesize_results
import train
from model import schema
from report.plots import points, read_journal
from sweep.children import Planner
from sweep.children import write as write_children
from sweep.space import grid
from utils import RunError, read_json, write_json

ROOT = Path(__file__).parent.parent


def write(folder: Path, accuracy: float | None = None, seed: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "params.json", {"seed": seed})
    if accuracy is not None:
        run = {"status": "completed", "epoch": 3, "num_epochs": 3, "params": {"seed": seed}}
        write_json(folder / "run.json", run)
        write_json(folder / "metrics_val_best_weights.json", {"accuracy": accuracy, "cross_entropy": 1.0, "epoch": 2})


def synthesize(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["synthesize_results.py", *map(str, arguments)])
    return synthesize_results.main()


def test_the_terminal_and_results_md_show_the_same_and_csv_stands_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", 0.5)
    write(tmp_path / "b", 0.75, seed=2)
    write(tmp_path / "c")
    monkeypatch.chdir(tmp_path)
    assert synthesize(monkeypatch, "--parent_dir", ".") == 0
    text = (tmp_path / "results.md").read_text()
    assert capsys.readouterr().out == text
    experiments, _ = text.split("\n\nmeans ± ")
    first, blank, header, _, *rows = experiments.splitlines()
    command = "python synthesize_results.py --parent_dir ."
    assert (first, blank) == (f"`{command}` found 3 experiments: 2 completed, 1 pending", "")
    assert header.startswith("| experiment")
    assert [row.split("|")[1].strip() for row in rows] == ["b", "a", "c"]
    assert "**0.7500**" in rows[0]
    assert (tmp_path / "results.csv").read_text().splitlines()[1].startswith("b,2,0.75,1.0,2,")


def test_a_second_run_replaces_the_files_and_does_not_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", 0.5)
    synthesize(monkeypatch, "--parent_dir", tmp_path)
    first = (tmp_path / "results.md").read_bytes()
    synthesize(monkeypatch, "--parent_dir", tmp_path)
    assert (tmp_path / "results.md").read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {"a", "results.csv", "results.md"}


def test_a_problem_is_a_warning_at_the_end_and_the_status_is_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", 0.5)
    write(tmp_path / "b", 0.75)
    (tmp_path / "b" / "run.json").write_text('{"status": "comp')
    assert synthesize(monkeypatch, "--parent_dir", tmp_path) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"warning: {tmp_path / 'b'}: run.json: not JSON")
    assert "unreadable: run.json: not JSON" in (tmp_path / "results.md").read_text()


def test_quiet_writes_the_files_and_says_only_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", 0.5)
    synthesize(monkeypatch, "--parent_dir", tmp_path, "--quiet")
    assert capsys.readouterr() == ("", "")
    (tmp_path / "a" / "params.json").write_text("")
    synthesize(monkeypatch, "--parent_dir", tmp_path, "--quiet")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"warning: {tmp_path / 'a'}: params.json: not JSON")
    assert (tmp_path / "results.csv").exists()


def test_an_empty_tree_is_a_sentence_and_status_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert synthesize(monkeypatch, "--parent_dir", tmp_path) == 0
    assert capsys.readouterr().out.startswith(f"no experiments under {tmp_path}: a folder with a params.json is one; ")
    assert list(tmp_path.iterdir()) == []


def test_a_tree_that_cannot_be_written_is_shown_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", 0.5)
    (tmp_path / "results.md").mkdir()
    with pytest.raises(RunError, match="cannot write"):
        synthesize(monkeypatch, "--parent_dir", tmp_path)
    assert "**0.5000**" in capsys.readouterr().out


def test_sort_names_another_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", 0.5)
    write(tmp_path / "b", 0.75)
    write_json(tmp_path / "a" / "metrics_test_best_weights.json", {"accuracy": 0.5})
    synthesize(monkeypatch, "--parent_dir", tmp_path, "--sort", "test_accuracy")
    rows = capsys.readouterr().out.splitlines()[4:]
    assert str(tmp_path / "a") in rows[0]
    assert "**0.7500**" in rows[1]


def test_top_5_is_shown_where_it_was_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", 0.5)
    synthesize(monkeypatch, "--parent_dir", tmp_path)
    assert "top-5" not in capsys.readouterr().out
    write_json(tmp_path / "a" / "metrics_test_best_weights.json", {"accuracy": 0.5, "accuracy_top5": 0.875})
    synthesize(monkeypatch, "--parent_dir", tmp_path)
    header, _, row = capsys.readouterr().out.splitlines()[2:5]
    cells = dict(zip(*([cell.strip(" *") for cell in line.split("|")] for line in (header, row)), strict=True))
    assert cells["test top-5 accuracy"] == "0.8750"


def test_names_that_no_file_can_hold_do_not_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (b"not\xffutf8", b"new\nline", b"pi|pe", b"=cmd()", b"-x"):
        write(tmp_path / name.decode(errors="surrogateescape"), 0.5)
    monkeypatch.chdir(tmp_path)
    assert synthesize(monkeypatch, "--parent_dir", ".") == 0
    table = (tmp_path / "results.md").read_text()
    assert len(table.splitlines()) == 2 + 2 + 5
    assert r"| pi\|pe" in table
    assert "\n'=cmd()," in (tmp_path / "results.csv").read_text()


def test_reading_while_runs_write_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", 0.5)
    stop = threading.Event()

    def train() -> None:
        epoch = 0
        while not stop.is_set():
            epoch += 1
            write_json(tmp_path / "a" / "metrics_val_best_weights.json", {"accuracy": 0.5, "epoch": epoch})
            write_json(tmp_path / "a" / "run.json", {"status": "running", "epoch": epoch, "params": {}})
            if epoch % 5 == 0:  # --restart
                (tmp_path / "a" / "run.json").unlink()

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(30):
            assert synthesize(monkeypatch, "--parent_dir", tmp_path, "--quiet") == 0
    finally:
        stop.set()
        thread.join()


def write_journal(folder: Path, *accuracies: float) -> None:
    records = [{"epoch": epoch, "val": {"accuracy": value}} for epoch, value in enumerate(accuracies, 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


def images(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def test_plots_draws_each_run_and_all_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", 0.5)
    write(tmp_path / "b" / "c", 0.75)
    write(tmp_path / "pending")
    write_journal(tmp_path / "a", 0.25, 0.5)
    write_journal(tmp_path / "b" / "c", 0.75)
    assert synthesize(monkeypatch, "--parent_dir", tmp_path) == 0
    assert images(tmp_path) == []
    assert synthesize(monkeypatch, "--parent_dir", tmp_path, "--plots") == 0
    assert images(tmp_path) == ["a/curves.png", "b/c/curves.png", "comparison.png"]
    assert "warning" not in (tmp_path / "results.md").read_text()
    drawn = {name: (tmp_path / name).read_bytes() for name in images(tmp_path)}
    assert synthesize(monkeypatch, "--parent_dir", tmp_path, "--plots") == 0
    assert {name: (tmp_path / name).read_bytes() for name in images(tmp_path)} == drawn


def test_plots_draws_a_heat_map_of_each_search_over_two_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for parent, alpha, temperature in itertools.product(("a", "b/c"), (0.5, 0.9), (1, 4)):
        folder = tmp_path / parent / f"{alpha}_{temperature}"
        write(folder, alpha / temperature)
        for name in ("params.json", "run.json"):
            params = {"seed": 1, "loss": {"alpha": alpha, "temperature": temperature}}
            write_json(folder / name, params if name == "params.json" else {"status": "completed", "params": params})
    assert synthesize(monkeypatch, "--parent_dir", tmp_path, "--quiet") == 0
    assert images(tmp_path) == []
    assert synthesize(monkeypatch, "--parent_dir", tmp_path, "--quiet", "--plots") == 0
    assert images(tmp_path) == ["a/heatmap.png", "b/c/heatmap.png"]


def test_a_journal_that_cannot_be_drawn_is_a_warning_and_the_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("broken", "good", "gone"):
        write(tmp_path / name, 0.5)
    (tmp_path / "broken" / "metrics.jsonl").write_text("{}\n")
    write_journal(tmp_path / "good", 0.5)
    assert synthesize(monkeypatch, "--parent_dir", tmp_path, "--plots") == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == [
        f"warning: {tmp_path}/broken/metrics.jsonl: line 1 has no epoch; there are no curves",
        f"warning: {tmp_path}/gone/metrics.jsonl: is not there, so there are no curves",
    ]
    assert images(tmp_path) == ["good/curves.png"]


def test_an_image_that_cannot_be_written_does_not_cost_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", 0.5)
    write_journal(tmp_path / "a", 0.5)
    (tmp_path / "a" / "curves.png").mkdir()
    with pytest.raises(RunError, match="cannot write"):
        synthesize(monkeypatch, "--parent_dir", tmp_path, "--plots")
    assert capsys.readouterr().out == (tmp_path / "results.md").read_text()


def test_the_journal_of_a_real_run_has_all_that_is_drawn(make_experiment: Make, script: Script) -> None:
    folder = make_experiment("run")
    assert script(train, "--model_dir", folder).status == 0
    assert script(synthesize_results, "--parent_dir", folder.parent, "--plots").status == 0
    assert images(folder.parent) == ["run/curves.png"]
    records = read_journal(folder / "metrics.jsonl")
    for keys in (("train", "loss"), ("val", "loss"), ("train", "accuracy"), ("val", "accuracy"), ("learning_rate",)):
        assert [epoch for epoch, _ in points(records, *keys)] == [1, 2], keys


def test_the_best_temperature_is_compared_with_the_calibrated_one_below_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for temperature, accuracy in ((1.0, 0.5), (4.0, 0.75)):
        folder = tmp_path / f"T{temperature}"
        write(folder, accuracy)
        params = {"teacher": {"model_dir": str(tmp_path / "te|acher")}, "loss": {"temperature": temperature}}
        write_json(folder / "params.json", params)
        write_json(folder / "run.json", {"status": "completed", "params": params})
    synthesize(monkeypatch, "--parent_dir", tmp_path)
    text = capsys.readouterr().out
    assert text == (tmp_path / "results.md").read_text()
    *_, table_end, blank, line = text.splitlines()
    assert table_end.startswith("| ")
    assert blank == ""
    assert line.startswith("best T of these runs: 4 (val accuracy 0.7500); the teacher ")
    assert line.endswith("--split val --calibrate`")


def table_of_means(text: str) -> list[list[str]]:
    """Returns the cells of the second table, its header first."""
    lines = text.split("\n\n")[3].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:]]


def test_real_runs_of_two_seeds_have_a_mean_below_the_table_and_csv_has_the_runs(
    make_experiment: Make, script: Script
) -> None:
    folders = [make_experiment(f"seed_{seed}", seed=seed) for seed in (1, 2, 3)]
    for folder in folders[:2]:
        assert script(train, "--model_dir", folder).status == 0
    text = script(synthesize_results, "--parent_dir", folders[0].parent).out
    first, second = (read_json(folder / "metrics_val_best_weights.json")["accuracy"] for folder in folders[:2])
    # Of two numbers the sample standard deviation is their distance over the root of 2.
    spread = f"{(first + second) / 2:.4f} ± {abs(first - second) / 2**0.5:.4f}"
    (header, line) = table_of_means(text)
    assert (header[0], line[:3]) == ("n", ["2 of 3", "1, 2", f"**{spread}**"])
    assert text.endswith("\n\nnot completed yet or without val accuracy, so not in n: 1 of these 3 runs\n")
    assert len((folders[0].parent / "results.csv").read_text().splitlines()) == 1 + 3


def test_the_five_seeds_of_seed_000_are_one_row_per_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    children = []
    for search in sorted((ROOT / "experiments" / "s000" / "todo_5seeds").glob("*/search.json")):
        parent = tmp_path / search.parent.name
        parent.mkdir()
        for name in ("params.json", "search.json"):
            shutil.copy(search.parent / name, parent)
        planner = Planner.read(parent)
        children += planner.children(grid(planner.search))
    write_children(children)
    for child in children:
        params, problems = schema.resolve(child.params)
        assert problems == []
        write_json(child.dir / "run.json", {"status": "completed", "params": params})
        write_json(child.dir / "metrics_val_best_weights.json", {"accuracy": 0.8 + child.params["seed"] / 100})
    synthesize(monkeypatch, "--parent_dir", tmp_path)
    header, *lines = table_of_means(capsys.readouterr().out)
    assert (len(children), len(lines)) == (80, 16)
    # 0.80 to 0.84: the squared deviations are 4, 1, 0, 1 and 4 of 1e-4, a fourth of whose sum is 2.5e-4.
    assert {tuple(line[-4:]) for line in lines} == {("5", "0, 1, 2, 3, 4", "**0.8200 ± 0.0158**", "")}
    assert not {"experiment", "seed"} & set(header)
    assert len({tuple(line[:-4]) for line in lines}) == 16


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "synthesize_results.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def test_a_parent_dir_that_does_not_exist_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = run_script("--parent_dir", tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "nowhere: No such file or directory; name the folder" in done.stderr


def test_no_torch_is_imported(tmp_path: Path) -> None:
    write(tmp_path / "a", 0.5)
    code = (
        f"import sys; sys.argv = ['x', '--parent_dir', {str(tmp_path)!r}]\n"
        "import synthesize_results; synthesize_results.main()\n"
        "import json; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    modules = json.loads(done.stdout.splitlines()[-1])
    assert "pandas" in modules
    assert not {"torch", "torchvision", "model", "matplotlib"} & set(modules)


def test_pandas_is_not_imported_before_there_is_a_table() -> None:
    code = "import sys, synthesize_results; sys.exit('pandas' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_thousand_experiments_are_a_thousand_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Path("/dev/shm")  # on a disk that is mounted with discard, removing them takes seconds
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as parent:
        for index in range(1000):
            folder = Path(parent, f"group_{index % 10}", f"seed_{index}")
            folder.mkdir(parents=True)
            (folder / "params.json").write_text(f'{{"seed": {index}}}')
        assert synthesize(monkeypatch, "--parent_dir", parent, "--quiet") == 0
        assert len(Path(parent, "results.csv").read_text().splitlines()) == 1001
