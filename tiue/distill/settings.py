"""Settings from YAML: shipped recipes, files, overrides; and back into a file beside the run."""

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any

from tiue.distill.config import DistillConfig
from tiue.errors import InputError

RECIPES = Path(__file__).parent / "recipes"
FIELDS = {field.name: field for field in dataclasses.fields(DistillConfig)}

CONFIG = "config.yaml"

# What may differ between a checkpoint and the run that goes on from it without being asked for:
# where and how often things are written, how long the run is, what memory and speed are traded for,
# what is watched, and what `RunState` compares by content (teacher, prompts, pictures, samples of
# an update). The student to start from is in the checkpoint. Everything else decides what the
# weights become.
MAY_CHANGE = frozenset({
    "output", "steps", "resume", "allow_change", "checkpoint_every", "keep_checkpoints",
    "log_every", "trackers", "sample_every", "validation_prompts", "save_pipeline",
    "verify_embeddings", "cpu", "embedding_cache_mib", "prompts", "prompt_column", "embeddings",
    "batch_size", "gradient_accumulation_steps", "teacher", "student", "divergence_factor",
    "mixed_precision", "ema_on_cpu", "push_to_hub", "gradient_checkpointing",
    "recompute_feed_forward", "deterministic", "evaluate_every", "evaluate_metric",
    "evaluate_preset", "evaluate_prompts", "evaluate_reference", "evaluate_count",
    "gan_pictures", "compile",
})  # fmt: skip


def list_recipes() -> list[str]:
    """List the names of the recipes in this package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(source: str | Path | None = None, **overrides: Any) -> DistillConfig:
    """Read a run's settings.

    Args:
        source: A YAML file, or the name of a shipped recipe (`list_recipes`); None for the
            defaults.
        **overrides: Fields of `DistillConfig` that take precedence.

    Returns:
        The settings.

    Raises:
        InputError: If the file cannot be read, or a key or value cannot be; an unknown key is
            answered with the nearest right one.
    """
    settings = {} if source is None else read_settings(find_recipe(source))
    for given, other in (("prompts", "embeddings"), ("embeddings", "prompts")):
        if overrides.get(given) is not None:
            settings.pop(other, None)  # one takes the place of the other
    settings |= overrides
    values = {name: _typed(name, value) for name, value in settings.items()}
    missing = [
        name
        for name, field in FIELDS.items()
        if field.default is dataclasses.MISSING and name not in values
    ]
    if missing:
        raise InputError(
            f"No {' and no '.join(missing)} given: set it in the YAML file or as option."
        )
    return DistillConfig(**values)


def find_recipe(source: str | Path) -> Path:
    """Find the YAML file that a path or the name of a shipped recipe stands for.

    Raises:
        InputError: If it is neither.
    """
    path = Path(source)
    if path.is_file():
        return path
    shipped = RECIPES / f"{source}.yaml"
    if shipped.is_file():
        return shipped
    nearest = _nearest(str(source), list_recipes())
    raise InputError(
        f"There is no file and no recipe '{source}'{nearest}. Recipes: {', '.join(list_recipes())}."
    )


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings as it stands.

    Args:
        path: The file: one mapping, whose keys are fields of `DistillConfig`.

    Returns:
        Keys and values.

    Raises:
        InputError: If it cannot be read, is no mapping, or names a key twice or an unknown one.
    """
    import yaml

    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"Cannot read the settings in '{path}' ({error}).") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise InputError(f"'{path}' must be a mapping, one `name: value` a line.")
    keys = [str(key.value) for key, _ in node.value]
    for key in keys:
        check_key(key, f"in '{path}'")
        if keys.count(key) > 1:
            raise InputError(f"'{path}' sets {key} twice; keep one of the lines.")
    return settings


def check_key(key: str, where: str = "") -> None:
    """See that a setting exists.

    Raises:
        InputError: If not, with the nearest name.
    """
    if key not in FIELDS:
        raise InputError(
            f"There is no setting '{key}' {where}".rstrip() + f"{_nearest(key, list(FIELDS))}. "
            "`tiue distill --help` lists all."
        )


def write_config(config: DistillConfig, path: Path) -> None:
    """Write resolved settings to a YAML file, every field named, that `load_config` reads.

    Args:
        config: The settings.
        path: The file.

    Raises:
        OSError: If it cannot be written.
    """
    import yaml

    # What was allowed once is not allowed to whoever starts from this file.
    plain = to_plain(dataclasses.replace(config, allow_change=()))
    path.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")


def to_plain(config: DistillConfig) -> dict[str, Any]:
    """Settings as what YAML and JSON can hold: paths as text, tuples as lists."""
    plain = {}
    for name in FIELDS:
        value = getattr(config, name)
        value = str(value) if isinstance(value, Path) else value
        plain[name] = list(value) if isinstance(value, tuple) else value
    return plain


def changed_fields(config: DistillConfig, saved: DistillConfig) -> dict[str, list[Any]]:
    """Settings that make another run of it, of those that two configs do not share.

    Args:
        config: The settings of now.
        saved: Those of the checkpoint.

    Returns:
        What each was and is, as plain values, by name.
    """
    before, now = to_plain(saved), to_plain(config)
    return {
        name: [before[name], now[name]]
        for name in FIELDS
        if name not in MAY_CHANGE and before[name] != now[name]
    }


def _typed(name: str, value: Any) -> Any:
    """Read a value as its field's type: YAML gives `1e-6` as text and `no` as False."""
    from pydantic import TypeAdapter, ValidationError

    check_key(name)
    hint = typing.get_type_hints(DistillConfig)[name]
    if value is False and "no" in typing.get_args(hint):
        value = "no"
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise InputError(f"{name} cannot be {value!r}: {reason[0].lower()}{reason[1:]}.") from error


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
