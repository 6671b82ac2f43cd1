"""The configs that ship: every tensor of the published checkpoints, to the last parameter."""

from importlib import resources

import pytest
import torch
from transformers import AutoModelForCausalLM

from eagle3_xla.config import load_recipe, recipe_names
from eagle3_xla.errors import UserError
from eagle3_xla.target.known import plan_config

# Of the checkpoints' index files on the hub; tied heads counted once.
PARAMETERS = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "openai/gpt-oss-20b": 20_914_757_184,
}


def parameters(target: str, layers: int) -> int:
    config = plan_config(target)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("target", PARAMETERS)
def test_shipped_configs_have_the_published_parameters(target):
    """All layers of these have the same tensors; two of a model with many experts are built faster than 48."""
    one, two = parameters(target, 1), parameters(target, 2)
    assert one + (plan_config(target).num_hidden_layers - 1) * (two - one) == PARAMETERS[target]


def test_another_owners_model_of_the_same_name_is_another_one():
    with pytest.raises(UserError, match="^no target at 'anyone/Qwen3-8B': "):
        plan_config("anyone/Qwen3-8B")


def test_every_recipe_names_a_shipped_target_and_keeps_the_rows_of_an_update():
    shipped = {folder.name for folder in (resources.files("eagle3_xla.target") / "configs").iterdir()}
    assert shipped == {target.replace("/", "--") for target in PARAMETERS}
    for recipe in map(lambda name: load_recipe(name, []), sorted({*recipe_names()} - {"base", "smollm2-cpu"})):
        assert recipe.target.path in PARAMETERS
        assert recipe.xla.dp * recipe.train.batch_size * recipe.train.gradient_accumulation == 64
