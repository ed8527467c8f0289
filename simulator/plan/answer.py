"""The answer: every option with intervals, the front of time against money, and what decides."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from profiling.errors import ConfigError, ToolkitError
from profiling.model_memory import LOGIT
from simulator.failures import MOST_TRIES
from simulator.hardware import Gpu, load_gpu
from simulator.hardware.efficiency import load_efficiency
from simulator.lengths import read_lengths
from simulator.models import load_model
from simulator.plan.estimate import Estimate, estimate
from simulator.plan.money import hours, paid_gpus, watts
from simulator.plan.options import Option, options_of
from simulator.plan.question import Question
from simulator.processes import in_processes
from simulator.workload import lengths_of_run

Each = Callable[[int, int], None]

NINETY = 1.6449
"""Standard deviations on either side that hold 90 % of a normal distribution."""


@dataclass(frozen=True)
class Answer:
    rows: list[dict[str, Any]]
    """One an option, in the order asked; null is what cannot be said."""
    assumptions: list[str]
    """Defaults that nobody confirmed, the most decisive first."""
    decides: str
    best_window: str | None
    tail: str

    def as_dict(self) -> dict[str, Any]:
        return vars(self)


@dataclass(frozen=True)
class Draws:
    """Of what is uncertain, the same for all options: factors on rollout and training seconds and on lengths, and
    steps that a schedule needs per step of the synchronous one."""

    rollout: np.ndarray
    training: np.ndarray
    lengths: np.ndarray
    ratio: np.ndarray | None

    @classmethod
    def of(cls, question: Question, gpu: Gpu) -> "Draws":
        random = np.random.default_rng(question.seed)
        factors, _ = load_efficiency(gpu.family, question.factors_of, question.efficiency)
        of_mean = question.mean_uncertainty
        if question.lengths is not None:  # standard error of a pilot's mean
            pilot = question.lengths
            drawn = lengths_of_run(pilot)[0] if pilot.is_dir() else read_lengths(pilot, question.lengths_column)
            values = np.minimum(drawn, question.max_response_tokens)
            of_mean = (
                NINETY * float(values.std(ddof=1) / values.mean() / math.sqrt(len(values))) if len(values) > 1 else 0.5
            )

        def factor(uncertainty: float) -> np.ndarray:
            return np.exp(random.standard_normal(question.draws) * math.log1p(uncertainty) / NINETY)

        spread = factor(factors.rollout_uncertainty), factor(factors.train_uncertainty), factor(of_mean)
        ratio = random.uniform(*question.steps_ratio, question.draws) if question.steps_ratio is not None else None
        return cls(*spread, ratio)

    def only(self, name: str) -> "Draws":
        """With all but one of them at their middle."""
        one = np.ones_like(self.rollout)
        kept = {key: getattr(self, key) if key == name else one for key in ("rollout", "training", "lengths")}
        ratio = None if self.ratio is None else self.ratio if name == "ratio" else one * self.ratio.mean()
        return Draws(**kept, ratio=ratio)

    def step_s(self, own: Estimate) -> np.ndarray:
        rollout = own.rollout_s * self.rollout * self.lengths
        training = own.training_s * self.training * self.lengths
        return (np.maximum(rollout, training) if own.beside else rollout + training) + own.other_s


def answer(
    question: Question,
    each: Each = lambda done, of: None,
    estimates: Callable[[Sequence[Option], Each], list[Estimate | str]] | None = None,
) -> Answer:
    """each(done, of): called after every option. estimates: of the options, or a fault in its place; left out: all are
    simulated here. Raises ConfigError when nothing can be run."""
    gpu = load_gpu(question.gpu)
    options = options_of(question)
    known = (estimates or _estimates)(options, each)
    found = [_never_ends(question, option, own) for option, own in zip(options, known, strict=True)]
    draws = Draws.of(question, gpu)
    rows = [_row(question, gpu, option, own, draws) for option, own in zip(options, found, strict=True)]
    possible = [place for place, own in enumerate(found) if isinstance(own, Estimate)]
    if not possible:
        raise ConfigError(f"no option can be run; the first: {rows[0]['fault']}")
    _compare(question, gpu, options, found, draws, rows, possible)
    return Answer(
        rows,
        assumptions=_assumptions(question, gpu),
        decides=_what_decides(question, options, found, draws, rows, possible),
        best_window=_best_window(options, found, possible),
        tail=_where_the_tail_dominates(options, found, possible),
    )


def _estimates(options: Sequence[Option], each: Each) -> list[Estimate | str]:
    """On all cores; a fault in its place."""
    todo = {str(place): option for place, option in enumerate(options) if option.experiment is not None}
    answers: dict[str, Estimate | str] = {str(place): str(option.fault) for place, option in enumerate(options)}
    for done, (place, get) in enumerate(in_processes(_one, todo, None), start=1):
        answers[place] = get()
        each(done, len(todo))
    return list(answers.values())


def _one(option: Option) -> Estimate | str:
    try:
        return estimate(option)
    except ToolkitError as error:
        return str(error)


def _never_ends(question: Question, option: Option, own: Estimate | str) -> Estimate | str:
    """Its estimate, or why failures never let it end."""
    if isinstance(own, str) or question.mtbf_hours is None:
        return own
    steps = question.checkpoint_every or _steps(question, own)
    stretch_h, mean_h = own.step_s * steps / 3600, question.mtbf_hours / option.gpus
    if stretch_h > mean_h * math.log(MOST_TRIES):
        return (
            f"{stretch_h:.3g} h without a checkpoint fail more than {MOST_TRIES} times on average ({option.gpus} GPUs "
            f"fail every {mean_h:.3g} h); set checkpoint_every"
        )
    return own


def _steps(question: Question, own: Estimate) -> float:
    return float(question.steps) if question.steps is not None else (question.finished_rows or 0) / own.finished_rows


def _hours(question: Question, option: Option, own: Estimate, draws: Draws) -> np.ndarray:
    noise = np.random.default_rng([question.seed, option.gpus, hash_of(option)]).standard_normal(question.draws)
    return hours(
        draws.step_s(own) * np.exp(noise * own.noise), _steps(question, own),
        evaluation_every=question.evaluation_every, evaluation_s=question.evaluation_s,
        checkpoint_every=question.checkpoint_every, checkpoint_s=question.checkpoint_s,
        mtbf_hours=None if question.mtbf_hours is None else question.mtbf_hours / option.gpus,
        restart_s=question.restart_s,
    )  # fmt: skip


def hash_of(option: Option) -> int:
    """The same in every run, unlike Python's own."""
    return sum(ord(letter) * 31**place for place, letter in enumerate(option.label)) % 2**31 + option.tensor_parallel


