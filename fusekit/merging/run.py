"""A merge from the recipe to the published folder: checked, estimated, run by mergekit, verified, moved in one step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.merge import run_merge
from mergekit.options import MergeOptions

import fusekit.merge_methods  # noqa: F401  registers fusekit's methods with mergekit
from fusekit import yaml as safe_yaml
from fusekit.artifacts import disk_fault, human, output_lock, recover, staging
from fusekit.errors import FusekitError, MergeError, StorageError
from fusekit.merge_methods.provenance import record_coefficients
from fusekit.merging.adapters import check_adapters, merge_adapters
from fusekit.merging.card import write_card, write_provenance
from fusekit.merging.estimate import estimate, refuse
from fusekit.merging.lint import lint
from fusekit.merging.loading import registered
from fusekit.merging.models import Access, Model, resolve
from fusekit.merging.outputs import check_apart, final_path
from fusekit.merging.plan import Plan, make_plan
from fusekit.merging.progress import Progress
from fusekit.merging.references import OrderedConfiguration, pin
from fusekit.merging.verify import TOKENIZER_FILES, verify
from fusekit.resources import Need
from fusekit.yaml import Document, Problems


@dataclass(frozen=True)
class Settings:
    """What ``merge`` takes beside mergekit's own options.

    overwrite: replace a finished model at the output. ignore_estimates: start although it does not seem to fit.
    allow_pickle, allow_remote_code: models, as the recipe spells them, whose weights may be torch pickles, and whose
    own Python code may run. say: gets a line of plain text for the user. before_publishing: given the folder of the
    verified model, to add files to it. on_published: called as soon as the merged model stands at its final path; what
    follows is tidying up.
    """

    overwrite: bool = False
    ignore_estimates: bool = False
    allow_pickle: frozenset[str] = frozenset()
    allow_remote_code: frozenset[str] = frozenset()
    say: Callable[[str], None] = print
    before_publishing: Callable[[Path], None] = lambda _folder: None
    on_published: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Merged:
    """A published merge: where, its size in bytes, seconds, the method's name, number of tensors and input models."""

    path: Path
    nbytes: int
    seconds: float
    method: str
    tensors: int
    models: int

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.models} models merged with {self.method}, {self.tensors} tensors, "
            f"{human(self.nbytes)}, {self.seconds:.1f} s"
        )


def merge(
    recipe: Path | str, out: Path | str, options: MergeOptions | None = None, settings: Settings | None = None
) -> Merged:
    """Run a mergekit recipe and publish the merged model at ``out``, whole or not at all.

    Raises RecipeError for what is wrong with the recipe (all of it, with lines), MergeError for inputs, estimates and
    the result, StorageError for the disk or a second process on the same output. Nothing is left at ``out`` then,
    or what was there before.
    """
    started = time.monotonic()
    options, settings = options or MergeOptions(), settings or Settings()
    if not options.safe_serialization:
        raise MergeError("fusekit publishes safetensors only: leave out --no-safe-serialization")
    document = safe_yaml.load(recipe)
    final = final_path(out, overwrite=settings.overwrite)
    config, warnings = lint(document)
    for line in warnings:
        settings.say(f"warning: {line}")
    with output_lock(final):
        for folder in recover(final):
            settings.say(f"removed what an interrupted merge left behind: {folder}")
        # Again: a former output may just have been put back.
        final_path(final, overwrite=settings.overwrite)
        job = _prepare(document, config, options, settings, final)
        plan = _build(job, final, settings.say)
    size = sum(path.stat().st_size for path in final.rglob("*") if path.is_file())
    weights = sum(model.weights for model in job.models)
    return Merged(final, size, time.monotonic() - started, plan.method, len(plan.tensors), weights)


@dataclass(frozen=True)
class _Job:
    """written: the configuration with the names of the recipe; config: with pinned models."""

    document: Document
    written: OrderedConfiguration
    config: OrderedConfiguration
    models: list[Model]
    options: MergeOptions
    ignore_estimates: bool
    card: bool
    quiet: bool
    before_publishing: Callable[[Path], None]
    on_published: Callable[[], None]


