"""What training and rollout need of each GPU, counted from a model's config.json."""

from dataclasses import dataclass

from profiling.errors import ConfigError
from profiling.model_memory import BF16, Sizes
from simulator.hardware import Gpu
from simulator.models import Model


@dataclass(frozen=True)
class Memory:
    """What a phase needs of each GPU, in bytes, by what needs it."""

    phase: str
    needs: dict[str, float]
    available: float

    @property
    def headroom(self) -> float:
        return self.available - sum(self.needs.values())

    def check(self, gpu: Gpu, remedy: str) -> None:
        """Raises ConfigError saying what does not fit and by how much."""
        if self.headroom < 0:
            parts = " + ".join(f"{size / 1e9:.1f} GB {what}" for what, size in self.needs.items() if size)
            raise ConfigError(
                f"{self.phase} on {gpu.name}: {parts} exceed {self.available / 1e9:.1f} GB by "
                f"{-self.headroom / 1e9:.1f} GB; {remedy}"
            )


def sizes_of(model: Model, *, value_model: bool, reference_model: bool) -> Sizes:
    """The value model has the policy's backbone and a head of one number."""
    return Sizes(
        trained=model.parameters + (model.backbone_parameters + model.hidden + 1 if value_model else 0),
        frozen=model.parameters * reference_model,
        layers=model.layers,
        largest_layer=model.largest_layer_parameters,
        outside=model.embedding_parameters * (1 if model.tied else 2) + model.hidden,
        outside_trains=True,
        largest_weight=model.embedding_parameters,
        hidden=model.hidden,
        vocabulary=model.vocabulary,
        kept_bytes=kept_bytes_per_token(model),
        engine=model.parameters,
        cached=model.kv_bytes_per_token(1.0),
    )


def kept_bytes_per_token(model: Model) -> float:
    """By a layer of transformers in bfloat16, for the way back.

    two norms      input in float32, what it is scaled to, and what is multiplied with the weight: 8 a hidden unit
    attention      queries, keys, values, output (twice: heads are brought together), a float32 a head; cosine and
                   sine of the positions
    norms of queries and keys    input in float32 and what it is scaled to: 6 each
    gated MLP      gate, its activation, the other half, their product: 8 an inner unit
    """
    queries, keys = model.heads * model.qk_dim, model.kv_heads * model.qk_dim
    values, output = model.kv_heads * model.v_dim, model.heads * model.v_dim
    attention = BF16 * (queries + keys + values + 2 * output + 2 * model.qk_dim) + 4 * model.heads
    normed = 6 * (queries + keys) * model.qk_norm
    return 2 * 8 * model.hidden + attention + normed + 8 * model.inner_units_per_token
