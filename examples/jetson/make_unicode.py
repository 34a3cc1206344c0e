"""Writes unicode.inl: the ranges of code points that are letters (\\p{L}) and numbers (\\p{N})."""

import sys
import unicodedata
from pathlib import Path


def ranges(major: str) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for point in range(sys.maxunicode + 1):
        if unicodedata.category(chr(point))[0] == major:
            if found and found[-1][1] == point - 1:
                found[-1] = (found[-1][0], point)
            else:
                found.append((point, point))
    return found


def main() -> None:
    lines = [
        f"// Made by make_unicode.py from Unicode {unicodedata.unidata_version}. Pairs of first and last code point."
    ]
    for name, major in (("kLetters", "L"), ("kNumbers", "N")):
        lines.append(f"constexpr char32_t {name}[] = {{")
        row = "   "
        for first, last in ranges(major):
            item = f" 0x{first:X},0x{last:X},"
            if len(row) + len(item) > 118:
                lines.append(row)
                row = "   "
            row += item
        lines += [row, "};"]
    Path(__file__).with_name("unicode.inl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
