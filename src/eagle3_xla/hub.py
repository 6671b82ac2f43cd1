"""What a hub id names: files in the hub's cache on this machine, which is transformers' too.

Every failure is a UserError of one line. Without the hub, what is in the cache is taken.
"""

import functools
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eagle3_xla.checks import first_line
from eagle3_xla.errors import UserError

# All of a model but its weights, and what lies in its folders for other programs.
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "tokenizer.model*", "README.md")
ANSWER_SECONDS = 10
FAILURES = (OSError, RuntimeError, ValueError)  # of requests, of hf_xet, of a name that is no hub id


@functools.cache
def snapshot(hub_id: str) -> Path:
    """The folder of a model's small files, asked of the hub once in a process. Raises UserError."""
    from huggingface_hub import HfApi, snapshot_download
    from transformers.utils.hub import TRANSFORMERS_CACHE

    here = cached_snapshot(hub_id)
    try:
        HfApi().model_info(hub_id, timeout=ANSWER_SECONDS)  # which snapshot_download asks too, and may wait for ever
        folder = snapshot_download(
            hub_id, cache_dir=TRANSFORMERS_CACHE, allow_patterns=list(SMALL), ignore_patterns="*/*", tqdm_class=_NoBar
        )
        return Path(folder)
    except FAILURES as error:
        if here:
            return here
        raise UserError(f"no target at {hub_id!r}: {_reason(hub_id, error)}") from None


def cached_snapshot(hub_id: str) -> Path | None:
    """The folder of what is here of a model, without a look at the hub; None for nothing, or no hub id."""
    from transformers.utils import cached_file

    try:
        found = cached_file(hub_id, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    except FAILURES:
        return None
    return Path(found).parent if found else None


def file(hub_id: str, name: str) -> Path | None:
    """A file of the snapshot's commit, fetched where it isn't here yet; None where there is none. Raises UserError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from transformers.utils import hub

    commit = snapshot(hub_id).name
    try:
        return Path(hf_hub_download(hub_id, name, cache_dir=hub.TRANSFORMERS_CACHE, revision=commit))
    except FAILURES as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise UserError(f"the weights of target {hub_id!r} don't load: {name}: {_reason(hub_id, error)}") from None


def _reason(hub_id: str, error: BaseException) -> str:
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError as NoRepository

    if isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error
    if isinstance(error, HFValidationError):
        return "no such folder, and no hub id"
    who = "`hf auth login` or HF_TOKEN, on every host"
    if isinstance(error, GatedRepoError):
        return f"it is gated: accept its terms at https://huggingface.co/{hub_id}, then {who}"
    if isinstance(error, NoRepository) or getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return f"no such folder, and none on the hub that this machine may read; a private one asks for {who}"
    return f"it is not on this machine, and the hub did not give it ({first_line(error)}); start it again to go on"


class _NoBar(tqdm):
    """For a folder of small files that is mostly here already."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options | {"disable": True})
