"""ZeRO 0 to 3 on two CPU processes: the curve of one process, with the teacher sharded at stage 3."""

import json
from typing import Any

import numpy as np
import pytest

from tests.distributed.launch import launched


def curve(stage: int, *, processes: int, what: str = "classes") -> dict[str, Any]:
    return json.loads(launched("zero_program.py", str(stage), what, says="CURVE", processes=processes))


@pytest.mark.slow  # DeepSpeed builds an operator with g++ the first time
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_has_the_curve_of_one_process(stage: int) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    alone, sharded = curve(-1, processes=1), curve(stage, processes=2)
    np.testing.assert_allclose(sharded["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(sharded["divergence"], alone["divergence"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_without_logits_has_the_curve_of_one_process_with_them(stage: int) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    alone, sharded = curve(-1, processes=1, what="with"), curve(stage, processes=2, what="without")
    np.testing.assert_allclose(sharded["losses"], alone["losses"], rtol=1e-4)  # printed with that many digits
    assert len({tuple(row) for row in alone["losses"]}) > 1
