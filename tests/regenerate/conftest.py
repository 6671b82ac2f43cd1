"""A real HTTP server that speaks the OpenAI API and fails on demand: the faults that `regenerate` has to survive."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

# A run that is killed once its file has so many rows.
KILLED = """
import os, runpy, signal, sys, threading, time
from pathlib import Path
file, rows = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
def kill():
    while not file.exists() or file.read_bytes().count(b"\\n") < rows:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
runpy.run_module("eagle3_xla", run_name="__main__", alter_sys=True)
"""


class Misbehaving:
    """Answers each question with its number of messages and its last text, or as `fault` says.

    fault(messages, n) -> None to answer, a status code, "hang", "close" (in the middle of the answer), "garbage", a
    finish reason, or any other JSON: the whole answer; n: how often these messages were asked before. keys: the
    Authorization headers that came; model: its entry of /v1/models.
    """

    def __init__(self, fault=lambda messages, n: None):
        self.fault, self.asked, self.bodies, self.keys = fault, Counter(), [], set()
        self.model = {"id": "m"}
        self.lock, self.ended = threading.Lock(), threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                owner.keys.add(self.headers["Authorization"])
                self.reply(200, json.dumps({"data": [owner.model]}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = json.dumps(body["messages"])
                with owner.lock:
                    count = owner.asked[question]
                    owner.asked[question] += 1
                    owner.bodies.append(body)
                    owner.keys.add(self.headers["Authorization"])
                what = owner.fault(body["messages"], count)
                text = f"{len(body['messages'])}: {body['messages'][-1]['content']}"
                message, finish = (
                    {"role": "assistant", "content": text},
                    what if what in ("length", "abort") else "stop",
                )
                answer = {"choices": [{"message": message, "finish_reason": finish}], "usage": {"completion_tokens": 3}}
                if isinstance(what, int):
                    self.reply(what, "out of\nmemory")
                elif isinstance(what, dict | list):
                    self.reply(200, json.dumps(what))
                elif what == "hang":
                    owner.ended.wait(30)
                elif what == "close":
                    self.reply(200, json.dumps(answer), missing=20)
                else:
                    self.reply(200, "<html>" if what == "garbage" else json.dumps(answer))

            def reply(self, status, body, missing=0):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode()[: len(body) - missing])
                self.close_connection = bool(missing)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda request, address: None  # clients that are killed reset their connections
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def stop(self):
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def misbehaving():
    """misbehaving(fault) -> a running server."""
    started = []

    def start(*arguments):
        started.append(Misbehaving(*arguments))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def write_questions(path, count: int, exchanges: int = 2):
    """`count` chats in OpenAI form, told apart by their first question."""
    with path.open("w") as file:
        for i in range(count):
            turns = []
            for j in range(exchanges):
                turns.append({"role": "user", "content": f"question {i} {j}"})
                turns.append({"role": "assistant", "content": "somebody else's answer"})
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture
def questions(tmp_path):
    return write_questions(tmp_path / "questions.jsonl", 40)


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "chats.jsonl").read_text().splitlines()]


def lines_of(folder) -> int:
    """Finished conversations of a process that may just be writing one."""
    file = folder / "chats.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0
