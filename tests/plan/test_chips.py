"""Topologies by name, and what is said of those that do not exist."""

import importlib.metadata
import sys

import jaxlib
import pytest

from jaxdyn.plan.chips import CHIPS, GIB, chip_of, shape_of, slices
from jaxdyn.plan.topologies import open_topology
from jaxdyn.types import JaxdynError

JAXLIB = jaxlib.__version__


@pytest.mark.parametrize(
    "name, chip, shape",
    [
        ("v5e:4x4", "v5e", (4, 4)),
        ("v5e-64", "v5e", (8, 8)),
        ("V6E-8", "v6e", (2, 4)),
        # These two count cores, of which a chip has two.
        ("v5p-8", "v5p", (2, 2, 1)),
        ("v5p:4x4x4", "v5p", (4, 4, 4)),
        ("v4-256", "v4", (4, 4, 8)),
        ("v5p-1024", "v5p", (8, 8, 8)),  # rather than 4 x 8 x 16
        ("v5p:4x4x12", "v5p", (4, 4, 12)),
        ("v7x-8", "v7x", (2, 2, 1)),
        # Hosts, and GPUs on each.
        ("h100:8", "h100", (1, 8)),
        ("H200:2x8", "h200", (2, 8)),
        ("a100:1", "a100", (1, 1)),
        ("b200:16x4", "b200", (16, 4)),
    ],
)
def test_a_slice_by_its_shape_or_its_size(name, chip, shape):
    assert shape_of(name) == (CHIPS[chip], shape)


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "v9:4x4",
            "no chip 'v9' in topology 'v9:4x4'; there are v4, v5e, v5p, v6e, v7x, a100, h100",
        ),
        ("l40s:8", "no chip 'l40s' in topology 'l40s:8'; there are v4, v5e, v5p, v6e, v7x, a100"),
        ("v5e:4x5", "no slice 'v5e:4x5'; of v5e there are v5e:1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16"),
        ("v5e-7", "no slice 'v5e-7'; of v5e there are v5e-1, 4, 8, 16, 32, 64, 128, 256"),
        ("v5e", "no slice 'v5e'; of v5e there are v5e-1, 4"),
        ("v5p:4x4", "no slice 'v5p:4x4'; of v5p there are v5p:2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4"),
        ("v5p-4", "of v5p there are v5p-8, 16, 32, 64, 128"),
        (
            "h100:3",
            "no topology 'h100:3'; of h100 there are h100:1, 2, 4, 8 on a host, and hosts of ",
        ),
        ("h100:0x8", "no topology 'h100:0x8'"),
        ("h100:2x2x8", "no topology 'h100:2x2x8'"),
        ("h100-8", "no topology 'h100-8'; of h100 there are h100:1, 2, 4, 8"),
        ("h100", "no topology 'h100'"),
        ("", "no chip ''"),
    ],
)
def test_what_does_not_exist_is_said_in_a_line_that_names_what_does(name, words):
    with pytest.raises(JaxdynError) as caught:
        shape_of(name)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_slices_end_where_the_largest_does():
    assert slices(CHIPS["v5e"])[-1] == (16, 16)
    assert slices(CHIPS["v5p"])[-1] == (16, 16, 24)
    assert slices(CHIPS["v4"])[-1] == (16, 16, 16)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("cpu", None),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("TPU7x", "v7x"),
        ("NVIDIA L40S", None),
    ],
)
def test_a_device_is_known_by_its_kind(kind, name):
    chip = chip_of(kind)
    assert chip is (None if name is None else CHIPS[name])


def test_here_is_this_machine():
    topology = open_topology("here")
    assert topology.name == "here (cpu)" and topology.chip is None
    assert len(topology.devices) == 8


def test_without_libtpu_the_command_that_brings_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(JaxdynError, match=r"v5e needs libtpu: pip install 'jaxdyn\[plan\]'"):
        open_topology("v5e-8")


@pytest.mark.parametrize(
    "versions, words",
    [
        ({}, "h100 needs JAX's CUDA plugin: pip install 'jaxdyn[plan-gpu]'"),
        (
            {"jax-cuda12-plugin": "0.4.1", "jax-cuda12-pjrt": JAXLIB},
            f"h100 needs jax-cuda12-plugin {JAXLIB}, as jaxlib is, and 0.4.1 is installed: pip "
            f"install jax-cuda12-plugin=={JAXLIB}",
        ),
        (
            {"jax-cuda12-plugin": JAXLIB, "jax-cuda12-pjrt": "0.4.1"},
            f"h100 needs jax-cuda12-pjrt {JAXLIB}, as jaxlib is, and 0.4.1 is installed",
        ),
        ({"jax-cuda12-plugin": JAXLIB}, "pip install 'jaxdyn[plan-gpu]'"),
    ],
)
def test_without_a_plugin_that_fits_the_command_that_brings_it_is_named(
    versions, words, monkeypatch
):
    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(JaxdynError) as caught:
        open_topology("h100:8")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_figures_of_a_data_sheet():
    """TPU v5e: 16 GB at 819 GB/s, 197 Tflop/s, four links that send 400 Gbit/s each."""
    v5e = CHIPS["v5e"]
    assert v5e.hbm == 16 * GIB and v5e.bandwidth == 819e9
    assert v5e.flops == 197e12 and v5e.interconnect == 4 * 400e9 / 8
