"""How long one PPO step takes: our trainer against TRL's, in turns on this machine, and whether both compute the same.

python -m benchmarks.training_step [--threads 2] [--pairs 9] [--peer DIRECTORY] [--record]

Both train the same small random Qwen2 on the same prompts: rollout, reference and value forward, one update of policy
and value model. TRL runs in an environment of its own, which is made when it is not there (TRL 1.12.0 is the last
release with PPO; torch and transformers are those of this environment). A pair is a step of each, and every other
pair begins with TRL. Log-probabilities and values of one TRL step are computed again by our code, on its tokens and
weights; more than 1e-4 apart ends the run. --record writes docs/results/training_step.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from matplotlib import rc_context
from matplotlib.figure import Figure
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from analysis import style
from benchmarks.pages import ROOT, markdown
from benchmarks.trl_process import TRL_VERSION, Peer, environment
from profiling.settings import check_settings
from tppo.config import RunConfig
from tppo.data.problem import Problem
from tppo.data.tasks import arithmetic_task
from tppo.learner.batch import Spans
from tppo.learner.estimates import score_log_probs, score_values
from tppo.models.policy import load_policy, new_qwen2, output_layer
from tppo.models.value import ValueModel
from tppo.quiet import quieten_libraries
from tppo.rollout.rows import Row
from tppo.start import trainer_for
from tppo.trainer import Trainer

RESULTS = ROOT / "docs" / "results" / "training_step"
PEER = ROOT / ".venv-peers" / "trl"
ROWS, RESPONSE_TOKENS = 64, 64
WARM_UP_STEPS = 2
"""Steps of each side before the first pair; the numbers that our code computes again come from the last of TRL's."""
TOLERANCE = 1e-4
GOAL = 3
"""Times as fast as TRL."""
VOCABULARY = ["<pad>", "<bos>", "<eos>", "<unk>", *"0123456789+-*=() ?.,:abcdefn\n"]
VOCABULARY += [f"<x{i}>" for i in range(len(VOCABULARY), 64)]
PAD, END = VOCABULARY.index("<pad>"), VOCABULARY.index("<eos>")

PHASES = {
    "rollout": (style.BLUE, "rollout"),
    "reference": (style.CAUSES["reference_forward"][0], "reference forward"),
    "values": (style.YELLOW, "value forward"),
    "reward": (style.PURPLE, "reward"),
    "collection": (style.CAUSES["evaluation"][0], "garbage collection"),
    "updates": (style.VERMILION, "updates and the rest"),
}
"""Phase -> colour and name; they add up to the step."""
OUR_PHASES = {
    "rollout": "timing_s/gen",
    "reference": "timing_s/ref",
    "values": "timing_s/values",
    "reward": "timing_s/reward",
    "update_value": "timing_s/update_critic",
    "update_policy": "timing_s/update_actor",
}
RATIOS = {
    "TRL / ours": (),
    "TRL without its reward model / ours": ("reward",),
    "TRL without reward model and garbage collection / ours": ("reward", "collection"),
}
"""Ratio -> TRL's phases that are taken off its step."""
DIFFERENCES = """\
What differs, beyond how each is written:

- TRL runs a reward model (a third backbone, forward only) over every row; ours compares a string.
- TRL's loop calls Python's garbage collector twice a step. That takes the same time whatever the model's size, so it
  weighs most on a model as small as this.
- TRL updates policy and value model in one backward pass with one optimiser, ours in two passes with two. The passes
  through the networks are the same. Ours clips both gradients, TRL's PPO does not.
- KL: TRL puts k1 into the reward, ours k3 into the loss; the reference forward is the same.
- TRL keeps the logits of all sampled tokens and takes log-probabilities from them afterwards; ours takes them while
  sampling. TRL divides logits by temperature + 1e-7.
- Ours writes its run directory (rows, engine spans, metrics, trace); its device sampler is off. TRL saves and reports
  nothing. Both are float32, without gradient checkpointing.

No response ends early: in the checkpoint one channel of every embedding is a constant that no layer writes to, and
the output rows of the end-of-sequence and padding tokens read that channel alone, with a large negative weight. Their
probability is 0 on both sides, and so is its gradient. Both sides still look for the end of sequence, and the tokens
of every step are counted."""


