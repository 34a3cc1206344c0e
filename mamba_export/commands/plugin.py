"""mamba-export plugin"""

from __future__ import annotations

from dataclasses import asdict

import click

from mamba_export.commands.console import Console, common_options


@click.group("plugin", short_help="The TensorRT plugin library.")
def command() -> None:
    """The TensorRT plugin library: the custom ops of the graphs, in CUDA."""


@command.command("build")
@click.option("--arch", multiple=True, help="GPU architecture: sm_87 (Orin), sm_110 (Thor), sm_120; repeatable.")
@click.option("--tensorrt-root", type=click.Path(), help="Folder of TensorRT's headers; found when left out.")
@click.option("--jobs", type=click.IntRange(min=1), help="Compilations at a time; one a processor when left out.")
@click.option("--force", is_flag=True, help="Build even if the same library is in the cache.")
@common_options
def build(console: Console, arch: tuple[str, ...], tensorrt_root: str | None, jobs: int | None, force: bool) -> None:
    """Build the library from the sources in this package, and print its path.

    \b
    Examples:
      mamba-export plugin build                                   for the GPU of this machine
      mamba-export plugin build --arch sm_87 --arch sm_110
      mamba-export plugin build --arch sm_86 --tensorrt-root ~/TensorRT
    """
    from mamba_export.engine import build_plugin

    library = build_plugin(arch, tensorrt_root=tensorrt_root, jobs=jobs, force=force, progress=console)
    made = "in the cache" if library.cached else f"built in {console.elapsed:.0f} s"
    facts = f"{' '.join(library.archs)} · TensorRT {library.tensorrt} headers · CUDA {library.cuda} · {made}"
    console.line("plugin", facts)
    console.line("static", f"{library.static_path} · registers itself when loaded (polygraphy --plugins)")
    if not console.as_json:
        print(library.path)
    console.result(asdict(library))
