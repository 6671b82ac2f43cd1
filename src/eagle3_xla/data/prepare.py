"""`prepare`: sources of chats -> packed rows of token ids, a manifest and the draft vocabulary, in one folder.

train/ heldout/     Arrow datasets of rows (packing.row_arrays); heldout rows hold one source each, named by the column
                    `source` (int8, index into the manifest's `heldout_sources`)
draft_ids.json      target ids of the draft vocabulary, ascending
manifest.json       what was read, kept and dropped and why, token counts, coverage, and two fingerprints:
                    `key` of the rows and the draft vocabulary, `inputs` of everything that shaped them
.work/              spools and tokenised chunks of a run that was interrupted; gone when it is done
"""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from eagle3_xla.config import DataConfig, Recipe, Source, UserError
from eagle3_xla.data import sources
from eagle3_xla.data.documents import Documents, tokenize
from eagle3_xla.data.mix import mix
from eagle3_xla.data.rows import write_rows
from eagle3_xla.data.tokenizer import load_config, load_tokenizer, stop_token_ids
from eagle3_xla.data.vocab import coverage, draft_vocabulary
from eagle3_xla.outputs import RUN_FILE, claim_output, write_run_file

FREE = ("prepared", "workers")  # settings that shape no row


def prepare(recipe: Recipe) -> dict:
    """Write the prepared folder of `recipe.data`, unless it is there and current; return its manifest.

    What an earlier `prepare` wrote stays whole until its successor is.
    """
    data = recipe.data
    vocab_size = load_config(recipe.target.path).vocab_size
    tokenizer = load_tokenizer(recipe.target.path)
    stop_ids = stop_token_ids(recipe.target.path, tokenizer)
    always = stop_ids | set(tokenizer.all_special_ids)
    _check(data, vocab_size, len(always))
    out = claim_output(Path(data.prepared), "prepare")
    prints = {"train": [], "heldout": []}
    for split, of in prints.items():
        of += [sources.fingerprint(sources.resolve(source)) for source in getattr(data, split)]
    inputs = _inputs_key(data, prints, tokenizer, stop_ids)
    if (out / "manifest.json").exists():
        manifest = json.loads((out / "manifest.json").read_text())
        if manifest.get("inputs") == inputs:
            return manifest
    if not (out / RUN_FILE).exists():
        write_run_file(recipe, out, "prepare")
    work = out / ".work" / inputs[:16]
    for stale in (out / ".work").glob("*"):
        if stale != work:
            shutil.rmtree(stale)

    chosen = mix(data, work)
    train = tokenize(chosen.train, recipe.target.path, stop_ids, data, work / "train")
    heldout = tokenize(chosen.heldout, recipe.target.path, stop_ids, data, work / "heldout")
    for setting, documents in (("train", train), ("heldout", heldout)):
        if not len(documents) and (setting == "train" or data.heldout):
            first = [entry["first"] for reasons in documents.dropped.values() for entry in reasons.values()][:1]
            raise UserError(f"no conversation of data.{setting} has a token to train on (the first: {first[0]})")

    counts = _answer_counts(train, vocab_size)  # over every answer, also those that max_tokens leaves out
    train = _first_tokens(train, data.max_tokens)
    draft_ids = draft_vocabulary(counts, data.draft_vocab_size, always)
    digest = hashlib.sha256(draft_ids.tobytes())
    reports = {}
    for split, documents in (("train", train), ("heldout", heldout)):
        reports[split] = write_rows(work / "rows" / split, documents, data, tokenizer.pad_token_id, split, digest)
    manifest = {
        "key": digest.hexdigest(),
        "inputs": inputs,
        "row_length": data.row_length,
        "vocab_size": vocab_size,
        "draft_vocab_size": len(draft_ids),
        "coverage_train": round(coverage(counts, draft_ids), 5),
        "coverage_heldout": round(coverage(_answer_counts(heldout, vocab_size), draft_ids), 5),
        "train": reports["train"],
        "heldout": reports["heldout"],
        "heldout_sources": heldout.sources,
        "sources": _source_reports(chosen.sources, prints, train, heldout),
        "warnings": chosen.warnings,
    }
    (out / "manifest.json").unlink(missing_ok=True)
    for split in ("train", "heldout"):
        shutil.rmtree(out / split, ignore_errors=True)
        (work / "rows" / split).rename(out / split)
    write_run_file(recipe, out, "prepare")
    (out / "draft_ids.json").write_text(json.dumps(draft_ids.tolist()))
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))  # last: without it nothing is reused
    shutil.rmtree(out / ".work")
    return manifest


def load_prepared(folder: str):
    """(train rows, held-out rows, draft ids [D] int64, manifest) of a prepared folder."""
    from datasets import load_from_disk

    path = Path(folder)
    if not folder or not (path / "manifest.json").exists():
        raise UserError(f"no prepared data at {folder!r} (setting data.prepared); run `eagle3-xla prepare` first")
    manifest = json.loads((path / "manifest.json").read_text())
    splits = [load_from_disk(str(path / split)).with_format("numpy") for split in ("train", "heldout")]
    draft_ids = torch.tensor(json.loads((path / "draft_ids.json").read_text()), dtype=torch.int64)
    return *splits, draft_ids, manifest


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


def _inputs_key(data: DataConfig, prints: dict, tokenizer, stop_ids: set[int]) -> str:
    """Fingerprint of everything that shapes the prepared rows: content of the sources, template, tokenizer, settings,
    and the code of this package."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    for name in data.decontaminate:
        digest.update(sources.fingerprint(Source(path=name)).encode())
    settings = {key: value for key, value in asdict(data).items() if key not in FREE}
    special = [tokenizer.pad_token_id, tokenizer.bos_token, sorted(tokenizer.all_special_ids), sorted(stop_ids)]
    digest.update(json.dumps([settings, prints, tokenizer.chat_template, special], sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def _first_tokens(documents: Documents, max_tokens: int) -> Documents:
    """As many of the first documents as hold `max_tokens` tokens; 0: all."""
    if not max_tokens:
        return documents
    return documents.first(int((documents.starts < max_tokens).sum()))


def _answer_counts(documents: Documents, vocab_size: int) -> np.ndarray:
    """How often the assistant wrote each token, [vocab_size]."""
    return np.bincount(documents.ids[documents.mask], minlength=vocab_size).astype(np.int64)


def _source_reports(reports: dict, prints: dict, train: Documents, heldout: Documents) -> list[dict]:
    """Per source: what was read, dropped and why, kept; and its conversations and tokens in each split."""
    fingerprints = [*prints["heldout"], *prints["train"]]
    result = []
    for (spool, report), fingerprint in zip(reports.items(), fingerprints, strict=True):
        report = report | {"fingerprint": fingerprint}
        for split, documents in (("train", train), ("heldout", heldout)):
            report["dropped"] |= documents.dropped.get(spool, {})
            report[split] = documents.tokens_of(spool)
        result.append(report)
    return result
