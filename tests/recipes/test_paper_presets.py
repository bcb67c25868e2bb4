"""The presets of papers: what was published of their rates, batches, lengths, mixtures and references."""

import pytest

from scionlm.recipes.config_sweep import load_request
from scionlm.recipes.model_shapes import KNOWN_SHAPES
from scionlm.recipes.presets import load_recipe

ADAM = (0.9, 0.95)
REDPAJAMA = {
    "arxiv": 0.025, "book": 0.045, "c4": 0.15, "cc": 0.67, "github": 0.045, "stackexchange": 0.02, "wikipedia": 0.045,
}  # fmt: skip
"""Shares of LLaMA's table, which SlimPajama was sampled by too."""


def published(recipe):
    """Return what a stage's training is: peak and last rate, steps of warm-up, tokens of a batch and the optimizer."""
    (stage,) = recipe.resolved_stages
    return training_of(stage)


def training_of(stage):
    at, optimizer = stage.build_schedule().at, stage.optimizer
    last = optimizer.lr * at(stage.total_steps)
    warmup = next(t for t in range(stage.total_steps) if at(t) >= 1)
    return (
        *(optimizer.lr, last, warmup, stage.train.global_batch_tokens, stage.total_steps),
        *(optimizer.name, tuple(optimizer.betas), optimizer.weight_decay, optimizer.grad_clip),
    )


def shares(mixture):
    return pytest.approx({name: share / sum(mixture.values()) for name, share in mixture.items()})


def run_of(sweep, name):
    (found,) = [run.recipe for run in load_request(sweep).runs if run.name == name]
    return found


# Sanyal et al., 2404.08634: v4 table 6 and section F.2, the code where it is silent; OpenWebText's batches are eight
# times the 49,152 and 16,384 tokens of v2, and FineWeb's last rate, which nobody states, is OpenWebText's.
# Peak, last rate, warm-up, batch, steps, betas, weight decay, clipping.
INHERITUNE = {
    "inheritune-gpt2-medium": (3e-4, 1e-5, 2000, 8 * 49_152, 100_000, ADAM, 0.1, 1.0),
    "inheritune-gpt2-large": (2e-4, 1e-5, 2000, 8 * 16_384, 100_000, ADAM, 0.1, 1.0),
    "inheritune-gpt2-xlarge": (1.5e-4, 1e-5, 2000, 8 * 16_384, 100_000, ADAM, 0.1, 1.0),
    "inheritune-fineweb-medium": (2e-4, 1e-5, 2000, 2 * 10 * 1024 * 3, 100_000, (0.9, 0.999), 0.1, 1.0),
    "inheritune-fineweb-large": (2e-4, 1e-5, 2000, 2 * 10 * 1024 * 3, 100_000, (0.9, 0.999), 0.1, 1.0),
}
# Layers, width and heads of the reference; layers of the first child.
SHAPES = {
    "inheritune-gpt2-medium": (24, 1024, 16, 12),
    "inheritune-gpt2-large": (36, 1280, 20, 18),
    "inheritune-gpt2-xlarge": (48, 1600, 25, 24),
    "inheritune-fineweb-medium": (24, 1024, 16, 16),
    "inheritune-fineweb-large": (32, 1280, 20, 16),
}


@pytest.mark.parametrize("name", INHERITUNE)
def test_inheritune_trains_as_its_table_says(name):
    recipe = load_recipe(name)
    peak, last, warmup, batch, steps, betas, decay, clip = INHERITUNE[name]
    close = pytest.approx(last, rel=2e-3)
    assert published(recipe) == (peak, close, warmup, batch, steps, "adamw", betas, decay, clip)
    model = recipe.reference.model
    assert (model["n_layer"], model["n_embd"], model["n_head"], recipe.inherit.layers) == SHAPES[name]
    assert model["scale_attn_by_inverse_layer_idx"]
    assert (model["vocab_size"], model["resid_pdrop"], model["embd_pdrop"], model["attn_pdrop"]) == (50_304, 0, 0, 0)
    assert (recipe.data.seq_len, recipe.grow.by, recipe.reference.train) == (1024, 2, None)
    assert (recipe.grow.base, recipe.grow.init) == ("source", "source_next")


