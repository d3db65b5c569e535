from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from process import ConsoleHandler
from sweep import view as module
from sweep.view import Running, Snapshot, View, estimate, read_running, text

NOW = 1_800_000_000.0
RUN = {
    "status": "running",
    "epoch": 3,
    "num_epochs": 10,
    "progress": {"images_per_second": 1234.5, "epoch_seconds": 60.0},
    "attempts": [{"started": "2026-11-20T10:00:00+0000"}],
}
LAST = {"accuracy": 0.625, "accuracy_top5": 0.875, "loss": 1.5, "epoch": 3}
UNKNOWN = Running("run", 0, 0, None, None, None)


def write(tmp_path: Path, run: Any = RUN, last: Any = LAST, ago: float = 15.0) -> Path:
    """Writes a run whose newest epoch has ended so many seconds ago."""
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    for name, content in (("run.json", run), ("metrics_val_last_weights.json", last)):
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.jsonl").touch()
    os.utime(folder / "metrics.jsonl", (NOW - ago, NOW - ago))
    return folder


def running(number: int, **values: Any) -> Running:
    return Running(**{**vars(Running(f"alpha_{number}", number, 100, 0.5, 1000.0, 75.0)), **values})


def snapshot(number: int = 2, **values: Any) -> Snapshot:
    counts = {"done": 3, "skipped": 1, "failed": 0, "running": number, "waiting": 4}
    runs = [running(index) for index in range(number)]
    fields = Snapshot("experiments/search", "val.accuracy", counts, 8 + number, runs, "alpha_9: accuracy 0.9", 4000.0)
    return Snapshot(**{**vars(fields), **values})


# a running trial


def test_a_run_is_described_by_its_files(tmp_path: Path) -> None:
    found = read_running(write(tmp_path), "val.accuracy", now=NOW)
    assert found == Running("run", 3, 10, 0.625, 1234.5, 7 * 60 - 15)


@pytest.mark.parametrize(("metric", "value"), [("val.loss", 1.5), ("val.accuracy_top5", 0.875), ("val.f1", None)])
def test_the_metric_is_that_of_the_newest_epoch(tmp_path: Path, metric: str, value: float | None) -> None:
    assert read_running(write(tmp_path), metric, now=NOW).value == value


@pytest.mark.parametrize(("ago", "left"), [(0, 420), (59, 361), (60, 360), (10_000, 360), (-50, 420)])
def test_an_epoch_that_takes_long_leaves_the_others_as_they_are(tmp_path: Path, ago: float, left: float) -> None:
    assert read_running(write(tmp_path, ago=ago), "val.accuracy", now=NOW).seconds_left == left


@pytest.mark.parametrize(("epoch", "ago", "left"), [(9, 10, 50), (9, 100, 0), (10, 0, 0), (10, 100, 0), (12, 5, 0)])
def test_the_time_left_is_never_below_0(tmp_path: Path, epoch: int, ago: float, left: float) -> None:
    folder = write(tmp_path, RUN | {"epoch": epoch}, ago=ago)
    assert read_running(folder, "val.accuracy", now=NOW).seconds_left == left