def save_checkpoint(directory: Path) -> None:
    """A random Qwen2 of 2 layers x 256 that never samples end of sequence or padding, and its tokenizer."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    model = new_qwen2(
        vocab_size=len(VOCABULARY), eos_token_id=END, pad_token_id=PAD, layers=2, hidden_size=256, heads=4,
        kv_heads=2, intermediate_size=1024, max_tokens=1024, seed=0,
    )  # fmt: skip
    forbid(model, [PAD, END])
    model.save_pretrained(directory)


@torch.no_grad()
def forbid(model: Qwen2ForCausalLM, token_ids: list[int]) -> None:
    """Give these tokens a probability of 0: their logits are -1000 times a channel that stays positive."""
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    output = output_layer(model).weight
    output[token_ids] = 0.0
    output[token_ids, 0] = -1000.0


def our_config(model: Path, output: Path, threads: int) -> RunConfig:
    """PPO with every setting that TRL's has too set to the same value (`peer_settings` hands them on)."""
    values = {
        "output": str(output),
        "model": {"path": str(model)},
        "data": {"median_steps": 1, "sigma": 0, "max_steps": 1},  # prompts of five tokens
        "algorithm": {"name": "ppo", "kl_coef": 0.05, "value_clip": 0.2},
        "rollout": {"prompts_per_step": ROWS, "max_response_tokens": RESPONSE_TOKENS, "temperature": 1.0},
        "value": {"pretrain_rows": 0, "epochs": 1},
        "optimizer": {"policy_lr": 1e-4, "value_lr": 1e-4, "warmup_steps": 0},
        "train": {"threads": threads, "epochs": 1, "mini_batches": 1, "micro_batch_tokens": 8192},  # one pass
        "evaluation": {"every": 0},
        "profile": {"sampler": False},
    }
    return check_settings(values, RunConfig, where="benchmarks.training_step")


def our_step(trainer: Trainer) -> dict[str, float]:
    """Seconds of one step and of its phases."""
    start = time.perf_counter()
    trainer.state.step += 1
    metrics = trainer.train_step(trainer.state.step)
    trainer.writer.metrics(metrics)
    seconds = {"step": time.perf_counter() - start, "collection": 0.0}
    seconds |= {name: metrics[metric] for name, metric in OUR_PHASES.items()}
    check_tokens("ours", metrics["training/generated_tokens"])
    return with_updates(seconds)


def best_matrix_rate(size: int = 2048, repeats: int = 10) -> float:
    """FLOP/s of a large float32 matrix product on the threads in use."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def with_updates(seconds: dict[str, float]) -> dict[str, float]:
    """Adds `updates`: what no other phase covers."""
    others = sum(seconds[name] for name in PHASES if name != "updates")
    return {**seconds, "updates": seconds["step"] - others}


def check_tokens(side: str, tokens: int) -> None:
    if tokens != ROWS * RESPONSE_TOKENS:
        raise SystemExit(f"{side}: {tokens} response tokens instead of {ROWS * RESPONSE_TOKENS}: nothing to compare")


def their_step(peer: Peer, threads: int, command: str = "step") -> dict[str, float]:
    """The same of TRL."""
    answer = peer.step(command)
    check_tokens("TRL", answer["tokens"])
    if answer["threads"] != threads:
        raise SystemExit(f"TRL: {answer['threads']} threads instead of {threads}: nothing to compare")
    return with_updates(answer["seconds"])


def peer_settings(trainer: Trainer, directory: Path, steps: int) -> dict[str, Any]:
    config = trainer.config
    task = arithmetic_task(config)
    prompts = [task.problem(number).prompt for number in range(ROWS * 4)]
    return {
        "model": config.model.path, "output": str(directory / "peer"), "capture": str(directory / "seen.pt"),
        "prompts": [trainer.state.tokenizer(prompt)["input_ids"] for prompt in prompts],
        "never_sampled": [PAD, END], "rows": ROWS, "response_tokens": RESPONSE_TOKENS,
        "steps": steps, "threads": config.train.threads, "temperature": config.rollout.temperature,
        "learning_rate": config.optimizer.policy_lr, "kl_coef": config.algorithm.kl_coef,
        "clip": trainer.recipe.clip[0], "value_clip": config.algorithm.value_clip,
    }  # fmt: skip


def compare_numbers(captured: Path, config: RunConfig) -> pd.DataFrame:
    """Largest absolute differences to TRL's numbers over all response tokens, from its tokens and weights."""
    theirs = torch.load(captured, weights_only=True)
    reference, policy = (load_policy(config.model.path)[0] for _ in range(2))
    policy.load_state_dict(theirs["weights"]["policy"])
    value_model = ValueModel(policy)
    load_scalar_model(value_model, theirs["weights"]["value"])
    rows = [
        Row(index, index, Problem("", ""), ids[:-RESPONSE_TOKENS], ids[-RESPONSE_TOKENS:])
        for index, ids in enumerate(theirs["sequences"].tolist())
    ]
    spans = Spans.responses(rows)
    score_values(value_model, spans, config, PAD)
    ours = {
        "log_probs": score_log_probs(policy, spans, config, PAD),
        "reference_log_probs": score_log_probs(reference, spans, config, PAD),
        "values": spans.laid_out(lambda row: row.values),
    }
    table = pd.DataFrame(
        {
            "number": name.replace("_", " "),
            "tokens": theirs[name].numel(),
            "largest magnitude": float(theirs[name].abs().max()),
            "largest difference": float((own - theirs[name]).abs().max()),
        }
        for name, own in ours.items()
    )
    worst = table["largest difference"].max()
    if not worst <= TOLERANCE:
        raise SystemExit(f"numbers differ by {worst:.2g}: nothing to compare")
    return table


