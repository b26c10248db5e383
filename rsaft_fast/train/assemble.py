"""A recipe's objects, built once: for the trainer, the memory estimate, sampling and the benchmarks alike.

What differs between them is where models come from: `FileLoaders` reads the files that a recipe names. The estimate has
loaders of shapes alone, the benchmarks of random weights, and a caller may hand over a reward or backbone of his own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from rsaft_fast.algorithms.ascent import Ascent, needs_ascent
from rsaft_fast.algorithms.auxiliary import AuxiliaryAdapter
from rsaft_fast.algorithms.base import Algorithm
from rsaft_fast.algorithms.copies import EMA
from rsaft_fast.algorithms.denoising import DenoisingLoss, captions
from rsaft_fast.algorithms.registry import build_algorithm, features_path
from rsaft_fast.backbones import Backbone, add_lora
from rsaft_fast.data.batches import PromptBatches
from rsaft_fast.data.encoded import EncodedPrompts, negative_texts
from rsaft_fast.distributed import World
from rsaft_fast.distributed.sharding import shard_network
from rsaft_fast.distributed.shards import is_sharded
from rsaft_fast.distributed.turns import Turns
from rsaft_fast.errors import UserError
from rsaft_fast.evaluation.agreement import fixed_prompts
from rsaft_fast.evaluation.monitors import Monitors
from rsaft_fast.memory.shared import Sharing
from rsaft_fast.methods import GradientMethod
from rsaft_fast.optim import SAMAdamW
from rsaft_fast.out_of_memory import oom_as_user_error
from rsaft_fast.recipe.config import Config
from rsaft_fast.rewards import Reward
from rsaft_fast.rewards.features import Features
from rsaft_fast.rewards.shared import share_features, share_reward
from rsaft_fast.sampling import derive_rng
from rsaft_fast.sampling.leaps import require_leaps
from rsaft_fast.sampling.linear import Schedule
from rsaft_fast.speed import apply_speed
from rsaft_fast.train.inputs import Inputs
from rsaft_fast.train.loaders import FileLoaders, Loaders, Log
from rsaft_fast.train.optimizer import build_optimizer
from rsaft_fast.train.steering import Steering, steer


@dataclass
class Assembly:
    """What a run works with, in memory.

    Attributes:
        schedule: the sampler's steps.
        encoded: the conditioning of any batch of the run's texts.
        judges: rewards that are not trained on, by name.
        fixed: prompts of the pictures on which gradients are compared.
        batches: the micro-batches of every iteration.
        parameters: what is trained, by name.
        ascent: the direction of the weight perturbation; None is SAM's.
        ema: the running mean of the weights; None without one.
        denoising: the pre-training loss on pictures; None without one.
        steering: what the judges say of an update, and what is done about it; None without judges.
        features: networks in whose features pictures are compared, by path.
        monitors: what is measured on fixed pictures; None without.
        evaluation_prompts: of those pictures, one each.
    """

    config: Config
    world: World
    device: torch.device
    backbone: Backbone
    reward: Reward
    judges: Mapping[str, Reward]
    fixed: list[str]
    schedule: Schedule
    encoded: EncodedPrompts
    batches: PromptBatches
    parameters: Mapping[str, torch.nn.Parameter]
    optimizer: SAMAdamW
    algorithm: Algorithm
    ascent: Ascent | AuxiliaryAdapter | None
    ema: EMA | None
    denoising: DenoisingLoss | None
    sample_prompts: list[str]
    steering: Steering | None
    features: Mapping[str, Features]
    monitors: Monitors | None
    evaluation_prompts: list[str]

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds its part of the trained weights alone."""
        return any(map(is_sharded, self.parameters.values()))

    @property
    def scored_prompts(self) -> list[str]:
        """Every prompt whose pictures the run will score."""
        shown = self.sample_prompts + self.evaluation_prompts
        return _scored_prompts(self.config, self.batches, shown + self.fixed)

    def final_weights(self) -> AbstractContextManager[None]:
        """Give the model, inside the `with` block, the weights that a user would take away.

        The running mean where there is one.
        """
        return self.ema.applied() if self.ema is not None else nullcontext()

    def follow(self, config: Config) -> None:
        """Take over another method, sampler, smoothing or batch; models and optimizer stay as they were built."""
        self.config = config
        self.schedule = self.backbone.schedule(config.sampler.steps, config.sampler.eta)
        self.batches = PromptBatches(config.data, self.batches.prompts, config.seed, self.world)
        compared_in = self.features.get(features_path(config.method) or "")
        self.algorithm = build_algorithm(config, self.backbone, self.reward, self.schedule, compared_in)
        self.ascent = build_ascent(config, self.backbone)
        compared = {name: self.judges[name] for name in config.judges}
        self.steering = steer(config, self.algorithm, compared, self.encoded, self.fixed, self.optimizer, self.world)
        self.monitors = build_monitors(
            *(config, self.backbone, self.schedule, self.reward, self.judges, self.encoded, self.evaluation_prompts),
            features=self.features,
            world=self.world,
        )


