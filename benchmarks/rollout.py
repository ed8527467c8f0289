"""How fast the torch engine generates: against `generate` of transformers, and what its options bring.

python -m benchmarks.rollout [--repeats 7] [--record]

Everything compared takes turns within a repeat, on one thread; a ratio is the median of the repeats' ratios. The demo
workload is that of regime `short` with its warm-started model, which is trained first (about a minute, then kept in
runs/). --record writes docs/results/rollout. Where vLLM is installed (`make test-vllm` makes an environment), it is
measured too.
"""

import argparse
import importlib.util
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from analysis import style
from benchmarks.pages import markdown
from benchmarks.small_engines import MODELS, engine_of, model_of, run_engine
from benchmarks.turns import Timed, in_turns, paired_ratio
from profiling.reader import Run
from tppo.batching import pad_right
from tppo.data.tokenizer import character_tokenizer
from tppo.models.policy import load_policy, save_policy
from tppo.quiet import quieten_libraries
from tppo.regimes import load_regime
from tppo.rollout.protocol import Request, Sampling
from tppo.rollout.spans import Spans
from tppo.rollout.torch_engine import TorchEngine
from tppo.start import train
from tppo.warmstart import warm_start

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "rollout"
ROWS, NEW_TOKENS = 32, 128
STALE_STEPS = 60
GOALS = {"equal batch": 1.0, "demo workload": 1.5}
"""`generate` / torch engine."""


def line(case: str, slow: str, fast: str, seconds: Timed) -> dict[str, object]:
    middle, least, largest = paired_ratio(seconds[slow], seconds[fast])
    return {
        "case": case,
        "A": slow,
        "B": fast,
        "A (s)": statistics.median(seconds[slow]),
        "B (s)": statistics.median(seconds[fast]),
        "A / B": middle,
        "least": least,
        "largest": largest,
    }


@torch.inference_mode()
def run_generate(model: PreTrainedModel, prompts: list[list[int]], batch: int, config: GenerationConfig) -> int:
    """transformers' `generate`, prompts padded on the left, `batch` rows at a time. Returns the tokens of responses,
    each up to its end of sequence."""
    tokens = 0
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        reversed_ids = pad_right([row[::-1] for row in rows], 0)
        input_ids, mask = reversed_ids.flip(1), pad_right([[1] * len(row) for row in rows], 0).flip(1)
        output = model.generate(input_ids, attention_mask=mask, generation_config=config)
        response = output[:, input_ids.shape[1] :]
        if config.eos_token_id is None:
            tokens += response.numel()
        else:
            ended = (response == config.eos_token_id).int()
            tokens += int((ended.cumsum(1) - ended == 0).sum())
    return tokens


def generation_config(new_tokens: int, eos: int | None, *, sample: bool) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=new_tokens, do_sample=sample, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=eos,
        pad_token_id=0,
    )  # fmt: skip


def equal_batch(repeats: int) -> list[dict[str, object]]:
    """ROWS rows of NEW_TOKENS tokens each, none ends early: only the cost of a decode step counts."""
    lines = []
    for name, shape in MODELS.items():
        model = model_of(shape)
        prompts = [torch.randint(2, 100, (16,)).tolist() for _ in range(ROWS)]
        requests = [Request(i, prompt, 0, NEW_TOKENS) for i, prompt in enumerate(prompts)]
        engine = engine_of(model, ROWS)
        for sample in (False, True):
            config = generation_config(NEW_TOKENS, None, sample=sample)
            sampling = Sampling(temperature=float(sample))
            seconds = in_turns(
                {
                    "generate": lambda model=model, prompts=prompts, config=config: run_generate(
                        model, prompts, ROWS, config
                    ),
                    "torch engine": lambda engine=engine, requests=requests, sampling=sampling: run_engine(
                        engine, requests, sampling
                    ),
                },
                repeats,
                warm_up=1,
            )
            case = f"equal batch, {name}, {'sampled' if sample else 'greedy'}"
            lines.append(line(case, "generate", "torch engine", seconds))
    return lines


