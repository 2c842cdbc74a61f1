"""Build hook: an editable install gets the autoload files, but not a frozen copy of the recipes."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

AUTOLOAD = ("_fusekit_autoload.py", "fusekit.pth", "fusekit.start")


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            build_data["force_include_editable"] = {name: name for name in AUTOLOAD}
