"""Completions for a journey to another process: millions of tokens go as numbers, not as objects."""

from array import array
from dataclasses import replace

from tppo.rollout.protocol import Completion


def packed(completion: Completion) -> Completion:
    return replace(completion, token_ids=array("q", completion.token_ids), log_probs=array("d", completion.log_probs))  # type: ignore[arg-type]


def unpacked(completion: Completion) -> Completion:
    return replace(completion, token_ids=list(completion.token_ids), log_probs=list(completion.log_probs))
