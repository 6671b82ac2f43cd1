"""`bench`: acceptance length and speed of a running server, through its public API."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from eagle3_xla.data.tokenizer import load_tokenizer
from eagle3_xla.errors import RunError, UserError
from eagle3_xla.evaluate.fingerprint import head_fingerprint, measured
from eagle3_xla.evaluate.options import EvalOptions, sampling_in_words
from eagle3_xla.evaluate.run import prompt_ids
from eagle3_xla.serve.client import Answer, Request, Server, connect
from eagle3_xla.serve.replies import Drafts


@dataclass
class BenchOptions:
    """limit: first prompts of the file, 0 for all; concurrency: requests in flight, one measurement each; target:
    folder or hub id of the tokenizer and chat template, draft: folder of the head, by default the ones that the server
    names.
    """

    limit: int = 0
    concurrency: list[int] = field(default_factory=lambda: [1])
    target: str = ""
    request: Request = field(default_factory=Request)
    draft: str = ""


def bench(url: str, prompts: str, options: BenchOptions, baseline_url: str = "") -> dict:
    """Send every prompt at each concurrency, to the baseline server too. See `_row` for the figures."""
    server = connect(url)
    if options.draft and serves_another(server, options.draft):
        raise UserError(f"--draft {options.draft}: the server at {server.url} serves another head ({server.head})")
    baseline = connect(baseline_url) if baseline_url else None
    if baseline and baseline.steps:
        raise UserError(f"--baseline {baseline_url} drafts too; start it without its speculative settings")
    ids = server_prompts(server, prompts, options.target, options.limit, options.request)
    about = measured("bench", options.draft or server.head, options.target or server.model, prompts)
    rows = []
    for concurrency in options.concurrency:
        answers, drafts, seconds = run_prompts(server, ids, options.request, concurrency)
        row = _row(concurrency, answers, drafts, seconds)
        if baseline:
            plain, _, plain_seconds = run_prompts(baseline, ids, options.request, concurrency)
            row |= _against(answers, row["tokens_per_second"], plain, plain_seconds, options.request)
        rows.append(row)
    result = {
        "engine": server.engine,
        "version": server.version,
        "device": server.device,
        "server": server.url,
        "steps": server.steps,
        "topk": server.topk,
        "draft_tokens": server.draft_tokens,
        "prompts": len(ids),
        "max_new_tokens": options.request.max_new_tokens,
        "temperature": options.request.temperature,
        "top_p": options.request.top_p,
        "draft_window": server.window,
        **{key: value for key, value in rows[0].items() if key != "concurrency"},
        "concurrency": rows,
        "measured": about,
    }
    return result | {"screen": screen(result)}


def serves_another(server: Server, draft: str) -> bool:
    """Whether the head that the server names is another one than `draft`; not where this machine can't read both."""
    mine = head_fingerprint(draft)
    try:
        served = head_fingerprint(server.head) if server.head else None
    except OSError:  # a folder of another user's
        return False
    return None not in (mine, served) and mine != served


def server_prompts(server: Server, prompts: str, target: str, limit: int, request: Request) -> list[list[int]]:
    """Token ids of the prompts. Both engines get the same ids, so no template of theirs comes between."""
    path = target or server.model
    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        if target:
            raise
        raise UserError(f"{error}; the server names that target, name one that is here with --target") from None
    return prompt_ids(tokenizer, prompts, EvalOptions(limit=limit, max_new_tokens=request.max_new_tokens), 10**9)


def run_prompts(
    server: Server, ids: list[list[int]], request: Request, concurrency: int
) -> tuple[list[Answer], Drafts | None, float]:
    """(answers in the order of the prompts, Drafts or None, seconds). Raises RunError when the server fails."""
    server.generate(ids[0], Request(max_new_tokens=4), salt="warm-up")  # what starts late starts before the clock
    server.forget()
    before = server.counters()
    answers: list[Answer] = []
    salt = f"{time.time_ns()}"
    bar = tqdm(total=len(ids), desc=f"{server.url}, {concurrency} in flight", unit="prompt")
    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            for answer in pool.map(lambda prompt: server.generate(prompt, request, salt), ids):
                answers.append(answer)
                bar.update()
        except (RunError, UserError) as error:
            pool.shutdown(cancel_futures=True)
            bar.close()
            raise type(error)(f"after {len(answers)} of {len(ids)} answers: {error}") from None
    seconds = time.perf_counter() - started
    bar.close()
    if not _tokens(answers):
        raise RunError(f"the server at {server.url} answers without a single token; its log says why")
    return answers, _drafts(server, answers, before, server.counters()), seconds