@pytest.mark.parametrize(("name", "layers"), [("inheritune-openllama-3b", 13), ("inheritune-llama2-7b", 7)])
def test_inheritune_of_a_released_model_sees_eight_epochs_of_a_billion_tokens(name, layers):
    """Version 2, appendix B: 64,000 steps of 64 sequences of 2,048; it states neither betas nor the last rate."""
    recipe = load_recipe(name)
    peak, _, warmup, batch, steps, _, _, decay, _ = published(recipe)
    assert (peak, warmup, batch, decay) == (3e-4, 1000, 64 * 2048, 0.1)
    assert steps == pytest.approx(64_000, rel=2e-3)
    assert recipe.resolved_stages[0].schedule.name == "cosine"
    assert (recipe.inherit.layers, recipe.data.seq_len) == (layers, 2048)
    assert shares(recipe.data.mixture) == REDPAJAMA


# Xia et al., 2310.06694v2: table 8, and the scaling references of the notebook.
SHEARED = {
    "1.3b": ((24, 2048, 5504, 16), (1.4449, 2.1393, 2.1251, 1.9643, 0.7459, 1.6117, 1.7590)),
    "2.7b": ((32, 2560, 6912, 20), (1.3560, 2.0325, 2.0328, 1.8712, 0.6883, 1.5353, 1.6297)),
}


@pytest.mark.parametrize("size", SHEARED)
def test_shearing_prunes_and_recovers_as_its_table_says(size):
    recipe = load_recipe(f"shear-llama2-7b-{size}")
    shape, references = SHEARED[size]
    pruning = recipe.pruning_stage
    assert training_of(pruning) == (1e-4, pytest.approx(1e-5), 320, 32 * 4096, 3200, "adamw", ADAM, 0.0, 1.0)
    assert published(recipe) == (1e-4, pytest.approx(1e-5), 1440, 256 * 4096, 48_000, "adamw", ADAM, 0.0, 1.0)
    (recovery,) = recipe.resolved_stages
    for stage, every in ((pruning, 50), (recovery, 400)):
        assert (stage.steps(stage.reweight.every), stage.reweight.rule, stage.reweight.step_size) == (every, "paper", 1)
        assert stage.reweight.reference == dict(zip(REDPAJAMA, references, strict=True))
        assert stage.data.seq_len == 4096
        assert shares(stage.data.mixture) == REDPAJAMA
    found = KNOWN_SHAPES[recipe.target.shape]
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    assert tuple(getattr(found, key) for key in keys) == shape
    assert recipe.source == "meta-llama/Llama-2-7b-hf"


# Gupta et al., 2308.04014v2, tables and section 3; the batch is its sequel's, 1104 sequences of 2,048.
BATCH = 1104 * 2048
GUPTA = {  # peak, last rate, share of the run that warms up
    "peak-half": (1.5e-4, 1.5e-5, 0.01),
    "peak-same": (3e-4, 3e-5, 0.01),
    "peak-double": (6e-4, 6e-5, 0.01),
    "constant": (3e-5, 3e-5, 0),
    "scratch": (3e-4, 3e-5, 0.01),
    "warmup-none": (3e-4, 3e-5, 0),
    "warmup-half": (3e-4, 3e-5, 0.005),
    "warmup-double": (3e-4, 3e-5, 0.02),
    "step-27000": (3e-4, 3e-5, 0.01),
    "step-27000-abrupt": (3e-4, 3e-5, 0),
    "step-10000": (3e-4, 3e-5, 0.01),
    "step-10000-abrupt": (3e-4, 3e-5, 0),
}


def test_the_runs_of_re_warming_are_those_of_the_paper():
    assert {run.name for run in load_request("continual-gupta").runs} == set(GUPTA)


@pytest.mark.parametrize("name", GUPTA)
def test_re_warming_has_the_rates_and_the_tokens_of_the_paper(name):
    recipe = run_of("continual-gupta", name)
    peak, last, warm = GUPTA[name]
    found_peak, found_last, warmup, batch, steps, *optimizer = published(recipe)
    assert (found_peak, found_last, batch, *optimizer) == (
        *(peak, pytest.approx(last), BATCH, "adamw", ADAM, 0.1, 1.0),
    )
    assert steps * batch == pytest.approx(296.86e9, rel=1e-4)
    assert warmup == pytest.approx(warm * steps, abs=1)
    assert shares(recipe.data.mixture) == REDPAJAMA
    assert (recipe.data.seq_len, recipe.optimizer.eps) == (2048, 1e-8)
    assert recipe.source == (None if name == "scratch" else f"EleutherAI/pythia-410m{revision(name)}")
    if name == "peak-same":  # the paper's figures reach the floor at 240B tokens
        at = recipe.resolved_stages[0].build_schedule().at
        assert next(t for t in range(warmup, steps) if at(t) <= 0.1 + 1e-9) * batch == pytest.approx(239e9, rel=2e-3)


