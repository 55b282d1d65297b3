"""ZeRO 0 to 3 on two CPU processes gives the loss curve of one process, with the teacher sharded at stage 3."""

import json
from typing import Any

import numpy as np
import pytest

from tests.distributed.launch import launched


def curve(stage: int, *, processes: int, what: str = "classes") -> dict[str, Any]:
    return json.loads(launched("zero_program.py", str(stage), what, says="CURVE", processes=processes))


@pytest.mark.slow  # DeepSpeed compiles an operator with g++ the first time
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_gives_the_loss_curve_of_one_process(stage: int) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    alone, sharded = curve(-1, processes=1), curve(stage, processes=2)
    np.testing.assert_allclose(sharded["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(sharded["divergence"], alone["divergence"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_fused_zero_gives_the_unfused_loss_curve_of_one_process(stage: int) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    alone, sharded = curve(-1, processes=1, what="with"), curve(stage, processes=2, what="without")
    np.testing.assert_allclose(sharded["losses"], alone["losses"], rtol=1e-4)  # losses are printed with 4 digits
    assert len({tuple(row) for row in alone["losses"]}) > 1
