"""The settings of data, for the recipe, the commands and Python alike."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fusekit.yaml import Settings


class DataSettings(Settings):
    """Where examples come from, and how they are cut."""

    path: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="Files (.json, .jsonl, .parquet, .txt) or hub ids: messages, ShareGPT, instruction triples, text."
    )
    name: str | None = Field(default=None, description="Configuration of a data set on the hub.")
    split: str = Field(default="train", description="Split of a data set on the hub.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    streaming: bool = Field(default=False, description="Read a data set on the hub without downloading all of it.")
    limit: Annotated[int, Field(gt=0)] | None = Field(default=None, description="Most examples to read; null: all.")
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="What happens at an unusable example; skipped ones are counted and listed."
    )
    max_length: Annotated[int, Field(ge=2)] = Field(default=2048, description="Most tokens of an example.")
    overlong: Literal["cut", "drop"] = Field(default="cut", description="What happens to longer examples.")
    train_on: Literal["assistant", "all"] = Field(default="assistant", description="Which tokens are labels.")
    pack: bool = Field(default=False, description="Pack plain text into blocks of max_length tokens.")