def revision(name):
    return f"@step{name.split('-')[1]}" if name.startswith("step-") else ""


@pytest.mark.parametrize("name", ["infinite-cosine", "infinite-inverse-sqrt"])
def test_a_schedule_that_never_ends_is_level_at_the_middle_of_peak_and_floor(name):
    """Ibrahim et al., 2403.08763v4, section 7: 1 % of warm-up, 60 % of cool-down, level at 1.65e-4, a decay at the end.

    Of one third of the text; between cool-down and decay the rate is the same through all that comes.
    """
    first, second, third = run_of("continual-infinite", name).resolved_stages
    peak, last, warmup, batch, steps, *optimizer = training_of(first)
    assert (peak, last, batch) == (3e-4, pytest.approx(1.65e-4, rel=1e-12), BATCH)
    assert optimizer == ["adamw", ADAM, 0.1, 1.0]
    assert warmup == pytest.approx(0.01 * steps, abs=1)

    def rate(stage, share):
        return 3e-4 * stage.build_schedule().at(round(share * stage.total_steps))

    assert rate(first, 0.609) > 1.65e-4 * (1 + 1e-8)
    assert [rate(first, 0.611), rate(second, 0), rate(second, 1), rate(third, 0.85)] == pytest.approx([1.65e-4] * 4)
    assert rate(third, 0.87) < 1.6e-4
    assert rate(third, 1) == pytest.approx(3e-5)
    middle = rate(first, 0.31)  # of the cool-down: a cosine, or 1 / sqrt(1 + 10 u) on its way from 1
    gone = 0.5 if name == "infinite-cosine" else (6**-0.5 - 1) / (11**-0.5 - 1)
    assert middle == pytest.approx(3e-4 - 1.35e-4 * gone, rel=1e-3)


def test_a_repeated_cosine_warms_up_and_falls_to_the_floor_in_each_third():
    recipe = run_of("continual-infinite", "cosine-repeated")
    assert recipe.optimizer_state == "reset"
    assert len(recipe.resolved_stages) == 3
    for stage in recipe.resolved_stages:
        peak, last, warmup, batch, steps, *optimizer = training_of(stage)
        assert (peak, last, batch, *optimizer) == (3e-4, pytest.approx(3e-5), BATCH, "adamw", ADAM, 0.1, 1.0)
        assert warmup == pytest.approx(0.01 * steps, abs=1)


# Ibrahim et al.: shares that are replayed, tokens of the run and of the union of both texts, and how much is advised.
REPLAY = {
    "continual-replay-weak": ((0, 0.005, 0.01, 0.05, 0.1, 0.5), 132_366 * BATCH, 600e9, 0.05),
    "continual-replay-strong": ((0, 0.01, 0.05, 0.1, 0.25, 0.5), 200e9, 500e9, 0.25),
}


@pytest.mark.parametrize("name", REPLAY)
def test_replay_has_the_shares_and_the_tokens_of_the_paper(name):
    fractions, tokens, union, advised = REPLAY[name]
    runs = {run.name: run.recipe for run in load_request(name).runs}
    replaying = [recipe for key, recipe in runs.items() if key not in ("constant", "scratch", "union")]
    assert sorted(recipe.replay.fraction for recipe in replaying) == sorted(fractions)
    for recipe in (*replaying, runs["scratch"]):
        peak, last, warmup, batch, steps, *optimizer = published(recipe)
        assert (peak, last, batch, *optimizer) == (3e-4, pytest.approx(3e-5), BATCH, "adamw", ADAM, 0.1, 1.0)
        assert warmup == pytest.approx(0.01 * steps, abs=1)
        assert steps * batch == pytest.approx(tokens, rel=1e-5)
        assert recipe.resolved_stages[0].schedule.name == "cosine"
    assert all(recipe.optimizer_state == "reset" for recipe in replaying)
    assert published(runs["constant"])[:3] == (3e-5, 3e-5, 0)
    assert runs["constant"].replay.fraction == 0
    both = runs["union"]
    assert both.total_tokens == pytest.approx(union, rel=1e-5)
    assert both.replay.fraction * union == pytest.approx(300e9)
    assert load_request(name).config["replay"]["fraction"] == advised
