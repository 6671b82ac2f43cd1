"""Sampled verification for SGLang 0.5.21 on a CPU: `--device cpu` commits the target's likeliest token whatever the
temperature (`speculative/eagle_utils.py:_verify_uses_greedy`). With this folder on PYTHONPATH it takes the way that a
GPU takes, and the CUDA kernel at its end is this one, in torch.
"""

import importlib.abc
import importlib.util
import sys

PATCHED = "sglang.srt.speculative.eagle_utils"


def tree_speculative_sampling_target_only(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    uniform_samples,
    uniform_samples_for_final_sampling,
    target_probs,
    draft_probs,
    threshold_single,
    threshold_acc,
    deterministic,
):
    """From the root on, step to a child with the target's probability of it; else sample from what no child has.

    Names and arguments are the CUDA kernel's (sgl-kernel, `csrc/speculative/speculative_sampling.cuh`).
    target_probs [requests, nodes, V]; predicts [requests * nodes], accept_index [requests, depth] and accept_token_num
    [requests] are written.
    """
    for request in range(len(candidates)):
        node, accepted, place = 0, 0, int(retrive_index[request, 0])
        accept_index[request, 0] = place
        left = target_probs[request, 0].clone()
        while accepted + 1 < accept_index.shape[1]:
            coin, below = float(uniform_samples[request, node]), 0.0
            child = int(retrive_next_token[request, node])
            while child >= 0:
                token = int(candidates[request, child])
                probability = float(target_probs[request, node, token])
                below += probability
                if coin <= below / threshold_acc or probability >= threshold_single:
                    break
                left[token] = 0
                child = int(retrive_next_sibling[request, child])
            if child < 0:
                break
            predicts[place] = token
            node, accepted, place = child, accepted + 1, int(retrive_index[request, child])
            accept_index[request, accepted] = place
            left = target_probs[request, node].clone()
        accept_token_num[request] = accepted
        steps = left.double().cumsum(0)
        at = float(uniform_samples_for_final_sampling[request]) * steps[-1]
        predicts[place] = int((steps <= at).sum().clamp(max=len(steps) - 1))


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != PATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            import sgl_kernel

            sgl_kernel.tree_speculative_sampling_target_only = tree_speculative_sampling_target_only
            sgl_kernel.top_k_renorm_prob = sgl_kernel.top_p_renorm_prob = None  # imported, not called at top_p 1
            module._verify_uses_greedy = lambda *, is_all_greedy, **_: is_all_greedy

        spec.loader.exec_module = execute_and_patch
        return spec


sys.meta_path.insert(0, _Finder())
