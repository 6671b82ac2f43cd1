"""The lowered step is the step that train runs; what the HLO reader and the time model make of a schedule."""

import pytest

from eagle3_xla.xla.hlo import parse
from eagle3_xla.xla.time_model import HOP_SECONDS, ICI_EFFICIENCY, Ici, model_time
from eagle3_xla.xla.tpu import V4, find_topology

# Lowers the same recipe twice, from real weights on virtual devices and from placeholders, and prints both modules'
# instructions: opcodes with result shapes, without the calls that carry a placeholder's sharding.
COMPARE = """
import collections, os, re, sys
os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4")
import torch, torch_xla
from eagle3_xla.config import load_recipe
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.plan.lowering import TOTAL_STEPS, lower_step
from eagle3_xla.target.model import Target, load_target
from eagle3_xla.train.optimizer import Optimizer
from eagle3_xla.train.step import TrainStep
from eagle3_xla.xla.spmd import SpmdBackend

class Traced(SpmdBackend):
    def compile(self, function, state=()):
        return function

recipe = load_recipe(None, sys.argv[1:])
backend = Traced(recipe.xla)
D, T = recipe.data.draft_vocab_size, recipe.data.row_length
target = Target(load_target(recipe.target.path, torch.float32), torch.arange(D))
head = backend.place_head(Eagle3Head(draft_config(target.model.config, D)))
target = backend.place_target(target)
scale = {"fc.weight": torch.ones(head.fc.in_features)}
optimizer = Optimizer(head, recipe.train, TOTAL_STEPS, backend, scale)
t2d = torch.zeros(target.model.config.vocab_size, dtype=torch.bool)
step = TrainStep(recipe, backend, target, head, torch.zeros(D, dtype=torch.int64), t2d, optimizer)
rows = recipe.train.batch_size * recipe.xla.dp
batch = {n: torch.ones(rows, T, dtype=torch.int32) for n in ("input_ids", "position_ids", "document_ids")}
batch = backend.put({**batch, "loss_mask": torch.ones(rows, T, dtype=torch.bool)})
backend.settle()
outputs = [*step.run(recipe.train.gradient_accumulation - 1, batch), *head.parameters(), *optimizer.state().values()]
outputs += [p.grad for p in head.parameters() if p.grad is not None]
trained = torch_xla._XLAC._get_xla_tensors_hlo_proto(outputs)
planned = lower_step(recipe, target.model.config).hlo

def instructions(proto):
    from jaxlib import _jax
    text = _jax.XlaComputation(proto).get_hlo_module().to_string()
    found = re.findall(r" = (\\S+?)(?:\\{\\S*)? ([a-z][a-z\\-]*)\\(", text)
    return collections.Counter(f for f in found if f[1] != "custom-call")

trained, planned = instructions(trained), instructions(planned)
print(sum(trained.values()), "instructions; only trained:", trained - planned, "only planned:", planned - trained)
sys.stdout.flush()
os._exit(0 if trained == planned and sum(trained.values()) > 1000 else 1)
"""


@pytest.mark.parametrize("accumulation", [1, 2])
def test_plan_lowers_what_train_runs(forks, small_run, accumulation):
    settings = [*small_run, "xla.device=xla", "xla.dp=2", "xla.tp=2", f"train.gradient_accumulation={accumulation}"]
    done = forks.run_code(COMPARE, *settings)
    assert done.returncode == 0, done.stdout + done.stderr


def test_topologies():
    v4 = find_topology("v4-32")
    assert v4.chips == 16 and v4.compiler_name == "v4:2x2x4"  # Google counts TensorCores, two in a v4 chip
    assert find_topology("v4:2x2x4") == v4 and find_topology("v5litepod-16").name == "v5e-16"
    assert v4.coordinates()[:5] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1)]


