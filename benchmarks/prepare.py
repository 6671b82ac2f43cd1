"""Seconds and memory of `prepare` on the reference mix: 54,000 conversations, Qwen2.5's tokenizer, rows of 1,024.

    python benchmarks/prepare.py --out /tmp/prepare-benchmark [--target DIR] [--chats 54000] [--workers 1,2]
    python benchmarks/prepare.py --out /tmp/prepare-benchmark --growth 50000,200000 [--workers 2]

Writes synthetic conversations in the forms of the three public sets, a tenth more than the mix takes: log-normal
lengths with means near theirs, words of the shipped chats, so that the tokenizer does real work. Then runs `prepare`
once for each number of workers, in processes of its own, and compares every byte that they wrote. Memory is the sum of
the resident sizes of all processes of a run, sampled; CPU seconds are theirs too. The target defaults to the tokenizer
in tests/data/qwen25.

--growth: short conversations instead (one question, one answer), so many of them each time: memory and the time for one
conversation must not grow with their number.
"""

import argparse
import hashlib
import json
import lzma
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from eagle3_xla.data.files import data_file, read_rows

TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "data" / "qwen25"
# (share, exchanges on average, words of a question, words of an answer): means near those of the published sets.
SETS = {"sharegpt": (45, 3.4, 60, 200), "ultrachat": (35, 3.1, 60, 180), "perfectblend": (20, 1.3, 80, 220)}


