"""`eval`: acceptance and acceptance length of a head from real decoding with its target."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from eagle3_xla.data.prompts import Prompt, read_prompts
from eagle3_xla.data.tokenizer import TemplateFailed, answer_of, load_tokenizer, render_chat, stop_token_ids
from eagle3_xla.data.vocab import draft_ids_of
from eagle3_xla.doctor.engines import served_by
from eagle3_xla.doctor.run import first_failure
from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.draft.saved import SavedHead, layers_of, load_head, read_head
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.decode import Choice, Decoder, Generation, SpeculativeDecoder, Watch
from eagle3_xla.evaluate.draft_length import MeasuringDecoder
from eagle3_xla.evaluate.fingerprint import measured
from eagle3_xla.evaluate.forced import teacher_forced
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.page import Answer, place_of, readable_run, write_page
from eagle3_xla.loss.metrics import AcceptanceSums, add_up, expected_tau, rates
from eagle3_xla.target.model import Target, load_target
from eagle3_xla.target.packed import pack

CONTEXTS = (256, 512, 1024, 2048, 4096)  # tokens before a target call: the first of these that holds them
BEYOND = "more"
OTHER = "other"


class Pair(NamedTuple):
    """A target and a head made for it. layers: the target's 0-based layers whose outputs the head reads."""

    model: torch.nn.Module
    head: Eagle3Head
    d2t: torch.Tensor
    layers: tuple[int, ...] | None

    def on(self, options: EvalOptions) -> tuple[Target, Eagle3Head]:
        target = Target(self.model, draft_ids_of(self.d2t), self.layers).to(options.device)
        head = self.head.to(options.device)
        for parameter in head.parameters():  # buffers stay float32: bfloat16 frequencies would be other rotations
            parameter.data = parameter.data.to(getattr(torch, options.dtype))
        pack(self.model, head)
        return target, head


def evaluate(
    target_path: str,
    draft: str,
    prompts: str,
    options: EvalOptions,
    report: str | Path = "",
    run: str | Path = "",
    before: dict | None = None,
    watch: Watch | None = None,
) -> dict:
    """Decode every prompt with and without the head; see `summary` for what comes back.

    report: a folder that gets the page (page.py) too, its place is then `report`; run: the training folder whose
    curves stand on it; before: what an untrained head reached, to stand beside it there; watch: told of each answer
    with the head as it grows (decode.py).
    """
    page = place_of(report) if report else None
    if run and not report:
        raise UserError("--run gives the report its curves: without --report it has no effect")
    if run:
        readable_run(run)
    if not options.force and (problem := first_failure(draft, target_path)):
        raise UserError(f"{draft} fails a rule of `doctor`, {problem}; --force measures it all the same")
    saved = read_head(draft)
    pair = load_pair(target_path, saved, options)
    about = measured("eval", draft, target_path, prompts)  # of a hub id the weights are here only now
    engines = served_by(saved, pair.model.config)
    del saved
    tokenizer = load_tokenizer(target_path)
    longest = pair.model.config.max_position_embeddings
    asked = read_prompts(prompts, options.limit)
    ids = template_ids(tokenizer, prompts, [prompt.messages for prompt in asked], options, longest)
    stop_ids = stop_token_ids(target_path, tokenizer)
    target, head = pair.on(options)
    lengths = {}
    if not options.draft_tokens:
        choices = [_choice(options, i) for i in range(len(ids))]
        pilot = MeasuringDecoder(target, head, pair.d2t, slots=options.batch_size)
        best, rows = pilot.lengths(ids, options.max_new_tokens, stop_ids, choices)
        options = replace(options, draft_tokens=best)
        lengths = {"draft_lengths": rows}
    decoder = _decoder(target, head, pair.d2t, options)
    decoder.watch = watch or decoder.watch
    turns, left_out = decode_turns(decoder, asked, ids, tokenizer, stop_ids, options, longest)
    ids, with_head = [turn.ids for turn in turns], [turn.generation for turn in turns]
    plain = []
    if options.baseline:
        numbers = [turn.prompt for turn in turns]
        plain = decode_prompts(Decoder(target, options.batch_size), ids, stop_ids, options, numbers)
    forced = [teacher_forced(target, head, pair.d2t, t.ids, t.generation.tokens, options.steps) for t in turns]
    figures = summary(with_head, plain, forced, options) | lengths
    figures |= {"prompts": len(asked), "answers": len(turns), "turns_without_room": left_out, "measured": about}
    figures["served_by"] = engines
    figures["by_category"] = _by_name([asked[turn.prompt].category for turn in turns], with_head)
    figures["by_source"] = _by_name([asked[turn.prompt].source for turn in turns], with_head)
    by_context = _grouped(call for prompt, g in zip(ids, with_head) for call in _calls_by_context(len(prompt), g))
    figures["by_context"] = {size: by_context[size] for size in map(str, (*CONTEXTS, BEYOND)) if size in by_context}
    if page:
        answers = [Answer(turn.asked, turn.generation) for turn in turns]
        write_page(page, figures, answers, tokenizer, run, before)
        figures["report"] = str(page)
    return figures


