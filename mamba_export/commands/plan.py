"""mamba-export plan"""

from __future__ import annotations

import click

from mamba_export.commands.console import Console, common_options, size


def _ints(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    """A comma-separated list of positive integers."""
    try:
        found = [int(part) for part in value.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise click.BadParameter(f"'{value}' is not a list of positive numbers, like 1,8")
    return found


@click.command("plan", short_help="Show what a model takes on a device, before anything runs.")
@click.argument("model", type=click.Path())
@click.option("--device", "names", multiple=True, help="Of the device table; all when left out.")
@click.option("--memory", type=click.FloatRange(0, min_open=True), help="GB, for a device not in the table.")
@click.option("--bandwidth", type=click.FloatRange(0, min_open=True), help="GB/s, for a device not in the table.")
@click.option("--dtype", help="fp32, fp16, bf16, int8 or int4 weights; the model's own when left out.")
@click.option("-b", "--batch", "batches", default="1", callback=_ints, show_default=True, help="Rows; a list: 1,8.")
@click.option("--chunk", default=512, show_default=True, type=click.IntRange(1), help="Longest piece of prefill.")
@click.option("--step-only", is_flag=True, help="Without the prefill graph.")
@common_options
def command(
    console: Console,
    model: str,
    names: tuple[str, ...],
    memory: float | None,
    bandwidth: float | None,
    dtype: str | None,
    batches: list[int],
    chunk: int,
    step_only: bool,
) -> None:
    """Memory part by part, and the tokens/s that the memory's bandwidth allows, for a bundle or a checkpoint.

    \b
    Examples:
      mamba-export plan out/tiny --device orin-nano-8gb
      mamba-export plan out/tiny --dtype int8 -b 1,8
      mamba-export plan out/tiny --memory 2 --bandwidth 12 --step-only
    """
    from mamba_export.devices import DEVICES, Device, get_device
    from mamba_export.errors import UsageError
    from mamba_export.plan import open_model, plan_memory

    if (memory is None) != (bandwidth is None):
        raise UsageError("--memory and --bandwidth go together", "like this: --memory 2 --bandwidth 12")
    devices = [get_device(name) for name in names]
    if memory is not None and bandwidth is not None:
        devices.append(Device("custom", "custom", memory * 1e9, bandwidth * 1e9, 0.0, gpu=False))
    found = open_model(model)
    own = dtype in (None, found.dtype)
    plans = [
        plan_memory(
            found.spec,
            device,
            dtype=dtype or found.dtype,
            batch=batch,
            chunk=chunk,
            step_only=step_only,
            weights=found.weights if own else None,
            step_weights=found.step_weights if own else None,
        )
        for device in devices or DEVICES.values()
        for batch in batches
    ]
    columns = [
        "device",
        "dtype",
        "batch",
        "weights",
        "packed",
        "states",
        "workspace",
        "runtime",
        "total",
        "fits",
        "tokens/s",
    ]
    rows = [
        [
            *(plan.device, plan.dtype, str(plan.batch)),
            *(size(x) for x in (plan.weights, plan.packed, plan.states, plan.workspace, plan.runtime, plan.total)),
            "yes" if plan.fits else "no",
            f"≤ {plan.tokens_per_second:,.0f}",
        ]
        for plan in plans
    ]
    console.table("", columns, rows, stdout=True)
    console.result({"model": model, "plans": [plan.to_dict() for plan in plans]})
