"""Named settings of the demo and the benchmarks: the same task with shorter and longer tails, and two models."""

from importlib.resources import files
from pathlib import Path

from profiling.errors import ConfigError
from profiling.settings import Settings, check_settings
from tppo.config import (
    AlgorithmConfig,
    DataConfig,
    EvaluationConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    ProfileConfig,
    RolloutConfig,
    RunConfig,
    ValueConfig,
)
from tppo.data.arithmetic import ArithmeticTask
from tppo.warmstart import WarmStartConfig

ARMS = ("ppo", "tppo", "tppo-full")
"""PPO; T-PPO; and T-PPO with the window at the maximum, which differs from T-PPO by truncation alone."""


class Regime(Settings):
    """Everything the three arms share."""

    target_accuracy: float
    warm_start: WarmStartConfig
    data: DataConfig
    rollout: RolloutConfig
    value: ValueConfig
    optimizer: OptimizerConfig
    train: LoopConfig
    evaluation: EvaluationConfig

    def task(self, seed: int) -> ArithmeticTask:
        data = self.data
        return ArithmeticTask(median_steps=data.median_steps, sigma=data.sigma, max_steps=data.max_steps, seed=seed)

    def run_config(self, arm: str, seed: int, model: Path, output: Path) -> RunConfig:
        """One arm with one seed. The seed gives the problems, the samples and the order of mini-batches."""
        window = self.rollout.max_response_tokens if arm == "tppo-full" else self.rollout.window
        return RunConfig(
            output=output,
            model=ModelConfig(path=str(model)),
            data=self.data.model_copy(update={"seed": seed}),
            algorithm=AlgorithmConfig(name="ppo" if arm == "ppo" else "tppo"),
            rollout=self.rollout.model_copy(update={"window": window}),
            value=self.value,
            optimizer=self.optimizer,
            train=self.train.model_copy(update={"seed": seed, "stop_at_accuracy": self.target_accuracy}),
            evaluation=self.evaluation,
            profile=ProfileConfig(interval_s=0.1),  # simulations are calibrated on these runs
        )


def load_regime(name: str) -> Regime:
    import tomllib

    folder = files("tppo.regimes")
    known = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
    if name not in known:
        raise ConfigError(f"--regime {name}: not one of {', '.join(known)}")
    values = tomllib.loads((folder / f"{name}.toml").read_text())
    return check_settings(values, Regime, where=f"regime {name}")