def _by_name(names: list[str], generations: list[Generation]) -> dict[str, dict]:
    """`_grouped` by each answer's name; those without one are "other", and where none has one there are no groups."""
    if not any(names):
        return {}
    return _grouped((name or OTHER, a) for name, g in zip(names, generations) for a in g.accepted)


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
    if options.draft_window:
        head.window = options.draft_window
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


def prompt_ids(tokenizer: Any, prompts: str, options: EvalOptions, longest: int) -> list[list[int]]:
    """Token ids of the first turns of a file's prompts, as `template_ids`."""
    chats = [prompt.messages for prompt in read_prompts(prompts, options.limit)]
    return template_ids(tokenizer, prompts, chats, options, longest)


def template_ids(
    tokenizer: Any, prompts: str, chats: list[list[dict]], options: EvalOptions, longest: int
) -> list[list[int]]:
    """Token ids of chats in the target's chat template, ready for its answer. prompts: where they come from.

    Raises UserError when one leaves no room for the answer in `longest` tokens.
    """
    ids = [_chat_ids(tokenizer, chat, options, f"prompt {i} of {prompts}") for i, chat in enumerate(chats, 1)]
    for i, prompt in enumerate(ids, 1):
        if len(prompt) + options.max_new_tokens > longest:
            raise UserError(
                f"{prompts}: prompt {i} has {len(prompt)} tokens; with {options.max_new_tokens} new ones it exceeds "
                f"the {longest} of the target"
            )
    return ids


def _chat_ids(tokenizer: Any, chat: list[dict], options: EvalOptions, where: str) -> list[int]:
    thinking = {}
    if options.thinking:
        if "enable_thinking" not in str(tokenizer.chat_template):
            raise UserError(f"--thinking {options.thinking}: the target's chat template does not know enable_thinking")
        thinking = {"enable_thinking": options.thinking == "on"}
    try:
        words = render_chat(tokenizer, chat, add_generation_prompt=True, **thinking)
        words.encode()
    except (TemplateFailed, UnicodeEncodeError) as failure:
        raise UserError(f"the target's chat template fails on {where} ({failure})") from None
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"the target's chat template makes nothing of {where}")
    return ids


class Turn(NamedTuple):
    """One question and its answer. prompt: its number among the prompts; asked: what the user said; ids: the whole
    text before the answer."""

    prompt: int
    asked: str
    ids: list[int]
    generation: Generation


def decode_turns(
    decoder: Decoder,
    prompts: list[Prompt],
    ids: list[list[int]],
    tokenizer: Any,
    stop_ids: set[int],
    options: EvalOptions,
    longest: int,
) -> tuple[list[Turn], int]:
    """Ask the prompts' turns, each later one after the target's own answer to the one before it.

    ids: of the first turns. Returns the turns, by prompt, and how many conversations ended early because the next turn
    and its answer would exceed `longest` tokens.
    """
    chats, numbers = [[*prompt.messages] for prompt in prompts], [*range(len(prompts))]
    turns, without_room, later = [], 0, 0
    while numbers:
        answers = decode_prompts(decoder, ids, stop_ids, options, numbers)
        turns += [Turn(i, chats[i][-1]["content"], text, answer) for i, text, answer in zip(numbers, ids, answers)]
        asked, numbers, ids = numbers, [], []
        if later + 1 == options.turns:
            break
        for i, answer in zip(asked, answers):
            if later >= len(prompts[i].later):
                continue
            said = answer.tokens[:-1] if answer.tokens[-1] in stop_ids else answer.tokens
            chats[i].append({"role": "assistant", "content": answer_of(tokenizer, said)[0]})
            chats[i].append({"role": "user", "content": prompts[i].later[later]})
            following = _chat_ids(tokenizer, chats[i], options, f"turn {later + 2} of prompt {i + 1}")
            if len(following) + options.max_new_tokens > longest:
                without_room += 1
                continue
            numbers.append(i)
            ids.append(following)
        later += 1
    return sorted(turns, key=lambda turn: turn.prompt), without_room


