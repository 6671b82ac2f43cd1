"""A running SGLang or vLLM server through its public API: what it serves, one answer, how its drafts fared."""

import json
import re
import time
from dataclasses import dataclass, field

import httpx

from eagle3_xla.config import UserError

ANSWER_SECONDS = 600


@dataclass
class Drafts:
    """How drafts fared. calls: target calls that checked drafts; accepted: drafts accepted in them; reached[k]: calls
    that accepted the draft at depth k (empty where the engine doesn't say).
    """

    calls: int = 0
    accepted: int = 0
    reached: list[int] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float | None:
        return 1 + self.accepted / self.calls if self.calls else None

    @property
    def acceptance(self) -> list[float]:
        return [reached / self.calls for reached in self.reached] if self.calls else []


@dataclass
class Answer:
    """tokens: ids, the end-of-turn token included; first, seconds: until the first token and until the end; drafts:
    None where the engine counts for the whole server only.
    """

    tokens: list[int]
    first: float
    seconds: float
    drafts: Drafts | None = None


@dataclass
class Request:
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def connect(url: str) -> "Server":
    """The server at `url`, of whichever engine. Raises UserError when nothing answers there or it is neither."""
    url = url.rstrip("/")
    if not re.match(r"https?://[^/]+", url):
        raise UserError(f"--server {url!r} is not a URL; one looks like http://127.0.0.1:30000")
    http = httpx.Client(base_url=url, timeout=httpx.Timeout(ANSWER_SECONDS, connect=10), trust_env=False)
    try:
        for path in ("/server_info", "/get_server_info"):  # releases before 0.5.10 know the second only
            answer = http.get(path)
            if answer.status_code == 200 and "model_path" in answer.json():
                return SGLang(url, http, answer.json())
        version, models = http.get("/version"), http.get("/v1/models")
        if version.status_code == models.status_code == 200 and models.json()["data"][0]["owned_by"] == "vllm":
            return VLLM(url, http, version.json()["version"], models.json()["data"][0])
    except httpx.HTTPError as error:
        raise UserError(f"no server answers at {url} ({_reason(error)}); start it, or check host and port") from None
    except (ValueError, KeyError, IndexError):
        pass
    raise UserError(f"what answers at {url} is neither an SGLang nor a vLLM server")


class Server:
    """engine, version; model: path or id of the target; dtype: what it computes in, None where the engine doesn't say;
    head: path of the draft model, None without one or unknown; steps, topk, draft_tokens: the shape of its drafts
    (draft_tokens without the root), None without a head.
    """

    engine = version = model = name = ""
    dtype = head = steps = topk = draft_tokens = None

    def __init__(self, url: str, http: httpx.Client):
        self.url, self.http = url, http

    def generate(self, prompt: list[int], request: Request, salt: str = "") -> Answer:
        """Answer one prompt of token ids. Raises ConnectionError when the server fails or is gone."""
        path, body = self.question(prompt, request, salt)
        started, first, chunks = time.perf_counter(), None, []
        try:
            with self.http.stream("POST", path, json=body | {"stream": True}) as response:
                if response.status_code != 200:
                    raise ConnectionError(f"{self.url}{path} answered {response.status_code}: {_message(response)}")
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        chunks.append(json.loads(line[6:]))
                        if "error" in chunks[-1]:
                            raise ConnectionError(f"{self.url}{path} failed: {chunks[-1]['error']}")
                        first = first or time.perf_counter() - started
        except httpx.HTTPError as error:
            raise ConnectionError(
                f"the server at {self.url} died or hangs ({_reason(error)}); its log says why"
            ) from None
        if not chunks:
            raise ConnectionError(f"{self.url}{path} ended its answer without a token")
        return self.answer(chunks, first, time.perf_counter() - started)

    def chat_tokens(self, messages: list[dict]) -> int | None:
        """How many tokens its own chat template makes of a prompt; None when it has none."""
        body = {"model": self.name, "messages": messages, "max_tokens": 1, "temperature": 0}
        answer = self.fetch("POST", "/v1/chat/completions", json=body)
        return answer.json()["usage"]["prompt_tokens"] if answer.status_code == 200 else None

    def fetch(self, method: str, path: str, **more) -> httpx.Response:
        try:
            return self.http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise self._gone(error) from None

    def _gone(self, error: Exception) -> ConnectionError:
        return ConnectionError(f"the server at {self.url} died or hangs ({_reason(error)}); its log says why")

    def counters(self) -> Drafts | None:
        """Drafts since the server's start, all requests together; None where each answer has its own."""
        return None

    def forget(self) -> None:
        """Drop cached prompts, so that the next measurement starts as the last one did."""


