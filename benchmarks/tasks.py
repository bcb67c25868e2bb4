"""Speed of evaluation: our scores beside lm-eval's own backend on one local task, and losses beside a bare pass.

    python benchmarks/tasks.py                      # SmolLM2-135M, 24 items of four choices, 8,192 tokens of losses
    python benchmarks/tasks.py --items 100 --tokens 32768

Arms take turns, and the median of the rounds counts; a machine that does something else slows all of them alike. The
task's items are made of the demo's prose: a context of about eighty tokens, four continuations of about twelve.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoTokenizer

from scionlm.core.machine import usable_cores
from scionlm.data import DataFolder, load_corpora, prepare
from scionlm.evaluation.lm_eval_tasks import TaskOptions, lm_eval_scores, load_tasks
from scionlm.evaluation.loss import domain_losses, model_token_nll
from scionlm.evaluation.passages import CLOZE, make_passages
from scionlm.recipes import demo_data
from scionlm.sources import load_hf_model, load_tokenizer, resolve

TASK = """task: cloze_here
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1}}
"""


def prose(room: Path, model) -> DataFolder:
    source = Path(demo_data.__file__).parent / "prose.jsonl.gz"
    corpora = room / "corpora.yaml"
    held_out = "{fraction: 0.3, min_documents: 20}"
    corpora.write_text(
        f"tokenizer: {model}\ndomains:\n  prose: {{paths: [{source}], max_tokens: 200k}}\nheld_out: {held_out}\n"
    )
    prepare(load_corpora(corpora), room, room / "data")
    return DataFolder(room / "data")


def local_task(room: Path, data: DataFolder, items: int) -> Path:
    tokenizer = load_tokenizer(data.tokenizer_folder)
    made = make_passages({"prose": (data, "prose")}, tokenizer, items, 0).tasks[CLOZE]
    folder = room / "tasks"
    folder.mkdir()
    rows = folder / "rows.json"
    lines = [json.dumps({"context": i.context, "choices": list(i.choices), "answer": i.answer}) for i in made]
    rows.write_text("\n".join(lines) + "\n")
    (folder / "cloze.yaml").write_text(TASK.format(rows=rows, cache=folder / "cache"))
    return folder


def timed(work, clock) -> tuple[float, object]:
    begin = clock()
    found = work()
    return clock() - begin, found


def theirs(model, folder: Path, options: TaskOptions, batch_size: int) -> dict:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    loaded = load_tasks([], options)
    wrapped = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch_size)
    return lm_eval.evaluator.evaluate(wrapped, loaded.found, bootstrap_iters=0)["results"]["cloze_here"]


@torch.no_grad()
def bare(model, data: DataFolder, seq_len: int, tokens: int) -> float:
    """The least that a loss can cost: the same windows through the model, their cross-entropy, their sum."""
    stream, total = data.stream("prose", "held_out"), 0.0
    rows = max(1, 2**28 // (4 * seq_len * data.tokenizer.vocab_size))
    windows = torch.from_numpy(stream.read(0, tokens + 1))
    count = tokens // seq_len
    ids, labels = windows[:-1].view(count, seq_len), windows[1:].view(count, seq_len)
    for first in range(0, count, rows):
        logits = model(input_ids=ids[first : first + rows].to(model.device), use_cache=False).logits
        wanted = labels[first : first + rows].to(model.device).flatten()
        total += float(functional.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="sum"))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", default="1,8", help="of lm-eval's backend, which does not find one")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the processor's time: for a machine that is busy"
    )
    given = parser.parse_args()
    clock = time.process_time if given.cpu_time else time.perf_counter
    torch.set_num_threads(usable_cores() if not given.cpu_time else 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = resolve(given.model)
    model = load_hf_model(folder, torch.float32).to(device)
    sizes = [int(size) for size in given.batch_sizes.split(",")]
    with tempfile.TemporaryDirectory() as name:
        data = prose(Path(name), folder.path)
        options = TaskOptions(local_task(Path(name), data, given.items))
        arms = {"scion": lambda: lm_eval_scores(model, folder.path, load_tasks([], options), options)}
        for size in sizes:
            arms[f"lm-eval, batches of {size}"] = lambda size=size: theirs(model, folder.path, options, size)
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        scores = {}
        for _ in range(given.rounds):
            for arm, work in arms.items():
                taken, found = timed(work, clock)
                seconds[arm].append(taken)
                record = found.tasks["cloze_here"] if arm == "scion" else {"acc": found["acc,none"]}
                scores[arm] = record["acc"]
        print(
            f"{given.items} items of four choices on {device}, median of {given.rounds} rounds, loading the task included"
        )
        for arm, taken in seconds.items():
            print(
                f"  {arm:24} {statistics.median(taken):8.2f} s  acc {scores[arm]:.3f}  {[round(t, 2) for t in taken]}"
            )
        tokens = min(given.tokens, data.num_tokens("prose", "held_out") - 1) // given.seq_len * given.seq_len
        nll = model_token_nll(model)
        speed: dict[str, list[float]] = {"domain_losses": [], "bare pass": []}
        for _ in range(given.rounds):
            taken, loss = timed(lambda: domain_losses(nll, data, ["prose"], given.seq_len, tokens), clock)
            speed["domain_losses"].append(tokens / taken)
            taken, total = timed(lambda: bare(model, data, given.seq_len, tokens), clock)
            speed["bare pass"].append(tokens / taken)
            assert abs(loss["prose"].nll - total / tokens) < 1e-3
        print(f"losses of {tokens:,} tokens in windows of {given.seq_len}, tokens/s")
        for arm, values in speed.items():
            print(f"  {arm:24} {statistics.median(values):8.1f}  {[round(v, 1) for v in values]}")
        share = statistics.median(a / b for a, b in zip(speed["domain_losses"], speed["bare pass"], strict=True))
        print(f"  share {share:.3f} (median of the rounds' own)")


if __name__ == "__main__":
    main()
