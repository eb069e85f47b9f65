"""The static cost reader: loops and their trip counts, refusals, and the estimate's arithmetic."""

import json
import re

import pytest

from rwkvx_jax.perf import schedule, static_cases, static_costs
from rwkvx_jax.perf.kernel_costs import TABLE, read_costs
from rwkvx_jax.perf.schedule import UnknownTripCount, read_schedule
from rwkvx_jax.perf.stages import Core, Stage, total_seconds
from rwkvx_jax.perf.static_cases import Case

# The compiler's own format, cut down: a grid loop of 5 steps whose counter is spilled, an outer
# loop of 11 with an inner one of 6 (their exit tests share predicates and delay slots), one copy in
# (with the bounds check that repeats it) and one out.
SCHEDULE = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s9 = smov 0 /* copy for cssa */ } /* Start region 1 */
   0x1 LB: > { %s16 = sphi %s9, %s21 /* phi copy */ ;; %12 = sst [smem:[#alloc7_spill]] %s16 } /* Start region 141 */
   0x2   : > { %624 = dma.hbm_to_vmem [thread:$0]  (!%p9), /*hbm=*/%s1, /*size_in_granules=*/64, /*vmem=*/%s2 }
   0x3   : > { %856 = shalt.err (!%p8) /* BoundsCheck 4 for %624 = dma.hbm_to_vmem [thread:$0], /*size_in_granules=*/64 */ }
   0x4   : > { %s61 = smov 0 }
   0x5 LB: >> { %s63 = sphi %s61, %s47 /* phi copy */ ;; %s69 = smov (%p1), 0 } /* Start region 7 :: Start region 119 */
   0x6 LB: >>> { %s71 = sphi %s69, %s54 /* phi copy */ } /* Start region 108 */
   0x7   : >>> { %s54 = sadd.s32 1, %s71 ;; %s47 = sadd.s32 (%p4), 1, %s63 }
   0x8   : >>> { %p4 = scmp.ge.s32.totalorder %s54, 6 /* loop exit test */ }
   0x9   : >> { %253 = sbr.rel (!%p4) target = $region108 ;; %p5 = scmp.ge.s32.totalorder (%p4), %s47, 11 /* loop exit test */ }
   0xa   : >>> { %v1 = vmov 0.0 }
   0xb   : > { %246 = sbr.rel (!%p5) target = $region119 }
   0xc   : >> { %v2 = vmov 0.0 }
   0xd   : > { %s20 = sld [smem:[#alloc7_spill]] ;; %619 = dma.vmem_to_hbm [thread:$0], /*vmem=*/%s4, /*size_in_granules=*/32, /*hbm=*/%s5 }
   0xe   : > { %s21 = sadd.s32 1, %s20 /* copy for cssa */ }
   0xf   : > { %p18 = scmp.ge.s32.totalorder %s21, 5 /* loop exit test */ ;; %20 = sbr.rel (!%p18) target = $region141 }
  0x10   :  {} /* End region 1 */
"""  # noqa: E501


def test_loops_nest_and_multiply():
    program = read_schedule(SCHEDULE)
    (grid,) = program.inner
    (outer,) = grid.inner
    (inner,) = outer.inner
    assert [x.trips for x in (program, grid, outer, inner)] == [1, 5, 11, 6]
    assert [x.bundles for x in (program, grid, outer, inner)] == [2, 8, 3, 4]
    assert inner.total("bundles") == 6 * 4
    assert program.total("bundles") == 2 + 5 * (8 + 11 * (3 + 6 * 4))


def test_copies_are_counted_once():
    program = read_schedule(SCHEDULE)
    assert program.total("copies") == 5 * 2


def test_start_and_step_count():
    text = SCHEDULE.replace("%s61 = smov 0", "%s61 = smov 2").replace(
        "%s47 = sadd.s32 (%p4), 1,", "%s47 = sadd.s32 (%p4), 4,"
    )
    assert read_schedule(text).inner[0].inner[0].trips == 3  # 2, 6, 10


def test_a_copied_counter_counts():
    """The compiler may carry a copy of the counter instead of the counter itself."""
    text = SCHEDULE.replace("%s71 = sphi %s69, %s54", "%s71 = sphi %s69, %s55").replace(
        "   0xa   : >>> { %v1 = vmov 0.0 }", "   0xa   : >>> { %s55 = smov %s54 /* copy */ }"
    )
    assert text.count("%s55") == 2
    assert read_schedule(text).inner[0].inner[0].inner[0].trips == 6


# A counter that lives in memory: stored at the loop's end, loaded through a second slot.
KEPT = """
     0   :  { %s9 = smov 2 /* copy for cssa */ } /* Start region 1 */
   0x1   :  { %10 = sst [smem:[#alloc1_spill]] %s9 }
   0x2 LB: > { %11 = sst [smem:[#alloc4_spill]] %s99 } /* Start region 5 */
   0x3   : > { %s12 = sld [smem:[#alloc1_spill]] }
   0x4   : > { %13 = sst [smem:[#alloc2_spill]] %s12 }
   0x5   : > { %s14 = sld [smem:[#alloc2_spill]] }
   0x6   : > { %s15 = sadd.s32 3, %s14 }
   0x7   : > { %p16 = scmp.ge.s32.totalorder %s15, 11 /* loop exit test */ }
   0x8   : > { %17 = sst [smem:[#alloc1_spill]] %s15 ;; %18 = sbr.rel (!%p16) target = $region5 }
"""


def test_a_counter_kept_in_memory():
    (loop,) = read_schedule(KEPT).inner
    assert loop.trips == 3  # 2, 5, 8


def test_a_counter_that_is_computed_twice():
    """What is stored is another sum of the same numbers than the one that is compared."""
    text = KEPT.replace("{ %s15 =", "{ %s20 = sadd.s32 3, %s14 ;; %s15 =")
    text = text.replace("] %s15 ;;", "] %s20 ;;")
    text = text.replace("%s14 = sld", "%s21 = smov %s14 ;; %s14 = sld")  # and by way of a copy
    text = text.replace("%s20 = sadd.s32 3, %s14", "%s20 = sadd.s32 3, %s21")
    (loop,) = read_schedule(text).inner
    assert loop.trips == 3
    with pytest.raises(UnknownTripCount, match="bundle 0x2"):
        read_schedule(text.replace("%s20 = sadd.s32 3", "%s20 = sadd.s32 4"))


@pytest.mark.parametrize(
    "old, new",
    [
        ("%s15 ;; %18", "%s77 ;; %18"),  # another value is kept
        (
            "sst [smem:[#alloc2_spill]] %s12",
            "sst [smem:[#alloc2_spill]] %s77",
        ),  # not what is loaded
        ("%s9 = smov 2", "%s9 = sld [smem:[%s7]]"),  # a start known at run time
    ],
)
def test_other_counters_in_memory_are_refused(old, new):
    assert old in KEPT
    with pytest.raises(UnknownTripCount, match="bundle 0x2"):
        read_schedule(KEPT.replace(old, new))


@pytest.mark.parametrize(
    "old, new",
    [
        ("%s54, 6 /* loop exit", "%s54, %s99 /* loop exit"),  # a bound known at run time
        ("%s54, 6 /* loop exit test */", "%s54, 6"),  # no exit test at all
        ("%s61 = smov 0", "%s61 = sld [smem:[%s7]]"),  # a start known at run time
        ("sst [smem:[#alloc7_spill]] %s16", "sst [smem:[#alloc7_spill]] %s17"),  # another counter
    ],
)
def test_unknown_trip_counts_are_refused(old, new):
    assert old in SCHEDULE
    with pytest.raises(UnknownTripCount, match="bundle 0x"):
        read_schedule(SCHEDULE.replace(old, new))


def test_something_else_is_refused():
    with pytest.raises(ValueError, match="no bundles"):
        read_schedule("module @wkv7 {}")


def test_utilization():
    text = "== CAPACITY:\nMXU, VALU\n    4     2\n== UTILIZATION:\n4 0\n0 1\n2 1\n2 0\n"
    assert schedule.read_utilization(text) == {"MXU": 0.5, "VALU": 0.25}


CORE = Core(clock=1e9, flops=1e12, bandwidth=1e11, copy_seconds=1e-6)


@pytest.mark.parametrize(
    "stage, expected",
    [
        (Stage("issue bound", bytes=1000, bundles=5000), 5e-6),
        (Stage("memory bound", bytes=10**6, bundles=5000), 1e-5),
        (Stage("copy bound", bytes=1000, bundles=5000, copies=20), 2e-5),
        (Stage("xla", bytes=1000, flops=10**8), 1e-4),
    ],
)
def test_a_stage_is_its_slowest_resource(stage, expected):
    assert stage.seconds(CORE) == pytest.approx(expected)


def test_stages_add():
    stages = [Stage("kernel", bytes=0, bundles=1000), Stage("xla", bytes=10**5)]
    assert total_seconds(stages, CORE) == pytest.approx(2e-6)


def test_a_body_is_counted_per_grid_step():
    """The two passes that fill and drain the pipeline are not work."""
    facts = dict(
        parallel_steps=2, units=6, hbm_bytes=120, contract_bytes=100, compile_seconds=1.0, jax="x"
    )
    case = Case("wkv7_forward", "v5e", 768, 4096)
    result = static_costs._account(case, read_schedule(SCHEDULE), {}, facts)
    body = 8 + 11 * (3 + 6 * 4)
    assert result["body"] == body and result["steps"] == 3
    assert result["bundles_per_unit"] == body * 3 / 6
    assert result["traffic"] == 1.2


def test_names_round_trip_and_the_table_holds_every_case():
    cases = static_cases.all_cases()
    packed = [case.with_documents() for case in cases]
    assert [static_cases.case_named(case.name) for case in cases + packed] == cases + packed
    assert set(read_costs()) == {case.name for case in cases}


def test_the_table_is_an_estimate_by_its_own_words():
    text = json.loads(TABLE.read_text())["about"]
    assert re.search("estimate", text) and re.search("nothing here was timed", text)


def test_unknown_case_is_named():
    with pytest.raises(SystemExit, match="no case contains 'v9'"):
        static_costs.main(["--only", "v9"])
