"""Predicts what a run costs and where GPUs idle: the trainer's schedules on a virtual clock. Never imports torch."""

from simulator.experiment import Experiment, load_experiment
from simulator.run import Result, simulate

__all__ = ["Experiment", "Result", "load_experiment", "simulate"]
