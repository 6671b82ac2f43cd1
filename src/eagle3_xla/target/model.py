"""A Hugging Face causal LM of a known family (target/families.py) as the frozen target of an EAGLE3 head."""

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import nn

from eagle3_xla import hub, local_copies, storage
from eagle3_xla.data.tokenizer import config_content, written_config
from eagle3_xla.errors import UserError
from eagle3_xla.target.experts import RoutedExperts
from eagle3_xla.target.families import (
    attention_masks,
    aux_layers,
    is_longrope,
    load_target_config,
    logits_of,
    plain_attention,
)
from eagle3_xla.target.order import after
from eagle3_xla.target.weights import StoredWeights

VOCABULARY_CHUNK_ROWS = 256  # positions of a sequence (or of a group's list) whose full-vocabulary logits exist at once
AT_ONCE = 32  # samples of the weights that are read at once


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


def load_target(path: str, dtype: torch.dtype) -> nn.Module:
    """The frozen causal LM on the CPU, in eval mode, without gradients. Raises UserError when it can't be a target."""
    config = load_target_config(path)
    model, weights = _empty(path, config, dtype)
    if storage.is_url(path):  # all of it is read: from a copy on this machine, which is there the next time
        copy = local_copies.local_folder(path, (*hub.SMALL, "*.safetensors"))
        weights = StoredWeights(str(copy), dtype, getattr(config, "quantization_config", None))
    place(model, weights.read)
    return model


def open_target(path: str, dtype: torch.dtype, draft_ids: torch.Tensor) -> "Target":
    """The frozen target with nothing read but its draft rows: `Target.place` reads the other tensors one by one.

    Raises UserError when it can't be a target.
    """
    model, weights = _empty(path, load_target_config(path), dtype)
    return Target(model, draft_ids, weights=weights)


