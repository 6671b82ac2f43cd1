"""Other heads from training to `eval`: their files say what they were trained with, and nothing else is believed."""

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.doctor.run import doctor
from eagle3_xla.draft.config import DraftConfig
from eagle3_xla.draft.model import draft_config
from eagle3_xla.draft.saved import load_head
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import evaluate
from eagle3_xla.export import export
from eagle3_xla.target.families import load_target_config
from eagle3_xla.train.loop import train
from eagle3_xla.train.setup import set_up
from eagle3_xla.train.step import TrainStep
from eagle3_xla.train.warm_start import refuse_other_head
from eagle3_xla.xla.hosts import Hosts
from eagle3_xla.xla.plain import PlainBackend


def rule(result: dict, name: str) -> str:
    return next(finding["status"] for finding in result["rules"] if finding["rule"] == name)


def exported(folder, settings):
    recipe = load_recipe(None, settings)
    prepare(recipe)
    train(recipe, max_steps=4)
    export(folder / "run", folder / "head", "float32")
    return folder / "head"


# Attention of another shape than the target's, with more values than a row has numbers.
SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
VARIANT = "draft.variant=eagle3.1 draft.attention_heads=4 draft.key_value_heads=2 draft.head_dim=128".split()


@pytest.fixture(scope="module")
def head(small_run_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("variant")
    return exported(folder, [*small_run_in(folder), *VARIANT, "train.init=least_squares"])


def test_it_is_exported_measured_and_believed(head, small_target, chat_file):
    config, tensors = json.loads((head / "config.json").read_text()), load_file(head / "model.safetensors")
    assert config["fc_norm"] is config["norm_output"] is True and {f"fc_norm.{i}.weight" for i in range(3)} < {*tensors}
    assert config.items() >= SHAPE.items()
    loaded, _ = load_head(head)
    value = loaded.midlayer.self_attn.v_proj.weight
    assert value.shape == (256, 128) and value.norm(dim=1).min() > 0.1  # each learns
    assert loaded.config.norm_output and not torch.equal(loaded.fc_norm[0].weight, torch.ones(64))  # it was trained
    hidden = torch.randn(2, 64)
    assert torch.equal(loaded.fed_back(hidden), loaded.norm(hidden))
    result = doctor(head, str(small_target))
    assert result["ok"] and rule(result, "norm_flags") == rule(result, "fc_norm") == "warn"
    assert rule(result, "heads") == "pass"
    assert evaluate(str(small_target), str(head), str(chat_file), EvalOptions(limit=2, max_new_tokens=12))["identical"]


def test_the_flag_that_someone_took_out(head, small_target, tmp_path):
    shutil.copytree(head, tmp_path / "head")
    config = json.loads((head / "config.json").read_text())
    (tmp_path / "head" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "norm_output"}))
    result = doctor(tmp_path / "head", str(small_target))
    assert not result["ok"] and rule(result, "norm_flags") == "fail"
    doctor(tmp_path / "head", str(small_target), fix=True)
    assert json.loads((tmp_path / "head" / "config.json").read_text())["norm_output"] is True


