"""Reading compiled programs: programs whose loops, products and messages are known beforehand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rwkvx_jax.config import MeshConfig
from rwkvx_jax.ops.loop_bounds import at_most
from rwkvx_jax.perf import collectives, hlo
from rwkvx_jax.perf.hlo import Array, HloError
from rwkvx_jax.perf.work import read_work
from rwkvx_jax.sharding import make_mesh

X = jnp.ones((8, 16))
W = jnp.ones((16, 16))
pytestmark = pytest.mark.optimized

PRODUCT = 2 * 8 * 16 * 16  # flops of X @ W


def compiled_work(fn, *arguments, devices=1):
    module = hlo.parse(jax.jit(fn).lower(*arguments).compile().as_text())
    return read_work(module, devices)


def total_flops(fn, *arguments):
    work, notes = compiled_work(fn, *arguments)
    return sum(one.times * one.flops for one in work), notes


@pytest.mark.parametrize(
    "layout, dims, expected",
    [
        ("", (3, 5), 60),
        ("1,0", (3, 5), 60),
        ("1,0:T(8,128)", (3, 5), 8 * 128 * 4),
        ("0,1:T(8,128)", (130, 9), 256 * 16 * 4),  # the minor dimension is the first one
        ("2,1,0:T(8,128)", (3, 8, 128), 3 * 8 * 128 * 4),
        ("0:T(128)", (130,), 256 * 4),
    ],
)
def test_bytes_count_the_padding_of_tiles(layout, dims, expected):
    assert Array("f32", dims, layout).bytes == expected
    assert Array("bf16", dims, layout).bytes == expected / 2


def test_arrays_on_the_chip_use_no_main_memory():
    assert Array("f32", (8, 128), "1,0:T(8,128)S(1)").hbm_bytes == 0
    assert Array("f32", (8, 128), "1,0:T(8,128)").hbm_bytes == 4096


@pytest.mark.parametrize("text", ["", "module {}", "HloModule empty\n"])
def test_text_that_is_no_program_is_refused(text):
    with pytest.raises(HloError):
        hlo.parse(text)


def test_nested_loops_multiply():
    def inner(x, _):
        return jnp.tanh(x @ W), None

    def outer(x, _):
        x = jax.lax.scan(inner, x, None, length=5)[0]
        return x @ W, None

    flops, notes = total_flops(lambda x: jax.lax.scan(outer, x, None, length=7)[0], X)
    assert flops == 7 * (5 + 1) * PRODUCT
    assert not notes


@pytest.mark.parametrize("start, stop, step", [(0, 10, 3), (2, 10, 1), (-4, 5, 4)])
def test_counters_of_any_start_and_step(start, stop, step):
    def body(carry):
        i, x = carry
        return i + step, jnp.tanh(x @ W)

    fn = lambda x: jax.lax.while_loop(lambda carry: carry[0] < stop, body, (jnp.int32(start), x))[1]
    flops, _ = total_flops(fn, X)
    assert flops == len(range(start, stop, step)) * PRODUCT


def test_counters_that_run_down():
    def body(carry):
        i, x = carry
        return i - 2, jnp.tanh(x @ W)

    flops, _ = total_flops(
        lambda x: jax.lax.while_loop(lambda carry: carry[0] > 0, body, (jnp.int32(9), x))[1], X
    )
    assert flops == 5 * PRODUCT


def test_a_bound_that_depends_on_the_enclosing_loop_is_averaged():
    def row(x, i):
        return jax.lax.fori_loop(i // 2, i + 1, lambda _, x: jnp.tanh(x @ W), x), None

    flops, notes = total_flops(lambda x: jax.lax.scan(row, x, jnp.arange(6))[0], X)
    assert flops == sum(i + 1 - i // 2 for i in range(6)) * PRODUCT
    assert [note.trips.basis for note in notes] == ["average"]


def test_of_branches_the_heaviest_counts():
    """Loops inside see the operands of their own branch."""

    def row(x, i):
        often = lambda x: jax.lax.fori_loop(0, i + 2, lambda _, x: jnp.tanh(x @ W), x)
        return jax.lax.cond(x[0, 0] > 0, often, lambda x: x - 1, x), None

    fn = lambda x: jax.lax.scan(row, x, jnp.arange(4))[0]
    assert "conditional(" in jax.jit(fn).lower(X).compile().as_text()
    flops, _ = total_flops(fn, X)
    assert flops == (2 + 3 + 4 + 5) * PRODUCT


def test_loops_that_depend_on_data_count_once_or_as_stated():
    once = lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ W), x)
    flops, notes = total_flops(once, X, jnp.int32(3))
    assert (flops, notes[0].trips.basis) == (PRODUCT, "unknown")

    def stated(x, n):
        with at_most(4.2):
            return once(x, n)

    flops, notes = total_flops(stated, X, jnp.int32(3))
    assert (flops, notes[0].trips.basis) == (5 * PRODUCT, "stated")
    assert any(file.endswith("test_plan_hlo.py") for file, _ in notes[0].source)
    both = lambda x, n: jax.jvp(lambda x: stated(x, n), (x,), (x,))
    assert {note.trips.basis for note in total_flops(both, X, jnp.int32(3))[1]} == {"stated"}


def test_products_inside_fusions_and_of_batches():
    batch = jnp.ones((3, 8, 16))
    fn = lambda x, y, w: jnp.einsum("bik,bjk->bij", jnp.exp(x), y + 1) @ w
    flops, _ = total_flops(fn, batch, jnp.ones((3, 4, 16)), jnp.ones((4, 5)))
    assert flops == 2 * 3 * (8 * 4 * 16 + 8 * 4 * 5)


NESTED = """HloModule nested