def assemble(
    config: Config,
    inputs: Inputs,
    loaders: Loaders,
    world: World | None = None,
    log: Log = lambda line: None,
    sharing: Sharing | None = None,
) -> Assembly:
    """Build everything that a run needs.

    It comes to the device in turns, so that no part stands beside one that will leave: each text encoder (none, where
    all prompts are in the cache), then the reward, whose text tower leaves when it has seen the prompts, then the
    denoiser and the VAE.

    Args:
        inputs: what the recipe's paths hold.
        loaders: where models come from.
        log: takes what the user should know.
        sharing: among whom frozen rewards are parted, in place of the world's ranks, which is what the recipe's
            `distributed.reward` says.

    Raises:
        UserError: something cannot be loaded, does not go together, or does not fit into memory.
    """
    world = world or World()
    sharded = config.shards(world.size)
    turns = Turns(world) if sharded or config.shares_rewards(world.size) else None
    if turns is not None and config.shares_rewards(world.size):
        sharing = Sharing(turns)
    if sharded and isinstance(loaders, FileLoaders):
        loaders.denoiser_on_host = True
    batches = PromptBatches(config.data, inputs.prompts, config.seed, world)
    fixed = fixed_prompts(inputs.prompts, config.seed, config.fixed_pictures)
    prompts = _scored_prompts(config, batches, inputs.sample_prompts + inputs.evaluation_prompts + fixed)
    shapes = loaders.shapes()
    texts = prompts + negative_texts(shapes, config.sampler)
    if config.denoising is not None:
        texts += captions(inputs.images)
    encodings = loaders.encodings(shapes, texts)
    for note in shapes.training_notes:
        log(note)
    schedule = training_schedule(config, shapes)
    reward = loaders.reward()
    judges = dict(loaders.judges())
    for note in dict.fromkeys(note for scores in (reward, *judges.values()) for note in scores.prompt_notes(prompts)):
        log(note)
    if sharing is not None:
        # Before anything comes to the device, which would hold it whole.
        for scores in (reward, *judges.values()):
            for note in share_reward(scores, sharing):
                log(note)
    elif config.distributed.reward == "shared":
        log("distributed.reward shared does nothing in one process: the rewards are whole here (torchrun starts more)")
    if config.parameters.train == "full" and "lora" in config.parameters.model_fields_set:
        log("parameters.lora is not used: parameters.train is full, which trains all weights; lora trains adapters")
    with oom_as_user_error("preparing the run"):
        with world.first_of_machine("encodings"):
            if world.local_rank:
                encodings = loaders.encodings(shapes, texts)  # the first process has made them
            loaders.encode(encodings)
        reward = loaders.settle(reward, prompts)
        judges = {name: loaders.settle(judge, prompts) for name, judge in judges.items()}
        backbone = loaders.backbone()
        for note in dict.fromkeys(backbone.notes):
            if note not in shapes.notes:
                log(note)
        encoded = EncodedPrompts(backbone, encodings, config.sampler)
        # Adapters are made on the host, to the same numbers for every device; of shapes there are no numbers.
        with loaders.device if loaders.device.type == "meta" else nullcontext():
            if config.parameters.train == "lora":
                add_lora(backbone, config.parameters.lora, config.seed)
            else:
                backbone.train_all_parameters()
        apply_speed(backbone, config.speed)
        if sharded:
            backbone.require_whole_saving()
            shard_network(backbone.denoiser, backbone.blocks(), world, loaders.device, turns)
        parameters = backbone.trainable_parameters
        features = load_compared(config, loaders, sharing, log)
        compared_in = features.get(features_path(config.method) or "")
        algorithm = build_algorithm(config, backbone, reward, schedule, compared_in)
        for note in algorithm.notes:
            log(note)
        if config.max_steps % algorithm.updates:
            raise UserError(
                f"max_steps is {config.max_steps}, and an iteration of method {config.method.name} makes "
                f"{algorithm.updates} updates; give a multiple of that"
            )
        optimizer = build_optimizer(parameters, config.optimizer, config.smoothing.parameters, config.seed)
        compared = {name: judges[name] for name in config.judges}
        monitors = build_monitors(
            *(config, backbone, schedule, reward, judges, encoded, inputs.evaluation_prompts),
            features=features,
            world=world,
        )
        for note in monitors.notes if monitors is not None else ():
            log(note)
        return Assembly(
            config=config,
            world=world,
            device=loaders.device,
            backbone=backbone,
            reward=reward,
            judges=judges,
            fixed=fixed,
            schedule=schedule,
            encoded=encoded,
            batches=batches,
            parameters=parameters,
            optimizer=optimizer,
            algorithm=algorithm,
            ascent=build_ascent(config, backbone),
            ema=EMA(parameters, config.ema.decay) if config.ema else None,
            denoising=DenoisingLoss(backbone, config.denoising, inputs.images, config.seed, world)
            if config.denoising
            else None,
            sample_prompts=inputs.sample_prompts,
            evaluation_prompts=inputs.evaluation_prompts,
            steering=steer(config, algorithm, compared, encoded, fixed, optimizer, world, log),
            features=features,
            monitors=monitors,
        )