def test_the_speed_of_an_earlier_attempt_is_not_shown_as_that_of_a_new_one(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert read_running(folder, "val.accuracy", 1, NOW) == Running("run", 3, 10, 0.625, None, None)
    write(tmp_path, RUN | {"attempts": [{}, {}]})
    assert read_running(folder, "val.accuracy", 1, NOW).seconds_left == 405
    write(tmp_path, {key: value for key, value in RUN.items() if key != "progress"})  # before its first epoch
    assert read_running(folder, "val.accuracy", 0, NOW) == Running("run", 3, 10, 0.625, None, None)


def test_what_is_missing_is_not_known(tmp_path: Path) -> None:
    assert read_running(tmp_path / "run", "val.accuracy") == UNKNOWN
    folder = write(tmp_path)
    (folder / "metrics.jsonl").unlink()
    assert read_running(folder, "val.accuracy") == Running("run", 3, 10, 0.625, 1234.5, None)
    (folder / "run.json").unlink()
    assert read_running(folder, "val.accuracy") == Running("run", 0, 0, 0.625, None, None)


def test_half_of_a_file_is_nothing_and_no_error(tmp_path: Path) -> None:
    folder = write(tmp_path)
    for name in ("run.json", "metrics_val_last_weights.json"):
        content = (folder / name).read_bytes()
        for length in range(len(content)):
            (folder / name).write_bytes(content[:length])
            assert read_running(folder, "val.accuracy", now=NOW).name == "run"
    assert read_running(folder, "val.accuracy", now=NOW) == UNKNOWN


@pytest.mark.parametrize("value", [None, True, "3", [], {}, 10**400, {"epoch_seconds": "60"}, [[]]])
def test_what_no_run_writes_is_not_known(tmp_path: Path, value: Any) -> None:
    folder = write(tmp_path, dict.fromkeys(RUN, value), dict.fromkeys(LAST, value))
    assert read_running(folder, "val.accuracy", now=NOW) == UNKNOWN
    for content in (b"[]", b"\xff", b'{"epoch": NaN}', b"[" * 100_000):
        (folder / "run.json").write_bytes(content)
        assert read_running(folder, "val.accuracy", now=NOW) == UNKNOWN


# the whole search


def test_nothing_is_estimated_before_anything_has_finished() -> None:
    assert estimate([], 10, [running(0)], 2) is None


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
@pytest.mark.parametrize("waiting", [0, 1, 2, 6, 7, 20])
def test_what_waits_is_done_in_rounds_of_as_many_as_there_are_slots(waiting: int, slots: int) -> None:
    assert estimate([5.0, 15.0], waiting, [], slots) == math.ceil(waiting / slots) * 10


def test_a_slot_that_gets_free_first_takes_the_next() -> None:
    runs = [running(0, seconds_left=4.0), running(1, seconds_left=25.0)]
    assert estimate([10.0], 0, runs, 2) == 25
    assert estimate([10.0], 2, runs, 2) == 25  # 4 + 10 + 10
    assert estimate([10.0], 3, runs, 2) == 34
    assert estimate([10.0], 1, runs, 3) == 25
    assert estimate([100.0], 1, runs, 3) == 100


def test_a_run_that_says_nothing_yet_takes_as_long_as_the_others() -> None:
    assert estimate([10.0, 20.0], 1, [running(0, seconds_left=None)], 1) == 30


# plain text


def test_the_text_says_what_there_is() -> None:
    runs = [
        running(3, seconds_left=3723.0, images_per_second=12345.6),
        running(12, value=None, images_per_second=0.5),
        Running("next", 0, 0, None, None, None),
    ]
    assert text(snapshot(3, running=runs)).splitlines() == [
        "experiments/search",
        "4 of 11 children have ended, about 1:06:40 left",
        "3 done, 1 skipped, 3 running, 4 waiting",
        "best: alpha_9: accuracy 0.9",
        "running    epoch  val.accuracy  images/s     left",
        "alpha_3    3/100        0.5000    12,346  1:02:03",
        "alpha_12  12/100                     0.5    01:15",
        "next",
    ]


def test_what_is_to_be_gone_on_with_has_not_ended() -> None:
    counts = {"completed": 1, "failed": 2, "pruned": 4, "pending": 8, "interrupted": 16, "stale": 32, "running": 64}
    assert text(snapshot(0, counts=counts, total=127)).splitlines()[1].startswith("7 of 127 children have ended")


def test_before_the_first_child_and_after_the_last_there_is_no_table() -> None:
    nothing = snapshot(0, seconds_left=None, counts={"done": 0, "running": 0}, total=5, best="none yet")
    assert text(nothing) == "experiments/search\n0 of 5 children have ended\nbest: none yet"


def test_every_line_fits_and_a_long_name_is_cut_in_the_middle() -> None:
    name = "alpha_0.9_" + "x" * 150 + "_seed_4"
    lines = text(snapshot(1, title=name, metric=name, best=name, running=[running(5, name=name)])).splitlines()
    assert {len(lines[0]), len(lines[3]), len(lines[5])} == {100 - len("best: ") + len("best: ")}
    assert max(map(len, lines)) == 100
    for line in (lines[0], lines[3].removeprefix("best: "), lines[5].split()[0]):
        assert line.startswith("alpha_0.9_")
        assert line.endswith("_seed_4")
        assert "..." in line


HOSTILE = "[red]a[/red] \x1b[31m\x1b]0;title\x07 :smile: \r\n\t\udcff"


def test_no_name_moves_the_cursor_or_is_markup() -> None:
    shown = text(snapshot(1, title=HOSTILE, metric=HOSTILE[:20], best=HOSTILE, running=[running(0, name=HOSTILE)]))
    assert shown.replace("\n", "").isprintable()
    assert len(shown.splitlines()) == 6
    assert shown.startswith("[red]a[/red] ?[31m?]0;title? :smile: ????\n")


# the live region


class Terminal(io.StringIO):
    """Stands in for a terminal; `lines` are what an eye would see there, all that has scrolled away included."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        return screen(self.getvalue(), self.width)


def screen(output: str, width: int) -> list[str]:
    """Does what a terminal does with the few codes that are sent to it."""
    rows: list[list[str]] = [[]]
    row = column = 0
    for code, number, final, char in re.findall(r"(\x1b\[(\??\d+)([A-Za-z]))|([\s\S])", output):
        if code:
            match final, number:
                case "A", _:
                    row -= int(number)
                    assert row >= 0
                case "K", "2":
                    rows[row] = []
                case "h" | "l", "?25":
                    pass
                case _:
                    raise AssertionError(f"unknown code {code!r}")
        elif char == "\r":
            column = 0
        else:
            if char == "\n" or column == width:
                row, column = row + 1, 0
                rows += [[]] * (row == len(rows))
            if char != "\n":
                rows[row] += [" "] * (column + 1 - len(rows[row]))
                rows[row][column] = char
                column += 1
    return ["".join(cells).rstrip() for cells in rows]


@contextlib.contextmanager
def view_on(terminal: Terminal) -> Iterator[View]:
    """Opens a view where standard output and errors go to a terminal."""
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal), View() as view:
        yield view


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 60 columns and 20 lines, on which every snapshot is drawn."""
    terminal = Terminal(60)
    for key, value in (("TERM", "xterm-256color"), ("COLUMNS", "60"), ("LINES", "20")):
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(module, "REDRAW_SECONDS", 0.0)
    return terminal


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """Logs as the scripts do."""
    logger = logging.Logger("test")
    logger.addHandler(ConsoleHandler())
    return logger


def test_snapshots_replace_each_other_and_leave_nothing(terminal: Terminal) -> None:
    with view_on(terminal) as view:
        view.show(snapshot(2))
        assert terminal.lines()[5].startswith("alpha_0 ")
        view.show(snapshot(7))
        view.show(snapshot(1, best="alpha_1: accuracy 0.95"))
        assert terminal.lines()[:6] == text(snapshot(1, best="alpha_1: accuracy 0.95")).splitlines()
        assert not any(terminal.lines()[6:])
    assert not any(terminal.lines())


def test_lines_that_are_logged_stand_above_whole_and_in_order(terminal: Terminal, say: logging.Logger) -> None:
    said = []
    with view_on(terminal) as view:
        for number in range(1, 40):
            view.show(snapshot(number % 9))
            said.append(f"[{number}/40] line {number} [bold]" + " word" * (number % 30))
            (say.error if number % 3 else say.info)(said[-1])
            region = text(snapshot(number % 9)).splitlines()
            lines = terminal.lines()
            assert [line for line in lines if line in region][:4] == region[:4]
    wrapped = [line[start : start + 60].rstrip() for line in said for start in range(0, len(line), 60)]
    assert [line for line in terminal.lines() if line] == wrapped


def test_what_does_not_fit_is_counted_in_one_line_and_leaves_room_for_the_log(
    terminal: Terminal, say: logging.Logger
) -> None:
    runs = [running(number, name=f"alpha_{number}_{'x' * 100}") for number in range(30)]
    with view_on(terminal) as view:
        view.show(snapshot(30, running=runs))
        say.info("a line")
        lines = [line for line in terminal.lines() if line]
    shown = [line for line in lines if line.startswith("alpha_")]
    assert lines[0] == "a line"
    assert lines[-1] == f"... and {30 - len(shown)} more"
    assert len(shown) >= 5
    assert all(line.endswith("01:15") for line in shown)
    assert len(lines) <= 1 + 15


@pytest.mark.parametrize(("columns", "rows"), [(40, 24), (20, 5), (1, 1), (300, 100)])
def test_every_size_of_a_window_will_do(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, columns: int, rows: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(rows))
    terminal.width = columns
    with view_on(terminal) as view:
        for number in (30, 2, 0):
            view.show(snapshot(number))
            assert len([line for line in terminal.lines() if line]) <= max(rows, 1)
    assert not any(terminal.lines())


def test_on_a_terminal_too_no_name_is_markup_or_a_code(terminal: Terminal) -> None:
    runs = [running(0, name=HOSTILE)]
    with view_on(terminal) as view:
        view.show(snapshot(1, title=HOSTILE, metric=HOSTILE[:16], best=HOSTILE, running=runs))
        lines = terminal.lines()
    assert lines[0] == "[red]a[/red] ?[31m?]0;title? :smile: ????"
    assert lines[4].split("  ")[-3].strip() == HOSTILE[:16].replace("\x1b", "?")


def test_redraws_are_rare(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REDRAW_SECONDS", 1000.0)
    with view_on(terminal) as view:
        assert view.due()
        view.show(snapshot(1))
        drawn = terminal.getvalue()
        assert not view.due()
        view.show(snapshot(2))
        assert terminal.getvalue() == drawn


def test_the_streams_are_as_they_were_afterwards_whatever_ended_it(terminal: Terminal) -> None:
    def fail() -> None:
        with View() as view:
            view.show(snapshot())
            assert sys.stdout is not terminal
            assert sys.stdout.isatty()
            raise ValueError("stop")

    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        with pytest.raises(ValueError, match="stop"):
            fail()
        assert sys.stdout is sys.stderr is terminal


def test_errors_that_go_to_a_file_are_not_shown_instead(terminal: Terminal) -> None:
    file = io.StringIO()
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(file), View() as view:
        view.show(snapshot())
        print("an error", file=sys.stderr)
    assert file.getvalue() == "an error\n"
    assert "an error" not in terminal.getvalue()


def test_a_terminal_that_is_gone_ends_the_view_and_not_the_search(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(_: str) -> int:
        raise OSError(5, "Input/output error")

    with view_on(terminal) as view:
        view.show(snapshot())
        monkeypatch.setattr(terminal, "write", write)
        view.show(snapshot())
        assert not view.due()
        assert sys.stdout is terminal


@pytest.mark.parametrize("term", ["dumb", "unknown", None])
def test_without_a_terminal_that_can_move_its_cursor_nothing_is_drawn(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, term: str | None
) -> None:
    monkeypatch.setenv("TERM", term) if term else monkeypatch.delenv("TERM")
    with view_on(terminal) as view:
        assert not view.due()
        view.show(snapshot())
    assert terminal.getvalue() == ""


def test_no_color_is_respected(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with view_on(terminal) as view:
        view.show(snapshot())
    assert not re.search(r"\x1b\[[\d;]*m", terminal.getvalue())


def test_rich_is_loaded_to_draw_only() -> None:
    code = (
        "import sys\n"
        "from sweep.view import View, Snapshot, text\n"
        "with View() as view:\n"
        "    view.show(Snapshot('', '', {}, 0, [], '', None))\n"
        "text(Snapshot('', '', {}, 0, [], '', None))\n"
        "print([name for name in ('rich', 'torch', 'pydantic', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def draw_in_process(title: str, end: str = "pass", **environment: str) -> tuple[int, bytes]:
    """Draws on a real terminal; returns the process's exit status and what it has written."""
    code = (
        "import os, signal\n"
        "from sweep.view import View, Snapshot\n"
        "with View() as view:\n"
        f"    view.show(Snapshot({title!r}, '', {{}}, 0, [], '', None))\n"
        f"    {end}"
    )
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", **environment},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,  # with a process group of its own: for os.kill 0 is all of it
    )
    os.close(slave)
    output = b""
    with contextlib.suppress(OSError):  # which says that nobody writes there any more
        while chunk := os.read(master, 4096):
            output += chunk
    os.close(master)
    return process.wait(), output


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("raise ValueError('stop')", 1),
        ("os.kill(0, signal.SIGTERM)", -signal.SIGTERM),
        ("os.kill(0, signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_the_cursor_is_there_however_a_process_ends(end: str, status: int) -> None:
    ended, output = draw_in_process("drawn", end)
    assert ended == status
    assert b"drawn" in output
    assert output.rfind(b"\x1b[?25h") > output.rfind(b"\x1b[?25l") >= 0


def test_a_name_that_the_terminal_cannot_encode_is_shown_all_the_same() -> None:
    status, output = draw_in_process("\u6f22 caf\xe9", PYTHONIOENCODING="latin1")
    assert status == 0
    assert "\\u6f22 café".encode("latin1") in output
