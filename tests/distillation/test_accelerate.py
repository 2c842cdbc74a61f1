"""The shipped configurations of accelerate: its launcher takes them, and they ask for what they say."""

from __future__ import annotations

from pathlib import Path

from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"


def test_fsdp2(monkeypatch):
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / "fsdp2.yml"), "x.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_deepspeed():
    """Its launcher wants the package; that it takes the file is what can be said without."""
    config = ClusterConfig.from_yaml_file(CONFIGS / "deepspeed-zero3.yml")
    assert config.distributed_type == "DEEPSPEED"
    assert config.deepspeed_config["zero_stage"] == 3
    assert config.deepspeed_config["zero3_save_16bit_model"] is True
