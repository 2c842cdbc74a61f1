"""Data sets on the Hugging Face hub, and errors about them with a way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fusekit.errors import DataError


def hub_records(
    repository: str, *, split: str, revision: str | None, name: str | None, streaming: bool
) -> Iterator[tuple[str, Any]]:
    """The records of a data set, with where each is. No code of the data set is run.

    Raises:
        DataError: while iterating, with a hint: offline, gated, missing, several configurations, no such split.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise DataError(f"{repository!r} is neither a file or folder nor the id of a data set (owner/name)") from error
    return _records(repository, split, revision, name, streaming)


def _records(
    repository: str, split: str, revision: str | None, name: str | None, streaming: bool
) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        _ask_once(repository, revision)
        import datasets

        data = datasets.load_dataset(repository, name, split=split, revision=revision, streaming=streaming)
        for number, record in enumerate(data, 1):
            yield f"{repository} ({split}), row {number}", record
    except GeneratorExit:
        raise
    except Exception as error:  # the client's own, its HTTP library's, pyarrow's
        raise explain(error, repository, revision, name, split) from error


def _ask_once(repository: str, revision: str | None) -> None:
    """One short question, since ``datasets`` asks an unreachable hub again and again."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return  # the cache may have it
    try:
        huggingface_hub.HfApi().dataset_info(
            repository, revision=revision, timeout=float(constants.HF_HUB_ETAG_TIMEOUT)
        )
    except Exception as error:
        if not _unreachable(error) or not _is_cached(repository):
            raise


def _is_cached(repository: str) -> bool:
    from pathlib import Path

    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / repository.replace("/", "___")).is_dir()


def _unreachable(error: BaseException) -> bool:
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(
        ("httpx", "requests")
    )


def explain(error: BaseException, repository: str, revision: str | None, name: str | None, split: str) -> DataError:
    """A DataError that says what to do about an exception of ``datasets`` or the hub client."""
    import huggingface_hub
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub import constants, errors

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and len(chain) < 10:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    page = f"{constants.ENDPOINT}/datasets/{repository}"
    token = "a token is set" if huggingface_hub.get_token() else "no token is set"
    said = " ".join(str(error).split())
    if has(errors.GatedRepoError):
        text = f"is gated: accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN ({token})"
    elif constants.is_offline_mode():
        text = f"is not in the cache of data sets ({HF_DATASETS_CACHE}) and HF_HUB_OFFLINE is set: unset it once, or "
        text += f"fetch its files where there is a network (`hf download {repository} --repo-type dataset --local-dir "
        text += "ROWS`) and give the folder that holds them as the path"
    elif has(errors.RevisionNotFoundError):
        text = f"has no revision {revision!r}: see {page}/commits/main"
    elif has(errors.RepositoryNotFoundError):
        text = f"is neither a file or folder nor a data set on {constants.ENDPOINT}: check the spelling; if it is "
        text += f"private, log in with `hf auth login` or set HF_TOKEN ({token})"
    elif "Config name is missing" in said or "BuilderConfig" in said:
        text = f"needs the name of one of its configurations, not {name!r}: {said}"
    elif "split" in said.lower() and isinstance(error, ValueError):
        text = f"has no split {split!r}: {said}"
    elif any(_unreachable(link) for link in chain):
        text = f"is not a file or folder, and {constants.ENDPOINT} does not answer ({type(error).__name__}: {said}): "
        text += "check the network, a proxy, or HF_ENDPOINT"
    elif "script" in said.lower():
        text = f"is made by code of its own, which fusekit does not run: fetch its files and give their path ({said})"
    else:
        text = f"cannot be read from {constants.ENDPOINT}: {type(error).__name__}: {said}"
    return DataError(f"{repository} {text}")
