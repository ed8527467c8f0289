"""What a run holds of each GPU's memory: one count, of a model's formulas (`tppo plan`) and of its real modules
(`tppo train --check`). Bytes; pure arithmetic.

Peaks in bfloat16, attention as a flash kernel keeps it. What libraries and fragments take is left to `USABLE`.
"""

from dataclasses import dataclass

BF16, FP32 = 2, 4
TRAINED = 4 * FP32
"""Of a weight that trains: itself, its gradient and AdamW's two moments, all in float32."""
LOGIT = 16
"""Of a logit at the peak, in float32: logits and log-probabilities, then two factors of the entropy forwards, two
gradients backwards."""
GRADIENT_UNDER_WAY = BF16 + FP32
"""Of a gathered weight's gradient before it is reduced to shards: computed in bfloat16, reduced in float32."""
USABLE = 0.95
"""Of a GPU's memory: the rest is the context's, libraries' work space and lost to fragments."""

STATES = "weights, gradients, moments"
GATHERED = "gathered shards"
ACTIVATIONS = "activations"
LOGITS = "logits"
SHARE = "engine's share of the memory"
WEIGHTS = "engine's weights"
CACHE = "KV cache"
ON_ITS_WAY = "a weight on its way to engines"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a run's models, in numbers unless named otherwise. A layer is a decoder block."""

    trained: float
    """Of policy and value model."""
    frozen: float
    """Kept in float32 beside them: a reference, an average, what adapters leave as it is."""
    layers: float
    largest_layer: float
    outside: float
    """Of the policy, outside of layers: embedding, output layer, last norm."""
    outside_trains: bool
    largest_weight: float
    hidden: int
    vocabulary: int
    kept_bytes: float
    """That a layer keeps of a token for the way back."""
    engine: float
    """Weights that an engine samples from."""
    cached: float
    """Of a token, in the keys and values of all layers."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The largest forward and backward pass on a GPU, and how the models lie there."""

    shards: float
    """GPUs that share the trained models."""
    tokens: float
    logit_tokens: float
    """Of these, the ones whose logits are held at once."""
    checkpointed: bool
    """Activations are computed again on the way back, all but each layer's input."""
    cpu_offload: bool = False


@dataclass(frozen=True, kw_only=True)
class Engine:
    share_bytes: float | None = None
    """Of a GPU's memory that an engine takes for everything; None: weights whole and a cache for all slots."""
    weight_bytes: float = BF16
    """Of a number, in weights and cache. The next only without a share."""
    cache_tokens: float = 0
    released: bool
    """While the policy trains: the whole share, or the cache."""
    sent: bool
    """Weights are gathered one by one and sent to other processes."""
    apart: bool = False
    """On GPUs that do not train."""


def training_needs(sizes: Sizes, own: Pass) -> dict[str, float]:
    """Of each GPU that trains, engines apart.

    gathered    in bfloat16 the layer at hand and the next, and all outside of layers; with gradients under way of the
                layer at hand and of what trains outside
    activations of every layer what it keeps; or its input alone, and one layer's all while that is computed again
    """
    outside = BF16 + GRADIENT_UNDER_WAY * sizes.outside_trains
    kept, inputs = sizes.kept_bytes, sizes.layers * sizes.hidden * BF16
    states = (sizes.trained * TRAINED + sizes.frozen * FP32) / own.shards
    return {
        STATES: 0.0 if own.cpu_offload else states,
        GATHERED: sizes.largest_layer * (2 * BF16 + GRADIENT_UNDER_WAY) + sizes.outside * outside,
        ACTIVATIONS: own.tokens * (inputs + kept if own.checkpointed else sizes.layers * kept),
        LOGITS: own.logit_tokens * sizes.vocabulary * LOGIT,
    }


def needs_by_phase(training: dict[str, float], sizes: Sizes, engine: Engine) -> dict[str, dict[str, float]]:
    """rollout, training: of each GPU that takes part. training: its needs without engines."""
    sent = {ON_ITS_WAY: sizes.largest_weight * FP32} if engine.sent else {}
    if engine.share_bytes is not None:
        weights, rest = {}, {SHARE: engine.share_bytes}
    else:
        weights = {WEIGHTS: sizes.engine * engine.weight_bytes}
        rest = {CACHE: engine.cache_tokens * sizes.cached * engine.weight_bytes}
    if engine.apart:
        return {"rollout": weights | rest, "training": training | sent}
    stays = weights if engine.released else weights | rest
    return {"rollout": {STATES: training[STATES]} | weights | rest | sent, "training": training | stays}
