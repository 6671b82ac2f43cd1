"""`regenerate`: the mix of a recipe, or any files of chats, with the answers of the target instead of theirs.

chats.jsonl         one row a conversation (`id`, `source`, `messages`, `finish`, `new_tokens`), in the order in which
                    they were finished; `prepare` reads it
dropped.jsonl       conversations that can't be used, with the reason
regenerate.json     the model, the sampling settings, what the chats were made of, and the counts so far
run.yaml            the recipe
.work/              cleaned chats; gone when all are done
"""

import asyncio
import hashlib
import json
import os
import shutil
import time
from collections.abc import Awaitable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from eagle3_xla import local_copies, storage
from eagle3_xla.checks import read_json
from eagle3_xla.config import Recipe
from eagle3_xla.data import sources
from eagle3_xla.data.clean import Unusable
from eagle3_xla.data.config import DataConfig, Source
from eagle3_xla.data.filters import shingled_words
from eagle3_xla.data.mix import mix
from eagle3_xla.data.spool import read_chat
from eagle3_xla.errors import RunError, UserError
from eagle3_xla.outputs import RUN_FILE, claim_output, only_writer, write_run_file
from eagle3_xla.regenerate.conversation import Sampling, rewrite
from eagle3_xla.regenerate.journal import Journal
from eagle3_xla.regenerate.servers import GaveUp, Servers
from eagle3_xla.storage import Location

if TYPE_CHECKING:
    from eagle3_xla.regenerate.local import LocalTarget

UPLOAD_SECONDS = 60
NAMED = 10  # of the conversations without an answer


@dataclass
class Options:
    """servers: URLs, or target: a folder, a URL or a hub id, to run in this process on `device`; chats: files instead
    of the recipe's mix; limit: the first of them only, 0 for all; concurrency: conversations in flight; timeout:
    seconds an answer; api_key_env: the environment variable whose value the servers get as bearer token: none is sent
    unasked.
    """

    servers: list[str] = field(default_factory=list)
    target: str = ""
    chats: list[str] = field(default_factory=list)
    limit: int = 0
    concurrency: int = 16
    timeout: float = 600.0
    device: str = "cpu"
    api_key_env: str = ""
    sampling: Sampling = field(default_factory=Sampling)


def regenerate(recipe: Recipe, out: Location, options: Options) -> dict:
    """Write `out` (above), or what is missing in it; return counts. Raises UserError when it was begun with other
    settings, RunError when conversations are left without an answer: starting again goes on with those."""
    if bool(options.servers) == bool(options.target):
        raise UserError("give either --server URL[,URL...] or --target TARGET")
    recipe = replace(recipe, data=_chats_to_ask(recipe.data, options.chats))
    with only_writer(claim_output(out, "regenerate"), "regenerate"):
        place = local_copies.LocalFolder(out)
        for name in ("chats.jsonl", "dropped.jsonl", "regenerate.json"):
            place.restore(name)
        if not storage.exists(storage.join(out, RUN_FILE)):
            write_run_file(recipe, out, "regenerate")
        journal = Journal(place.path)
        try:
            counts = asyncio.run(_uploading(place, _regenerate(recipe, out, place.path, options, journal)))
        finally:
            journal.close()
            place.upload()
    return {"out": str(storage.join(out, "chats.jsonl"))} | counts


async def _uploading(place: local_copies.LocalFolder, work: Awaitable[dict]) -> dict:
    """The result of `work`; meanwhile what it has written goes to the URL now and then, if it is one."""

    done = asyncio.Event()

    async def upload() -> None:
        while not done.is_set():
            try:
                await asyncio.wait_for(done.wait(), UPLOAD_SECONDS)
            except TimeoutError:
                await asyncio.to_thread(place.upload)

    uploading = asyncio.ensure_future(upload())
    try:
        return await work
    finally:
        done.set()
        await asyncio.gather(uploading, return_exceptions=True)  # what failed fails again at the end, and is told then


