"""Every program is lowered for a GPU and for a TPU, which need not be there.

Lowering finds what a platform has no rule for, and a derivative or a batch that a fused kernel does
not have. Both types, one device and a mesh, one cotangent and several are among the cases; each
program meets each of them, not all of their products.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from jaxdyn.commands.plan import planned_run
from jaxdyn.commands.plan_options import PlanOptions
from jaxdyn.distributed import make_mesh
from jaxdyn.dynamics import ledger_path, measure
from jaxdyn.dynamics.influence import own_tokens, statistics_along, statistics_at
from jaxdyn.kernels import gram, operator, plain, sketch, streams, trace_exact, trace_probed
from jaxdyn.kernels.projection import draw_signs
from jaxdyn.models import LanguageModel, fused
from jaxdyn.models.shapes import SHAPES
from jaxdyn.optim import trainable
from jaxdyn.plan.programs import WORKSPACE, Setting
from jaxdyn.sections import MeshConfig
from jaxdyn.train.sft import supervised_update
from jaxdyn.train.state import TrainState
from jaxdyn.types import Sites

# Tied, with grouped queries; of heads and slots that cuDNN takes.
SHAPE = dataclasses.replace(
    SHAPES["tiny"], vocab_size=64, width=32, head_dim=8, num_kv_heads=2, mlp_width=64, tied=True
)
BATCH = {
    "num_prompts": 4,
    "num_generations": 2,
    "max_prompt_length": 8,
    "max_completion_length": 8,
}
FORWARD, BACKWARD = "__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"


class Aimed(Setting):
    """A setting whose model has a platform's attention; on one device it knows of no mesh."""

    @functools.cached_property
    def model(self):
        alone = LanguageModel(self.config, jnp.dtype(self.run.model.dtype).type)
        return alone if self.mesh.size == 1 else super().model

    def of(self, model):
        other = Aimed(model.config, self.run, self.mesh)
        other.__dict__["model"] = model
        return other

    @property
    def untied(self):
        config = dataclasses.replace(self.config, tied=False)
        return self.of(dataclasses.replace(self.model, config=config))

    # -- arguments of the programs that a plan leaves out ---------------------------------------

    @property
    def count(self):
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def sites(self):
        """By field: as many sites as there are parts of a batch, one in each sequence."""
        ids = {name: self.by_rows(self.count) for name in ("rows", "positions", "targets")}
        whole = self.sequences(self.count, sum(self.slots), "tokens", "mask")
        return {**whole, **ids, "is_prompt": self.by_rows(self.count, dtype=bool)}

    @property
    def batches(self):
        """The sites in one batch, of one sequence each."""
        one = lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype)
        numbers, real = (jax.ShapeDtypeStruct((1, self.count), x) for x in (jnp.int32, bool))
        places = jax.ShapeDtypeStruct((self.count,), jnp.int32)
        return operator.Batches(jax.tree.map(one, self.sites), numbers, real, places)

    def numbers(self, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    @property
    def several(self):
        """Rows of three cotangents each."""
        return self.tile()._replace(chosen=self.by_rows(self.count, 3))


class Packed(Aimed):
    """Whose batch lies packed: a row each part, of half of its completions' slots."""

    @property
    def batch(self):
        (prompt, completion), prompts = self.slots, self.run.train.num_prompts
        kept = self.rows // self.count * completion // 2
        slots = prompts // self.count * prompt + kept
        of_mask = lambda *shape: self.by_rows(prompts, *shape, dtype=bool)
        branches = of_mask(prompt), of_mask(self.rows // prompts, completion)
        mask = *branches, self.by_rows(self.count, kept)
        return {**super().batch, "tokens": self.by_rows(self.count, slots), "mask": mask}


def packed(s):
    other = Packed(s.config, s.run, s.mesh)
    other.__dict__["model"] = s.model
    return other.update("joint").lower()


def sft(s):
    moving, frozen = trainable(s.run.optim, "joint", s.params)
    head = s.view["classifier"]["weight"]
    state = TrainState(moving, s.optimizer(moving), head_moment=head, head_share=head)
    encoded = (*s.sequences(s.rows, sum(s.slots), "tokens", "mask").values(),)
    encoded += (s.by_rows(s.rows, sum(s.slots), dtype=bool),)
    fixed = {"model": s.model, "optim": s.run.optim.rule}
    return supervised_update.lower(state, frozen, encoded, s.number, **fixed)


def sketched(s):
    sizes = {"replicates": 2, "side": 2}
    signs = jax.eval_shape(lambda key: draw_signs(key, s.view, s.config, 4), s.key)
    return sketch._sketch_rows.lower(s.model, s.view, s.view, signs, s.tile(), **sizes)


def contracted(s):
    """Kernels of three cotangents a row, in a metric."""

    def both(view, rows):
        left = gram.factorize(s.model, view, view, rows)
        fixed = {"tied": True, "biased": False, "workspace": WORKSPACE}
        return gram.contract(view, view, left, None, **fixed)

    return jax.jit(both).lower(s.view, s.several)


def streamed(s):
    """The same, a layer at a time."""

    def both(view, rows):
        left = streams.Side(view, view, streams.stream(s.model, view, view, rows))
        fixed = {"tied": True, "biased": False, "workspace": WORKSPACE}
        return streams.contract_streams(s.model, left, None, **fixed)

    return jax.jit(both).lower(s.view, s.several)


def traced_exactly(s):
    def whole(view, rows):
        operands = view, None, trace_exact.metric_rows(view["classifier"]["weight"])
        fixed = {"at_once": 4, "first": True, "workspace": WORKSPACE}
        return trace_exact.exact_tile(s.model, operands, rows, None, **fixed)

    return jax.jit(whole).lower(s.view, s.tile())


def traced_by_probes(s):
    def whole(view, rows, key):
        probes = trace_probed.draw_probes(key, 4, view["classifier"]["weight"])
        operands = view, None, probes
        return trace_probed.probed_tile(s.model, operands, rows, None, workspace=WORKSPACE)

    return jax.jit(whole).lower(s.view, s.tile(), s.key)


def applied(s):
    field = s.numbers(s.count, SHAPE.vocab_size)
    return operator.apply.lower(s.model, s.view, s.view, s.batches, None, field)


def looked(s):
    ids, start = s.by_rows(s.count, 2), s.numbers(s.count, SHAPE.width)
    return ledger_path._look.lower(s.model, s.params, s.view["classifier"], s.sites, ids, start)


def ledger(s):
    """A node by component, and by layer and token."""
    return ledger_path.node.lower(*of_node(s))


def ledger_of_texts(s):
    """A node by layer and kind."""
    *line, head, sites, ids, start = of_node(s)
    given = head, sites, ids, start, s.numbers(s.count)
    return ledger_path.text_node.lower(*line, s.number, *given)


def of_node(s):
    request = ledger_path.Request("parameters", ("log_prob", "kl"), ("log_prob",), 2)
    ids, start = s.by_rows(s.count, 2), s.numbers(s.count, SHAPE.width)
    return s.model, request, s.params, s.params, s.view["classifier"], s.sites, ids, start


def ledger_of_features(s):
    head, phi = s.view["classifier"], s.numbers(s.count, SHAPE.width)
    ids = s.by_rows(s.count, 2)
    return ledger_path.feature_node.lower(
        s.model, head, head, s.number, head, s.sites, ids, phi, phi, phi
    )


def influence_of_own_tokens(s):
    of = lambda params, sites, *given: own_tokens(s.model, params, Sites(**sites), *given, params)
    return jax.jit(of).lower(s.params, s.sites, s.numbers(s.count, 2), s.number)


def influence_along(s):
    return statistics_along.lower(s.model, s.view, s.view, s.batches, True)


def influence_ends(s):
    return statistics_at.lower(s.model, s.view, s.batches)


def figures(s):
    """Of features at the probe's sites; eigenvalues are among them."""
    n = s.numbers(8, 8)
    return measure._feature_figures.lower(n, n, n)


def updated(remat):
    return lambda s: s.of(dataclasses.replace(s.model, remat=remat)).update("joint").lower()


# What a program has of cuDNN's kernels where its attention is cuDNN's: forward and backward.
BOTH, ONE, NONE = (True, True), (True, False), (False, False)
PROGRAMS = {
    "rollout": (lambda s: s.rollout().lower(), ONE),
    "prefill": (lambda s: s.prefill().lower(), ONE),
    "decode": (lambda s: s.decode().lower(), NONE),
    "reference": (lambda s: s.reference().lower(), ONE),
    "stage 1": (lambda s: s.untied.update("classifier").lower(), NONE),
    "stage 2, remat none": (updated("none"), BOTH),
    "stage 2, remat dots": (updated("dots"), BOTH),
    "stage 2, remat full": (updated("full"), BOTH),
    "stage 2, packed": (packed, BOTH),
    "supervised update": (sft, BOTH),
    "propagation": (lambda s: s.propagation().lower(), NONE),  # a probe's passes are float32's
    "factorize": (lambda s: s.factors().lower(), NONE),
    "factorize, contract, several": (contracted, NONE),
    "contract": (lambda s: s.kernel().lower(), NONE),
    "stream, contract, several": (streamed, NONE),
    "plain kernels, several": (
        lambda s: plain.plain_kernels.lower(s.model, s.view, None, s.several, None),
        NONE,
    ),
    "trace, exact": (traced_exactly, NONE),
    "trace, by probes": (traced_by_probes, NONE),
    "sketch": (sketched, NONE),
    "apply": (applied, BOTH),  # its backward pass; the forward mode has none
    "ledger's ends": (looked, ONE),
    "ledger": (ledger, NONE),
    "ledger of texts": (ledger_of_texts, NONE),
    "ledger of features": (ledger_of_features, NONE),
    "influence of own tokens": (influence_of_own_tokens, BOTH),  # as `apply`
    "influence along": (influence_along, NONE),
    "influence's ends": (influence_ends, ONE),
    "figures": (figures, NONE),
}
EACH = ["rollout", "stage 2, remat dots", "apply"]
MESH, ALONE = (2, 2, 2), (1, 1, 1)


@functools.cache
def setting(dtype, sizes):
    devices = jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
    run = planned_run(PlanOptions("tiny", **BATCH))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, dtype=dtype))
    return Aimed(SHAPE, run, make_mesh(MeshConfig(*sizes), devices))


