"""The serving directory: the fields and tensors that engines read, and none that they misread."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla.data.vocab import d2t_t2d
from eagle3_xla.doctor.run import doctor
from eagle3_xla.draft.saved import load_head
from eagle3_xla.errors import UserError
from eagle3_xla.export import export


@pytest.fixture
def run(exported_head, tmp_path):
    shutil.copytree(exported_head.parent / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


def test_export(run, tmp_path):
    out = tmp_path / "head"
    assert export(run, out)["micro_step"] == 1
    config = json.loads((out / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "head_dim": 8,
        "vocab_size": 4096,
        "draft_vocab_size": 128,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    assert expected.items() <= config.items()
    assert not {"norm_output", "target_hidden_size", "eagle_config", "eagle_aux_hidden_state_layer_ids"} & config.keys()
    tensors = load_file(out / "model.safetensors")
    names = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    names |= {f"midlayer.{n}.weight" for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm")}
    names |= {f"midlayer.self_attn.{n}_proj.weight" for n in "qkvo"}
    names |= {f"midlayer.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert tensors.keys() == names
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    assert (tensors["d2t"] + torch.arange(128)).tolist() == tensors["t2d"].nonzero()[:, 0].tolist()
    head, d2t = load_head(out)
    assert torch.equal(d2t, tensors["d2t"])
    assert torch.equal(head.fc.weight, tensors["fc.weight"].float())
    export(run, out)  # writing again over our own is fine


def test_a_head_over_the_whole_vocabulary(exported_head, small_target, tmp_path):
    """vLLM has no place for a d2t there."""
    saved = checkpoints.load(exported_head.parent / "checkpoints" / "step-00000001")
    size = len(saved.t2d)
    weights = saved.head | {"lm_head.weight": torch.ones(size, 64)}
    d2t, t2d = d2t_t2d(torch.arange(size), size)
    whole = dataclasses.replace(saved, head=weights, d2t=d2t, t2d=t2d)
    export(checkpoints.save(tmp_path / "checkpoints", whole, keep=1), tmp_path / "head", "float32")
    assert not {"d2t", "t2d"} & load_file(tmp_path / "head" / "model.safetensors").keys()
    rules = doctor(tmp_path / "head", str(small_target))["rules"]
    assert {rule["status"] for rule in rules} == {"pass"}, rules
    head, of_head = load_head(tmp_path / "head")
    assert head.lm_head.out_features == size and torch.equal(of_head, d2t)


def test_a_run_gives_its_best_checkpoint(run, tmp_path):
    assert export(run, tmp_path / "head")["chosen"] == "step 1 (the newest, no tau is known)"
    saved = checkpoints.load(run / "checkpoints" / "step-00000001")
    for step, tau in ((3, 1.4), (4, 1.2)):
        checkpoints.save(run / "checkpoints", dataclasses.replace(saved, micro_step=step, tau=tau), keep=3)
    assert export(run, tmp_path / "head")["chosen"] == "step 3 (the best, held-out tau 1.400)"
    assert export(run / "checkpoints" / "step-00000004", tmp_path / "head")["chosen"] == "step 4 (as named)"
    (run / "checkpoints" / "step-00000003" / "state.safetensors").write_bytes(b"")
    assert export(run, tmp_path / "head")["micro_step"] == 4


def test_refused(run, tmp_path):
    with pytest.raises(UserError, match="not a checkpoint"):
        export(tmp_path, tmp_path / "head")
    with pytest.raises(UserError, match="not ours"):
        export(run, run)
    export(run, tmp_path / "head")
    tensors = load_file(tmp_path / "head" / "model.safetensors")
    from safetensors.torch import save_file

    save_file({k: v for k, v in tensors.items() if k != "d2t"}, tmp_path / "head" / "model.safetensors")
    with pytest.raises(UserError, match="d2t is missing"):
        load_head(tmp_path / "head")
    save_file({**tensors, "extra.weight": torch.ones(1)}, tmp_path / "head" / "model.safetensors")
    with pytest.raises(UserError, match="missing or unknown tensors: extra.weight"):
        load_head(tmp_path / "head")