async def _regenerate(recipe: Recipe, place: Location, out: Path, options: Options, journal: Journal) -> dict:
    """out: `place`, or the folder of this machine that is copied there."""
    data = recipe.data
    async with _asked(options) as backend:
        settings: dict[str, Any] = {
            "model": backend.model,
            "sampling": asdict(options.sampling),
            "chats": _fingerprint(data),
        }
        _check_settings(out / "regenerate.json", settings)
        write_run_file(recipe, place, "regenerate")
        work = out / ".work" / settings["chats"][:16]
        chats = mix(data, work, questions=True).train
        if not (out / "regenerate.json").exists():  # not before it is known that there is something to ask
            _write_json(out / "regenerate.json", settings)
        if options.chats:  # in the order of the files; a mix stays shuffled, so that `limit` takes some of each source
            chats = chats.in_order_of_sources()
        chats = chats[: options.limit or None]
        left: dict[int, str] = {}
        started, before = time.perf_counter(), journal.tokens
        with tqdm(total=len(chats), initial=len(journal.done), desc="regenerate", unit="chat") as bar:

            async def ask_all(todo: Iterator[tuple[int, tuple[str, int]]]) -> None:
                for number, (path, offset) in todo:
                    if number in journal.done:
                        continue
                    chat = read_chat(path, offset)
                    try:
                        journal.add(await rewrite(chat, number, options.sampling.seed, backend.ask))
                    except Unusable as problem:
                        journal.drop(number, chat.where, problem.reason, str(problem))
                    except GaveUp as problem:
                        left[number] = f"{chat.where}: {problem}"
                        bar.write(f"no answer for {left[number]}; left for the next start")
                    bar.update()
                    speed = (journal.tokens - before) / (time.perf_counter() - started)
                    bar.set_postfix_str(f"{speed:.0f} tokens/s")

            todo = enumerate(chats)  # shared: each takes the next
            await _all_or_first_error([ask_all(todo) for _ in range(options.concurrency)])
    seconds = time.perf_counter() - started
    counts: dict[str, Any] = {"conversations": len(chats), "finished": sum(journal.finishes.values())}
    counts |= {"finish": journal.finishes, "dropped": journal.dropped, "new_tokens": journal.tokens}
    _write_json(out / "regenerate.json", settings | counts)
    if left:
        first, *others = left.values()
        others = [other.partition(": ")[0] for other in others]
        also = f"; also {', '.join(others[:NAMED])}{', ...' if others[NAMED:] else ''}" if others else ""
        raise RunError(
            f"{len(left)} of {len(chats)} conversations got no answer ({first}{also}); start it again to ask again"
        )
    if not options.limit:
        shutil.rmtree(out / ".work", ignore_errors=True)
    speed = (journal.tokens - before) / seconds
    return counts | {"tokens_per_second": round(speed, 1)}


def _asked(options: Options) -> "Servers | LocalTarget":
    """Who answers."""
    if options.servers:
        key = _api_key(options.api_key_env)
        return Servers(options.servers, options.sampling, options.concurrency, options.timeout, key)
    from eagle3_xla.regenerate.local import LocalTarget

    return LocalTarget(options.target, options.sampling, options.concurrency, options.device)


def _api_key(name: str) -> str:
    """The key in environment variable `name`; none without a name."""
    key = os.environ.get(name, "") if name else ""
    if name and not (key and key.isascii() and key.isprintable()):
        raise UserError(f"--api-key-env {name}: this environment variable holds no key")
    return key


async def _all_or_first_error(coroutines: list) -> None:
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _chats_to_ask(data: DataConfig, files: list[str]) -> DataConfig:
    """The recipe's training mix, its held-out share included, or all chats of `files`."""
    if files:
        data = replace(data, train=[Source(path=file) for file in files], heldout=[], conversations=0)
        data = replace(data, deduplicate="none")
    # A tool's answer can't be written anew. The held-out share is split off when the new chats are prepared.
    return replace(data, tool_turns="drop", heldout_share=0.0)


def _fingerprint(data: DataConfig) -> str:
    """Of the chats and their order: the number of a conversation means the same as long as this is the same."""
    resolved = [sources.resolve(source) for source in [*data.train, *data.heldout]]
    prints = [sources.fingerprint(source) for source in [*resolved, *(Source(path=p) for p in data.decontaminate)]]
    names = "conversations deduplicate languages truncated_answers seed".split()
    settings = {name: asdict(data)[name] for name in names}
    if data.deduplicate == "near":
        settings["shingled_words"] = shingled_words(data)
    for name in ("train", "heldout"):  # where they lie is no matter
        settings[name] = [asdict(source) | {"path": sources.label(source)} for source in getattr(data, name)]
    return hashlib.sha256(json.dumps([prints, settings], sort_keys=True).encode()).hexdigest()


def _check_settings(path: Path, settings: dict) -> None:
    """Raises UserError when the folder was begun with others."""
    if path.exists():
        try:
            begun = read_json(path)
        except UserError as error:
            raise UserError(f"{error}; remove that file to go on with the settings of now") from None
        for name, value in settings.items():
            if begun.get(name) != value:
                begun_with = (
                    "other chats (or by an earlier version)"
                    if name == "chats"
                    else f"{name} {begun.get(name)}, now it is {value}"
                )
                raise UserError(f"{path.parent} was begun with {begun_with}; choose another folder")


def _write_json(path: Path, content: dict) -> None:
    storage.write(path, json.dumps(content, indent=1) + "\n")
