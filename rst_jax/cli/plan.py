"""`plan`: what a configuration will cost on TPUs or GPUs."""

from collections.abc import Sequence

from rst_jax.cli.options import Parser, config_file, within
from rst_jax.ranges import Count
from rst_jax.runtime import work
from rst_jax.runtime.files import write_json, write_text
from rst_jax.runtime.paths import local_path
from rst_jax.runtime.text import show

_DESCRIPTION = """Compiles the search step for a topology that this machine does not have (minutes; needs pip install
"rst_jax[plan]") and tells from the compiled program: memory, collectives, kernels and the bytes that they move, times
and hours at published rates. Without the compiler: a floor by formula. Of a sweep it takes the configuration that its
points change."""
_USAGE = (
    "python -m rst_jax plan --config=FILE --topology=CHIP:COUNT [--kernels=20] [--hlo=FILE] [--json=FILE] "
    "[--config.FIELD=VALUE ...]"
)


def run(arguments: Sequence[str]) -> None:
    """The arguments after the word.

    Raises:
      ValueError: what is not right, in a sentence.
    """
    parser = Parser("plan", _DESCRIPTION, usage=_USAGE)
    parser.add_config()
    parser.add_argument("--topology", metavar="CHIP:COUNT", help="for instance v5e:4x4, h200:8 or a100:1")
    parser.add_argument(
        "--kernels", metavar="N", type=within(Count), default=0, help="print the N kernels that take longest"
    )
    parser.add_argument("--hlo", metavar="FILE", help="write the compiled program's text there")
    parser.add_argument("--json", metavar="FILE", help="write the plan there too, with every kernel")
    o = parser.parse(arguments)
    if o.topology is None:
        raise ValueError("expected --topology=CHIP:COUNT, for instance --topology=v5e:4x4 or --topology=h200:8.")
    config = config_file(o).config()
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing runs but compilers
    work.find_devices()
    from rst_jax.planning import plan, text  # heavy

    made = plan.make_plan(config, o.topology)
    show(text.plan_text(made, o.kernels))
    if o.hlo or o.json:
        if o.hlo and not made.compiled:
            raise ValueError(f"--hlo={o.hlo}: there is no compiled program; {made.why_not}.")
        if o.hlo and made.compiled:
            write_text(local_path(o.hlo), made.compiled.text)
        if o.json:
            write_json(local_path(o.json), plan.to_dict(made))