SCHEDULE = """HloModule m, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%body (p: (s32[], bf16[1024,1024])) -> (s32[], bf16[1024,1024]) {
  %p = (s32[], bf16[1024,1024]{1,0:T(8,128)(2,1)}) parameter(0)
  %a = bf16[1024,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %m = bf16[1024,1024]{1,0:T(8,128)(2,1)} convolution(%a, %a), backend_config={"estimated_cycles":"105000"}
  %r = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-reduce(%m), replica_groups=[4,4]<=[16], to_apply=%add
}

ENTRY %main (q: bf16[1024,1024]) -> bf16[1024,1024] {
  %q = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %narrow = f32[8,1]{1,0:T(8,128)} copy(%q)
  %w = (s32[], bf16[1024,1024]) while(%q), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %s = (bf16[1024,1024]{1,0}, bf16[4096,1024]{1,0}) all-gather-start(%q), replica_groups=[4,4]<=[4,4]T(1,0)
  %big = bf16[16384,8192]{1,0:T(8,128)(2,1)} copy(%q)
  ROOT %d = bf16[4096,1024]{1,0} all-gather-done(%s)
}
"""


def test_loops_count_their_trips_and_asynchronous_collectives_hide():
    time = model_time(SCHEDULE, find_topology("v4-32"))
    assert time.matmul == pytest.approx(5 * 105000 / V4.clock)
    assert time.counts == {"all-reduce": 5, "all-gather": 1}
    assert time.bytes == {"all-reduce": 5 * 2 * 1024**2, "all-gather": 8 * 1024**2}
    assert time.hidden_collectives > 0 and time.collectives == pytest.approx(
        5 * Ici(find_topology("v4-32")).seconds("all-reduce", 2 * 1024**2, parse(SCHEDULE)[0]["body"][-1].groups())
    )


@pytest.mark.parametrize("written", [f', backend_config={{"estimated_cycles":"{2**63 - 1}"}}', ""])
def test_a_matmul_without_an_estimate_takes_its_flops_at_the_rate_of_the_others(written):
    """The compiler writes the largest number for a matmul that it has no estimate of."""
    unknown = SCHEDULE.replace("%a), backend", "%a), dim_labels=bf_io->bf, backend")
    known = "  %twice = bf16[2048,1024]{1,0} convolution(%pair, %q), dim_labels=bf_io->bf, "
    known += 'backend_config={"estimated_cycles":"210000"}\n'
    unknown = unknown.replace("  %narrow", "  %pair = bf16[2048,1024]{1,0} broadcast(%q)\n" + known + "  %narrow")
    unknown = unknown.replace(', backend_config={"estimated_cycles":"105000"}', written)
    assert model_time(unknown, find_topology("v4-32")).matmul == pytest.approx((5 * 105000 + 210000) / V4.clock)


