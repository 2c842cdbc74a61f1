"""``fusekit generate``: files of prompts, output for people and programs, errors before models are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fusekit.cli.generate import generate
from fusekit.errors import FusekitError
from fusekit.generation import Generation, Segment
from fusekit.generation.page import page

DEMO = Path(__file__).parents[2] / "demo"
MODELS = [str(DEMO / "models/pivot"), str(DEMO / "sources/neox")]


def invoke(*arguments: str, **options):
    return CliRunner().invoke(generate, arguments, **options)


def test_prompts_of_a_file_as_json_and_as_a_page(tmp_path):
    file, html = tmp_path / "prompts.jsonl", tmp_path / "page.html"
    asked = ["57+68=", [{"role": "user", "content": "11+12="}], "<b>12+12=</b>"]
    lines = [
        json.dumps(asked[0]),
        json.dumps({"messages": [*asked[1], {"role": "assistant", "content": "23"}]}),
        "",
        json.dumps({"prompt": asked[2], "source": "mine"}),
    ]
    file.write_text("\n".join(lines))
    common = ["--prompts", str(file), "--mode", "unite", "--max-new-tokens", "6"]
    done = invoke(*MODELS, *common, "--json", "--html", str(html))
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["prompt"] for record in found] == asked
    for record in found:
        assert record["text"] == "".join(segment["text"] for segment in record["segments"])
        assert {segment["model"] for segment in record["segments"]} <= {"pivot", "neox"}
    assert "&lt;b&gt;12+12=&lt;/b&gt;" in html.read_text()

    shown = invoke(*MODELS, *common, color=True)
    assert shown.exit_code == 0
    for record in found:
        for segment in record["segments"]:
            assert f"\x1b[{34 if segment['model'] == 'pivot' else 33}m{segment['text']}\x1b[0m" in shown.stdout
    assert "\x1b" not in invoke(*MODELS, *common).stdout


def test_a_page_escapes_what_models_write():
    segment = Segment("<script>alert(1)</script>", 'a"b', 0.5, {'a"b': 0.5})
    text = page(["</pre>"], [Generation(segment.text, [segment], "end")], ['a"b'], "safe")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert 'a"b' not in text


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('"a"\n{"question": "b"}', ["line 2", "question"]),
        ('{"messages": ["b"]}', ["line 1", "messages"]),
        ('{"prompt": ""}', ["line 1", "empty"]),
        ("{", ["line 1"]),
        ("\n", ["prompts.jsonl"]),
    ],
)
def test_a_file_of_prompts_is_refused_with_its_line(tmp_path, content, named):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    done = invoke("missing-a", "missing-b", "--prompts", str(file))
    assert isinstance(done.exception, FusekitError)
    assert all(name in str(done.exception) for name in [str(file), *named])


def test_mistakes_are_found_before_a_model_is_loaded(tmp_path):
    assert invoke("missing", "--prompt", "x").exit_code == 2
    assert invoke("missing-a", "missing-b", "--mode", "vote", "--prompt", "x").exit_code == 2
    assert invoke("missing-a", "missing-b", "--prompt", "x", "--prompts", str(Path(__file__))).exit_code == 2
    for options, named in (
        (["--prompt", "x", "--rerank"], "rerank"),
        (["--prompt", "x", "--html", str(tmp_path / "no" / "page.html")], str(tmp_path / "no")),
        (["--prompt", ""], "empty"),
    ):
        done = invoke("missing-a", "missing-b", *options)
        assert isinstance(done.exception, FusekitError)
        assert named in str(done.exception)


def test_help_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, fusekit.cli.generate; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
