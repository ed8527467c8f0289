"""Which responses of a step are shown, and how: the rows of profiling.schema.SAMPLES."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from tppo.rewards.protocol import Reward, RewardError, answers_of
from tppo.rollout.rows import Row


def chosen(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` rows, drawn by nothing random: in turn the first that finished, the longest, the best and the
    worst, then the second of each. Equal ones by number. Unfinished rows only where too few finished."""
    done = sorted((row for row in rows if row.finished), key=lambda row: row.row)
    orders = (
        done,
        sorted(done, key=lambda row: -len(row.response_ids)),
        sorted(done, key=lambda row: -(row.reward or 0.0)),
        sorted(done, key=lambda row: row.reward or 0.0),
    )
    in_turn = [row for turn in zip_longest(*orders) for row in turn]
    others = sorted((row for row in rows if not row.finished), key=lambda row: row.row)
    distinct = {row.row: row for row in [*in_turn, *others]}
    return list(distinct.values())[:count]


def sample_records(
    step: int, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, reward: Reward
) -> list[dict[str, Any]]:
    """A record per row. Prompt and response as the model sees them, special tokens included."""
    responses = [str(tokenizer.decode(row.response_ids)) for row in rows]
    try:
        answers = answers_of(reward, responses)
    except RewardError:  # a table to look at is no reason to end a run
        answers = [None] * len(rows)
    return [
        {
            "step": step,
            "row": row.row,
            "prompt": str(tokenizer.decode(row.prompt_ids)),
            "response": response,
            "answer": answer if row.finished else None,
            "reward": row.reward,
            "correct": row.correct,
            "tokens": len(row.response_ids),
            "finished": row.finished,
            "policy_version": row.policy_version,
        }
        for row, response, answer in zip(rows, responses, answers, strict=True)
    ]
