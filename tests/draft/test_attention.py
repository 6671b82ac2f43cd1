"""The blocked causal attention: the plain one's values and gradients; memory grows with the row, not its square."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eagle3_xla.draft.attention import block_length, causal_attention, exp_


def attend_plainly(query, key, value, document_ids, reach):
    scores = torch.einsum("btkgd,bskd->bkgts", query, key)
    causal = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).tril()
    seen = causal.triu(1 - (reach or query.shape[1])) & (document_ids[:, :, None] == document_ids[:, None, :])
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    return torch.einsum("bkgts,bskd->btkgd", scores.softmax(-1), value), scores.logsumexp(-1).permute(0, 3, 1, 2)


def inputs(batch: int, length: int, kv: int, group: int, size: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    query = torch.randn(batch, length, kv, group, size) * size**-0.5
    key, value = torch.randn(2, batch, length, kv, size)
    return [tensor.requires_grad_() for tensor in (query, key, value)]


@pytest.mark.parametrize("length, reach", [(1, None), (255, None), (700, None), (2100, None), (700, 1), (2100, 290)])
def test_values_and_gradients_are_those_of_plain_attention(length, reach):
    batch = 1 if length > 1000 else 2
    document_ids = (torch.arange(length) // 300).expand(batch, -1)
    results = []
    for attend in (causal_attention, attend_plainly):
        arguments = inputs(batch, length, 2, 3, 8)
        output, logsumexp = attend(*arguments, document_ids, reach)
        (output.sin().sum() + logsumexp.sin().sum()).backward()
        results.append([output, logsumexp, *(tensor.grad for tensor in arguments)])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("key_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_all_is_in_the_dtype_of_the_value(key_dtype):
    """Norms leave queries, and keys too, in float32; the backward pass runs without autocast."""
    document_ids = torch.zeros(2, 300)
    query, key, value = (tensor.detach().bfloat16() for tensor in inputs(2, 300, 2, 3, 8))
    results = []
    for arguments in ([query.float(), key.to(key_dtype), value], [query, key, value]):
        arguments = [tensor.clone().requires_grad_() for tensor in arguments]
        with torch.autocast("cpu", torch.bfloat16):
            output, logsumexp = causal_attention(*arguments, document_ids)
        (output.float().sin().sum() + logsumexp.sin().sum()).backward()
        results.append([output, logsumexp, *(tensor.grad.bfloat16() for tensor in arguments)])
    assert all(map(torch.equal, *results))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_memory_grows_with_the_row_not_with_its_square():
    largest = {}
    for length in (4096, 8192):
        with Largest() as seen:
            output, logsumexp = causal_attention(*inputs(1, length, 1, 1, 8), torch.zeros(1, length))
            (output.sum() + logsumexp.sum()).backward()
        largest[length] = seen.elements
    assert largest == {4096: 4096 * block_length(4096), 8192: 8192 * block_length(8192)}
    assert block_length(4096) == block_length(8192) == 512


def test_the_exponential_of_a_masked_score_is_zero():
    """And every other one is torch's, to the last number that float32 holds in full."""
    x = torch.tensor([torch.finfo(torch.float32).min, float("-inf"), -200.0, -86.9, -80.0, -1.0, 0.0, 3.0])
    assert exp_(x.clone())[:3].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(exp_(x.clone())[3:], x[3:].exp(), rtol=1e-6, atol=0.0)
