"""Sizes of a language model, from its Hugging Face config.json: parameters, bytes of keys and values, FLOPs."""

from simulator.models.shape import Model, bundled_names, load_model

__all__ = ["Model", "bundled_names", "load_model"]
