"""The documentation does not drift: what it quotes, names and links exists, and its examples run."""

from __future__ import annotations

import functools
import pydoc
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
READMES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "demo/README.md", "benchmarks/README.md")]
PACKAGES = frozenset(path.name for path in (ROOT / "fusekit").iterdir() if path.is_dir())
FILE_ENDINGS = ("py", "json", "yml", "pth", "start", "html", "csv", "md")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", [*PAGES, *READMES], ids=name_of)


# ---------------------------------------------------------------- links and names


@functools.cache
def names_of_tests() -> frozenset[str]:
    text = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    return frozenset(re.findall(r"^ *def (test_\w+)", text, flags=re.MULTILINE))


@every_page
def test_links_paths_and_named_tests_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"```\{literalinclude\} (\S+)", text)
    local = [link.partition("#")[0] for link in links if "://" not in link and not link.startswith("#")]
    assert [link for link in local if not (page.parent / link).exists()] == []
    paths = re.findall(r"`((?:docs|demo|recipes|benchmarks|tests|fusekit)/[^`\s{}<>*]+)`", text)
    assert [path for path in paths if not (ROOT / path.partition("::")[0]).exists()] == []
    assert set(re.findall(r"`(test_\w+)`", text)) <= names_of_tests()


def test_every_fault_has_a_test():
    lines = re.findall(r"^\| (\d+) \|(.*)$", (DOCS / "faults.md").read_text(), flags=re.MULTILINE)
    assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
    assert [line for _, line in lines if "`test_" not in line] == []


def dotted_names(text: str, packages: frozenset[str]) -> set[str]:
    """``package.name`` of these packages, files apart."""
    spans = re.findall(r"`((?:\w+\.)+\w+)(?:\(.*?\))?`", text)
    return {s for s in spans if s.partition(".")[0] in packages and s.rpartition(".")[2] not in FILE_ENDINGS}


def test_names_in_the_code_exist():
    names = {name for page in PAGES for name in dotted_names(page.read_text(), frozenset({"fusekit"}))}
    names |= {f"fusekit.{name}" for name in dotted_names((DOCS / "papers.md").read_text(), PACKAGES)}
    assert "fusekit.merge_methods.sce" in names
    assert [name for name in sorted(names) if pydoc.locate(name) is None and not is_field(name)] == []


def is_field(dotted: str) -> bool:
    """Whether a name is a field of a dataclass or of a pydantic model, which has no value there."""
    owner, _, name = dotted.rpartition(".")
    return name in getattr(pydoc.locate(owner), "__annotations__", {})


# ---------------------------------------------------------------- settings


def test_the_table_of_presets_is_that_of_the_code():
    """docs/distillation.md; a note in brackets is no value, an empty cell has no effect in that preset."""
    import yaml

    from fusekit.distillation.settings import DistillSettings

    table = (DOCS / "distillation.md").read_text().split("| setting |")[1].split("\n\n")[0]
    header, _, *lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    assert len(lines) > 15
    for line in lines:
        section, field = line[0].split("`")[1].split(".")
        for preset, cell in zip(header, line[1:], strict=False):
            settings = DistillSettings.of(preset)
            value = getattr(getattr(settings, section), field, 0.999)  # adam_beta2 is declared by transformers
            said = yaml.safe_load(cell.partition("(")[0])
            assert said is None or str(value) == str(said) or float(value) == float(said), (line[0], preset)


# ---------------------------------------------------------------- commands


COMMAND = re.compile(r"\s*(?:\$ )?(?:\w+=\S+ )*(?:.* -m fusekit\.cli|fusekit|python \S*examples/own_\w+\.py) ")


def commands(page: Path) -> Iterator[list[str]]:
    """Every `fusekit` command in a code block, as words; what follows two spaces and a # is a comment."""
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    shell = [text for language, text in blocks if language in ("", "console", "bash", "sh")]
    for line in "\n".join(shell).replace("\\\n", " ").splitlines():
        if found := COMMAND.match(line):
            words = shlex.split(line[found.end() :].partition("  #")[0])
            if words and words[0].isalpha():
                yield words


@every_page
def test_commands_and_options_exist(page):
    import click

    from fusekit.cli import cli

    for words in commands(page):
        command: Any = cli
        while isinstance(command, click.Group) and words:
            found = command.get_command(click.Context(command), words[0])
            assert found is not None, words
            command, words = found, words[1:]  # noqa: PLW2901
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        unknown = [word for word in words if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in options]
        assert not unknown, f"fusekit {command.name}: {unknown}"


# ---------------------------------------------------------------- examples


