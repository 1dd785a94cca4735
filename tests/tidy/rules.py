"""The tidy rules: what ruff, pyright and import-linter cannot say. Each yields what breaks it in one file."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from tests.tidy import sets
from tests.tidy.source import Finding, Source

Rule = Callable[[Source], Iterator[Finding]]

CLOCK = "take `now_ns` as an argument"
DRAW = "draw from the `Rng` port by a key"
LOCAL = "take it as configuration: only a shell touches the machine"
TASKS = "return a command, and let the shell wait"
WIRE = "return a `Send`: the shell owns the wire"
TENSORS = "name blocks and tokens: the executor owns the tensors"

BANNED_IN_CORES = {
    "asyncio": TASKS,
    "concurrent": TASKS,
    "datetime": CLOCK,
    "logging": "report it in `observe`, or return it as a reason",
    "multiprocessing": TASKS,
    "numpy.random": DRAW,
    "os": LOCAL,
    "pathlib": LOCAL,
    "random": DRAW,
    "secrets": DRAW,
    "socket": WIRE,
    "subprocess": LOCAL,
    "sys": LOCAL,
    "threading": TASKS,
    "time": CLOCK,
    "torch": TENSORS,
    "uuid": "count: an id comes from whoever owns its number range",
    "zmq": WIRE,
}

BUILTINS_BANNED_IN_CORES = {
    "globals": "give it a name and an owner",
    "hash": "use `types.hashing`, or compare fields: `hash` changes from process to process",
    "id": "use an id of `types.ids`: `id` is a memory address",
    "input": LOCAL,
    "open": LOCAL,
    "print": "report it in `observe`, or return it as a reason",
}

MUTABLE = frozenset(
    {"Counter", "OrderedDict", "bytearray", "count", "defaultdict", "deque", "dict", "list", "set"}
)
READ_ONLY = frozenset({"Collection", "Mapping", "Sequence", "AbstractSet"})

FILE_LINES_MAX, FUNCTION_LINES_MAX = 500, 70
TEST_FILE_LINES_MAX, TEST_FUNCTION_LINES_MAX = 600, 100

BANNED_WORDS = frozenset({"base", "helper", "helpers", "impl", "manager", "util", "utils"})
WORD = re.compile(r"[Vv]\d+|[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
MARKER = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])/(?:farm|home|opt|root|tmp|work|Users)/\w")
SIMULATED = re.compile(r"^_?(?:is_|in_)?(?:simulat(?:ed|ing|ion)|sim|live)$")


def banned_in_cores(source: Source) -> Iterator[Finding]:
    """Nothing below the shells reads a clock, draws a number, waits, or depends on a memory address."""
    if not source.core:
        return
    aliases: dict[str, str] = {}
    for node in ast.walk(source.tree):
        for name, target in _imported(node):
            aliases[name] = target
            for banned, instead in BANNED_IN_CORES.items():
                if target == banned or target.startswith(f"{banned}."):
                    yield source.at(node, f"`{target}`: {instead}")
    for node in ast.walk(source.tree):
        match node:
            case ast.Attribute(ast.Name(value), attr):
                name = f"{aliases.get(value)}.{attr}"
                if name in BANNED_IN_CORES:
                    yield source.at(node, f"`{name}`: {BANNED_IN_CORES[name]}")
            case ast.Call(func=ast.Name(name)) | ast.keyword("key", ast.Name(name)):
                if name in BUILTINS_BANNED_IN_CORES and name not in aliases:
                    yield source.at(node, f"`{name}`: {BUILTINS_BANNED_IN_CORES[name]}")
            case _:
                pass


def set_order(source: Source) -> Iterator[Finding]:
    """No decision follows the order of a set, which hashes make."""
    if source.core:
        for node in sets.iterations(source.tree):
            yield source.at(
                node, f"`{ast.unparse(node)}` is a set: iterate `sorted(...)` of it, or keep a dict"
            )


def function_imports(source: Source) -> Iterator[Finding]:
    """Cores import at the top, so that the graph of modules is what it seems."""
    if not source.core:
        return
    for function in _functions(source.tree):
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield source.at(node, "import at the top of the file: only wiring loads late")


def module_state(source: Source) -> Iterator[Finding]:
    """A core's state has an owner: a module holds constants only."""
    if not source.core:
        return
    for node in source.tree.body:
        match node:
            case ast.AnnAssign(ast.Name(name), annotation, ast.expr() as value):
                read_only = bool(READ_ONLY.intersection(re.findall(r"\w+", ast.unparse(annotation))))
            case ast.Assign([ast.Name(name)], value):
                read_only = name == "__all__"
            case _:
                continue
        if _is_mutable(value) and not (read_only and (name.isupper() or name == "__all__")):
            yield source.at(
                node, f"`{name}` is mutable: a tuple, a frozenset, or `NAME: Mapping[...]` in capitals"
            )


def asks_if_simulated(source: Source) -> Iterator[Finding]:
    """Nothing below the shells asks whether it is simulated."""
    if not source.core:
        return
    for node in ast.walk(source.tree):
        name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", getattr(node, "arg", None))
        if isinstance(name, str) and SIMULATED.match(name):
            yield source.at(node, f"`{name}`: a core cannot know; add what differs to a port")


