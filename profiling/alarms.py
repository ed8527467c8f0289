"""What a run should be told about: sentences with their numbers, worst first. Thresholds are in ALARMS."""

from collections.abc import Sequence

import pandas as pd

from profiling.ledger import OUTSIDE
from profiling.reader import Run
from profiling.summary import NEEDS_RECORDS

ROLLOUT = (*NEEDS_RECORDS, "unresolved")
"""Causes of a rollout's GPU-seconds."""
ALARMS = {
    "wait_tail": (0.2, True, "{who} {waits} {share:.0%} of each rollout for the tail"),
    "preempt_recompute": (0.05, True, "{who} {spends} {share:.0%} of each rollout on recomputing preempted rows"),
    "kv_stall": (0.1, True, "{who} {decodes} {share:.0%} of each rollout with rows waiting for KV blocks"),
    "decode_discarded": (0.1, True, "{who} {spends} {share:.0%} of each rollout on tokens that are thrown away"),
    "wait_rollout": (0.3, False, "{who} {waits} {share:.0%} of the time for rollouts"),
    "wait_train": (0.3, False, "{who} {waits} {share:.0%} of the time for permission to roll out"),
    "weight_sync": (0.1, False, "{who} {spends} {share:.0%} of the time on synchronising weights"),
    "down": (0.05, False, "{who} {is} down or {does} lost work again {share:.0%} of the time"),
}
"""Cause -> share from which it alarms, of the rollout's time (true) or of all, and the sentence."""
PLURAL = {"waits": "wait", "spends": "spend", "decodes": "decode", "is": "are", "does": "do"}
ALIKE = 0.05
"""GPUs whose shares lie this close together share a sentence."""
THROTTLES = {0x08: "by its hardware", 0x20: "by heat", 0x40: "by heat", 0x80: "by its power supply"}
"""NVML's clocks-event reasons that are faults; a software power cap is none."""
THROTTLED_SHARE, MISSED_SHARE = 0.05, 0.05


def alarms(ledger: pd.DataFrame, run: Run) -> list[str]:
    """Sentences for the steps of a ledger, and for the devices and the sampler of its run. Empty: nothing to say."""
    return [*ledger_alarms(ledger), *_device_alarms(run.devices), *_sampler_alarms(run)]


def ledger_alarms(ledger: pd.DataFrame) -> list[str]:
    inside = ledger[ledger.step != OUTSIDE]
    seconds = inside.pivot_table(index="gpu", columns="cause", values="seconds", aggfunc="sum", fill_value=0.0)
    all_s = seconds.sum(axis=1)
    rollout_s = seconds[[cause for cause in ROLLOUT if cause in seconds]].sum(axis=1)
    found = []
    for cause, (threshold, of_rollout, sentence) in ALARMS.items():
        if cause not in seconds:
            continue
        base = rollout_s if of_rollout else all_s
        share = (seconds[cause] / base.where(base > 0)).fillna(0.0)
        for gpus, own in _alike(share[share >= threshold]):
            verbs = {verb: verb if len(gpus) == 1 else plural for verb, plural in PLURAL.items()}
            found.append((own, sentence.format(who=_names(gpus), share=own, **verbs)))
    return [text for _, text in sorted(found, key=lambda entry: -entry[0])]


def _alike(shares: pd.Series) -> list[tuple[list[int], float]]:
    """GPUs with about the same share together, and their mean share."""
    groups: list[list[int]] = []
    for gpu, share in shares.sort_values(ascending=False).items():
        if groups and shares[groups[-1][0]] - share <= ALIKE:
            groups[-1].append(int(gpu))
        else:
            groups.append([int(gpu)])
    return [(sorted(group), float(shares[group].mean())) for group in groups]


def _names(gpus: Sequence[int]) -> str:
    if len(gpus) == 1:
        return f"GPU {gpus[0]}"
    if list(gpus) == list(range(gpus[0], gpus[-1] + 1)):
        return f"GPUs {gpus[0]} to {gpus[-1]}"
    shown = [str(gpu) for gpu in gpus]
    return f"GPUs {', '.join(shown[:-1])} and {shown[-1]}" if len(gpus) <= 8 else f"{len(gpus)} GPUs"


def _device_alarms(devices: pd.DataFrame) -> list[str]:
    found = []
    for device, own in devices[devices.event_reasons.notna()].groupby("device", sort=False):
        reasons = own.event_reasons.astype(int)
        for text in dict.fromkeys(THROTTLES.values()):
            bits = sum(bit for bit, name in THROTTLES.items() if name == text)
            share = float(((reasons & bits) != 0).mean())
            if share >= THROTTLED_SHARE:
                found.append(f"{device} is slowed down {text} in {share:.0%} of its samples")
    return found


def _sampler_alarms(run: Run) -> list[str]:
    found = []
    if run.trailer is not None:
        if unsampled := run.unsampled_hosts:
            found.append(f"no samples of {', '.join(unsampled)}")
        if uncounted := run.uncounted_hosts:
            found.append(f"no energy counter on {', '.join(uncounted)}: joules of the run are null")
    own = (run.trailer or {}).get("sampler")
    if not isinstance(own, dict):
        return found
    ticks, missed = own.get("ticks"), own.get("missed_ticks")
    if isinstance(ticks, int) and isinstance(missed, int) and ticks > 0:
        share = missed / (ticks + missed)
        if share >= MISSED_SHARE:
            found.append(f"the sampler missed {share:.0%} of its ticks: the host is overloaded")
    return found
