"""Progress: a bar that fits into 80 columns of a terminal, and plain lines elsewhere."""

import io

import pytest

from wanlite.phases import Span, describe_phase
from wanlite.runtime.progress import Bar, Lines, print_above, track
from wanlite.runtime.terminal import MAX_COLUMNS, labelled


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_has_plain_lines_and_none_for_short_work(monkeypatch, capsys):
    monkeypatch.setattr("wanlite.runtime.progress.SECONDS", 0)
    with track(1400, "training") as progress:
        progress.describe("phase 2 of 3, few_step", "loss 1.235")
        progress.update(126)
    assert capsys.readouterr().err == "phase 2 of 3, few_step 126/1,400, loss 1.235, 00:00 left\n"
    monkeypatch.undo()
    with track(1400, "training") as progress:
        progress.update(1400)
    assert capsys.readouterr().err == ""


def test_a_line_estimates_the_time_left_from_the_work_of_this_process():
    progress = Lines(1400, "training", done=700, is_hidden=False, leave=True)
    progress.update(70)
    assert progress.format_line(60) == "training 770/1,400, 09:00 left"


def test_a_hidden_progress_prints_nothing(monkeypatch, capsys):
    monkeypatch.setattr("wanlite.runtime.progress.SECONDS", 0)
    with track(10, "training", is_hidden=True) as progress:
        progress.update(5)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with track(10, "training") as progress:
        progress.update(5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("columns", [80, 120])
def test_a_bar_keeps_its_description_and_its_figures_in_a_narrow_terminal(columns, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    bar = track(5600, "training", leave=True)
    assert isinstance(bar, Bar)
    bar.describe("phase 2 of 3, few_step", "loss 1.235")
    bar.update(4000)
    text = bar.format_meter(**bar.format_dict | {"ncols": columns})
    assert text.startswith("phase 2 of 3, few_step:  71%|") and "4000/5600" in text
    assert text.endswith("loss 1.235]") and len(text) <= columns and text.count("#") + text.count("█") >= 7
    bar.close()


def test_a_line_is_printed_by_rank_zero_alone(capsys):
    class Rank:
        is_main_process = False

    print_above(Rank, "one")
    Rank.is_main_process = True
    print_above(Rank, "two")
    assert capsys.readouterr().out == "two\n"


def test_a_phase_is_numbered_by_kind():
    phases = [Span("velocity", 0, 2, 0), Span("velocity", 2, 4, 1), Span("few_step", 4, 6, 1)]
    assert describe_phase(phases[1], phases) == "phase 1 of 2, velocity"
    assert describe_phase(phases[2], phases) == "phase 2 of 2, few_step"


def test_a_labelled_text_is_wrapped_below_itself_and_paths_are_kept():
    path = "/" + "x" * 150
    first, second, *others = labelled("noise", " ".join(["word"] * 40) + f" {path}").splitlines()
    assert first.startswith("noise    word") and second.startswith("         word")
    assert max(len(first), len(second)) <= MAX_COLUMNS and others[-1].strip() == path
