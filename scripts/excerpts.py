"""Excerpts of a text, evenly spread over it: calibration text that is of many sources.

python scripts/excerpts.py train.txt.gz --pieces 72 --bytes 1500 > src/usmoe/models/novelist/calibration.txt

A threshold that is found on three novels spends 1.3 % more or less on three others; on pieces of all of them, 0.2 %
(LOG.md). Each piece begins and ends with a line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from usmoe.data.text import FilePart


def excerpts(text: str, pieces: int, size: int) -> list[str]:
    """`pieces` runs of whole lines, each of at least `size` bytes, beginning at even distances."""
    found = []
    for piece in range(pieces):
        start = text.index("\n", len(text) * piece // pieces) + 1
        end = start
        while end < len(text) and len(text[start:end].encode()) < size:
            end = text.find("\n", end + 1)
            end = len(text) if end < 0 else end
        found.append(text[start:end].strip())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file, plain or .gz")
    parser.add_argument("--pieces", type=int, default=72)
    parser.add_argument("--bytes", type=int, default=1500, help="of a piece, at least")
    args = parser.parse_args()
    sys.stdout.write(
        "\n\n".join(excerpts(b"".join(FilePart(args.text).blocks()).decode(), args.pieces, args.bytes)) + "\n"
    )


if __name__ == "__main__":
    main()
