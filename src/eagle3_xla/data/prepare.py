"""`prepare`: chats -> packed rows of token ids, a manifest and the draft vocabulary, in one folder.

train/ heldout/     Arrow datasets of packed rows (see packing.row_arrays)
draft_ids.json      target ids of the draft vocabulary, ascending
manifest.json       what was read, kept and dropped, token counts, coverage, the key of everything that shaped it
"""

import hashlib
import json
import random
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from eagle3_xla.config import DataConfig, Recipe, UserError, claim_output, write_run_file
from eagle3_xla.data.chat import Chat, encode_chat, read_chats
from eagle3_xla.data.packing import pack, row_arrays
from eagle3_xla.data.tokenizer import load_config, load_tokenizer, stop_token_ids
from eagle3_xla.data.vocab import coverage, draft_vocabulary

PACKAGED = "package:"  # package:train.jsonl is a file shipped in eagle3_xla/data/chats
FORMAT = 1  # of the prepared folder; part of the key


def prepare(recipe: Recipe) -> dict:
    """Write the prepared folder of `recipe.data`, unless it is there and current; return its manifest."""
    data = recipe.data
    vocab_size = load_config(recipe.target.path).vocab_size
    tokenizer = load_tokenizer(recipe.target.path)
    stop_ids = stop_token_ids(recipe.target.path, tokenizer)
    if not data.prepared:
        raise UserError("setting data.prepared is empty; name the folder that `prepare` writes")
    if data.draft_vocab_size > vocab_size:
        raise UserError(
            f"setting data.draft_vocab_size is {data.draft_vocab_size}; the target has only {vocab_size} tokens"
        )
    out = claim_output(Path(data.prepared))
    key = _key(data, tokenizer)
    if (out / "manifest.json").exists():
        manifest = json.loads((out / "manifest.json").read_text())
        if manifest["key"] == key:
            return manifest
        (out / "manifest.json").unlink()
    write_run_file(recipe, out)

    train_chats = _chats(data.train, "data.train")
    heldout_chats = _chats(data.heldout, "data.heldout")
    random.Random(data.seed).shuffle(train_chats)
    train, train_report = _encode(tokenizer, train_chats, data.row_length)
    heldout, heldout_report = _encode(tokenizer, heldout_chats, data.row_length)

    counts = _answer_counts(train, vocab_size)  # over every answer, also those that max_tokens leaves out
    train = _first_tokens(train, data.max_tokens)
    draft_ids = draft_vocabulary(counts, data.draft_vocab_size, stop_ids)
    for split, documents, report in (("train", train, train_report), ("heldout", heldout, heldout_report)):
        rows = _write_rows(out / split, documents, data.row_length, tokenizer.pad_token_id, data.seed)
        tokens, answer = sum(len(ids) for ids, _ in documents), sum(sum(mask) for _, mask in documents)
        padding = round(1 - tokens / (rows * data.row_length), 4)
        report |= {"chats": len(documents), "rows": rows, "tokens": tokens, "answer_tokens": answer, "padding": padding}
    manifest = {
        "key": key,
        "row_length": data.row_length,
        "vocab_size": vocab_size,
        "draft_vocab_size": len(draft_ids),
        "coverage_train": round(coverage(counts, draft_ids), 5),
        "coverage_heldout": round(coverage(_answer_counts(heldout, vocab_size), draft_ids), 5),
        "train": train_report,
        "heldout": heldout_report,
    }
    (out / "draft_ids.json").write_text(json.dumps(draft_ids.tolist()))
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))  # last: without it nothing is reused
    return manifest


def data_file(name: str) -> Path:
    """A path, or a file shipped with the package when it starts with `package:`."""
    if name.startswith(PACKAGED):
        return Path(str(resources.files("eagle3_xla.data") / "chats" / name.removeprefix(PACKAGED)))
    return Path(name)


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


def _chats(files: list[str], setting: str) -> list[Chat]:
    if not files:
        raise UserError(f"setting {setting} is empty; name at least one JSONL file of chats")
    return [chat for name in files for chat in read_chats(data_file(name))]


def _encode(tokenizer, chats: list[Chat], row_length: int) -> tuple[list, dict]:
    """Documents (ids, mask) of at most `row_length` tokens: longer ones are cut, those without an answer dropped."""
    documents, cut, dropped = [], 0, 0
    for chat in chats:
        ids, mask = encode_chat(tokenizer, chat)
        if len(ids) > row_length:
            ids, mask, cut = ids[:row_length], mask[:row_length], cut + 1
        # A row is drafted at only when two answer tokens follow each other (loss/unroll.py).
        if sum(mask) < 2:
            dropped += 1
            continue
        documents.append((ids, mask))
    if not documents:
        raise UserError(f"no conversation has an answer within {row_length} tokens (setting data.row_length)")
    return documents, {"read": len(chats), "cut_at_row_length": cut, "dropped_without_answer": dropped}


def _first_tokens(documents: list, max_tokens: int) -> list:
    """As many of the first documents as hold `max_tokens` tokens; 0: all."""
    total = 0
    for number, (ids, _) in enumerate(documents):
        if max_tokens and total >= max_tokens:
            return documents[:number]
        total += len(ids)
    return documents


def _answer_counts(documents: list, vocab_size: int) -> np.ndarray:
    """How often the assistant wrote each token, [vocab_size]."""
    counts = np.zeros(vocab_size, np.int64)
    for ids, mask in documents:
        np.add.at(counts, np.asarray(ids)[np.asarray(mask, bool)], 1)
    return counts


def _write_rows(path: Path, documents: list, row_length: int, pad_id: int, seed: int) -> int:
    from datasets import Dataset, Features, Sequence, Value, disable_progress_bars

    rows = pack([len(ids) for ids, _ in documents], row_length)
    random.Random(seed).shuffle(rows)
    arrays = [row_arrays([documents[i] for i in row], row_length, pad_id) for row in rows]
    features = Features(
        input_ids=Sequence(Value("int32"), row_length),
        loss_mask=Sequence(Value("bool"), row_length),
        document_ids=Sequence(Value("int16"), row_length),
        position_ids=Sequence(Value("int32"), row_length),
    )
    shutil.rmtree(path, ignore_errors=True)
    disable_progress_bars()
    dataset = Dataset.from_dict({k: [row[k] for row in arrays] for k in features}, features=features)
    dataset.save_to_disk(str(path))
    return len(rows)


def _key(data: DataConfig, tokenizer) -> str:
    """Fingerprint of everything that shapes the prepared rows: file contents, template, tokenizer, settings, format."""
    digest = hashlib.sha256()
    for name in [*data.train, "|", *data.heldout]:
        file = data_file(name)
        digest.update(file.read_bytes() if file.is_file() else name.encode())
    settings = {
        "row_length": data.row_length,
        "draft": data.draft_vocab_size,
        "max": data.max_tokens,
        "seed": data.seed,
    }
    digest.update(json.dumps([FORMAT, settings, tokenizer.chat_template], sort_keys=True).encode())
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(str(getattr(tokenizer, "backend_tokenizer", None) and tokenizer.backend_tokenizer.to_str()).encode())
    return digest.hexdigest()
