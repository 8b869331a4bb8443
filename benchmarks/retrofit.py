"""benchmarks/results/retrofit.csv, retrofit_reach.csv and retrofit_log.csv (every update of the gates), and the tables
of docs/guides/retrofit.md: what a small decoder loses when its attention is replaced. One command, on a CPU, about
15 minutes of one core:

    python benchmarks/retrofit.py runs/retrofit

It trains a small Llama of transformers (90K parameters) on the builtin text and on planted correlations, to 1,024
tokens, and retrofits it in each of the ways below. Folders that are there are not made again. Of each: the loss of
held-out text, right answers to 300 planted examples, both at 1,024 tokens, and of how many of the tokens before a query
its heads read.
"""

import csv
import math
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rnn_longctx.measure.stream import tail_loss
from rnn_longctx.models.retrofit.files import load_retrofitted
from rnn_longctx.tasks import TASKS
from rnn_longctx.train.config import DataConfig, MixedTask, TrainConfig
from rnn_longctx.train.corpus import load_corpus
from rnn_longctx.train.evaluation import examples_of, recall
from rnn_longctx.train.retrofit import RetrofitConfig, retrofit

RESULTS = Path(__file__).parent / "results"
LENGTH, EXAMPLES, WINDOWS = 1024, 300, 64
TASK = "planted:noise=0.5"
QUARTER = "block-sparse:block=16,window=32,sinks=1,top=5,gate=16"  # 8 blocks of 32, the mean number before a query
NINTH = "block-sparse:block=16,window=32,sinks=1,top=1,gate=16"
TWO_STAGE = "two-stage:block=16,window=32,top=6"
LONGNET = "longnet:segments=64/256/1024,dilations=1/4/16"
GATES = "quarter, gates distilled"
WAYS = {  # a name: mixer, distilled, what trains, updates of each of two stages, heads that stay full
    "quarter, put in": (QUARTER, False, "attention", 0, None),
    GATES: (QUARTER, True, "new", 50, None),
    "quarter, distilled": (QUARTER, True, "attention", 50, None),
    "ninth, put in": (NINTH, False, "attention", 0, None),
    "ninth, distilled": (NINTH, True, "attention", 50, None),
    "longnet, put in": (LONGNET, False, "attention", 0, None),
    "longnet, distilled": (LONGNET, True, "attention", 50, None),
    "mamba2, put in": ("mamba2", False, "attention", 0, None),
    "mamba2, distilled": ("mamba2", True, "attention", 100, None),
    "gated-deltanet, distilled": ("gated-deltanet", True, "attention", 100, None),
    "gated-deltanet, far heads full": ("gated-deltanet", True, "attention", 100, 0.2),
    "two-stage, distilled": (TWO_STAGE, True, "attention", 50, None),
    "quarter, by the text alone": (QUARTER, False, "attention", 50, None),
}


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) != 2:
        sys.exit("expected a folder for the models, such as runs/retrofit")
    runs = Path(sys.argv[1])
    if not (runs / "teacher").is_dir():
        train_teacher(runs / "teacher")
    teacher = load_retrofitted(runs / "teacher", tokenizer="bytes")
    rows, reach = [{"model": "teacher", **measured(teacher), "seconds": 0.0}], []
    print(rows[-1], flush=True)
    for name, (mixer, distill, trains, steps, full_above) in WAYS.items():
        out = runs / name.replace(", ", "-").replace(" ", "-")
        began = time.process_time()
        if not out.is_dir():
            config = RetrofitConfig(
                **{"model": str(runs / "teacher"), "tokenizer": "bytes", "mixer": mixer, "out": str(out)},
                **{"distill": distill, "trains": trains, "steps": steps, "full_above": full_above},
                **{"text": ("builtin",), "tasks": (TASK,), "stages": (256, 1024), "batch": 4096, "lr": 2e-3},
            )
            retrofit(config)
        seconds = time.process_time() - began
        rows.append({"model": name, **measured(load_retrofitted(out)), "seconds": round(seconds)})
        print(rows[-1], flush=True)
        with (out / "reach.csv").open() as file:
            reach += [{"model": name, **row} for row in csv.DictReader(file)]
        if name == GATES:
            with (out / "log.csv").open() as file:
                write(RESULTS / "retrofit_log.csv", [{"model": name, **row} for row in csv.DictReader(file)])
        write(RESULTS / "retrofit.csv", rows)
        write(RESULTS / "retrofit_reach.csv", reach)


def train_teacher(folder: Path) -> None:
    """Train the decoder that is retrofitted: short examples first, then long ones."""
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, **shape, num_key_value_heads=2, tie_word_embeddings=True, **ids)
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    stages = [(64, 48, 600, 8), (256, 24, 200, 8), (1024, 8, 250, 256)]  # tokens, rows, updates, shortest example
    corpus, step, total = load_corpus(run_of(stages[0]).data, tokenizer(), LENGTH), 0, sum(s[2] for s in stages)
    for stage in stages:
        config = run_of(stage)
        for _ in range(stage[2]):
            batch = corpus.batch(config, step)
            logits = model(batch.ids[:, :-1]).logits
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none")
            text = ~batch.answer.any(1)
            loss = losses[text].mean() + 3 * losses[batch.answer].mean()
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1, (step + 1) / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / total)))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 50 == 0:
                print(f"teacher {step}/{total}: text {losses[text].mean():.3f}", flush=True)
    model.save_pretrained(folder)


def run_of(stage: tuple[int, int, int, int]) -> TrainConfig:
    length, rows, steps, shortest = stage
    mix = [MixedTask(TASK, 0.75, (shortest, length), True)]
    return TrainConfig(
        init="none", data=DataConfig(text=["builtin"], held_out=0.05, mix=mix), train_length=length, batch_size=rows,
        steps=steps, seed=1,
    )  # fmt: skip


def tokenizer():
    from rnn_longctx.data import load_tokenizer

    return load_tokenizer("bytes")


def measured(model) -> dict[str, float]:
    """Return what a model loses and gets right at LENGTH tokens."""
    config = run_of((LENGTH, 1, 1, 8))
    corpus = load_corpus(config.data, tokenizer(), LENGTH)
    losses = torch.cat([tail_loss(model, ids) for ids in corpus.validation(LENGTH, 1, WINDOWS)])
    task = TASKS["planted"](noise=0.5)
    examples = examples_of(task, tokenizer(), LENGTH, EXAMPLES, 0)
    right = recall(model, task, examples, tokenizer(), 1, torch.no_grad)
    far = [e for e in examples if e.about["gap"] > 128]
    right_far = recall(model, task, far, tokenizer(), 1, torch.no_grad)
    figures = {"loss": float(losses.mean()), "windows": len(losses), "right": right, "right_far": right_far}
    return figures | {"read": model.read_share(LENGTH), "kept": model.state_size().total(LENGTH)}


def write(path: Path, rows: list[dict]) -> None:
    with path.open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
