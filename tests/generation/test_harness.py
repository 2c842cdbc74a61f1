"""Several models as one model of lm-eval, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusekit.generation import GenerationError, generate
from tests.evaluation.test_lm_eval import SUMS, write_tasks

pytest.importorskip("lm_eval")

DEMO = Path(__file__).parents[2] / "demo"
MODELS = [str(DEMO / "models/pivot"), str(DEMO / "sources/neox")]


@pytest.fixture(scope="module")
def model() -> Any:
    from fusekit.generation.harness import EnsembleLM

    return EnsembleLM("+".join(MODELS), mode="unite", max_new_tokens=8)


@pytest.fixture
def manager(tmp_path: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(write_tasks(tmp_path)), include_defaults=False)


@pytest.mark.parametrize("chat", [True, False])
def test_answers_of_a_task_are_those_of_generate(model: Any, manager: Any, chat: bool) -> None:
    import lm_eval

    how = {"task_manager": manager, "apply_chat_template": chat, "log_samples": True, "bootstrap_iters": 0}
    found = lm_eval.simple_evaluate(model, tasks=["sums_written"], **how)
    answers = [sample["resps"][0][0] for sample in found["samples"]["sums_written"]]
    how = {"mode": "unite", "max_new_tokens": 16, "stop": ["\n"], "raw": not chat}
    assert answers == [answer.text for answer in generate(MODELS, [sum_ for sum_, _ in SUMS], **how)]
    right = [answer == choices[number] for number, (answer, (_, choices)) in enumerate(zip(answers, SUMS, strict=True))]
    assert found["results"]["sums_written"]["exact_match,none"] == pytest.approx(sum(right) / len(right))


def test_a_task_of_probabilities_is_refused(model: Any, manager: Any) -> None:
    import lm_eval

    with pytest.raises(GenerationError, match="generate_until"):
        lm_eval.simple_evaluate(model, tasks=["sums"], task_manager=manager)
    with pytest.raises(GenerationError, match="gen_prefix"):
        model.apply_chat_template([{"role": "assistant", "content": "The"}], add_generation_prompt=False)


def test_it_is_found_by_its_name() -> None:
    from lm_eval.api.registry import get_model

    from fusekit.generation.harness import EnsembleLM

    assert get_model("fusekit") is EnsembleLM
