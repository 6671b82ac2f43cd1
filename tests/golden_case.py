"""One golden file of SpecForge's own training step: inputs, weights, per-step losses, accuracies, gradients."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlamaConfig

from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.loss.config import LossConfig
from eagle3_xla.loss.unroll import teacher_positions, unroll
from eagle3_xla.target.model import Teacher

FILES = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))
OBJECTIVE = {None: "kl", "alpha": "lk_alpha", "lambda": "lk_lambda"}


class GoldenCase:
    def __init__(self, file: Path):
        with safe_open(file, "pt") as f:
            self.tensors = {key: f.get_tensor(key) for key in f.keys()}
            sizes = json.loads(f.metadata()["config"])
        config = LlamaConfig(
            **{k: sizes[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")},
            **{k: sizes[k] for k in ("head_dim", "vocab_size", "draft_vocab_size", "rms_norm_eps", "rope_theta")},
            fc_norm=sizes.get("fc_norm", False),
        )
        self.head = Eagle3Head(config)
        weights = self.group("w.")
        self.d2t, self.t2d, self.embedding = (weights.pop(k) for k in ("d2t", "t2d", "embed_tokens.weight"))
        self.head.load_state_dict(weights)
        self.loss = LossConfig(
            ttt_length=sizes["ttt_length"],
            objective=OBJECTIVE[sizes["lk_loss_type"]],
            rows="specforge",
            mean_over="all",
        )
        raw = self.group("raw.")
        loss_mask = raw["loss_mask"].bool()
        loss_mask[:, -1] = False  # SpecForge's normalize_offline_sample
        length = loss_mask.shape[1]
        self.batch = {
            "input_ids": raw["input_ids"],
            "position_ids": torch.arange(length).expand_as(loss_mask),
            "document_ids": raw["attention_mask"],
            "loss_mask": loss_mask,
        }
        self.aux = raw["aux_hidden_states"]
        self.teacher_hidden, self.lm_head = raw["target_last_hidden"], raw["target_lm_head"]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v.clone() for k, v in self.tensors.items() if k.startswith(prefix)}

    def to(self, device) -> "GoldenCase":
        self.head.to(device)
        for name in ("d2t", "t2d", "embedding", "aux", "teacher_hidden", "lm_head"):
            setattr(self, name, getattr(self, name).to(device))
        self.batch = {k: v.to(device) for k, v in self.batch.items()}
        return self

    def run(self):
        logits = self.teacher_hidden @ self.lm_head.T
        draft_ids = self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)
        everywhere = (logits[..., draft_ids], logits.logsumexp(-1), logits.argmax(-1))
        teacher = Teacher(*(teacher_positions(self.batch, x) for x in everywhere))

        def embed_tokens(ids):
            return torch.nn.functional.embedding(ids, self.embedding)

        result = unroll(self.head, embed_tokens, self.batch, self.aux, teacher, self.t2d, self.d2t, self.loss)
        result.loss.backward()
        return result

    def check(self, result) -> None:
        """Every loss, accuracy and gradient within 1e-5 relative (gradients: relative to the tensor's norm)."""

        def close(name, ours, golden):
            ours, golden = ours.detach().cpu().double(), golden.double()
            error = float((ours - golden).norm() / golden.norm().clamp_min(1e-12))
            assert error < 1e-5, f"{name}: relative error {error:.2e}"

        close("loss", result.loss.reshape(1), self.tensors["out.loss"])
        for k in range(self.loss.ttt_length):
            close(f"ploss {k}", result.step_losses[k], self.tensors["out.plosses"][k])
            close(f"accuracy {k}", result.sums.hits[k] / result.sums.drafts[k], self.tensors["out.acces"][k])
        golden_gradients = self.group("grad.")
        gradients = {name: parameter.grad for name, parameter in self.head.named_parameters()}
        assert gradients.keys() == golden_gradients.keys()
        for name, golden in golden_gradients.items():
            close(name, gradients[name], golden)
