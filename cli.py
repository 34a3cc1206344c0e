"""`python cli.py onnx …` from a checkout, installed or not: the rooms at the root become part of the package."""

from pathlib import Path

import mamba_export

mamba_export.__path__.append(str(Path(__file__).resolve().parent))

from mamba_export.main import main  # noqa: E402

if __name__ == "__main__":
    main()
