"""What is published beside merged weights names models, and no folders of the machine."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from fusekit.pipeline.merging import name_models

LONG = "/home/somebody with a long name/" + "and a folder with spaces " * 5


def test_paths_of_this_machine_become_names(tmp_path: Path) -> None:
    base, targets = f"{LONG}/pivot", [f"{LONG}/out/targets/one", f"{LONG}/out/targets/one.and-two"]
    recipe = "# merge\n" + yaml.safe_dump(
        {"models": [{"model": path} for path in targets], "base_model": base, "merge_method": "fusechat_sce"}
    )
    tensor = {"method": "fusechat_sce", "parameters": {}, "coefficients": {targets[0]: 0.25, targets[1]: 0.75}}
    found = {"base": base, "tensors": {"lm_head.weight": tensor | {"erased": {targets[0]: 0.1}}}}
    (tmp_path / "coefficients.json").write_text(json.dumps(found))
    (tmp_path / "mergekit_config.yml").write_text(recipe)
    (tmp_path / "README.md").write_text(f"merged from {targets[0]} and {targets[1]}\n```yaml\n{recipe}```\n")
    names = {targets[0]: "targets/one", targets[1]: "targets/one.and-two", base: "org/pivot"}

    name_models(tmp_path, names, recipe)

    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert [name for name, text in texts.items() if "somebody" in text] == []
    merge = {"models": [{"model": "targets/one"}, {"model": "targets/one.and-two"}], "base_model": "org/pivot"}
    assert yaml.safe_load(texts["mergekit_config.yml"]) == merge | {"merge_method": "fusechat_sce"}
    coefficients = json.loads(texts["coefficients.json"])
    assert coefficients["base"] == "org/pivot"
    shares = coefficients["tensors"]["lm_head.weight"]
    assert shares["coefficients"] == {"targets/one": 0.25, "targets/one.and-two": 0.75}
    assert shares["erased"] == {"targets/one": 0.1}
    assert texts["README.md"].startswith("merged from targets/one and targets/one.and-two\n")


def test_a_merge_without_card_and_coefficients_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    name_models(tmp_path, {"/a": "targets/a"}, "models: [{model: /a}]\nmerge_method: linear\n")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