@pytest.mark.parametrize(
    "out, left, right, call, multiplied",
    [
        ("4,8", "4,16", "16,8", "dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 4 * 8 * 16),
        ("4,8", "4,16", "8,16", "convolution(%a, %b), dim_labels=bf_oi->bf", 4 * 8 * 16),
        (  # weights times values, 4 x 8 groups of 4 heads: as libtpu writes it for Llama-3.1-8B
            "4,8,4,1024,128",
            "4,8,4,1024,512",
            "4,8,512,128,1",
            "convolution(%a, %b), window={size=4x8x1 stride=3x7x1 lhs_dilate=4x8x1}, dim_labels=012bf_01io2->012bf",
            4 * 8 * 4 * 1024 * 128 * 512,
        ),
        ("5", "5", "3", "convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=0bf_0io->0bf", 3 * 5 - 2),
    ],
    ids=["dot", "matmul", "batched", "padded window"],
)
def test_flops_of_a_matmul(out, left, right, call, multiplied):
    def dims(text: str) -> str:
        return f"{text},1,1" if "0bf_0io" in call else text

    text = f"ENTRY %main () -> f32[] {{\n  %m = bf16[{dims(out)}]{{0}} {call}\n}}\n"
    (matmul,) = parse(text)[0]["main"]
    shapes = (tuple(map(int, dims(shape).split(","))) for shape in (left, right))
    assert matmul.matmul_flops(*shapes) == 2 * multiplied


FUSED = """HloModule m, is_scheduled=true

%begin (p: bf16[1024,1024]) -> (bf16[1024,1024], bf16[8192,1024]) {
  %p = bf16[1024,1024]{1,0} parameter(0)
  %g0 = bf16[8192,1024]{1,0} all-gather(%p), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %t0 = (bf16[1024,1024]{1,0}, bf16[8192,1024]{1,0}) tuple(%p, %g0)
}

%async_collective_fusion.1 (x: bf16[1024,1024], y: bf16[1024,1024]) -> (bf16[1024,1024], bf16[8192,1024]) {
  %x = bf16[1024,1024]{1,0} parameter(0)
  %y = bf16[1024,1024]{1,0} parameter(1)
  %c = bf16[1024,1024]{1,0} convolution(%x, %x)
  %g1 = bf16[8192,1024]{1,0} all-gather(%y), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %t1 = (bf16[1024,1024]{1,0}, bf16[8192,1024]{1,0}) tuple(%c, %g1)
}

%end (z: bf16[1024,1024]) -> bf16[8192,1024] {
  %z = bf16[1024,1024]{1,0} parameter(0)
  ROOT %g2 = bf16[8192,1024]{1,0} all-gather(%z), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (q: bf16[1024,1024]) -> bf16[8192,1024] {
  %q = bf16[1024,1024]{1,0} parameter(0)
  %async-collective-start = (bf16[1024,1024]{1,0}, bf16[8192,1024]{1,0}) fusion(%q), kind=kCustom, calls=%begin
  %f1 = (bf16[1024,1024]{1,0}, bf16[8192,1024]{1,0}) fusion(%q, %q), calls=%async_collective_fusion.1, \
backend_config={"estimated_cycles":"CYCLES"}
  ROOT %async-collective-done = bf16[8192,1024]{1,0} fusion(%q), kind=kCustom, calls=%end
}
""".replace("\\\n", "")


@pytest.mark.parametrize("cycles, exposed", [(10_000_000, False), (1000, True)])
def test_a_collective_that_compute_carries_is_one_collective_and_the_compute_counts(cycles, exposed):
    """The form that a v5p's schedule has: a start, matmuls that each carry a part of it, a done; one channel."""
    topology = find_topology("v5p-16")
    text = FUSED.replace("CYCLES", str(cycles))
    time = model_time(text, topology)
    gather = Ici(topology).seconds("all-gather", 16 * 1024**2, parse(text)[0]["begin"][1].groups())
    assert time.counts == {"all-gather": 1} and time.bytes == {"all-gather": 16 * 1024**2}
    assert time.matmul >= cycles / topology.chip.clock
    assert time.collectives + time.hidden_collectives == pytest.approx(gather)
    assert time.collectives == pytest.approx(gather - time.matmul if exposed else 0)


def test_tiles_pad_and_groups_follow_the_torus():
    computations, entry = parse(SCHEDULE)
    narrow, gather = computations[entry][1], computations[entry][3]
    assert narrow.arrays[0].bytes == 8 * 128 * 4  # one column takes a tile's 128
    groups = gather.groups()
    assert groups[0].tolist() == [0, 4, 8, 12]  # along z of a 2x2x4
    ici, size = Ici(find_topology("v4-32")), 10**8
    rate = V4.link_rate * ICI_EFFICIENCY
    assert ici.seconds("all-gather", size, groups) == pytest.approx(size * 3 / 4 / rate + 3 * HOP_SECONDS)
    plane = gather.groups().T  # 2x2 in the plane: two links
    assert ici.seconds("all-gather", size, plane) == pytest.approx(size * 3 / 4 / (2 * rate) + 2 * HOP_SECONDS)
