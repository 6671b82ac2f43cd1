"""`regenerate` against a real vLLM server: killed once, every row once, and the answers are the target's own.

With 200 rows: REGENERATE_ROWS=200 bash launch/test.sh tests/engines/test_regenerate.py -s
"""

import json
import os
import signal
import time

import pytest
from regenerate.conftest import KILLED, lines_of, rows_of

from eagle3_xla.data.files import data_file, read_rows

ROWS = int(os.environ.get("REGENERATE_ROWS", 8))


def write_chats(path):
    """Shipped chats with short answers, every fourth with the next one's question and answer as second exchange."""
    shipped = sorted((row for _, row in read_rows(data_file("package:train.jsonl"))), key=lambda row: row["new_tokens"])
    short = [row["conversations"] for row in shipped if len(row["conversations"][0]["value"]) < 200][: ROWS + 1]
    with path.open("w") as file:
        for i, (turns, following) in enumerate(zip(short, short[1:])):
            file.write(json.dumps({"conversations": turns[:2] + (following[:2] if i % 4 == 0 else [])}) + "\n")
    return [turns[0]["value"] for turns in short[:ROWS]]


@pytest.mark.slow
def test_killed_once_every_row_once(trained, server_of, tmp_path, forks):
    questions = write_chats(tmp_path / "chats.jsonl")
    out = tmp_path / "out"
    arguments = ["regenerate", "--server", server_of("vllm").url, "--chats", tmp_path / "chats.jsonl", "--out", out]
    arguments += ["--max-tokens", "32", "--concurrency", "4", "--temperature", "0", "--json"]
    started = time.monotonic()
    done = forks.run_code(KILLED, out / "chats.jsonl", ROWS // 2, *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert ROWS // 2 <= lines_of(out) < ROWS
    done = forks.run(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    print(f"\n{ROWS} rows, killed once, {time.monotonic() - started:.0f} s: {result}")
    rows = sorted(rows_of(out), key=lambda row: row["id"])
    assert result["finished"] == ROWS and [row["id"] for row in rows] == list(range(ROWS))
    assert [row["messages"][0]["content"] for row in rows] == questions
    assert all(row["new_tokens"] <= 64 and row["messages"][-1]["role"] == "assistant" for row in rows)
    # Asked on only after an answer that ended by itself.
    assert all(len(row["messages"]) == 2 or i % 4 == 0 for i, row in enumerate(rows))
    assert any(len(row["messages"]) == 4 for row in rows)

    # The in-process target writes the same, greedily; a near tie in float32 may fall the other way once.
    arguments = ["--target", trained.target, "--limit", 4, *arguments[3:]]
    done = forks.run("regenerate", *arguments, "--out", tmp_path / "local")
    assert done.returncode == 0, done.stderr[-3000:]
    local = sorted(rows_of(tmp_path / "local"), key=lambda row: row["id"])
    assert sum(a["messages"] == b["messages"] for a, b in zip(rows, local, strict=False)) >= 3
    assert len(local) == 4
