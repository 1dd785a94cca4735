import os
import subprocess
import sys

import pytest
import torch

from headrace.compute import ops
from headrace.compute.ops.backend import isa_of, native


def test_says_what_it_runs_on() -> None:
    said = ops.describe(torch.float16)
    assert said == {"attention": "torch", "linear": "torch", "invariant": False}
    assert ops.describe(torch.bfloat16, backend="torch")["invariant"] is False
    assert ops.describe()["invariant"] is (native is not None)


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown backend|not built"):
        isa_of("cuda", torch.float32)
    with pytest.raises(ValueError, match=r"float32 and bfloat16|not built"):
        isa_of("native", torch.float16)


def test_extension_can_be_hidden() -> None:
    program = "from headrace.compute import ops; print(ops.available(), ops.describe()['invariant'])"
    environment = {**os.environ, "HEADRACE_NATIVE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['torch'] False"
