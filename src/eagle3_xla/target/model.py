"""Any Hugging Face causal LM as the frozen target of an EAGLE3 head."""

import hashlib
from typing import NamedTuple

import torch
from torch import nn

from eagle3_xla.config import UserError
from eagle3_xla.data.tokenizer import first_line, load_config
from eagle3_xla.target.order import after
from eagle3_xla.target.weights import StoredWeights

MIN_LAYERS = 8
VOCABULARY_CHUNK_ROWS = 256  # positions of a sequence (or of a group's list) whose full-vocabulary logits exist at once


class TargetStates(NamedTuple):
    """What a head needs from the target at every position t; all of it is without gradient.

    aux [B, T, 3H]: outputs of the aux layers, low to high; hidden [B, T, H]: after the final norm, before lm_head;
    argmax [B, T] int64 and logsumexp [B, T] float32: of the logits over the full vocabulary, p(x_{t+1} | x_{<=t}).
    """

    aux: torch.Tensor
    hidden: torch.Tensor
    argmax: torch.Tensor
    logsumexp: torch.Tensor


class Teacher(NamedTuple):
    """The target's next-token distribution p(x_{t+1} | x_{<=t}) seen through the draft vocabulary.

    logits [.., D] float32: rows of the draft vocabulary; logsumexp [..] float32 and argmax [..] int64: over the full
    vocabulary. softmax(logits) is the renormalised distribution, exp(logits - logsumexp) the real one.
    """

    logits: torch.Tensor
    logsumexp: torch.Tensor
    argmax: torch.Tensor


