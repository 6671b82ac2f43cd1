"""AdamW, or Muon for the matrices inside the head, with warm-up and cosine decay, all of it on the device.

Step and learning rate are device tensors and the moments exist before step 1: a Python number that changes, or a
moment that appears later, would compile the step again.
"""

import math

import torch

from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.train.config import TrainConfig
from eagle3_xla.xla.backend import Backend

EPSILON = 1e-8
MOMENTUM = 0.95  # Muon's
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of five steps that bring singular values near 1 (Jordan et al., 2024)


def by_muon(parameters: dict[str, torch.Tensor], config: TrainConfig) -> set[str]:
    """Names of those that Muon changes."""
    if config.optimizer != "muon":
        return set()
    return {name for name, p in parameters.items() if p.ndim > 1 and not name.startswith("lm_head.")}


class Optimizer:
    """AdamW, decoupled weight decay (Loshchilov & Hutter, 2019), gradient clipping by global norm.

    With `train.optimizer=muon` fc and the layer's matrices are changed by Muon instead (Jordan et al., 2024): the
    nearest orthogonal matrix to their gradients' Nesterov momentum, of the size that AdamW's update has (Liu et al.,
    2025, section 2.2), so that one learning rate serves both; AdamW has lm_head, as it chooses among tokens, and norms.
    The share of each attention head is a matrix of its own: it costs less, and with tensor parallelism it is whole on
    one device.

    head: float32 master weights; total_steps: optimizer steps of the whole run.
    lr_scale: name -> tensor that broadcasts against the parameter and multiplies its learning rate. Adam's update does
    not know the scale of a layer's inputs; dividing the rate of an input column by the input's RMS is the same as
    training on normalised inputs, and the exported weights stay plain.
    state: what `state()` returned earlier; it replaces moments, step and, where none is given, lr_scale.
    """

    def __init__(
        self,
        head: Eagle3Head,
        config: TrainConfig,
        total_steps: int,
        backend: Backend,
        lr_scale: dict[str, torch.Tensor],
        state: dict[str, torch.Tensor] | None = None,
    ):
        self.parameters: dict[str, torch.Tensor] = dict(head.named_parameters())
        self.head_dim = head.config.head_dim
        self.config = config
        self.backend = backend
        self.total_steps = total_steps
        self.warmup_steps = max(1, round(config.warmup * total_steps))
        state = state or {"step_count": torch.zeros(())}
        lr_scale = lr_scale or {n[len("lr_scale.") :]: t for n, t in state.items() if n.startswith("lr_scale.")}
        self.step_count = backend.replicate(state["step_count"])
        self.lr_scale = {name: backend.replicate(scale) for name, scale in lr_scale.items()}
        self.by_muon = by_muon(self.parameters, config)
        self.first, self.second = (
            {
                name: backend.like(state.get(f"{moment}.{name}", torch.zeros(p.shape)), p)
                for name, p in self.parameters.items()
                if moment == "first" or name not in self.by_muon
            }
            for moment in ("first", "second")
        )

    def lr(self, step: torch.Tensor) -> torch.Tensor:
        """Learning rate of optimizer step `step` (a scalar tensor, 1 for the first)."""
        warm = step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + torch.cos(math.pi * progress.clamp(0, 1)))
        return self.config.lr * torch.minimum(warm, cosine)

    def lr_at(self, micro_step: int) -> float:
        """The same on the host, for logs: of the last update within `micro_step` micro-steps."""
        return float(self.lr(torch.tensor(float(max(1, micro_step // self.config.gradient_accumulation)))))

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """One update from the parameters' gradients; returns the gradients' global norm, a device scalar."""
        config = self.config
        self.step_count.add_(1)
        lr = self.lr(self.step_count)
        gradients = {name: p.grad.float() for name, p in self.parameters.items()}
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        clip = (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        bias1 = 1 - config.beta1**self.step_count
        bias2 = 1 - config.beta2**self.step_count
        # In the order in which torch_xla numbers the step's arguments: weights from the last layer to the first, then
        # the moments likewise, the second before the first. XLA lets the n-th output of a size take the buffer of the
        # n-th argument of that size, and copies what it takes too early.
        for name, parameter in reversed(self.parameters.items()):
            gradient, rate = gradients[name].mul_(clip), lr
            if name in self.by_muon:
                momentum = gradient.lerp(gradient.lerp(self.first[name], MOMENTUM), MOMENTUM)
                update = self._orthogonal(name.split(".")[-2], momentum)
                if name in self.lr_scale:  # by column, their mean is 1: what is orthogonal has no scale of its own
                    rate = lr * self.lr_scale[name] / self.lr_scale[name].mean()
            else:
                first = self.first[name].mul(config.beta1).add_(gradient, alpha=1 - config.beta1)
                second = self.second[name].mul(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
                # In place: each new tensor would be written to memory once more, and that is what a CPU waits for here.
                update = first.div_(bias1).div_(second.div_(bias2).sqrt_().add_(EPSILON))
                if name in self.lr_scale:
                    rate = lr * self.lr_scale[name]
            if parameter.ndim > 1:  # norms are not decayed
                parameter.mul_(1 - lr * config.weight_decay)
            parameter.sub_(rate * update)
        for name, gradient in reversed(gradients.items()):
            beta1 = MOMENTUM if name in self.by_muon else config.beta1
            if name in self.second:
                self.second[name].mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
            self.first[name].mul_(beta1).add_(gradient, alpha=1 - beta1)
        return norm

    def _orthogonal(self, module: str, matrix: torch.Tensor) -> torch.Tensor:
        """Near the nearest orthogonal matrix to `matrix` [m, n], or that of each attention head's share of it; its root
        mean square is 0.2 where it has full rank. module: whose weight it is."""
        if module in ("q_proj", "k_proj", "v_proj"):
            return self._newton_schulz(matrix.unflatten(0, (-1, self.head_dim))).flatten(0, 1)
        if module == "o_proj":
            return self._newton_schulz(matrix.T.unflatten(0, (-1, self.head_dim))).flatten(0, 1).T
        return self._newton_schulz(matrix)

    def _newton_schulz(self, x: torch.Tensor) -> torch.Tensor:
        """`_orthogonal` of x [.., m, n]."""
        (a, b, c), (rows, columns) = NEWTON_SCHULZ, x.shape[-2:]
        x = x.mT if rows > columns else x  # the smaller products
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        with self.backend.autocast():
            for _ in range(5):
                gram = x @ x.mT
                x = a * x + (b * gram + c * (gram @ gram)) @ x
        x = 0.2 * max(rows, columns) ** 0.5 * x.float()
        return x.mT if rows > columns else x

    def changing(self) -> list[torch.Tensor]:
        """The tensors that a step changes besides the parameters."""
        return [*self.first.values(), *self.second.values(), self.step_count]

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a resumed run needs, by name; the tensors are the live ones."""
        moments = {f"first.{n}": t for n, t in self.first.items()} | {f"second.{n}": t for n, t in self.second.items()}
        scales = {f"lr_scale.{name}": scale for name, scale in self.lr_scale.items()}
        return moments | scales | {"step_count": self.step_count}