class DemoWorkload:
    """Problems of the demo, answered by its warm-started model."""

    def __init__(self) -> None:
        self.regime = regime = load_regime("short")
        task = regime.task(seed=7)
        self.path = warm_start(regime.warm_start, regime.data, task, Path("runs"), lambda step, loss: None)
        self.model, self.tokenizer = load_policy(str(self.path))
        self.longest = regime.rollout.max_response_tokens
        self.window = regime.rollout.window
        self.prompts = [self.tokenizer(task.problem(i).prompt)["input_ids"] for i in range(128)]
        self.sampling = Sampling(stop_token_ids=(self.tokenizer.eos_token_id,))
        self.max_tokens = task.max_prompt_tokens + self.longest

    def requests(self, rows: int) -> list[Request]:
        return [Request(i, prompt, 0, self.longest) for i, prompt in enumerate(self.prompts[:rows])]

    def engine(self, **options: object) -> TorchEngine:
        return engine_of(self.model, ROWS, self.max_tokens, **options)


def end_to_end(demo: DemoWorkload, repeats: int) -> list[dict[str, object]]:
    """One step's rows at once, and four steps' rows through the same slots. Both sides sample, so that lengths differ
    by chance between them: compared per token of response."""
    lines = []
    config = generation_config(demo.longest, demo.tokenizer.eos_token_id, sample=True)
    for rows in (ROWS, 4 * ROWS):
        tokens: dict[str, list[int]] = {"generate": [], "torch engine": []}
        engine = demo.engine()

        def generate(rows: int = rows, tokens: dict[str, list[int]] = tokens) -> None:
            tokens["generate"].append(run_generate(demo.model, demo.prompts[:rows], ROWS, config))

        def ours(rows: int = rows, tokens: dict[str, list[int]] = tokens, engine: TorchEngine = engine) -> None:
            done = run_engine(engine, demo.requests(rows), demo.sampling)
            tokens["torch engine"].append(sum(len(completion.token_ids) for completion in done.values()))

        seconds = in_turns({"generate": generate, "torch engine": ours}, repeats, warm_up=1)
        per_token = {
            name: [1e3 * s / n for s, n in zip(seconds[name], tokens[name][1:], strict=True)] for name in seconds
        }
        case = f"demo workload, {rows} rows in {ROWS} slots, per 1,000 tokens"
        lines.append(line(case, "generate", "torch engine", {name: per_token[name] for name in per_token}))
        lines[-1] |= {
            "A (s)": statistics.median(per_token["generate"]),
            "B (s)": statistics.median(per_token["torch engine"]),
        }
    return lines


def kept_keys_and_values(demo: DemoWorkload, repeats: int) -> list[dict[str, object]]:
    """The second window of the rows that did not end in the first: prefilled again, or continued with what is kept."""
    first = [Request(r.row, r.token_ids, 0, demo.window) for r in demo.requests(4 * ROWS)]
    engines = {"prefilled again": demo.engine(), "keep_kv": demo.engine(keep_kv=True)}
    seconds: Timed = {name: [] for name in engines}
    for repeat in range(repeats + 1):
        for name, engine in engines.items():
            done = run_engine(engine, first, Sampling(seed=repeat, stop_token_ids=demo.sampling.stop_token_ids))
            resumed = [
                Request(r.row, [*r.token_ids, *done[r.row].token_ids], demo.window, demo.window)
                for r in first
                if done[r.row].reason == "budget"
            ]
            engine.update_weights(repeat + 1)
            start = time.perf_counter()
            run_engine(engine, resumed, Sampling(seed=repeat, stop_token_ids=demo.sampling.stop_token_ids))
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return [line(f"second window of {4 * ROWS} demo rows", "prefilled again", "keep_kv", seconds)]


