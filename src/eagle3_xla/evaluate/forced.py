"""What a head would draft on text that is given: an answer with its prompt, one pass of the target, no decoding."""

import torch

from eagle3_xla.data.batches import list_rows
from eagle3_xla.data.vocab import draft_ids_of
from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.loss.config import LossConfig
from eagle3_xla.loss.metrics import AcceptanceSums
from eagle3_xla.loss.rows import shift_left
from eagle3_xla.loss.unroll import teacher_positions, unroll
from eagle3_xla.target.model import Target


@torch.inference_mode()
def teacher_forced(
    target: Target, head: Eagle3Head, d2t: torch.Tensor, prompt: list[int], answer: list[int], steps: int
) -> tuple[AcceptanceSums, AcceptanceSums]:
    """Sums per TTT step of one answer that is fed to the head.

    The first: hits are the target's choices, over every position, the prompt's included, which is how others count.
    The second: hits are the answer's own tokens, which in the target's own answer are its choices, sampled ones too, so
    a draft that hits is one that would be accepted there; its chain's sums are of the positions where decoding drafts,
    and only the answer's positions are computed.
    """
    ids = torch.tensor([prompt + answer], device=target.device)
    everywhere = {"loss_mask": torch.ones_like(ids, dtype=torch.bool)}
    written = torch.arange(ids.shape[1])[None] >= len(prompt)
    batch = {
        "input_ids": ids,
        "position_ids": torch.arange(ids.shape[1], device=target.device)[None],
        "document_ids": torch.ones_like(ids),
    }
    states = target.states(batch["input_ids"], batch["position_ids"], batch["document_ids"])
    t2d = torch.zeros(target.model.config.vocab_size, dtype=torch.bool, device=target.device)
    t2d[draft_ids_of(d2t)] = True
    d2t = d2t.to(target.device)

    def sums(masked: dict[str, torch.Tensor], choices: torch.Tensor, rows: str) -> AcceptanceSums:
        masked = batch | {name: tensor.to(target.device) for name, tensor in masked.items()}
        known, config = (states.hidden, choices, states.logsumexp), LossConfig(ttt_length=steps, rows=rows)
        teacher = target.teacher(*(teacher_positions(masked, x) for x in known))
        return unroll(head, target.embed_tokens, masked, states.aux, teacher, t2d, d2t, config, decoding=True).sums

    listed = {"loss_mask": written} | list_rows(written, 1, len(answer))
    return sums(everywhere, states.argmax, "specforge"), sums(listed, shift_left(ids, 1), "serving")
