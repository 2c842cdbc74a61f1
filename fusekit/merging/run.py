"""A merge from the recipe to the published folder: checked, estimated, run by mergekit, read back, published."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from mergekit.card import generate_card
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors import safe_open
from transformers import AutoConfig

import fusekit.merge_methods  # noqa: F401  registers fusekit's methods with mergekit
from fusekit import mergekit_private
from fusekit import yaml as safe_yaml
from fusekit.devices import Need, is_out_of_memory, progress, refuse_lacking, worth_saying
from fusekit.disk import counted, disk_fault, human, output_lock, recover, staging
from fusekit.errors import FusekitError, MergeError, StorageError
from fusekit.hub import Headers, HubUnreachableError, checkpoint_headers, is_repository, weight_entry
from fusekit.merge_methods.provenance import MergeRecord, record_coefficients
from fusekit.merging.lint import check as check_recipe
from fusekit.merging.lint import lint
from fusekit.merging.models import (
    CheckingLoader,
    Model,
    OrderedConfiguration,
    Settings,
    first_not_finite,
    has_tokenizer,
    registered,
    resolve,
    tokens_of,
    with_models,
)
from fusekit.merging.plan import ANY, Plan, estimate, make_plan, same_shape
from fusekit.yaml import Document, Problems

_WAY_OUT = (
    "Free some, merge elsewhere, or lower the need (--out-shard-size 1B writes smaller shards from less memory); "
    "`--ignore-estimates` starts it all the same."
)
COEFFICIENTS = "coefficients.json"


@dataclass(frozen=True)
class Merged:
    """A published merge: where, its size in bytes, seconds, the method's name, number of tensors, the base's name, None
    without one, and the names of the models that were merged (into it)."""

    path: Path
    nbytes: int
    seconds: float
    method: str
    tensors: int
    base: str | None
    models: list[str]

    def __str__(self) -> str:
        return (
            f"{self.path}: {_merging(self.models, self.base, ' merged')} with {self.method}, "
            f"{counted(self.tensors, 'tensor')}, {human(self.nbytes)}, {self.seconds:.1f} s"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"path": str(self.path)}


@dataclass(frozen=True)
class Check:
    """What a merge would do, as far as headers tell, and everything that is known to stop it.

    Attributes:
        method, base, models: as in :class:`Merged`; None and empty where the recipe does not get that far.
        tensors: of the result. read_bytes, download_bytes, nbytes: what is read, fetched from the hub, and written.
        needs: disk and memory, against what is free; a line each.
        warnings, problems: a line each, with the place in the recipe where there is one.
    """

    recipe: str
    method: str | None = None
    base: str | None = None
    models: list[str] = field(default_factory=list)
    tensors: int = 0
    read_bytes: int = 0
    download_bytes: int = 0
    nbytes: int = 0
    needs: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def can_run(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"can_run": self.can_run}

    def __str__(self) -> str:
        lines = []
        if self.method is not None:
            merging = _merging(self.models, self.base)
            fetched = f"{human(self.download_bytes)} to download, " if self.download_bytes else ""
            lines = [
                f"{self.recipe}: {merging} with {self.method}, {counted(self.tensors, 'tensor')}",
                f"{fetched}{human(self.read_bytes)} to read, {human(self.nbytes)} to write",
            ]
        lines += [*self.needs, *(f"warning: {line}" for line in self.warnings)]
        lines += [f"problem: {line}" for line in self.problems]
        lines.append("it can run" if self.can_run else f"it cannot run: {counted(len(self.problems), 'problem')}")
        return "\n".join(lines)


def _merging(models: list[str], base: str | None, verb: str = "") -> str:
    return f"{counted(len(models), 'model')}{verb}" + (f" on the base {base}" if base else "")


def merge(
    recipe: Document | Path | str,
    out: Path | str,
    options: MergeOptions | None = None,
    settings: Settings | None = None,
) -> Merged:
    """Run a mergekit recipe and publish the merged model at ``out``, whole or not at all.

    Args:
        recipe: the path of a mergekit recipe, or one that is read already (:func:`fusekit.yaml.loads`).
        out: a folder that is empty or does not exist, or a model with ``Settings(overwrite=True)``.
        options: mergekit's own: device, size of shards, caches. Safetensors are always written.
        settings: what fusekit adds to them.

    Raises:
        RecipeError: the recipe is wrong; names every mistake and its line.
        MergeError: inputs, the estimates of disk and memory, or the result are wrong.
        StorageError: the disk failed, or another process writes to the same output.
            Nothing is left at ``out`` then, or what was there before.

    Example:
        >>> from fusekit.merging import merge
        >>> merged = merge("recipes/demo-sce.yml", "out/merged")  # doctest: +SKIP
        >>> print(merged)  # doctest: +SKIP
        out/merged: 4 models merged with FuseChat SCE, 38 tensors, 2.0 MB, 0.1 s
    """
    started = time.monotonic()
    options, settings = options or MergeOptions(), settings or Settings()
    check_options(options)
    document = recipe if isinstance(recipe, Document) else safe_yaml.load(recipe)
    final = final_path(out, overwrite=settings.overwrite)
    config, warnings = lint(document)
    for line in warnings:
        settings.say(f"warning: {line}")
    with output_lock(final):
        for folder in recover(final):
            settings.say(f"removed what an interrupted merge left behind: {folder}")
        # Again: a former output may just have been put back.
        final_path(final, overwrite=settings.overwrite)
        job = _prepare(config, options, settings, final, Problems(document))
        job.check_apart()
        with registered(job.models, options.lazy_unpickle) as loaders:
            plan, needs = _plan_and_fetch(job)
            _write(job, plan, needs, loaders)
    size = sum(path.stat().st_size for path in final.rglob("*") if path.is_file())
    return Merged(final, size, time.monotonic() - started, plan.method, len(plan.tensors), plan.base, plan.models)


Result = TypeVar("Result")


def check(
    recipe: Document | Path | str,
    out: Path | str | None = None,
    options: MergeOptions | None = None,
    settings: Settings | None = None,
) -> Check:
    """What :func:`merge` would do with the same arguments, and every problem that is known before weights are read.

    Nothing is written or locked; of a model on the hub, configuration and tokenizer are fetched into the cache. Without
    ``out`` the output is not looked at. Raises RecipeError only where the recipe is not YAML.
    """
    options, settings = options or MergeOptions(), settings or Settings()
    document = recipe if isinstance(recipe, Document) else safe_yaml.load(recipe)
    found: list[str] = []
    warnings: list[str] = []

    def attempt(step: Callable[[Problems], Result]) -> Result | None:
        problems = Problems(document)
        try:
            return step(problems)
        except FusekitError as error:
            if not problems.found or isinstance(error, HubUnreachableError):
                found.append(str(error))
            return None
        finally:
            found.extend(problems.lines())
            warnings.extend(problems.warnings)

    attempt(lambda _: check_options(options))
    final = None if out is None else attempt(lambda _: final_path(out, overwrite=settings.overwrite))
    before = len(found)
    config = attempt(lambda problems: check_recipe(document.data, problems))
    linted = len(found) == before
    job = plan = None
    if config is not None:
        place = final or Path("out").resolve()
        job = attempt(lambda problems: _prepare(config, options, settings, place, problems))
    if job is not None and final is not None:
        attempt(lambda _: job.check_apart())
    if job is not None and linted:
        with registered(job.models, options.lazy_unpickle):
            plan = attempt(job.plan)
    if job is None or plan is None:
        return Check(document.name, warnings=warnings, problems=found)
    needs = estimate(plan, job.models, options, job.final)
    if not settings.ignore_estimates:
        found += [f"this does not fit: {need}" for need in needs if not need.fits]
    return Check(
        document.name,
        plan.method,
        plan.base,
        plan.models,
        len(plan.tensors),
        plan.read_bytes,
        sum(model.download_bytes for model in job.models),
        plan.nbytes,
        [str(need) for need in needs],
        list(dict.fromkeys([*warnings, *plan.warnings])),
        found,
    )


def check_options(options: MergeOptions) -> None:
    """Raise MergeError for options of mergekit that cannot work here, whatever the recipe says."""
    if not options.safe_serialization:
        raise MergeError("fusekit publishes safetensors only: leave out --no-safe-serialization")
    if options.lora_merge_dtype is not None:
        raise MergeError("adapters are added in the dtype of their model's weights: leave out --lora-merge-dtype")
    if options.multi_gpu and torch.accelerator.device_count() == 0:
        raise MergeError("--multi-gpu: torch sees no accelerator on this machine: leave it out")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise MergeError(f"the device {options.device!r} cannot be used here ({reason}): use --device cpu") from error


def final_path(out: Path | str, *, overwrite: bool) -> Path:
    """The resolved folder that a merge publishes to; checked without touching anything.

    Raises MergeError when it is a file, a mount point (nothing can be renamed over it), not empty without
    ``overwrite``, or holds something else than a model (config.json is the sign), which overwriting would delete.
    """
    if not str(out):  # which would be the working directory
        raise MergeError("the output has an empty name: give a folder for the merged model")
    final = Path(out).resolve()
    try:
        if final.exists() and not final.is_dir():
            raise MergeError(f"{out} is a file: give a folder for the merged model")
        if final.is_mount():
            raise MergeError(f"{out} is a mount point, to which no finished model can be moved: give a folder below it")
        content = sorted(path.name for path in final.iterdir()) if final.exists() else []
    except OSError as error:
        raise MergeError(f"{out} cannot be an output: {error.strerror or error}") from error
    if content and not overwrite:
        raise MergeError(f"{out} is not empty ({', '.join(content[:3])}): choose another folder or give --overwrite")
    if content and "config.json" not in content:
        raise MergeError(
            f"{out} does not look like a model (no config.json; it holds {', '.join(content[:3])}), and --overwrite "
            "would delete it: remove it yourself or choose another folder"
        )
    return final


@dataclass(frozen=True)
class _Job:
    """config: with pinned models in place of those of the recipe."""

    document: Document
    config: OrderedConfiguration
    models: list[Model]
    options: MergeOptions
    settings: Settings
    final: Path

    @property
    def mergekit_options(self) -> MergeOptions:
        # Card and progress are fusekit's: mergekit's card may ask the network, its bars know tasks, not bytes.
        code = bool(self.options.trust_remote_code or self.settings.allow_remote_code)
        return self.options.model_copy(update={"trust_remote_code": code, "write_model_card": False, "quiet": True})

    def plan(self, problems: Problems) -> Plan:
        return make_plan(self.config, self.models, self.mergekit_options, problems)

    def check_apart(self) -> None:
        """Raise MergeError if publishing would replace or change something that is still needed."""
        kept = [("the recipe", Path(self.document.name))]
        kept += [(f"the input model {model.name}", model.folder) for model in self.models]
        kept += [(f"the adapter of {model.name}", model.adapter.file) for model in self.models if model.adapter]
        for label, path in kept:
            place = path.resolve()
            if self.final in (place, *place.parents) or place in self.final.parents:
                raise MergeError(
                    f"the output {self.final} is, holds or lies in {label} ({place}): choose another folder"
                )


def _prepare(
    config: MergeConfiguration, options: MergeOptions, settings: Settings, final: Path, problems: Problems
) -> _Job:
    """Find the models and everything that is wrong with them, before anything large is read or fetched."""
    models = resolve(config, problems, settings, options)
    pinned = with_models(config, {reference: model.pinned for reference, model in models.items()})
    return _Job(problems.document, pinned, list(models.values()), options, settings, final)


def _plan_and_fetch(job: _Job) -> tuple[Plan, list[Need]]:
    """Plan the merge, refuse what does not fit, and fetch the weights. The loaders are registered."""
    say = job.settings.say
    plan = job.plan(Problems(job.document))
    for line in plan.warnings:
        say(f"warning: {line}")
    needs = estimate(plan, job.models, job.options, job.final)
    sizes = f"{human(plan.read_bytes)} to read, {human(plan.nbytes)} to write"
    say(f"{plan.method}, {counted(len(plan.tensors), 'tensor')}: {sizes}")
    for line in worth_saying(needs):
        say(line)
    if not job.settings.ignore_estimates:
        refuse_lacking(needs, "this merge does not fit:", _WAY_OUT, MergeError)
    for model in job.models:
        if model.snapshot and model.download:
            say(f"downloading {human(model.download_bytes)} of {model.origin}")
            model.snapshot.fetch(model.download, bar=not job.options.quiet and sys.stderr.isatty())
    return plan, needs


def _write(job: _Job, plan: Plan, needs: list[Need], loaders: list[CheckingLoader]) -> None:
    """Merge into a folder beside the output, check and publish it."""
    options, source = job.mergekit_options, job.document.text
    donor = next(model for model in job.models if model.pinned == job.config.donor)
    if not has_tokenizer(donor.folder):  # mergekit would log a traceback
        options = options.model_copy(update={"copy_tokenizer": False})
    with staging(job.final) as folder, record_coefficients() as record:
        try:
            with progress(plan.read_bytes, "merging", "byte", quiet=job.options.quiet) as bar:
                for loader in loaders:
                    loader.on_read = bar.update
                run_merge(job.config.model_copy(deep=True), str(folder), options, config_source=source)
            if (generation := plan.generation_config) is not None:  # mergekit copies it beside a copied tokenizer only
                shutil.copyfile(generation, folder / generation.name)
            tokenizer = bool(options.copy_tokenizer or job.config.tokenizer or job.config.tokenizer_source)
            check_result(folder, plan, trust_remote_code=options.trust_remote_code, tokenizer=tokenizer)
            _write_card(job, folder, record)
            # safetensors writes weights for their owner alone, whatever the umask.
            mode = (folder / "config.json").stat().st_mode
            for path in folder.glob("*.safetensors"):
                path.chmod(mode)
            job.settings.before_publishing(folder)
        except FusekitError:
            raise
        except Exception as error:
            raise _explain(error, job.final, plan, needs) from error


def _write_card(job: _Job, folder: Path, record: MergeRecord) -> None:
    """Write README.md and mergekit_config.yml as mergekit does, and the coefficients if a method of fusekit ran.

    The commits of hub models are added: the recipe alone does not say which weights were merged.
    """
    if record.tensors:
        (folder / COEFFICIENTS).write_text(record.to_json(), encoding="utf-8")
    if not job.options.write_model_card:
        return
    local = {model.reference.model.path for model in job.models if not model.snapshot}
    written = with_models(job.config, {model.pinned: model.reference for model in job.models})
    with mergekit_private.hub_models(lambda path: path not in local and is_repository(path)):
        card = generate_card(config=written, config_yaml=job.document.text, name=job.final.name)
    commits = [f"* {model.origin}" for model in job.models if model.snapshot]
    if commits:
        card += "\n### Revisions\n\n" + "\n".join(commits) + "\n"
    if record.tensors:
        card += "\n" + record.markdown()
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "mergekit_config.yml").write_text(job.document.text, encoding="utf-8")


def _explain(error: Exception, final: Path, plan: Plan, needs: list[Need]) -> MergeError | StorageError:
    """The named error for whatever mergekit, torch or safetensors raised."""
    fault = disk_fault(error, final.parent, plan.nbytes)
    if fault is not None:
        return fault
    text = " ".join(str(error).split())
    if is_out_of_memory(error) or "allocate memory" in text:
        numbers = "; ".join(str(need) for need in needs if need.what.startswith("memory"))
        return MergeError(
            f"out of memory ({text[:200]}). Estimated was {numbers}. A smaller --out-shard-size needs less."
        )
    return MergeError(f"mergekit stopped: {type(error).__name__}: {text}. Nothing was published; -v shows where.")


def check_result(folder: Path, plan: Plan, *, trust_remote_code: bool, tokenizer: bool) -> None:
    """Read a merged model back from the disk and check it against its plan.

    Every planned tensor is there with its shape and dtype and nothing else is, all values are finite, the index agrees
    with the shards, the configuration loads and agrees with the embedding, and the tokenizer loads where there is one,
    which there is if one was to be written. Raises MergeError; nothing is changed.
    """
    entry = weight_entry(path.name for path in folder.iterdir())
    if entry is None:
        raise MergeError(f"mergekit wrote no weights to {folder}")
    headers = checkpoint_headers(entry, folder, "the result")
    for planned in plan.tensors:
        found = headers.get(planned.name)
        if found is None and not planned.optional:
            raise MergeError(f"the result lacks the tensor {planned.name}")
        if found is None:
            continue
        if planned.shape is not None and not same_shape(planned.shape, found.shape):
            raise MergeError(f"the result: {planned.name} has shape {list(found.shape)}, not {list(planned.shape)}")
        if planned.dtype is not None and planned.dtype != found.dtype:
            raise MergeError(f"the result: {planned.name} is {found.dtype}, not {planned.dtype}")
    allowed = headers.keys() & {planned.name for planned in plan.tensors}
    for file in sorted({header.file for header in headers.values()}):
        with safe_open(folder / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  the file is no mapping
                if name not in allowed:
                    raise MergeError(f"the result holds {name} in {file}, which is not in the plan or the index")
                if (bad := first_not_finite(shard.get_tensor(name))) is not None:
                    raise MergeError(
                        f"the result: {name} holds {bad}, although all inputs are finite: {plan.method} overflowed in "
                        f"{headers[name].dtype}; set `dtype: float32` (and `out_dtype`) in the recipe"
                    )
    _check_config(folder, headers, plan, trust_remote_code)
    tokens_of(folder, "the result")
    if tokenizer and not has_tokenizer(folder):
        raise MergeError("the result has no tokenizer, although the input has one; run with -v to see why")


def _check_config(folder: Path, headers: Headers, plan: Plan, trust_remote_code: bool) -> None:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        rows = config.get_text_config().vocab_size
    except AttributeError:
        rows = None
    except Exception as error:
        raise MergeError(f"the result's config.json does not load: {' '.join(str(error).split())}") from error
    for planned in plan.tensors:
        if rows is None or planned.shape is None or ANY not in planned.shape or planned.name not in headers:
            continue
        found = headers[planned.name].shape[planned.shape.index(ANY)]
        if found != rows:
            raise MergeError(f"the result: {planned.name} has {found} rows, its config a vocabulary of {rows}")
