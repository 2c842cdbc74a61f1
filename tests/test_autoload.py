"""Stock mergekit finds fusekit after `pip install`, in interpreters of their own: wheel, editable, off, broken, gone.

A fresh virtual environment sees the packages of the running one, but for fusekit, through links.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from tests.helpers import family, merge_recipe

ROOT = Path(__file__).resolve().parent.parent
OURS = ("fusekit", "_fusekit", "mergekit_fusekit", "_editable_impl_", "__editable__")
ASK = (
    "import sys, mergekit.merge_methods as m; names = {x.spec.name for x in m.registered_methods()}; "
    "print(sorted(names & {'fusechat_sce', 'varm', 'widen'}))"
)
BOTH = "['fusechat_sce', 'varm', 'widen']"


class Environment:
    """A virtual environment with mergekit in it, and fusekit only if it is installed here."""

    def __init__(self, path: Path) -> None:
        venv.create(path, with_pip=False, symlinks=True)
        self.python = path / "bin" / "python"
        self.packages = path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        linked = path / "linked"
        linked.mkdir()
        for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
            if not entry.name.startswith(OURS) and entry.suffix != ".pth":
                (linked / entry.name).symlink_to(entry)
        (self.packages / "linked.pth").write_text(f"{linked}\n")

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEKIT", "PYTHON", "COV"))}
        environment |= {"HF_HUB_OFFLINE": "1", **variables}
        command = [str(self.python), *arguments]
        return subprocess.run(
            command, env=environment, cwd=self.packages.parent, capture_output=True, text=True, timeout=240, check=False
        )

    def pip(self, *arguments: str) -> None:
        done = self.run("-m", "pip", *arguments, PIP_DISABLE_PIP_VERSION_CHECK="1")
        assert done.returncode == 0, done.stdout + done.stderr

    def install(self, *what: str) -> None:
        self.pip("install", "--quiet", "--no-deps", "--no-build-isolation", *what)

    def ours(self) -> list[str]:
        return sorted(entry.name for entry in self.packages.iterdir() if entry.name.startswith(OURS))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, so that building leaves nothing behind in it and breaking it breaks nothing else."""
    copy = tmp_path_factory.mktemp("source") / "fusekit"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    files = listed.stdout.split("\n") if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    for name in filter(None, files):
        if (ROOT / name).is_file() and not name.startswith(("demo/models", "tests/", "out/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def environment(tmp_path_factory, source):
    made = Environment(tmp_path_factory.mktemp("venv") / "venv")
    wheels = source / "wheels"
    made.pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source))
    made.install(str(next(wheels.glob("*.whl"))))
    return made


def test_wheel_runs_stock_mergekit_yaml(environment, tmp_path):
    base, targets = family(tmp_path, 2)
    recipe = merge_recipe(base, targets, parameters={"select_topk": 0.5})
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    provenance = tmp_path / "coefficients.json"
    arguments = ["-m", "mergekit.scripts.run_yaml", str(tmp_path / "recipe.yml"), str(tmp_path / "out")]
    done = environment.run(*arguments, FUSEKIT_PROVENANCE=str(provenance))
    assert done.returncode == 0, done.stderr
    assert "[FuseChat SCE](https://arxiv.org/abs/2408.07990)" in (tmp_path / "out" / "README.md").read_text()
    record = json.loads(provenance.read_text())
    assert record["base"] == str(base)
    assert len(record["tensors"]) == 21
    for tensor in record["tensors"].values():
        assert set(tensor["coefficients"]) == {str(t) for t in targets}
        assert sum(tensor["coefficients"].values()) == pytest.approx(1)
        assert 0.4 < tensor["selected"] <= 0.5
        assert set(tensor["erased"]) == {str(t) for t in targets}

    off = environment.run(*arguments[:-1], str(tmp_path / "off"), FUSEKIT_AUTOLOAD="0")
    assert off.returncode != 0
    assert "Unimplemented merge method fusechat_sce" in off.stderr  # mergekit's own words
    unwritable = provenance / "x.json"  # in a file
    without = environment.run(
        *("-m", "fusekit.mergekit_yaml", *arguments[2:-1], str(tmp_path / "m")),
        **{"FUSEKIT_AUTOLOAD": "0", "FUSEKIT_PROVENANCE": str(unwritable)},
    )
    assert without.returncode == 0, without.stderr
    (line,) = [line for line in without.stderr.splitlines() if "fusekit" in line]
    assert line.startswith(f"fusekit: the coefficients could not be written to {unwritable}")
    assert "Traceback" not in without.stderr
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("flags", [["-I"], ["-E", "-W", "error::ImportWarning"]])
def test_isolated_interpreters_see_it_too(environment, flags):
    done = environment.run(*flags, "-c", ASK)
    assert (done.stdout.strip(), done.returncode) == (BOTH, 0), done.stderr