def _price(question: Question, gpu: Gpu) -> float | None:
    return gpu.price_per_hour if question.price_per_hour is None else question.price_per_hour


def _percentiles(values: np.ndarray | None) -> dict[str, float] | None:
    if values is None:
        return None
    low, middle, high = np.percentile(values, [10, 50, 90])
    return {"p10": float(low), "p50": float(middle), "p90": float(high)}


def _row(question: Question, gpu: Gpu, option: Option, own: Estimate | str, draws: Draws) -> dict[str, Any]:
    row: dict[str, Any] = {
        "gpus": option.gpus, "schedule": option.label, "tensor_parallel": option.tensor_parallel,
        "simulated_only": option.schedule in ("in_flight",),
        "memory_headroom_gb": None if option.headroom_bytes is None else option.headroom_bytes / 1e9,
        "tightest_phase": option.tightest or None,
        "memory_gb": option.needs and {
            phase: {part: size / 1e9 for part, size in needs.items()} for phase, needs in option.needs.items()
        },
    }  # fmt: skip
    if isinstance(own, str):
        return {**row, "fault": own}
    took = _hours(question, option, own, draws)
    paid = paid_gpus(option.gpus, gpu, whole_nodes=question.whole_nodes)
    price, power = _price(question, gpu), watts(gpu, own.gpu_seconds)
    return {
        **row, "fault": None, "steps": _steps(question, own), "hours": _percentiles(took),
        "gpu_hours": _percentiles(took * paid),
        "dollars": _percentiles(None if price is None else took * paid * price),
        "kwh": _percentiles(None if power is None else took * option.gpus * power / 1000),
        "idle_share": own.idle_share, "first_idle_cause": own.first_idle_cause, "tail_share": own.tail_share,
        "seconds_per_step": own.step_s, "rollout_seconds_per_step": own.rollout_s,
        "training_seconds_per_step": own.training_s,
        "policy_update_mfu": _utilisation(question, gpu, option, own),
    }  # fmt: skip


def _utilisation(question: Question, gpu: Gpu, option: Option, own: Estimate) -> dict[str, float] | None:
    """Model FLOPs of the policy update / (seconds x training GPUs x dense BF16 peak), nothing for recomputation.
    causal: three forward passes, attention over the pairs there are. verl: verl's own count, of full squares."""
    if option.experiment is None or not own.update_s:
        return None
    model = load_model(question.model)
    peak = own.update_s * option.experiment.cluster.training_gpus * gpu.bf16_flops
    causal = 3 * model.forward_flops(own.processed_tokens, own.processed_pairs)
    return {"causal": causal / peak, "verl": model.verl_flops(own.processed_tokens, own.processed_squares) / peak}


