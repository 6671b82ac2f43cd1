"""What SGLang and vLLM answer, read field by field: every reader raises UserError for what it can't use.

where: the server's URL and path, for the message.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from eagle3_xla.checks import listing, mapping, number, parse_json, shown, text
from eagle3_xla.errors import RunError, UserError

LONGEST_LINE = 64 << 20  # bytes of a line of a stream
COUNTER = re.compile(r"^vllm:spec_decode_num_(\w+)_total\{([^}]*)\} (\S+)$", re.M)


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


def lines_of(parts: Iterable[bytes], where: str) -> Iterator[str]:
    """The lines of a stream, cut at line feeds alone: JSON text may hold any other separator as it is."""
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        if len(rest) > LONGEST_LINE:
            raise UserError(f"{where} sends a line of more than {LONGEST_LINE >> 20} MB")
        yield from (_decoded(line, where) for line in lines)
    yield _decoded(rest, where)


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode().rstrip("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} sends what is not UTF-8 text ({error.reason})") from None


def events(lines: Iterable[str], where: str) -> Iterator[dict]:
    """The JSON objects of a stream of server-sent events, up to [DONE]. Raises RunError for one that is an error."""
    for line in lines:
        name, _, data = line.partition(":")
        if not line or name in ("", "event", "id", "retry"):  # the end of an event, a comment, what we don't need
            continue
        if name != "data":
            raise UserError(f"{where} sends {shown(line)}; a line of server-sent events is expected")
        if (data := data.strip()) == "[DONE]":
            return
        chunk = mapping(parse_json(data, f"{where}: {shown(data)}"), f"{where}: an event")
        if chunk.get("error") is not None:
            raise RunError(f"{where} failed: {json.dumps(chunk['error'])[:300]}")
        yield chunk


def token_ids(value: Any, where: str) -> list[int]:
    return [number(token, where, 0, 1 << 31, whole=True) for token in listing(value, where)]


def count(value: Any, where: str, least: int = 0) -> int:
    return number(value, where, least, 1 << 62, whole=True)


def sglang_info(info: dict, where: str) -> dict[str, Any]:
    """What `/server_info` says of the fields of client.Server."""
    model = text(info.get("model_path"), f"{where}: model_path")
    found: dict[str, Any] = {
        "version": text(info.get("version") or "unknown", f"{where}: version"),
        "model": model,
        "name": text(info.get("served_model_name") or model, f"{where}: served_model_name"),
        "dtype": None if info.get("dtype") in (None, "auto") else text(info["dtype"], f"{where}: dtype"),
        "device": None if info.get("device") is None else text(info["device"], f"{where}: device"),
    }
    if info.get("speculative_algorithm"):
        found["head"] = text(info.get("speculative_draft_model_path"), f"{where}: speculative_draft_model_path")
        found["steps"], found["topk"], drafts = (
            count(info.get(f"speculative_{name}"), f"{where}: speculative_{name}", least)
            for name, least in (("num_steps", 1), ("eagle_topk", 1), ("num_draft_tokens", 2))
        )
        found["draft_tokens"] = drafts - 1  # without the root
        if (window := info.get("speculative_draft_window_size")) is not None:  # without a row's own position
            found["window"] = 1 + count(window, f"{where}: speculative_draft_window_size", 1)
    return found


def sglang_tokens(chunks: list[dict], where: str) -> tuple[list[int], dict]:
    """(token ids, meta_info) of one answer's `/generate` stream."""
    meta = mapping(chunks[-1].get("meta_info"), f"{where}: meta_info")
    tokens = token_ids(chunks[-1].get("output_ids"), f"{where}: output_ids")
    if len(tokens) < count(meta.get("completion_tokens"), f"{where}: meta_info.completion_tokens"):
        # `--incremental-streaming-output`: each chunk has its own
        parts = [token_ids(chunk.get("output_ids"), f"{where}: output_ids") for chunk in chunks]
        tokens = [token for part in parts for token in part]
    return tokens, meta


def sglang_drafts(meta: dict, steps: int, where: str) -> Drafts:
    names = ("spec_verify_ct", "spec_num_correct_drafts")
    calls, accepted = (count(meta.get(name, 0), f"{where}: meta_info.{name}") for name in names)
    name = "spec_correct_drafts_histogram"  # calls by their number of accepted drafts
    histogram = [count(n, f"{where}: {name}") for n in listing(meta.get(name) or [], f"{where}: {name}")]
    return Drafts(calls, accepted, [sum(histogram[k + 1 :]) for k in range(steps)])


def vllm_model(models: Any, where: str) -> tuple[str, str] | None:
    """(name, path or id) of the model in `/v1/models`; None when it is not vLLM's."""
    data = models.get("data") if isinstance(models, dict) else None
    model = data[0] if isinstance(data, list) and data else None
    if not isinstance(model, dict) or model.get("owned_by") != "vllm":
        return None
    name = text(model.get("id"), f"{where}: data[0].id")
    return name, text(model.get("root") or name, f"{where}: data[0].root")


def vllm_tokens(chunks: list[dict], where: str) -> list[int] | None:
    """Token ids of one answer's `/v1/completions` stream; None when this vLLM does not return them."""
    tokens = []
    for chunk in chunks:
        for choice in listing(chunk.get("choices"), f"{where}: choices"):
            if "token_ids" not in mapping(choice, f"{where}: choices[0]"):
                return None
            tokens += token_ids(choice["token_ids"] or [], f"{where}: token_ids")
    return tokens


def vllm_drafts(metrics: str, where: str) -> Drafts | None:
    """The counters of `/metrics`, all engines together; None without a head."""
    sums: dict[str, int] = {}
    positions: dict[int, int] = {}
    for name, labels, value in COUNTER.findall(metrics):
        try:
            value = int(number(float(value), f"{where}: {name}", 0, 1 << 62))
        except (ValueError, OverflowError):  # a UserError is a ValueError
            raise UserError(f"{where}: {name} is {shown(value)}; a count is expected") from None
        position = re.search(r'position="(\d{1,4})"', labels)
        if position:
            positions[int(position[1])] = positions.get(int(position[1]), 0) + value
        else:
            sums[name] = sums.get(name, 0) + value
    if "drafts" not in sums:
        return None
    return Drafts(sums["drafts"], sums.get("accepted_tokens", 0), [positions[k] for k in sorted(positions)])


def prompt_tokens(answer: Any, where: str) -> int:
    usage = mapping(mapping(answer, where).get("usage"), f"{where}: usage")
    return count(usage.get("prompt_tokens"), f"{where}: usage.prompt_tokens")
