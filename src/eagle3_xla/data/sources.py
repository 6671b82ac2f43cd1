"""Sources of conversations: the three public sets by name, hub ids, folders and local files, all as streams of rows."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from eagle3_xla import storage
from eagle3_xla.checks import first_line, one_line
from eagle3_xla.data.config import Source
from eagle3_xla.data.files import PACKAGED, data_file, read_rows, without_nulls
from eagle3_xla.errors import UserError

KNOWN = {
    "sharegpt": Source(
        path="anon8231489123/ShareGPT_Vicuna_unfiltered", file="ShareGPT_V3_unfiltered_cleaned_split.json"
    ),
    "ultrachat": Source(path="HuggingFaceH4/ultrachat_200k", split="train_sft"),
    "perfectblend": Source(path="mlabonne/open-perfectblend", read=200_000),
}
ENDINGS = {".jsonl", ".json", ".parquet", ".gz", ".zst"}  # of what is surely a file; hub ids have dots too
ONE_FILE = re.compile(r"[^*?\[:]+\.(jsonl|json|parquet)(\.gz|\.zst)?")  # of a set; read here, so it may be of any size
SHUFFLE_BUFFER = 10_000  # rows; of a set that is not read to its end


def resolve(source: Source) -> Source:
    """A known set's name becomes its hub id, file and split; what the recipe sets otherwise stays."""
    if source.path not in KNOWN or Path(source.path).exists():
        return source
    known, default = KNOWN[source.path], Source()
    given = {key: value for key, value in asdict(source).items() if value != getattr(default, key)}
    return replace(known, **(given | {"path": known.path, "name": source.name or source.path}))


def label(source: Source) -> str:
    """The source's name in manifest and figures."""
    name = Path(source.path.removeprefix(PACKAGED))
    while name.suffix in ENDINGS:
        name = name.with_suffix("")
    return source.name or name.name


def is_file(source: Source) -> bool:
    """Whether it is a local file (a folder or a hub id otherwise)."""
    path = data_file(source.path)
    looks_local = source.path.startswith((PACKAGED, "/", ".", "~")) or path.suffix in ENDINGS or path.is_file()
    return bool(looks_local) and not path.is_dir()


def fingerprint(source: Source) -> str:
    """sha256 of a local file or folder, or the commit of a hub set; then the name of its configuration, if any."""
    return " ".join(filter(None, [_content(source), source.config]))


def _content(source: Source) -> str:
    path = data_file(source.path)
    if is_file(source):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        return storage.sha256(path)
    if path.is_dir():
        digest = hashlib.sha256()
        for part in sorted(path.rglob("*")):
            if part.is_file():
                content = bytes.fromhex(storage.sha256(part))
                digest.update(f"{part.relative_to(path)} {part.stat().st_size}".encode() + content)
        return digest.hexdigest()
    if len(source.revision) == 40:  # a commit: no need to ask
        return source.revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(source.path, revision=source.revision or None).sha
    except (OfflineModeIsEnabled, HfHubHTTPError, ValueError, OSError) as error:
        raise UserError(
            f"source {source.path!r} is neither a file nor a folder here, and the hub did not answer "
            f"({first_line(error)}); download it and name the file"
        ) from None


def rows(source: Source, seed: int) -> Iterator[tuple[str, dict]]:
    """The source's rows as (where, row); `seed` shuffles the stream of a set's files that `read` ends early."""
    if is_file(source):
        stream = read_rows(data_file(source.path))
    elif ONE_FILE.fullmatch(source.file):
        stream = _rows_of_file(source)
    else:
        stream = _dataset_rows(source, seed)
    for number, row in enumerate(stream):
        if source.read and number >= source.read:
            return
        yield row


def _rows_of_file(source: Source) -> Iterator[tuple[str, dict]]:
    """Of `source.file` in a folder, or in a hub set: a copy of it stays in the hub's cache."""
    folder = data_file(source.path)
    if folder.is_dir():
        yield from read_rows(folder / source.file)
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import XetError

    name = f"{source.path}/{source.file}"
    try:
        copy = hf_hub_download(source.path, source.file, repo_type="dataset", revision=source.revision or None)
    except (OSError, ValueError, RuntimeError, XetError) as error:  # OSError: HTTP errors too
        raise UserError(f"{name} can't be downloaded ({one_line(error)})") from None
    for where, row in read_rows(Path(copy)):
        yield name + where.removeprefix(copy), row


def _dataset_rows(source: Source, seed: int) -> Iterator[tuple[str, dict]]:
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    name = f"{source.path}[{source.split}]"
    number = 0
    try:
        stream = datasets.load_dataset(
            str(data_file(source.path)),
            name=source.config or None,
            data_files=source.file or None,
            split=source.split,
            revision=source.revision or None,
            streaming=True,
        )
        if source.read:
            stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for row in stream:
            number += 1
            yield f"{name}:{number}", without_nulls(row)
    except ImportError as e:  # for audio, or for rows that look like an agent's traces
        raise UserError(
            f"{name}:{number + 1}: can't be read as a dataset ({one_line(e)}); a `file` of it is read without that"
        ) from None
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        pyarrow.ArrowException,
        datasets.exceptions.DatasetsError,
    ) as e:
        raise UserError(f"{name}:{number + 1}: can't be read as a dataset ({one_line(e)})") from None