def swallowed_errors(source: Source) -> Iterator[Finding]:
    """An error is named, raised again, or answered."""
    if not source.under("src"):
        return
    for node in ast.walk(source.tree):
        match node:
            case ast.ExceptHandler(caught, _, body):
                names = _words(caught)
                again = any(isinstance(inner, ast.Raise) for part in body for inner in ast.walk(part))
                if (caught is None or "BaseException" in names) and not again:
                    yield source.at(node, "catches even cancellation: name the errors, or end in `raise`")
                elif "Exception" in names and source.core:
                    yield source.at(node, "`except Exception` in a core: name the errors")
                elif "Exception" in names and all(map(_does_nothing, body)):
                    yield source.at(
                        node, "`except Exception` that does nothing: name the errors, or answer them"
                    )
            case ast.Call(func=ast.Name("suppress") | ast.Attribute(attr="suppress"), args=args):
                if any({"Exception", "BaseException"}.intersection(_words(arg)) for arg in args):
                    yield source.at(node, "suppresses every error: name them")
            case _:
                pass


def global_statements(source: Source) -> Iterator[Finding]:
    """No function rebinds what its module holds."""
    if source.under("src"):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Global):
                yield source.at(
                    node, f"`global {', '.join(node.names)}`: put it in an object that has an owner"
                )


def file_budget(source: Source) -> Iterator[Finding]:
    """A file is short enough to be read."""
    if not source.path.endswith((".py", ".cpp", ".cu", ".h")):
        return
    lines = source.text.count("\n")
    lines_max = FILE_LINES_MAX if source.under("src") else TEST_FILE_LINES_MAX
    if lines > lines_max:
        yield Finding(
            source.path, lines, f"{lines} lines, {lines_max} allowed: which two things does it hold?"
        )


def function_budget(source: Source) -> Iterator[Finding]:
    """A function fits on a screen."""
    lines_max = FUNCTION_LINES_MAX if source.under("src") else TEST_FUNCTION_LINES_MAX
    for node in _functions(source.tree):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > lines_max:
            yield source.at(node, f"`{node.name}` has {lines} lines, {lines_max} allowed")


def banned_words(source: Source) -> Iterator[Finding]:
    """A name says what the thing is: no Manager, Helper, Utils, Base, Impl, V2."""
    if not source.path.endswith(".py"):
        return
    models = source.under("src/headrace/compute/models")  # a model's version is its name
    names = [(1, part.removesuffix(".py")) for part in PurePosixPath(source.path).parts]
    names += [(node.lineno, node.name) for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)]
    for line, name in names:
        for word in WORD.findall(name):
            if word.lower() in BANNED_WORDS or (re.fullmatch(r"[Vv]\d+", word) and not models):
                yield Finding(source.path, line, f"`{word}` in `{name}` says nothing: name it by what it is")


def policy_docstrings(source: Source) -> Iterator[Finding]:
    """A file of a seam opens with where its idea comes from and what it does."""
    if source.seam and source.path.endswith(".py") and not ast.get_docstring(source.tree):
        yield Finding(source.path, 1, "open with the source of the idea, its rule, and what is left out")


def markers(source: Source) -> Iterator[Finding]:
    """Work to be done is done, or written where people look for it."""
    yield from _lines_with(source, MARKER, "finish it, or open an issue")


def machine_paths(source: Source) -> Iterator[Finding]:
    """Nothing names a folder of one machine."""
    yield from _lines_with(source, MACHINE_PATH, "a path of one machine: take it as an argument")


RULES: tuple[Rule, ...] = (
    banned_in_cores,
    set_order,
    function_imports,
    module_state,
    asks_if_simulated,
    swallowed_errors,
    global_statements,
    file_budget,
    function_budget,
    banned_words,
    policy_docstrings,
    markers,
    machine_paths,
)


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(name bound, dotted name of what it is bound to) of an import."""
    match node:
        case ast.Import(names):
            for alias in names:
                yield (
                    alias.asname or alias.name.split(".")[0],
                    alias.name if alias.asname else alias.name.split(".")[0],
                )
        case ast.ImportFrom(module, names, level=0):
            for alias in names:
                yield alias.asname or alias.name, f"{module}.{alias.name}"
        case _:
            pass


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _is_mutable(value: ast.expr) -> bool:
    match value:
        case ast.List() | ast.Dict() | ast.Set() | ast.ListComp() | ast.DictComp() | ast.SetComp():
            return True
        case ast.Call(func=ast.Name(name) | ast.Attribute(attr=name)):
            return name in MUTABLE
        case _:
            return False


def _words(node: ast.expr | None) -> frozenset[str]:
    """Names in an expression, without the modules they come from."""
    found = (getattr(inner, "id", getattr(inner, "attr", "")) for inner in ast.walk(node)) if node else ()
    return frozenset(found)


def _does_nothing(statement: ast.stmt) -> bool:
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return constant or isinstance(statement, ast.Pass | ast.Continue)


def _lines_with(source: Source, pattern: re.Pattern[str], message: str) -> Iterator[Finding]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if found := pattern.search(line):
            yield Finding(source.path, number, f"`{found.group()}`: {message}")
