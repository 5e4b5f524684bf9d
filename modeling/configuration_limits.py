"""Limits of the numbers in a configuration, so that a damaged config.json is an error before anything is allocated."""

from collections.abc import Iterator, Mapping

from transformers import PreTrainedConfig

MOST = 1 << 15  # channels, positions, queries
MOST_LAYERS = 512
MOST_WORDS = 1 << 21  # of a vocabulary


def check_fields(config: PreTrainedConfig) -> None:
    """Check the types of a configuration's own fields, and every number that a network's size depends on.

    Raises:
        ValueError: for a field of another type, or a number outside the limits of its field.
    """
    owner = type(config).__name__
    for name, kind in type(config).__annotations__.items():
        value = getattr(config, name)
        is_list, wants_integers = "list[" in str(kind), "int" in str(kind)
        items = value if isinstance(value, list | tuple) else [value]
        if (
            (is_list and items is not value)
            or (wants_integers and not all(type(item) is int for item in items))
            or (name.endswith("_config") and not isinstance(value, dict | PreTrainedConfig | None))
        ):
            raise ValueError(f"{name}={value!r} in {owner}: give {getattr(kind, '__name__', kind)}")
    for name, value in _sizes(vars(config)):
        most = MOST_LAYERS if "layers" in name or name == "depths" else MOST_WORDS if name == "vocab_size" else MOST
        least = -1 if name == "max_relative_positions" else int(name.endswith(("heads", "groups")))
        if not least <= value <= most:
            raise ValueError(f"{name}={value} in {owner}: choose {least} to {most}")


def _sizes(fields: Mapping[str, object]) -> Iterator[tuple[str, int | float]]:
    """Names and values of the integers and of the ratios that sizes are multiplied by.

    Ids of tokens and labels, and indices, are no sizes.
    """
    for name, value in fields.items():
        if name.endswith("_config") and isinstance(value, dict | PreTrainedConfig):
            yield from _sizes(value if isinstance(value, dict) else vars(value))
        elif not name.startswith("_") and not name.endswith(("_id", "_index", "_indices")):
            kinds = int | float if "ratio" in name or "multiplier" in name else int
            items = value if isinstance(value, list | tuple) else [value]
            yield from ((name, item) for item in items if isinstance(item, kinds))
