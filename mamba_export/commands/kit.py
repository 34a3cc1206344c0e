"""mamba-export kit"""

from __future__ import annotations

from dataclasses import asdict

import click

from mamba_export.commands.console import Console, common_options, size


@click.command("kit", short_help="Collect all that a device needs in a folder.")
@click.argument("bundle", type=click.Path())
@click.option("--device", required=True, help="Of the device table, or its beginning: orin-nano, agx-orin, thor.")
@click.option("-o", "--out", type=click.Path(), help="Folder of the kit. Default: BUNDLE-kit-DEVICE.")
@click.option("--profile", "seq", help="Prompt length of the engines: min,opt,max. Default: by the device's memory.")
@click.option(
    "--single-engine/--two-engines",
    "single_engine",
    default=None,
    help="One engine with two profiles holds the weights once. Default: on devices with less than 16 GB.",
)
@click.option("--force", is_flag=True, help="Replace an existing kit.")
@common_options
def command(
    console: Console,
    bundle: str,
    device: str,
    out: str | None,
    seq: str | None,
    single_engine: bool | None,
    force: bool,
) -> None:
    """Collect graphs, plugin sources, a C++ program, a build script and a README for a device.

    On the device ./build.sh builds plugin library, engines and program; neither Python nor this package is needed
    there.

    \b
    Examples:
      mamba-export kit out/tiny --device orin-nano
      mamba-export kit out/tiny --device thor -o thor-kit --profile 1,512,4096
    """
    from mamba_export.bundle import Bundle
    from mamba_export.engine import Range
    from mamba_export.engine.kit import make_kit

    out = out or f"{bundle.rstrip('/')}-kit-{device}"
    lengths = None if seq is None else Range.parse(seq)
    opened = Bundle(bundle)
    kit = make_kit(opened, device, out, seq=lengths, single_engine=single_engine, force=force, progress=console)
    plan = kit.plan
    total, available = (size(value) for value in (plan["total"], plan["available"]))
    fits = "fits" if plan["fits"] else "does NOT fit"
    console.line(
        "device",
        f"{kit.device} · {kit.arch} · {total} of {available}: {fits} · ≤ {plan['tokens_per_second']:,.0f} tokens/s",
    )
    engines = "one engine, two profiles" if kit.single_engine else "two engines"
    console.line("engines", f"{engines} · prompts of {','.join(map(str, kit.seq))} · {len(kit.engines)} built already")
    console.line("wrote", f"{kit.path} ({size(kit.bytes)}) · next: copy it to the device, then ./build.sh")
    console.result(asdict(kit))
