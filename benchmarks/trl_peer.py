"""Steps of TRL's PPO trainer on demand, in a process and an environment of its own. Imports none of our code.

python trl_peer.py SETTINGS.json    (benchmarks.training_step writes the settings and starts this)

Every line on stdin starts one step; its times come back as a line of JSON. A line `capture` also saves the step's
tokens, TRL's own log-probabilities, reference log-probabilities and values, and the weights that made them. TRL's
functions run unchanged: wrappers only read the clock and what goes in and out.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

answers, sys.stdout = sys.stdout, sys.stderr  # TRL prints; stdout carries answers alone


class OnDemand(TrainerCallback):
    """Holds TRL's loop between two steps and answers for the one that ended.

    A step reaches from its command to TRL's `on_step_end`; what TRL tidies up after that counts in the next one.
    """

    def __init__(self, models: SimpleNamespace, settings: dict[str, Any]) -> None:
        self.models, self.settings = models, settings
        self.seconds: dict[str, float] = {}
        self.seen: list[torch.Tensor] = []
        self.capturing = False
        self.start = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds = {"step": time.perf_counter() - self.start, **self.seconds}
        if self.capturing:
            self.save()
        self.answer(seconds)
        self.wait()

    def wait(self) -> None:
        command = sys.stdin.readline()
        if not command:  # the benchmark has ended
            sys.exit(0)
        self.capturing = command.strip() == "capture"
        self.seconds = dict.fromkeys(("rollout", "reference", "values", "reward", "collection"), 0.0)
        self.seen = []
        if self.capturing:
            self.weights = {name: _copied(getattr(self.models, name)) for name in ("policy", "value")}
        self.start = time.perf_counter()

    def answer(self, seconds: dict[str, float]) -> None:
        facts = {"threads": torch.get_num_threads(), "tokens": self.tokens, "seconds": seconds}
        print(json.dumps(facts), file=answers, flush=True)

    def save(self) -> None:
        log_probs, reference = self.seen[:2]  # later calls belong to the update
        width = log_probs.shape[1]
        found = {
            "sequences": self.sequences,
            "log_probs": log_probs,
            "reference_log_probs": reference,
            "values": self.full_values[:, -width - 1 : -1, 0],
            "weights": self.weights,
        }
        torch.save(found, self.settings["capture"])

    def watch(self) -> None:
        """Wrap the functions of TRL that generate, forward, score and collect garbage."""
        whole_generation, whole_forward = ppo_trainer.batch_generation, ppo_trainer.forward
        whole_reward, whole_softmax = ppo_trainer.get_reward, ppo_trainer.selective_log_softmax

        def batch_generation(*arguments: Any) -> Any:
            result = self.timed("rollout", whole_generation, *arguments)
            self.sequences = result[0]
            responses = self.sequences[:, -self.settings["response_tokens"] :]
            never = torch.tensor(self.settings["never_sampled"])
            self.tokens = int((~torch.isin(responses, never)).sum())
            return result

        def forward(model: nn.Module, *arguments: Any) -> Any:
            if model is self.models.reference:
                return self.timed("reference", whole_forward, model, *arguments)
            return whole_forward(model, *arguments)  # the update's

        def get_reward(model: nn.Module, *arguments: Any) -> Any:
            name = "reward" if model is self.models.reward else "values"
            result = self.timed(name, whole_reward, model, *arguments)
            if name == "values":
                self.full_values = result[0]
            return result

        def selective_log_softmax(*arguments: Any) -> Any:
            result = whole_softmax(*arguments)
            if self.capturing:
                self.seen.append(result.detach())
            return result

        ppo_trainer.gc = SimpleNamespace(collect=lambda: self.timed("collection", gc.collect))
        ppo_trainer.batch_generation, ppo_trainer.forward = batch_generation, forward
        ppo_trainer.get_reward, ppo_trainer.selective_log_softmax = get_reward, selective_log_softmax

    def timed(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        self.seconds[name] += time.perf_counter() - start
        return result


def _copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def load_models(path: str, pad_token_id: int) -> SimpleNamespace:
    """Policy and reference from the checkpoint; value and reward model from its backbone, with new heads."""
    causal, scalar = AutoModelForCausalLM, AutoModelForSequenceClassification
    models = SimpleNamespace(
        policy=causal.from_pretrained(path, dtype=torch.float32),
        reference=causal.from_pretrained(path, dtype=torch.float32),
        value=scalar.from_pretrained(path, num_labels=1, dtype=torch.float32),
        reward=scalar.from_pretrained(path, num_labels=1, dtype=torch.float32),
    )
    for model in vars(models).values():
        model.config.pad_token_id = pad_token_id
    return models


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    models = load_models(settings["model"], tokenizer.pad_token_id)
    prompts = Dataset.from_list([{"input_ids": ids} for ids in settings["prompts"]])
    rows = settings["rows"]
    config = PPOConfig(
        output_dir=settings["output"], use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=rows, gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=rows, total_episodes=rows * settings["steps"],
        num_ppo_epochs=1, num_mini_batches=1, response_length=settings["response_tokens"], stop_token="eos",
        temperature=settings["temperature"], learning_rate=settings["learning_rate"],
        kl_coef=settings["kl_coef"], cliprange=settings["clip"], cliprange_value=settings["value_clip"],
        gamma=1.0, lam=0.95, num_sample_generations=0, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    on_demand = OnDemand(models, settings)
    on_demand.watch()
    PPOTrainer(
        args=config, processing_class=tokenizer, model=models.policy, ref_model=models.reference,
        reward_model=models.reward, value_model=models.value, train_dataset=prompts,
        eval_dataset=prompts.select(range(8)), callbacks=[on_demand],
    ).train()  # fmt: skip


if __name__ == "__main__":
    main()
