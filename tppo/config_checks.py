"""Settings that contradict each other, each refused with what to change."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tppo.config import RunConfig


def check_it_fits_together(config: "RunConfig") -> None:
    """Raises ValueError."""
    if config.rows_per_step % config.train.mini_batches:
        raise ValueError(
            f"rollout.prompts_per_step x rollout.samples_per_prompt = {config.rows_per_step} rows cannot be "
            f"divided into train.mini_batches = {config.train.mini_batches}; change one of them"
        )
    if config.algorithm.name == "dapo" and config.rollout.samples_per_prompt < 2:
        raise ValueError(
            "rollout.samples_per_prompt = 1: dapo compares the answers to one prompt; set at least 2, and "
            "rollout.prompts_per_step lower"
        )
    if config.algorithm.name == "geppo" and config.rollout.prompts_per_step % 2:
        raise ValueError(
            f"rollout.prompts_per_step = {config.rollout.prompts_per_step}: geppo generates half of a step's rows "
            "and reuses older ones; make it even"
        )
    if config.algorithm.prefix == "detached" and (config.algorithm.lm_loss_coef or config.algorithm.name == "vapo"):
        raise ValueError(
            'algorithm.prefix = "detached": the language-model loss trains earlier windows too; set '
            'algorithm.lm_loss_coef = 0 or prefix = "gradient"'
        )
    if config.algorithm.prefix == "detached" and config.model.activation_checkpointing:
        raise ValueError(
            'algorithm.prefix = "detached": keeps keys and values of the prefix, which '
            "model.activation_checkpointing would compute again; leave one of them out"
        )
    if config.algorithm.prefix == "detached" and config.model.attention == "flash_attention_2":
        raise ValueError('algorithm.prefix = "detached": needs a mask; set model.attention = "sdpa"')
    if config.rollout.schedule != "recipe" and config.algorithm.name not in ("ppo", "ppo-ewma", "vapo"):
        raise ValueError(
            f'rollout.schedule = "{config.rollout.schedule}": {config.algorithm.name} has a schedule of its own; set '
            'rollout.schedule = "recipe", or algorithm.name = ppo, ppo-ewma or vapo'
        )
    chosen = config.algorithm.old_log_probs is not None or config.algorithm.importance_cap is not None
    if chosen and config.algorithm.name in ("geppo", "ppo-ewma"):
        raise ValueError(
            f"algorithm.old_log_probs, algorithm.importance_cap: {config.algorithm.name} has a ratio of its own; "
            "leave them out"
        )
    if config.algorithm.importance_cap and config.algorithm.old_log_probs == "rollout":
        raise ValueError(
            "algorithm.importance_cap: the engine's own log-probabilities need no correction; set it to 0, or "
            'algorithm.old_log_probs = "recomputed"'
        )
    if config.rollout.engine == "vllm" and config.rollout.compile:
        raise ValueError("rollout.compile: belongs to the torch engine; vLLM compiles unless vllm.eager")
    if config.rollout.engine == "vllm" and config.rollout.schedule == "asynchronous" and not config.ray.address:
        raise ValueError(
            'rollout.schedule = "asynchronous": vLLM in this process cannot roll out while the policy trains; set '
            'rollout.engine = "torch", or give it processes of its own with --ray'
        )
    if (
        config.rollout.engine == "vllm"
        and config.rollout.temperature != 1
        and (config.rollout.top_p < 1 or config.rollout.top_k)
    ):
        raise ValueError(
            "rollout.temperature: vLLM cannot report log-probabilities at a temperature but before top_p and "
            "top_k; set temperature = 1, or top_p = 1 and top_k = 0"
        )
    if config.evaluation.temperature == 0 and config.evaluation.samples > 1:
        raise ValueError(
            f"evaluation.samples = {config.evaluation.samples}: at evaluation.temperature = 0 all are the same; set "
            "samples = 1, or a temperature above 0"
        )
    if config.data.task == "dataset" and not config.data.path:
        raise ValueError('data.path: missing; name a data set, or set data.task = "arithmetic"')
    if "{problem}" not in config.data.prompt_template:
        raise ValueError(f"data.prompt_template = {config.data.prompt_template!r}: put {{problem}} into it")
    if "{problem}" not in (config.evaluation.prompt_template or "{problem}"):
        raise ValueError(
            f"evaluation.prompt_template = {config.evaluation.prompt_template!r}: put {{problem}} into it"
        )
    if config.data.task == "arithmetic" and (config.data.path or config.evaluation.path):
        raise ValueError('data.path, evaluation.path: belong to data.task = "dataset"; set it, or leave them out')
    if config.data.task == "dataset" and config.reward.kind == "final_answer":
        raise ValueError('reward.kind = "final_answer": belongs to the arithmetic task; set it to "math"')
    if config.data.task == "arithmetic" and config.evaluation.every and config.evaluation.seed == config.data.seed:
        raise ValueError("evaluation.seed equals data.seed: the held-out problems would be trained on")
