"""`eval`: acceptance and acceptance length of a head from real decoding with its target."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from eagle3_xla.checks import number
from eagle3_xla.config import LossConfig, UserError
from eagle3_xla.data.chat import read_categories, read_prompts
from eagle3_xla.data.files import data_file
from eagle3_xla.data.tokenizer import TemplateFailed, load_tokenizer, render_chat, stop_token_ids
from eagle3_xla.data.vocab import draft_ids_of
from eagle3_xla.doctor.run import first_failure
from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.draft.saved import SavedHead, layers_of, load_head, read_head
from eagle3_xla.evaluate.decode import Choice, Decoder, Generation, SpeculativeDecoder
from eagle3_xla.evaluate.fingerprint import measured
from eagle3_xla.evaluate.page import Answer, place_of, readable_run, write_page
from eagle3_xla.loss.unroll import teacher_positions, unroll
from eagle3_xla.target.model import Target, load_target

CONTEXTS = (256, 512, 1024, 2048, 4096)  # tokens before a target call: the first of these that holds them
BEYOND = "more"


@dataclass
class EvalOptions:
    """limit: first prompts of the file, 0 for all; draft_tokens, topk, steps: the shape of the drafts (decode.py),
    steps 0: as deep as draft_tokens allow, at most 5 in a tree; batch_size: prompts decoded at once; temperature 0:
    greedy; device: cpu or cuda; baseline: decode without the head too, for its speed and for `identical`; force: a head
    that `doctor` fails, too.
    """

    limit: int = 0
    max_new_tokens: int = 128
    draft_tokens: int = 5
    topk: int = 1
    steps: int = 0
    batch_size: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    baseline: bool = True
    force: bool = False

    def __post_init__(self):
        least_of = {"limit": 0, "max_new_tokens": 1, "draft_tokens": 1, "topk": 1, "steps": 0, "batch_size": 1}
        for name, least in least_of.items():
            number(getattr(self, name), f"--{name.replace('_', '-')}", least, whole=True)
        number(self.temperature, "--temperature", 0)
        number(self.top_p, "--top-p", 0, 1, above=True)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no GPU here")
        self.steps = self.steps or (self.draft_tokens if self.topk == 1 else min(5, self.draft_tokens))
        if self.topk == 1 and self.steps != self.draft_tokens:
            raise UserError(f"a chain of {self.draft_tokens} drafts takes as many steps, not --steps {self.steps}")
        if not 1 <= self.steps <= self.draft_tokens:
            raise UserError(f"--steps {self.steps}: choose 1 to --draft-tokens ({self.draft_tokens})")


class Pair(NamedTuple):
    """A target and a head made for it. layers: the target's 0-based layers whose outputs the head reads."""

    model: torch.nn.Module
    head: Eagle3Head
    d2t: torch.Tensor
    layers: tuple[int, ...] | None

    def on(self, options: EvalOptions) -> tuple[Target, Eagle3Head]:
        target = Target(self.model, draft_ids_of(self.d2t), self.layers).to(options.device)
        return target, self.head.to(options.device, getattr(torch, options.dtype))


def evaluate(
    target_path: str, draft: str, prompts: str, options: EvalOptions, report: str | Path = "", run: str | Path = ""
) -> dict:
    """Decode every prompt with and without the head; see `summary` for what comes back.

    report: a folder that gets the page (page.py) too, its place is then `report`; run: the training folder whose
    curves stand on it.
    """
    page = place_of(report) if report else None
    if report and run:
        readable_run(run)
    if not options.force and (problem := first_failure(draft, target_path)):
        raise UserError(f"{draft} fails a rule of `doctor`, {problem}; --force measures it all the same")
    about = measured("eval", draft, target_path, prompts)
    pair = load_pair(target_path, draft, options)
    tokenizer = load_tokenizer(target_path)
    ids = prompt_ids(tokenizer, prompts, options, pair.model.config.max_position_embeddings)
    stop_ids = stop_token_ids(target_path, tokenizer)
    with_head = decode_all(pair, ids, stop_ids, options)
    target, head = pair.on(options)
    plain = decode_prompts(Decoder(target, options.batch_size), ids, stop_ids, options) if options.baseline else []
    texts = [prompt + generation.tokens for prompt, generation in zip(ids, with_head)]
    hits = [teacher_forced_hits(target, head, pair.d2t, text, options.steps) for text in texts]
    figures = summary(with_head, plain, hits, options) | {"measured": about}
    kinds = read_categories(data_file(prompts))
    figures["by_category"] = _grouped((kind, a) for kind, g in zip(kinds, with_head) for a in g.accepted)
    by_context = _grouped(call for prompt, g in zip(ids, with_head) for call in _calls_by_context(len(prompt), g))
    figures["by_context"] = {size: by_context[size] for size in map(str, (*CONTEXTS, BEYOND)) if size in by_context}
    if page:
        asked = [chat[-1]["content"] for chat in read_prompts(data_file(prompts))]
        write_page(page, figures, [Answer(*pair) for pair in zip(asked, with_head)], tokenizer, run)
        figures["report"] = str(page)
    return figures


