import json

import numpy as np
import pytest

from profiling.errors import DataError
from profiling.reader import Run
from simulator import load_experiment, simulate
from simulator.calibrate import calibrate
from simulator.hardware import load_gpu
from simulator.hardware.efficiency import load_efficiency
from simulator.logs import calibrate_logs, read_log
from simulator.models import load_model
from simulator.transfer import ROLLOUT_SECONDS, ROLLOUT_SHARES, transfer
from tppo.cli import main

TRUE = {"decode_base_s": 0.02, "decode_per_row_s": 4e-5, "logprob_forward_per_token_s": 2e-6,
        "policy_update_base_s": 3.0, "policy_update_per_token_s": 8e-6, "reward_per_row_s": 0.01}  # fmt: skip
ENGINES, ROWS = 4, 256


def steps(count=12):
    """A verl step by the costs above: {metric: value}."""
    random = np.random.default_rng(4)
    for step in range(1, count + 1):
        mean, prompt = float(random.uniform(300, 900)), 100.0
        longest = float(random.integers(1500, 4000))
        tokens = ROWS * (mean + prompt)
        gen = TRUE["decode_base_s"] * longest + TRUE["decode_per_row_s"] * ROWS * mean / ENGINES
        log_prob = TRUE["logprob_forward_per_token_s"] * tokens
        update = TRUE["policy_update_base_s"] + TRUE["policy_update_per_token_s"] * tokens
        reward = TRUE["reward_per_row_s"] * ROWS
        testing = 7.0 if step % 5 == 0 else 0.0
        yield step, {
            "timing_s/gen": gen, "timing_s/old_log_prob": log_prob, "timing_s/update_actor": update,
            "timing_s/reward": reward, "timing_s/step": gen + log_prob + update + reward + testing + 0.5,
            "response_length/mean": mean, "response_length/max": longest, "response_length/clip_ratio": 0.0,
            "prompt_length/mean": prompt, "perf/total_num_tokens": int(tokens), "perf/mfu/actor": float("nan"),
            **({"timing_s/testing": testing} if testing else {}),
        }  # fmt: skip


def console(path):
    lines = ["INFO starting", "(TaskRunner pid=7) Training Progress:   0%"]
    for step, values in steps():
        entries = [f"step:{step}", *(f"{key}:np.float64({value})" if "gen" in key else f"{key}:{value}"
                                     for key, value in values.items())]  # fmt: skip
        lines.append("\x1b[36m(TaskRunner pid=7)\x1b[0m " + " - ".join(entries))
    path.write_text("\n".join(lines))
    return path


def json_lines(path):
    path.write_text("\n".join(json.dumps({"step": step, "data": {k: v for k, v in values.items() if v == v}})
                              for step, values in steps()))  # fmt: skip
    return path


