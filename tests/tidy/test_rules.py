"""Each tidy rule catches what it is for, and leaves alone what looks like it."""

import pytest

from tests.tidy import rules
from tests.tidy.modules import dead_modules, missing_packages
from tests.tidy.rules import RULES, Rule
from tests.tidy.source import Source

CORE = "src/headrace/engine/scheduler.py"
SHELL = "src/headrace/live/loop.py"
LONG = "def long():\n" + "    pass\n" * 70

CAUGHT = (
    (rules.banned_in_cores, CORE, "import time"),
    (rules.banned_in_cores, CORE, "from time import monotonic_ns"),
    (rules.banned_in_cores, CORE, "from datetime import datetime\ndatetime.now()"),
    (rules.banned_in_cores, CORE, "import random"),
    (rules.banned_in_cores, CORE, "import numpy as np\nnp.random.default_rng()"),
    (rules.banned_in_cores, CORE, "from numpy import random as draws"),
    (rules.banned_in_cores, CORE, "import os.path"),
    (rules.banned_in_cores, CORE, "from uuid import uuid4"),
    (rules.banned_in_cores, CORE, "import secrets"),
    (rules.banned_in_cores, "src/headrace/ports.py", "import torch"),
    (rules.banned_in_cores, CORE, "x = hash(y)"),
    (rules.banned_in_cores, CORE, "x = {id(y): y}"),
    (rules.banned_in_cores, CORE, "x = sorted(y, key=id)"),
    (rules.banned_in_cores, CORE, "print(1)"),
    (rules.set_order, CORE, "for x in {1, 2}: pass"),
    (rules.set_order, CORE, "for x in set(y): pass"),
    (rules.set_order, CORE, "[x for x in frozenset(y)]"),
    (rules.set_order, CORE, "list({x for x in y})"),
    (rules.set_order, CORE, "a = set()\nb = a | c\nfor x in b: pass"),
    (rules.set_order, CORE, "def f(a: set[int]):\n    return [*a]"),
    (rules.set_order, CORE, "def f(a: frozenset[int] | None):\n    def g():\n        return next(iter(a))"),
    (rules.set_order, CORE, "def f(a: set[int]): return a.pop()"),
    (rules.set_order, CORE, "def f(a: set[int]): return min(a, key=len)"),
    (rules.set_order, CORE, "def f(a: set[int]): return {x: 1 for x in a.union(b)}"),
    (rules.set_order, CORE, "for x in a.keys() & b.keys(): pass"),
    (
        rules.set_order,
        CORE,
        "class A:\n    held: set[int]\ndef f(a):\n    for x in a.held: pass",
    ),
    (
        rules.set_order,
        CORE,
        "class A:\n    def __init__(self): self.held = set()\ndef f(a): list(a.held)",
    ),
    (rules.set_order, CORE, "def f() -> set[int]: ...\nfor x in f(): pass"),
    (rules.function_imports, CORE, "def f():\n    import math"),
    (rules.module_state, CORE, "cache = {}"),
    (rules.module_state, CORE, "CACHE: dict[str, int] = {}"),
    (rules.module_state, CORE, "from itertools import count\nserial = count()"),
    (rules.module_state, CORE, "from collections import defaultdict\nSEEN = defaultdict(list)"),
    (rules.asks_if_simulated, CORE, "if self.is_simulated: pass"),
    (rules.asks_if_simulated, CORE, "def f(simulated): ..."),
    (rules.swallowed_errors, SHELL, "try: f()\nexcept: g()"),
    (rules.swallowed_errors, SHELL, "try: f()\nexcept BaseException: g()"),
    (rules.swallowed_errors, SHELL, "try: f()\nexcept (OSError, Exception): pass"),
    (rules.swallowed_errors, SHELL, "for x in y:\n    try: f()\n    except Exception: continue"),
    (rules.swallowed_errors, SHELL, "with contextlib.suppress(Exception): f()"),
    (rules.swallowed_errors, CORE, "try: f()\nexcept Exception as error: g(error)"),
    (rules.global_statements, SHELL, "def f():\n    global x\n    x = 1"),
    (rules.file_budget, SHELL, "pass\n" * 501),
    (rules.file_budget, "src/headrace/compute/native/linear.cpp", "\n" * 501),
    (rules.file_budget, "tests/sim/test_loop.py", "pass\n" * 601),
    (rules.function_budget, SHELL, LONG),
    (rules.function_budget, "tests/sim/test_loop.py", LONG + "    pass\n" * 30),
    (rules.banned_words, SHELL, "class CacheManager: ..."),
    (rules.banned_words, SHELL, "class KVBase: ..."),
    (rules.banned_words, SHELL, "class RouterV2: ..."),
    (rules.banned_words, "src/headrace/live/io_utils.py", ""),
    (rules.banned_words, "src/headrace/helpers/io.py", ""),
    (rules.policy_docstrings, "src/headrace/cluster/placement/prompt_tree.py", "class Policy: ..."),
    (rules.markers, SHELL, "x = 1  # TO" + "DO: more"),
    (rules.markers, "docs/architecture.md", "FIX" + "ME"),
    (rules.machine_paths, "Makefile", "cd /" + "tmp/build"),
    (rules.machine_paths, "docs/start.md", "`/" + "home/ann/models`"),
)