class SGLang(Server):
    engine = "sglang"

    def __init__(self, url: str, http: httpx.Client, info: dict):
        super().__init__(url, http)
        self.version, self.model = info.get("version", "unknown"), info["model_path"]
        self.name = info.get("served_model_name") or self.model
        self.dtype = info.get("dtype") if info.get("dtype") != "auto" else None
        if info.get("speculative_algorithm"):
            self.head = info["speculative_draft_model_path"]
            self.steps, self.topk = info["speculative_num_steps"], info["speculative_eagle_topk"]
            self.draft_tokens = info["speculative_num_draft_tokens"] - 1

    def question(self, prompt: list[int], request: Request, salt: str) -> tuple[str, dict]:
        sampling = {"temperature": request.temperature, "top_p": request.top_p}
        return "/generate", {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": request.max_new_tokens} | sampling,
        }

    def answer(self, chunks: list[dict], first: float, seconds: float) -> Answer:
        meta = chunks[-1]["meta_info"]
        tokens = chunks[-1]["output_ids"]
        if len(tokens) < meta["completion_tokens"]:  # `--incremental-streaming-output`: each chunk has its own
            tokens = [token for chunk in chunks for token in chunk["output_ids"]]
        if not self.head:
            return Answer(tokens, first, seconds)
        if len(tokens) > 1 and "spec_num_correct_drafts" not in meta:
            raise UserError(
                f"SGLang {self.version} at {self.url} does not count accepted drafts (`spec_num_correct_drafts` in "
                "meta_info); 0.5.21 is known to"
            )
        drafts = Drafts(meta.get("spec_verify_ct", 0), meta.get("spec_num_correct_drafts", 0))
        histogram = meta.get("spec_correct_drafts_histogram", [])  # calls by their number of accepted drafts
        drafts.reached = [sum(histogram[k + 1 :]) for k in range(self.steps)]
        return Answer(tokens, first, seconds, drafts)

    def forget(self) -> None:
        self.fetch("POST", "/flush_cache")


class VLLM(Server):
    engine = "vllm"
    COUNTER = re.compile(r"^vllm:spec_decode_num_(\w+)_total\{([^}]*)\} (\S+)$", re.M)

    def __init__(self, url: str, http: httpx.Client, version: str, model: dict):
        super().__init__(url, http)
        self.version, self.name, self.model = version, model["id"], model["root"]
        drafts = self.counters()
        if drafts is not None:  # its API does not name the draft model
            self.head, self.topk, self.steps = "", 1, len(drafts.reached)
            self.draft_tokens = self.steps

    def question(self, prompt: list[int], request: Request, salt: str) -> tuple[str, dict]:
        body = {"model": self.name, "prompt": prompt, "max_tokens": request.max_new_tokens, "return_token_ids": True}
        body |= {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
        return "/v1/completions", body | ({"cache_salt": salt} if salt else {})

    def answer(self, chunks: list[dict], first: float, seconds: float) -> Answer:
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        if any("token_ids" not in choice for choice in choices):
            raise UserError(f"vLLM {self.version} at {self.url} does not return token ids; 0.32.0 is known to")
        return Answer([token for choice in choices for token in choice["token_ids"] or []], first, seconds)

    def counters(self) -> Drafts | None:
        last = None
        while True:  # counted a moment after the answer has left
            drafts = self._read(self.fetch("GET", "/metrics").text)
            if drafts == last:
                return drafts
            last = drafts
            time.sleep(0.2)

    def _read(self, text: str) -> Drafts | None:
        sums, positions = {}, {}
        for name, labels, value in self.COUNTER.findall(text):
            position = re.search(r'position="(\d+)"', labels)
            if position:
                k = int(position[1])
                positions[k] = positions.get(k, 0) + int(float(value))
            else:
                sums[name] = sums.get(name, 0) + int(float(value))
        if "drafts" not in sums:
            return None
        return Drafts(sums["drafts"], sums["accepted_tokens"], [positions[k] for k in sorted(positions)])


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _message(response: httpx.Response) -> str:
    return response.read().decode(errors="replace").strip().replace("\n", " ")[:300]