def stale_keys_in_training(demo: DemoWorkload) -> str:
    """T-PPO on the demo task with and without kept keys and values: rollout time, and what the staleness shows as."""
    lines = []
    for keep_kv in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            config = demo.regime.run_config("tppo", 100, demo.path, Path(folder) / "run")
            rollout = config.rollout.model_copy(update={"keep_kv": keep_kv})
            loop = config.train.model_copy(update={"steps": STALE_STEPS, "stop_at_accuracy": None})
            profile = config.profile.model_copy(update={"sampler": False})
            evaluation = config.evaluation.model_copy(update={"every": STALE_STEPS})
            update = {"rollout": rollout, "train": loop, "profile": profile, "evaluation": evaluation}
            train(config.model_copy(update=update), show_progress=False)
            metrics = Run(Path(folder) / "run").metrics
        steps = metrics[metrics.step >= 1]
        lines.append(
            {
                "T-PPO, regime short, seed 100": "keep_kv" if keep_kv else "prefilled again",
                "rollout (s)": steps["timing_s/gen"].sum(),
                "mean log-prob difference": steps["rollout_corr/log_prob_diff_mean"].mean(),
                "largest": steps["rollout_corr/log_prob_diff_max"].max(),
                "k3 KL per token": steps["rollout_corr/k3_kl"].mean(),
                "padding waste": steps["perf/padding_waste"].mean(),
                f"accuracy after {STALE_STEPS} steps": metrics["val/accuracy"].dropna().iloc[-1],
            }
        )
    return markdown(pd.DataFrame(lines))


def compiled(repeats: int) -> list[dict[str, object]]:
    """Decoding through torch.compile; compilation itself is not counted."""
    lines = []
    for name, shape in MODELS.items():
        model = model_of(shape)
        requests = [Request(i, torch.randint(2, 100, (16,)).tolist(), 0, NEW_TOKENS) for i in range(ROWS)]
        plain, through = engine_of(model, ROWS), engine_of(model, ROWS, compiled=True)
        seconds = in_turns(
            {
                "eager": lambda plain=plain, requests=requests: run_engine(plain, requests, Sampling()),
                "compiled": lambda through=through, requests=requests: run_engine(through, requests, Sampling()),
            },
            repeats,
            warm_up=1,
        )
        lines.append(line(f"torch.compile, {name}", "eager", "compiled", seconds))
    return lines


class NoSpans(Spans):
    """Keeps no record."""

    def close(self, kind: str, *, at: float | None = None, **values: int) -> None:
        pass

    def close_decode(self, steps: int, batch: int, context: int, **values: object) -> None:
        pass


def record_cost(demo: DemoWorkload, repeats: int) -> tuple[list[dict[str, object]], str]:
    """What the engine's records take: with and without them, and counted call by call, which is finer."""
    without = demo.engine()
    without._spans = NoSpans(time.perf_counter, ROWS)
    with_records = demo.engine()
    fixed = Sampling(seed=1, stop_token_ids=demo.sampling.stop_token_ids)
    seconds = in_turns(
        {
            "with records": lambda: run_engine(with_records, demo.requests(4 * ROWS), fixed),
            "without": lambda: run_engine(without, demo.requests(4 * ROWS), fixed),
        },
        repeats,
        warm_up=1,
    )
    count = len(with_records.take_records()) / (repeats + 1)
    spans = Spans(time.perf_counter, ROWS)
    start = time.perf_counter()
    for _ in range(10_000):
        spans.close_decode(3, 32, 1000)
    each = (time.perf_counter() - start) / 10_000
    share = count * each / statistics.median(seconds["with records"])
    text = (
        f"Engine records: {count:.0f} in a rollout of {4 * ROWS} demo rows, {1e6 * each:.1f} microseconds each, "
        f"{share:.3%} of its time (goal: under 1 %)."
    )
    return [line("engine records", "with records", "without", seconds)], text


def against_vllm(repeats: int) -> list[dict[str, object]]:
    """A window and its continuation with fresh weights, both engines eager, in float32. Only where vLLM is."""
    from tppo.rollout.vllm_engine import VllmEngine

    lines = []
    for name, shape in {"2 x 128": MODELS["2 x 128"], "4 x 256": MODELS["4 x 256"]}.items():
        model = model_of(shape)
        path = Path("runs") / f"vllm-{name.replace(' ', '')}"
        save_policy(model, character_tokenizer(), path)
        vllm = VllmEngine(
            model, str(path), slots=ROWS, max_tokens=512, temperature=1.0, dtype="float32", eager=True, block_size=32,
            kv_cache_bytes=2**28, generator=torch.Generator().manual_seed(0), clock=time.perf_counter,
        )  # fmt: skip
        requests = [Request(i, torch.randint(2, 100, (64,)).tolist(), 0, NEW_TOKENS) for i in range(ROWS)]
        ours = engine_of(model, ROWS)

        def step(engine: object, requests: list[Request] = requests) -> None:
            run_engine(engine, requests, Sampling())  # type: ignore[arg-type]
            engine.update_weights(0)  # type: ignore[attr-defined]

        seconds = in_turns(
            {"vLLM": lambda v=vllm: step(v), "torch engine": lambda o=ours: step(o)}, repeats, warm_up=1
        )
        lines.append(line(f"vLLM on this CPU, {name}, {ROWS} x {NEW_TOKENS} tokens and an update", "vLLM",
                          "torch engine", seconds))  # fmt: skip
    return lines


