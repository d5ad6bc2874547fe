"""A plan for a terminal."""

from rst_jax.planning.counts import Counts, kernels_text
from rst_jax.planning.plan import Plan, batch_for


def plan_text(plan: Plan, kernels: int = 0) -> str:
    """The plan for a terminal, with the kernels that take longest."""
    chip, chips = plan.topology.chip, plan.topology.chips
    lines = [
        f"{plan.topology.text}: {chips} chip{'s' if chips > 1 else ''}, {plan.batch_size} images a step; predicted, "
        "not measured",
        "",
    ]

    def row(name: str, text: str) -> None:
        lines.append(f"  {name:14} {text}")

    floor = plan.floor
    row("operations", f"{floor.operations / 1e9:.1f} GFLOP an image and step; {chip.flops / 1e12:.0f} TFLOP/s a chip")
    if c := plan.compiled:
        row("compiled", f"the real step, in {c.seconds:.0f} s")
        fits = "fits" if c.memory <= chip.memory else "DOES NOT FIT"
        row("memory", f"{c.memory / 1e9:.2f} GB of {chip.memory / 1e9:.0f} GB a chip: {fits}")
        for each in c.program.collectives:
            place = "INSIDE A LOOP" if each.in_loop else "once a step, outside the attack"
            row(each.kind, f"{each.bytes / 1e6:.1f} MB, {place}")
        row("", f"scores and statistics are {4 * (plan.scores + plan.statistics) / 1e6:.1f} MB")
        lines += ["", *_table(plan)]
        if kernels:
            lines += ["", kernels_text(c.program.kernels, chip, kernels)]
    else:
        row("compiled", f"no: {plan.why_not}")
        row("traffic", f"{floor.traffic / 1e9:.2f} GB an image and step by formula; {chip.bandwidth / 1e9:.0f} GB/s")
    lines += [
        "",
        "  chips  images/chip    images  masks, update  all-reduce      step      epoch  efficiency  hours  chip-h",
    ]
    one = plan.points[0].step
    for p in plan.points:
        ms = [1e3 * t for t in (p.images, p.fixed, p.reduce, p.step)]
        epoch, hours = p.step * plan.steps_per_epoch, plan.hours(p)
        lines.append(
            f"  {p.chips:5}  {plan.batch_size // p.chips:11}  {ms[0]:8.2f}  {ms[1]:13.2f}  {ms[2]:10.2f}  {ms[3]:8.2f}"
            f" ms  {epoch:5.1f} s  {100 * one / p.step / p.chips:8.0f} %  {hours:5.1f}  {hours * p.chips:6.1f}"
        )
    source = "the compiled step's kernels" if plan.compiled else "operations and traffic by formula, a floor"
    lines += [
        "",
        f"  hours of {plan.networks} networks of {plan.epochs} epochs of {plan.steps_per_epoch} steps; evaluation not "
        "counted.",
        f"  Times are a step's, from {source}; nothing overlaps.",
        "  A chip that cannot hold its images takes them in parts (accumulate) at the same operations.",
        f"  90 % of one chip's efficiency on 256 chips needs a batch of {batch_for(plan, 0.9):,} images.",
    ]
    return "\n".join(lines)


def _table(plan: Plan) -> list[str]:
    """Kernels, bytes and times by kind, and of the parts of the step."""
    guess = plan.parts["step"].estimate is not None
    lines = [f"  a step of a chip     kernels        GB    TFLOP        ms{'   compiler, ms' if guess else ''}"]

    def row(name: str, c: Counts) -> None:
        own = f"  {1e3 * c.best:13.2f}" if guess else ""
        lines.append(
            f"  {name:20} {c.kernels:7}  {c.bytes / 1e9:8.2f}  {c.operations / 1e12:7.2f}  {1e3 * c.seconds:8.2f}{own}"
        )

    for kind, counts in plan.kinds.items():
        row(kind, counts)
    row("in all", plan.parts["step"])
    row("a pass of the attack", plan.parts["attack_pass"])
    row("all but the attack", plan.parts["rest"])
    lines.append(f"  {'floor by formula':20} {'':7}  {'':8}  {'':7}  {1e3 * plan.floor_step:8.2f}")
    return lines