def decode_all(pair: Pair, prompts: list[list[int]], stop_ids: set[int], options: EvalOptions) -> list[Generation]:
    """Decode every prompt with the head."""
    return decode_prompts(_decoder(*pair.on(options), pair.d2t, options), prompts, stop_ids, options)


def _decoder(target: Target, head: Eagle3Head, d2t: torch.Tensor, options: EvalOptions) -> SpeculativeDecoder:
    shape = (options.draft_tokens, options.topk, options.steps)
    return SpeculativeDecoder(target, head, d2t, *shape, slots=options.batch_size)


def decode_prompts(
    decoder: Decoder,
    prompts: list[list[int]],
    stop_ids: set[int],
    options: EvalOptions,
    numbers: Iterable[int] | None = None,
) -> list[Generation]:
    """Decode every prompt, showing how far it is. numbers: what samples depend on (default: 0, 1, ...)."""
    choices = [_choice(options, i) for i in (range(len(prompts)) if numbers is None else numbers)]
    name = "eval" if isinstance(decoder, SpeculativeDecoder) else "eval, baseline"
    with tqdm(total=len(prompts), desc=name, unit="prompt") as bar:
        return decoder.decode_all(prompts, options.max_new_tokens, stop_ids, choices, bar.update)


def _choice(options: EvalOptions, prompt: int) -> Choice:
    return Choice(options.temperature, options.top_p, options.seed, prompt)


def summary(
    with_head: list[Generation],
    plain: list[Generation],
    forced: list[tuple[AcceptanceSums, AcceptanceSums]],
    options: EvalOptions,
) -> dict:
    """The figures, by the names that scripts rely on.

    tau: 1 + mean accepted drafts per target call, over all calls of all answers together (Generation says what
    counts), which is vLLM's mean acceptance length. SGLang's `spec_accept_length` divides all new tokens by the calls,
    prefill's token included, and is a little higher on short answers; `bench` computes tau from its counts of drafts.
    acceptance[k]: share of the calls that accepted a draft at depth k; acceptance_conditional[k]: of those that
    accepted all before it; expected_tau, expected_acceptance_conditional: the same of a chain of `steps` drafts, from
    one pass over the answers (forced.py), where drafts that an answer's end cuts off count neither way;
    acc_all_positions[k]: hits on teacher-forced text over ALL positions, the user's included: not acceptance, kept to
    compare with others. speedup: against the target alone, as many texts at once; None where the answers differ.
    """
    accepted = [a for generation in with_head for a in generation.accepted]
    acceptance, conditional = acceptance_by_position(accepted, options.steps)
    calls, tokens = len(accepted), sum(len(generation.tokens) for generation in with_head)
    everywhere, answers = (add_up(list(sums)) for sums in zip(*forced))
    expected = rates(answers)
    with_speed, plain_speed = speed(with_head), speed(plain) if plain else None
    identical = all(a.tokens == b.tokens for a, b in zip(with_head, plain)) if plain else None
    return {
        "tau": tau(with_head),
        "expected_tau": expected_tau(expected["acceptance"]),
        "acceptance": acceptance,
        "acceptance_conditional": conditional,
        "expected_acceptance_conditional": expected["acceptance_conditional"],
        "acc_all_positions": rates(everywhere)["acc"],
        "target_calls_per_token": calls / max(1, tokens - len(with_head)),
        "tokens_per_second": with_speed,
        "baseline_tokens_per_second": plain_speed,
        "speedup": with_speed / plain_speed if plain_speed and identical else None,
        "identical": identical,
        "prompts": len(with_head),
        "tokens": tokens,
        "draft_tokens": options.draft_tokens,
        "topk": options.topk,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "draft_window": options.draft_window or None,
        "thinking": options.thinking or None,
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


def speed(generations: list[Generation]) -> float:
    """Tokens per second after the first token of each answer."""
    seconds = sum(generation.seconds for generation in generations)
    return sum(len(generation.tokens) - 1 for generation in generations) / seconds if seconds else 0.0
