"""What a run can do beside the plain thing, by name, as settings for `whole_runs.recipe_of`."""

from whole_runs import SEQ_LEN


def stages_with(state: str, **second) -> list[dict]:
    """Return three stages: other mixtures, rates and batches."""
    return [
        {"name": "a", "train": {"steps": 4}},
        {
            "name": "b", "train": {"steps": 3, "global_batch_tokens": SEQ_LEN * 5, "micro_batch_size": 2},
            "data": {"mixture": {"alpha": 0.2, "beta": 0.8}}, "optimizer": {"lr": 1e-3}, "optimizer_state": state,
            "schedule": {"name": "linear", "warmup": 1},
        } | second,
        {"name": "c", "train": {"steps": 3}, "schedule": {"name": "constant", "warmup": 0}, "optimizer_state": state},
    ]  # fmt: skip


MOVING = {
    "rule": "paper", "every": 2, "tokens_per_domain": 40, "step_size": 40.0, "reference": {"alpha": 4.0, "beta": 4.1},
}  # fmt: skip
SCHEDULES = {
    "constant": {"warmup": 3, "start_lr_ratio": 0.5},
    "linear": {"min_lr_ratio": 0.0},
    "cosine": {"warmup": 0.25},
    "one_minus_sqrt": {},
    "exponential": {"half_life": 3},
    "inverse_sqrt": {"warmup": 2},
    "wsd": {"warmup": 1, "decay": 3},
    "infinite": {"warmup": 1, "cooldown": 3, "decay": 2, "cooldown_shape": "inverse_sqrt"},
    "neox_cosine": {"warmup": 2},
}
FEATURES = {
    "plain": {},
    "ramp": {"data.mixture": {"alpha": 0.8, "beta": 0.2}, "data.ramp": {"start": {"beta": 1.0}, "over": 6}},
    "temperature": {"data.mixture": None, "data.temperature": 3.0},
    "reweight": {"reweight": MOVING},
    "reweight by the best": {"reweight": MOVING | {"rule": "bounded", "reference": "best", "every": 3}},
    "reweight by the source": {"reweight": MOVING | {"rule": "doremi", "reference": "source"}},
    "exhausted": {"data.max_epochs": {"alpha": 0.035}, "data.exhausted": "redistribute"},
    "replay": {"replay": {"run": "EARLIER", "fraction": 0.3}},
    "replay from an offset": {"replay": {"run": "EARLIER", "fraction": 0.3, "order": "offset", "offset": 0.8}},
    "replay reshuffled, twice": {"replay": {"run": "EARLIER", "fraction": 0.7, "order": "reshuffled", "repeat": True},
                                 "train.steps": 14},
    "replay and reweight": {"replay": {"run": "EARLIER", "fraction": 0.3}, "reweight": MOVING},
    "proxy": {"replay": {"data": "DATA", "fraction": 0.3, "order": "reshuffled"}},
    "odd micro-batches": {"train.micro_batch_size": 3, "train.global_batch_tokens": SEQ_LEN * 7},
    "document mask": {"data.document_mask": True},
    "document mask and best fit": {"data.document_mask": True, "data.packing": "best_fit", "data.seq_len": 48,
                                   "train.global_batch_tokens": 48 * 4},
    "muon": {"optimizer.name": "muon"},
    "muon and ema": {"optimizer.name": "muon", "average": {"decay": 0.9}},
    "ema": {"average": {"method": "ema", "decay": 0.8, "start": 2}},
    "ema of every second": {"average": {"method": "ema", "decay": 0.8, "every": 2}},
    "uniform": {"average": {"method": "uniform", "start": 0.3, "every": 2}},
    "scales": {"optimizer.lr_scales": {"0": 0.5, "embedding": 0.0}, "optimizer.decay": "all",
               "optimizer.grad_clip": 0.0},
    "bf16": {"train.precision": "bf16"},
    "bf16, muon, accumulation": {"train.precision": "bf16", "optimizer.name": "muon", "train.micro_batch_size": 3},
    "dropout": {"source": "GPT2", "inherit.layers": 3},
    "dropout and accumulation": {"source": "GPT2", "inherit.layers": 3, "train.micro_batch_size": 3},
    "dropout, ema, reweight": {"source": "GPT2", "inherit.layers": 3, "average": {"decay": 0.5}, "reweight": MOVING},
    "random": {"inherit.init": "random"},
    "control": {"control": True},
    "control of moving weights": {"control": True, "reweight": MOVING},
    "stages": {"stages": stages_with("keep")},
    "stages that reset": {"stages": stages_with("reset")},
    "stages that keep the moments": {"stages": stages_with("moments")},
    "stages of muon": {"stages": stages_with("moments"), "optimizer.name": "muon"},
    "stages from muon to adamw": {"stages": stages_with("reset", optimizer={"name": "muon", "lr": 1e-3})},
    "stages with an average": {"stages": stages_with("keep"), "average": {"method": "uniform", "start": 3}},
    "stages that replay": {"stages": stages_with("keep", replay={"stage": "a", "fraction": 0.4})},
    "stages that replay by the top level": {"stages": stages_with("keep"),
                                            "replay": {"run": "EARLIER", "fraction": 0.2}},
    "stages that reweight": {"stages": stages_with("keep", reweight=MOVING)},
    "stages that all reweight": {"stages": stages_with("reset"), "reweight": MOVING},
    "stages of other lengths": {"stages": stages_with("keep", data={"seq_len": 12}, train={"steps": 3})},
    "stages with dropout": {"stages": stages_with("moments"), "source": "GPT2", "inherit.layers": 3},
    "stages with a control": {"stages": stages_with("keep", reweight=MOVING), "control": True},
    "distill": {"distill": {"weight": 0.7, "temperature": 2.0}, "train.z_loss": 1e-3},
    "distill, fading": {"distill": {"loss": "reverse_kl", "top_k": 5, "schedule": "linear", "until": 5}},
    "distill from a wider teacher": {"distill": {"teacher": "WIDE", "hidden": {"loss": "cosine"}},
                                     "train.precision": "bf16", "train.micro_batch_size": 3},
    "distill hidden states": {"distill": {"weight": 0.0, "hidden": {"layers": "same"}, "schedule": "cosine"},
                              "source": "GPT2", "inherit.layers": 3},
    "distill in stages with a control": {"distill": {"loss": "jensen_shannon", "schedule": "linear", "until": 6},
                                         "stages": stages_with("keep"), "control": True},
    "distill, faded before a stage that resets": {
        "distill": {"teacher": "WIDE", "hidden": {}, "schedule": "linear", "until": 4},
        "stages": stages_with("reset")[:2] + stages_with("keep")[2:]},
    "branch with a teacher of its own": {"branch": {"run": "EARLIER"},
                                         "distill": {"teacher": "WIDE", "hidden": {}}},
    "distill documents": {"distill": {"hidden": {}}, "data.document_mask": True},
    "branch": {"branch": {"run": "EARLIER"}, "schedule": {"name": "linear", "warmup": 0}},
    "branch with the moments": {"branch": {"run": "EARLIER", "step": 6}, "optimizer_state": "moments"},
    "branch of stages": {"branch": {"run": "EARLIER", "step": 3}, "stages": stages_with("keep")},
} | {f"schedule {name}": {"schedule": {"name": name} | keys} for name, keys in SCHEDULES.items()}  # fmt: skip
