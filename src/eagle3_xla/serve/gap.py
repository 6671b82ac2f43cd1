"""`gap`: the acceptance length that `eval` measures against the one that a server reaches, and what parts them.

Causes are found in two ways. The rules of `doctor` read the head's files. Experiments then decode offline once more
with one thing changed: as an engine would that misreads it, or as the head was trained where config.json says
otherwise. An experiment that lands on the served figure, or that beats the exported head, names the cause.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from eagle3_xla.data.prompts import read_prompts
from eagle3_xla.data.tokenizer import load_tokenizer, stop_token_ids
from eagle3_xla.doctor.run import doctor
from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.draft.saved import SavedHead, read_head
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.decode import Generation
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import Pair, decode_all, load_pair, prompt_ids, tau
from eagle3_xla.serve.bench import run_prompts, sampled_on_a_cpu, serves_another
from eagle3_xla.serve.client import Request, Server, connect
from eagle3_xla.target.families import aux_layers

TOLERANCE = 0.02  # relative; what float32 on both sides leaves is far smaller
DEFAULT_THETA = 10000.0  # what readers assume that don't find rope_theta


@dataclass
class Experiment:
    """One thing changed. engine: it does what an engine would that misreads the head; otherwise it undoes what
    config.json says.
    """

    cause: str
    pair: Pair
    engine: bool


def gap(target_path: str, draft: str, prompts: str, url: str, options: EvalOptions) -> dict:
    """Measure both sides on the same prompts, greedy, with the server's own draft shape.

    offline, served: acceptance lengths; difference: relative to offline; causes: what explains it, likeliest first;
    experiments: acceptance length of each; ok: the two agree and nothing is wrong with the head; notes: what is worth
    knowing beside that.
    """
    server = connect(url)
    if not (server.steps and server.topk and server.draft_tokens):
        raise UserError(f"the server at {url} serves without a head; start it with its speculative settings")
    options = replace(
        options, draft_tokens=server.draft_tokens, topk=server.topk, steps=server.steps, batch_size=1, force=True
    )
    rules = _rules(draft, target_path)
    saved = read_head(draft)
    d2t_missing = _complete(saved)
    pair = load_pair(target_path, saved, options)
    trained_window = pair.head.window
    if trained_window is None:
        pair.head.window = server.window
    tokenizer = load_tokenizer(target_path)
    ids = prompt_ids(tokenizer, prompts, options, pair.model.config.max_position_embeddings)
    stop_ids = stop_token_ids(target_path, tokenizer)
    answers, drafts, _ = run_prompts(server, ids, Request(options.max_new_tokens), 1)
    served = (drafts and drafts.acceptance_length) or 1.0
    generations = decode_all(pair, ids, stop_ids, options)
    offline = tau(generations)
    difference = served / offline - 1

    found: list[tuple[float, str]] = []
    experiments = []
    if abs(difference) > TOLERANCE or any(rule["status"] == "fail" for rule in rules):
        for experiment in _experiments(pair, d2t_missing):
            reached = tau(decode_all(experiment.pair, ids, stop_ids, options))
            experiments.append({"cause": experiment.cause, "acceptance_length": reached})
            if _explains(experiment, reached, served, offline):
                found.append((abs(reached / served - 1), f"{experiment.cause} (offline so: {reached:.3f})"))
    causes = [f"the server serves another head ({server.head})"] if serves_another(server, draft) else []
    causes += [text for _, text in sorted(found)]
    causes += _positions(pair, ids, generations) + _template(server, prompts, ids)
    causes += [f"{rule['rule']}: {rule['message']}" for rule in rules if rule["status"] == "fail"]
    if server.engine == "sglang" and trained_window and server.window != trained_window:
        causes.append(
            f"the server lets the head see {server.window or 'all'} positions, and {trained_window} were "
            f"trained: start it with --speculative-draft-window-size {trained_window - 1}"
        )
    different = sum(answer.tokens != generation.tokens for answer, generation in zip(answers, generations, strict=True))
    agrees = abs(difference) <= TOLERANCE and not causes
    notes = [f"this gap is of greedy decoding; {fault}" for fault in sampled_on_a_cpu(server.engine, server.device)]
    if different:  # one near tie of two logits is enough for that: no cause where acceptance agrees
        (notes if agrees else causes).append(_different_answers(different, len(ids), server, options))
    result = {
        "engine": server.engine,
        "version": server.version,
        "offline": offline,
        "served": served,
        "difference": difference,
        "ok": agrees,
        "causes": causes,
        "notes": notes,
        "identical": not different,
        "experiments": experiments,
        "rules": rules,
        "prompts": len(ids),
        "draft_tokens": options.draft_tokens,
        "topk": options.topk,
    }
    return result | {"screen": screen(result)}


def _rules(draft: str, target_path: str) -> list[dict]:
    return [rule for rule in doctor(draft, target_path)["rules"] if rule["status"] != "pass"]


def _complete(head: SavedHead) -> bool:
    """Rebuild a missing d2t from t2d, where that is there; whether it was missing."""
    t2d = head.tensors.get("t2d")
    if "d2t" in head.tensors or t2d is None or t2d.dim() != 1:
        return False  # load_head says what is missing
    ids = t2d.bool().nonzero()[:, 0]
    head.tensors["d2t"] = ids - torch.arange(len(ids))
    return True


def _experiments(pair: Pair, d2t_missing: bool) -> Iterator[Experiment]:
    target, head = pair.model.config, pair.head.config
    default = aux_layers(target.num_hidden_layers)
    layers = pair.layers or default
    ignored = torch.zeros_like(pair.d2t)
    how = "d2t is missing, so draft ids are taken as target ids" if d2t_missing else "the engine ignores d2t"
    yield Experiment(how, pair._replace(d2t=ignored), engine=True)
    if layers != default:
        cause = f"config.json asks for the target's layers {list(layers)}; the head reads {list(default)}"
        yield Experiment(cause, pair._replace(layers=default), engine=False)
    for shift in (-1, 1):
        moved = tuple(layer + shift for layer in layers)
        if 0 <= min(moved) and max(moved) < target.num_hidden_layers and moved != default:
            cause = f"aux layer ids are off by one: the engine takes layers {list(moved)}, not {list(layers)}"
            yield Experiment(cause, pair._replace(layers=moved), engine=True)
    if head.rope_theta != target.rope_theta:
        cause = f"rope_theta is {head.rope_theta:g} in config.json; the target's is {target.rope_theta:g}"
        yield Experiment(cause, pair._replace(head=_with_theta(pair.head, target.rope_theta)), engine=False)
    if head.rope_theta != DEFAULT_THETA:
        cause = f"the engine does not read rope_theta {head.rope_theta:g} and takes {DEFAULT_THETA:g}"
        yield Experiment(cause, pair._replace(head=_with_theta(pair.head, DEFAULT_THETA)), engine=True)


def _with_theta(head: Eagle3Head, theta: float) -> Eagle3Head:
    config = copy.deepcopy(head.config)
    config.rope_theta = theta
    changed = Eagle3Head(config)
    changed.load_state_dict(head.state_dict())
    changed.window = head.window  # the server's, where config.json has none
    return changed.eval().requires_grad_(False)


def _explains(experiment: Experiment, reached: float, served: float, offline: float) -> bool:
    if experiment.engine:
        return abs(served / offline - 1) > TOLERANCE and abs(reached / served - 1) <= TOLERANCE
    return reached > offline * (1 + TOLERANCE)


def _positions(pair: Pair, ids: list[list[int]], generations: list[Generation]) -> list[str]:
    """Do answers reach past the positions that config.json promises?"""
    longest, target = pair.head.config.max_position_embeddings, pair.model.config.max_position_embeddings
    past = [i for i, (p, g) in enumerate(zip(ids, generations)) if len(p) + len(g.tokens) > longest]
    if longest >= target or not past:
        return []
    return [
        f"max_position_embeddings is {longest} in config.json, the target's is {target}: {len(past)} of {len(ids)} "
        f"prompts with their answers are longer, and engines draft badly or not at all past it"
    ]


def _template(server: Server, prompts: str, ids: list[list[int]]) -> list[str]:
    """Does the server's own template make of a prompt what the target's does? Here both sides got the same ids."""
    counts = [server.chat_tokens(prompt.messages) for prompt in read_prompts(prompts, 2)]
    for count, prompt in zip(counts, ids):
        if count is None:
            return ["the server has no chat template: clients that send messages get no answer; give the target one"]
        if count != len(prompt):
            return [
                f"the server's chat template makes {count} tokens of a prompt, the target's {len(prompt)}: drafts for "
                "clients that send messages are then made for other prompts than in training; serve the target's own"
            ]
    return []


def _different_answers(different: int, answers: int, server: Server, options: EvalOptions) -> str:
    count = f"{different} of {answers} greedy answers differ"
    if server.dtype not in (None, options.dtype):
        return f"{count}: the server computes in {server.dtype} and eval in {options.dtype} (--dtype)"
    return (
        f"{count} between the server and eval in {options.dtype}: near ties in low precision, another dtype, other "
        "target weights or other stop tokens; acceptance is then measured on other texts"
    )


def screen(result: dict) -> str:
    shape = "chain" if result["topk"] == 1 else f"tree, topk {result['topk']},"
    lines = [
        f"{result['prompts']} prompts, greedy, {shape} of {result['draft_tokens']} drafts: acceptance length",
        f"  offline (eval)   {result['offline']:.3f}",
        f"  served           {result['served']:.3f}   {result['engine']} {result['version']}",
        f"  difference       {result['difference']:+.1%}",
    ]
    notes = [f"note: {note}" for note in result["notes"]]
    if result["ok"]:
        lines.append("no gap: the number that eval shows is the number that is served")
        return "\n".join(lines + notes)
    named = result["causes"] or ["no known cause fits; compare versions, and run doctor on the head that is served"]
    lines += ["causes, likeliest first", *(f"  - {cause}" for cause in named)]
    if result["experiments"]:
        lines.append("experiments (offline, one thing changed)")
        lines += [f"  {row['acceptance_length']:.3f}  {row['cause']}" for row in result["experiments"]]
    return "\n".join(lines + notes)
