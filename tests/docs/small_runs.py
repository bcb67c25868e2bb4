"""What makes a run of the documents a short one."""

SMALL = {
    "train.steps": 2,
    "train.global_batch_tokens": 96,
    "data.seq_len": 24,
    "train.precision": "fp32",
    "evaluate.tokens_per_domain": 48,
}
