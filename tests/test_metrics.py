"""What a run writes down and shows."""

import io
import json
import sys

import pytest
from PIL import Image

from rad_jax import metrics


def row(step, loss=1.0):
    return {"step": step, "loss": loss, "step_time_s": 0.25, "tokens_per_s": 1234.5}


def write(workdir, *rows, start=0):
    progress = metrics.Progress(workdir, 10, start, "stage1", active=True)
    for each in rows:
        progress.step()
        progress.log(each)
    progress.close()


def test_of_a_step_logged_twice_the_later_row_counts(tmp_path):
    write(tmp_path, row(1), row(2), row(3, 9.0), row(4, 8.0))
    write(tmp_path, row(3, 0.5), row(4, 0.25), row(5, 0.125), start=2)
    assert [(r["step"], r["loss"]) for r in metrics.read(tmp_path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 0.5),
        (4, 0.25),
        (5, 0.125),
    ]


def test_half_a_line_is_passed_over_and_mended(tmp_path):
    """A kill or a full disk may end a run in the middle of a line."""
    write(tmp_path, row(1), row(2))
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text()[:-7])
    assert [r["step"] for r in metrics.read(tmp_path)] == [1]
    write(tmp_path, row(2), start=1)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


def test_every_row_is_there_when_it_is_logged(tmp_path, monkeypatch):
    """Closed after each: a mounted bucket uploads a file when it is closed."""
    opened = metrics._opened
    files = []

    def noted(file):
        files.append(opened(file))
        return files[-1]

    monkeypatch.setattr(metrics, "_opened", noted)
    progress = metrics.Progress(tmp_path, 10, 0, "stage1", active=True)
    for number in (1, 2):
        progress.log(row(number))
        assert len(files) == number and all(file.closed for file in files)
        assert [r["step"] for r in metrics.read(tmp_path)] == list(range(1, number + 1))
    progress.close()


def test_nothing_to_read(tmp_path):
    assert metrics.read(tmp_path) == []


def test_other_processes_write_and_show_nothing(tmp_path, capsys):
    progress = metrics.Progress(tmp_path, 10, 0, "stage1", active=False)
    progress.step()
    progress.log(row(1))
    progress.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_plain_lines_where_stderr_is_no_terminal(tmp_path, capsys):
    write(tmp_path, row(4, 2.5))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "stage1: step 4/10, loss 2.5000, 250 ms/step, 1,234 tokens/s, 2 s left\n"


def test_bar_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    write(tmp_path, row(1, 2.5))
    shown = terminal.getvalue()
    assert "\r" in shown and "loss 2.5000" in shown and "1/10" in shown


@pytest.mark.parametrize("rows", [[], [row(1), row(2, 0.5)]])
def test_plot_writes_a_picture(tmp_path, rows):
    write(tmp_path, *rows)
    metrics.plot(tmp_path)
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.format == "PNG" and picture.size == (840, 480)