%inner (a: f32[4,8], b: f32[8,2]) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  ROOT %dot = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
operand_precision={highest,highest}
}

%outer (c: f32[4,8], d: f32[8,2]) -> f32[4,2] {
  %c = f32[4,8]{1,0} parameter(0)
  %d = f32[8,2]{1,0} parameter(1)
  ROOT %product = f32[4,2]{1,0} fusion(%c, %d), kind=kOutput, calls=%inner
}

ENTRY %main (x: f32[4,8], y: f32[8,2]) -> f32[4,2] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[8,2]{1,0:S(1)} parameter(1)
  ROOT %fusion = f32[4,2]{1,0} fusion(%x, %y), kind=kOutput, calls=%outer
}
"""


def test_fusions_inside_fusions():
    """As TPU programs have them; float32 products at the highest precision take six passes."""
    (work,), _ = read_work(hlo.parse(NESTED), 1)
    assert (work.flops, work.passes) == (2 * 4 * 8 * 2, 6 * 2 * 4 * 8 * 2)
    assert work.bytes == 4 * (4 * 8 + 4 * 2)  # y lies on the chip


# As libtpu writes a gather that runs beside a product: its channel is in three fusions.
ASYNCHRONOUS = """HloModule m

%start (a: f32[2,8]) -> f32[4,8] {
  %a = f32[2,8]{1,0} parameter(0)
  ROOT %ag.0 = f32[4,8]{1,0} all-gather(%a), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}

