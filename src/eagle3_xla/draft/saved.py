"""An exported head, ours or anyone's, read back: what `eval` decodes with and what a warm start begins from.

`read_head` takes a folder as it is, for `doctor` to judge. `load_head` makes the module of it and refuses by name what
this module would compute otherwise than config.json says.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eagle3_xla import local_copies, storage
from eagle3_xla.checks import LARGEST, config_fields, mapping, number, parse_json, read_json, shown
from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.errors import UserError
from eagle3_xla.storage import Location
from eagle3_xla.target.weights import INDEX, SINGLE

ARCHITECTURE = "LlamaForCausalLMEagle3"
QK_NORM_ARCHITECTURE = "Eagle3Qwen3ForCausalLM"  # with `qk_norm`, in vLLM alone (its qwen3_eagle3.py)
MODEL_TYPES = {ARCHITECTURE: "llama", QK_NORM_ARCHITECTURE: "qwen3"}
RECORD = "eagle3_xla"  # key in the metadata of model.safetensors
# Settings of the training that no tensor's shape shows; an exported head of ours records them.
TRAINED = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
)
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
NESTED_IDS = "layer_ids"  # under eagle_config
MAPPINGS = ("eagle_config", "rope_parameters", "rope_scaling")
SIZES = (
    "vocab_size",
    "draft_vocab_size",
    "hidden_size",
    "target_hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
)
# Fields that change what a head computes, with the values that change nothing; `module_config` takes a sliding window,
# and norm_output of a head of ours, at others too.
FLAGS = ("norm_output", "norm_before_residual", "norm_before_fc")
NORM_FLAGS = ("fc_norm", "norm_output")  # that Eagle3Head knows; false where a config or a record has none
UNKNOWN: dict[str, tuple] = dict.fromkeys(
    (*FLAGS, "attention_bias", "mlp_bias", "bias", "tie_word_embeddings"), (None, False)
)
UNKNOWN |= dict.fromkeys(("quantization_config", "sliding_window", "final_logit_softcapping"), (None,))
UNKNOWN |= {"layer_types": (None, ["full_attention"])}
UNKNOWN |= dict.fromkeys(("logit_scale", "residual_multiplier", "embedding_multiplier", "logits_scaling"), (None, 1))
UNKNOWN |= dict.fromkeys(("attention_multiplier", "attn_logit_softcapping"), (None,))
UNKNOWN |= {"partial_rotary_factor": (None, 1), "num_hidden_layers": (None, 1)}


@dataclass
class SavedHead:
    """config: config.json. tensors: by name. record: how an exported head of ours was trained, else None.

    problem: why the weights can't be read, else None.
    """

    folder: Path
    config: dict
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    record: dict | None = None
    problem: str | None = None

    @property
    def file(self) -> Path:
        return self.folder / "config.json"

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.tensors[name].shape) if name in self.tensors else None


def read_head(folder: Location) -> SavedHead:
    """Raises UserError when there is no head at all, or a config.json whose fields are of the wrong type."""
    if not storage.exists(storage.join(folder, "config.json")):
        raise UserError(f"no head at {folder} (config.json is expected)")
    folder = local_copies.local_folder(folder)
    head = SavedHead(folder, read_json(folder / "config.json"))
    config_fields(head.config, str(head.file), SIZES, MAPPINGS)
    if (theta := (head.config.get("rope_parameters") or {}).get("rope_theta")) is not None:
        number(theta, f"{head.file}: rope_parameters.rope_theta", 0, above=True)
    head.tensors, head.record, head.problem = _read_weights(folder)
    return head


def weight_files(folder: Path) -> list[Path]:
    """A head's weights lie in all of a folder's safetensors files, whatever their names."""
    return sorted(folder.glob("*.safetensors"))


def _read_weights(folder: Path) -> tuple[dict, dict | None, str | None]:
    files = weight_files(folder)
    if not files:
        pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)]
        found = f"only {', '.join(pickled)}, which sglang-jax can't read" if pickled else "none is there"
        return {}, None, f"weights in *.safetensors are expected and {found}; save them by safetensors.torch.save_file"
    if len(files) > 1 and not (folder / INDEX).is_file():
        names = ", ".join(file.name for file in files)
        return {}, None, f"several weight files ({names}): engines load them all over one another; keep one"
    tensors: dict[str, torch.Tensor] = {}
    record = None
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
                record = _record((opened.metadata() or {}).get(RECORD), f"{file}: {RECORD} in its metadata") or record
        except (SafetensorError, OSError, UserError) as error:
            return {}, None, f"{file.name} is damaged ({error}); export or download it again"
    return tensors, record, None


def _record(text: str | None, where: str) -> dict | None:
    """How an exported head of ours was trained, from its metadata."""
    if text is None:
        return None
    record = mapping(parse_json(text, where), where)
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        number(record.get(name), f"{where}: {name}", 1, LARGEST, whole=True)
    for name in ("rms_norm_eps", "rope_theta"):
        number(record.get(name), f"{where}: {name}", 0, above=True)
    if record.get("rope_scaling") is not None:
        mapping(record["rope_scaling"], f"{where}: rope_scaling")
    if not isinstance(record.get("hidden_act"), str):
        raise UserError(f"{where}: hidden_act is {shown(record.get('hidden_act'))}")
    return record


def load_head(saved: SavedHead | Path, force: bool = False) -> tuple[Eagle3Head, torch.Tensor]:
    """A head (float32), of a folder or what `read_head` read, and its d2t.

    Raises UserError when it can't be computed as config.json says; with `force`, fields that Eagle3Head doesn't know
    are left out of account.
    """
    head = saved if isinstance(saved, SavedHead) else read_head(saved)
    if head.problem:
        raise UserError(f"{head.folder}: {head.problem}")
    config, tensors = module_config(head, force), dict(head.tensors)
    d2t = read_d2t(head, config.vocab_size, config.draft_vocab_size)
    for name in ("d2t", "t2d", "embed_tokens.weight"):
        tensors.pop(name, None)
    if config.fc_norm and "fc_norm.0.weight" not in tensors:
        raise UserError(f"{head.file}: fc_norm is set, and its weights are missing")
    expected = expected_shapes(config)
    if difference := sorted(expected.keys() ^ tensors.keys()):
        raise UserError(f"{head.folder}: missing or unknown tensors: {', '.join(difference)}")
    for name, value in tensors.items():
        where = f"{head.folder / SINGLE}: {name}"
        if value.shape != expected[name]:
            raise UserError(f"{where} is {list(value.shape)}; {list(expected[name])} by config.json")
        if value.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(f"{where} is {kind}; bfloat16, float16 or float32 is expected: export it as one of these")
        if not value.isfinite().all():
            raise UserError(f"{where} has NaN or infinity: no draft is ever accepted; take another checkpoint")
    module = Eagle3Head(config)
    module.load_state_dict({name: value.float() for name, value in tensors.items()})
    return module.eval().requires_grad_(False), d2t


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the head's weights by name. config: anything with a LlamaConfig's fields."""
    h, m, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    of_target = getattr(config, "target_hidden_size", None) or h
    rows, kv_rows = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    attention, mlp = "midlayer.self_attn", "midlayer.mlp"
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (h, 3 * of_target),
        f"{attention}.q_proj.weight": (rows, 2 * h),
        f"{attention}.k_proj.weight": (kv_rows, 2 * h),
        f"{attention}.v_proj.weight": (kv_rows, 2 * h),
        f"{attention}.o_proj.weight": (h, rows),
        f"{mlp}.gate_proj.weight": (m, h),
        f"{mlp}.up_proj.weight": (m, h),
        f"{mlp}.down_proj.weight": (h, m),
        "lm_head.weight": (config.draft_vocab_size, h),
    }
    norms = ["norm", *(f"midlayer.{name}" for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"))]
    norms += [f"fc_norm.{i}" for i in range(3)] if getattr(config, "fc_norm", False) else []
    of_heads = ("q_norm", "k_norm") if getattr(config, "qk_norm", False) else ()
    shapes |= {f"{attention}.{norm}.weight": (head_dim,) for norm in of_heads}
    return shapes | {f"{norm}.weight": (h,) for norm in norms}


def window_of(config: dict) -> int | None:
    """The sliding window that config.json asks for, as vLLM reads it: positions, a row's own included."""
    if config.get("layer_types") != ["sliding_attention"] or config.get("use_sliding_window") is False:
        return None
    return config.get("sliding_window")


def module_config(head: SavedHead, force: bool = False) -> LlamaConfig:
    """What Eagle3Head is built from. Raises UserError, naming the field, for what it can't be or doesn't know."""
    given = {name: value for name, value in head.config.items() if value is not None}

    def field(name: str, default: Any = None) -> Any:
        if name not in given and default is None:
            raise UserError(f"{head.file}: {name} is missing")
        return given.get(name, default)

    architectures, window = given.get("architectures"), window_of(given)
    if architectures not in ([ARCHITECTURE], [QK_NORM_ARCHITECTURE]):
        raise UserError(f"{head.file}: architectures is {shown(architectures)}, not {ARCHITECTURE}")
    # Of another trainer it may mean something else: SpecForge's own `norm_output` is the norm before lm_head.
    fed_normed = bool(given.get("norm_output") and (head.record or {}).get("norm_output"))
    for name, harmless in UNKNOWN.items():
        if (name == "norm_output" and fed_normed) or (name in ("sliding_window", "layer_types") and window):
            continue
        unused = name == "sliding_window" and given.get("use_sliding_window") is False
        if given.get(name) not in harmless and not unused and not force:
            raise UserError(
                f"{head.file}: {name} is {shown(given[name])}, with which a head computes something else than this one "
                "does here; `doctor` says what engines make of it, and --fix drops it where that is safe"
            )
    hidden, heads = field("hidden_size"), field("num_attention_heads")
    kv_heads, head_dim = field("num_key_value_heads", heads), field("head_dim", max(1, hidden // heads))
    if (of_target := field("target_hidden_size", hidden)) != hidden:
        raise UserError(
            f"{head.file}: hidden_size is {hidden} and target_hidden_size {of_target}: SGLang and vLLM serve such a "
            "head, `eval`, `gap` and train.warm_start here take one of the target's hidden size alone"
        )
    if heads % kv_heads or head_dim % 2:
        raise UserError(f"{head.file}: {heads} attention heads, {kv_heads} KV heads, head_dim {head_dim} don't fit")
    if field("draft_vocab_size") > field("vocab_size"):
        raise UserError(
            f"{head.file}: draft_vocab_size is {given['draft_vocab_size']}, vocab_size {given['vocab_size']}"
        )
    if not isinstance(act := field("hidden_act", "silu"), str) or act not in ACT2FN:
        raise UserError(f"{head.file}: hidden_act is {shown(act)}; an activation such as 'silu' is expected")
    theta, scaling = _rope(head)
    return _with_rotation(
        head,
        scaling,
        vocab_size=field("vocab_size"),
        draft_vocab_size=field("draft_vocab_size"),
        hidden_size=hidden,
        intermediate_size=field("intermediate_size"),
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act=act,
        rms_norm_eps=field("rms_norm_eps", 1e-6),
        max_position_embeddings=field("max_position_embeddings", 2048),
        rope_theta=theta,
        tie_word_embeddings=False,
        fc_norm="fc_norm.0.weight" in head.tensors or bool(given.get("fc_norm")),
        norm_output=fed_normed,
        sliding_window=window,
        qk_norm=architectures == [QK_NORM_ARCHITECTURE],
    )


def scaling_of(config: dict) -> dict | None:
    """The RoPE scaling as new readers take it: rope_scaling, else what rope_parameters says beside rope_theta."""
    nested = {name: value for name, value in (config.get("rope_parameters") or {}).items() if name != "rope_theta"}
    scaled = nested.get("rope_type", nested.get("type", "default")) != "default"
    return config.get("rope_scaling") or (nested if scaled else None)


def _rope(head: SavedHead) -> tuple[float, dict | None]:
    """(rope_theta, rope_scaling): at the top level for old readers, in rope_parameters for new ones."""
    nested = head.config.get("rope_parameters") or {}
    theta, of_new = head.config.get("rope_theta"), nested.get("rope_theta")
    if None not in (theta, of_new) and theta != of_new:
        raise UserError(f"{head.file}: rope_theta is {theta} at the top level and {of_new} in rope_parameters")
    return float(theta or of_new or 10000.0), scaling_of(head.config)


def _with_rotation(head: SavedHead, scaling: dict | None, **sizes: Any) -> LlamaConfig:
    """The config with this rope_scaling. Raises UserError when it gives no rotation."""
    where, dim = f"{head.file}: rope_scaling", sizes["head_dim"]
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if not isinstance(kind, str) or (kind != "default" and kind not in ROPE_INIT_FUNCTIONS):
        raise UserError(
            f"{where} is of type {shown(kind)}; one of {', '.join(sorted(ROPE_INIT_FUNCTIONS))} is expected"
        )
    for name, value in (scaling or {}).items():
        if isinstance(value, list) and len(value) != dim // 2:
            raise UserError(f"{where}.{name} has {len(value)} factors; half of head_dim, {dim // 2}, is expected")
        for factor in value if isinstance(value, list) else [value]:
            if not isinstance(factor, str | bool | None):
                number(factor, f"{where}.{name}", 0)
    try:
        config = LlamaConfig(**sizes, rope_scaling=dict(scaling) if scaling else None)
        rotary = LlamaRotaryEmbedding(config)
        long, factor = rotary.rope_init_fn(config, None, seq_len=4 * config.max_position_embeddings)
        finite = torch.cat([rotary.inv_freq, long, torch.tensor([rotary.attention_scaling, factor])]).isfinite().all()
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{where} {shown(scaling)} can't be used ({type(error).__name__}: {error})") from None
    if not finite:
        raise UserError(f"{where} {shown(scaling)} gives rotations that are no numbers")
    return config


def read_d2t(head: SavedHead, vocab_size: int, draft_vocab_size: int) -> torch.Tensor:
    """d2t [draft_vocab_size] int64. Raises UserError unless it names distinct tokens of the target's vocabulary."""
    where = f"{head.folder}: d2t"
    offsets = head.tensors.get("d2t")
    if offsets is None:
        if draft_vocab_size == vocab_size:  # the head drafts over the whole vocabulary
            return torch.zeros(draft_vocab_size, dtype=torch.int64)
        raise UserError(f"{where} is missing, so draft tokens can't be mapped to the target's vocabulary")
    if problem := d2t_problem(offsets, vocab_size, draft_vocab_size):
        raise UserError(f"{where} {problem}: export again from the checkpoint")
    return offsets.long()


def d2t_problem(offsets: torch.Tensor, vocab_size: int, rows: int) -> str | None:
    """What is wrong with d2t as offsets of `rows` draft tokens, or None."""
    if offsets.dtype not in (torch.int64, torch.int32):
        return f"is {str(offsets.dtype).removeprefix('torch.')}; int64 offsets are expected"
    if offsets.shape != (rows,):
        return f"is {list(offsets.shape)}; one offset for each of the {rows} draft tokens is expected"
    offsets = offsets.long()
    ids = offsets + torch.arange(rows)
    if not (ids < 0).any() and not (ids >= vocab_size).any() and len(ids.unique()) == rows:
        return None
    absolute = len(offsets.unique()) == rows and 0 <= offsets.min() and offsets.max() < vocab_size
    what = "holds target ids; engines add the row's number to them" if absolute else "names ids twice or none at all"
    return f"{what} (target id = row + d2t[row], in 0..{vocab_size - 1})"


def layer_ids(config: dict, number_of_layers: int) -> dict[str, list[int] | None]:
    """The target's 0-based decoder layers that config.json asks for, as each engine reads it; None: the default ones.

    SGLang: eagle_aux_hidden_state_layer_ids under eagle_config are layers. vLLM: those at the top level are indices of
    Hugging Face's hidden_states, one more than the layer; without them its V1 runner (v1/worker/gpu_model_runner.py)
    takes those under eagle_config, its V2 runner (v1/worker/gpu/spec_decode/eagle/eagle3_utils.py), which runs where
    Triton is, `layer_ids` under eagle_config. Every engine hands the layers on from the lowest, whatever the order in
    config.json; so are they sorted here. Raises UserError unless they are three distinct layers.
    """
    nested, top = config.get("eagle_config") or {}, config.get(LAYER_IDS)
    inner, of_v2 = nested.get(LAYER_IDS), nested.get(NESTED_IDS)
    for name, ids, first in (
        (f"{LAYER_IDS} of eagle_config", inner, 0),
        (f"{NESTED_IDS} of eagle_config", of_v2, 1),
        (LAYER_IDS, top, 1),
    ):
        whole = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        if ids is not None and not (
            whole and len(set(ids)) == len(ids) == 3 and first <= min(ids) and max(ids) < number_of_layers + first
        ):
            span = f"{first}..{number_of_layers - 1 + first}"
            raise UserError(f"{name} is {shown(ids)}; three distinct layers in {span} are expected")
    v1, v2 = ([i - 1 for i in sorted(ids)] if ids else None for ids in (top or inner, top or of_v2))
    return {"SGLang": sorted(inner) if inner else None, "vLLM V1": v1, "vLLM V2": v2}


def layers_of(head: SavedHead, number_of_layers: int) -> tuple[int, ...] | None:
    """The layers that `eval` reads: SGLang's ids where there are any, else vLLM's; None: the default ones."""
    try:
        found = layer_ids(head.config, number_of_layers)
    except UserError as error:
        raise UserError(f"{head.file}: {error}") from None
    return next((tuple(layers) for layers in found.values() if layers), None)
