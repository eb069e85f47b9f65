"""Collectives beside products: schedules whose overlaps are known beforehand, and the command."""

import pytest

from rwkvx_jax.perf import hlo, overlap
from rwkvx_jax.perf.overlap import Overlap, read_overlap
from tests.perf.test_plan_hlo import ASYNCHRONOUS

GATHERED = 2 * 8 * 4  # what one of two devices sends of f32[4, 8]


def test_a_gather_in_fusions_runs_beside_the_product_of_one():
    whole = Overlap(1, GATHERED, GATHERED, GATHERED)
    assert read_overlap(hlo.parse(ASYNCHRONOUS), 2) == {"all-gather": whole}
    without = ASYNCHRONOUS.replace("dot(%b, %c), lhs", "add(%b, %b), lhs")
    alone = Overlap(1, GATHERED, GATHERED, 0)
    assert read_overlap(hlo.parse(without), 2) == {"all-gather": alone}


# Three permutations of 256 bytes: around a product, around none, and one that waits; then a
# reduction of 256 bytes, wrapped by the compiler, around a loop.
SCHEDULE = """HloModule m

%body (s: f32[8,8]) -> f32[8,8] {
  ROOT %s = f32[8,8]{1,0} parameter(0)
}

%condition (t: f32[8,8]) -> pred[] {
  %t = f32[8,8]{1,0} parameter(0)
  ROOT %no = pred[] constant(false)
}

%scatter (u: f32[8,8]) -> f32[4,8] {
  %u = f32[8,8]{1,0} parameter(0)
  ROOT %rs = f32[4,8]{1,0} reduce-scatter(%u), channel_id=9, replica_groups={{0,1}}, dimensions={0}, to_apply=%body
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %one = (f32[8,8]{1,0}, f32[8,8]{1,0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %p = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %end = f32[8,8]{1,0} collective-permute-done(%one)
  %two = (f32[8,8]{1,0}, f32[8,8]{1,0}) collective-permute-start(%end), source_target_pairs={{0,1},{1,0}}
  %sum = f32[8,8]{1,0} add(%p, %end)
  %end.2 = f32[8,8]{1,0} collective-permute-done(%two)
  %three = f32[8,8]{1,0} collective-permute(%end.2), source_target_pairs={{0,1},{1,0}}
  %four = ((f32[8,8]{1,0}), f32[4,8]{1,0}) async-start(%three), calls=%scatter
  %loop = f32[8,8]{1,0} while(%sum), condition=%condition, body=%body
  %end.4 = f32[4,8]{1,0} async-done(%four)
  ROOT %out = f32[8,8]{1,0} copy(%loop)
}
"""  # noqa: E501


def test_what_stands_between_start_and_end():
    found = read_overlap(hlo.parse(SCHEDULE), 2)
    assert found == {
        "collective-permute": Overlap(3, 768, 512, 256),
        "reduce-scatter": Overlap(1, 128, 128, 128),
    }
    assert list(found) == ["collective-permute", "reduce-scatter"]  # largest first
    lines = overlap.table(found).splitlines()
    assert lines[-1] == "| all | 4 | 0.0 | 0.0 (71%) | 0.0 (43%) |"


def test_a_program_that_sends_nothing():
    assert overlap.table({}).splitlines()[-1] == "| all | 0 | 0.0 | 0.0 (0%) | 0.0 (0%) |"


def test_the_command_names_what_is_wrong(capsys):
    with pytest.raises(SystemExit):
        overlap.main(["--config", "tiny_cpu", "--topology", "v9:2x2"])
    assert "v9:2x2" in capsys.readouterr().err
