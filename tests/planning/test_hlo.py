# ruff: noqa: E501
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rst_jax.planning.hlo import Collective, Program
from rst_jax.runtime.mesh import AXIS, make_mesh
from rst_jax.runtime.operations import operations


def compiled(function, *arguments):
    return Program(jax.jit(function).lower(*arguments).compile().as_text())


def test_collectives_are_found_with_bytes_and_place():
    """Compiled here for four CPU devices: one sum at the end, and one in a loop."""
    mesh = make_mesh()

    def summed(x):
        def body(i, x):
            return x + jax.lax.psum(x * i, AXIS)

        x = jax.lax.fori_loop(0, jnp.int32(x.sum()), body, x)
        return jax.lax.psum(x, AXIS)

    mapped = jax.shard_map(summed, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    found = sorted((c.kind, c.bytes, c.in_loop) for c in compiled(mapped, np.ones((3, 5), np.float32)).collectives)
    assert found == [("all-reduce", 60, False), ("all-reduce", 60, True)]


TPU = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%taken (p: f32[64,8], i: s32[]) -> f32[1,8] {
  %p = f32[64,8]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %z = s32[]{:T(128)} constant(0)
  ROOT %row = f32[1,8]{1,0:T(8,128)} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,8}
}

%body (c: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %c = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%c), index=0
  %x = f32[64,8]{1,0:T(8,128)} get-tuple-element(%c), index=1
  %row = f32[1,8]{1,0:T(8,128)S(1)} fusion(%x, %n), kind=kLoop, calls=%taken, metadata={op_name="jit(f)/masks/take"}, backend_config={"estimated_cycles":"100"}
  ROOT %out = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) tuple(%n, %x)
}

%until (c: (s32[], f32[64,8])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%c), index=0
  %most = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[]{:T(512)} compare(%n, %most), direction=LT
}

%cheap (x: f32[64,8]) -> f32[64,8] {
  %x = f32[64,8]{1,0:T(8,128)} parameter(0)
  ROOT %b = f32[64,8]{1,0:T(8,128)} bitcast(%x)
}

%dear (x: f32[64,8]) -> f32[64,8] {
  %x = f32[64,8]{1,0:T(8,128)} parameter(0)
  ROOT %copied = f32[64,8]{1,0:T(8,128)} copy(%x)
}

ENTRY %main (p: f32[64,8], q: pred[], r: f32[]) -> f32[4,3] {
  %p = f32[64,8]{1,0:T(8,128)} parameter(0)
  %q = pred[]{:T(512)} parameter(1)
  %r = f32[] parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %t = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) tuple(%zero, %p)
  %loop = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) while(%t), condition=%until, body=%body
  %either = f32[64,8]{1,0:T(8,128)} conditional(%q, %p, %p), true_computation=%dear, false_computation=%cheap
  %begun = (f32[64,8]{1,0:T(8,128)}, f32[64,8]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%p)
  %there = f32[64,8]{1,0:T(8,128)S(1)} copy-done(%begun)
  %all-reduce.1 = (f32[4,3]{1,0:T(8,128)S(1)}, bf16[8]{0:T(1024)}) all-reduce(%r, %r), to_apply=%add
  %all-gather-start = f32[2]{0} all-gather-start(%r), dimensions={0}
  ROOT %got = f32[4,3]{1,0:T(8,128)S(1)} get-tuple-element(%all-reduce.1), index=0
}
"""


def test_the_text_of_a_tpu_program_is_read_too():
    program = Program(TPU)
    assert program.collectives == [Collective("all-reduce", 64, False), Collective("all-gather", 8, False)]
    row, begun, reduced, gathered = program.kernels  # the cheap branch has none
    assert (row.runs, row.cycles, row.source) == (7, 100, "jit(f)/masks/take")
    assert row.bytes == 32 + 4  # a row of 64, to the chip, and its number
    assert begun.bytes == 64 * 8 * 4  # read; what is written lies on the chip
    assert reduced.bytes == 4 + 16
    assert gathered.bytes == 4 + 8


GPU = """
ENTRY %main (x: bf16[256,32,32,64], w: bf16[128,3,3,64], g: bf16[256,16,16,128]) -> (bf16[256,16,16,128]) {
  %x = bf16[256,32,32,64]{3,2,1,0} parameter(0)
  %w = bf16[128,3,3,64]{3,2,1,0} parameter(1)
  %g = bf16[256,16,16,128]{3,2,1,0} parameter(2)
  %y = (bf16[256,16,16,128]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %dx = (bf16[256,32,32,64]{3,2,1,0}, u8[0]{0}) custom-call(%g, %w), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %dw = (bf16[128,3,3,64]{3,2,1,0}, u8[0]{0}) custom-call(%x, %g), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  ROOT %out = (bf16[256,16,16,128]{3,2,1,0}) tuple(%y)
}
"""


def test_a_gpus_convolutions_and_their_gradients_have_the_operations_of_the_formula():
    one = 2 * 256 * 128 * 64 * 9 * 16 * 16
    forward, back, weights = Program(GPU).kernels
    assert [k.operations for k in (forward, back, weights)] == [one] * 3
    x, w, g = 256 * 32 * 32 * 64 * 2, 128 * 9 * 64 * 2, 256 * 16 * 16 * 128 * 2
    assert [k.bytes for k in (forward, back, weights)] == [x + w + g] * 3
    assert not forward.float32


@pytest.mark.parametrize("loop", [False, True])
def test_operations_of_a_program_compiled_here_are_those_of_its_trace(loop):
    def f(x, w, v):
        def one(x):
            y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return jnp.tanh(y)

        x = jax.lax.scan(lambda x, _: (one(x), None), x, None, 5)[0] if loop else one(x)
        return x.reshape(x.shape[0], -1) @ v

    x, w, v = (np.ones(s, np.float32) for s in ((4, 8, 8, 3), (3, 3, 3, 3), (192, 10)))
    assert sum(k.runs * k.operations for k in compiled(f, x, w, v).kernels) == operations(f, x, w, v)


def test_what_is_put_into_an_array_is_all_that_is_written_of_it():
    def f(x, row, i):
        return jax.lax.dynamic_update_slice(x, row, (i, jnp.int32(0)))

    text = jax.jit(f, donate_argnums=0).lower(np.ones((1000, 16), np.float32), np.ones((1, 16), np.float32), 3)
    moved = sum(k.bytes for k in Program(text.compile().as_text()).kernels if "update" in k.opcode + k.name)
    assert moved < 16 * 4 * 4


def test_a_text_that_is_cut_off_is_refused():
    with pytest.raises(ValueError, match="bracket"):
        Program(GPU[: GPU.index("u8[0]")] + "\n")
