"""What `inherit` did: which layers, which tensors from where, and what starts fresh. Plain data that prints itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_distill.layer_map import LayerMap


@dataclass(frozen=True)
class StackReport:
    """One layer stack: where it is, the setting that holds its length, and which layer came from which."""

    path: str
    setting: str
    layer_map: LayerMap


@dataclass(frozen=True)
class InheritReport:
    """How a student was made.

    Attributes:
        architecture: the model class.
        stacks: the layer stacks that were cut.
        copied: the name of a parameter or buffer in the student → its name in the teacher.
        carried: those of `copied` that live in the first layer and serve all (T5's table of relative positions).
        recut: those of `copied` with one entry a layer, of which the kept layers' entries were taken.
        fresh: what has no source. Empty: `inherit` refuses rather than start something at random.
        left: parameters of the teacher that the student has not.
        student_parameters, teacher_parameters: how many numbers, tied ones once.
        notes: what else a reader should know.
    """

    architecture: str
    stacks: tuple[StackReport, ...]
    copied: dict[str, str] = field(repr=False)
    carried: tuple[str, ...]
    recut: tuple[str, ...]
    fresh: tuple[str, ...]
    left: tuple[str, ...] = field(repr=False)
    student_parameters: int
    teacher_parameters: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.architecture}: {self.student_parameters:,} of {self.teacher_parameters:,} parameters "
            f"({self.student_parameters / self.teacher_parameters:.0%})"
        ]
        lines += [f"  {stack.path}: {stack.layer_map}" for stack in self.stacks]
        fresh = ", ".join(self.fresh) or "nothing"
        lines.append(f"  copied: {len(self.copied)} tensors; left behind: {len(self.left)}; fresh: {fresh}")
        lines += [f"  {name}: serves all layers; from teacher's {self.copied[name]}" for name in self.carried]
        lines += [f"  {name}: one entry a layer; those of the kept layers" for name in self.recut]
        return "\n".join(lines + [f"  {note}" for note in self.notes])