@pytest.mark.parametrize(
    ("imports", "autoload"),
    [
        ("import fusekit.merge_methods.varm", "1"),
        ("import mergekit.merge_methods, fusekit.merge_methods", "1"),
        ("from mergekit.merge_methods import registry; import fusekit.mergekit_plugin as p; p.register()", "1"),
        ("import fusekit.merge_methods", "0"),
        ("import mergekit.merge_methods; import fusekit.mergekit_plugin as p; p.register(); p.register()", "0"),
    ],
)
def test_every_import_order_registers_once(environment, imports, autoload):
    done = environment.run("-c", f"{imports}; {ASK}", FUSEKIT_AUTOLOAD=autoload)
    assert done.stdout.strip() == BOTH, done.stderr
    assert "fusekit" not in done.stderr


def test_an_interpreter_that_does_not_merge_loads_nothing(environment):
    program = (
        "import sys; before = set(sys.modules); "
        "print(sorted(m for m in before if 'fusekit' in m or m in ('torch', 'numpy', 'mergekit', 'typing')))"
    )
    assert environment.run("-c", program).stdout.strip() == "['_fusekit_autoload']"
    light = "import sys, fusekit, fusekit.cli; print(sorted({'torch', 'transformers', 'mergekit'} & set(sys.modules)))"
    assert environment.run("-c", light).stdout.strip() == "[]"


def test_the_entry_points_are_the_methods(environment):
    """For a mergekit that looks there: the objects that the hook registers."""
    program = (
        "from importlib.metadata import entry_points, version; from mergekit.merge_methods import get; "
        "found = {e.name: e.load() for e in entry_points(group='mergekit.merge_methods')}; "
        "print(sorted(found), all(get(name) is method for name, method in found.items())); "
        "import fusekit; print(version('mergekit-fusekit') == fusekit.__version__)"
    )
    done = environment.run("-c", program)
    assert done.stdout.splitlines() == [f"{BOTH} True", "True"], done.stderr


def test_doctor_tells_of_another_project_called_fusekit(environment):
    """`fusekit` on PyPI is somebody else's and installs the same package."""
    doctor = ("-m", "fusekit.cli", "doctor")
    done = environment.run(*doctor)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Another fusekit" not in done.stdout
    other = environment.packages / "fusekit-9.8.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: fusekit\nVersion: 9.8\n")
    (other / "RECORD").write_text("fusekit/__init__.py,,\nfusekit-9.8.dist-info/METADATA,,\n")
    try:
        done = environment.run(*doctor)
    finally:
        shutil.rmtree(other)
    assert done.returncode == 1
    for words in ("fusekit 9.8", "mergekit-fusekit", "pip uninstall fusekit"):
        assert words in done.stdout


def test_broken_fusekit_prints_one_line_and_mergekit_goes_on(environment):
    broken = environment.packages / "fusekit" / "mergekit_plugin.py"
    whole = broken.read_text()
    try:
        broken.write_text("raise RuntimeError('broken on\\npurpose')\n")
        done = environment.run("-c", ASK)
    finally:
        broken.write_text(whole)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0)
    lines = [line for line in done.stderr.splitlines() if "fusekit" in line]
    assert lines == [
        "fusekit: its merge methods are not available (RuntimeError: broken on purpose). `fusekit doctor` says more; "
        "FUSEKIT_AUTOLOAD=0 silences this."
    ]


def test_a_taken_name_is_reported_and_left_alone(environment):
    program = (
        "import sys; from mergekit.merge_methods import registry, easy_define; import torch; "
        "from mergekit.merge_methods.base import TensorGroup\n"
        "def f(g: TensorGroup) -> torch.Tensor: return g.entries[0].tensor\n"
        "registry.register(easy_define.merge_method(f, name='varm'))\n"
        "import fusekit.mergekit_plugin as p\n"
        "try: p.register()\n"
        "except Exception as e: print(type(e).__name__, e)\n"
    )
    done = environment.run("-c", program, FUSEKIT_AUTOLOAD="0")
    assert done.stdout.startswith("MergeError mergekit already has a merge method 'varm'"), done.stderr


def test_reinstalling_editable_and_uninstalling(environment, source):
    """The last test of this module: it takes fusekit out of the environment."""
    environment.install("--editable", str(source))
    assert environment.run("-c", ASK).stdout.strip() == BOTH
    recipes = environment.run("-c", "import fusekit; print(fusekit.__file__)").stdout.strip()
    assert recipes == str(source / "fusekit" / "__init__.py")
    assert not (environment.packages / "fusekit").exists()
    environment.pip("uninstall", "--quiet", "--yes", "mergekit-fusekit")
    assert environment.ours() == []
    gone = environment.run("-c", f"import sys; {ASK}; import importlib.util as u; print(u.find_spec('fusekit'))")
    assert gone.stdout.split("\n")[:2] == ["[]", "None"]
    assert gone.stderr == "" or "fusekit" not in gone.stderr