def aux_layers(num_layers: int) -> tuple[int, int, int]:
    """0-based decoder layers whose outputs feed the head: {1, L//2-1, L-4}, as every engine takes by default.

    Hugging Face's `hidden_states` index of layer i is i + 1. Raises UserError when the three are not distinct.
    """
    if num_layers < MIN_LAYERS:
        raise UserError(
            f"the target has {num_layers} decoder layers; EAGLE3 takes hidden states of three distinct ones "
            f"and needs at least {MIN_LAYERS}"
        )
    return (1, num_layers // 2 - 1, num_layers - 4)


def load_target(path: str, dtype: torch.dtype):
    """The frozen causal LM on the CPU, in eval mode, without gradients. Raises UserError when it can't be a target."""
    from transformers import AutoModelForCausalLM

    aux_layers(load_config(path).num_hidden_layers)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise UserError(f"the weights of target {path!r} don't load: {first_line(error)}") from None
    return model.eval().requires_grad_(False)


def open_target(path: str, dtype: torch.dtype, draft_ids: torch.Tensor) -> "Target":
    """The frozen target with nothing read but its draft rows: `Target.place` reads the other tensors one by one.

    Raises UserError when it can't be a target.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(path)
    aux_layers(config.num_hidden_layers)
    with init_empty_weights():  # buffers, which no file holds, are computed
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    return Target(model.eval().requires_grad_(False), draft_ids, weights=StoredWeights(path, dtype))


class Target(nn.Module):
    """The frozen target with its aux hidden states and its teacher on the draft vocabulary.

    draft_ids [D] int64: target ids of the draft vocabulary, ascending; layers: 0-based decoder layers whose outputs
    are the aux states (default: aux_layers); weights: where the parameters of a model without data lie.
    """

    def __init__(self, model, draft_ids, layers: tuple[int, ...] | None = None, weights: StoredWeights | None = None):
        super().__init__()
        self.model = model
        self.weights = weights
        self.layers = layers or aux_layers(model.config.num_hidden_layers)
        self._captured: dict[int, torch.Tensor] = {}
        for layer in self.layers:
            model.model.layers[layer].register_forward_hook(self._capture(layer))
        weight = model.get_output_embeddings().weight
        if weights:
            weight = self._read(next(n for n, parameter in self.named_parameters() if parameter is weight))
        self.register_buffer("draft_rows", weight[draft_ids].clone(), persistent=False)  # [D, H]

    def _read(self, name: str) -> torch.Tensor:
        return self.weights.read(name.removeprefix("model."))

    def place(self, move, mark=lambda name, tensor: None) -> "Target":
        """Replace every parameter and buffer by move(tensor), then mark(name, replacement); a shared one stays shared.

        One at a time, and those without data are read from `weights` just before, so that the host holds one tensor
        beside what `move` keeps.
        """
        placed = {}
        for prefix, module in self.named_modules():
            for tensors in (module._parameters, module._buffers):
                for leaf, old in tensors.items():
                    if old is not None and old not in placed:
                        name = f"{prefix}.{leaf}".removeprefix(".")
                        new = move(self._read(name) if self.weights and old.is_meta else old)
                        placed[old] = nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new
                        mark(name, placed[old])
                    tensors[leaf] = placed.get(old)
        return self

    def _capture(self, layer: int):
        def hook(module, args, output):
            self._captured[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    @property
    def embed_tokens(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def fingerprint(self) -> str:
        """Which target this is: a hash of its config and of its lm_head rows of the draft vocabulary."""
        digest = hashlib.sha256(self.model.config.to_json_string().encode())
        digest.update(self.draft_rows.float().numpy().tobytes())
        return digest.hexdigest()

    @property
    def final_norm_weight(self) -> torch.Tensor:
        return self.model.model.norm.weight

    @property
    def device(self) -> torch.device:
        return self.draft_rows.device

    @torch.no_grad()
    def hidden_states(self, input_ids, position_ids, document_ids) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the target's layers over packed rows, [B, T] each: aux [B, T, 3H] and hidden [B, T, H] (TargetStates)."""
        output = self.model.model(
            input_ids=input_ids,
            position_ids=position_ids,
            # A ready-made 4-D mask: one graph, no device sync in transformers' own mask code.
            attention_mask=document_mask(document_ids),
            use_cache=False,
        )
        return self.captured_aux(), output.last_hidden_state

    def states(self, input_ids, position_ids, document_ids) -> TargetStates:
        """All that a head needs at every position, for keeping; [B, T] each."""
        aux, hidden = self.hidden_states(input_ids, position_ids, document_ids)
        return TargetStates(aux, hidden, *self.full_vocabulary(hidden))

    def captured_aux(self) -> torch.Tensor:
        """Aux states of the model's last forward, [B, T, 3H]."""
        return torch.cat([self._captured.pop(layer) for layer in self.layers], dim=-1)

    @torch.no_grad()
    def full_vocabulary(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """argmax and logsumexp over the full vocabulary, in chunks: no [B, T, vocab] tensor ever exists."""
        weight = self.model.get_output_embeddings().weight
        argmax, logsumexp = [], []
        for chunk in hidden.split(VOCABULARY_CHUNK_ROWS, dim=1):
            # One chunk after the other.
            chunk = after(chunk, *(x[-1][:, :1, None] for x in (argmax, logsumexp) if x))
            logits = torch.einsum("bth,vh->btv", chunk, weight).float()
            argmax.append(logits.argmax(-1))
            logsumexp.append(logits.logsumexp(-1))
        return torch.cat(argmax, 1), torch.cat(logsumexp, 1)

    @torch.no_grad()
    def teacher(self, hidden: torch.Tensor, argmax: torch.Tensor, logsumexp: torch.Tensor) -> Teacher:
        """hidden [.., H] after the final norm; argmax, logsumexp [..]: its `full_vocabulary`."""
        logits = torch.einsum("bth,dh->btd", hidden.to(self.draft_rows.dtype), self.draft_rows)
        return Teacher(logits.float(), logsumexp, argmax)


def document_mask(document_ids: torch.Tensor) -> torch.Tensor:
    """Causal attention inside each document, [B, 1, T, T] bool; padding attends to padding, so no row is empty."""
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return (same & causal)[:, None]