def _grouped(calls: Iterable[tuple[str, int]]) -> dict[str, dict]:
    """(group, drafts accepted) of each target call -> group -> its acceptance length and number of calls."""
    groups: dict[str, list[int]] = {}
    for group, accepted in calls:
        groups.setdefault(group, []).append(accepted)
    return {group: {"tau": 1 + sum(a) / len(a), "calls": len(a)} for group, a in groups.items()}


def _calls_by_context(position: int, generation: Generation) -> Iterator[tuple[str, int]]:
    """(bucket of the tokens before the call, drafts accepted) of each call; position: tokens of the prompt."""
    for accepted in generation.accepted:
        position += 1  # what prefill or the call before chose itself
        yield str(next((size for size in CONTEXTS if position <= size), BEYOND)), accepted
        position += accepted


def load_pair(target_path: str, draft: str | SavedHead, options: EvalOptions) -> Pair:
    """Load a target and an exported head. Raises UserError when the head was made for another target."""
    saved = draft if isinstance(draft, SavedHead) else read_head(draft)
    head, d2t = load_head(saved, options.force)
    if options.topk > len(d2t):
        raise UserError(f"--topk {options.topk}: the draft vocabulary of {saved.folder} has {len(d2t)} tokens")
    model = load_target(target_path, getattr(torch, options.dtype))
    sizes, wanted = ((c.vocab_size, c.hidden_size) for c in (head.config, model.config))
    if sizes != wanted:
        raise UserError(
            f"the head at {saved.folder} was made for another target: vocabulary {sizes[0]} and hidden size "
            f"{sizes[1]}, but {target_path} has {wanted[0]} and {wanted[1]}"
        )
    return Pair(model, head, d2t, layers_of(saved, model.config.num_hidden_layers))


def prompt_ids(tokenizer, prompts: str, options: EvalOptions, longest: int) -> list[list[int]]:
    """Token ids of the file's prompts in the target's chat template, ready for its answer.

    Raises UserError when one leaves no room for the answer in `longest` tokens.
    """
    messages = read_prompts(data_file(prompts))[: options.limit or None]
    ids = []
    for i, chat in enumerate(messages, 1):
        try:
            words = render_chat(tokenizer, chat, add_generation_prompt=True)
            words.encode()
        except (TemplateFailed, UnicodeEncodeError) as failure:
            raise UserError(f"the target's chat template fails on prompt {i} of {prompts} ({failure})") from None
        ids.append(tokenizer(words, add_special_tokens=False)["input_ids"])
        if not ids[-1]:
            raise UserError(f"the target's chat template makes nothing of prompt {i} of {prompts}")
    for i, prompt in enumerate(ids, 1):
        if len(prompt) + options.max_new_tokens > longest:
            raise UserError(
                f"{prompts}: prompt {i} has {len(prompt)} tokens; with {options.max_new_tokens} new ones it exceeds "
                f"the {longest} of the target"
            )
    return ids


def decode_all(pair: Pair, prompts: list[list[int]], stop_ids: set[int], options: EvalOptions) -> list[Generation]:
    """Decode every prompt with the head."""
    target, head = pair.on(options)
    shape = (options.draft_tokens, options.topk, options.steps)
    decoder = SpeculativeDecoder(target, head, pair.d2t, *shape, options.batch_size)
    return decode_prompts(decoder, prompts, stop_ids, options)


def decode_prompts(
    decoder: Decoder, prompts: list[list[int]], stop_ids: set[int], options: EvalOptions
) -> list[Generation]:
    """Decode every prompt, showing how far it is."""
    choices = [_choice(options, i) for i in range(len(prompts))]
    name = "eval" if isinstance(decoder, SpeculativeDecoder) else "eval, baseline"
    with tqdm(total=len(prompts), desc=name, unit="prompt") as bar:
        return decoder.decode_all(prompts, options.max_new_tokens, stop_ids, choices, bar.update)