def load_scalar_model(value_model: ValueModel, weights: dict[str, torch.Tensor]) -> None:
    """Weights of a Hugging Face sequence classifier with one label; it has no bias."""
    backbone = {name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")}
    value_model.backbone.load_state_dict(backbone)
    value_model.head.load_state_dict({"weight": weights["score.weight"], "bias": torch.zeros(1)})


def run_pairs(trainer: Trainer, peer: Peer, pairs: int) -> pd.DataFrame:
    """A line per pair: seconds of each side and phase."""
    threads = trainer.config.train.threads
    for step in range(WARM_UP_STEPS):
        our_step(trainer)
        their_step(peer, threads, "capture" if step == WARM_UP_STEPS - 1 else "step")
    lines = []
    for pair in range(pairs):
        if pair % 2:
            theirs, ours = their_step(peer, threads), our_step(trainer)
        else:
            ours, theirs = our_step(trainer), their_step(peer, threads)
        line: dict[str, Any] = {"pair": pair, "first": "TRL" if pair % 2 else "ours"}
        line |= {f"ours {name} (s)": seconds for name, seconds in ours.items()}
        line |= {f"TRL {name} (s)": seconds for name, seconds in theirs.items()}
        for name, left_out in RATIOS.items():
            line[name] = (theirs["step"] - sum(theirs[phase] for phase in left_out)) / ours["step"]
        lines.append(line)
    return pd.DataFrame(lines)


def phase_table(pairs: pd.DataFrame) -> pd.DataFrame:
    """Median milliseconds of each phase, and the median of the pairs' ratios where both sides do the same."""
    lines = []
    for name in (*PHASES, "step"):
        ours, theirs = pairs[f"ours {name} (s)"], pairs[f"TRL {name} (s)"]
        ratio = None if name in ("reward", "collection") else (theirs / ours).median()
        title = PHASES[name][1] if name in PHASES else name
        lines.append(
            {"phase": title, "ours (ms)": 1e3 * ours.median(), "TRL (ms)": 1e3 * theirs.median(), "TRL / ours": ratio}
        )
    for name in ("update_value", "update_policy"):
        lines.append({"phase": f"ours, {name}", "ours (ms)": 1e3 * pairs[f"ours {name} (s)"].median()})
    return pd.DataFrame(lines)


def ratio_table(pairs: pd.DataFrame) -> pd.DataFrame:
    columns = {"median": "median", "smallest": "min", "largest": "max", "pairs": "size"}
    lines = [{"step time": name, **{c: pairs[name].agg(of) for c, of in columns.items()}} for name in RATIOS]
    return pd.DataFrame(lines)


def steps_figure(pairs: pd.DataFrame) -> Figure:
    """What a step is made of: median seconds of each phase, a bar per trainer."""
    with rc_context(style.RC):
        figure, (axes,) = style.subplots(width=7.0, height=3.0)
        sides, left = ["TRL", "ours"], [0.0, 0.0]
        for name, (colour, title) in PHASES.items():
            seconds = [pairs[f"{side} {name} (s)"].median() for side in sides]
            axes.barh(sides, seconds, left=left, color=colour, label=title)
            left = [start + width for start, width in zip(left, seconds, strict=True)]
        axes.set(xlabel="seconds of one step (medians)", title="One PPO step (measured)")
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
        )
        return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, on both sides")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--peer", type=Path, default=PEER, help="environment that holds TRL; made if absent")
    parser.add_argument("--record", action="store_true", help="write docs/results/training_step")
    options = parser.parse_args()
    python = environment(options.peer)
    quieten_libraries()
    torch.set_num_threads(options.threads)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        save_checkpoint(directory / "model")
        config = our_config(directory / "model", directory / "run", options.threads)
        best_rate = best_matrix_rate()
        with trainer_for(config) as trainer:
            settings = peer_settings(trainer, directory, WARM_UP_STEPS + options.pairs)
            peer = Peer(python, settings, directory)
            try:
                pairs = run_pairs(trainer, peer, options.pairs)
            finally:
                peer.close()
            with FlopCounterMode(display=False) as counter:
                our_step(trainer)
            operations = counter.get_total_flops()
        numbers = compare_numbers(directory / "seen.pt", config)
    machine = (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {options.threads} torch threads on each "
        f"side, torch {torch.__version__}, transformers {transformers.__version__}, TRL {TRL_VERSION}. Load "
        f"average {load_before:.2f} before, {os.getloadavg()[0]:.2f} after; up to {options.threads} is this benchmark."
    )
    got, ours_s = pairs["TRL / ours"].median(), pairs["ours step (s)"].median()
    floor_s = operations / best_rate
    parts = [
        "# One PPO step: speed and numbers, beside TRL",
        f"Written by `python -m benchmarks.training_step --threads {options.threads} --pairs {options.pairs} "
        f"--record`. {machine}",
        f"A random Qwen2 of 2 layers x 256, vocabulary {len(VOCABULARY)}; {ROWS} rows of five prompt tokens and "
        f"exactly {RESPONSE_TOKENS} response tokens; one epoch, one mini-batch, one forward and backward pass. "
        f"{WARM_UP_STEPS} warm-up steps each, then steps in turns; a ratio is the median of the pairs' ratios.",
        markdown(ratio_table(pairs)),
        f"Goal: {GOAL} times TRL: {'reached' if got >= GOAL else 'missed'} ({got:.2f}).",
        f"Why not more: a step of ours is {operations / 1e9:.0f} GFLOP of matrix products (torch's FlopCounterMode), "
        f"the best this machine does is {best_rate / 1e9:.0f} GFLOP/s (a product of 2048 x 2048, the median of ten), "
        f"so {floor_s:.2f} of its {ours_s:.2f} s are spent in products that both sides need, and no implementation "
        f"could be more than {pairs['TRL step (s)'].median() / floor_s:.1f} times as fast as TRL.",
        "## What a step is made of",
        markdown(phase_table(pairs)),
        "Medians, so phases need not sum to the step. The rest is advantages, bookkeeping and metrics.",
        "![what a step is made of](training_step.png)",
        "## Numbers",
        "Tokens, weights and numbers of TRL's last warm-up step (policy and value model have been trained for "
        f"{WARM_UP_STEPS - 1} step); the same numbers from `score_log_probs` and `score_values`.",
        markdown(numbers),
        "## The comparison",
        DIFFERENCES,
    ]
    page = "\n\n".join(parts) + "\n"
    print(page)
    if options.record:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "README.md").write_text(page)
        pairs.to_csv(RESULTS / "training_step.csv", index=False)
        steps_figure(pairs).savefig(RESULTS / "training_step.png")


if __name__ == "__main__":
    main()
