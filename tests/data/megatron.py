"""An independent reader of Megatron's .bin/.idx pairs."""

import struct
from pathlib import Path


def read_mmididx(prefix: Path) -> list[list[int]]:
    """Documents of a .bin/.idx pair, read with nothing but struct and the layout that Megatron-LM documents."""
    index, tokens = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code = struct.unpack_from("<QB", index, 9)
    assert version == 1
    kind, size = {4: ("i", 4), 8: ("H", 2)}[code]
    sequences, borders = struct.unpack_from("<QQ", index, 18)
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    document_index = struct.unpack_from(f"<{borders}q", index, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * borders
    pieces = [
        list(struct.unpack_from(f"<{length}{kind}", tokens, pointer))
        for length, pointer in zip(lengths, pointers, strict=True)
    ]
    assert size * sum(lengths) == len(tokens)
    return [sum(pieces[a:b], []) for a, b in zip(document_index, document_index[1:], strict=False)]
