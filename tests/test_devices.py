"""Progress where a line can be drawn again and where it cannot; work on threads: once, in order, errors told."""

from __future__ import annotations

import threading

import pytest
import torch

from fusekit.devices import duration, progress, side_by_side


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


BOUNDS = [(start, start + 3) for start in range(0, 60, 3)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_bounds(threads):
    workers = []

    def new_worker():
        seen: list[tuple[int, int]] = []
        workers.append(seen)

        def work(start: int, stop: int) -> tuple[int, bool, int]:
            seen.append((start, stop))
            return stop, torch.is_grad_enabled(), torch.get_num_threads()

        return work

    configured = torch.get_num_threads()
    found = side_by_side(new_worker, BOUNDS, threads)
    assert found == [(stop, False, 1) for _, stop in BOUNDS]
    assert len(workers) == threads
    assert sorted(bound for seen in workers for bound in seen) == BOUNDS
    assert torch.get_num_threads() == configured
    assert torch.is_grad_enabled()


def test_the_first_error_is_raised_and_nothing_new_begun():
    begun, both = [], threading.Barrier(2, timeout=60)

    def work(start: int, stop: int) -> None:
        begun.append(start)
        both.wait()  # the other thread has begun its first one, too
        raise ValueError(f"at {start}")

    configured = torch.get_num_threads()
    with pytest.raises(ValueError, match=r"at [03]"):
        side_by_side(lambda: work, BOUNDS, 2)
    assert sorted(begun) == [0, 3]
    assert torch.get_num_threads() == configured
