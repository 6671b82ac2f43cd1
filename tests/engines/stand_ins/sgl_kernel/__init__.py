"""A stand-in for SGLang's compiled kernel package, in torch: what SGLang 0.5.21 calls with `--device cpu
--attention-backend intel_amx` for a dense model with EAGLE3, and nothing more.

SGLang publishes `sgl_kernel` for CUDA; its CPU build is not on PyPI. With this folder on PYTHONPATH the unmodified
SGLang serves on any CPU: its scheduler, its workers, its models and its acceptance are the real ones. Names and
arguments are SGLang's. Requests of a batch are served one after the other, so it is slow.
"""

import ctypes

import torch
from torch.nn.functional import scaled_dot_product_attention

__version__ = "0.0.0+stand.in"


# The table of cache slots: table[request, position] = slot. `locs` lists slots of all requests, one after the other.
def assign_req_to_token_pool_cpu(requests, table, start, end, locs, table_width):
    """Write each request's new slots, positions start..end, into the table."""
    counts = (end - start).tolist()
    for request, first, last, slots in zip(requests.tolist(), start.tolist(), end.tolist(), locs.split(counts)):
        table[request, first:last] = slots.to(table.dtype)


def assign_extend_cache_locs_cpu(requests, table, start, end, out, table_width):
    """Read each request's slots, positions start..end, out of the table."""
    spans = zip(requests.tolist(), start.tolist(), end.tolist())
    slots = torch.cat([table[request, first:last] for request, first, last in spans])
    out[: len(slots)] = slots.to(out.dtype)


def assign_draft_cache_locs_contiguous_cpu(requests, table, lengths, out, table_width, topk, steps):
    """The topk * steps slots behind each request's text: where its branches are drafted."""
    ahead = torch.arange(topk * steps)
    out.copy_(table[requests.long()[:, None], lengths.long()[:, None] + ahead].flatten())


def build_draft_decode_metadata_cpu(table, requests, lengths, topk, steps, table_width):
    """One table row for each branch: the request's text, then the branch's own `steps` slots."""
    branches = table.new_zeros(len(requests) * topk, table_width)
    for i, (request, length) in enumerate(zip(requests.tolist(), lengths.tolist())):
        for branch in range(topk):
            row, own = branches[i * topk + branch], length + branch * steps
            row[:length] = table[request, :length]
            row[length : length + steps] = table[request, own : own + steps]
    return branches


def fill_bonus_tokens_cpu(accepted_tokens, accepted_counts, bonus, stride):
    """The last accepted token of each request; `accepted_tokens` holds `stride` places a request."""
    last = torch.arange(len(accepted_counts)) * stride + accepted_counts.long() - 1
    bonus.copy_(accepted_tokens.flatten()[last])


def fill_accept_out_cache_loc_cpu(accepted_index, locs, out, size=None):
    """The slots of the accepted tokens; -1 marks an unused place."""
    accepted = accepted_index[accepted_index >= 0].long()
    out[: len(accepted)] = locs[accepted]


def copy_all_layer_kv_cache_cpu(buffers, slot_bytes, targets, sources):
    """Copy whole slots inside every layer's key and value buffer, given by address. All is read before any write."""
    for address, size in zip(buffers.tolist(), slot_bytes.tolist()):
        content = [ctypes.string_at(address + source * size, size) for source in sources.tolist()]
        for target, data in zip(targets.tolist(), content):
            ctypes.memmove(address + target * size, data, size)


def rotate_input_ids_cpu(ids, starts, lengths, following, selected=None):
    """Shift each request's tokens left by one; the token that follows takes the last (or the selected) place."""
    for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist())):
        if length:
            own = ids[start : start + length]
            own[:-1] = own[1:].clone()
            own[-1 if selected is None else int(selected[i]) - start] = following[i]


