"""`prepare`: sources of chats -> packed rows of token ids, a manifest and the draft vocabulary, in one folder.

train/ heldout/     Arrow datasets of rows (packing.row_arrays); heldout rows hold one source each, named by the column
                    `source` (int32, index into the manifest's `heldout_sources`)
draft_ids.json      target ids of the draft vocabulary, ascending
manifest.json       what was read, kept and dropped and why, token counts, coverage, the settings, and three
                    fingerprints: `key` of the rows and the draft vocabulary, `inputs` of everything that shaped them,
                    `target` of the chat template and the tokenizer
.work/              spools and tokenised chunks of a run that was interrupted; gone when it is done
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from eagle3_xla import local_copies, storage
from eagle3_xla.checks import listing, number, parse_json
from eagle3_xla.config import Recipe
from eagle3_xla.data import sources
from eagle3_xla.data.config import DataConfig, Source
from eagle3_xla.data.documents import Documents, tokenize
from eagle3_xla.data.manifest import MANIFEST, prepared_manifest, read_manifest
from eagle3_xla.data.mix import Mix, mix
from eagle3_xla.data.rows import SPLIT_FILES, write_rows
from eagle3_xla.data.tokenizer import load_config, load_tokenizer, shows_reasoning, stop_token_ids
from eagle3_xla.data.vocab import coverage, draft_vocabulary
from eagle3_xla.errors import UserError
from eagle3_xla.outputs import RUN_FILE, claim_output, write_run_file
from eagle3_xla.settings import binding
from eagle3_xla.storage import Location

SPLITS = ("train", "heldout")
MANY = 0.1  # share of conversations that are longer than a row, or whose answers aren't shown: worth a word


def prepare(recipe: Recipe, overwrite: bool = False) -> dict:
    """Write the prepared folder of `recipe.data`, unless it is there and current; return its manifest.

    On a disk, what an earlier `prepare` wrote stays whole until its successor is. What a bucket did not take stays on
    this machine, and the next start uploads it. overwrite: also in a folder that holds something else, whose files of
    the same names are replaced.
    """
    data = recipe.data
    vocab_size = load_config(recipe.target.path).vocab_size
    tokenizer = load_tokenizer(recipe.target.path)
    stop_ids = stop_token_ids(recipe.target.path, tokenizer)
    number(max(stop_ids), f"target {recipe.target.path!r}: its end-of-turn token's id", 0, vocab_size - 1)
    always = stop_ids | {token for token in tokenizer.all_special_ids if token < vocab_size}
    _check(data, vocab_size, len(always))
    place = claim_output(data.prepared, "prepare", overwrite=overwrite)
    out = local_copies.work_folder(place)
    _refuse_foreign_files(out, overwrite)
    prints = {split: [sources.fingerprint(sources.resolve(s)) for s in getattr(data, split)] for split in SPLITS}
    inputs = _inputs_key(data, prints, tokenizer, stop_ids, vocab_size)
    if current := _current(place, inputs):
        return current
    if storage.is_url(place) and (current := _current(out, inputs)):
        _finish(out, place)
        return current
    if overwrite or not (out / RUN_FILE).exists():
        write_run_file(recipe, out, "prepare")
    work = out / ".work" / inputs[:16]
    for stale in (out / ".work").glob("*"):
        if stale != work:
            shutil.rmtree(stale)
    work.mkdir(parents=True, exist_ok=True)

    chosen = mix(data, work)
    if not len(chosen.train):
        raise UserError(f"no conversation of data.train is left: {_why_dropped(chosen)}")
    of_target = (recipe.target.path, stop_ids, vocab_size)
    train = tokenize(chosen.train, *of_target, data, work / "train")
    heldout = tokenize(chosen.heldout, *of_target, data, work / "heldout")
    for setting, documents in (("train", train), ("heldout", heldout)):
        if not len(documents) and (setting == "train" or data.heldout):
            first = [entry["first"] for reasons in documents.dropped.values() for entry in reasons.values()][:1]
            raise UserError(f"no conversation of data.{setting} has a token to train on (the first: {first[0]})")

    draft_ids = draft_vocabulary(train.counts, data.draft_vocab_size, always)  # before max_tokens leaves answers out
    tokenised = len(train)
    train = train.first_tokens(data.max_tokens)
    digest = hashlib.sha256(draft_ids.tobytes())
    pad_id = min(stop_ids) if tokenizer.pad_token_id not in range(vocab_size) else tokenizer.pad_token_id
    reports = {}
    for split, documents in (("train", train), ("heldout", heldout)):
        reports[split] = write_rows(work / "rows" / split, documents, data, pad_id, split, digest)
        documents.close()
    reasoning = shows_reasoning(tokenizer)
    of_sources = _source_reports(chosen.sources, prints, train, heldout)
    manifest = {
        "key": digest.hexdigest(),
        "inputs": inputs,
        "target": template_key(tokenizer, stop_ids),
        "settings": row_settings(data),
        "row_length": data.row_length,
        "vocab_size": vocab_size,
        "draft_vocab_size": len(draft_ids),
        "coverage_train": round(coverage(train.counts, draft_ids), 5),
        "coverage_heldout": round(coverage(heldout.counts, draft_ids), 5),
        "train": reports["train"],
        "heldout": reports["heldout"],
        "heldout_sources": heldout.sources,
        "sources": of_sources,
        "evaluations": chosen.evaluations,
        "warnings": [*chosen.warnings, *_warnings(data, prints, of_sources, reasoning, train, tokenised)],
    }
    (out / MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        shutil.rmtree(out / split, ignore_errors=True)
        (work / "rows" / split).rename(out / split)
    write_run_file(recipe, out, "prepare")
    storage.write(out / "draft_ids.json", json.dumps(draft_ids.tolist()))
    storage.write(out / MANIFEST, json.dumps(manifest, indent=1))  # last: without it nothing is reused
    _finish(out, place)
    return manifest


def _finish(out: Path, place: Location) -> None:
    """What is made whole in `out`, to `place`."""
    shutil.rmtree(out / ".work", ignore_errors=True)
    if storage.is_url(place):
        storage.upload(out / RUN_FILE, storage.join(place, RUN_FILE))  # first: it says whose the folder is
        for name in (MANIFEST, *SPLITS):
            storage.remove(storage.join(place, name))
        storage.upload_folder(out, place, last=MANIFEST)
        shutil.rmtree(out)


def load_prepared(folder: str, vocab_size: int | None = None, target: str = "") -> tuple[Any, Any, torch.Tensor, dict]:
    """(train rows, held-out rows, draft ids [D] int64, manifest) of a prepared folder.

    vocab_size, target: of the target that they are for, and where it lies, if that is known. Raises UserError when
    there is no such folder, it is damaged or was prepared for another target.
    """
    if not prepared_manifest(folder):
        raise UserError(f"no prepared data at {folder!r} (setting data.prepared); run `eagle3-xla prepare` first")
    path = local_copies.local_folder(folder)
    manifest = read_manifest(path)
    if vocab_size not in (None, manifest["vocab_size"]):
        raise UserError(
            f"{path} was prepared for a target of {manifest['vocab_size']} tokens (manifest.json: vocab_size); this "
            f"one has {vocab_size}. Prepare the data with this target"
        )
    if target:
        tokenizer = load_tokenizer(target)
        if manifest["target"] != template_key(tokenizer, stop_token_ids(target, tokenizer)):
            raise UserError(
                f"{path} was prepared with another chat template, tokenizer or end-of-turn token than those of "
                f"{target!r} (manifest.json: target). Prepare the data with this target"
            )
    train, heldout = (_load_rows(path, split, manifest) for split in SPLITS)
    file = path / "draft_ids.json"
    ids = listing(parse_json(file.read_text(errors="replace") if file.is_file() else "", str(file)), str(file))
    number(len(ids), f"{file}: its length", *[manifest["draft_vocab_size"]] * 2)
    least = 0
    for token in ids:
        least = number(token, f"{file}: a token id", least, manifest["vocab_size"] - 1, whole=True) + 1
    return train, heldout, torch.tensor(ids, dtype=torch.int64), manifest


def _load_rows(path: Path, split: str, manifest: dict) -> Any:
    from datasets import load_from_disk

    again = "it is damaged; remove the folder and prepare it again"
    try:
        rows = load_from_disk(str(path / split)).with_format("numpy")
    except Exception as error:  # Arrow, fsspec and datasets have many of their own
        raise UserError(f"{path / split} can't be read ({' '.join(str(error).split())[:200]}): {again}") from None
    wanted = {"input_ids", "loss_mask", "document_ids", "position_ids"} | ({"source"} if split == "heldout" else set())
    if set(rows.column_names) != wanted or len(rows) != manifest[split]["rows"]:
        raise UserError(
            f"{path / split} holds {len(rows)} rows of {rows.column_names}, not what manifest.json says: {again}"
        )
    length = getattr(rows.features["input_ids"], "length", -1)
    if "buckets" not in manifest[split] and len(rows) and length != manifest["row_length"]:
        raise UserError(f"{path / split} holds rows of {length} tokens, not manifest.json's row_length: {again}")
    return rows


def _current(out: Location, inputs: str) -> dict | None:
    """The manifest, if the folder is whole and was made of the same."""
    try:
        manifest = load_prepared(str(out))[3]
        return manifest if manifest["inputs"] == inputs else None
    except UserError:
        return None


def _refuse_foreign_files(out: Path, overwrite: bool) -> None:
    """The folders of rows are replaced as a whole: nothing that somebody put there may go with them."""
    foreign = [
        file
        for split in SPLITS
        for file in (out / split).rglob("*")
        if not any(file.match(pattern) for pattern in SPLIT_FILES)
    ]
    if foreign and not overwrite:
        raise UserError(f"{foreign[0]} is not ours and would be removed; move it away, or give --overwrite")


def _check(data: DataConfig, vocab_size: int, always: int) -> None:
    if not data.prepared:
        raise UserError("setting data.prepared is empty; name the folder that `prepare` writes")
    if not data.train:
        raise UserError("setting data.train is empty; name at least one source of chats")
    if not always <= data.draft_vocab_size <= vocab_size:
        raise UserError(
            f"setting data.draft_vocab_size is {data.draft_vocab_size}; the target has {vocab_size} tokens, "
            f"{always} of them special"
        )


def _inputs_key(data: DataConfig, prints: dict, tokenizer: Any, stop_ids: set[int], vocab_size: int) -> str:
    """Fingerprint of everything that shapes the prepared rows: content of the sources, template, tokenizer, settings,
    and the code of this package."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    for name in data.decontaminate:
        digest.update(sources.fingerprint(Source(path=name)).encode())
    special = [tokenizer.pad_token_id, tokenizer.bos_token, sorted(tokenizer.all_special_ids), sorted(stop_ids)]
    special.append(vocab_size)
    digest.update(json.dumps([binding(data), prints, tokenizer.chat_template, special], sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def template_key(tokenizer: Any, stop_ids: set[int]) -> str:
    """Fingerprint of what makes token ids of chats; the versions of the libraries that do so are no part of it."""
    what = [tokenizer.chat_template, tokenizer.bos_token, sorted(stop_ids), tokenizer.get_vocab()]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def row_settings(data: DataConfig) -> dict[str, Any]:
    """What shapes the rows, but for the places of files."""
    return {name: value for name, value in binding(data).items() if name not in ("train", "heldout", "decontaminate")}


def _why_dropped(chosen: Mix) -> str:
    counts: dict[str, int] = {}
    for report in chosen.sources.values():
        for reason, entry in report["dropped"].items():
            counts[reason] = counts.get(reason, 0) + entry["rows"]
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
    return f"{reasons} (duplicates of held-out conversations count too)" if reasons else "heldout_share takes all"


def _warnings(
    data: DataConfig, prints: dict, reports: list[dict], reasoning_shown: bool, train: Documents, tokenised: int
) -> list[str]:
    """reports: of the sources; tokenised: conversations before data.max_tokens."""
    chats = {split: list(map(_chats_of, getattr(data, split), prints[split])) for split in SPLITS}
    warnings = [
        f"{source.path} is both trained on and held out: its held-out figures are of chats that the head has seen"
        for source, of_it in zip(data.heldout, chats["heldout"], strict=True)
        if of_it in chats["train"]
    ]
    for report in reports:
        if report.get("with_reasoning") and not reasoning_shown:
            warnings.append(
                f"{report['name']}: {report['with_reasoning']} conversations have reasoning_content, which the "
                "target's chat template does not show: they are trained on without it"
            )
        unshown = report["dropped"].get("no_answer_in_template", {"rows": 0})
        if unshown["rows"] > MANY * report["kept"]:
            warnings.append(
                f"{report['name']}: {unshown['rows']} of {report['kept']} conversations are left out "
                f"(no_answer_in_template; the first: {unshown['first']})"
            )
    if len(train) < tokenised:
        warnings.append(
            f"data.max_tokens {data.max_tokens} leaves out {tokenised - len(train)} of {tokenised} conversations"
        )
    if train.cut.mean() > MANY:
        warnings.append(
            f"{int(train.cut.sum())} of {len(train)} training conversations are longer than data.row_length "
            f"{data.row_length}: what lies past it is left out"
        )
    return warnings


def _chats_of(source: Source, fingerprint: str) -> tuple[str, ...]:
    """Which chats a source has; a set has others in each split."""
    source = sources.resolve(source)
    return (fingerprint,) if sources.is_file(source) else (fingerprint, source.file or source.split)


def _source_reports(reports: dict, prints: dict, train: Documents, heldout: Documents) -> list[dict]:
    """Per source: what was read, dropped and why, kept; and its conversations and tokens in each split."""
    fingerprints = [*prints["heldout"], *prints["train"]]
    result = []
    for (path, report), fingerprint in zip(reports.items(), fingerprints, strict=True):
        spool, dropped = Path(path).parent.name, dict(report["dropped"])
        report = report | {"fingerprint": fingerprint, "dropped": dropped}
        for split, documents in (("train", train), ("heldout", heldout)):
            for reason, entry in documents.dropped.get(spool, {}).items():
                known = dropped.get(reason, {"rows": 0, "first": entry["first"]})
                dropped[reason] = known | {"rows": known["rows"] + entry["rows"]}
            report[split] = documents.tokens_of(spool)
        result.append(report)
    return result
