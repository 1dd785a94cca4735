"""Sizes as people write them."""

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "2G", "1073741824". Raises ValueError."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:] in UNITS and number[-1:] else ""
    try:
        size = int(float(number.removesuffix(unit)) * UNITS[unit])
    except ValueError as error:
        raise ValueError(f"{text!r} is not a size; write e.g. 512MiB or 2GiB") from error
    if size <= 0:
        raise ValueError(f"{text!r} is not a size above zero")
    return size