def wandb_export(path):
    rows = [dict(values, Step=step) for step, values in steps()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    titles = [name if name == "Step" else f"my run - {name}" for name in names]
    extra = ",my run - timing_s/gen__MIN"
    body = [",".join(str(row.get(name, "")) for name in names) + ",0" for row in rows]
    path.write_text("\n".join([",".join(titles) + extra, *body]))
    return path


def tensorboard(path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(path)) as writer:
        for step, values in steps():
            for name, value in values.items():
                writer.add_scalar(name, value, step)
    return path


@pytest.mark.parametrize(
    ("write", "name"),
    [(console, "console.log"), (json_lines, "m.jsonl"), (wandb_export, "w.csv"), (tensorboard, "events")],
)
def test_costs_come_back_from_a_verl_log_in_each_of_its_formats(tmp_path, write, name):
    path = write(tmp_path / name)
    assert list(read_log("verl", path).step) == list(range(1, 13))
    found = calibrate_logs("verl", [path], engines=ENGINES)
    for key, value in TRUE.items():
        assert found.costs[key] == pytest.approx(value, rel=2e-3), key
    assert found.costs["step_other_s"] == pytest.approx(0.5, rel=1e-2)
    assert found.costs["logprob_forward_base_s"] == pytest.approx(0, abs=1e-3)
    assert found.evaluation_s == pytest.approx(7.0)
    assert found.fits["decode"].r2 > 0.999


def test_a_calibration_from_a_log_drives_a_simulation(tmp_path, capsys):
    path = console(tmp_path / "console.log")
    target = tmp_path / "c.json"
    assert main(["calibrate", f"verl:{path}", "--engines", "4", "--output", str(target)]) == 0
    assert "decode_base_s" in capsys.readouterr().out
    result = simulate(
        load_experiment(
            {
                "workload": {"steps": 1, "prompts_per_step": ROWS, "prompt_tokens": 100, "max_response_tokens": 2000,
                             "response_tokens": {"kind": "fixed", "value": 2000}},
                "schedule": {"kind": "synchronous"}, "cluster": {"engines": ENGINES},
                "cost": {"kind": "calibrated", "file": str(target)},
            }
        )
    )  # fmt: skip
    assert result.summary()["rollout_seconds"] == pytest.approx(2000 * (0.02 + 4e-5 * 64), rel=0.01)


def trl_state(path):
    """TRL's trainer_state.json: one time a step, tokens counted up."""
    random = np.random.default_rng(1)
    history, seen = [], 0.0
    for step in range(5, 105, 5):
        longest, tokens = float(random.integers(200, 900)), float(random.integers(20_000, 60_000))
        seen += 5 * tokens
        seconds = 0.03 * longest + 1e-4 * tokens + 2.0
        history.append({"step": step, "step_time": seconds, "num_tokens": seen, "loss": 0.1,
                        "completions/mean_length": 100.0, "completions/max_length": longest})  # fmt: skip
    history.append({"step": 100, "train_runtime": 5.0})
    path.write_text(json.dumps({"log_history": history}))
    return history


def test_costs_come_back_from_trls_log(tmp_path):
    history = trl_state(tmp_path / "trainer_state.json")
    for path in (tmp_path, tmp_path / "trainer_state.json"):
        found = calibrate_logs("trl", [path], engines=1)
        assert found.costs["decode_base_s"] == pytest.approx(0.03, rel=1e-3)
        assert found.costs["policy_update_per_token_s"] == pytest.approx(1e-4, rel=1e-3)
        assert found.costs["step_other_s"] == pytest.approx(2.0, rel=1e-3)
    printed = tmp_path / "printed.log"
    printed.write_text("\n".join(str(entry) for entry in history))
    assert calibrate_logs("trl", [printed], engines=1).costs["decode_base_s"] == pytest.approx(0.03, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "name", "text", "message"),
    [
        ("verl", "a.log", "nothing here\n", "a.log: holds no step of a verl log"),
        ("verl", "a.log", "step:1 - timing_s/gen:2.0\n", "have no response_length/mean, response_length/max"),
        ("verl", "a.csv", "x,y\n1,2\n", "has no column Step, _step or step"),
        ("verl", "a.csv", "", "cannot be read as CSV"),
        ("verl", "a.log", "step:1 - timing_s/gen:2.0 - response_length/mean:3 - response_length/max:4\n",
         "give --rows-per-step"),
        ("verl", "a.log", "step:1 - timing_s/gen:2.0 - response_length/mean:3 - response_length/max:4 - "
         "perf/total_num_tokens:30\n", "1 steps are too few to tell 2 costs apart"),
        ("trl", "trainer_state.json", "[1]", "is not a trainer_state.json"),
        ("trl", "trainer_state.json", '{"log_history": 3}', "holds no step of a trl log"),
        ("trl", "a.log", "{'loss': 1, 'num_tokens': 5}\n", "have no step_time"),
        ("trl", "a.log", "{" * 5000, "holds no step"),
    ],
)  # fmt: skip
def test_logs_that_cannot_be_used_say_what_they_lack(tmp_path, kind, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        calibrate_logs(kind, [path], engines=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verl:/no/such.log"], "/no/such.log: no such log"),
        (["verl:a", "trl:b"], "need calibrations of their own"),
        (["verl:a", "run"], "need calibrations of their own"),
        (
            ["verl:a", "--transfer", "f.toml", "--model", "Qwen2.5-7B", "--gpu", "H200"],
            "--transfer needs a run directory",
        ),
        (["run", "--transfer", "f.toml"], "--transfer needs --model and --gpu"),
        (["verl:a", "--engines", "0"], "must be at least 1"),
    ],
)
def test_bad_calls_are_one_line(capsys, words, message):
    assert main(["calibrate", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def experiment(efficiency=None, gpu="H100-SXM", model="Qwen2.5-1.5B"):
    own = {} if efficiency is None else {"efficiency": str(efficiency)}
    return load_experiment(
        {
            "workload": {"steps": 6, "prompts_per_step": 24, "samples_per_prompt": 4, "prompt_tokens": 200,
                         "max_response_tokens": 4000,
                         "response_tokens": {"kind": "lognormal", "mean": 900, "sigma": 0.8}},
            "schedule": {"kind": "synchronous"}, "cluster": {"engines": 8},
            "cost": {"kind": "analytic", "model": model, "gpu": gpu, "mini_batches": 1, "value_model": False, **own},
        }
    )  # fmt: skip


def test_a_transfer_from_the_wrong_model_is_refused(tmp_path, capsys):
    simulate(experiment()).write(tmp_path / "run")
    words = [
        "calibrate",
        str(tmp_path / "run"),
        "--transfer",
        str(tmp_path / "x.toml"),
        "--gpu",
        "H100-SXM",
        "--model",
    ]
    assert main([*words, "Qwen2.5-14B"]) == 2
    assert "beyond the peak of H100-SXM; is --model Qwen2.5-14B" in capsys.readouterr().err
    assert main([*words, "Qwen2.5-1.5B", "--tensor-parallel", "5"]) == 2
    assert "--tensor-parallel 5" in capsys.readouterr().err
    assert main([*words, "Qwen2.5-1.5B"]) == 0
    assert "1.00 times the seconds of the factors for hopper and vllm, training 1.0" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_slower_machine_transfers_to_another_gpu_and_model(tmp_path, capsys):
    """A run at 0.8 of every rate and 1.25 times every overhead: the transfer finds that, and its prediction of another
    model on another GPU is what a simulation with those very factors gives."""
    from profiling.settings import to_toml

    start, _ = load_efficiency("hopper", "vllm")
    slow = start.model_copy(update={name: getattr(start, name) * 0.8 for name in ROLLOUT_SHARES} |
                            {name: getattr(start, name) / 0.8 for name in ROLLOUT_SECONDS} |
                            {"train_gemm": 0.3, "train_attention": 0.35 * 0.3 / 0.45})  # fmt: skip
    (tmp_path / "slow.toml").write_text(to_toml(slow.model_dump(mode="json")))
    simulate(experiment(tmp_path / "slow.toml")).write(tmp_path / "run")
    run = Run(tmp_path / "run")
    found = transfer(run, calibrate([run]), load_model("Qwen2.5-1.5B"), load_gpu("H100-SXM"), start,
                     tensor_parallel=1, trainer_gpus=8)  # fmt: skip
    assert found.rollout_slower == pytest.approx(1.25, rel=1e-3)
    assert found.training_slower == pytest.approx(1.5, rel=0.02)
    assert found.efficiency.rollout_uncertainty > 0.1
    words = ["calibrate", str(tmp_path / "run"), "--transfer", str(tmp_path / "mine.toml"), "--model", "Qwen2.5-1.5B",
             "--gpu", "H100-SXM"]  # fmt: skip
    assert main(words) == 0
    assert "1.25 times the seconds" in " ".join(capsys.readouterr().err.split())
    predicted = simulate(experiment(tmp_path / "mine.toml", "H200", "Qwen2.5-7B")).summary()
    true = simulate(experiment(tmp_path / "slow.toml", "H200", "Qwen2.5-7B")).summary()
    untouched = simulate(experiment(None, "H200", "Qwen2.5-7B")).summary()
    assert predicted["rollout_seconds"] == pytest.approx(true["rollout_seconds"], rel=0.01)
    assert predicted["wall_seconds"] == pytest.approx(true["wall_seconds"], rel=0.03)
    assert untouched["rollout_seconds"] == pytest.approx(0.8 * true["rollout_seconds"], rel=0.01)
