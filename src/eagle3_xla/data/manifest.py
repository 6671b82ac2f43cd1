"""manifest.json of a prepared folder, read and checked in one place: what follows relies on it."""

from pathlib import Path

from eagle3_xla import storage
from eagle3_xla.checks import listing, mapping, number, read_json, text
from eagle3_xla.errors import UserError
from eagle3_xla.storage import Location

MANIFEST = "manifest.json"
LONGEST_ROW, MOST_TOKENS, MOST_ROWS = 131_072, 1 << 24, 1 << 40


def prepared_manifest(folder: str) -> Location | None:
    """The manifest of a prepared folder (data.prepared), None while there is none."""
    manifest = storage.join(folder, MANIFEST)
    return manifest if folder and storage.exists(manifest) else None


def read_manifest(folder: Path) -> dict:
    """Raises UserError, with file and field, for a manifest that `prepare` did not write."""
    file = Path(folder) / MANIFEST
    manifest = read_json(file)

    def field(name: str, least: int, most: int) -> int:
        return number(manifest.get(name), f"{file}: {name}", least, most, whole=True)

    for name in ("key", "inputs"):
        text(manifest.get(name), f"{file}: {name}")
    if "target" not in manifest:
        raise UserError(
            f"{file} was written by an earlier version; run `eagle3-xla prepare` again (a run that began on it goes on "
            "if its rows come out the same)"
        )
    text(manifest["target"], f"{file}: target")
    mapping(manifest.get("settings"), f"{file}: settings")
    row_length = field("row_length", 8, LONGEST_ROW)
    field("draft_vocab_size", 1, field("vocab_size", 1, MOST_TOKENS))
    for name in listing(manifest.get("heldout_sources"), f"{file}: heldout_sources"):
        text(name, f"{file}: heldout_sources")
    for split in ("train", "heldout"):
        report = mapping(manifest.get(split), f"{file}: {split}")
        for name in ("chats", "rows", "tokens", "answer_tokens"):
            number(report.get(name), f"{file}: {split}.{name}", 0, MOST_ROWS, whole=True)
        _check_buckets(report, f"{file}: {split}.buckets", row_length)
    for number_of, report in enumerate(listing(manifest.get("sources"), f"{file}: sources")):
        mapping(report, f"{file}: sources[{number_of}]")
    return manifest


def _check_buckets(report: dict, where: str, row_length: int) -> None:
    """[[row length, first row, rows], ...], one after the other; none where all rows are equally long."""
    if "buckets" not in report:
        return
    rows = 0
    for bucket in listing(report["buckets"], where):
        if len(listing(bucket, where)) != 3:
            raise UserError(f"{where}: {bucket} is no [row length, first row, rows]")
        number(bucket[0], where, 1, row_length, whole=True)
        number(bucket[1], where, rows, rows, whole=True)
        rows += number(bucket[2], where, 1, MOST_ROWS, whole=True)
    number(rows, f"{where}: their rows", report["rows"], report["rows"])
