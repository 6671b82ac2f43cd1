"""A running SGLang or vLLM server through its public API: what it serves, one answer, how its drafts fared."""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from eagle3_xla.checks import first_line, parse_json, text, without_credentials
from eagle3_xla.errors import RunError, UserError
from eagle3_xla.regenerate.conversation import NEUTRAL
from eagle3_xla.serve import replies
from eagle3_xla.serve.replies import Drafts

ANSWER_SECONDS = 600  # without a token: a busy server lets requests wait
INFO_SECONDS = 30
WAITS = (0.1, 0.3, 1.0, 3.0, 10.0, None)  # seconds before a request that was not taken is sent again
SETTLE_READS, SETTLE_SECONDS = 25, 0.2


@dataclass
class Answer:
    """tokens: ids, the end-of-turn token included; first: seconds until the first token; drafts: None where the engine
    counts for the whole server only.
    """

    tokens: list[int]
    first: float
    drafts: Drafts | None = None


@dataclass
class Request:
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0


def connect(url: str) -> "Server":
    """The server at `url`, of whichever engine. Raises UserError when nothing answers there or it is neither."""
    url = url.rstrip("/")
    shown_url = without_credentials(url)
    if not re.match(r"https?://[^/]+", url):
        raise UserError(f"--server {shown_url!r} is not a URL; one looks like http://127.0.0.1:30000")
    try:
        http = httpx.Client(
            base_url=url,
            timeout=INFO_SECONDS,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )
        for path in ("/server_info", "/get_server_info"):  # releases before 0.5.10 know the second only
            info = _json(http.get(path))
            if isinstance(info, dict) and "model_path" in info:
                return SGLang(shown_url, http, replies.sglang_info(info, f"{shown_url}{path}"))
        version, models = _json(http.get("/version")), _json(http.get("/v1/models"))
        model = replies.vllm_model(models, f"{shown_url}/v1/models")
        if model and isinstance(version, dict):
            return VLLM(shown_url, http, text(version.get("version"), f"{shown_url}/version: version"), model)
    except httpx.HTTPError as error:
        raise UserError(
            f"no server answers at {shown_url} ({first_line(error)}); start it, or check host and port"
        ) from None
    except (httpx.InvalidURL, UnicodeError) as error:
        raise UserError(f"--server {shown_url!r} is not a URL ({first_line(error)})") from None
    raise UserError(f"what answers at {shown_url} is neither an SGLang nor a vLLM server")


