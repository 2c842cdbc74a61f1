import os
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fusekit import yaml as safe_yaml
from fusekit.errors import FusekitError, RecipeError

RECIPE = """\
# a comment
merge_method: linear
models:
  - model: a
    parameters:
      weight: 0.5
  - model: b
    parameters: {weight: [0, 1]}
dtype: bfloat16
"""


def test_knows_the_line_of_every_key():
    document = safe_yaml.loads(RECIPE)
    assert document.lines[("merge_method",)] == 2
    assert document.lines[("models", 0, "parameters", "weight")] == 6
    assert document.lines[("models", 1, "parameters", "weight", 1)] == 8
    assert document.line(("models", 1, "parameters", "no such key")) == 8
    assert document.line(()) == 1


def test_aliases_and_merge_keys_work_and_have_the_anchors_line():
    text = "base: &b\n  weight: 1\nuser:\n  <<: *b\n  density: 2\nagain: *b\n"
    document = safe_yaml.loads(text)
    assert document.data == yaml.safe_load(text)
    assert document.lines[("user", "weight")] == 2
    assert document.lines[("again", "weight")] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['true']", "line 1: YAML tags are not allowed"),
        ("a: 1\nb: !!float 3", "line 2: YAML tags are not allowed"),
        ("a: 1\nb: 2\na: 3", "line 3: duplicate key 'a', first given on line 1"),
        ("a: &a [*a]", "an alias refers to a value that contains it"),
        ("a: [1", "line 1"),
        ("a: 1\n--- \nb: 2", "single document"),
        ("a: 2026-13-45", "put it in quotes"),
        ("? [1, 2]\n: 3", "a key must be a plain value"),
        ("a: 1" + ":1" * 5000, "put it in quotes"),  # to the base of 60
        ("[" * 2000, "nested more than"),
    ],
)
def test_refuses_with_a_reason(text, message):
    with pytest.raises(RecipeError, match=message):
        safe_yaml.loads(text)


def bomb(levels: int, merge: bool) -> str:
    """Nine references to the level below at each level: 9 ** levels values from a few hundred bytes."""
    rows = ["a0: &a0 {k0: 1}"]
    for i in range(1, levels + 1):
        below = ", ".join([f"*a{i - 1}"] * 9)
        rows.append(f"a{i}: &a{i} {{k{i}: 1, <<: [{below}]}}" if merge else f"a{i}: &a{i} [{below}]")
    return "\n".join(rows)


@pytest.mark.parametrize("merge", [False, True])
def test_alias_bomb_is_refused_in_bounded_memory(merge, tmp_path):
    file = tmp_path / "bomb.yml"
    file.write_text(bomb(60, merge))
    code = (
        "import sys, resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))\n"
        "from fusekit import yaml as safe_yaml\n"
        "from fusekit.errors import RecipeError\n"
        "try:\n"
        "    safe_yaml.load(sys.argv[1])\n"
        "except RecipeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=60, env=os.environ, check=True
    )
    assert "once aliases are written out" in done.stdout


def test_unreadable_files_are_recipe_errors(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        safe_yaml.load(tmp_path / "none.yml")
    with pytest.raises(RecipeError, match="cannot be read"):
        safe_yaml.load(tmp_path)
    (tmp_path / "latin.yml").write_bytes(b"a: \xff")
    with pytest.raises(RecipeError, match="not UTF-8"):
        safe_yaml.load(tmp_path / "latin.yml")
    (tmp_path / "large.yml").write_bytes(b"#" * (safe_yaml.MAX_BYTES + 1))
    with pytest.raises(RecipeError, match="larger than"):
        safe_yaml.load(tmp_path / "large.yml")


@given(st.text(alphabet=st.sampled_from("abk:-?,[]{}&*!<>|#'\"%@\n \t0.1e~"), max_size=80))
def test_any_text_is_data_or_a_fusekit_error(text):
    try:
        document = safe_yaml.loads(text)
    except FusekitError:
        return
    expected = yaml.safe_load(text)
    assert repr(document.data) == repr(expected)
