"""What the tools of our MCP server do where no length is asked for: small, real and offline, in the shapes that agents use.

Rules of the file:
1. The same arguments give the same text. Nothing is written, nothing is fetched, and no argument can make a call run for long.
2. The workspace is the folder of this package; web pages and databases are made from fixed seeds, when they are first needed.
3. What cannot be done is a WorkError: the tool's own error, which the agent reads.
"""

import ast
import operator
import random
import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

PAGES, WORDS_A_PAGE = 200, 400
_MOST_STEPS = 50  # of a thousand instructions each, that a statement may take
_MOST_BITS = 4_096
_LANGUAGES = {"python": ".py", "typescript": ".ts", "go": ".go", "rust": ".rs", "java": ".java", "c++": ".cpp"}
_TABLES = {
    "sales": ("orders", "id INTEGER, customer TEXT, city TEXT, amount REAL, day TEXT"),
    "inventory": ("items", "id INTEGER, name TEXT, shelf TEXT, weight REAL, arrived TEXT"),
    "support": ("tickets", "id INTEGER, subject TEXT, state TEXT, hours REAL, opened TEXT"),
}
_ROWS = 500
_SIGNS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class WorkError(Exception):
    """A tool's own error, as the agent is to read it."""


class Workshop:
    """Does the tools' work. `words` are what pages and rows are made of."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._root = Path(__file__).resolve().parent
        self._pages: list[tuple[str, str]] = []
        self._databases: dict[str, sqlite3.Connection] = {}
        self._by_name: Mapping[str, Callable[..., str]] = {
            "search": self.search,
            "fetch": self.fetch,
            "read_file": self.read_file,
            "sql_query": self.sql_query,
            "calculator": calculator,
            "code_search": self.code_search,
            "list_directory": self.list_directory,
            "get_weather": self.get_weather,
        }

    def do(self, tool: str, arguments: Mapping[str, Any]) -> str:
        """The tool's result. Raises WorkError."""
        return self._by_name[tool](**arguments)

    def search(self, query: str, max_results: int = 5, recency: str = "any") -> str:
        """The pages in which most of the query's words stand, with their first words."""
        wanted = set(re.findall(r"[a-z]+", query.lower()))
        scored = [(-len(wanted & set(text.split())), n) for n, (_, text) in enumerate(self._all_pages())]
        best = [n for _, n in sorted(scored)[:max_results]]
        shown = [f"{self._pages[n][0]}\n{_address(n)}\n{' '.join(self._pages[n][1].split()[:40])}" for n in best]
        return "\n\n".join(shown)

    def fetch(self, url: str, max_length: int = 5_000, start_index: int = 0) -> str:
        """A page's text; every URL has one."""
        number = re.search(r"/page/(\d+)$", url)
        title, text = self._all_pages()[int(number[1][-6:]) % PAGES if number else crc32(url.encode()) % PAGES]
        return f"{title}\n\n{text}"[start_index : start_index + max_length] or "nothing is left from this index on"

    def read_file(self, path: str, start_line: int = 1, line_count: int = 200) -> str:
        """Lines of a file with their numbers; a folder's listing."""
        place = self._place(path)
        if place.is_dir():
            return self.list_directory(path)
        lines = self._text(place).splitlines()[start_line - 1 : start_line - 1 + line_count]
        return (
            "\n".join(f"{n:5} {line}" for n, line in enumerate(lines, start_line)) or "the file ends before this line"
        )

    def list_directory(self, path: str, depth: int = 1) -> str:
        """Files with their sizes, and folders, down to a depth."""
        top = self._place(path)
        if not top.is_dir():
            raise WorkError(f"{path}: is a file")
        found = []
        for place in sorted(top.rglob("*")):
            inside = place.relative_to(top)
            if len(inside.parts) <= depth and "__pycache__" not in inside.parts:
                found.append(f"{inside}/" if place.is_dir() else f"{inside} {place.stat().st_size}")
        return "\n".join(found)

    def code_search(self, pattern: str, path: str = ".", language: str = "any", context_lines: int = 2) -> str:
        """The first matches, with their surroundings."""
        if re.search(r"\)\s*[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
            raise WorkError(
                "the pattern may not repeat a group, nor repeat more than three times: it could take for ever"
            )
        try:
            expression = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise WorkError(f"not a regular expression: {error}") from None
        top, found = self._place(path), list[str]()
        ending = _LANGUAGES.get(language, "")
        for place in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if not place.is_file() or not place.name.endswith(ending) or "__pycache__" in place.parts:
                continue
            lines = self._text(place).splitlines()
            for n, line in enumerate(lines):
                if expression.search(line[:200]):
                    around = lines[max(0, n - context_lines) : n + context_lines + 1]
                    found.append("\n".join([f"{place.relative_to(self._root)}:{n + 1}", *around]))
                    if len(found) >= 20:
                        return "\n--\n".join(found)
        return "\n--\n".join(found) or "no match"

    def sql_query(self, database: str, statement: str, row_limit: int = 50) -> str:
        """The rows, a line each, under the columns' names."""
        steps = 0

        def stop() -> bool:
            nonlocal steps
            steps += 1
            return steps > _MOST_STEPS

        connection = self._database(database)
        connection.set_progress_handler(stop, 1_000)
        try:
            cursor = connection.execute(statement)
            rows = cursor.fetchmany(row_limit)
        except (sqlite3.Error, sqlite3.Warning, OverflowError, ValueError) as error:
            raise WorkError(f"{type(error).__name__}: {error}") from None
        names = [column[0] for column in cursor.description or ()]
        return "\n".join(" | ".join(map(str, row)) for row in [names, *rows])

    def get_weather(self, city: str, days: int = 3, units: str = "metric") -> str:
        """A forecast that the city's name decides."""
        rng = random.Random(f"weather {city.lower()}")
        lines = []
        for day in range(1, days + 1):
            degrees, rain = rng.gauss(14, 8), rng.randint(0, 100)
            shown = f"{degrees:.0f} C" if units == "metric" else f"{degrees * 1.8 + 32:.0f} F"
            lines.append(f"day {day}: {shown}, rain {rain} %")
        return "\n".join([city, *lines])

    def _all_pages(self) -> Sequence[tuple[str, str]]:
        if not self._pages:
            rng = random.Random("pages")
            for _ in range(PAGES):
                title = " ".join(rng.choices(self._words, k=5)).capitalize()
                self._pages.append((title, " ".join(rng.choices(self._words, k=WORDS_A_PAGE))))
        return self._pages

    def _place(self, path: str) -> Path:
        try:
            place = (self._root / path).resolve()
            inside = place.is_relative_to(self._root) and place.exists()
        except (OSError, ValueError):
            inside = False
        if not inside:
            raise WorkError(f"{path}: there is no such file or folder in the workspace")
        return place

    def _text(self, place: Path) -> str:
        return place.read_text(errors="replace")

    def _database(self, name: str) -> sqlite3.Connection:
        """A database in memory, which can be read only."""
        found = self._databases.get(name)
        if found is not None:
            return found
        table, columns = _TABLES[name]
        connection, rng = sqlite3.connect(":memory:"), random.Random(f"database {name}")
        connection.execute(f"CREATE TABLE {table} ({columns})")
        rows = [
            (n, " ".join(rng.choices(self._words, k=2)), rng.choice(self._words), round(rng.uniform(1, 999), 2),
             f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}")
            for n in range(1, _ROWS + 1)
        ]  # fmt: skip
        connection.executemany(f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?)", rows)
        connection.commit()
        connection.set_authorizer(_reads_only)
        self._databases[name] = connection
        return connection


def _reads_only(action: int, first: str | None, second: str | None, *_: object) -> int:
    allowed = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE)
    large = second in ("randomblob", "zeroblob", "load_extension", "printf", "format", "hex", "replace")
    return (
        sqlite3.SQLITE_OK
        if action in allowed or (action == sqlite3.SQLITE_FUNCTION and not large)
        else sqlite3.SQLITE_DENY
    )