def _prepare(document: Document, config: Any, options: MergeOptions, settings: Settings, final: Path) -> _Job:
    """Find the models and everything that is wrong with them, before anything large is read or fetched."""
    access = Access(
        settings.allow_pickle,
        settings.allow_remote_code,
        options.trust_remote_code,
        Path(options.transformers_cache) if options.transformers_cache else None,
    )
    models = resolve(config, Problems(document), access)
    for line in access.notices:
        settings.say(f"notice: {line}")
    used = list(models.values())
    check_adapters(used, options)
    kept = [(f"the input model {model.spelling}", model.folder) for model in used]
    kept += [(f"the adapter of {model.spelling}", model.adapter) for model in used if model.adapter]
    kept += [("the recipe", Path(document.name))]
    kept += [("a cache", Path(path)) for path in (options.transformers_cache, options.lora_merge_cache) if path]
    check_apart(final, kept)
    card, quiet = options.write_model_card, options.quiet
    options = options.model_copy(
        update={
            "trust_remote_code": options.trust_remote_code or bool(settings.allow_remote_code),
            # Card and progress are ours: mergekit's card may ask the network, its bars know tasks, not bytes.
            "write_model_card": False,
            "quiet": True,
        }
    )
    written = pin(config, {reference: reference for reference in models})
    pinned = pin(config, {reference: model.pinned for reference, model in models.items()})
    return _Job(
        document,
        written,
        pinned,
        used,
        options,
        settings.ignore_estimates,
        card,
        quiet,
        settings.before_publishing,
        settings.on_published,
    )


def _build(job: _Job, final: Path, say: Callable[[str], None]) -> Plan:
    progress = Progress(0, quiet=job.quiet)
    with registered(job.models, job.options.lazy_unpickle, progress.advance):
        plan = make_plan(job.config, job.models, job.options, Problems(job.document))
        for line in plan.warnings:
            say(f"warning: {line}")
        needs = estimate(plan, job.models, job.options, final)
        sizes = f"{human(plan.read_bytes)} to read, {human(plan.nbytes)} to write"
        say(f"{plan.method}, {len(plan.tensors)} tensors: {sizes}")
        for need in needs:
            say(str(need))
        if not job.ignore_estimates:
            refuse(needs)
        _download(job, say)
        if not merge_adapters(job.models, job.options):
            return _write(job, plan, final, progress, needs)
    with registered(job.models, job.options.lazy_unpickle, progress.advance):
        # What the adapters were merged into may have another dtype.
        plan = make_plan(job.config, job.models, job.options, Problems(job.document))
        return _write(job, plan, final, progress, needs)


def _download(job: _Job, say: Callable[[str], None]) -> None:
    for model in job.models:
        if model.snapshot and model.download:
            say(f"downloading {human(model.download_bytes)} of {model.origin}")
            model.snapshot.fetch(model.download, bar=not job.quiet and sys.stderr.isatty())


def _write(job: _Job, plan: Plan, final: Path, progress: Progress, needs: list[Need]) -> Plan:
    progress.total = max(plan.read_bytes, 1)
    with staging(final, job.on_published) as stage, record_coefficients() as record:
        try:
            with progress:
                run_merge(
                    job.config.model_copy(deep=True), str(stage.path), job.options, config_source=job.document.text
                )
            verify(
                stage.path,
                plan,
                trust_remote_code=job.options.trust_remote_code,
                tokenizer=_expects_tokenizer(job),
            )
            if job.card:
                write_card(stage.path, final.name, job.written, job.document.text, job.models)
            write_provenance(stage.path, record, card=job.card)
            _share_alike(stage.path)
            job.before_publishing(stage.path)
        except FusekitError:
            raise
        except Exception as error:
            raise _explain(error, final, plan, needs) from error
        stage.publish()
    return plan


def _share_alike(folder: Path) -> None:
    """Give the weights the mode of the other files: safetensors writes them for the owner alone, whatever the umask."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _expects_tokenizer(job: _Job) -> bool:
    if job.config.tokenizer or job.config.tokenizer_source:
        return True
    donor = job.config.base_model or job.config.referenced_models()[0]
    folder = next(model.folder for model in job.models if model.pinned == donor)
    return job.options.copy_tokenizer and any((folder / name).is_file() for name in TOKENIZER_FILES)


def _explain(error: Exception, final: Path, plan: Plan, needs: list[Need]) -> MergeError | StorageError:
    """The named error for whatever mergekit, torch or safetensors raised."""
    fault = disk_fault(error, final.parent, plan.nbytes)
    if fault is not None:
        return fault
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        numbers = "; ".join(str(need) for need in needs if need.what.startswith("memory"))
        return MergeError(
            f"out of memory ({text[:200]}). Estimated was {numbers}. A smaller --out-shard-size needs less."
        )
    return MergeError(f"mergekit stopped: {type(error).__name__}: {text}. Nothing was published; -v shows where.")
