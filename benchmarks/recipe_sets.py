"""The sets of recipes that recipes.py compares: what is set in each beside what all runs have in common."""

# What all runs have in common: one pass over the chats; the rest is the quickstart's recipe.
COMMON = {
    "data.workers": "1",  # runs stand beside each other
    "train.epochs": "1",
    "train.batch_size": "2",
    "train.init_rows": "400",
    "train.heldout_rows": "64",
    "train.save_every": "1000000",
    "train.keep": "1",
    "train.tracker": "none",
}
DEVICE = {  # and what belongs to --device; bfloat16: the quickstart's, where the processor multiplies it itself
    "cuda": {
        "xla.device": "cuda",
        "target.dtype": "bfloat16",
        "xla.autocast": "true",
        "train.reuse_states": "false",
    },
    "cpu": {"xla.device": "cpu", "target.dtype": "float32", "xla.autocast": "false", "train.reuse_states": "true"},
    "bfloat16": {"xla.device": "cpu", "target.dtype": "bfloat16", "xla.autocast": "true", "train.reuse_states": "true"},
    "xla": {"xla.device": "xla", "target.dtype": "float32", "xla.autocast": "false", "train.reuse_states": "true"},
}
OF_TARGET = {f"draft.{name}": "0" for name in ("attention_heads", "key_value_heads", "head_dim")}
# The plain reference: KL over all positions that the mask of the answer marks, everything random, torch's own start,
# attention heads as the target has them, and the published runs' TTT length.
REFERENCE = OF_TARGET | {
    "loss.ttt_length": "7",
    "train.init": "random",
    "train.lr": "8e-4",
    "loss.rows": "specforge",
    "train.beta2": "0.999",
    "patch": "plain_start",
}
SETS: dict[str, dict[str, dict[str, str]]] = {
    "default": {
        "reference": REFERENCE,
        "default": {},
        "default, 2 passes": {"train.epochs": "2"},
        "reference, 2 passes": REFERENCE | {"train.epochs": "2"},
    },
    "heads": {"default": {}, "attention heads as the target's": OF_TARGET},
    "start": {
        "default": {},
        "lm_head and norm the target's": {"train.init": "target", "train.lr": "5e-4"},
        "random, inputs scaled": {"train.init": "random", "train.lr": "5e-4"},
        "random, torch's own": {"train.init": "random", "train.lr": "5e-4", "patch": "plain_start"},
        "frozen lm_head": {"patch": "frozen_lm_head"},
    },
    "loss": {
        "default": {},
        "mean over sequences": {"loss.mean_over": "sequences"},
        "EAGLE-3.1": {"draft.variant": "eagle3.1"},
        "anchors 0.5": {"loss.anchors": "0.5"},
        "anchors 0.25": {"loss.anchors": "0.25"},
        "rows as SpecForge": {"loss.rows": "specforge"},
        "tv": {"loss.objective": "tv"},
        "lk_alpha": {"loss.objective": "lk_alpha"},
        "lk_lambda": {"loss.objective": "lk_lambda"},
        "kl + tv": {"loss.objective": "kl + tv"},
        "reverse_kl": {"loss.objective": "reverse_kl"},
        "decay 0.6": {"loss.decay": "0.6"},
        "decay 1": {"loss.decay": "1.0"},
        "TTT 1": {"loss.ttt_length": "1"},
        "TTT 3": {"loss.ttt_length": "3"},
        "TTT 7": {"loss.ttt_length": "7"},
        "TTT length grows over half": {"loss.ttt_warmup": "0.5"},
    },
    "optimizer": {
        "default": {},
        "lr 5e-5": {"train.lr": "5e-5"},
        "lr 2e-4": {"train.lr": "2e-4"},
        "lr 3e-4": {"train.lr": "3e-4"},
        "lr 2e-4, TTT 3": {"train.lr": "2e-4", "loss.ttt_length": "3"},
        "lr 3e-4, TTT 3": {"train.lr": "3e-4", "loss.ttt_length": "3"},
        "lr 5e-4": {"train.lr": "5e-4"},
        "beta2 0.99": {"train.beta2": "0.99"},
        "beta2 0.999": {"train.beta2": "0.999"},
        "weight decay 0.1": {"train.weight_decay": "0.1"},
        "warm-up 10%": {"train.warmup": "0.1"},
        "1 row an update": {"train.batch_size": "1"},
        "1 row an update, lr 2e-4": {"train.batch_size": "1", "train.lr": "2e-4"},
        "4 rows an update": {"train.batch_size": "4"},
        "8 rows an update": {"train.batch_size": "8"},
        "EMA 0.99": {"patch": "ema"},
        "noise on aux states": {"patch": "noise"},
        "dropout on aux states": {"patch": "dropout"},
    },
    "muon": {
        "default": {},
        "Muon": {"train.optimizer": "muon"},
        "Muon, lr 5e-5": {"train.optimizer": "muon", "train.lr": "5e-5"},
        "Muon, lr 2e-4": {"train.optimizer": "muon", "train.lr": "2e-4"},
        "Muon, TTT 3": {"train.optimizer": "muon", "loss.ttt_length": "3"},
        "Muon, 4 rows an update": {"train.optimizer": "muon", "train.batch_size": "4"},
    },
    "data": {
        "default": {},
        "draft vocabulary 4,096": {"data.draft_vocab_size": "4096"},
        "draft vocabulary 16,384": {"data.draft_vocab_size": "16384"},
        "30,000 tokens, 2 passes": {"data.max_tokens": "30000", "train.epochs": "2"},  # against --tokens 60000, once
        "15,000 tokens, 4 passes": {"data.max_tokens": "15000", "train.epochs": "4"},
        "system prompts varied": {"data.vary_system": "0.5"},
        "rows of 512": {"data.row_length": "512", "train.batch_size": "1"},
    },
    # With --train: more chats than are shipped (`eagle3-xla regenerate` with another seed).
    "tokens": {
        "130,000 tokens": {"data.max_tokens": "130000"},
        "260,000 tokens": {"data.max_tokens": "260000"},
        "520,000 tokens": {"data.max_tokens": "520000"},
        "1,000,000 tokens": {"data.max_tokens": "1000000"},
        "2,000,000 tokens": {"data.max_tokens": "2000000"},
        "all": {},
        "all, 3 passes": {"train.epochs": "3"},
        "all, 3 passes, 8 rows an update, lr 4e-4": {
            "train.epochs": "3",
            "train.batch_size": "8",
            "train.lr": "4e-4",
        },
    },
}
