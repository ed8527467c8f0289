"""A slow twin of the simulator's rollout: one decode step at a time, one list of numbers a row, no closed forms.

Written from the rules alone ("What happens, exactly"); shares no code with the package.
"""

import math
from dataclasses import dataclass, field


@dataclass
class SlowRow:
    row: int
    context: int
    left: int
    preempted: bool = False
    prefilled: int = 0
    cached: int = 0


def blocks(context):
    return math.ceil((context + 1) / 16)


@dataclass
class Iteration:
    """What one engine did in one go."""

    engine: int
    start: float
    end: float
    admitted: list
    decoded: list
    ended: list
    preempted: list
    prefill_s: float = 0.0
    again: list = field(default_factory=list)
    """(row, tokens) prefilled after a preemption"""
    prefilled: list = field(default_factory=list)
    """(row, tokens)"""
    waits_for_kv: bool = False


@dataclass
class Outcome:
    seconds: float
    ends: dict
    preemptions: dict
    tokens: dict
    history: list
    stopped: dict
    engine_of: dict


def roll_out(rows, *, wanted=None, then_s=None, **settings):
    """Run one rollout. rows: (row, context, tokens to generate) in the step's order.

    wanted: the step is over when so many rows have ended, or then_s(these rows) seconds later; every engine then ends
    the iteration it is in. Iterations after that never happened: they are left out of the history of a rollout to the
    end.
    """
    history = whole_history(rows, **settings)
    ends = sorted(
        (round(iteration.end, 9), iteration.engine, row, iteration.end)
        for iteration in history
        for row in iteration.ended
    )
    over = math.inf
    if wanted is not None and wanted <= len(ends):
        over = ends[wanted - 1][3] if wanted else 0.0
        if then_s is not None:
            over += then_s([row for _, _, row, _ in ends[:wanted]])
    history = [iteration for iteration in history if iteration.start < over - 1e-12]
    stopped = dict.fromkeys(range(settings["engines"]), 0.0)
    tokens, preemptions = ({row: 0 for row, _, _ in rows} for _ in range(2))
    end_of, engine_of = {}, {}
    for iteration in history:
        stopped[iteration.engine] = max(stopped[iteration.engine], iteration.end)
        for row in iteration.decoded:
            tokens[row] += 1
        for row in iteration.ended:
            end_of[row] = iteration.end
        for row in iteration.admitted:
            engine_of[row] = iteration.engine
        for row in iteration.preempted:
            preemptions[row] += 1
    for row, _, _ in rows:
        if row not in end_of:  # stopped with its engine; one that never ran, with the last of them
            end_of[row] = stopped[engine_of[row]] if row in engine_of else max(stopped.values())
    return Outcome(max(stopped.values()), end_of, preemptions, tokens, history, stopped, engine_of)


def ledger_of(outcome, *, slots, resumed):
    """Seconds by cause of the engines' GPUs (one each) over one rollout. slots: rows an engine runs at once, None: its
    peak in this rollout; resumed: rows with tokens from an earlier step."""
    booked = dict.fromkeys(
        ("prefill", "re_prefill", "preempt_recompute", "decode_useful", "decode_underfilled", "kv_stall", "wait_tail"),
        0.0,
    )
    peak = {}
    for iteration in outcome.history:
        peak[iteration.engine] = max(peak.get(iteration.engine, 0), len(iteration.decoded))
    for iteration in outcome.history:
        tokens = sum(n for _, n in iteration.prefilled)
        for row, n in iteration.prefilled:
            share = iteration.prefill_s * n / tokens if tokens else iteration.prefill_s / len(iteration.prefilled)
            cause = "re_prefill" if row in resumed else "prefill"
            if tokens and (row, n) in iteration.again:
                cause = "preempt_recompute"
            booked[cause if tokens else "prefill"] += share
        decode_s = iteration.end - iteration.start - iteration.prefill_s
        full = min(len(iteration.decoded) / (slots or peak[iteration.engine] or 1), 1.0)
        booked["decode_useful"] += decode_s * full
        booked["kv_stall" if iteration.waits_for_kv else "decode_underfilled"] += decode_s * (1 - full)
    booked["wait_tail"] = sum(outcome.seconds - end for end in outcome.stopped.values())
    return booked


def whole_history(
    rows, *, engines, max_rows, kv_tokens, costs, shared_queue, chunk_tokens=None, shares=None, stays=None
):
    """shares: row -> (prompt, full blocks of it), where the rows of a prompt share them. stays: row -> the engine that
    it ran on and goes on at."""
    capacity = math.inf if kv_tokens is None else kv_tokens // 16
    slots = math.inf if max_rows is None else max_rows
    queues = [[] for _ in range(engines)]
    shared = []
    stays = stays or {}
    for row, context, left in rows:
        if row in stays:
            queues[stays[row]].append(SlowRow(row, context, left))
    place = 0
    for row, context, left in rows:
        if row in stays:
            continue
        emptiest = min(range(engines), key=lambda e: len(queues[e]))
        if not shared_queue:
            queues[place % engines].append(SlowRow(row, context, left))
        elif len(queues[emptiest]) < slots:
            queues[emptiest].append(SlowRow(row, context, left))
        else:
            shared.append(SlowRow(row, context, left))
        place += 1
    running = [[] for _ in range(engines)]
    clock = [0.0] * engines
    history = []
    active = set(range(engines))
    while active:
        earliest = min(clock[e] for e in active)
        e = min(e for e in active if clock[e] <= earliest + 1e-12)
        if not iterate(e, queues, shared, running, clock, slots, capacity, costs, chunk_tokens, shares or {}, history):
            active.remove(e)
    return history


