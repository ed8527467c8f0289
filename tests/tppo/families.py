"""Tiny random models of several families, saved to disk with a tokenizer, as a user's would be."""

import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM

from tppo.data.tokenizer import character_tokenizer

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
SERVED = {
    "qwen2": ("qwen2", {**SIZES, "tie_word_embeddings": False}),
    "qwen2-tied": ("qwen2", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 16}),
    "llama-with-bos": ("llama", SIZES),
    "mistral": ("mistral", {**SIZES, "sliding_window": None}),
    "mistral-wide-window": ("mistral", {**SIZES, "sliding_window": 128}),
    "gemma": ("gemma", {**SIZES, "head_dim": 16}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}
"""Name -> model type and configuration."""
REFUSED = {
    "mistral-narrow-window": ("mistral", {**SIZES, "sliding_window": 16}, "attend to the last 16 tokens only"),
    "gemma3-narrow-window": ("gemma3_text", {**SIZES, "head_dim": 16, "sliding_window": 16}, "last 16 tokens only"),
    "granite-scales-logits": ("granite", {**SIZES, "logits_scaling": 4.0}, "scales or caps its logits"),
    "gemma2-caps-logits": ("gemma2", {**SIZES, "head_dim": 16, "final_logit_softcapping": 1.0}, "scales or caps"),
    "bloom-alibi": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "do not work with a cache"),
    "mamba-recurrent": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2}, "do not work with a cache"),
    "gpt2-short": (
        "gpt2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
        "rollout.max_response_tokens",
    ),
}
"""Name -> model type, configuration and words of the refusal."""


def save_family(kind, sizes, path, *, bos=False):
    """A random model of wide weights, so that wrong attention shows. bos: the tokenizer begins every text with one."""
    tokenizer = character_tokenizer()
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        begin = ("<s>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[begin]
        )
    config = AutoConfig.for_model(
        kind, **sizes, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
    if bos:
        tokenizer.pad_token = None  # as Llama's
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
