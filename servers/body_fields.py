"""Typed reading of a JSON body, with the messages of a lenient validator: what vLLM's front end answers to a wrong type."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


class ApiError(Exception):
    """A refusal: HTTP status, message, error type and the parameter that is to blame (or None)."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param = status, message, kind, param

    def body(self) -> dict[str, Any]:
        """The JSON body of the reply."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}}


def bad_value(message: str, param: str | None = None) -> ApiError:
    """A 400 for a value of the right type that cannot be."""
    return ApiError(400, message, "BadRequestError", param)


class Fields:
    """Reads fields of one body leniently (a number may be a text of digits, as JSON clients send it) and gathers the faults.

    A field that is absent or null reads as None (flags: False; lists: empty). `settle` raises one ApiError for all faults.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body
        self._faults: list[dict[str, Any]] = []

    @staticmethod
    def refused(faults: Sequence[Mapping[str, Any]]) -> ApiError:
        """The 400 that lists faults (type, loc, msg, input, and ctx where there is one); `param` is the first one's place."""
        lines = [repr({**fault, "input": _shown(fault["input"])}) for fault in faults]
        count = f"{len(lines)} validation error{'s' if len(lines) > 1 else ''}:"
        return ApiError(400, "\n  ".join([count, *lines]), "Bad Request", str(faults[0]["loc"]))

    def settle(self) -> None:
        if self._faults:
            raise self.refused(self._faults)

    def _fault(self, name: str, kind: str, message: str, given: Any) -> None:
        self._faults.append({"type": kind, "loc": f"body.{name}", "msg": message, "input": given})

    def present(self, name: str) -> Any:
        if self._body.get(name) is None:
            self._fault(name, "missing", "Field required", self._body)
        return self._body.get(name)

    def integer(self, name: str) -> int | None:
        given = self._body.get(name)
        if given is None or type(given) is int:
            return given
        if isinstance(given, bool):
            return int(given)
        if isinstance(given, str):
            try:
                return int(given)
            except ValueError:
                why = "Input should be a valid integer, unable to parse string as an integer"
                self._fault(name, "int_parsing", why, given)
                return None
        if isinstance(given, float):
            if given.is_integer():
                return int(given)
            why = "Input should be a valid integer, got a number with a fractional part"
            self._fault(name, "int_from_float", why, given)
            return None
        self._fault(name, "int_type", "Input should be a valid integer", given)
        return None

    def number(self, name: str) -> float | None:
        given = self._body.get(name)
        if given is None:
            return None
        if isinstance(given, (int, float)):
            return float(given)
        if isinstance(given, str):
            try:
                value = float(given)
                if math.isfinite(value):
                    return value
            except ValueError:
                pass
            why = "Input should be a valid number, unable to parse string as a number"
            self._fault(name, "float_parsing", why, given)
            return None
        self._fault(name, "float_type", "Input should be a valid number", given)
        return None

    def flag(self, name: str) -> bool:
        given = self._body.get(name)
        if given is None:
            return False
        if isinstance(given, bool):
            return given
        if given in (0, 1) or str(given).lower() in ("true", "false"):
            return given == 1 or str(given).lower() == "true"
        kind = "bool_parsing" if isinstance(given, (str, int)) else "bool_type"
        tail = ", unable to interpret input" if kind == "bool_parsing" else ""
        self._fault(name, kind, f"Input should be a valid boolean{tail}", given)
        return False

    def text(self, name: str) -> str | None:
        given = self._body.get(name)
        if given is None or isinstance(given, str):
            return given
        self._fault(name, "string_type", "Input should be a valid string", given)
        return None

    def texts(self, name: str) -> list[str]:
        """A text or a list of texts."""
        given = self._body.get(name)
        if given is None:
            return []
        if isinstance(given, str):
            return [given]
        if isinstance(given, list) and all(isinstance(text, str) for text in given):
            return given
        self._fault(name, "string_type", "Input should be a valid string", given)
        return []

    def ints(self, name: str) -> list[int]:
        given = self._body.get(name)
        if given is None:
            return []
        if isinstance(given, list) and all(type(number) is int for number in given):
            return given
        self._fault(name, "list_type", "Input should be a valid list", given)
        return []

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        given = self._body.get(name)
        if given is None or isinstance(given, dict):
            return given
        self._fault(name, "dict_type", "Input should be a valid dictionary", given)
        return None

    def objects(self, name: str, *, required: bool = False) -> list[Mapping[str, Any]]:
        given = self.present(name) if required else self._body.get(name)
        if given is None:
            return []
        if isinstance(given, list) and all(isinstance(item, dict) for item in given):
            return given
        kind, why = "list_type", "Input should be a valid list"
        if isinstance(given, list):
            kind, why = "dict_type", "Input should be a valid dictionary"
        self._fault(name, kind, why, given)
        return []


def extra_int(body: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number under `vllm_xargs`, which is free for what the server makes of it."""
    extra = body.get("vllm_xargs")
    given = extra.get(name, default) if isinstance(extra, dict) else default
    if type(given) is not int or given < 0:
        raise bad_value(
            f"vllm_xargs.{name} must be an integer >= 0, got {given!r}. (parameter=vllm_xargs)", "vllm_xargs"
        )
    return given


def _shown(given: Any) -> Any:
    """What a fault shows of its input: containers by their size only."""
    if isinstance(given, (dict, list)):
        return f"<{type(given).__name__} of {len(given)} items>"
    return given
