"""The settings of the training."""

from dataclasses import dataclass

from eagle3_xla.settings import setting


@dataclass
class TrainConfig:
    out: str = setting("", free=True)  # folder (or gs:// URL) of checkpoints, metrics.jsonl, tracker logs
    epochs: int = setting(3, within="[1, 1000000]")  # passes over the prepared rows
    batch_size: int = setting(4, within="[1, 65536]")  # rows per data-parallel replica in a micro-step
    gradient_accumulation: int = setting(1, within="[1, 65536]")  # micro-steps of an optimizer step
    # muon: for fc and the layer's matrices, AdamW for the rest (benchmarks/README.md)
    optimizer: str = setting("adamw", among=("adamw", "muon"))
    lr: float = setting(8e-4, within="(0, 1000]")  # at its highest; cosine decay to 0
    warmup: float = setting(0.03, within="[0, 1)")  # share of the optimizer steps
    beta1: float = setting(0.9, within="[0, 1)")  # of AdamW
    beta2: float = setting(0.95, within="[0, 1)")  # of AdamW
    weight_decay: float = setting(0.0, within="[0, inf)")  # of AdamW
    max_grad_norm: float = setting(0.5, within="(0, inf)")  # gradients are scaled down to this norm
    # target: lm_head and norm are the target's | least_squares: draft/initialise.py
    init: str = setting("target", among=("random", "target", "least_squares"))
    init_rows: int = setting(64, within="[1, inf)")  # rows whose target states shape the start
    reuse_states: bool = False  # run the target once over the data and keep its states on disk
    seed: int = setting(0, within="[0, inf)")  # of the start and the order of the rows
    log_every: int = setting(10, within="[1, inf)", free=True)  # micro-steps between rows of metrics.jsonl
    save_every: int = setting(500, within="[1, inf)", free=True)  # optimizer steps
    heldout_rows: int = setting(64, within="[0, inf)")  # rows of an evaluation, of all sources together; 0: none
    # optimizer steps between evaluations; 0: at the end of each epoch
    eval_every: int = setting(0, within="[0, inf)")
    # stop after so many evaluations without a better acceptance length; 0: never
    patience: int = setting(0, within="[0, inf)")
    # the newest checkpoints; the best by acceptance length is kept too
    keep: int = setting(2, within="[1, inf)", free=True)
    warm_start: str = ""  # an exported head whose weights and draft vocabulary the run starts from
    # of the figures in metrics.jsonl
    tracker: str = setting("tensorboard", among=("tensorboard", "wandb", "none"), free=True)
