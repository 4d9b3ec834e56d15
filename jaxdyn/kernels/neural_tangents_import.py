"""neural-tangents 0.6.5 on today's jax, without TensorFlow.

The last neural-tangents takes names from `jax.core`, `jax.util` and `jax.interpreters.ad` that jax
has since moved or dropped, and its package imports TensorFlow for a bridge nobody needs for an NTK.
`load` imports it with stand-ins for those three modules, which supply what is missing, pass on
everything else, and stay visible to neural-tangents only: jax itself is left as it was.

`STRUCTURED_DERIVATIVES` also walks jax's linear programs and transposes them by hand, and `AUTO`
reads compiled costs, both through interfaces that changed. The three functions concerned are
written anew here over public jax (`linearize`, `make_jaxpr`, `linear_transpose`).

Source: R. Novak, J. Sohl-Dickstein, S. S. Schoenholz, *Fast Finite Width Neural Tangent Kernel*,
ICML 2022 (the implementations); its package neural-tangents 0.6.5.
"""

import contextlib
import importlib
import operator
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax.extend import core as jax_core
from jax.interpreters import ad

from jaxdyn.types import JaxdynError


def load() -> types.ModuleType:
    """The module `neural_tangents`, imported once; later calls and imports return the same one.

    TensorFlow is not imported: `neural_tangents.experimental`, its bridge, is left out (importing
    it by name still works, and then brings TensorFlow). `JACOBIAN_CONTRACTION`,
    `NTK_VECTOR_PRODUCTS`, `STRUCTURED_DERIVATIVES` and `AUTO` work, and so do `nt.linearize`,
    `nt.predict`, `nt.batch` and `nt.stax`. A neural-tangents that somebody else has already
    imported is returned as it is.

    Raises:
        JaxdynError: neural-tangents cannot be imported on this jax.
    """
    if "neural_tangents" in sys.modules:
        return sys.modules["neural_tangents"]
    # What an earlier, failed import left behind has seen the real modules.
    for name in [name for name in sys.modules if name.startswith("neural_tangents.")]:
        del sys.modules[name]
    try:
        with _in_place(_stand_ins()), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = importlib.import_module("neural_tangents")
            empirical: Any = importlib.import_module("neural_tangents._src.empirical")
    except (ImportError, AttributeError) as error:
        raise JaxdynError(
            f"neural-tangents 0.6.5 cannot be imported on jax {jax.__version__}: {error}"
        ) from error
    del module.experimental
    # It asks shapes for their size and arrays for their dtype in ways that jax is about to refuse.
    empirical.jnp = _StandIn(jnp, {name: operator.attrgetter(name) for name in ("size", "dtype")})
    empirical._get_primals_out_and_pullback = _pullback_maker(empirical)
    empirical._eqn_vjp_fn = _equation_vjp
    empirical._get_flops = _flops
    return module


class _StandIn(types.ModuleType):
    """Some names of our own, and behind them those of the real module."""

    def __init__(self, real: types.ModuleType, names: dict[str, Any]):
        super().__init__(real.__name__)
        self._real = real
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _completed(real: types.ModuleType, names: dict[str, Any]) -> _StandIn:
    """The real module, and those of the names that it lacks."""
    return _StandIn(real, {name: x for name, x in names.items() if not hasattr(real, name)})


def _stand_ins() -> dict[str, types.ModuleType]:
    """Modules for neural-tangents to see, by full name."""
    names = ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var")
    moved = {name: getattr(jax_core, name) for name in names}
    never = type("DShapedArray", (), {})  # asked for by type, and matched by nothing any more
    no_stack = types.SimpleNamespace(transform_name_stack=lambda name: contextlib.nullcontext())
    gone = {
        "zeros_like_p": jax_core.Primitive("zeros_like"),  # no program holds it any more
        "source_info_util": no_stack,
        "config": types.SimpleNamespace(jax_enable_checks=False),
    }
    util: Any = types.ModuleType("jax.util")
    util.safe_map = lambda f, *xs: [f(*x) for x in zip(*xs, strict=True)]
    util.safe_zip = lambda *xs: list(zip(*xs, strict=True))
    return {
        "jax.core": _completed(jax.core, {**moved, "DShapedArray": never}),
        "jax.util": util,
        "jax.interpreters.ad": _completed(ad, gone),
        "neural_tangents.experimental": types.ModuleType("neural_tangents.experimental"),
    }


