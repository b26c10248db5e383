"""Hugging Face hub: which names are its ids, its files in the cache here, and why it did not give them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rsaft_fast.errors import UserError, describe_error, first_line

Answer = TypeVar("Answer")

_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")


def is_hub_id(name: str | Path) -> bool:
    """Tell whether a name has the form owner/name."""
    return _ID.fullmatch(str(name)) is not None


def is_on_hub(name: str | Path) -> bool:
    """Whether a name means a repository of the hub: it has the form of an id, and nothing of that name is here."""
    return not os.path.exists(name) and is_hub_id(name)


def cached_file(repository: str, name: str) -> Path | None:
    """A file of a repository as the hub's cache holds it here, or None; the hub is not asked."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def snapshot(what: str, repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Give the folder of a repository with the files of these patterns.

    Downloaded once; without a connection, as cached.

    Args:
        what: how messages call it, such as "pipeline".
        revision: a commit; None is the newest.

    Raises:
        UserError: see `reach`.
    """
    return reach(
        what,
        repository,
        lambda hub: Path(hub.snapshot_download(repository, allow_patterns=list(patterns), revision=revision)),
    )


def dataset_snapshot(what: str, repository: str, patterns: Sequence[str]) -> Path:
    """`snapshot` of a data set."""
    return reach(
        what,
        f"datasets/{repository}",
        lambda hub: Path(hub.snapshot_download(repository, repo_type="dataset", allow_patterns=list(patterns))),
    )


def reach(what: str, repository: str, fetch: Callable[[Any], Answer]) -> Answer:
    """Call `fetch` with the `huggingface_hub` module; whatever its client raises becomes one line with the mend.

    Raises:
        UserError: gated, not there (or private), not reachable, or a disk that does not take it: each told apart.
    """
    # As the commands start: its part of the client costs a third of a second that local folders need not wait.
    import huggingface_hub

    try:
        return fetch(huggingface_hub)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} {repository!r} {_reason(error, repository)}") from error


def publish(repository: str, files: Mapping[str, Path | bytes], message: str, private: bool) -> str:
    """Put files into a model repository of the hub, made if need be, as one commit; return the commit's address.

    Args:
        files: by their path in the repository.
        private: of a repository that is made.

    Raises:
        UserError: not logged in, not allowed, not reachable: each told apart.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    operations = [
        huggingface_hub.CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        return api.create_commit(repository, operations, commit_message=message).commit_url
    except Exception as error:
        raise UserError(f"{repository!r} could not be pushed to: {_reason_of_push(error)}") from error


def _reason_of_push(error: Exception) -> str:
    from huggingface_hub import errors

    if _cause(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    token = "log in with hf auth login, or set HF_TOKEN, with a token that may write there"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"you are not logged in; {token}"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        code = error.response.status_code
        mend = token if code in (401, 403, 404) else "try again later"
        return f"the hub answered with HTTP {code} ({first_line(error)}); {mend}"
    if _is_of_network(error):
        return f"the hub cannot be reached: offline? ({describe_error(error)}); check the connection"
    return f"{describe_error(error)}; try again"


def _reason(error: Exception, repository: str) -> str:
    from huggingface_hub import errors

    offline = _cause(error, errors.OfflineModeIsEnabled)
    if _cause(error, errors.GatedRepoError):
        return (
            f"is gated on the hub: accept its licence at https://huggingface.co/{repository}, and log in on this "
            "machine with hf auth login"
        )
    if _cause(error, errors.RepositoryNotFoundError):
        return (
            "is neither a folder here nor a repository of the hub that you may see; check the name, or, where it is "
            "private, log in with hf auth login"
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"is a repository of the hub without a file that is needed ({first_line(error)}); check the name"
    if offline or (isinstance(error, errors.LocalEntryNotFoundError) and not error.__cause__):
        return (
            "is neither a folder here nor (whole) in the hub's cache, and the hub is not asked: HF_HUB_OFFLINE is set; "
            "unset it, or give a local folder"
        )
    answer = error if isinstance(error, errors.HfHubHTTPError) else error.__cause__
    if isinstance(answer, errors.HfHubHTTPError) and answer.response is not None:
        return (
            f"is not (whole) in the hub's cache, and the hub answered with HTTP {answer.response.status_code} "
            f"({first_line(answer)}); try again later, or give a local folder"
        )
    if isinstance(error, errors.LocalEntryNotFoundError) or _is_of_network(error):
        cause = error.__cause__ or error
        return (
            "is neither a folder here nor (whole) in the hub's cache, and the hub cannot be reached: offline? "
            f"({describe_error(cause)}); check the connection, or give a local folder"
        )
    return f"could not be had from the hub ({describe_error(error)}); try again, or give a local folder"


def _cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Tell whether the error, or one that it was raised from, is of that kind."""
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_of_network(error: Exception) -> bool:
    """Tell errors of connections: Python's own, and the client library's, which has renamed its own before."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"ConnectionError", "TimeoutError", "TransportError"})
