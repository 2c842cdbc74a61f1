"""The table of results: means, the best of a column, and changes with their sign."""

from __future__ import annotations

from fusekit.evaluation.table import fixed, signed, table, tables

SCORES = {
    "pivot": {"bits_per_byte": {"a": 2.0, "b": 4.0}, "exact_match": {"a": 0.5}},
    "baseline": {"bits_per_byte": {"a": 1.0, "b": 2.0}, "exact_match": {"a": 0.75}},
    "targets/x": {"bits_per_byte": {"a": 0.5, "b": None}},
    "merged": {"bits_per_byte": {"a": 1.0, "b": 1.0}, "exact_match": {"a": 0.625}, "lm_eval": {"arc": 0.25}},
}


def test_changes_have_a_sign_and_a_word_and_the_best_is_marked() -> None:
    bits, exact, other = tables({"models": SCORES})
    assert (bits.lower, exact.lower, other.lower) == (True, False, False)
    assert (bits.columns, bits.skills, bits.references) == (["a", "b", "mean"], 2, ["pivot", "baseline"])
    merged = bits.lines["merged"]
    said = [{name: (c.shown, c.word) for name, c in cell.changes.items()} for cell in merged]
    assert said[0] == {"pivot": ("−50.0 %", "better"), "baseline": ("±0.0 %", "same")}
    assert said[1] == {"pivot": ("−75.0 %", "better"), "baseline": ("−50.0 %", "better")}
    assert [cell.best for cell in merged] == [False, True, True]
    target = bits.lines["targets/x"]
    assert [cell.shown for cell in target] == ["0.500", "–", "–"]
    assert target[0].best
    assert bits.mean("targets/x") is None
    assert bits.mean("merged") == merged[-1]
    assert (merged[-1].value, bits.best) == (1.0, "merged")
    (match,) = exact.lines["merged"]
    assert (match.shown, match.changes["baseline"].shown) == ("62.5", "−12.5 points")
    assert (match.changes["baseline"].word, match.changes["pivot"].word) == ("worse", "better")


def test_tasks_of_lm_eval_have_no_mean_and_their_own_direction() -> None:
    models = {name: {"lm_eval": {"acc": a, "ppl": p}} for name, a, p in (("pivot", 0.5, 9.0), ("merged", 0.4, 8.0))}
    tasks = {"acc": {"metric": "acc", "higher_is_better": True}, "ppl": {"metric": "ppl", "higher_is_better": False}}
    (metric,) = tables({"models": models, "lm_eval": tasks})
    assert metric.columns == ["acc (acc)", "ppl (ppl, lower is better)"]
    assert (metric.lower, metric.skills, metric.mean("merged"), metric.best) == (None, 2, None, None)
    assert [cell.best for cell in metric.lines["pivot"]] == [True, False]
    assert [cell.best for cell in metric.lines["merged"]] == [False, True]
    assert [cell.changes["pivot"].word for cell in metric.lines["merged"]] == ["worse", "better"]


def test_of_equal_models_the_merged_one_is_the_best() -> None:
    (bits,) = tables({"models": {name: {"bits_per_byte": {"a": 1.0}} for name in ("targets/x", "merged")}})
    assert bits.best == "merged"


def test_the_table_as_markdown() -> None:
    assert "| targets/x | 0.500 | – | – |" in table({"models": SCORES})
    assert "**0.500**" in tables({"models": SCORES})[0].markdown(lambda name: f"<{name}>", bold=True)
    assert tables({"models": {}}) == []


def test_numbers_have_a_minus_sign_and_a_dash_for_none() -> None:
    assert [signed(x, 1) for x in (0.04, -0.06, 2, None)] == ["±0.0", "−0.1", "+2.0", "–"]
    assert [fixed(x) for x in (-1234.5, float("nan"), None)] == ["−1,234.500", "–", "–"]


def test_a_name_from_data_stays_in_its_cell():
    said = table({"models": {"a|b\n# c": {"bits_per_byte": {"x|y": 1.0}}}})
    assert said.splitlines() == ["| Bits per byte (lower is better) | x\\|y |", "|---|---:|", "| a\\|b # c | 1.000 |"]
