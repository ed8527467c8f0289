"""A reward that another service gives.

POST   [{"prompt": "...", "response": "...", "answer": "..."}, ...]
reply  [0.5, ...]   or   {"rewards": [0.5, ...]}
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

from tppo.data.problem import Problem
from tppo.rewards.protocol import Grade, RewardError, is_reward

FIRST_PAUSE_S = 1.0
TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that may pass; others say that the request itself is wrong."""
LONGEST_REPLY_BYTES = 64 * 2**20


class HttpReward:
    """concurrency: requests under way at once. header: a name and a value that nothing here prints."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 30.0,
        retries: int = 3,
        batch_rows: int = 64,
        concurrency: int = 8,
        header: tuple[str, str] | None = None,
        right_above: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url, self.timeout_s, self.retries = url, timeout_s, retries
        self.batch_rows, self.concurrency, self.header = batch_rows, concurrency, header
        self.right_above, self._sleep = right_above, sleep

    def grade(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
        items = [
            {"prompt": problem.prompt, "response": response, "answer": problem.answer}
            for problem, response in zip(problems, responses, strict=True)
        ]
        batches = [items[first : first + self.batch_rows] for first in range(0, len(items), self.batch_rows)]
        with ThreadPoolExecutor(self.concurrency) as threads:
            rewards = list(threads.map(self._rewards_of, batches))  # in order; the first fault ends it
        return [Grade(reward, reward > self.right_above) for batch in rewards for reward in batch]

    def _rewards_of(self, batch: Sequence[dict[str, str]]) -> list[float]:
        reply = self._post(batch)
        if self.header:  # a service that echoes
            reply = reply.replace(self.header[1].encode(), b"***")
        return self._rewards_in(reply, len(batch))

    def _post(self, batch: Sequence[dict[str, str]]) -> bytes:
        """The reply, after as many tries as it takes or may take. Raises RewardError after the last."""
        request = urllib.request.Request(
            self.url, data=json.dumps(batch).encode(), headers={"Content-Type": "application/json"}
        )
        if self.header:
            request.add_unredirected_header(*self.header)
        fault = ""
        for attempt in range(self.retries + 1):
            if attempt:
                self._sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                # RewardConfig lets http:// and https:// through, and a redirect cannot leave them for a file.
                with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:  # nosec B310
                    return reply.read(LONGEST_REPLY_BYTES)
            except urllib.error.HTTPError as error:
                fault = f"HTTP {error.code} {error.reason}"
                if error.code not in TRY_AGAIN:
                    raise RewardError(f"reward.url = {self.url!r}: refuses the request: {fault}") from None
            except (OSError, HTTPException, ValueError, OverflowError) as error:  # ValueError: no such address can be
                reason = getattr(error, "reason", None) or error
                fault = str(reason) or type(error).__name__
        raise RewardError(
            f"reward.url = {self.url!r}: no reply after {self.retries + 1} tries: {fault}; is the service up? "
            "reward.timeout_s and reward.retries say how long it is waited for"
        )

    def _rewards_in(self, reply: bytes, rows: int) -> list[float]:
        try:
            value = json.loads(reply)
        except (ValueError, RecursionError):
            raise self._bad(f"its reply is not JSON: {reply[:60]!r}") from None
        rewards: Any = value.get("rewards") if isinstance(value, dict) else value
        if not isinstance(rewards, list):
            raise self._bad('its reply is neither a list nor {"rewards": [...]}')
        if len(rewards) != rows:
            raise self._bad(f"it replied with {len(rewards)} rewards to {rows} responses")
        for reward in rewards:
            if not is_reward(reward):
                raise self._bad(f"it replied with {reward!r:.60}, which is not a finite number")
        return [float(reward) for reward in rewards]

    def _bad(self, fault: str) -> RewardError:
        return RewardError(f"reward.url = {self.url!r}: {fault}; it must give one number for every response")

    def close(self) -> None:
        pass