class Server(ABC):
    """engine, version; model: path or id of the target; dtype, device: what it computes in and on, None where the
    engine doesn't say; head: path of the draft model, None without one or unknown; steps, topk, draft_tokens: the
    shape of its drafts (draft_tokens without the root), None without a head; window: how many positions the head is let
    see, None where the server doesn't limit it. url: without user and password.
    """

    engine = version = model = name = ""
    dtype: str | None = None
    device: str | None = None
    head: str | None = None
    steps: int | None = None
    topk: int | None = None
    draft_tokens: int | None = None
    window: int | None = None

    def __init__(self, url: str, http: httpx.Client):
        self.url, self.http = url, http

    @abstractmethod
    def question(self, prompt: list[int], request: Request, salt: str) -> tuple[str, dict]:
        """(path, JSON body) of the request for one answer."""

    @abstractmethod
    def answer(self, chunks: list[dict], first: float, where: str) -> Answer:
        """The answer that the events of a stream give."""

    def generate(self, prompt: list[int], request: Request, salt: str = "") -> Answer:
        """Answer one prompt of token ids.

        Raises RunError when the server fails or is gone, UserError when what it sends is no answer.
        """
        path, body = self.question(prompt, request, salt)
        where = f"{self.url}{path}"
        chunks: list[dict] = []
        started, first = time.perf_counter(), 0.0
        for wait in WAITS:
            try:
                for chunk in self._stream(path, body | {"stream": True}, where):
                    first = first or time.perf_counter() - started
                    chunks.append(chunk)
                break
            except (httpx.NetworkError, httpx.RemoteProtocolError) as error:  # a full queue of connections resets some
                if chunks or wait is None or not self._lives():
                    raise self._gone(error, began=bool(chunks)) from None
                time.sleep(wait)
            except httpx.HTTPError as error:
                raise self._gone(error, began=bool(chunks)) from None
        if not chunks:
            raise RunError(f"{where} ended its answer without a token")
        return self.answer(chunks, first, where)

    def _stream(self, path: str, body: dict, where: str) -> Iterator[dict]:
        with self.http.stream("POST", path, json=body, timeout=ANSWER_SECONDS) as response:
            if response.status_code != 200:
                raise RunError(f"{where} answered {response.status_code}: {_message(response)}")
            yield from replies.events(replies.lines_of(response.iter_bytes(), where), where)

    def chat_tokens(self, messages: list[dict]) -> int | None:
        """How many tokens its own chat template makes of a prompt; None when it has none."""
        path = "/v1/chat/completions"
        body = {"model": self.name, "messages": messages, "max_tokens": 1, "temperature": 0}
        answer = self.fetch("POST", path, json=body, timeout=ANSWER_SECONDS)
        where = f"{self.url}{path}"
        return replies.prompt_tokens(parse_json(answer.text, where), where) if answer.status_code == 200 else None

    def fetch(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            return self.http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise self._gone(error) from None

    def _gone(self, error: httpx.HTTPError, began: bool = False) -> RunError:
        """began: an answer broke off."""
        if began or not self._lives():
            return RunError(f"the server at {self.url} died or hangs ({first_line(error)}); its log says why")
        late = isinstance(error, httpx.TimeoutException)
        what = f"gave no token within {ANSWER_SECONDS:g} s" if late else f"closes connections ({first_line(error)})"
        return RunError(
            f"the server at {self.url} lives, and {what}: it has more requests than it can serve; lower --concurrency"
        )

    def _lives(self) -> bool:
        try:
            return self.http.get("/health", timeout=INFO_SECONDS).status_code < 500
        except httpx.HTTPError:
            return False

    def counters(self) -> Drafts | None:
        """Drafts since the server's start, all requests together; None where each answer has its own."""
        return None

    @abstractmethod
    def forget(self) -> None:
        """Drop cached prompts, so that the next measurement starts as the last one did."""


class SGLang(Server):
    engine = "sglang"

    def __init__(self, url: str, http: httpx.Client, info: dict[str, Any]):
        """info: `replies.sglang_info`'s."""
        super().__init__(url, http)
        vars(self).update(info)

    def question(self, prompt: list[int], request: Request, salt: str) -> tuple[str, dict]:
        sampling = {"temperature": request.temperature, "top_p": request.top_p} | NEUTRAL
        return "/generate", {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": request.max_new_tokens} | sampling,
        }

    def answer(self, chunks: list[dict], first: float, where: str) -> Answer:
        tokens, meta = replies.sglang_tokens(chunks, where)
        if not self.head or self.steps is None:
            return Answer(tokens, first)
        if len(tokens) > 1 and "spec_num_correct_drafts" not in meta:
            raise UserError(
                f"SGLang {self.version} at {self.url} does not count accepted drafts (`spec_num_correct_drafts` in "
                "meta_info); 0.5.21 is known to"
            )
        return Answer(tokens, first, replies.sglang_drafts(meta, self.steps, where))

    def forget(self) -> None:
        self.fetch("POST", "/flush_cache")


class VLLM(Server):
    engine = "vllm"

    def __init__(self, url: str, http: httpx.Client, version: str, model: tuple[str, str]):
        super().__init__(url, http)
        self.version, (self.name, self.model) = version, model
        drafts = self._read()
        if drafts is not None:  # its API does not name the draft model
            self.head, self.topk, self.steps = "", 1, len(drafts.reached)
            self.draft_tokens = self.steps

    def forget(self) -> None:
        pass  # a question's salt keeps it from what was cached

    def question(self, prompt: list[int], request: Request, salt: str) -> tuple[str, dict]:
        body = {"model": self.name, "prompt": prompt, "max_tokens": request.max_new_tokens, "return_token_ids": True}
        body |= {"temperature": request.temperature, "top_p": request.top_p, "seed": 0}
        body |= NEUTRAL
        return "/v1/completions", body | ({"cache_salt": salt} if salt else {})

    def answer(self, chunks: list[dict], first: float, where: str) -> Answer:
        tokens = replies.vllm_tokens(chunks, where)
        if tokens is None:
            raise UserError(f"vLLM {self.version} at {self.url} does not return token ids; 0.32.0 is known to")
        return Answer(tokens, first)

    def counters(self) -> Drafts | None:
        last = self._read()
        for _ in range(SETTLE_READS):  # counted a moment after the answer has left
            time.sleep(SETTLE_SECONDS)
            drafts = self._read()
            if drafts == last:
                return drafts
            last = drafts
        raise RunError(
            f"the counters of the server at {self.url} never rest: others use it, and their drafts would count as "
            "those of these prompts; measure on a server that serves nobody else"
        )

    def _read(self) -> Drafts | None:
        return replies.vllm_drafts(self.fetch("GET", "/metrics").text, f"{self.url}/metrics")


def _json(response: httpx.Response) -> Any:
    """What a server answered, None where it is no JSON."""
    try:
        return parse_json(response.text, "") if response.status_code == 200 else None
    except UserError:
        return None


def _message(response: httpx.Response) -> str:
    return " ".join(response.read().decode(errors="replace").split())[:300]
