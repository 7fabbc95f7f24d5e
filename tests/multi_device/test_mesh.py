"""Meshes of 8 virtual devices compute what one device does,
and really split what they say they split."""

import json
import pathlib
import textwrap

import jax
import numpy as np
import pytest

from rlbf_jax.parallel.mesh import MeshConfig, make_mesh, shardings, spec_of

CHILD = str(pathlib.Path(__file__).with_name("mesh_child.py"))
MATRICES = {"qkv", "out", "gate_up", "down", "embedding", "unembedding"}
MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]
"""(data, fsdp, tensor)."""


@pytest.fixture(scope="module")
def results(run_in_child):
    """What every mesh gave, by its sizes; the first row is about the traces themselves."""
    first, *rows = map(
        json.loads, run_in_child(CHILD, *(",".join(map(str, m)) for m in MESHES)).splitlines()
    )
    assert first["directives"] >= 10
    return {tuple(row["sizes"]): row for row in rows} | {"first": first}


SIZES = pytest.mark.parametrize("sizes", MESHES)


@SIZES
@pytest.mark.parametrize(
    "what",
    ["supervised_gradient", "squares", "policy_gradient", "policy_params", "adapter_gradient"],
)
def test_one_update_is_that_of_one_device(results, sizes, what):
    """Gradients, Adam's moments after one step, and parameters after a step of SGD;
    relative to the largest."""
    assert results[sizes][what] <= 1e-5


@SIZES
def test_parameters_and_moments_are_split_as_the_mesh_says(results, sizes):
    for what in ("split_params", "split_moments"):
        split = set(results[sizes][what])
        assert not split if sizes == (8, 1, 1) else split >= MATRICES


@SIZES
def test_adapters_are_split_as_their_projections_are(results, sizes):
    split = set(results[sizes]["split_adapters"])
    _, fsdp, tensor = sizes
    expected = {"qkv_lora_a", "out_lora_b", "gate_up_lora_a", "down_lora_b"} if fsdp > 1 else set()
    if tensor > 1:
        expected |= {"qkv_lora_b", "out_lora_a", "gate_up_lora_b", "down_lora_a"}
    assert split == expected


@SIZES
def test_the_sampler_draws_the_same_ids(results, sizes):
    assert results[sizes]["same_ids"]
    assert results[sizes]["sampled"] == (32 if sizes == (2, 2, 2) else 16)
    assert results[sizes]["logprobs"] <= 1e-4


def test_a_mesh_of_explicit_axes_may_be_given(results):
    """`jax.sharding.auto_axes` around it; the result has the type that was asked for."""
    assert results["first"]["explicit"] <= 1e-5 and results["first"]["typed"]


# Shapes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(3, 1, 1), (2, 2, 3), (-1, 3, 1), (1, 1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_says_so(sizes):
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        make_mesh(MeshConfig(*sizes), devices=list(jax.devices()) * 8)


def test_two_open_axes_are_refused():
    with pytest.raises(ValueError, match="at most one mesh axis may be -1"):
        make_mesh(MeshConfig(-1, -1, 1))


def test_an_axis_that_does_not_divide_a_dimension_is_left_out(run_in_child):
    program = """
        import jax
        from rlbf_jax.parallel.mesh import MeshConfig, make_mesh, spec_of
        mesh = make_mesh(MeshConfig(1, 4, 2))
        name = (jax.tree_util.DictKey("down"),)
        for shape in ((6, 8), (7, 8), (7, 9)):
            print(tuple(spec_of(name, shape, mesh)))
    """
    whole, rows_only, nothing = run_in_child(textwrap.dedent(program)).splitlines()
    assert (whole, rows_only, nothing) == ("('tensor', 'fsdp')", "(None, 'fsdp')", "(None, None)")


def test_unknown_names_and_scalars_are_copied_everywhere():
    mesh = make_mesh(devices=jax.devices()[:1])
    tree = {"norm": np.zeros(3), "step": np.int32(0), "down": np.zeros((2, 4, 6))}
    places = shardings(tree, mesh)
    assert places["norm"].spec == places["step"].spec == jax.sharding.PartitionSpec()
    # A scanned leading dimension stays whole.
    assert spec_of((jax.tree_util.DictKey("down"),), (2, 4, 6), mesh)[0] is None