def _choice(options: EvalOptions, prompt: int) -> Choice:
    return Choice(options.temperature, options.top_p, options.seed, prompt)


def summary(with_head: list[Generation], plain: list[Generation], hits: list, options: EvalOptions) -> dict:
    """The figures, by the names that scripts rely on.

    tau: 1 + mean accepted drafts per target call, over all calls of all answers together (Generation says what
    counts), which is vLLM's mean acceptance length. SGLang's `spec_accept_length` divides all new tokens by the calls,
    prefill's token included, and is a little higher on short answers; `bench` computes tau from its counts of drafts.
    acceptance[k]: share of the calls that accepted a draft at depth k; acceptance_conditional[k]: of those that
    accepted all before it; acc_all_positions[k]: hits on teacher-forced text over ALL positions, the user's included:
    not acceptance, kept to compare with others.
    """
    accepted = [a for generation in with_head for a in generation.accepted]
    acceptance, conditional = acceptance_by_position(accepted, options.steps)
    calls, tokens = len(accepted), sum(len(generation.tokens) for generation in with_head)
    columns = list(zip(*hits))
    return {
        "tau": tau(with_head),
        "acceptance": acceptance,
        "acceptance_conditional": conditional,
        "acc_all_positions": [sum(h for h, _ in column) / sum(n for _, n in column) for column in columns],
        "target_calls_per_token": calls / max(1, tokens - len(with_head)),
        "tokens_per_second": speed(with_head),
        "baseline_tokens_per_second": speed(plain) if plain else None,
        "identical": all(a.tokens == b.tokens for a, b in zip(with_head, plain)) if plain else None,
        "prompts": len(with_head),
        "tokens": tokens,
        "draft_tokens": options.draft_tokens,
        "topk": options.topk,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "temperature": options.temperature,
        "max_new_tokens": options.max_new_tokens,
    }


def tau(generations: list[Generation]) -> float:
    """Acceptance length: 1 + mean accepted drafts per target call."""
    accepted = [a for generation in generations for a in generation.accepted]
    return 1 + sum(accepted) / len(accepted) if accepted else 1.0


def acceptance_by_position(accepted: list[int], depth: int) -> tuple[list[float], list[float]]:
    """(plain, conditional) acceptance per depth, over the target calls."""
    reached = [sum(a >= k for a in accepted) for k in range(depth + 1)]
    plain = [reached[k + 1] / len(accepted) if accepted else 0.0 for k in range(depth)]
    conditional = [reached[k + 1] / reached[k] if reached[k] else 0.0 for k in range(depth)]
    return plain, conditional


@torch.inference_mode()
def teacher_forced_hits(target: Target, head, d2t: torch.Tensor, ids: list[int], steps: int) -> list[tuple[int, int]]:
    """(hits, positions) per TTT step over every position of one text, the prompt's included."""
    shape = (1, len(ids))
    batch = {
        "input_ids": torch.tensor([ids], device=target.device),
        "position_ids": torch.arange(len(ids), device=target.device)[None],
        "document_ids": torch.ones(shape, dtype=torch.int64, device=target.device),
        "loss_mask": torch.ones(shape, dtype=torch.bool, device=target.device),
    }
    states = target.states(batch["input_ids"], batch["position_ids"], batch["document_ids"])
    t2d = torch.zeros(target.model.config.vocab_size, dtype=torch.bool, device=target.device)
    t2d[draft_ids_of(d2t)] = True
    d2t = d2t.to(target.device)
    config = LossConfig(ttt_length=steps, rows="specforge")
    known = (states.hidden, states.argmax, states.logsumexp)
    teacher = target.teacher(*(teacher_positions(batch, x) for x in known))
    sums = unroll(head, target.embed_tokens, batch, states.aux, teacher, t2d, d2t, config).sums
    return [(int(hits), int(rows)) for hits, rows in zip(sums.hits, sums.drafts)]


def speed(generations: list[Generation]) -> float:
    """Tokens per second after the first token of each answer."""
    seconds = sum(generation.seconds for generation in generations)
    return sum(len(generation.tokens) - 1 for generation in generations) / seconds if seconds else 0.0