LEFT_ALONE = (
    (rules.banned_in_cores, SHELL, "import time, random, os\nprint(hash(id(1)))"),
    (rules.banned_in_cores, CORE, "def f(time, os): return time.time + os.urandom"),
    (rules.banned_in_cores, CORE, "import numpy as np\nnp.argmin(x)"),
    (rules.banned_in_cores, CORE, "x = self.hash(y)"),
    (rules.set_order, SHELL, "for x in {1, 2}: pass"),
    (rules.set_order, CORE, "for x in sorted({1, 2}): pass"),
    (rules.set_order, CORE, "a = set()\nassert all(x > 0 for x in a)\n1 in a\nlen(a)\nb = {x for x in a}"),
    (rules.set_order, CORE, "def f(a: dict[int, set[int]]):\n    for x in a: pass"),
    (rules.set_order, CORE, "def f(a: set[int]): ...\ndef g(a: list[int]):\n    for x in a: pass"),
    (rules.set_order, CORE, "def f(a: set[int]):\n    a = sorted(a)\n    for x in a: pass"),
    (rules.set_order, CORE, "a: list[int] = []\na.pop()\nmax(a, default=0)"),
    (rules.function_imports, CORE, "import math"),
    (rules.module_state, CORE, "__all__ = ['a']\nNAMES = ('a', 'b')\nTABLE: Mapping[str, int] = {'a': 1}"),
    (rules.module_state, CORE, "def f():\n    cache = {}"),
    (rules.asks_if_simulated, SHELL, "simulated = True"),
    (rules.swallowed_errors, SHELL, "try: f()\nexcept BaseException:\n    g()\n    raise"),
    (rules.swallowed_errors, SHELL, "try: f()\nexcept Exception as error: report(error)"),
    (rules.swallowed_errors, SHELL, "try: f()\nexcept OSError: pass"),
    (rules.file_budget, SHELL, "pass\n" * 500),
    (rules.function_budget, SHELL, LONG.removesuffix("    pass\n")),
    (rules.banned_words, SHELL, "class Database: ...\nclass BaselineReport: ..."),
    (rules.banned_words, "src/headrace/compute/models/deepseek_v3.py", "class DeepseekV3: ..."),
    (rules.policy_docstrings, "src/headrace/cluster/placement/__init__.py", ""),
    (rules.machine_paths, "docs/start.md", "https://example.org/home/page, /dev/shm, work/tmp/x"),
)


@pytest.mark.parametrize(("rule", "path", "text"), CAUGHT)
def test_catches(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text)))


@pytest.mark.parametrize(("rule", "path", "text"), LEFT_ALONE)
def test_leaves_alone(rule: Rule, path: str, text: str) -> None:
    assert [str(finding) for finding in rule(Source(path, text))] == []


def test_every_rule_is_tested() -> None:
    assert {rule for rule, _, _ in CAUGHT} == set(RULES)


def test_dead_module_is_one_that_only_tests_or_itself_mention() -> None:
    tree = [
        Source(
            "src/headrace/cli/main.py",
            "from headrace.live import loop\nload('headrace.live.worker')",
        ),
        Source("src/headrace/live/__init__.py", ""),
        Source("src/headrace/live/loop.py", ""),
        Source("src/headrace/live/worker.py", ""),
        Source("src/headrace/live/dead.py", "NAME = 'headrace.live.dead'"),
        Source("src/headrace/live/transports/tcp.py", ""),
        Source("tests/live/test_dead.py", "import headrace.live.dead"),
    ]
    assert [finding.path for finding in dead_modules(tree)] == ["src/headrace/live/dead.py"]


def test_folder_without_init_is_found() -> None:
    tree = [Source("src/headrace/__init__.py", ""), Source("src/headrace/kv/pool.py", "")]
    assert [finding.path for finding in missing_packages(tree)] == ["src/headrace/kv"]