def _compare(
    question: Question, gpu: Gpu, options: Sequence[Option], estimates: Sequence[Estimate | str], draws: Draws,
    rows: list[dict[str, Any]], possible: Sequence[int],
) -> None:  # fmt: skip
    """Speed-ups over the synchronous twin, the probability of being the cheapest, the front, and a sentence each."""
    took = {place: _hours(question, options[place], estimates[place], draws) for place in possible}  # type: ignore[arg-type]
    money = np.array([took[place] * paid_gpus(options[place].gpus, gpu, whole_nodes=question.whole_nodes)
                      for place in possible])  # fmt: skip
    if question.deadline_hours is not None:
        late = np.array([np.median(took[place]) > question.deadline_hours for place in possible])
        money[late] = math.inf
    cheapest = np.bincount(money.argmin(axis=0), minlength=len(possible)) / question.draws
    if np.isinf(money).all():
        cheapest[:] = 0.0
    middles = [
        (float(np.median(took[place])), float(np.median(one))) for place, one in zip(possible, money, strict=True)
    ]
    for at, place in enumerate(possible):
        own, row = estimates[place], rows[place]
        assert isinstance(own, Estimate)
        twin = _twin(options, estimates, place)
        row["speedup_per_step"] = twin.step_s / own.step_s if twin else None
        row["speedup_per_finished_row"] = _rate(own, "finished_rows") / _rate(twin, "finished_rows") if twin else None
        row["speedup_per_trained_token"] = (
            _rate(own, "trained_tokens") / _rate(twin, "trained_tokens") if twin else None
        )
        same = None
        if twin and options[place].schedule == "synchronous":
            same = np.ones(question.draws)
        elif twin and draws.ratio is not None:
            same = draws.step_s(twin) / draws.step_s(own) / draws.ratio
        row["speedup_at_equal_score"] = _percentiles(same)
        row["probability_cheapest"] = float(cheapest[at])
        row["meets_deadline"] = (
            None if question.deadline_hours is None else bool(np.median(took[place]) <= question.deadline_hours)
        )
        row["on_the_front"] = not any(
            t <= middles[at][0] and m <= middles[at][1] and (t, m) != middles[at] for t, m in middles
        )
        row["why"] = _why(options[place], own, twin)


def _rate(own: Estimate, what: str) -> float:
    return float(getattr(own, what)) / own.step_s


def _twin(options: Sequence[Option], estimates: Sequence[Estimate | str], place: int) -> Estimate | None:
    """The synchronous option on the same GPUs."""
    for option, own in zip(options, estimates, strict=True):
        same = option.gpus == options[place].gpus and option.tensor_parallel == options[place].tensor_parallel
        if same and option.schedule == "synchronous" and isinstance(own, Estimate):
            return own
    return None


def _why(option: Option, own: Estimate, twin: Estimate | None) -> str:
    share = own.rollout_s / (own.rollout_s + own.training_s) if own.rollout_s + own.training_s else 0.0
    first = f"rollout is {share:.0%} of the work of a step"
    if option.schedule == "synchronous":
        return f"{first}, and {own.tail_share:.0%} of it waits for the last tenth of the rows"
    if twin is None:
        return f"{first}; no synchronous run fits to compare with"
    ratio = _rate(own, "finished_rows") / _rate(twin, "finished_rows")
    if option.schedule == "truncated":
        reason = f"a row takes {own.visits:.1f} steps, each of which processes its context again"
    elif option.schedule == "oversample":
        reason = "no step waits for its tail, rows that go on are prefilled again"
    else:
        reason = f"training runs beside the rollout, and {own.idle_share:.0%} of the GPU time still waits"
    return f"{first}; {reason}: {ratio:.2f} times the responses per hour of the synchronous run"


def _what_decides(
    question: Question, options: Sequence[Option], estimates: Sequence[Estimate | str], draws: Draws,
    rows: Sequence[dict[str, Any]], possible: Sequence[int],
) -> str:  # fmt: skip
    """The uncertain quantity that moves the hours of the likeliest option most."""
    best = max(possible, key=lambda place: rows[place]["probability_cheapest"])
    own = estimates[best]
    assert isinstance(own, Estimate)
    names = {"rollout": "the engine's efficiency factors", "training": "the training efficiency",
             "lengths": "the length of responses"}  # fmt: skip
    spread = {name: float(np.log(_hours(question, options[best], own, draws.only(name))).std()) for name in names}
    worst = max(spread, key=lambda name: spread[name])
    low, high = np.percentile(_hours(question, options[best], own, draws.only(worst)), [10, 90])
    label = f"{options[best].label} on {options[best].gpus} GPUs"
    moves = f"{names[worst]}: alone it moves {label} from {low:.3g} to {high:.3g} hours (P10 to P90)"
    if not rows[best]["probability_cheapest"]:
        return f"{moves}; no option meets the deadline of {question.deadline_hours:g} hours"
    return f"{moves}; this option is the cheapest in {rows[best]['probability_cheapest']:.0%} of the draws"


