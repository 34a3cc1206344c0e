"""(d) The same run as cpu_decode.py with two contenders: the bundle and optimum-intel's OpenVINO export.

python benchmarks/against_openvino.py [--cache FOLDER]
"""

from __future__ import annotations

import cpu_decode

if __name__ == "__main__":
    cpu_decode.main(("mamba-export", "openvino"))