def _empty(path: str, config: Any, dtype: torch.dtype) -> tuple[nn.Module, StoredWeights]:
    """The model without its parameters, and where they are."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():  # buffers, which no file holds, are computed
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=plain_attention(config))
    model.tie_weights()
    weights = StoredWeights(path, dtype, getattr(config, "quantization_config", None))
    return model.eval().requires_grad_(False), weights


def place(
    model: nn.Module,
    read: Callable[[str], torch.Tensor] | None,
    move: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    mark: Callable[[str, torch.Tensor], object] = lambda name, tensor: None,
) -> None:
    """Replace every parameter and buffer by move(tensor), then mark(name, replacement); a shared one stays shared.

    One at a time, and those without data are read(name) just before, so that the host holds one tensor beside what
    `move` keeps.
    """
    placed = {}
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for leaf, old in tensors.items():
                if old is not None and old not in placed:
                    name = f"{prefix}.{leaf}".removeprefix(".")
                    new = move(_fitting(name, read(name), old) if read and old.is_meta else old)
                    placed[old] = nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new
                    mark(name, placed[old])
                tensors[leaf] = placed.get(old)


def _fitting(name: str, stored: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if stored.shape == parameter.shape:
        return stored
    shapes = f"{list(stored.shape)}; {list(parameter.shape)} by config.json"
    raise UserError(f"the target's weights don't load: {name} is {shapes}")


class Target(nn.Module):
    """The frozen target with its aux hidden states and its teacher on the draft vocabulary.

    draft_ids [D] int64: target ids of the draft vocabulary, ascending; layers: 0-based decoder layers whose outputs
    are the aux states (default: aux_layers); weights: where the parameters of a model without data lie.
    """

    def __init__(
        self,
        model: nn.Module,
        draft_ids: torch.Tensor,
        layers: tuple[int, ...] | None = None,
        weights: StoredWeights | None = None,
    ):
        super().__init__()
        self.model = model
        self.weights = weights
        self.layers = layers or aux_layers(model.config.num_hidden_layers)
        self._captured: dict[int, torch.Tensor] = {}
        if is_longrope(model.config):  # its context ends where the factors would change: no look at the positions
            model.model.rotary_emb.rope_type = "default"
        for layer in self.layers:
            model.model.layers[layer].register_forward_hook(self._capture(layer))
        weight = model.get_output_embeddings().weight
        if weights:
            name = next(n for n, parameter in self.named_parameters() if parameter is weight)
            weight = _fitting(name, self._read(name), weight)
        self.register_buffer("draft_rows", weight[draft_ids].clone(), persistent=False)  # [D, H]

    def _read(self, name: str) -> torch.Tensor:
        assert self.weights is not None
        module, _, leaf = name.removeprefix("model.").rpartition(".")
        routed = self.model.get_submodule(module)
        if isinstance(routed, RoutedExperts):
            names, make = routed.stored[leaf]
            return make([self.weights.read(f"{module}.{stored}") for stored in names])
        return self.weights.read(f"{module}.{leaf}")

    def place(
        self,
        move: Callable[[torch.Tensor], torch.Tensor],
        mark: Callable[[str, torch.Tensor], object] = lambda name, tensor: None,
    ) -> "Target":
        """As the function `place`; parameters without data are read from `weights`."""
        place(self, self._read if self.weights else None, move, mark)
        return self

    def _capture(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._captured[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [..] -> rows of the embedding table [.., H], which is what SGLang and vLLM feed their draft models: the
        scaling that Gemma's and Granite's own forward applies to them is left out there too.
        """
        return nn.functional.embedding(ids, self.model.get_input_embeddings().weight)

    def fingerprint(self) -> str:
        """Which target this is: a hash of its config.json and of a little of every stored weight, but of one expert a
        layer.

        A fine-tune has the config of its base, and often its lm_head. For a target from `open_target`.
        """
        assert self.weights is not None
        digest = hashlib.sha256(config_content(written_config(self.weights.path)))
        names = [n for n, _ in self.model.named_parameters() if not re.search(r"\.experts\.[1-9]", n)]
        with ThreadPoolExecutor(AT_ONCE) as pool:  # at a URL each is a request
            for name, sample in zip(names, pool.map(self.weights.sample, names)):
                digest.update(name.encode() + sample)
        return digest.hexdigest()

    @property
    def final_norm_weight(self) -> torch.Tensor:
        """Its scale is this plus families.norm_offset."""
        return self.model.model.norm.weight

    @property
    def device(self) -> torch.device:
        return self.draft_rows.device

    @torch.no_grad()
    def hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, document_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the target's layers over packed rows, [B, T] each: aux [B, T, 3H] and hidden [B, T, H] (TargetStates)."""
        assert self.model.config._attn_implementation != "eager", "whose masks are added to the scores"
        output = self.model.model(
            input_ids=input_ids,
            position_ids=position_ids,
            # Ready-made 4-D masks: one graph, no device sync in transformers' own mask code.
            attention_mask=document_masks(self.model.config, document_ids),
            use_cache=False,
        )
        return self.captured_aux(), output.last_hidden_state

    def states(self, input_ids: torch.Tensor, position_ids: torch.Tensor, document_ids: torch.Tensor) -> TargetStates:
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
        argmax: list[torch.Tensor] = []
        logsumexp: list[torch.Tensor] = []
        for chunk in hidden.split(VOCABULARY_CHUNK_ROWS, dim=1):
            # One chunk after the other.
            chunk = after(chunk, *(x[-1][:, :1, None] for x in (argmax, logsumexp) if x))
            logits = logits_of(self.model.config, torch.einsum("bth,vh->btv", chunk, weight).float())
            argmax.append(logits.argmax(-1))
            logsumexp.append(logits.logsumexp(-1))
        return torch.cat(argmax, 1), torch.cat(logsumexp, 1)

    @torch.no_grad()
    def teacher(self, hidden: torch.Tensor, argmax: torch.Tensor, logsumexp: torch.Tensor) -> Teacher:
        """hidden [.., H] after the final norm; argmax, logsumexp [..]: its `full_vocabulary`."""
        logits = torch.einsum("bth,dh->btd", hidden.to(self.draft_rows.dtype), self.draft_rows)
        return Teacher(logits_of(self.model.config, logits.float()), logsumexp, argmax)


def document_masks(config: Any, document_ids: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
    """Causal attention inside each document of packed rows, with the family's windows (families.attention_masks).

    document_ids [B, T]; padding attends to padding, so no row is empty.
    """
    position = torch.arange(document_ids.shape[1], device=document_ids.device)
    distance = position[:, None] - position
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return attention_masks(config, same & (distance >= 0), distance)
