"""Rewards that a process without torch imports quickly."""

import os
import time
from pathlib import Path


def by_length(prompt, response, answer):
    return float(len(response) % 3 - 1)


def never(prompt, response, answer):
    """The test waits for the file: the step is under way from then on, and does not end."""
    Path(os.environ["GRADING_BEGAN"]).touch()
    time.sleep(3600)