def test_a_warm_starts_rates_are_scaled_to_what_its_fc_reads(head, small_run, tmp_path):
    doubled = shutil.copytree(head, tmp_path / "doubled")
    with safe_open(head / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(head / "model.safetensors")
    for i in range(3):
        tensors[f"fc_norm.{i}.weight"] *= 2
    save_file(tensors, doubled / "model.safetensors", metadata)
    scales = []
    for warm in (head, doubled):
        own = [*VARIANT, f"train.warm_start={warm}", f"train.out={tmp_path / 'from' / warm.name}"]
        recipe = load_recipe(None, [*small_run, *own])
        prepare(recipe)
        scales.append(set_up(recipe, [], Hosts(), ExitStack()).optimizer.lr_scale["fc.weight"])
    assert torch.equal(scales[0], 2 * scales[1])


def test_a_warm_start_from_the_other_variant_is_refused(head, small_run):
    recipe = load_recipe(None, [*small_run, f"train.warm_start={head}"])
    prepare(recipe)
    differences = r"num_attention_heads is 4, not 8 \(setting draft.attention_heads\); .*"
    differences += r"its fc_norm is True \(setting draft.variant\); its norm_output is True"
    with pytest.raises(UserError, match=differences):
        train(recipe)


def test_a_warm_start_from_other_attention_heads_or_rope_is_refused(small_target):
    wanted = draft_config(load_target_config(str(small_target)), 128)
    for same in (None, {"type": "default"}, {"rope_type": "default", "factor": None}):
        other = LlamaConfig(**wanted.to_dict() | {"rope_scaling": same})
        refuse_other_head(other, wanted, "head", None, (1, 3, 4))
    linear = [{"type": "linear", "factor": 4}, {"rope_type": "linear", "factor": 4.0}]
    refuse_other_head(*(LlamaConfig(**wanted.to_dict() | {"rope_scaling": s}) for s in linear), "head", None, (1, 3, 4))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    written = [yarn, yarn | {"beta_fast": 32, "beta_slow": 1}]  # these are what it is without them
    alike = (LlamaConfig(**wanted.to_dict() | {"rope_scaling": scaling}) for scaling in written)
    refuse_other_head(*alike, "head", None, (1, 3, 4))
    for change, line in (
        ({"head_dim": 16}, "made for another target: head_dim is 16, not 8"),
        ({"rope_scaling": linear[0]}, r"rope_scaling.factor is 4, not None; "),
    ):
        with pytest.raises(UserError, match=line):
            refuse_other_head(LlamaConfig(**wanted.to_dict() | change), wanted, "head", None, (1, 3, 4))


@pytest.fixture(scope="module")
def narrow_head(small_run_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow")
    return exported(folder, [*small_run_in(folder), "draft.window=9", "draft.qk_norm=true"])


def test_a_window_and_normed_queries(narrow_head, small_target, chat_file, tmp_path):
    config = json.loads((narrow_head / "config.json").read_text())
    assert config["architectures"] == ["Eagle3Qwen3ForCausalLM"] and config["model_type"] == "qwen3"
    assert config["sliding_window"] == 9 and config["layer_types"] == ["sliding_attention"]
    loaded, _ = load_head(narrow_head)
    assert loaded.window == 9 and not torch.equal(loaded.midlayer.self_attn.q_norm.weight, torch.ones(8))
    result = doctor(narrow_head, str(small_target))
    assert result["ok"] and rule(result, "window") == rule(result, "architecture") == "warn"
    options = EvalOptions(limit=2, max_new_tokens=12)
    assert evaluate(str(small_target), str(narrow_head), str(chat_file), options)["identical"]
    with pytest.raises(UserError, match="sees 3 positions: drafts of 5 steps don't fit"):
        evaluate(str(small_target), str(narrow_head), str(chat_file), replace(options, draft_window=3))
    for broken, of in (
        ({"layer_types": None}, "window"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "architecture"),
    ):
        shutil.copytree(narrow_head, tmp_path / of)
        (tmp_path / of / "config.json").write_text(json.dumps(config | broken))
        result = doctor(tmp_path / of, str(small_target))
        assert not result["ok"] and rule(result, of) == "fail"
        assert doctor(tmp_path / of, str(small_target), fix=True)["ok"]
        assert json.loads((tmp_path / of / "config.json").read_text()) == config


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("variant", ["draft.variant=eagle3.1", "draft.qk_norm=true"])
def test_autocast_gives_float32s_gradients(small_run, variant, remat):
    recipe = load_recipe(None, [*small_run, variant])
    prepare(recipe)
    run = set_up(recipe, [], Hosts(), ExitStack())
    batch, _ = run.data.loader.load(run.data.batches.indices(0))
    gradients = []
    for autocast in (False, True):
        xla = replace(recipe.xla, autocast=autocast, remat=remat)
        parts = (run.step.target, run.head, run.d2t, run.t2d, run.optimizer)
        TrainStep(replace(recipe, xla=xla), PlainBackend(xla), *parts)._backward(3, batch)
        gradients.append({name: parameter.grad for name, parameter in run.head.named_parameters()})
        run.head.zero_grad()
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() < 0.1 * expected.norm() > 0, name


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(0, 3, 8), (6, 3, 8), (8, 4, 7)])
def test_heads_that_do_not_fit_are_refused(small_target, heads, kv_heads, head_dim):
    with pytest.raises(
        UserError, match=f"{heads or 8} heads, {kv_heads} key-value heads, head_dim {head_dim}; the first"
    ):
        draft_config(load_target_config(str(small_target)), 128, DraftConfig("eagle3", 0, heads, kv_heads, head_dim))


def test_a_targets_heads_that_do_not_divide_its_width_are_not_taken_over(small_target):
    """As those of GLM-4.5-Air, 96 of 4,096, would not be."""
    config = load_target_config(str(small_target))
    config.num_attention_heads = config.num_key_value_heads = 6
    with pytest.raises(UserError, match="draft.attention_heads.*: 6 heads, .* must .* divide the hidden size 64"):
        draft_config(config, 128)
    assert draft_config(config, 128, DraftConfig("eagle3", 0, 4, 2, 8)).num_attention_heads == 4


def test_a_window_shorter_than_the_unroll_is_refused():
    with pytest.raises(UserError, match=r"draft.window is 3; 0, or at least loss.ttt_length \(7\)"):
        load_recipe(None, ["draft.window=3"])