%beside (b: f32[2,8], c: f32[8,8]) -> f32[2,8] {
  %b = f32[2,8]{1,0} parameter(0)
  %c = f32[8,8]{1,0} parameter(1)
  %ag.1 = f32[4,8]{1,0} all-gather(%b), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  ROOT %p = f32[2,8]{1,0} dot(%b, %c), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%done (d: f32[4,8]) -> f32[4,8] {
  %d = f32[4,8]{1,0} parameter(0)
  ROOT %ag.2 = f32[8,8]{1,0} all-gather(%d), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (x: f32[2,8], y: f32[8,8]) -> f32[4,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %async-collective-start.3 = f32[4,8]{1,0} fusion(%x), kind=kCustom, calls=%start
  %fusion.9 = f32[2,8]{1,0} fusion(%x, %y), kind=kCustom, calls=%beside
  ROOT %async-collective-done.3 = f32[4,8]{1,0} fusion(%async-collective-start.3), kind=kCustom, calls=%done
}
"""  # noqa: E501


@pytest.mark.parametrize("start", ["async-collective-start.3", "all-gather_fusion.3"])
def test_an_asynchronous_collective_counts_once(start):
    text = ASYNCHRONOUS.replace("async-collective-start.3", start)
    works, _ = read_work(hlo.parse(text), 2)
    gathers = [work.collective.bytes for work in works if work.collective]
    assert gathers == ([4 * 8 * 4] if start.startswith("async") else [128, 128, 256])
    assert sum(work.flops for work in works) == 2 * 2 * 8 * 8


def test_a_convolution_meets_no_padding():
    conv = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (2,), [(3, 3)], dimension_numbers=("NHC", "HIO", "NHC")
    )
    flops, _ = total_flops(conv, jnp.ones((2, 20, 6)), jnp.ones((5, 6, 7)))
    # Output o meets input 2 o - 3 + k, k < 5: 11 outputs.
    pairs = sum(0 <= 2 * o - 3 + k < 20 for o in range(11) for k in range(5))
    assert flops == 2 * 2 * 6 * 7 * pairs


def test_bytes_of_a_slice_are_the_slices():
    big, row = jnp.ones((1000, 128)), 128 * 4

    def fn(x):
        def step(total, i):
            return total + jnp.exp(jax.lax.dynamic_index_in_dim(x, i, 0, False)), None

        return jax.lax.scan(step, jnp.zeros(128), jnp.arange(50))[0]

    work, _ = compiled_work(fn, big)
    moved = sum(one.times * one.bytes for one in work)
    assert 50 * row <= moved < 50 * 8 * row  # 50 rows and as many totals, not 50 whole arrays


KINDS = {
    "all-reduce": lambda x: jax.lax.psum(x, "data"),
    "all-gather": lambda x: jax.lax.all_gather(x, "data"),
    "reduce-scatter": lambda x: jax.lax.psum_scatter(x, "data", scatter_dimension=1, tiled=True),
    "all-to-all": lambda x: jax.lax.all_to_all(x, "data", 1, 1, tiled=True),
    "collective-permute": lambda x: jax.lax.ppermute(
        x, "data", [(i, (i + 1) % 4) for i in range(4)]
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_collectives(kind):
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    part = 2 * 8 * 4  # bytes of a device's [2, 8]

    def fn(x):
        scan = jax.lax.scan(lambda c, _: (c + KINDS[kind](x).sum(), None), x.sum(), None, length=3)
        return scan[0][None]

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(fn, in_specs=P("data"), out_specs=P("data"), check_vma=False)
        text = jax.jit(mapped).lower(jnp.ones((8, 8))).compile().as_text()
    work, _ = read_work(hlo.parse(text), 8)
    found = [one for one in work if one.collective]
    assert {one.collective.kind for one in found} == {kind}
    expected = {
        "all-reduce": 2 * part * 3 / 4,
        "all-gather": 4 * part * 3 / 4,
        "reduce-scatter": part * 3 / 4,
        "all-to-all": part * 3 / 4,
        "collective-permute": part,
    }[kind]
    # The same every time: the compiler may take it out of the loop.
    assert {one.collective.wire_bytes for one in found} == {expected}
    assert sum(one.times for one in found) in (1, 3)
    groups = found[0].collective.groups
    if kind != "collective-permute":
        assert sorted(map(sorted, groups.tolist())) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    else:
        assert [0, 2] in groups.tolist()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_notations_of_groups(text, expected):
    found = collectives.replica_groups(f"channel_id=1, {text}, use_global_device_ids=true", 4)
    np.testing.assert_array_equal(np.array(sorted(found.tolist())), expected)


@pytest.mark.parametrize("more", ["", ',\n"note":"{x}\\n"'])
def test_a_kernels_metadata_may_take_several_lines(more):
    """A kernel of this project says there how many steps of its grid cores may share."""
    text = f"""HloModule jit_f, entry_computation_layout={{()->f32[8,128]{{1,0}}}}

ENTRY %main.1 () -> f32[8,128] {{
  %start = f32[8,128]{{1,0}} constant({{...}})
  ROOT %wkv7_forward.2 = f32[8,128]{{1,0}} custom-call(%start), \
custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"parallel_steps":"6"{more}
}}}}, metadata={{op_name="jit(f)/wkv7"}}, backend_config={{"custom_call_config":{{"body":"AA"}}}}
}}
"""
    works, _ = read_work(hlo.parse(text), 1)
    (kernel,) = [one for one in works if one.kernel]
    assert (kernel.kernel, kernel.parallel_steps) == ("wkv7_forward", 6)


def test_a_scatter_in_a_fusion_changes_its_array_in_place():
    """As XLA writes rows of a cache: not the whole array moves, but the rows and their numbers."""
    text = """HloModule jit_f, entry_computation_layout={()->f32[64,32]{1,0}}

%keep (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %b = f32[] parameter(1)
}

%fused (cache: f32[64,32], rows: s32[5,1], new: f32[5,32]) -> f32[64,32] {
  %cache = f32[64,32]{1,0} parameter(0)
  %rows = s32[5,1]{1,0} parameter(1)
  %new = f32[5,32]{1,0} parameter(2)
  ROOT %put = f32[64,32]{1,0} scatter(%cache, %rows, %new), update_window_dims={1}, \
inserted_window_dims={0}, scatter_dims_to_operand_dims={0}, index_vector_dim=1, to_apply=%keep
}

ENTRY %main (cache: f32[64,32], rows: s32[5,1], new: f32[5,32]) -> f32[64,32] {
  %cache.1 = f32[64,32]{1,0} parameter(0)
  %rows.1 = s32[5,1]{1,0} parameter(1)
  %new.1 = f32[5,32]{1,0} parameter(2)
  ROOT %fusion = f32[64,32]{1,0} fusion(%cache.1, %rows.1, %new.1), kind=kCustom, calls=%fused
}
"""
    works, _ = read_work(hlo.parse(text), 1)
    assert sum(one.times * one.bytes for one in works) == 5 * 4 + 2 * 5 * 32 * 4