@pytest.fixture
def lowered(monkeypatch):
    """A program's text, lowered for platforms with the attention of the first."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    # What jax asks of the machine that traces.
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: False, raising=False)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False, raising=False)
    lower = jax.stages.Traced.lower

    def lowered(name, dtype, sizes, *platforms):
        there = functools.partialmethod(lower, lowering_platforms=platforms)
        monkeypatch.setattr(jax.stages.Traced, "lower", there)
        aimed = setting(dtype, sizes)
        aimed = aimed.of(aimed.model.on(platforms[0]))
        return PROGRAMS[name][0](aimed).as_text()

    return lowered


def cudnn_calls(text):
    backward = text.count(BACKWARD)
    return text.count(FORWARD) > backward, backward > 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_in_float32_on_one_device(name, lowered):
    """Of which cuDNN has no attention: one program for both."""
    assert cudnn_calls(lowered(name, "float32", ALONE, "cuda", "tpu")) == NONE


@pytest.mark.parametrize("name", PROGRAMS)
def test_in_bfloat16_on_a_mesh(name, lowered):
    calls = PROGRAMS[name][1]
    platforms = ("cuda", "tpu") if calls == NONE else ("cuda",)
    assert cudnn_calls(lowered(name, "bfloat16", MESH, *platforms)) == calls


@pytest.mark.parametrize("name", EACH)
def test_the_other_ways(name, lowered, monkeypatch):
    """A forward pass, a gradient, and forward mode after one; on a TPU by the splash kernel."""
    calls = PROGRAMS[name][1]
    assert cudnn_calls(lowered(name, "bfloat16", ALONE, "cuda")) == calls
    monkeypatch.setattr(fused, "SPLASH_SLOTS", 1)
    kernels = lowered(name, "bfloat16", MESH, "tpu").count("tpu_custom_call")
    assert kernels >= (3 if calls == BOTH else 1)  # two of them go backward
    assert cudnn_calls(lowered(name, "float32", MESH, "cuda", "tpu")) == NONE
