"""Options are what the settings say: type, bounds, help."""

from typing import Annotated, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel, Field

from fusekit.cli.options import given, options_of


class Settings(BaseModel):
    count: Annotated[int, Field(gt=0)] | None = Field(default=None, description="How many.")
    share: float = Field(default=0.5, ge=0, le=1, description="Which part.")
    kind: Literal["one", "two"] = Field(default="one", description="Which kind.")
    fast: bool = Field(default=False, description="Be fast.")
    place: str | dict[str, int] | None = Field(default=None, description="Where.")


@click.command()
@options_of(Settings)
def command(**options):
    print(given(options, Settings))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--count", "3", "--share", "0", "--kind", "two"], {"count": 3, "share": 0.0, "kind": "two"}),
        (["--no-fast", "--place", "auto"], {"fast": False, "place": "auto"}),
        (["--fast", "--place", '{"a": 1}'], {"fast": True, "place": {"a": 1}}),
    ],
)
def test_only_what_is_given_is_passed_on(arguments, expected):
    done = CliRunner().invoke(command, arguments)
    assert done.output.strip() == str(expected)


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--share", "1.5"], ["--kind", "three"], ["--place", "{"]])
def test_what_the_settings_refuse_the_options_refuse(arguments):
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 2
    assert arguments[1].strip("{") in done.output


def test_the_help_is_the_settings():
    text = CliRunner().invoke(command, ["--help"]).output
    assert all(word in text for word in ("How many.", "[one|two]", "--fast / --no-fast", "0.5", "x>0"))
