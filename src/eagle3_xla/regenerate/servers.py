"""Answers from OpenAI-compatible servers (SGLang, vLLM), several at once; a server that fails costs no conversation."""

import asyncio
import re
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from eagle3_xla.checks import first_line
from eagle3_xla.data.clean import Unusable, text_of
from eagle3_xla.data.tokenizer import read_channels
from eagle3_xla.errors import RunError, UserError
from eagle3_xla.regenerate.conversation import NEUTRAL, Refused, Reply, Sampling

TRIES = 10  # of one question, before its conversation is left for the next start
REFUSALS = 20  # or empty answers, before any other: then the fault is not in the questions
PROBE = [{"role": "user", "content": "Hi"}]  # what is asked again when nothing was answered yet
LONGEST_REST = 60.0  # seconds
KNOWN = ("vllm", "sglang")  # `owned_by` of servers that take more fields than OpenAI's; others may refuse them
# gpt-oss's thoughts and text without the special tokens between them; the second only where the model is gpt-oss.
FLATTENED = re.compile(r"analysis.*assistantfinal", re.DOTALL), re.compile(r"(?:analysis|final)(?![\sa-z.,:;])")
PASSING = (408, 409, 425, 429)  # of the 4xx, those that a later try may not get
NOT_OF_THE_QUESTION = (401, 402, 403, 404, 405, 407)  # of the 4xx, those that every question would get


class GaveUp(RuntimeError):
    """A question without an answer after all tries."""


@dataclass
class _Server:
    """in_flight: questions asked; rests_until: no question before then; failures: in a row, each after a rest."""

    url: str
    in_flight: int = 0
    rests_until: float = 0.0
    failures: int = 0