# The tree of drafts. Node 0 is the last known token; the others are the picked candidates, in the order of drafting.
def build_tree_kernel_efficient_cpu(
    parents, picked, lengths, mask, positions, index, first_child, next_sibling, topk, depth, nodes, mode
):
    """Fill, for each request: mask[i, j] (j is i or above it), positions, and the tree as child and sibling links.

    Candidate c came with group c // topk; group 0 hangs on node 0, group g > 0 on candidate parents[g]. A candidate
    whose parent was not picked (possible when their scores are equal) is linked nowhere.
    """
    assert int(mode) == 1, "only the mask among the new tokens is built here (QLEN_ONLY)"
    mask = mask.view(-1, nodes, nodes)
    positions = positions.view(-1, nodes)
    for request, length in enumerate(lengths.tolist()):
        node_of = {candidate: node for node, candidate in enumerate(picked[request].tolist(), 1)}
        above = [-1]
        for candidate in node_of:
            group = candidate // topk
            above.append(node_of.get(int(parents[request, group]), -1) if group else 0)
        index[request] = torch.arange(nodes) + request * nodes
        for node in range(nodes - 1, 0, -1):  # backwards, so that the first of the siblings is linked last
            if above[node] < 0:
                continue
            next_sibling[request, node] = first_child[request, above[node]]
            first_child[request, above[node]] = node
        mask[request] = torch.eye(nodes, dtype=torch.bool)
        positions[request] = length
        for node in range(1, nodes):
            if above[node] < 0:
                continue
            mask[request, node] |= mask[request, above[node]]
            positions[request, node] = positions[request, above[node]] + 1


def verify_tree_greedy_cpu(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
):
    """From the root on, step to the child that is the target's own choice, as long as there is one.

    predicts: the target's choice after each accepted place; accept_index: these places; accept_token_num: accepted
    drafts, the root not counted.
    """
    choice = target_predict.flatten()
    for request in range(len(candidates)):
        node, accepted = 0, 0
        place = int(retrive_index[request, 0])
        accept_index[request, 0] = place
        predicts[place] = choice[place]
        while accepted + 1 < accept_index.shape[1]:
            node = int(retrive_next_token[request, node])
            while node >= 0 and candidates[request, node] != choice[place]:
                node = int(retrive_next_sibling[request, node])
            if node < 0:
                break
            accepted += 1
            place = int(retrive_index[request, node])
            accept_index[request, accepted] = place
            predicts[place] = choice[place]
        accept_token_num[request] = accepted


# Attention over slots: keys and values of new tokens are in the buffers already.
def _attend(query, keys, values, allowed, scale):
    """query [n, heads, D]; keys and values [m, kv_heads, D]; allowed [n, m] bool or None."""
    query, keys, values = (x.transpose(0, 1).unsqueeze(0).to(query.dtype) for x in (query, keys, values))
    attended = scaled_dot_product_attention(query, keys, values, attn_mask=allowed, scale=scale, enable_gqa=True)
    return attended[0].transpose(0, 1)


def _plain(cap, sinks, is_cross, window):
    assert not cap and sinks is None and not is_cross and window <= 0, "only plain attention is served here"


def _decode_attention(
    query, key_buffer, value_buffer, key_scale, value_scale, out, key, value, locs, scratch, table, requests, lengths,
    scale, cap, is_cross=False, window=0, encoder=None, sinks=None,
):  # fmt: skip
    """One new token a request over its whole text."""
    _plain(cap, sinks, is_cross, window)
    if key is not None:
        key_buffer[locs] = key.view(-1, *key_buffer.shape[1:]).to(key_buffer.dtype)
        value_buffer[locs] = value.view(-1, *value_buffer.shape[1:]).to(value_buffer.dtype)
    for i, (request, length) in enumerate(zip(requests.tolist(), lengths.tolist())):
        slots = table[request, :length].long()
        out[i] = _attend(query[i : i + 1], key_buffer[slots], value_buffer[slots], None, scale)[0]


def _extend_attention(
    query, key, value, out, key_buffer, value_buffer, key_scale, value_scale, table, requests, lengths, new_lengths,
    new_starts, longest, scale, cap, is_cross=False, window=0, encoder=None, sinks=None, tree_mask=None, causal=True,
):  # fmt: skip
    """Several new tokens a request: causal, or by the tree's mask among themselves."""
    _plain(cap, sinks, is_cross, window)
    spans = zip(requests.tolist(), lengths.tolist(), new_lengths.tolist(), new_starts.tolist())
    for i, (request, length, new, start) in enumerate(spans):
        slots = table[request, :length].long()
        allowed = torch.ones(new, length, dtype=torch.bool)
        if causal:
            allowed = allowed.tril(length - new)
        if tree_mask is not None:
            allowed[:, length - new :] = tree_mask.view(-1, new, new)[i]
        own = slice(start, start + new)
        out[own] = _attend(query[own], key_buffer[slots], value_buffer[slots], allowed, scale)


torch.ops.sgl_kernel.decode_attention_cpu = _decode_attention
torch.ops.sgl_kernel.extend_attention_cpu = _extend_attention
