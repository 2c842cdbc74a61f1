"""Templates that print today's date: one day per store and per run, and where a template comes from is kept."""

import datetime
import pickle
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner

from fusekit.capturing.store import Store
from fusekit.cli import cli
from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.layout import PIVOT, Layout
from fusekit.pipeline.evaluating import Evaluate
from fusekit.pipeline.run import run
from fusekit.pipeline.stage import Context
from fusekit.recipe.loading import load_recipe
from fusekit.types import Message, Row
from tests.capture.models import tokenizer_for
from tests.helpers import edit_manifest
from tests.pipeline.worlds import DEMO, stamps, write_recipe

DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + ChatTemplate.named("chatml").source
FIRST, SECOND = datetime.date(2026, 1, 31), datetime.date(2026, 2, 1)
ROW = Row((Message("user", "q"), Message("assistant", "a")))


@pytest.fixture
def on(monkeypatch):
    """Says which day it is."""

    def today(day):
        class Day(datetime.date):
            @classmethod
            def today(cls):
                return day

        clock = SimpleNamespace(date=Day, datetime=datetime.datetime, time=datetime.time)
        for module in ("fusekit.pipeline.stage", "fusekit.data.tokenize"):
            monkeypatch.setattr(f"{module}.datetime", clock)

    return today


def text_of(reader):
    return reader.tokenizer.decode(reader.tokenize(ROW).ids.tolist())


def test_a_template_prints_the_day_that_it_is_given(on):
    on(SECOND)
    qwen, dated = tokenizer_for("qwen"), ChatTemplate("dated", DATED)
    first, today = RowTokenizer(qwen, dated, date=FIRST), RowTokenizer(qwen, dated)
    assert text_of(first).startswith("Today: 31 Jan 2026\n")
    assert text_of(today).startswith("Today: 01 Feb 2026\n")
    assert first.fingerprint != today.fingerprint
    assert first.facts == {"chat_template": "given", "date": "2026-01-31"}
    assert text_of(pickle.loads(pickle.dumps(first))) == text_of(first)
    plain = RowTokenizer(qwen, ChatTemplate.named("chatml"))
    assert plain.fingerprint == RowTokenizer(qwen, ChatTemplate.named("chatml"), date=FIRST).fingerprint
    assert plain.facts == {"chat_template": "chatml, shipped with fusekit"}
    foreign = RowTokenizer(qwen, ChatTemplate.named("gemma"), foreign=tokenizer_for("gemma"))
    assert foreign.facts == {"chat_template": "the pivot's: gemma, shipped with fusekit"}
    assert RowTokenizer(tokenizer_for("mistral")).facts == {"chat_template": None}


CODES = "%d %b %Y|%A, %B %-d %y|%Y-%m-%d %H:%M:%S|%j %x"


@pytest.mark.parametrize("around", ["{}", "\n  {{% if true %}}\n{}\n{{% endif %}}", "  {{%- set a = 1 %}}{}\n"])
def test_all_but_the_clock_is_as_transformers_has_it(around):
    qwen, day = tokenizer_for("qwen"), datetime.date(2025, 7, 4)
    asking = around.format(
        "{% if strftime_now is defined %}{{ strftime_now(CODES) }}{% endif %}".replace("CODES", repr(CODES))
    )
    told = around.format(
        "{% if strftime_now is defined %}{{ DATE }}{% endif %}".replace("DATE", repr(day.strftime(CODES)))
    )
    shown, expected = (
        qwen.apply_chat_template([{"role": "user", "content": "a"}], chat_template=source, tokenize=False)
        for source in (ChatTemplate("asking", asking).source_on(day), told)
    )
    assert shown == expected


def capture(tmp_path, *options):
    (tmp_path / "dated.jinja").write_text(DATED)
    write_recipe(tmp_path, ["llama"])
    arguments = [DEMO / "models" / "pivot", tmp_path / "rows.jsonl", tmp_path / "store"]
    how = ["--chat-template", tmp_path / "dated.jinja", "--rows-per-shard", 8, "--dtype", "float32"]
    return CliRunner().invoke(cli, ["capture", *map(str, [*arguments, *how, *options])])


def test_a_store_that_is_resumed_on_another_day_is_one_store(tmp_path, on):
    on(FIRST)
    assert "the file dated.jinja, which prints the date 2026-01-31" in capture(tmp_path).output
    store = Store.open(tmp_path / "store")
    assert store.spec.details["date"] == "2026-01-31"
    assert store.spec.details["chat_template"] == "the file dated.jinja"
    before = {path.name: path.read_bytes() for path in store.path.iterdir()}
    (store.path / "shard-00001.parquet").unlink()
    on(SECOND)
    capture(tmp_path)
    assert {path.name: path.read_bytes() for path in store.path.iterdir()} == before
    edit_manifest(store.path, lambda manifest: manifest["inputs"]["details"].update(date="some day"))
    result = capture(tmp_path)
    assert result.exit_code == 1
    assert "details.date: 'some day', now '2026-02-01'" in str(result.exception)
    assert capture(tmp_path, "--overwrite").exit_code == 0
    assert Store.open(store.path).spec.details["date"] == "2026-02-01"


def test_all_models_of_a_run_and_its_evaluation_see_one_day(tmp_path, on):
    (tmp_path / "dated.jinja").write_text(DATED)
    templates = [f"pivot.chat_template={tmp_path / 'dated.jinja'}", "sources.0.chat_template=pivot"]
    recipe, out = load_recipe(write_recipe(tmp_path, ["llama"]), templates), tmp_path / "out"
    on(FIRST)
    said = []
    run(recipe, out, until="capture", say=said.append)
    assert any("capture llama: chat template" in line and "the pivot's: the file dated.jinja" in line for line in said)
    before = stamps(out / "captures")
    on(SECOND)
    run(recipe, out, only="capture", say=said.append)
    assert stamps(out / "captures") == before
    layout = Layout(out)
    assert {Store.open(layout.store(name)).spec.details["date"] for name in (PIVOT, "llama")} == {"2026-01-31"}
    context = Context(recipe, layout, said.append)
    Evaluate().make(context, {PIVOT})
    scores = layout.results.read_bytes()
    manifest = yaml.safe_load((layout.evaluation(PIVOT) / "manifest.json").read_text())
    assert manifest["inputs"]["reads"] == context.reader(PIVOT).fingerprint
    Evaluate().make(context, {PIVOT})
    assert layout.results.read_bytes() == scores
