"""The shipped configurations of accelerate: its launcher takes them, and they ask for what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"


def launched(name, prepare):
    """What the launcher makes of a configuration."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / name), "--num_processes", "2", "x.py"])
    args, _defaults, _ = _validate_launch_command(args)
    return prepare(args)


def test_fsdp2(monkeypatch):
    environment = launched("fsdp2.yml", prepare_multi_gpu_env)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_deepspeed():
    _command, environment = launched("deepspeed-zero3.yml", prepare_deepspeed_cmd_env)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yml")), ids=lambda path: path.name)
def test_each_is_covered_here(path):
    assert path.name in {"fsdp2.yml", "deepspeed-zero3.yml"}
