"""Mixture-of-experts layers in static shapes, exact: no token is dropped and no capacity is set.

transformers' own modules choose rows by data-dependent indices, which a compiled step can't do. Here the (token,
expert) pairs are sorted by expert and laid out in blocks of one expert each. ceil(pairs / block) + experts blocks are
enough for every routing, so their number is static; a loop multiplies each block with its expert's weights.

Each device of a tp group holds a part of every expert's inner dimension: work is even whatever the routing, and the
parts are summed once, after the experts' outputs are back at their tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from eagle3_xla.target.gather import gather

BLOCK_ROWS = 512  # at most; fewer when an expert gets fewer rows on average

PARTED = ("gate", "up", "down", "gate_bias", "up_bias")  # parameters [E, P, ..]


def python_loop(function: Callable, weights: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """function(weights, block of each of `blocks`) for all blocks, stacked."""
    return torch.stack([function(weights, *block) for block in zip(*blocks)])


class RoutedExperts(nn.Module):
    """The experts of one layer with their router, in place of transformers' module.

    router [E, H], gate and up [E, P, F/P, H], down [E, P, H, F/P] for P parts; with biases where the family has them:
    router_bias [E], gate_bias and up_bias [E, P, F/P], down_bias [E, H]. stored: parameter -> (names in the
    checkpoint, beside this module's own, and what makes the parameter of their tensors).
    """

    def __init__(
        self,
        block: nn.Module,
        parts: int,
        groups: int,
        loop: Callable[..., torch.Tensor] = python_loop,
    ):
        super().__init__()
        self.parts, self.groups, self.loop = parts, groups, loop
        self.experts = block.num_experts if hasattr(block, "num_experts") else block.experts.num_experts
        self.top_k = block.top_k if hasattr(block, "top_k") else block.router.top_k
        self.gpt_oss = hasattr(block, "router")
        self.normalised = getattr(block, "norm_topk_prob", True)
        self.stored = self._gpt_oss() if self.gpt_oss else self._linear(hasattr(block.experts[0], "w1"))
        self.activation: Any = None if self.gpt_oss else block.experts[0].act_fn
        for leaf, (names, make) in self.stored.items():
            made = make([block.get_parameter(name) for name in names])
            self.register_parameter(leaf, nn.Parameter(made.detach(), requires_grad=False))

    def _linear(self, mixtral: bool) -> dict:
        """Qwen3-MoE and Mixtral: a Linear without bias for each matrix of each expert."""
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")

        def of(name: str) -> list[str]:
            return [f"experts.{i}.{name}.weight" for i in range(self.experts)]

        return {
            "router": (["gate.weight"], lambda x: x[0]),
            "gate": (of(gate), lambda x: self._by_rows(torch.stack(x))),
            "up": (of(up), lambda x: self._by_rows(torch.stack(x))),
            "down": (of(down), lambda x: self._by_columns(torch.stack(x))),
        }

    def _gpt_oss(self) -> dict:
        """Stacked already, input before output, gate and up interleaved, all with biases."""
        both, bias = ["experts.gate_up_proj"], ["experts.gate_up_proj_bias"]
        return {
            "router": (["router.weight"], lambda x: x[0]),
            "router_bias": (["router.bias"], lambda x: x[0]),
            "gate": (both, lambda x: self._by_rows(x[0][..., ::2].transpose(1, 2))),
            "up": (both, lambda x: self._by_rows(x[0][..., 1::2].transpose(1, 2))),
            "down": (["experts.down_proj"], lambda x: self._by_columns(x[0].transpose(1, 2))),
            "gate_bias": (bias, lambda x: self._by_rows(x[0][..., ::2])),
            "up_bias": (bias, lambda x: self._by_rows(x[0][..., 1::2])),
            "down_bias": (["experts.down_proj_bias"], lambda x: x[0]),
        }

    def _by_rows(self, x: torch.Tensor) -> torch.Tensor:
        """[E, F, ..] -> [E, P, F/P, ..]"""
        return x.unflatten(1, (self.parts, -1)).contiguous()

    def _by_columns(self, x: torch.Tensor) -> torch.Tensor:
        """[E, H, F] -> [E, P, H, F/P]"""
        return x.unflatten(2, (self.parts, -1)).transpose(1, 2).contiguous()

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """hidden [B, T, H] -> ([B, T, H], None), as transformers' decoder layers call it. B is a multiple of groups."""
        x = hidden.reshape(self.groups, -1, hidden.shape[-1])  # a group's tokens are routed among themselves
        weights, chosen = self._route(x)
        rows, experts, slots = self._dispatch(x, chosen)
        outputs = self.loop(self._block, self._expert_weights(), (rows, experts))  # [n, G, P, block, H]
        outputs = outputs.permute(1, 0, 3, 2, 4).flatten(1, 2)  # [G, n * block, P, H]
        outputs = gather(outputs, slots).unflatten(1, (-1, self.top_k))  # [G, N, k, P, H]
        output = torch.einsum("gnkph,gnk->gnph", outputs, weights).sum(2)
        if self.gpt_oss:
            one_hot = (chosen[..., None] == torch.arange(self.experts, device=x.device)).to(x.dtype)
            output = output + torch.einsum("gnk,gnke,eh->gnh", weights, one_hot, self.down_bias)
        return output.view(hidden.shape), None

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [G, N, H] -> weights of the chosen experts [G, N, k] and the experts [G, N, k] int32."""
        logits = torch.einsum("gnh,eh->gne", x, self.router)
        if self.gpt_oss:
            top, chosen = (logits + self.router_bias).topk(self.top_k, dim=-1)
            weights = top.softmax(-1)
        else:
            weights, chosen = logits.float().softmax(-1).topk(self.top_k, dim=-1)
            if self.normalised:
                weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen.int()

    def _dispatch(self, x: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens in blocks of one expert: rows [n, G, block, H], experts [n, G] int32, and where each pair went:
        slots [G, N k] among n * block.
        """
        device, pairs = x.device, chosen.flatten(1)  # [G, N k]
        count = pairs.shape[1]
        block = min(BLOCK_ROWS, max(8, 1 << (count // self.experts).bit_length() - 1))
        number = -(-count // block) + self.experts

        def numbers(n: int) -> torch.Tensor:
            return torch.arange(n, device=device, dtype=torch.int32)

        per_expert = (pairs[..., None] == numbers(self.experts)).sum(1, dtype=torch.int32)  # [G, E]
        start = per_expert.cumsum(-1, dtype=torch.int32) - per_expert
        blocks = (per_expert + block - 1) // block
        end_block = blocks.cumsum(-1, dtype=torch.int32)
        first_block = end_block - blocks
        order = (pairs * count + numbers(count)).sort(-1).values % count  # pairs by expert, then by token
        rank = order.sort(-1).indices.int()  # of each pair in that order
        slots = first_block.gather(1, pairs.long()) * block + rank - start.gather(1, pairs.long())
        expert = (numbers(number)[:, None] >= end_block[:, None]).sum(-1, dtype=torch.int32)  # [G, n]
        expert = expert.clamp(max=self.experts - 1)
        within = (numbers(number) - first_block.gather(1, expert.long())) * block + start.gather(1, expert.long())
        # Blocks that no expert fills hold rows that nobody takes back.
        pair = (within[..., None] + numbers(block)).flatten(1).clamp(0, count - 1)
        token = order.gather(1, pair.long()) // self.top_k
        rows = gather(x, token).view(self.groups, number, block, -1).transpose(0, 1)
        return rows, expert.T, slots

    def _expert_weights(self) -> tuple[torch.Tensor, ...]:
        biases = (self.gate_bias, self.up_bias) if self.gpt_oss else ()
        return (self.gate, self.up, self.down, *biases)

    def _block(self, weights: Sequence[torch.Tensor], rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """rows [G, block, H], experts [G] -> [G, P, block, H]: each part's share of the output."""
        gate, up, down, *biases = (weight.index_select(0, experts) for weight in weights)  # [G, P, ..]
        gate = torch.einsum("gbh,gpfh->gpbf", rows, gate)
        up = torch.einsum("gbh,gpfh->gpbf", rows, up)
        if biases:  # gpt-oss, with its constants
            gate = (gate + biases[0][:, :, None]).clamp(max=7.0)
            up = (up + biases[1][:, :, None]).clamp(-7.0, 7.0)
            inner = (up + 1) * gate * torch.sigmoid(gate * 1.702)
        else:
            inner = self.activation(gate) * up
        return torch.einsum("gpbf,gphf->gpbh", inner, down)


def route_experts(model: nn.Module, parts: int, groups: int, loop: Callable[..., torch.Tensor] = python_loop) -> None:
    """Put RoutedExperts in the place of every mixture-of-experts module of a transformers model."""
    for layer in model.model.layers:
        for name, module in list(layer.named_children()):
            if hasattr(module, "experts"):
                setattr(layer, name, RoutedExperts(module, parts, groups, loop))