def write_target(folder: Path) -> Path:
    """What `prepare` reads of Qwen2.5: tokenizer, chat template, config; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(lzma.decompress((TOKENIZER / "tokenizer.json.xz").read_bytes()))
    (folder / "tokenizer_config.json").write_text((TOKENIZER / "tokenizer_config.json").read_text())
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152_064}
    config["transformers_version"] = "4.43.1"  # as published; without one, transformers takes it for a Mistral
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151_645, 151_643]}))
    return folder


def conversations(name: str, count: int, roles: tuple[str, str, str, str]):
    """`count` lists of turns; roles: names of the role key, the text key, the user and the assistant."""
    role_key, text_key, user, assistant = roles
    _, exchanges, question, answer = SETS[name]
    rng = np.random.default_rng(len(name))
    texts = (turn["value"] for _, row in read_rows(data_file("package:train.jsonl")) for turn in row["conversations"])
    words = np.array([word for text in texts for word in re.findall(r"\S+\s*", text)], object)
    for _ in range(count):
        turns = []
        for _ in range(rng.geometric(1 / exchanges)):
            for role, mean in ((user, question), (assistant, answer)):
                length = 1 + int(rng.lognormal(np.log(mean) - 0.5, 1.0))
                picked = words[rng.integers(0, len(words), length)]
                turns.append({role_key: role, text_key: " ".join(picked)})
        yield turns


def write_sets(folder: Path, chats: int) -> None:
    count = {name: int(1.1 * chats * share / 100) for name, (share, *_) in SETS.items()}
    with (folder / "sharegpt.json").open("w") as file:  # one JSON array, as the published split file
        for number, turns in enumerate(conversations("sharegpt", count["sharegpt"], ("from", "value", "human", "gpt"))):
            row = json.dumps({"id": f"{number}_0", "conversations": turns})
            file.write(("[" if not number else ",\n") + row)
        file.write("]")
    rows = conversations("ultrachat", count["ultrachat"], ("role", "content", "user", "assistant"))
    write_parquet(folder / "ultrachat.parquet", ({"prompt": t[0]["content"], "messages": t} for t in rows))
    rows = conversations("perfectblend", count["perfectblend"], ("from", "value", "human", "gpt"))
    write_parquet(folder / "perfectblend.parquet", ({"conversations": t, "source": "synthetic"} for t in rows))


def write_short(path: Path, count: int) -> None:
    """`count` conversations of a question and an answer of about 25 words together."""
    texts = (turn["value"] for _, row in read_rows(data_file("package:train.jsonl")) for turn in row["conversations"])
    words = [word for text in texts for word in re.findall(r"\S+", text)]
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(count):
            question, answer = (" ".join(words[i] for i in rng.integers(0, len(words), n)) for n in (8, 17))
            file.write(json.dumps({"prompt": question, "completion": answer}) + "\n")


def growth(options, target: Path) -> None:
    for count in map(int, options.growth.split(",")):
        source, prepared = options.out / f"short-{count}.jsonl", options.out / f"prepared-short-{count}"
        if not source.exists():
            write_short(source, count)
        shutil.rmtree(prepared, ignore_errors=True)
        command = [sys.executable, "-m", "eagle3_xla", "prepare", "--json", f"--target.path={target}"]
        command += [f"--data.train=[{source}]", f"--data.prepared={prepared}", f"--data.workers={options.workers}"]
        seconds, cpu, memory, output = measured(command)
        train = json.loads(output)["train"]
        print(
            f"{count:,} conversations: {seconds:.0f} s, {cpu:.0f} CPU s ({1000 * cpu / count:.2f} ms each), "
            f"{memory:.2f} GiB; {train['rows']:,} rows",
            flush=True,
        )


def write_parquet(path: Path, rows) -> None:
    writer, batch = None, []
    for row in rows:
        batch.append(row)
        if len(batch) == 1000:
            table, batch = pyarrow.Table.from_pylist(batch), []
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    if batch:
        table = pyarrow.Table.from_pylist(batch)
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def measured(command: list[str]) -> tuple[float, float, float, str]:
    """Run a command: wall seconds, CPU seconds, GiB of all its processes together at their peak, stdout."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def watch():
        nonlocal peak
        while process.returncode is None:
            pages = 0
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if os.getpgid(int(folder.name)) == process.pid:
                        pages += int((folder / "statm").read_text().split()[1])
                except (OSError, ProcessLookupError):  # it ended meanwhile
                    pass
            peak = max(peak, pages)
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        sys.exit(f"failed with {process.returncode}: {' '.join(command)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, cpu, peak * os.sysconf("SC_PAGESIZE") / 2**30, output


def content(folder: Path) -> str:
    """sha256 of every file of a prepared folder, except run.yaml, which holds the number of workers."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != "run.yaml":
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", type=Path)
    parser.add_argument("--chats", type=int, default=54_000)
    parser.add_argument("--workers", default="2")
    parser.add_argument("--growth", default="", metavar="N,N,...")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.target or write_target(options.out / "target")
    if options.growth:
        return growth(options, target)
    if not (options.out / f"written-{options.chats}").exists():
        write_sets(options.out, options.chats)
        (options.out / f"written-{options.chats}").touch()
    files = [("sharegpt.json", 45), ("ultrachat.parquet", 35), ("perfectblend.parquet", 20)]
    sources = ",".join(f"{{path: {options.out / file}, share: {share}}}" for file, share in files)
    contents = set()
    for workers in map(int, options.workers.split(",")):
        prepared = options.out / f"prepared-{workers}"
        command = [sys.executable, "-m", "eagle3_xla", "prepare", "--json", f"--target.path={target}"]
        command += [f"--data.train=[{sources}]", f"--data.conversations={options.chats}"]
        command += [f"--data.prepared={prepared}", f"--data.workers={workers}"]
        seconds, cpu, memory, output = measured(command)
        train = json.loads(output)["train"]
        contents.add(content(prepared))
        print(
            f"{workers} workers: {seconds:.0f} s, {cpu:.0f} CPU s, {memory:.2f} GiB; {train['chats']:,} chats, "
            f"{train['tokens']:,} tokens, {train['rows']:,} rows, padding {train['padding']:.2%}",
            flush=True,
        )
    if "," in options.workers:
        print("the same bytes: " + ("yes" if len(contents) == 1 else "NO"))


if __name__ == "__main__":
    main()
