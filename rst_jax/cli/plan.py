"""`plan`: what a configuration will cost on TPUs or GPUs."""

import os
from collections.abc import Sequence

from rst_jax.cli.options import Parser, config_file
from rst_jax.runtime import work
from rst_jax.runtime.files import write_json
from rst_jax.runtime.paths import local_path
from rst_jax.runtime.text import show

_DESCRIPTION = """Compiles the search step for a TPU topology without a TPU (needs libtpu: pip install "jax[tpu]";
minutes) and predicts memory, collectives, times and chip-hours from published rates. For GPUs (--topology=h200:8) by
formula. Of a sweep it takes the configuration that its points change."""
_USAGE = "python -m rst_jax plan --config=FILE --topology=v5e:4x4 [--json=FILE] [--config.FIELD=VALUE ...]"


def run(arguments: Sequence[str]) -> None:
    """The arguments after the word.

    Raises:
      ValueError: what is not right, in a sentence.
    """
    parser = Parser("plan", _DESCRIPTION, usage=_USAGE)
    parser.add_config()
    parser.add_argument("--topology", metavar="CHIP:COUNT", help="for instance v5e:4x4 or h200:8")
    parser.add_argument("--json", metavar="FILE", help="write the plan there too")
    o = parser.parse(arguments)
    if o.topology is None:
        raise ValueError("expected --topology=CHIP:COUNT, for instance --topology=v5e:4x4 or --topology=h200:8.")
    config = config_file(o).config()
    if "JAX_PLATFORMS" in os.environ:
        work.find_devices()
    from rst_jax.planning import plan  # heavy

    made = plan.make_plan(config, o.topology)
    show(plan.plan_text(made))
    if o.json:
        write_json(local_path(o.json), plan.to_dict(made))