@contextlib.contextmanager
def _in_place(modules: dict[str, types.ModuleType]):
    """Modules under their names in `sys.modules` and in their packages, for a while."""
    with contextlib.ExitStack() as undo:

        def put(names: dict, name: str, module: types.ModuleType) -> None:
            if name in names:
                undo.callback(names.__setitem__, name, names[name])
            else:
                undo.callback(names.pop, name, None)
            names[name] = module

        for name, module in modules.items():
            package, _, attribute = name.rpartition(".")
            put(sys.modules, name, module)
            if package in sys.modules:
                put(vars(sys.modules[package]), attribute, module)
        yield


# -- STRUCTURED_DERIVATIVES and AUTO --------------------------------------------------------------


class _LinearProgram(NamedTuple):
    """The part of a jaxpr that neural-tangents walks; every equation depends on the inputs."""

    constvars: list
    invars: list
    outvars: list
    eqns: list


def _linear_program(tangent_map: Callable, primals: tuple) -> tuple[_LinearProgram, list]:
    """A linear map as equations between tangents, and the constants they use.

    Equations that no tangent enters are evaluated here; what they give are constants too.
    """
    closed = jax.make_jaxpr(tangent_map)(*primals)
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    value = lambda x: x.val if isinstance(x, jax_core.Literal) else known[x]
    tangents, equations = set(jaxpr.invars), []
    for equation in jaxpr.eqns:
        if any(not isinstance(x, jax_core.Literal) and x in tangents for x in equation.invars):
            if len(equation.outvars) != 1:
                raise JaxdynError(
                    f"STRUCTURED_DERIVATIVES cannot follow `{equation.primitive}`, which has "
                    f"{len(equation.outvars)} outputs: use JACOBIAN_CONTRACTION or "
                    f"NTK_VECTOR_PRODUCTS"
                )
            tangents.update(equation.outvars)
            equations.append(equation)
        else:
            results = _bind(equation, [value(x) for x in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
    program = _LinearProgram(list(known), jaxpr.invars, jaxpr.outvars, equations)
    return program, list(known.values())


def _bind(equation, arguments: list) -> list:
    out = equation.primitive.bind(*arguments, **equation.params)
    return list(out) if equation.primitive.multiple_results else [out]


def _pullback_maker(empirical: types.ModuleType) -> Callable:
    """`_get_primals_out_and_pullback` over `jax.linearize`.

    The pullback collects per-equation cotangents or Jacobians, as neural-tangents' own backward
    pass does: only the linear program is ours.
    """

    def primals_out_and_pullback(fn, mode, j_rules, s_rules, fwd, *primals):
        # Its rules know primitives, not calls: without jit, calls and scans are inlined.
        with jax.disable_jit():
            out, tangent_map = jax.linearize(fn, *primals)
            program, constants = _linear_program(tangent_map, primals)

        def pullback(*cotangents):
            collected = empirical._backward_pass(
                program,
                mode=mode,
                consts=constants,
                primals_in=[ad.UndefinedPrimal(x.aval) for x in program.invars],
                cotangents_in=tuple(jax.tree.leaves(cotangents)),
                _j_rules=j_rules,
                _s_rules=s_rules,
                _fwd=fwd,
            )
            return jax.tree.unflatten(jax.tree.structure(primals), collected)

        return out, pullback

    return primals_out_and_pullback


def _equation_vjp(equation, cotangent, *inputs) -> list:
    """One linear equation's cotangents by input; None for an input it is not linear in."""
    if equation is None:  # the identity
        return [cotangent]
    if isinstance(cotangent, ad.Zero):
        return [None] * len(inputs)
    # An input of which only the shape is left has a value that does not matter.
    is_shape = lambda x: isinstance(x, jax.core.ShapedArray)
    fixed = [jnp.zeros(x.shape, x.dtype) if is_shape(x) else x for x in inputs]
    linear = [i for i, x in enumerate(inputs) if ad.is_undefined_primal(x)]

    def forward(*arguments):
        filled = list(fixed)
        for i, argument in zip(linear, arguments, strict=True):
            filled[i] = argument
        (out,) = _bind(equation, filled)
        return out

    shapes = [jax.ShapeDtypeStruct(inputs[i].aval.shape, inputs[i].aval.dtype) for i in linear]
    back = jax.linear_transpose(forward, *shapes)(cotangent)
    by_input = dict(zip(linear, back, strict=True))
    return [by_input.get(i) for i in range(len(inputs))]


def _flops(f: Callable, optimize: bool, *args, **kwargs) -> float:
    """What `AUTO` compares: compiled flops, infinite for an implementation that cannot run."""
    try:
        lowered = jax.jit(f).lower(*args, **kwargs)
    except (JaxdynError, NotImplementedError):
        return float("inf")
    cost = (lowered.compile() if optimize else lowered).cost_analysis()
    return float((cost or {}).get("flops", float("inf")))