def used_blocks(items, shares):
    """Blocks in use; those that rows of one prompt share count once."""
    total, seen = 0, set()
    for item in items:
        prompt, whole = shares.get(item.row, (None, 0))
        total += blocks(item.context) - (whole if prompt in seen else 0)
        if prompt is not None:
            seen.add(prompt)
    return total


def iterate(e, queues, shared, running, clock, slots, capacity, costs, chunk_tokens, shares, history):
    """One engine iteration; False when there was nothing to do."""
    start, preempted = clock[e], []
    while used_blocks(running[e], shares) > capacity:
        victim = running[e].pop()
        preempted.append(victim.row)
        victim.preempted, victim.prefilled = True, 0
        queues[e].insert(0, victim)
    admitted = []
    if not preempted:
        while len(running[e]) < slots and (queues[e] or shared):
            source = queues[e] or shared
            if used_blocks([*running[e], source[0]], shares) > capacity:
                break
            item = source.pop(0)
            prompt, whole = shares.get(item.row, (None, 0))
            known = any(prompt is not None and shares[other.row][0] == prompt for other in running[e])
            item.cached = 16 * whole if known else 0
            item.prefilled = item.cached
            running[e].append(item)
            admitted.append(item)
    if chunk_tokens is not None:
        return iterate_in_chunks(e, queues[e] or shared, running, clock, slots, costs, chunk_tokens, history, start,
                                 preempted, [item.row for item in admitted])  # fmt: skip
    prefill_s, waits = 0.0, bool(queues[e] or shared) and len(running[e]) < slots
    prefilled = [(item.row, item.context - item.cached) for item in admitted]
    again = [(item.row, item.context - item.cached) for item in admitted if item.preempted]
    facts = {"prefilled": prefilled, "again": again, "waits_for_kv": waits}
    if admitted:
        tokens = sum(item.context - item.cached for item in admitted)
        pairs = sum(sum(range(item.cached + 1, item.context + 1)) for item in admitted)
        prefill_s = (
            costs["prefill_base_s"]
            + costs["prefill_per_token_s"] * tokens
            + costs["prefill_per_token_context_s"] * pairs
        )
        clock[e] += prefill_s
        if costs["prefill_base_s"]:
            rows = [item.row for item in admitted]
            history.append(Iteration(e, start, clock[e], rows, [], [], preempted, prefill_s, **facts))
            return True  # other engines may come first; decode in the next call
    if not running[e]:
        if preempted:
            history.append(Iteration(e, start, clock[e], [item.row for item in admitted], [], [], preempted))
        return bool(admitted) or bool(preempted)
    context = sum(item.context for item in running[e])
    clock[e] += (
        costs["decode_base_s"]
        + costs["decode_per_row_s"] * len(running[e])
        + costs["decode_per_context_token_s"] * context
    )
    ended = []
    for item in running[e]:
        item.context += 1
        item.left -= 1
        if item.left == 0:
            ended.append(item.row)
    decoded = [item.row for item in running[e]]
    rows = [item.row for item in admitted]
    history.append(Iteration(e, start, clock[e], rows, decoded, ended, preempted, prefill_s, **facts))
    running[e] = [item for item in running[e] if item.left > 0]
    return True


def iterate_in_chunks(e, queue, running, clock, slots, costs, chunk_tokens, history, start, preempted, admitted):
    """The same iteration with a budget of tokens: decodes first, then what is left of it for prefills, in order."""
    waits = bool(queue) and len(running[e]) < slots
    decoding = [item for item in running[e] if item.prefilled == "all"]
    budget = max(chunk_tokens - len(decoding), 0)
    parts = []
    for item in running[e]:
        if item.prefilled == "all":
            continue
        n = min(item.context - item.prefilled, budget)
        if n == 0 and item.prefilled < item.context:
            break
        parts.append((item, n))
        budget -= n
    if not parts and not decoding:
        if preempted:
            history.append(Iteration(e, start, start, admitted, [], [], preempted))
        return bool(preempted)
    prefill_s = 0.0
    if parts:
        pairs = sum(sum(range(item.prefilled + 1, item.prefilled + n + 1)) for item, n in parts)
        prefill_s = (
            costs["prefill_base_s"]
            + costs["prefill_per_token_s"] * sum(n for _, n in parts)
            + costs["prefill_per_token_context_s"] * pairs
        )
    decode_s = 0.0
    if decoding:
        decode_s = (
            costs["decode_base_s"]
            + costs["decode_per_row_s"] * len(decoding)
            + costs["decode_per_context_token_s"] * sum(item.context for item in decoding)
        )
    prefilled = [(item.row, n) for item, n in parts]
    again = [(item.row, n) for item, n in parts if item.preempted]
    for item, n in parts:
        item.prefilled += n
        if item.prefilled == item.context:
            item.prefilled = "all"
    clock[e] = start + prefill_s + decode_s
    ended = []
    for item in decoding:
        item.context += 1
        item.left -= 1
        if item.left == 0:
            ended.append(item.row)
    rows = [item.row for item in decoding]
    facts = {"prefilled": prefilled, "again": again, "waits_for_kv": waits}
    history.append(Iteration(e, start, clock[e], admitted, rows, ended, preempted, prefill_s, **facts))
    running[e] = [item for item in running[e] if item.left > 0]
    return True
