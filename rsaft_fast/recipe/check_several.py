"""What can be found wrong with a recipe that several processes train together."""

from __future__ import annotations

from rsaft_fast.errors import UserError
from rsaft_fast.recipe.config import Config
from rsaft_fast.smoothing.search import AUTO, GradientSpace, RadiusSearch

_REPLICATE = "leave it out, or set distributed.strategy=replicate, which keeps all weights on every GPU"


def check_several(config: Config, processes: int) -> None:
    """Check the keys against a run of several processes.

    Raises:
        UserError: the first thing that does not go with it.
    """
    if config.optimizer.release_gradients:
        raise UserError(
            f"optimizer.release_gradients with {processes} processes: a gradient is applied before it could be summed "
            "over them; leave it out"
        )
    if config.shards(processes):
        _check_shards(config)


def _check_shards(config: Config) -> None:
    """What weights that are gathered block by block, and given back at once, do not go with."""
    if config.parameters.train == "lora":
        raise UserError(
            "distributed.strategy shard with parameters.train lora: adapters are small, and replicated; take strategy "
            "auto, and backbone.quantize or backbone.offload_blocks for a base that is too large"
        )
    backbone, optimizer, speed = config.backbone, config.optimizer, config.speed
    obstacles = {
        f"backbone.offload_blocks {backbone.offload_blocks}: streamed blocks are never written, and all parameters are "
        "trained": backbone.offload_blocks > 0,
        f"backbone.quantize {backbone.quantize}: quantised weights cannot take small changes": backbone.quantize
        is not None,
        "speed.cuda_graph true: a captured graph replays addresses, and gathered weights come and go": speed.cuda_graph,
        "speed.channels_last true: a weight is cut along its first dimension, which wants it contiguous": (
            speed.channels_last
        ),
        f"speed.compile {speed.compile}: compiled blocks have not been shown to see weights that come and go": (
            speed.compile != "none"
        ),
        f"optimizer.offload {optimizer.offload}: the state is parted among the GPUs already, and a checkpoint in "
        "shards would bring all of it to the device at once": optimizer.offload != "none",
        "method.offload_copies true: the copies are parted among the GPUs already": getattr(
            config.method, "offload_copies", False
        ),
    }
    for obstacle, stands in obstacles.items():
        if stands:
            raise UserError(f"{_how(config)} with {obstacle}; {_REPLICATE}")
    for key, space in _compared_in(config).items():
        if space == "parameter":
            raise UserError(
                f"{_how(config)} with {key} parameter: the weights' gradients by single pictures are summed over the "
                f"GPUs before they could be compared; set {key}=latent, or distributed.strategy=replicate"
            )


def _compared_in(config: Config) -> dict[str, GradientSpace]:
    """Where the judges' gradients are compared, by key."""
    agreement, smoothing = config.agreement, config.smoothing
    spaces: dict[str, GradientSpace] = {} if agreement is None else {"agreement.space": agreement.space}
    finds = smoothing.image is not None and smoothing.image.radius == AUTO
    if finds and (agreement is None or agreement.control != "radius"):
        spaces["smoothing.radius_search.space"] = (smoothing.radius_search or RadiusSearch()).space
    return spaces


def _how(config: Config) -> str:
    strategy = config.distributed.strategy
    return f"distributed.strategy {strategy}" + (" (shard, for parameters.train is full)" if strategy == "auto" else "")
