"""What a record and the settings of a comparison must hold for tables, figures and findings to be made of them.

Each check returns what is wrong, in words, or None.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mogb.problems import registered_problems

Check = Callable[[Any], bool]
Rule = tuple[Check, str]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


COUNT: Rule = (lambda value: _whole(value) and value >= 1, "a whole number of at least 1")
TOTAL: Rule = (lambda value: _whole(value) and value >= 0, "a whole number of at least 0")
TEXT: Rule = (lambda value: isinstance(value, str), "a text")
FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
NUMBER: Rule = (_number, "a number")
MAYBE: Rule = (_optional(_number), "a number or null")
NAMES: Rule = (lambda value: _list_of(TEXT[0])(value) and bool(value), "a list of names")
SERIES: Rule = (_optional(_list_of(_optional(_number))), "a list of numbers or null")
EACH: Rule = (_list_of(_number), "a list of numbers")
LIST: Rule = (_optional(lambda value: isinstance(value, list)), "a list or null")
TABLE: Rule = (lambda value: isinstance(value, dict), "an object")

SETTINGS_RULES: dict[str, Rule] = {
    "methods": NAMES, "problems": NAMES, "seeds": COUNT, "quick": FLAG, "mogb": TEXT,
    "steps": (_optional(COUNT[0]), "a whole number of at least 1 or null"),
}  # fmt: skip
HEADER: dict[str, Rule] = {
    "key": TEXT, "method": TEXT, "problem": TEXT, "seed": TOTAL, "steps": COUNT, "starts": COUNT, "optimizer": TEXT,
    "lr": NUMBER, "wall_seconds": MAYBE, "versions": TABLE,
    "status": (lambda value: value in ("ok", "failed"), "'ok' or 'failed'"),
}  # fmt: skip
FAILED: dict[str, Rule] = {"error": TEXT}
FINISHED: dict[str, Rule] = {
    "error": (lambda value: value is None, "null"),
    "distance": (_optional(EACH[0]), "a list of numbers or null"),
    "stationarity": EACH, "igd_plus": MAYBE, "hypervolume_ratio": MAYBE, "steps_to_tolerance": SERIES,
    "conflict_rate": SERIES, "cosine_min": SERIES, "cosine_mean": SERIES, "cosine_variance": SERIES,
    "cosine_worst": SERIES, "weights_over_time": LIST, "ends": LIST,
    "trajectory": (_optional(TABLE[0]), "an object or null"),
    "unconverged": TOTAL, "max_residual": NUMBER,
    "left_out": (lambda value: TABLE[0](value) and all(map(_whole, value.values())), "an object of counts"),
}  # fmt: skip
PER_START = ("distance", "stationarity")


def wrong_record(record: Any) -> str | None:
    """Why this is no record of a run."""
    if not isinstance(record, dict):
        return "it is no record of a run"
    wrong = _wrong(record, HEADER) or _wrong(record, FINISHED if record["status"] == "ok" else FAILED)
    if wrong or record["status"] != "ok":
        return wrong
    lengths = ((name, record[name]) for name in PER_START)
    return next(
        (f"{name!r} does not have one number per start" for name, values in lengths
         if values is not None and len(values) != record["starts"]), None,
    )  # fmt: skip


def wrong_settings(settings: Any) -> str | None:
    """Why these are no settings of a comparison that can be reported."""
    if not isinstance(settings, dict):
        return "it is no object"
    if wrong := _wrong(settings, SETTINGS_RULES):
        return wrong
    unknown = [name for name in settings["problems"] if name not in registered_problems()]
    return f"'problems' names the unknown {unknown[0]!r}" if unknown else None


def _wrong(found: Mapping[str, Any], rules: Mapping[str, Rule]) -> str | None:
    for name, (holds, what) in rules.items():
        if name not in found:
            return f"it has no {name!r}"
        if not holds(found[name]):
            return f"{name!r} is not {what}"
    return None
