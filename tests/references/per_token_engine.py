"""A slow twin of the simulator's rollout: one decode step at a time, one list of numbers a row, no closed forms.

Written from the rules alone ("What happens, exactly"); shares no code with the package.
"""

import math
from dataclasses import dataclass


@dataclass
class SlowRow:
    row: int
    context: int
    left: int
    preempted: int = 0
    t_end: float = 0.0


def blocks(context):
    return math.ceil((context + 1) / 16)


def roll_out(rows, *, engines, max_rows, kv_tokens, costs, shared_queue):
    """Run one rollout. rows: (row, context, tokens to generate) in the step's order.

    Returns (seconds of the slowest engine, {row: end}, {row: preemptions}).
    """
    capacity = math.inf if kv_tokens is None else kv_tokens // 16
    slots = math.inf if max_rows is None else max_rows
    queues = [[] for _ in range(engines)]
    shared = []
    for place, (row, context, left) in enumerate(rows):
        item = SlowRow(row, context, left)
        if shared_queue and place >= slots * engines:
            shared.append(item)
        else:
            queues[place % engines].append(item)
    running = [[] for _ in range(engines)]
    clock = [0.0] * engines
    done = []
    active = set(range(engines))
    while active:
        earliest = min(clock[e] for e in active)
        e = min(e for e in active if clock[e] <= earliest + 1e-12)
        if not iterate(e, queues, shared, running, clock, slots, capacity, costs, done):
            active.remove(e)
    ends = {item.row: item.t_end for item in done}
    return max(ends.values()), ends, {item.row: item.preempted for item in done}


def iterate(e, queues, shared, running, clock, slots, capacity, costs, done):
    """One engine iteration; False when there was nothing to do."""
    now_preempted = False
    while sum(blocks(item.context) for item in running[e]) > capacity:
        victim = running[e].pop()
        victim.preempted += 1
        queues[e].insert(0, victim)
        now_preempted = True
    admitted = []
    if not now_preempted:
        while len(running[e]) < slots and (queues[e] or shared):
            source = queues[e] or shared
            used = sum(blocks(item.context) for item in running[e])
            if used + blocks(source[0].context) > capacity:
                break
            item = source.pop(0)
            running[e].append(item)
            admitted.append(item)
    if admitted:
        tokens = sum(item.context for item in admitted)
        pairs = sum(item.context * (item.context + 1) // 2 for item in admitted)
        clock[e] += (
            costs["prefill_base_s"]
            + costs["prefill_per_token_s"] * tokens
            + costs["prefill_per_token_context_s"] * pairs
        )
        if costs["prefill_base_s"]:
            return True  # other engines may come first; decode in the next call
    if not running[e]:
        return bool(admitted) or now_preempted
    context = sum(item.context for item in running[e])
    clock[e] += (
        costs["decode_base_s"]
        + costs["decode_per_row_s"] * len(running[e])
        + costs["decode_per_context_token_s"] * context
    )
    for item in running[e]:
        item.context += 1
        item.left -= 1
        if item.left == 0:
            item.t_end = clock[e]
            done.append(item)
    running[e] = [item for item in running[e] if item.left > 0]
    return True
