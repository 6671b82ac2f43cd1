"""The compiled step that a verdict is about: of all of the target's layers, or of a few, extended to all.

Layers of a target are alike and only run forward, so what one more of them costs depends neither on how many there are
nor on what follows. With `plan.layers` the recipe's step with so many layers is compiled, and the target's layers
alone, with so many and with a few more, whose difference is the cost of a layer. Memory, FLOPs, times and collectives
grow by it. benchmarks/README.md compares such figures with those of all layers.

With xla.draft_data_parallel what follows does matter: it wants the rows of a replica on several chips, and the compiler
splits the layers for it. There the whole step is compiled twice, with a few layers and with a few more.
"""

import copy
from typing import Any, NamedTuple

from eagle3_xla.config import Recipe
from eagle3_xla.errors import UserError
from eagle3_xla.plan.depth import layer_period, with_layers
from eagle3_xla.plan.lowering import lower_step, lower_target
from eagle3_xla.target.families import MIN_LAYERS
from eagle3_xla.xla.aot import LoweredStep
from eagle3_xla.xla.time_model import StepTime, model_time
from eagle3_xla.xla.tpu import DoesNotFit, Memory, Topology, compile_for

MORE = 4  # layers between the two targets that say what a layer costs, at least


class CompiledStep(NamedTuple):
    """memory, flops: of one chip; donated: whether every tensor of the state gives its buffer to its new value;
    arguments: how many buffers a call takes.
    """

    memory: Memory
    flops: float
    time: StepTime
    donated: bool
    arguments: int


def lowered_steps(recipe: Recipe, target: Any, coordinates: list | None = None) -> list[LoweredStep]:
    """What `compile_step` compiles: the step of all layers, or with plan.layers that of a few, and what is compared for
    the cost of a layer: two targets, or that step and one of more layers. Raises UserError for a plan.layers that can't
    be extended. target: its Hugging Face config; coordinates: of the slice's chips.
    """
    few, every, more = recipe.plan.layers, target.num_hidden_layers, _more_layers(target)
    if few in (0, every):
        return [lower_step(recipe, target, coordinates)]
    period = layer_period(target)
    if few < MIN_LAYERS or few + more > every or (every - few) % period:
        raise UserError(
            f"plan.layers is {few}; the target has {every}: give 0 for all of them, or from {MIN_LAYERS} to "
            f"{every - more}" + (f", {every} less a multiple of {period}" if period > 1 else "")
        )
    low, high = with_layers(target, few), with_layers(target, few + more)
    step = lower_step(recipe, low, coordinates)
    if recipe.xla.draft_data_parallel and recipe.xla.tp > 1:
        return [step, step, lower_step(recipe, high, coordinates)]
    return [step, lower_target(recipe, low, coordinates), lower_target(recipe, high, coordinates)]


def _more_layers(target: Any) -> int:
    period = layer_period(target)
    return -(-MORE // period) * period


def compile_step(recipe: Recipe, target: Any, topology: Topology) -> CompiledStep:
    """Raises DoesNotFit, and UserError as `lowered_steps` does."""
    lowered, *pair = lowered_steps(recipe, target, topology.coordinates())
    every = target.num_hidden_layers
    if not pair:
        _refuse_too_large(_resident(lowered), lowered, topology, at_rest=True)
        return _compile(recipe, lowered, topology, _resident(lowered))
    times = (every - recipe.plan.layers) / _more_layers(target)
    resident = _resident(lowered) + round(times * (_resident(pair[1]) - _resident(pair[0])))
    _refuse_too_large(resident, lowered, topology, at_rest=True)
    step, high = (_compile(recipe, each, topology, resident) for each in (lowered, pair[1]))
    low = copy.deepcopy(step) if pair[0] is lowered else _compile(recipe, pair[0], topology, resident)

    memory = extended_memory(step.memory, low.memory, high.memory, times)
    _refuse_too_large(memory.total, lowered, topology, at_rest=False)
    step.time.add(high.time, times)
    step.time.add(low.time, -times)
    flops = _extended(step.flops, low.flops, high.flops, times)
    arguments = _extended(step.arguments, low.arguments, high.arguments, times)
    return step._replace(memory=memory, flops=flops, arguments=arguments)


def extended_memory(step: Memory, low: Memory, high: Memory, times: float) -> Memory:
    """The memory of `step` with `times` times what `high` takes more than `low`.

    Temporaries and code are the compiler's choice at each depth: where it finds a way to less of them at the larger
    one, that is not repeated for the layers that follow.
    """
    return Memory(*map(_extended, step, low, high, [times] * len(step)))._replace(
        temporaries=_extended(step.temporaries, low.temporaries, max(low.temporaries, high.temporaries), times),
        code=_extended(step.code, low.code, max(low.code, high.code), times),
    )


def _extended(here: Any, few: Any, more: Any, times: float) -> Any:
    return here + round(times * (more - few))


def _compile(recipe: Recipe, lowered: LoweredStep, topology: Topology, resident: int) -> CompiledStep:
    """resident: bytes of the arguments of the step with all layers, which is what a refusal is of."""
    try:
        executable = compile_for(topology, lowered.hlo, lowered.state, recipe.plan.xla_flags)
    except DoesNotFit as refusal:
        needed = refusal.needed + resident - _resident(lowered)
        raise DoesNotFit(needed, refusal.largest, refusal.at_rest) from None
    time = model_time(executable.text, topology)
    donated = set(lowered.state) <= executable.donated
    return CompiledStep(executable.memory, executable.flops, time, donated, len(lowered.arguments))


def _resident(lowered: LoweredStep) -> int:
    return sum(argument.bytes for argument in lowered.arguments)


def _refuse_too_large(needed: int, lowered: LoweredStep, topology: Topology, at_rest: bool) -> None:
    """at_rest: what is needed are the arguments alone, so that nothing has to be compiled."""
    if needed > topology.chip.hbm_bytes:
        largest = sorted(lowered.arguments, key=lambda argument: -argument.bytes)[:10]
        raise DoesNotFit(needed, [(a.bytes, a.shape, a.name) for a in largest], at_rest)
