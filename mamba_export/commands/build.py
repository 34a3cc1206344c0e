"""mamba-export build"""

from __future__ import annotations

from pathlib import Path

import click

from mamba_export.commands.console import Console, common_options, size


@click.command("build", short_help="Build TensorRT engines of a bundle.")
@click.argument("bundle", type=click.Path())
@click.option("--runtime", type=click.Choice(["tensorrt", "tensorrt-rtx"]), default="tensorrt", show_default=True)
@click.option("--sm", multiple=True, help="TensorRT-RTX: GPUs to build for, none needed here: 86, 89, 120; repeatable.")
@click.option(
    "--plugin", type=click.Path(), help="Plugin library (mamba-export plugin build). Default: function bodies."
)
@click.option("--profile", "seq", default="1,512,2048", show_default=True, help="Prompt length: min,opt,max.")
@click.option("--batch", default="1,1,4", show_default=True, help="Rows: min,opt,max.")
@click.option(
    "--single-engine/--two-engines",
    "single_engine",
    default=None,
    help="One engine with two profiles holds the weights once. Default: on GPUs with less than 16 GB.",
)
@click.option("--workspace", type=click.IntRange(min=1), help="MB of scratch memory a layer may use.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="TensorRT's; higher builds longer.")
@click.option("--timing-cache", type=click.Path(dir_okay=False), help="File of measurements kept between builds.")
@click.option("--force", is_flag=True, help="Replace engines of the same name.")
@common_options
def command(
    console: Console,
    bundle: str,
    runtime: str,
    sm: tuple[str, ...],
    plugin: str | None,
    seq: str,
    batch: str,
    single_engine: bool | None,
    workspace: int | None,
    optimization_level: int | None,
    timing_cache: str | None,
    force: bool,
) -> None:
    """Build engines for prefill and step into BUNDLE/engines.

    \b
    Examples:
      mamba-export build out/tiny --plugin libmamba_plugins.so
      mamba-export build out/tiny --runtime tensorrt-rtx --sm 86 --sm 120
      mamba-export build out/tiny --single-engine --profile 1,256,1024 --batch 1
    """
    from mamba_export.bundle import Bundle
    from mamba_export.engine import BuildOptions, Range, build_engines
    from mamba_export.errors import UsageError

    if plugin is not None and not Path(plugin).is_file():
        raise UsageError(f"no such plugin library: {plugin}", "make one with: mamba-export plugin build")
    options = BuildOptions(
        runtime=runtime,  # type: ignore[arg-type]
        sm=sm,
        plugin=None if plugin is None else Path(plugin),
        batch=Range.parse(batch),
        seq=Range.parse(seq),
        single_engine=single_engine,
        workspace=None if workspace is None else workspace << 20,
        optimization_level=optimization_level,
        timing_cache=None if timing_cache is None else Path(timing_cache),
    )
    result = build_engines(Bundle(bundle), options, force=force, progress=console)
    for entry in result.engines:
        plugins = entry["layers"].get("PLUGIN_V3", 0)
        layers = f"{sum(entry['layers'].values())} layers" + (
            f", {plugins} plugins" if plugins else ", function bodies"
        )
        gpus = ", ".join(f"sm_{number}" for number in entry["compute_capabilities"])
        console.line(entry["kind"], f"{layers} · {gpus} · {entry['runtime']} {entry['version']} · {entry['seconds']} s")
        console.line("wrote", f"{Path(bundle) / entry['file']} ({size(entry['bytes'])})")
    console.result({"bundle": bundle, "engines": result.engines, "warnings": result.warnings})