def load_example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "examples" / f"{name}.py"))


@pytest.fixture
def restored():
    """Registries as they were: other tests of the process go over all of their entries."""
    import fusekit.distillation.losses  # noqa: F401  takes the names of the distances once
    from fusekit.distillation.distances import DISTANCES
    from fusekit.distillation.fusion import FUSION_FUNCTIONS

    before = [(registry, dict(registry)) for registry in (FUSION_FUNCTIONS, DISTANCES)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


def test_a_loss_of_ones_own(restored):
    from fusekit.distillation.losses import SparseTargets, fusion_loss
    from fusekit.distillation.settings import DistillSettings
    from fusekit.errors import DistillationError

    with pytest.raises(DistillationError, match="unknown loss 'brier'"):
        DistillSettings.of("fusekit", {"training": {"loss": "brier"}})
    load_example("own_loss")
    assert DistillSettings.of("fusekit", {"training": {"loss": "brier"}}).training.loss == "brier"

    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (3,), generator=generator)

    def targets(logits: torch.Tensor) -> SparseTargets:
        logprobs, ids = logits.log_softmax(1).topk(3, dim=1)
        return SparseTargets(ids, logprobs, 1 - logprobs.exp().sum(1), torch.ones(3, dtype=torch.bool))

    def distance(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return fusion_loss(logits, labels, targets(teacher), loss="brier", lm_weight=0.0).total

    teacher = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logits: distance(logits, teacher), (student.clone().requires_grad_(),))
    q, p = teacher.softmax(1), student.softmax(1)
    listed = q.topk(3, dim=1).indices
    tails = [1 - x.gather(1, listed).sum(1) for x in (p, q)]
    by_hand = (p - q).gather(1, listed).square().sum() + (tails[0] - tails[1]).square().sum()
    torch.testing.assert_close(distance(student, teacher), by_hand)
    same = student.clone().requires_grad_()
    distance(same, student).backward()
    torch.testing.assert_close(same.grad, torch.zeros_like(same), atol=1e-12, rtol=0)


def test_a_fusion_function_of_ones_own(restored):
    import numpy as np

    from fusekit.alignment import TopK
    from fusekit.distillation.fusion import Candidate
    from fusekit.distillation.settings import FusionSettings

    soft_min_ce = load_example("own_fusion")["soft_min_ce"]
    assert FusionSettings(function="soft_min_ce").function == "soft_min_ce"

    def candidate(name: str, id_: int, cross_entropy: float) -> Candidate:
        rows = TopK(np.array([[id_]]), np.log([[0.75]]), np.array([0.25]))
        return Candidate(name, rows, np.array([True]), cross_entropy)

    fused = soft_min_ce([candidate("pivot", 1, 2.0), candidate("source", 2, 1.9)])
    share = 1 / (1 + np.exp(-1.0))  # of the source: the difference is one width
    np.testing.assert_allclose(fused.weights, [[1 - share, share]])
    np.testing.assert_allclose(np.exp(fused.rows.logprobs), [[0.75 * share, 0.75 * (1 - share)]])
    assert fused.rows.ids.tolist() == [[2, 1]]
    np.testing.assert_allclose(fused.rows.tail, [0.25])


def test_a_merge_method_of_ones_own(tmp_path, monkeypatch):
    from mergekit.merge_methods import merge_tensors, registry

    from fusekit import yaml as safe_yaml
    from fusekit.errors import RecipeError
    from fusekit.merging.lint import lint

    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    recipe = DOCS / "examples" / "own_merge.yml"
    with pytest.raises(RecipeError, match="unknown merge method 'median_delta'"):
        lint(safe_yaml.load(recipe))
    load_example("own_merge")
    config, warnings = lint(safe_yaml.load(recipe))
    assert config.merge_method == "median_delta"
    assert not warnings
    assert all((ROOT / model.model.model.path).is_dir() for model in config.models)
    base = torch.tensor([1.0, 1.0], dtype=torch.bfloat16)
    models = [base + torch.tensor(delta, dtype=torch.bfloat16) for delta in ([1.0, 0.0], [2.0, 0.5], [4.0, -1.0])]
    merged = merge_tensors([base, *models], "median_delta", base_index=0, parameters={"scale": 0.5})
    assert merged.dtype == torch.bfloat16
    assert merged.tolist() == [2.0, 1.0]


def test_the_parts_of_a_run(tmp_path, capsys):
    (target,) = load_example("pieces")["main"](tmp_path, limit=8)
    assert (target / "model.safetensors").is_file()
    assert target.name == "neox"
    assert "labels" in capsys.readouterr().out
