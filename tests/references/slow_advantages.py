"""Slow twins of the advantage estimates: one row and one token at a time, Python floats, from the formulas alone.

Arguments are lists of rows; `lam` is one number a row. Shares no code with the package.
"""


def slow_recurrence(decay, inputs, after):
    """y_t = inputs_t + decay_t y_{t+1} for one row; `after` follows the last token."""
    result = []
    for d, x in zip(reversed(decay), reversed(inputs), strict=True):
        after = x + d * after
        result.append(after)
    return result[::-1]


def slow_egae(rewards, values, mask, finished, gamma, lam):
    """A_t = delta_t + gamma lam A_{t+1}; an unfinished row's last value stands for the one after it."""
    everywhere_one = [[1.0] * len(row) for row in values]
    return slow_advantages(rewards, values, mask, finished, gamma, lam, everywhere_one, 1.0)


def slow_vtrace_gae(rewards, values, mask, gamma, lam, ratios, c_bar):
    """A_t = delta_t + gamma lam min(c_bar, ratio_{t+1}) A_{t+1}; rows ran to their end."""
    return slow_advantages(rewards, values, mask, [True] * len(values), gamma, lam, ratios, c_bar)


def slow_advantages(rewards, values, mask, finished, gamma, lam, ratios, c_bar):
    result = []
    for row in range(len(values)):
        tokens = [t for t in range(len(mask[row])) if mask[row][t]]
        advantages = [0.0] * len(mask[row])
        for place in reversed(range(len(tokens))):
            t = tokens[place]
            if place + 1 < len(tokens):
                following = tokens[place + 1]
                next_value = values[row][following]
                later = min(c_bar, ratios[row][following]) * advantages[following]
            else:
                next_value = 0.0 if finished[row] else values[row][t]
                later = 0.0
            delta = rewards[row][t] + gamma * next_value - values[row][t]
            advantages[t] = delta + gamma * lam[row] * later
        result.append(advantages)
    return result