def goals(table: pd.DataFrame) -> str:
    parts = []
    for prefix, goal in GOALS.items():
        got = table[table.case.str.startswith(prefix)]["A / B"]
        verdict = "reached" if (got >= goal).all() else "missed"
        parts.append(f"{prefix}: {goal} times `generate` or more: {verdict} ({got.min():.2f} to {got.max():.2f})")
    return "Goals: " + "; ".join(parts) + "."


def draw(table: pd.DataFrame) -> style.Figure:
    """A / B of every case, with the range over repeats."""
    figure, (axes,) = style.subplots(width=8.5, height=0.36 * len(table) + 1.2)
    for y, row in enumerate(table.iloc[::-1].itertuples(index=False)):
        middle, least, largest = row[5:8]
        axes.plot([least, largest], [y, y], color=style.SKY, linewidth=5, solid_capstyle="butt")
        axes.plot([middle], [y], "o", color=style.BLUE)
        axes.annotate(f"{middle:.2f}", (middle, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.axvline(1.0, color=style.BLACK, linewidth=0.8)
    labels = [f"{row.case}: {row.A} / {row.B}" for row in table.iloc[::-1].itertuples(index=False)]
    axes.set_yticks(range(len(table)), labels, fontsize=8)
    axes.set_xlim(left=0)
    axes.set_xlabel("time of the first / time of the second")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--record", action="store_true", help="write docs/results/rollout")
    options = parser.parse_args()
    quieten_libraries()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    if importlib.util.find_spec("vllm") is not None:
        name, lines, notes = "vllm", against_vllm(options.repeats), []
    else:
        name = "rollout"
        demo = DemoWorkload()
        lines = equal_batch(options.repeats) + end_to_end(demo, options.repeats)
        lines += kept_keys_and_values(demo, options.repeats) + compiled(options.repeats)
        record_lines, cost = record_cost(demo, options.repeats)
        lines += record_lines
        notes = [cost, stale_keys_in_training(demo)]
    table = pd.DataFrame(lines)
    print(table.to_string(index=False), *notes, sep="\n")
    machine = (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {torch.get_num_threads()} thread. Load average {load:.2f} before, "
        f"{os.getloadavg()[0]:.2f} after; 1 is this process."
    )
    if options.record:
        RESULTS.mkdir(parents=True, exist_ok=True)
        table.to_csv(RESULTS / f"{name}.csv", index=False)
        (RESULTS / f"{name}.txt").write_text("\n\n".join([machine, *notes]) + "\n")
        write_page()


def write_page() -> None:
    """The page and its figure, from whichever of the two environments' tables are there."""
    parts = [
        "# Rollout: speed",
        "Written by `python -m benchmarks.rollout --record`. What is compared takes turns, on one thread; A / B is "
        "the median of the repeats' ratios, with the least and the largest.",
    ]
    tables = []
    for name in ("rollout", "vllm"):
        if (RESULTS / f"{name}.csv").exists():
            table = pd.read_csv(RESULTS / f"{name}.csv")
            parts += [markdown(table), (RESULTS / f"{name}.txt").read_text().strip()]
            parts += [goals(table)] if name == "rollout" else []
            tables.append(table)
    figure = draw(pd.concat(tables, ignore_index=True))
    figure.savefig(RESULTS / "rollout.png")
    parts.append("![ratios](rollout.png)")
    (RESULTS / "README.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
