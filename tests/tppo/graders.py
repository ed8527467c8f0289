"""Rewards that a process without torch imports quickly."""


def by_length(prompt, response, answer):
    return float(len(response) % 3 - 1)
