"""What learning from the teacher is worth, setting by setting: one child, the same batches, one process.

Every row is a training of its own from the same inherited weights (or random ones: the control), on the samples that
its seed draws, so that rows of one seed and budget saw the very same tokens. Rows are kept in OUT as they come, and the
same command goes on with those that are missing.

The teacher's last hidden states are kept between rows of one seed: they are always the same. So a row's time says
nothing; `benchmarks/distillation.py` measures that, and a row with more tokens for plain cross-entropy stands for equal
time.

    python benchmarks/distill_settings.py DATA OUT.jsonl SETTING ...

A setting is a name from the list below, or `KEY=VALUE,...` with steps, lr, seed, init and what DistillConfig has.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from scionlm.core.config import parse_yaml
from scionlm.data import DataFolder, Mixture, Order, SamplePlan
from scionlm.evaluation.loss import domain_losses, model_token_nll
from scionlm.families import ModelShape
from scionlm.families.models import random_model
from scionlm.parallel.runtime import start_runtime
from scionlm.recipes.config_distill import DistillConfig
from scionlm.recipes.objectives import open_distillation
from scionlm.recipes.teacher_layers import layer_map
from scionlm.schedules import Sizes, build_schedule
from scionlm.sources import load_hf_model, resolve
from scionlm.surgery.depth import plan_depth
from scionlm.surgery.lineage import plan_origins
from scionlm.surgery.surgery import open_surgery
from scionlm.surgery.target import target_config
from scionlm.train.hidden_loss import States
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings
from scionlm.train.step import train_step

SEQ_LEN, ROWS = 256, 4
DEFAULTS = {"steps": 60, "lr": 1e-3, "seed": 0, "init": "source"}


class KeptTeacher:
    """A teacher that remembers what it made of a batch."""

    def __init__(self, teacher, kept):
        self._teacher, self._kept = teacher, kept
        self.weight, self.scaling = teacher.weight, teacher.scaling
        self.hidden_size, self.seconds = teacher.hidden_size, 0.0

    def __call__(self, input_ids, position_ids=None):
        key = hash(input_ids.numpy().tobytes())
        if key not in self._kept:
            self._kept[key] = self._teacher(input_ids).last
        return States(self._kept[key], {})


def parse(text):
    values = dict(DEFAULTS)
    for pair in filter(None, text.split(",")):
        key, _, value = pair.partition("=")
        values[key] = parse_yaml(value, key)
    return values


class Bench:
    """The parts that rows share."""

    def __init__(self, options):
        self.runtime = start_runtime()
        self.budget = options.tokens
        self.source = resolve(options.source)
        self.data = DataFolder(Path(options.data))
        self.domains = list(self.data.domains)
        layers = ModelShape.of(self.source.config).num_hidden_layers
        self.plan = plan_depth(layers, options.layers, None, options.strategy, name=self.source.name)
        self.target = target_config([self.source.config], self.plan)
        with open_surgery([self.source], self.plan) as surgery:
            self.child = surgery.build(torch.float32)
        self.teacher = load_hf_model(self.source, self.runtime.compute_dtype)
        self.start = {name: p.detach().clone() for name, p in self.child.named_parameters()}
        self.kept = {}

    def losses(self, token_nll):
        found = domain_losses(token_nll, self.data, self.domains, SEQ_LEN, self.budget)
        return {name: loss.nll for name, loss in found.items()}

    def source_losses(self):
        return self.losses(model_token_nll(load_hf_model(self.source, torch.float32)))

    def train(self, setting):
        values = {key: value for key, value in setting.items() if key not in DEFAULTS}
        seed, steps = setting["seed"], setting["steps"]
        self.runtime.seed(seed)
        weights = self.start
        if setting["init"] == "random":
            weights = dict(random_model(self.target, seed).named_parameters())
        with torch.no_grad():
            for name, parameter in self.child.named_parameters():
                parameter.copy_(weights[name])
        distillation = self.distillation(values, steps, seed)
        objective = Objective(self.child, self.runtime.compute_dtype, 0.0, distillation)
        if steps == 0:
            return {"domains": self.losses(objective.token_nll)}
        optimizer = Optimizer(self.child, OptimizerSettings(), objective.projections)
        streams = {name: self.data.stream(name, "train") for name in self.domains}
        plan = SamplePlan(streams, Mixture(dict.fromkeys(self.domains, 1.0)), Order(SEQ_LEN, seed))
        schedule = build_schedule("cosine", Sizes(steps, max(steps // 20, 1), floor=0.1))
        parts, started = [], time.perf_counter()
        objective.train()
        for step in range(steps):
            objective.at_step(step)
            batch = plan.batch(plan.take(ROWS))
            result = train_step(objective, optimizer, batch, ROWS, setting["lr"] * schedule(step), 1.0)
            parts.append(result.parts | {"nll_nats": result.nll})
        seconds = time.perf_counter() - started
        objective.eval()
        if distillation:
            distillation.outputs.close()
        losses = self.losses(objective.token_nll)
        return {"domains": losses, "parts": parts[-1], "seconds_with_kept_teacher": seconds}

    def distillation(self, values, steps, seed):
        if not values:
            return None
        config = DistillConfig.model_validate(values)
        layers = layer_map(config, self.source, plan_origins([self.source], self.plan))
        schedule = config.build_schedule(steps, ROWS * SEQ_LEN)
        found = open_distillation(config, schedule, self.child, self.teacher, layers, self.runtime)
        if not layers:
            found.teacher = KeptTeacher(found.teacher, self.kept.setdefault(seed, {}))
        return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("settings", nargs="+")
    parser.add_argument("--source", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--strategy", default="first_last")
    parser.add_argument("--tokens", type=int, default=4096, help="evaluated in each domain")
    options = parser.parse_args()
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {json.loads(line)["name"] for line in lines}
    bench = None
    for name in [one for one in ("source", "steps=0", *options.settings) if one not in done]:
        bench = bench or Bench(options)
        found = {"domains": bench.source_losses()} if name == "source" else bench.train(parse(name))
        found["mean"] = sum(found["domains"].values()) / len(found["domains"])
        with options.out.open("a") as file:
            file.write(json.dumps({"name": name} | found) + "\n")
        print(f"{found['mean']:.4f}  {name}  {json.dumps(found.get('parts'))}", flush=True)


if __name__ == "__main__":
    main()