def _best_window(
    options: Sequence[Option], estimates: Sequence[Estimate | str], possible: Sequence[int]
) -> str | None:
    """Per finished response, on the most GPUs that were asked for."""
    most = max(options[place].gpus for place in possible)
    own = [
        (_rate(estimates[place], "finished_rows"), options[place].window)  # type: ignore[arg-type]
        for place in possible
        if options[place].gpus == most and options[place].schedule in ("truncated", "synchronous")
    ]
    if not any(window for _, window in own):
        return None
    rate, window = max(own, key=lambda pair: pair[0])
    plain = max(rate for rate, window in own if window is None) if any(w is None for _, w in own) else rate
    if window is None:
        return f"none on {most} GPUs: no window finishes more responses an hour than the synchronous run"
    return f"{window} on {most} GPUs: {rate / plain:.2f} times the responses an hour of the synchronous run"


def _where_the_tail_dominates(
    options: Sequence[Option], estimates: Sequence[Estimate | str], possible: Sequence[int]
) -> str:
    """The first number of GPUs at which the synchronous rollout spends over half of its time on the last tenth."""
    shares = sorted(
        (options[place].gpus, own.tail_share)
        for place in possible
        if options[place].schedule == "synchronous" and isinstance(own := estimates[place], Estimate)
    )
    if not shares:
        return "no synchronous run fits"
    text = ", ".join(f"{share:.0%} on {gpus}" for gpus, share in shares)
    for gpus, share in shares:
        if share > 0.5:
            return f"from {gpus} GPUs on, over half of the synchronous rollout waits for its last tenth ({text})"
    return f"on none of these numbers of GPUs: its last tenth takes {text} of the synchronous rollout"


def _assumptions(question: Question, gpu: Gpu) -> list[str]:
    """What was assumed because nothing was said."""
    said = question.model_fields_set
    factors, borrowed = load_efficiency(gpu.family, question.factors_of, question.efficiency)
    found = []
    if question.lengths is None:
        law = f"lognormal, mean {question.mean_tokens:g} after the cap, sigma {question.sigma:g}"
        found.append(f"response lengths: {law}{'' if 'mean_tokens' in said else ' (nothing was given)'}")
    where = f"borrowed from {borrowed}" if borrowed else f"{factors.family}, {factors.engine}"
    found.append(
        f"efficiency factors: {where}; rollout +-{factors.rollout_uncertainty:.0%}, training at "
        f"{factors.train_gemm:.0%} of the peak +-{factors.train_uncertainty:.0%}"
    )
    if question.engine == "torch":
        found.append("the engine's speed: vLLM's, which ours does not reach")
    more = load_model(question.model).vocabulary * LOGIT * 1000 / 1e9
    found.append(
        f"training memory: logits of {question.logit_tokens} tokens at a time; ours holds a whole response's, or its "
        f"window's: {more:.2g} GB more for each 1000 tokens above (--config says it of a training configuration)"
    )
    if not question.cpu_offload:
        found.append("training memory: weights, gradients and moments stay during rollouts (else --cpu-offload)")
    price = _price(question, gpu)
    if price is None:
        found.append(f"price: unknown for {gpu.name}; give --price-per-hour")
    elif question.price_per_hour is None:
        found.append(f"price: {price:g} dollars a GPU-hour, list price of {gpu.price_date}")
    if gpu.tdp_watts is None or gpu.idle_watts is None:
        found.append(f"energy: idle power or TDP of {gpu.name} is unknown, so no kWh")
    else:
        found.append("energy: GPUs only, a fixed share of TDP for each kind of work (simulator/plan/money.py)")
    if question.steps_ratio is None:
        found.append("steps to a score: not stated, so no speed-up at equal score")
    if question.steps is not None:
        found.append(
            "equal steps: every option runs the same number, though a truncated step finishes fewer responses "
            "(--finished-rows compares equal responses)"
        )
    if question.mtbf_hours is None:
        found.append("failures: none")
    if not question.reward_p90_s:
        found.append("rewards: free")
    return found