def _drafts(server: Server, answers: list[Answer], before: Drafts | None, after: Drafts | None) -> Drafts | None:
    if (before is None) != (after is None) or (before and after and len(before.reached) != len(after.reached)):
        raise RunError(
            f"the counters of the server at {server.url} changed while it was measured; was it started anew?"
        )
    if before is not None and after is not None:
        reached = [b - a for a, b in zip(before.reached, after.reached)]
        drafts = Drafts(after.calls - before.calls, after.accepted - before.accepted, reached)
        if min(drafts.calls, drafts.accepted, *reached) < 0:
            raise RunError(
                f"the counters of the server at {server.url} fell while it was measured: it was started anew"
            )
        if drafts.calls > sum(len(answer.tokens) + 2 for answer in answers):  # a call gives a token at least
            raise RunError(
                f"the server at {server.url} made {drafts.calls} target calls for {_tokens(answers)} tokens: it serves "
                "others too, whose drafts would count as those of these prompts"
            )
        return drafts
    parts = [answer.drafts for answer in answers if answer.drafts is not None]
    if not parts:
        return None
    reached = [sum(column) for column in zip(*(part.reached for part in parts))]
    return Drafts(sum(part.calls for part in parts), sum(part.accepted for part in parts), reached)


def _row(concurrency: int, answers: list[Answer], drafts: Drafts | None, seconds: float) -> dict:
    """Figures of one measurement.

    acceptance_length: 1 + accepted drafts per target call, `eval`'s tau (None without a head); acceptance[k]: share of
    the calls that accepted the draft at depth k; tokens_per_second: of all requests together; time_to_first_token:
    median, seconds.
    """
    return {
        "concurrency": concurrency,
        "acceptance_length": drafts and drafts.acceptance_length,
        "acceptance": drafts.acceptance if drafts else [],
        "tokens_per_second": _tokens(answers) / seconds,
        "time_to_first_token": statistics.median(answer.first for answer in answers),
        "speedup": None,
        "tokens": _tokens(answers),
        "empty_answers": sum(not answer.tokens for answer in answers),
        "seconds": seconds,
    }


def _against(answers: list[Answer], speed: float, plain: list[Answer], plain_seconds: float, request: Request) -> dict:
    """The baseline's figures; a speed-up only where both gave the same answers, or sampled ones."""
    differing = sum(answer.tokens != other.tokens for answer, other in zip(answers, plain, strict=True))
    empty = sum(not answer.tokens for answer in [*answers, *plain])
    baseline_speed = _tokens(plain) / plain_seconds
    row: dict[str, Any] = {
        "baseline_tokens_per_second": baseline_speed,
        "baseline_time_to_first_token": statistics.median(answer.first for answer in plain),
    }
    ratio = speed / baseline_speed
    if not request.temperature:
        row |= {"identical": not differing, "differing": differing}
    if empty:
        row["no_speedup"] = f"{empty} answers have no token (tokens/s {ratio:.2f}x the baseline's)"
    elif differing and not request.temperature:
        row["no_speedup"] = (
            f"{differing} of {len(answers)} greedy answers are NOT those of the baseline server (tokens/s {ratio:.2f}x "
            "the baseline's): other weights, another dtype, or rounding that turned a near tie"
        )
    return row | {"speedup": None if "no_speedup" in row else ratio}


def sampled_on_a_cpu(engine: str, device: str | None) -> list[str]:
    """What the CPU builds of the engines get wrong above temperature 0 (tests/engines/sampled.py shows it)."""
    if engine == "sglang" and device == "cpu":
        return ["above temperature 0 SGLang on a CPU checks drafts greedily too: its acceptance is the greedy one"]
    if engine == "vllm":  # which doesn't say what it runs on
        return [
            "above temperature 0 vLLM 0.32.0, if it runs on a CPU, takes the temperature of checked drafts from unset "
            "memory"
        ]
    return []


def _tokens(answers: list[Answer]) -> int:
    return sum(len(answer.tokens) for answer in answers)


def screen(result: dict) -> str:
    """The table that a person reads."""
    head = "no head"
    if result["steps"]:
        shape = f"chain of {result['draft_tokens']}" if result["topk"] == 1 else f"tree of {result['draft_tokens']}"
        head = f"{shape} drafts"
    how = sampling_in_words(result["temperature"], result["top_p"])
    lines = [
        f"{result['engine']} {result['version']} at {result['server']}, {head}; {result['prompts']} prompts, "
        f"{how}, at most {result['max_new_tokens']} new tokens",
        "in flight  acceptance length  tokens/s  first token  speed-up  acceptance by depth",
    ]
    for row in result["concurrency"]:
        length = f"{row['acceptance_length']:.3f}" if row["acceptance_length"] else "-"
        speedup = f"{row['speedup']:.2f}x" if row["speedup"] else "-"
        depth = " ".join(f"{share:.1%}" for share in row["acceptance"])
        lines.append(
            f"{row['concurrency']:9}  {length:>17}  {row['tokens_per_second']:8.1f}  "
            f"{row['time_to_first_token']:9.3f} s  {speedup:>8}  {depth}"
        )
    for row in result["concurrency"]:
        if row.get("no_speedup"):
            lines.append(f"no speed-up at {row['concurrency']} in flight: {row['no_speedup']}")
        elif row.get("empty_answers"):
            lines.append(f"{row['empty_answers']} answers at {row['concurrency']} in flight have no token")
    if result["temperature"] and result["steps"]:
        lines += sampled_on_a_cpu(result["engine"], result["device"])
    missing = [name for name in ("head", "target") if result["measured"][name] is None]
    if result["steps"] and missing:
        options = " and ".join({"head": "--draft DIR", "target": "--target DIR"}[name] for name in missing)
        lines.append(f"these figures don't say whose they are, so `push` takes none of them; give {options}")
    return "\n".join(lines)
