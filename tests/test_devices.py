"""Progress where a line can be drawn again, and where it cannot."""

from __future__ import annotations

import pytest

from fusekit.devices import duration, progress


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(10, "distill 2 of 4", "step", done=4) as bar:
        bar.update(2)
        bar.display()  # else at most every half minute
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("distill 2 of 4: 6 of 10 steps, ")
    assert line.endswith(" left")


def test_what_is_quick_or_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with progress(3, "capturing", "row", quiet=quiet) as bar:
            bar.update(3)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress(4, "distill 1 of 1", "step") as bar:
        bar.update(4)
    assert "\rdistill 1 of 1: 100%|" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(8, "0:08"), (750, "12:30"), (10931, "3:02:11")])
def test_durations_are_read_at_once(seconds: float, text: str) -> None:
    assert duration(seconds) == text
