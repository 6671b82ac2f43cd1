"""`eval`: acceptance and acceptance length of a head from real decoding with its target."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from eagle3_xla.config import LossConfig, UserError
from eagle3_xla.data.chat import read_prompts
from eagle3_xla.data.prepare import data_file
from eagle3_xla.data.tokenizer import load_tokenizer, stop_token_ids
from eagle3_xla.data.vocab import draft_ids_of
from eagle3_xla.evaluate.decode import ChainDecoder, Generation, decode_plain
from eagle3_xla.export import load_head
from eagle3_xla.loss.unroll import unroll
from eagle3_xla.target.model import Target, load_target


@dataclass
class EvalOptions:
    """limit: first prompts of the file, 0 for all; draft_tokens: length of the chain; device: cpu or cuda;
    baseline: decode without the head too, for its speed and for `identical`.
    """

    limit: int = 0
    max_new_tokens: int = 128
    draft_tokens: int = 5
    device: str = "cpu"
    dtype: str = "float32"
    baseline: bool = True


def evaluate(target_path: str, draft: str, prompts: str, options: EvalOptions) -> dict:
    """Decode every prompt greedily with and without the head; see `summary` for what comes back."""
    head, d2t = load_head(Path(draft))
    tokenizer = load_tokenizer(target_path)
    model = load_target(target_path, getattr(torch, options.dtype))
    if model.config.vocab_size != head.config.vocab_size or model.config.hidden_size != head.config.hidden_size:
        raise UserError(
            f"the head at {draft} was made for another target: vocabulary {head.config.vocab_size} and hidden size "
            f"{head.config.hidden_size}, but {target_path} has {model.config.vocab_size} and {model.config.hidden_size}"
        )
    messages = read_prompts(data_file(prompts))[: options.limit or None]
    target = Target(model, draft_ids_of(d2t)).to(options.device)
    head = head.to(options.device, getattr(torch, options.dtype))
    decoder = ChainDecoder(target, head, d2t, options.draft_tokens)
    stop_ids = stop_token_ids(target_path, tokenizer)
    with_head, plain, hits = [], [], []
    for chat in tqdm(messages, desc="eval", unit="prompt"):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
        if len(ids) + options.max_new_tokens > model.config.max_position_embeddings:
            raise UserError(f"a prompt of {len(ids)} tokens leaves no room for {options.max_new_tokens} more")
        with_head.append(decoder.decode(ids, options.max_new_tokens, stop_ids))
        if options.baseline:
            plain.append(decode_plain(target, ids, options.max_new_tokens, stop_ids))
        hits.append(teacher_forced_hits(target, head, d2t, ids + with_head[-1].tokens, options.draft_tokens))
    return summary(with_head, plain, hits, options)


def summary(with_head: list[Generation], plain: list[Generation], hits: list, options: EvalOptions) -> dict:
    """The figures, by the names that scripts rely on.

    tau: 1 + mean accepted drafts per target call (prefill is no such call); acceptance[k]: share of the calls whose
    draft at position k was accepted; acceptance_conditional[k]: given that all before it were; acc_all_positions[k]:
    hits on teacher-forced text over ALL positions, the user's included: not acceptance, kept to compare with others.
    """
    accepted = [a for generation in with_head for a in generation.accepted]
    proposed = [p for generation in with_head for p in generation.proposed]
    acceptance, conditional = acceptance_by_position(accepted, proposed, options.draft_tokens)
    calls, tokens = len(accepted), sum(len(generation.tokens) for generation in with_head)
    columns = list(zip(*hits))
    return {
        "tau": 1 + sum(accepted) / calls if calls else 1.0,
        "acceptance": acceptance,
        "acceptance_conditional": conditional,
        "acc_all_positions": [sum(h for h, _ in column) / sum(n for _, n in column) for column in columns],
        "target_calls_per_token": calls / max(1, tokens - len(with_head)),
        "tokens_per_second": _speed(with_head),
        "baseline_tokens_per_second": _speed(plain) if plain else None,
        "identical": all(a.tokens == b.tokens for a, b in zip(with_head, plain)) if plain else None,
        "prompts": len(with_head),
        "tokens": tokens,
        "draft_tokens": options.draft_tokens,
        "max_new_tokens": options.max_new_tokens,
    }


def acceptance_by_position(accepted: list[int], proposed: list[int], depth: int) -> tuple[list[float], list[float]]:
    """(plain, conditional) acceptance per draft position, over the calls that had a draft there."""
    plain, conditional = [], []
    for k in range(depth):
        drafted = [a for a, p in zip(accepted, proposed) if p > k]
        reached = [a for a in drafted if a >= k]
        hits = sum(a > k for a in reached)
        plain.append(hits / len(drafted) if drafted else 0.0)
        conditional.append(hits / len(reached) if reached else 0.0)
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
    sums = unroll(head, target.embed_tokens, batch, states.aux, target.teacher(states), t2d, d2t, config).sums
    return [(int(hits), int(rows)) for hits, rows in zip(sums.hits, sums.drafts)]


def _speed(generations: list[Generation]) -> float:
    """Tokens per second after the first token of each answer."""
    seconds = sum(generation.seconds for generation in generations)
    return sum(len(generation.tokens) - 1 for generation in generations) / seconds if seconds else 0.0
