"""An FSDP2-sharded teacher says what the whole one says, and the student's wrapping policy is as it was."""

from tests.distributed.launch import launched


def test_a_sharded_teacher_is_the_whole_teacher() -> None:
    assert float(launched("fsdp_program.py", says="DIFFERENCE", processes=2)) == 0.0
