"""Large numbers and durations as people read them."""

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def short_count(count: float) -> str:
    """1.5T, 350B, 114.7k: four significant digits at most."""
    size, unit = next(((size, unit) for size, unit in _UNITS if count >= size), (1, ""))
    return f"{count / size:.4g}{unit}"


def duration(seconds: float) -> str:
    """In the two largest units: 3 d 4 h, 12 min 5 s."""
    parts: list[str] = []
    left = round(seconds)
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