class Servers:
    """`ask` sends a question to the server with the fewest in flight, and again, after a rest, when it fails.

    urls: http://HOST:PORT, with or without /v1; timeout: seconds of one answer; key: sent to them as bearer token, if
    there is one; rest: seconds after a first failure, doubled for each further one.
    """

    def __init__(
        self, urls: list[str], sampling: Sampling, concurrency: int, timeout: float, key: str = "", rest: float = 1.0
    ):
        for url in urls:
            try:
                if not re.match(r"https?://[^/]+", url) or urlsplit(url).port == 0:
                    raise ValueError("one looks like http://127.0.0.1:30000")
                httpx.URL(url)
            except (ValueError, httpx.InvalidURL) as error:
                raise UserError(f"--server {url!r} is not a URL ({first_line(error)})") from None
        self.servers = [_Server(url.rstrip("/").removesuffix("/v1")) for url in urls]
        self.sampling, self.timeout, self.rest = sampling, timeout, rest
        self.model, self.last_answer, self.refusals = "", -1.0, 0  # the second: time.monotonic(), -1 before any
        self.gpt_oss = self.sets_apart = False  # the second: thoughts came beside the text
        self.known: set[str] = set()  # URLs
        self.answered = PROBE  # of the questions, the last
        self.http = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=10),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            trust_env=False,
        )

    async def __aenter__(self) -> "Servers":
        models = [await self._model_of(server.url) for server in self.servers]
        if len(set(models)) > 1:
            raise UserError(f"the servers serve different models: {', '.join(models)}")
        self.model = models[0]
        self.gpt_oss = re.search("gpt.?oss", self.model, re.IGNORECASE) is not None
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.http.aclose()

    async def ask(self, messages: list[dict], seed: int) -> Reply:
        """Raises Refused for messages that the server never takes while it takes others, GaveUp after TRIES failures,
        RunError when nothing answers at all."""
        started, problem = time.monotonic(), ""
        for _ in range(TRIES):
            server = await self._free_server()
            server.in_flight += 1
            try:
                async with asyncio.timeout(self.timeout):
                    reply = await self._post(server.url, messages, seed)
            except TimeoutError:
                problem = f"{server.url} did not answer within {self.timeout:g} s"
            except httpx.HTTPError as error:
                problem = f"{server.url}: {first_line(error)}"
            except _Failed as error:
                problem = str(error)
            except Refused as refusal:  # the caller drops what it asked about, for good
                if await self._lives(server.url, str(refusal)):
                    raise
                problem = str(refusal)
            else:
                server.failures, self.last_answer = 0, time.monotonic()
                self.answered = [*messages]
                return reply
            finally:
                server.in_flight -= 1
            if time.monotonic() >= server.rests_until:  # otherwise it failed together with another question
                server.rests_until = time.monotonic() + min(self.rest * 2**server.failures, LONGEST_REST)
                server.failures += 1
        if self.last_answer < started and not await self._lives(server.url, problem):
            raise RunError(f"no server answers any more ({problem}); start it, then start this again to continue")
        raise GaveUp(problem)

    async def _lives(self, url: str, problem: str) -> bool:
        """Whether a server answers the question that was answered last: then the fault is in this one. Raises RunError
        with `problem` when it refuses that one too."""
        try:
            async with asyncio.timeout(self.timeout):
                await self._post(url, self.answered, 0)
        except Refused:
            asked = self.answered[-1]["content"][:60]
            raise RunError(f"{problem}; it refuses {asked!r} too: see to it, then start this again") from None
        except (TimeoutError, httpx.HTTPError, _Failed):
            return False
        return True

    async def _free_server(self) -> _Server:
        while True:
            server = min(self.servers, key=lambda s: (max(s.rests_until - time.monotonic(), 0), s.in_flight))
            wait = server.rests_until - time.monotonic()
            if wait <= 0:
                return server
            await asyncio.sleep(wait)

    async def _post(self, url: str, messages: list[dict], seed: int) -> Reply:
        body = {"model": self.model, "messages": messages, "seed": seed, "max_tokens": self.sampling.max_tokens}
        body |= {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
        body |= NEUTRAL if url in self.known else {}
        response = await self.http.post(f"{url}/v1/chat/completions", json=body)
        return self._reply(response, f"{url}/v1/chat/completions answered {response.status_code}")

    def _reply(self, response: httpx.Response, where: str) -> Reply:
        """The one reader of an answer. Raises Refused, _Failed (another try may help) or RunError (none will)."""
        if 400 <= response.status_code < 500 and response.status_code not in PASSING:
            refusal = f"{where}: {_start(response, 300)}"
            raise RunError(refusal) if response.status_code in NOT_OF_THE_QUESTION else self._refusal(refusal)
        if response.status_code != 200:
            raise _Failed(f"{where}: {_start(response, 300)}")
        try:
            answer = response.json()
            choice = answer["choices"][0]
            message, finish = dict(choice["message"]), choice["finish_reason"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _Failed(f"{where}, but not with an answer: {_start(response, 200)}") from None
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        if thoughts and not self.gpt_oss:  # its template alone shows them as they were written
            raise RunError(
                f"{where}, with thoughts beside the text; start the server without a reasoning parser (gpt-oss with "
                "one, under a model name with gpt-oss in it)"
            )
        if finish not in ("stop", "length"):
            if message.get("tool_calls") or finish in ("tool_calls", "function_call", "content_filter"):
                raise self._refusal(f"{where}, but with {finish!r} instead of a text")
            raise _Failed(f"{where}, but the answer ended with {str(finish)[:40]!r}")
        try:
            text, thoughts = text_of(message.get("content"), "assistant"), text_of(thoughts or "", "assistant")
        except Unusable as problem:
            raise self._refusal(f"{where}, but {problem}") from None
        self.sets_apart = self.sets_apart or bool(thoughts)
        if not self.sets_apart and any(flattened.match(text) for flattened in FLATTENED[: 1 + self.gpt_oss]):
            raise RunError(
                f"{where}, with gpt-oss's thoughts run into the text; start the server with a reasoning parser for "
                "gpt-oss, under a model name with gpt-oss in it"
            )
        if text.startswith("<|channel|>"):
            text, thoughts = read_channels(text)
        if not text.strip():
            raise self._refusal(f"{where}, but with an empty answer")
        return Reply(text, finish, _tokens(answer), thoughts)

    def _refusal(self, message: str) -> Exception:
        """Of this question; of all, when nothing else was ever answered."""
        self.refusals += 1
        return RunError(message) if self.refusals >= REFUSALS and self.last_answer < 0 else Refused(message)

    async def _model_of(self, url: str) -> str:
        problem = ""
        for attempt in range(3):
            try:
                response = await self.http.get(f"{url}/v1/models", timeout=10)
                if response.status_code == 200:
                    model = response.json()["data"][0]
                    name = model["id"]
                    if isinstance(name, str) and name:
                        self.known |= {url} if model.get("owned_by") in KNOWN else set()
                        return name
                    raise ValueError
                problem = f"/v1/models answered {response.status_code}"
            except httpx.HTTPError as error:
                problem = first_line(error)
            except (ValueError, LookupError, TypeError, RecursionError):
                problem = "/v1/models names no model"
            await asyncio.sleep(self.rest * attempt)
        raise UserError(f"no OpenAI-compatible server at {url} ({problem}); start it, or check host and port")


class _Failed(RuntimeError):
    """An answer that is none; another try may get one."""


def _start(response: httpx.Response, length: int) -> str:
    """The first words that a server sent, as text that drives no terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(response.text.split())[:length])


def _tokens(answer: dict) -> int:
    """The answer's tokens by the server's own count; 0 where that is no count."""
    usage = answer.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else 0
    return count if isinstance(count, int) and 0 <= count < 1 << 40 else 0