def _address(number: int) -> str:
    return f"https://example.com/page/{number}"


def calculator(expression: str, precision: int = 6) -> str:
    """The expression's value: numbers, + - * / // % ** and brackets."""
    try:
        value = _value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise WorkError(f"not an arithmetic expression: {expression}") from None
    except (ZeroDivisionError, OverflowError) as error:
        raise WorkError(str(error)) from None
    return str(value) if isinstance(value, int) else f"{value:.{precision}f}"


def _value(node: ast.AST) -> float:
    match node:
        case ast.Constant(int() | float() as number) if not isinstance(number, bool):
            found: float = number
        case ast.BinOp(left, ast.Pow(), right):
            base, power = _value(left), _value(right)
            if isinstance(base, int) and abs(power) * max(1, base.bit_length()) > _MOST_BITS:
                raise OverflowError("the number would be too large")
            raised = base**power
            if isinstance(raised, complex):
                raise WorkError("the root of a negative number")
            found = raised
        case ast.BinOp(left, sign, right) if type(sign) in _SIGNS:
            found = _SIGNS[type(sign)](_value(left), _value(right))
        case ast.UnaryOp(sign, operand) if type(sign) in _SIGNS:
            found = _SIGNS[type(sign)](_value(operand))
        case _:
            raise ValueError(ast.dump(node))
    if isinstance(found, int) and found.bit_length() > _MOST_BITS:
        raise OverflowError("the number would be too large")
    return found
