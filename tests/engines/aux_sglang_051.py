"""Aux hidden states of SGLang 0.5.1's own Qwen2ForCausalLM, one prefill on the CPU; run by that engine's Python.

aux_sglang_051.py TARGET JOB.json OUT.safetensors with JOB = {"requests": [[token ids]], "layer_ids": [null | [ids]]}.
Writes for the k-th layer ids and request i: aux.k.i [T, 3H], logits.k.i [vocabulary] of its last token. With a "head":
FOLDER also drafts.i [T, draft vocabulary], what its own LlamaForCausalLMEagle3 makes of aux.0.i, and hot_token_id.

Its server is CUDA only, so this sets up what the model runner would: tensor-parallel group of one, KV pool, batch.
"""

import json
import os
import sys
import types

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

import torch
from safetensors.torch import load_file, save_file
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.server_args import ServerArgs
from transformers import AutoConfig, AutoModelForCausalLM

from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3  # isort: skip (its imports go in circles before)

TOKENS = 128  # slots of the KV pool


def main(target: str, job: str, out: str) -> None:
    with open(job) as file:
        job = json.load(file)
    rendezvous = f"file://{os.path.abspath(out)}.rendezvous"
    init_distributed_environment(1, 0, rendezvous, local_rank=0, backend="gloo")
    initialize_model_parallel(tensor_model_parallel_size=1, backend="gloo")
    config = AutoConfig.from_pretrained(target)
    arguments = ServerArgs(model_path=target, device="cpu", attention_backend="torch_native")
    sizes = types.SimpleNamespace(hidden_size=config.hidden_size, dtype=torch.float32)
    initialize_dp_attention(server_args=arguments, model_config=sizes)
    model = Qwen2ForCausalLM(config).eval()
    weights = AutoModelForCausalLM.from_pretrained(target, torch_dtype=torch.float32).state_dict()
    model.load_weights(iter(list(weights.items())))
    tensors = {}
    for k, layer_ids in enumerate(job["layer_ids"]):
        model.set_eagle3_layers_to_capture(*[] if layer_ids is None else [layer_ids])
        output = model(*prefill(config, [torch.tensor(ids) for ids in job["requests"]]))
        aux = output.hidden_states.split([len(ids) for ids in job["requests"]])
        tensors |= {f"aux.{k}.{i}": rows.clone() for i, rows in enumerate(aux)}
        tensors |= {f"logits.{k}.{i}": row.clone() for i, row in enumerate(output.next_token_logits)}
    if "head" in job:
        requests = [torch.tensor(ids[1:] + ids[-1:]) for ids in job["requests"]]  # a draft reads the token after
        aux = torch.cat([tensors[f"aux.0.{i}"] for i in range(len(requests))])
        draft = draft_model(job["head"], model)
        input_ids, positions, batch = prefill(draft.config, requests)
        batch.spec_info = types.SimpleNamespace(hidden_states=aux)
        drafts = draft.model(input_ids, positions, batch)[0] @ draft.lm_head.weight.T
        rows = drafts.split([len(request) for request in requests])
        tensors |= {f"drafts.{i}": logits.detach().clone() for i, logits in enumerate(rows)}
        tensors["hot_token_id"] = draft.hot_token_id
    save_file(tensors, out)


def draft_model(head: str, target: Qwen2ForCausalLM) -> LlamaForCausalLMEagle3:
    """The head as its model runner loads it, with the target's embedding."""
    draft = LlamaForCausalLMEagle3(AutoConfig.from_pretrained(head)).eval()
    draft.load_weights(iter(load_file(f"{head}/model.safetensors").items()))
    draft.model.embed_tokens = target.model.embed_tokens
    return draft


def prefill(config, requests: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, ForwardBatch]:
    """Token ids, positions and batch of one prefill of all requests, from an empty cache."""
    lengths = [len(request) for request in requests]
    head_dim = config.hidden_size // config.num_attention_heads
    slots = ReqToTokenPool(size=len(requests), max_context_len=64, device="cpu", enable_memory_saver=False)
    pool = MHATokenToKVPool(
        size=TOKENS,
        page_size=1,
        dtype=torch.float32,
        head_num=config.num_key_value_heads,
        head_dim=head_dim,
        layer_num=config.num_hidden_layers,
        device="cpu",
        enable_memory_saver=False,
    )
    starts = [1 + sum(lengths[:i]) for i in range(len(lengths))]
    for i, (start, length) in enumerate(zip(starts, lengths)):
        slots.req_to_token[i, :length] = torch.arange(start, start + length, dtype=torch.int32)
    runner = types.SimpleNamespace(device="cpu", req_to_token_pool=slots, token_to_kv_pool=pool)
    backend = TorchNativeAttnBackend(runner)
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(requests),
        input_ids=torch.cat(requests),
        req_pool_indices=torch.arange(len(requests)),
        seq_lens=torch.tensor(lengths),
        out_cache_loc=torch.arange(1, 1 + sum(lengths)),
        seq_lens_sum=sum(lengths),
    )
    batch.positions = torch.cat([torch.arange(length) for length in lengths])
    batch.extend_seq_lens = batch.seq_lens
    batch.extend_seq_lens_cpu = lengths
    batch.extend_prefix_lens = torch.zeros(len(requests), dtype=torch.long)
    batch.extend_prefix_lens_cpu = [0] * len(requests)
    batch.extend_start_loc = torch.tensor([start - 1 for start in starts])
    batch.extend_num_tokens = sum(lengths)
    batch.req_to_token_pool, batch.token_to_kv_pool, batch.attn_backend = slots, pool, backend
    batch.capture_hidden_mode = CaptureHiddenMode.FULL
    batch.return_logprob = False
    backend.init_forward_metadata(batch)
    return batch.input_ids, batch.positions, batch


if __name__ == "__main__":
    main(*sys.argv[1:])