def load_compared(config: Config, loaders: Loaders, sharing: Sharing | None, log: Log) -> dict[str, Features]:
    """Load the networks in whose features the method and the evaluation compare pictures, each once, by path."""
    watched = config.evaluation.features if config.evaluation is not None else None
    loaded = {}
    for path in filter(None, dict.fromkeys([features_path(config.method), watched])):
        features = loaders.features(path)
        if sharing is not None:
            log(share_features(features, sharing))
        loaded[path] = features.to(loaders.device)
    return loaded


def build_ascent(config: Config, backbone: Backbone) -> Ascent | AuxiliaryAdapter | None:
    """Build what holds the weight perturbation or its direction; None where it is SAM's, which has no state."""
    settings = config.smoothing.parameters
    if settings is None or not needs_ascent(settings):
        return None
    scale, parameters = config.parameters.lora.scale, backbone.trainable_parameters
    if settings.direction == "bi_lora":
        return AuxiliaryAdapter(settings, backbone.denoiser, parameters, scale, config.seed)
    return Ascent(settings, parameters, scale)


def build_monitors(
    config: Config,
    backbone: Backbone,
    schedule: Schedule,
    reward: Reward,
    held_out: Mapping[str, Reward],
    encoded: EncodedPrompts,
    prompts: Sequence[str],
    features: Mapping[str, Features],
    world: World | None = None,
) -> Monitors | None:
    """Build what measures the run on fixed pictures; None where the recipe asks for nothing.

    Args:
        held_out: rewards that are not trained on, by name; of those of `evaluation` the ones that are there.
        prompts: of the pictures.
        features: networks of features, by path.
        world: whose ranks share the pictures.
    """
    settings = config.evaluation
    if settings is None:
        return None
    lora = config.parameters.train == "lora"
    return Monitors(
        settings,
        backbone,
        schedule,
        reward,
        {name: held_out[name] for name in settings.rewards if name in held_out},
        encoded,
        prompts,
        seed=config.seed if config.samples.seed is None else config.samples.seed,
        batch_size=config.data.batch_size,
        ball=config.sharpness,
        adapters=backbone.trainable_parameters if lora else None,
        lora_scale=config.parameters.lora.scale,
        features=features.get(settings.features or ""),
        world=world,
    )


def _scored_prompts(config: Config, batches: PromptBatches, sample_prompts: list[str]) -> list[str]:
    iterations = range(-(-config.max_steps // config.method.updates_per_iteration))
    return list(dict.fromkeys(batches.visited(iterations) + sample_prompts))


def training_schedule(config: Config, shapes: Backbone) -> Schedule:
    """Return the sampler's steps.

    Raises:
        UserError: the scheduler does not give them, or the calls that would be trained have no part in the picture.
    """
    schedule = shapes.schedule(config.sampler.steps, config.sampler.eta)
    if not isinstance(config.method, GradientMethod):
        return schedule
    plan = config.method.draw(config.sampler.steps, derive_rng(config.seed, 0, "plan"))
    if plan.leaps:
        require_leaps(schedule, config.method.name)
    graded = [schedule[index] for index in plan.graded]
    # DDIM's step from the first timestep to an alpha that is the same: x' = x, rounding apart.
    if plan.finish == "sampler" and not plan.renoise and all(abs(step.b) < 1e-9 for step in graded):
        raise UserError(
            f"method {config.method.name} would train nothing: {len(graded)} of sampler.steps {len(schedule)} carry a "
            f"gradient, and this scheduler's last step, at timestep {schedule[plan.last].t:g}, leaves the picture as "
            "it is; raise method.k and sampler.steps, or set timestep_spacing to trailing in scheduler_config.json"
        )
    return schedule
